"""The fields of an experiment: each with its default, its meaning, the values it may have, and when
it has an effect.
"""

import dataclasses
from typing import Any

from zo_jax.train.settings import ConfigError, declared, section, setting

# Modes whose steps evaluate the loss along directions, and modes whose every step is along some
# gradient of its batch.
QUERY_MODES = ("zo", "calibrate", "instruct")
FEEDBACK_MODES = ("feedback", "block_local")
GRADIENT_MODES = ("fo", *FEEDBACK_MODES)
MODES = ("zo", "fo", "calibrate", "instruct", "feedback", "block_local")
SIZES = ("custom", "20M", "200M", "500M", "1B", "gpt2", "gpt2-medium", "gpt2-large")
DTYPES = ("float32", "bfloat16", "float16")
HUB_SOURCES = (
    *("cosmopedia-100k", "cosmopedia", "wikitext-103", "openwebtext", "c4", "tinystories"),
    *("pile-subset", "fineweb", "fineweb-edu", "fineweb-edu-10bt"),
)
SOURCES = ("shakespeare", "text", "disk", *HUB_SOURCES)
PUBLISHED_TASKS = (
    *("sst2", "rte", "cb", "boolq", "wsc", "wic"),
    *("multirc", "copa", "record", "squad", "drop"),
)
TASKS = ("text", "file", *PUBLISHED_TASKS)
OBJECTIVES = ("loss", "reward", "accuracy")

_COUNT = "an integer of at least 1"
_COUNT_OR_NONE = "an integer of at least 0"
_POSITIVE = "finite and above 0"
_NOT_NEGATIVE = "finite and at least 0"
_DECAY = "at least 0 and below 1"
_HYBRID = "mode is calibrate or instruct"
_BACKPROP = "mode is fo or calibrate or instruct"
_QUERIES = "mode is zo or calibrate or instruct"
_DRAWS = "mode is feedback and feedback.attention is weights or qkv"
_ADAPTIVE = "instruct.adaptive is true"
_SCRATCH, _PRETRAINED = "model.path is empty", "model.path is not empty"
_CUSTOM = "model.size is custom"
_TEXT, _EXAMPLES = "task.name is text", "task.name is not text"
_LOSS, _REWARD = "objective.name is loss", "objective.name is reward"
_SCORED = "objective.name is not loss"
# A corpus of several documents, of which a part can be read.
_HAS_SAMPLES = "{}source is not empty or shakespeare"
# What another value changes in a run that goes on.
_LENGTH = (
    "how long the run is; fixed with `optimizer.schedule=cosine`, whose learning rates it changes"
)
_FROM_THERE = "what is written from the step on where the run goes on"
ROUNDING = "the last bits, by rounding; the run says so"
_NOTHING = "no number"


@dataclasses.dataclass
class ModelConfig:
    """The decoder: GPT-2's, from scratch, or a pretrained one."""

    path: str = setting(
        "",
        "a pretrained model: a Hugging Face folder, which zo-jax export writes of a run too, or a "
        ".gguf file (empty: a GPT from scratch)",
        may_change="no number, if the weights there are the same",
    )
    quantized: str = setting(
        "none",
        "weights that stay quantised in memory: none; file, as they are in the .gguf file; int8 or "
        "int4, quantised as they are read",
        choices=("none", "file", "int8", "int4"),
        only_if=_PRETRAINED,
    )
    size: str = setting(
        "custom",
        "a named size, or custom, from the three fields below",
        choices=SIZES,
        only_if=_SCRATCH,
    )
    num_layers: int = setting(
        0, "transformer blocks", allowed=_COUNT_OR_NONE, only_if=f"{_SCRATCH} and {_CUSTOM}"
    )
    num_heads: int = setting(
        0, "attention heads of a block", allowed=_COUNT_OR_NONE, only_if=f"{_SCRATCH} and {_CUSTOM}"
    )
    width: int = setting(
        0,
        "width of the residual stream",
        allowed=_COUNT_OR_NONE,
        only_if=f"{_SCRATCH} and {_CUSTOM}",
    )
    context_length: int = setting(
        1024,
        "learned positions: the longest block the model can read",
        allowed=_COUNT,
        only_if=_SCRATCH,
    )
    param_dtype: str = setting("float32", "dtype in which parameters are stored", choices=DTYPES)
    compute_dtype: str = setting(
        "float32", "dtype of activations and matrix products", choices=DTYPES
    )
    checkpoint_activations: bool = setting(
        False,
        "backprop keeps the inputs of a block alone, and computes the rest again (less memory)",
        only_if=_BACKPROP,
        may_change=ROUNDING,
    )
    tied_head: bool = setting(
        True,
        "whether the output head is the token embedding, or a table of its own",
        only_if=_SCRATCH,
    )
    embedding_std: float = setting(
        0.02,
        "standard deviation of the initial token embeddings (of positions half of it)",
        allowed=_POSITIVE,
        only_if=_SCRATCH,
    )


@dataclasses.dataclass
class LoraConfig:
    """Low-rank factors beside frozen weights."""

    rank: int = setting(8, "rank of the factors", allowed=_COUNT)
    alpha: float = setting(
        16.0, "the change is alpha / rank times their product", allowed=_POSITIVE
    )
    targets: str = setting(
        r"/(q_proj|v_proj|c_attn)$",
        "regular expression, searched for in the names of weights, like layers/self_attn/q_proj",
    )
    num_layers: int = setting(
        0,
        "the last so many layers have factors (0: all); what lies below them is evaluated once for "
        "all queries of a step",
        allowed=_COUNT_OR_NONE,
    )


@dataclasses.dataclass
class TaskConfig:
    """What is learnt: text, or examples of a prompt and what follows it."""

    name: str = setting(
        "text",
        "text: the next token of the corpus, see data; file: examples of a file of one's own; the "
        "others are MeZO's, with its prompts, from the Hugging Face Hub",
        choices=TASKS,
    )
    path: str = setting(
        "",
        "file .jsonl or .csv of examples (task file); of the other tasks a folder with a copy of "
        "the data set (empty: from the Hub)",
        only_if=_EXAMPLES,
    )
    template: str = setting(
        "", "the prompt, with columns in braces, like '{text} It was'", only_if="task.name is file"
    )
    labels: str = setting(
        "",
        "what follows the prompt for each label, as JSON, like "
        """'{"0": " terrible", "1": " great"}'""",
        only_if="task.name is file",
    )
    label_column: str = setting(
        "label", "column of the labels", only_if="task.name is file and task.labels is not empty"
    )
    target: str = setting(
        "",
        "column of the answers, rather than labels; with task.chat and no template, of whole "
        "conversations",
        only_if="task.name is file",
    )
    chat: bool = setting(
        False,
        "whether prompts are messages of a user, and answers those of the assistant, by the "
        "model's template",
        only_if="task.name is file",
    )
    num_train: int = setting(1000, "training examples, at most", allowed=_COUNT, only_if=_EXAMPLES)
    num_validation: int = setting(
        500, "validation examples, at most", allowed=_COUNT, only_if=_EXAMPLES
    )
    num_test: int = setting(
        1000,
        "test examples, at most, which are looked at once the run is finished (0: none)",
        allowed=_COUNT_OR_NONE,
        only_if=_EXAMPLES,
    )
    max_tokens: int = setting(
        512,
        "tokens of an example; of a longer prompt the end is read",
        allowed="an integer of at least 2",
        only_if=_EXAMPLES,
    )
    keep_best: bool = setting(
        True,
        "keep the state with the best validation result so far in best/, and test it in the end",
        only_if=_EXAMPLES,
    )
    answer_tokens: int = setting(
        50,
        "tokens of an answer that is written to be compared, at most (0: none is written, and only "
        "the loss is told)",
        allowed=_COUNT_OR_NONE,
        only_if="task.name is squad or drop or task.target is not empty",
    )


@dataclasses.dataclass
class ObjectiveConfig:
    """What a step climbs: the loss of the task, or scores of what the model writes."""

    name: str = setting(
        "loss",
        "loss: of the task, to be lowered; reward: a Python function's scores of completions; "
        "accuracy: of the task's answers; both are raised, by a population of zo.num_queries pairs "
        "at a distance of zo.epsilon",
        choices=OBJECTIVES,
    )
    path: str = setting(
        "",
        "the reward, as FILE.py:FUNCTION; function(prompts, completions, rows) returns a score for "
        "each completion, more is better; rows are those of task.path",
        only_if=_REWARD,
    )
    shaping: str = setting(
        "zscore",
        "what is made of scores: raw; zscore, over the population; prompt, likewise of each prompt "
        "by itself; ranks, from -1/2 to 1/2",
        choices=("raw", "zscore", "prompt", "ranks"),
        only_if=_SCORED,
    )
    max_new_tokens: int = setting(
        64, "tokens of a completion, at most", allowed=_COUNT, only_if=_REWARD
    )
    temperature: float = setting(
        0.0,
        "of sampling, by the same random numbers for all members of a step (0: the likeliest "
        "token)",
        allowed=_NOT_NEGATIVE,
        only_if=_REWARD,
    )
    stop: str = setting(
        "", "a string that ends a completion (empty: the model's end alone)", only_if=_REWARD
    )
    timeout: float = setting(
        10.0,
        "seconds for a call of the reward; what takes longer has the lowest score of its step",
        allowed=_POSITIVE,
        only_if=_REWARD,
        may_change="which calls of the reward fail",
    )
    text_path: str = setting(
        "",
        "a text file whose loss is told with every evaluation, to see what is forgotten (empty: "
        "none)",
        only_if=_SCORED,
        may_change=_FROM_THERE,
    )


@dataclasses.dataclass
class DataConfig:
    """Where the text comes from, and how it becomes blocks of tokens."""

    source: str = setting(
        "shakespeare",
        "shakespeare is embedded; text: local files, and disk: a folder written by datasets' "
        "save_to_disk, see path; the others are data sets of the Hugging Face Hub",
        choices=SOURCES,
    )
    path: str = setting(
        "",
        "file or glob (source text), or folder (source disk)",
        only_if="data.source is text or disk",
    )
    text_column: str = setting(
        "",
        "column that holds the text (empty: the usual one)",
        only_if="data.source is not shakespeare or text or fo.source is not empty or shakespeare or text "  # noqa: E501
        "or train.eval_source is not empty or shakespeare or text",
    )
    max_samples: int = setting(
        0,
        "read only this many documents of the data set (0: all)",
        allowed=_COUNT_OR_NONE,
        only_if="data.source is not shakespeare",
    )
    tokenizer: str = setting(
        "char",
        "characters; bpe: byte-level, trained on the corpus and cached; gpt2: 50257 tokens; a "
        "pretrained model has its own",
        choices=("char", "bpe", "gpt2"),
        only_if=_SCRATCH,
    )
    tokenizer_path: str = setting(
        "",
        "folder with GPT-2's vocab.json or encoder.json and merges.txt or vocab.bpe (empty: "
        "from the Hub)",
        only_if="data.tokenizer is gpt2",
    )
    bpe_vocab_size: int = setting(
        4096,
        "words of the vocabulary",
        allowed="an integer from 257 to 1048576",
        only_if="data.tokenizer is bpe",
    )
    block_size: int = setting(
        128, "tokens of a block: one training sequence", allowed="an integer of at least 2"
    )
    validation_fraction: float = setting(
        0.1, "part of the blocks held out for validation", allowed="above 0 and below 1"
    )
    cache_dir: str = setting(
        "",
        "trained tokenizers are kept here (empty: ~/.cache/zo_jax)",
        only_if="data.tokenizer is bpe",
        may_change=_NOTHING,
    )


# Families of directions with factors that last several steps (`zo_jax.methods`).
KEPT = ("lozo", "subzero", "tezo")
# Methods with numbers, weights or a memory of their own (`zo_jax.methods`).
METHODS = (
    *("spsa15", "evolution", "eggroll", "lozo", "subzero", "tezo"),
    *("mopi", "zo_muon", "hizoo", "conmezo", "sparse_mezo", "svrg", "grzo"),
)
# Those whose directions are their own, whatever zo.perturbation would draw.
OWN_DIRECTIONS = ("lozo", "subzero", "tezo", "mopi", "zo_muon", "agzo")
# Those whose steps look at their data in ways that no numbers tell.
UNRECORDED = ("agzo", "dizo", "addax")


@dataclasses.dataclass
class ZOConfig:
    """The zeroth-order gradient estimate."""

    num_queries: int = setting(
        8,
        "directions evaluated in a step (q)",
        allowed="an integer of at least 1 and at most 1048576",
    )
    epsilon: float = setting(
        1e-3,
        "perturbation size of the finite difference, and the distance of a population's members; "
        "auto: measured before the first step",
        words=("auto",),
        # What float32 rounds to zero or infinity is no perturbation.
        allowed="above 1e-37 and below 1e37",
        only_if="zo.difference is not jvp",
    )
    perturbation: str = setting(
        "rademacher",
        "family of directions; lozo, subzero and tezo keep factors of each matrix for some steps",
        choices=("rademacher", "gaussian", "sphere", "low_rank", *KEPT),
    )
    rank: int = setting(
        1,
        "rank of the directions",
        allowed=_COUNT,
        only_if="zo.perturbation is low_rank or lozo or subzero or tezo",
    )
    period: int = setting(
        50,
        "steps for which factors are kept",
        allowed=_COUNT,
        only_if="zo.perturbation is lozo or subzero",
    )
    difference: str = setting(
        "central",
        "central (2 evaluations a query), forward (1 + q evaluations) or jvp (exact, forward mode)",
        choices=("central", "forward", "jvp"),
        only_if=_LOSS,
    )
    parallel_batch_size: int = setting(
        1,
        "queries evaluated at once (memory grows with it)",
        allowed=_COUNT,
        only_if=_LOSS,
        may_change=ROUNDING,
    )
    batch_chunks: int = setting(
        1,
        "chunks of a batch that are evaluated one after the other (less memory for activations)",
        allowed=_COUNT,
        only_if=_LOSS,
        may_change=ROUNDING,
    )
    batch_per_query: bool = setting(
        False,
        "a fresh batch for every query, rather than one batch shared by all",
        only_if=_LOSS,
    )
    method: str = setting(
        "plain",
        "what is made of the losses: plain (the mean of differences), fzoo (that over the standard "
        "deviation of the losses), or another method of docs/methods.md",
        choices=("plain", "fzoo", *METHODS, *UNRECORDED),
        only_if=f"mode is zo and {_LOSS}",
    )
    method_options: str = setting(
        "",
        """fields of the method, as JSON, like '{"decay": 0.9}' (empty: its paper's)""",
        only_if="zo.method is not plain or fzoo",
    )
    groups: str = setting(
        "none",
        "none: a direction moves all parameters; layers (each layer, and each other top-level "
        "entry) or leaves: one group of them, with queries shared out by what the projections tell "
        "of the groups' gradients; tokens: layers, and of the token embedding, or a head of its "
        "own, the rows of tokens that the training text has about as often. The loss is compiled "
        "once for each group",
        choices=("none", "layers", "leaves", "tokens"),
        only_if=f"mode is zo and {_LOSS}",
    )
    tiers: str = setting(
        "",
        "tier of every token, packed; empty: counted in the training text, and recorded",
        only_if="zo.groups is tokens",
    )
    exact: str = setting(
        "none",
        "parameters whose gradient is exact, with directions for the rest: none; head (the last "
        "norm and the output head, in closed form); or a regular expression over paths like "
        "blocks/3/fc/kernel, by backprop down to the lowest of them. Such a run has no ledger: it "
        "goes on from checkpoints",
        only_if=f"mode is zo and {_LOSS}",
    )
    relative_rate: float = setting(
        1.0,
        "learning rate of the parameters that have directions, over that of those that are exact: "
        "Adam gives the noise of directions the step that it gives an exact gradient",
        allowed=_POSITIVE,
        only_if="zo.exact is not none",
    )


@dataclasses.dataclass
class FOConfig:
    """The backprop gradient."""

    gradient_accumulation_steps: int = setting(
        1, "micro-batches that a batch is split into", allowed=_COUNT, only_if=_BACKPROP
    )
    bp_interval: int = setting(
        0, "steps from one backprop gradient to the next", allowed=_COUNT_OR_NONE, only_if=_HYBRID
    )
    relative_rate: float = setting(
        0.0,
        "steps of backprop have moments of their own and so many times the learning rate (0: one "
        "optimiser for both kinds of steps, whose second moments are those of the estimates)",
        allowed=_NOT_NEGATIVE,
        only_if=_HYBRID,
    )
    batch_size: int = setting(
        0,
        "blocks of a backprop batch (0: as train.batch_size)",
        allowed=_COUNT_OR_NONE,
        only_if=_BACKPROP,
    )
    source: str = setting(
        "",
        "corpus of its own for backprop, as data.source (empty: the run's)",
        choices=("", *SOURCES),
        only_if=f"{_HYBRID} and {_TEXT}",
    )
    path: str = setting(
        "", "file, glob or folder of that corpus", only_if="fo.source is text or disk"
    )
    max_samples: int = setting(
        0,
        "read only so many documents of that corpus (0: all)",
        allowed=_COUNT_OR_NONE,
        only_if=_HAS_SAMPLES.format("fo."),
    )
    corpus_fraction: float = setting(
        0.0,
        "part of the training blocks kept for backprop, the rest for queries (0: all for both)",
        allowed="at least 0 and below 1",
        only_if=f"{_HYBRID} and {_TEXT} and fo.source is empty",
    )


@dataclasses.dataclass
class InstructConfig:
    """Directions guided by a backprop gradient."""

    method: str = setting(
        "hybrid",
        "hybrid: its largest coordinates, noise elsewhere; gram_schmidt: a random direction turned "
        "to it",
        choices=("hybrid", "gram_schmidt"),
    )
    cosine_target: float = setting(
        0.9, "cosine of a guided direction to the gradient", allowed="from -1 to 1"
    )
    noise_scale: float = setting(
        0.5,
        "noise of hybrid directions, relative to the gradient",
        allowed=_NOT_NEGATIVE,
        only_if="instruct.method is hybrid",
    )
    num_guided: int = setting(
        0,
        "guided directions of a step, random ones besides (0: all guided)",
        allowed=_COUNT_OR_NONE,
    )
    blend_ratio: float = setting(
        0.0, "part of the backprop gradient in the update", allowed="from 0 to 1"
    )
    normalize: bool = setting(
        False,
        "bring estimates along guided directions, which are as long as the gradient, to its scale; "
        "else they go with its third power",
    )
    grad_clip_norm: float = setting(
        0.0, "largest global norm of the estimate (0: any)", allowed=_NOT_NEGATIVE
    )
    adaptive: bool = setting(False, "raise the cosine and lower the noise as the loss falls")
    adaptive_start: float = setting(
        7.0, "ten-step mean loss below which that begins", allowed=_POSITIVE, only_if=_ADAPTIVE
    )
    adaptive_interval: float = setting(
        0.2, "fall of the loss from one level to the next", allowed=_POSITIVE, only_if=_ADAPTIVE
    )
    cosine_step: float = setting(
        0.1, "rise of the cosine target a level", allowed=_NOT_NEGATIVE, only_if=_ADAPTIVE
    )
    cosine_max: float = setting(
        0.99, "highest cosine target", allowed="from -1 to 1", only_if=_ADAPTIVE
    )
    noise_step: float = setting(
        1.0,
        "fall of the noise scale a level",
        allowed=_NOT_NEGATIVE,
        only_if=f"{_ADAPTIVE} and instruct.method is hybrid",
    )
    noise_min: float = setting(
        0.1,
        "lowest noise scale",
        allowed=_NOT_NEGATIVE,
        only_if=f"{_ADAPTIVE} and instruct.method is hybrid",
    )


@dataclasses.dataclass
class FeedbackConfig:
    """The output error, handed to every block as its own."""

    matrix: str = setting(
        "identity",
        "what an error passes on its way to a block: nothing, or a fixed random matrix, a control",
        choices=("identity", "random"),
        only_if="feedback.errors is all",
    )
    errors: str = setting(
        "all",
        "blocks that get it: all, or (a control) the last MLP alone, in mode block_local and of a "
        "pretrained model the last block",
        choices=("all", "last"),
    )
    handed_to: str = setting(
        "blocks",
        "what gets it: blocks, whose MLP hands its attention, and the first block the embeddings, "
        "what it finds for its own input; or every sublayer as it is",
        choices=("blocks", "sublayers"),
        only_if=f"mode is feedback and feedback.errors is all and {_SCRATCH}",
    )
    attention: str = setting(
        "weights",
        "credit inside attention: by draws on its weights, or on queries, keys and values "
        "(qkv); by the derivative of its softmax (closed_form); or none, a control; a pretrained "
        "model has closed_form and none",
        choices=("weights", "qkv", "closed_form", "none"),
        only_if="mode is feedback",
    )
    num_draws: int = setting(
        4,
        "draws of signs a step, for each of the places that they are added to",
        allowed="an integer from 1 to 32",
        only_if=_DRAWS,
    )
    sigma: float = setting(
        0.05,
        "size of the differences: of weights relative to their roots (at most 0.2), of queries, "
        "keys, values and the MLP's units relative to their root mean square",
        allowed="above 1e-4 and below 10",
        only_if="mode is feedback",
    )
    discount: float = setting(
        0.98,
        "weight of a later token's score in the credit of keys and values, for each token between",
        allowed="from 0 to 1",
        only_if="mode is feedback and feedback.attention is qkv",
    )


@dataclasses.dataclass
class OptimizerConfig:
    """The optimiser and its learning rate."""

    name: str = setting("adam", "the optimiser", choices=("sgd", "adam", "adamw", "muon", "mudamw"))
    learning_rate: float = setting(
        1e-3,
        "peak learning rate; auto, in mode zo: found by measurements and short trials before the "
        "first step",
        words=("auto",),
        allowed=_POSITIVE,
    )
    adam_learning_rate: float = setting(
        0.0,
        "peak learning rate of what Muon leaves to Adam (0: the same)",
        allowed=_NOT_NEGATIVE,
        only_if="optimizer.name is muon",
    )
    schedule: str = setting(
        "constant",
        "constant, or cosine: linear warm-up, then cosine decay",
        choices=("constant", "cosine"),
    )
    warmup_steps: int = setting(
        300,
        "steps of linear warm-up",
        allowed=_COUNT_OR_NONE,
        only_if="optimizer.schedule is cosine",
    )
    min_learning_rate: float = setting(
        1e-6,
        "learning rate at the last step",
        allowed=_NOT_NEGATIVE,
        only_if="optimizer.schedule is cosine",
    )
    momentum: float = setting(
        0.0, "decay of the momentum (0: none)", allowed=_DECAY, only_if="optimizer.name is sgd"
    )
    b1: float = setting(
        0.9, "decay of the first moment", allowed=_DECAY, only_if="optimizer.name is not sgd"
    )
    b2: float = setting(
        0.999, "decay of the second moment", allowed=_DECAY, only_if="optimizer.name is not sgd"
    )
    eps: float = setting(
        1e-8,
        "term added to the denominator",
        allowed=_POSITIVE,
        only_if="optimizer.name is not sgd",
    )
    weight_decay: float = setting(
        0.0,
        "decoupled decay of matrices",
        allowed=_DECAY,
        only_if="optimizer.name is adamw or muon or mudamw",
    )
    anchor: float = setting(
        0.0,
        "decoupled decay towards the parameters that the run began with, times the learning rate "
        "a step; the distance from them is told (0: none)",
        allowed=_NOT_NEGATIVE,
    )
    rounding: str = setting(
        "stochastic",
        "of updates to parameters of 16 bits: stochastic (unbiased, from the step's key) or "
        "nearest "
        "(small updates are lost)",
        choices=("stochastic", "nearest"),
        only_if="model.param_dtype is not float32",
    )
    cautious: bool = setting(
        False, "move only where momentum and gradient agree", only_if="optimizer.name is mudamw"
    )
    orthogonalize_embedding: bool = setting(
        True,
        "whether the embeddings count as matrices to orthogonalise",
        only_if="optimizer.name is muon or mudamw",
    )


@dataclasses.dataclass
class MeshConfig:
    """How the devices are arranged: sizes of three axes, of which one may be -1, what is left."""

    query: int = setting(
        -1,
        "groups of devices that evaluate different queries",
        allowed="at least 1, or -1 for what is left",
        only_if=_QUERIES,
        may_change=_NOTHING,
    )
    data: int = setting(
        1,
        "parts that a batch is split into",
        allowed="at least 1, or -1 for what is left",
        may_change=ROUNDING,
    )
    model: int = setting(
        1,
        "parts that parameters and optimiser state are split into",
        allowed="at least 1, or -1 for what is left",
        may_change=ROUNDING,
    )


@dataclasses.dataclass
class TrainConfig:
    """Length of the run, and what is reported when."""

    num_steps: int = setting(
        0,
        "optimiser steps (0: as many as num_epochs takes)",
        allowed="an integer from 0 to 2147483647",
        may_change=_LENGTH,
    )
    num_epochs: int = setting(
        1,
        "passes over the training blocks or examples",
        allowed=_COUNT,
        only_if="train.num_steps is 0",
        may_change=_LENGTH,
    )
    batch_size: int = setting(
        8,
        "blocks, or examples, of a batch (of each query's own, with batch_per_query)",
        allowed=_COUNT,
        only_if="mode is not fo or fo.batch_size is 0",
    )
    log_interval: int = setting(
        10, "steps between rows of metrics.csv", allowed=_COUNT, may_change=_FROM_THERE
    )
    eval_interval: int = setting(
        100, "steps between evaluations on held-out blocks", allowed=_COUNT, may_change=_FROM_THERE
    )
    eval_blocks: int = setting(
        128, "held-out blocks of an evaluation, at most", allowed=_COUNT, only_if=_TEXT
    )
    eval_source: str = setting(
        "",
        "corpus of its own for evaluation, as data.source (empty: the run's held-out blocks)",
        choices=("", *SOURCES),
        only_if=_TEXT,
    )
    eval_path: str = setting(
        "", "file, glob or folder of that corpus", only_if="train.eval_source is text or disk"
    )
    eval_max_samples: int = setting(
        0,
        "read only so many documents of that corpus (0: all)",
        allowed=_COUNT_OR_NONE,
        only_if=_HAS_SAMPLES.format("train.eval_"),
    )
    checkpoint_interval: int = setting(
        200,
        "steps between checkpoints (0: none but by the minutes)",
        allowed=_COUNT_OR_NONE,
        may_change=_FROM_THERE,
    )
    checkpoint_minutes: float = setting(
        0.0,
        "minutes between checkpoints besides (0: none)",
        allowed=_NOT_NEGATIVE,
        may_change=_FROM_THERE,
    )
    keep_checkpoints: int = setting(
        2,
        "the latest so many checkpoints are kept",
        allowed=_COUNT,
        only_if="train.checkpoint_interval is not 0 or train.checkpoint_minutes is not 0",
        may_change=_NOTHING,
    )
    max_skipped: int = setting(
        50,
        "stop after so many steps in a row without a finite loss (0: never)",
        allowed=_COUNT_OR_NONE,
        may_change="when a run without finite losses stops",
    )
    snapshot_delta: float = setting(
        0.0,
        "keep a snapshot each time the validation loss has fallen by as much more (0: none)",
        allowed=_NOT_NEGATIVE,
        may_change=_FROM_THERE,
    )
    sample_tokens: int = setting(
        200,
        "tokens of the text sampled at the end (0: none)",
        allowed="an integer from 0 to 1048576",
        only_if=_TEXT,
        may_change="the sample at the end",
    )
    sample_temperature: float = setting(
        0.8,
        "temperature of that sampling; lower is more certain",
        allowed=_POSITIVE,
        only_if=f"{_TEXT} and train.sample_tokens is not 0",
        may_change="the sample at the end",
    )
    keep_activations: bool = setting(
        False,
        "keep in the host's memory what lies below the trained part, by batch: epochs have the "
        "same batches, and from the second on a step evaluates the trained part alone",
        only_if=f"mode is zo or fo and task.name is not text and {_LOSS} and zo.method is plain or "
        "fzoo and zo.groups is none and zo.exact is none and zo.batch_per_query is false and "
        "zo.batch_chunks is 1 and fo.gradient_accumulation_steps is 1",
    )
    wandb: str = setting(
        "",
        "project of Weights & Biases to which rows are sent besides (empty: none); needs its "
        "library, pip install 'zo_jax[wandb]'",
        may_change=_NOTHING,
    )


@dataclasses.dataclass
class Config:
    """One experiment, whole."""

    mode: str = setting(
        "zo",
        "zo (forward passes only), fo (backprop), calibrate (zo, and every fo.bp_interval steps fo "
        "instead), instruct (zo, and every fo.bp_interval steps along guided directions), feedback "
        "(forward "
        "passes only: the output error handed to every block, local credit inside) or block_local "
        "(the "
        "same, with backprop inside every block)",
        choices=MODES,
    )
    scope: str = setting(
        "full",
        "what is trained: full, reduced (the last block's MLP and its norm, and the output head), "
        "lora (factors beside the weights of a pretrained model), or a regular expression over "
        "paths like blocks/3/fc/kernel",
    )
    seed: int = setting(
        0,
        "seed of the initial parameters, the directions and the batches",
        allowed="from 0 to 4294967295",
    )
    model: ModelConfig = section(ModelConfig, "the decoder")
    lora: LoraConfig = section(
        LoraConfig, "low-rank factors beside frozen weights", only_if="scope is lora"
    )
    task: TaskConfig = section(TaskConfig, "what is learnt")
    objective: ObjectiveConfig = section(ObjectiveConfig, "what a step lowers or raises")
    data: DataConfig = section(DataConfig, "text, tokenizer and blocks", only_if=_TEXT)
    zo: ZOConfig = section(ZOConfig, "the zeroth-order estimate", only_if=_QUERIES)
    fo: FOConfig = section(FOConfig, "the backprop gradient")
    instruct: InstructConfig = section(
        InstructConfig, "directions guided by backprop", only_if="mode is instruct"
    )
    feedback: FeedbackConfig = section(
        FeedbackConfig,
        "the output error, handed to every block",
        only_if="mode is feedback or block_local",
    )
    optimizer: OptimizerConfig = section(OptimizerConfig, "optimiser and learning rate")
    train: TrainConfig = section(TrainConfig, "length of the run, and reports")
    mesh: MeshConfig = section(MeshConfig, "devices")


# Every field, by its dotted name.
SETTINGS = {one.name: one for one in declared(Config)}
# Fields in which a run may differ from the one that it continues, and what that changes. All others
# are fixed.
EXTENDABLE = {name: one.may_change for name, one in SETTINGS.items() if one.may_change}


def from_dict(fields: Any, kind: Any = Config) -> Any:
    """The configuration that `dataclasses.asdict` made `fields` of; absent fields have their
    defaults.

    Raises:
      ConfigError: it is no dictionary, or has fields that no configuration has. Types are left to
        `validate`.
    """
    if not isinstance(fields, dict):
        raise ConfigError(f"a configuration is a dictionary of its fields; got {fields!r:.80}")
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    if unknown := [name for name in fields if name not in known]:
        raise ConfigError(f"{unknown[0]!r:.80} is no field of {kind.__name__}")
    nested = lambda name, value: (
        from_dict(value, known[name]) if dataclasses.is_dataclass(known[name]) else value
    )
    return kind(**{name: nested(name, value) for name, value in fields.items()})


def extendable(config: Config) -> dict[str, str]:
    """`EXTENDABLE` of this run: the learning rates of a cosine depend on its length."""
    fixed = "train.num_steps" if config.optimizer.schedule == "cosine" else None
    return {name: what for name, what in EXTENDABLE.items() if name != fixed}


def fixed_fields(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries, less the fields in which a run may change."""
    tree = dataclasses.asdict(config)
    for name in extendable(config):
        section, _, leaf = name.rpartition(".")
        del tree[section][leaf]
    return tree


def method_of(config: Config) -> dict[str, Any] | None:
    """What makes updates of a run's numbers where it is not their mean, for the header of its
    ledger; `zo_jax.methods.weights_of` knows FZOO.
    """
    zo = config.zo
    if zo.method == "plain":
        return None
    options = {"options": zo.method_options} if zo.method in METHODS else {}
    return {"name": zo.method, "epsilon": zo.epsilon, **options}


def keeps_ledger(config: Config) -> bool:
    """Whether a run has a ledger: whether the projections of some of its steps are all that these
    depend on.
    """
    zo = config.zo
    return config.mode in QUERY_MODES and zo.exact == "none" and zo.method not in UNRECORDED


def blocks_per_step(config: Config) -> int:
    """Training blocks that one step reads (in hybrid modes, for its queries)."""
    if config.mode in GRADIENT_MODES:
        return config.fo.batch_size or config.train.batch_size
    per_query = config.zo.batch_per_query
    return config.train.batch_size * (config.zo.num_queries if per_query else 1)
