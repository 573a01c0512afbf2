"""What settings ask of one another."""

from collections.abc import Mapping

from zo_jax.credit import MAX_SIZE
from zo_jax.tiers import pack, unpack
from zo_jax.train.choices import own_method, unrecorded_method
from zo_jax.train.config import KEPT, Config
from zo_jax.train.model import SIZES
from zo_jax.train.named_methods import check_method
from zo_jax.train.settings import ConfigError


def check_combinations(config: Config) -> None:
    """Of values that are each allowed.

    Raises:
      ConfigError: the first combination that is not; the message has both, and what to change.
    """
    check_mode(config)
    _check_pretrained(config)
    _check_task(config)
    _check_objective(config)
    _check_model(config)
    _check_feedback(config)
    _check_sources(config)
    _check_batches(config)
    _check_groups(config)
    _check_method(config)
    _check_optimizer(config)
    if config.mode in ("calibrate", "instruct") and not config.fo.bp_interval:
        raise ConfigError(
            f"mode {config.mode} needs fo.bp_interval, the steps from one backprop gradient to the "
            "next; set it to 1 or more"
        )
    if config.instruct.num_guided > config.zo.num_queries:
        raise ConfigError(
            f"instruct.num_guided={config.instruct.num_guided} is more than zo.num_queries="
            f"{config.zo.num_queries}; make it at most that"
        )


def check_mode(config: Config) -> None:
    """Of an objective; before all that has no effect in another mode is told."""
    if config.objective.name != "loss" and config.mode != "zo":
        raise ConfigError(
            f"objective.name={config.objective.name} has no gradient that backprop could find: it "
            f"needs mode=zo; got {config.mode}"
        )


def _check_pretrained(config: Config) -> None:
    model = config.model
    if model.path and config.mode == "feedback" and config.feedback.attention in ("weights", "qkv"):
        raise ConfigError(
            f"feedback.attention={config.feedback.attention} has draws, which only the GPT from "
            "scratch has; with model.path set feedback.attention=closed_form, or none"
        )
    if config.scope == "lora" and not model.path:
        raise ConfigError(
            "scope=lora trains factors beside the weights of a pretrained model; set model.path"
        )
    if config.scope == "full" and model.quantized != "none":
        raise ConfigError(
            f"model.quantized={model.quantized} leaves weights that cannot be trained themselves; "
            f"set scope=lora, or a regular expression that finds norms alone"
        )


def _check_task(config: Config) -> None:
    task = config.task
    if task.name == "text":
        return
    if not config.model.path:
        raise ConfigError(f"task.name={task.name} needs a pretrained model; set model.path")
    if task.name != "file":
        return
    if not task.path:
        raise ConfigError("task.name=file needs task.path; set it to a .jsonl or .csv file")
    needs_answers = config.objective.name != "reward"
    if bool(task.labels) == bool(task.target) and (needs_answers or task.labels):
        raise ConfigError(
            "task.name=file needs either task.labels, what follows the prompt for each label, or "
            "task.target, the column of the answers; set one of them"
        )
    if not task.template and not (task.chat and task.target):
        raise ConfigError("task.name=file needs task.template, the prompt, like '{text} It was'")


def _check_objective(config: Config) -> None:
    objective, zo = config.objective, config.zo
    if objective.name == "loss":
        return
    if config.task.name == "text":
        raise ConfigError(
            f"objective.name={objective.name} needs prompts: set task.name=file and task.path, and "
            "model.path to a model that writes"
        )
    if zo.perturbation != "low_rank":
        raise ConfigError(
            f"objective.name={objective.name} needs zo.perturbation=low_rank, whose members share "
            f"their products; got {zo.perturbation}"
        )
    for name, value in (
        ("zo.epsilon", zo.epsilon),
        ("optimizer.learning_rate", config.optimizer.learning_rate),
    ):
        if value == "auto":
            raise ConfigError(
                f"{name}=auto is found by a loss: with objective.name={objective.name} set a number"
            )
    file, _, function = objective.path.rpartition(":")
    if objective.name == "reward" and not (file.endswith(".py") and function.isidentifier()):
        raise ConfigError(
            "objective.path must be a Python file and one of its functions, like "
            f"my_reward.py:score; got {objective.path!r}"
        )


def _check_model(config: Config) -> None:
    model, data, zo = config.model, config.data, config.zo
    is_half = "float16" in (model.param_dtype, model.compute_dtype)
    if is_half and zo.epsilon != "auto" and zo.epsilon < 2**-14:
        raise ConfigError(
            f"zo.epsilon={zo.epsilon:g} underflows in float16, whose least normal number is "
            "6.1e-05; use a larger one, such as 1e-2, or bfloat16"
        )
    if model.path:
        return
    if model.size == "custom":
        shape = {name: getattr(model, name) for name in ("num_layers", "num_heads", "width")}
        if missing := [f"model.{name}" for name, value in shape.items() if not value]:
            raise ConfigError(
                f"model.size=custom needs {', '.join(missing)} of at least 1; or set model.size "
                f"to one of {', '.join(SIZES)}"
            )
        if model.width % model.num_heads:
            raise ConfigError(
                "model.width must be divisible by model.num_heads; got "
                f"{model.width} and {model.num_heads}"
            )
    if data.block_size > model.context_length:
        raise ConfigError(
            f"data.block_size={data.block_size} is longer than the model can read "
            f"(model.context_length={model.context_length}); make it at most that"
        )
    width = SIZES[model.size].width if model.size in SIZES else model.width
    if zo.rank > width:
        raise ConfigError(
            f"zo.rank={zo.rank} is no low rank for matrices of width {width}; make it at most "
            f"that, or set "
            "zo.perturbation=gaussian"
        )


def _check_feedback(config: Config) -> None:
    feedback = config.feedback
    if config.mode == "feedback" and feedback.attention == "weights" and feedback.sigma > MAX_SIZE:
        raise ConfigError(
            f"feedback.sigma={feedback.sigma:g} is too much for noise on the weights of attention, "
            f"which have to stay above 0 in sum; set it to at most {MAX_SIZE}"
        )
    dtypes = config.model.param_dtype, config.model.compute_dtype
    if config.mode == "feedback" and set(dtypes) != {"float32"}:
        raise ConfigError(
            "mode feedback needs model.param_dtype=float32 and model.compute_dtype=float32, whose "
            "differences it takes; "
            f"got {dtypes[0]} and {dtypes[1]}"
        )


def _check_sources(config: Config) -> None:
    for name, source, path in (
        ("data.", config.data.source, config.data.path),
        ("fo.", config.fo.source, config.fo.path),
        ("train.eval_", config.train.eval_source, config.train.eval_path),
    ):
        if source in ("text", "disk") and not path:
            what = "a file or a pattern of files" if source == "text" else "the folder"
            raise ConfigError(f"{name}source={source} needs {name}path; set it to {what}")


def _check_batches(config: Config) -> None:
    size, chunks = config.train.batch_size, config.zo.batch_chunks
    if size % chunks:
        raise ConfigError(
            f"train.batch_size must be divisible by zo.batch_chunks; got {size} and {chunks}"
        )
    fo_size, parts = config.fo.batch_size or size, config.fo.gradient_accumulation_steps
    if config.mode != "zo" and fo_size % parts:
        raise ConfigError(
            "the backprop batch must be divisible by fo.gradient_accumulation_steps; got "
            f"{fo_size} and {parts}"
        )


def _check_groups(config: Config) -> None:
    if config.zo.groups != "tokens":
        return
    if config.task.name != "text":
        raise ConfigError(
            "zo.groups=tokens counts the tokens of a training text: it needs task.name=text, got "
            f"{config.task.name}; set zo.groups=layers"
        )
    try:
        unpack(config.zo.tiers or pack(b""))
    except ValueError as error:
        raise ConfigError(f"zo.tiers must be empty, or what a run recorded: {error}") from error


def _check_method(config: Config) -> None:
    zo = config.zo
    is_kept = zo.perturbation in KEPT
    if is_kept and (config.mode != "zo" or zo.exact != "none" or zo.groups != "none"):
        raise ConfigError(
            f"zo.perturbation={zo.perturbation} needs mode=zo, zo.exact=none and zo.groups=none, "
            f"got {config.mode}, {zo.exact} and {zo.groups}; change these, or set "
            "zo.perturbation=low_rank"
        )
    if is_kept and "auto" in (zo.epsilon, config.optimizer.learning_rate):
        raise ConfigError(
            "auto is found along directions that no factors are kept of: set zo.epsilon and "
            f"optimizer.learning_rate with zo.perturbation={zo.perturbation}"
        )
    if zo.method == "plain":
        return
    if zo.exact != "none":
        raise ConfigError(
            f"zo.method={zo.method} makes steps of another length than zo.exact={zo.exact}: set "
            "zo.exact=none, or zo.method=plain"
        )
    if zo.groups != "none":
        raise ConfigError(
            f"zo.method={zo.method} weighs directions by itself, and zo.groups={zo.groups} by what "
            "the groups' own projections tell: set one of them to its default"
        )
    if config.optimizer.learning_rate == "auto":
        raise ConfigError(
            "optimizer.learning_rate=auto is found by trials of plain estimates: set a number with "
            f"zo.method={zo.method}"
        )
    if zo.method == "fzoo":
        _check_fzoo(config)
    else:
        check_method(config)
        # Whether there can be one.
        own_method(config)
        unrecorded_method(config)


def _check_fzoo(config: Config) -> None:
    zo = config.zo
    if zo.difference != "forward" or zo.num_queries < 2:
        raise ConfigError(
            f"zo.method={zo.method} needs zo.difference=forward, and the deviation of at least two "
            f"losses; got {zo.difference} and zo.num_queries={zo.num_queries}"
        )
    if zo.batch_per_query:
        raise ConfigError(
            f"zo.method={zo.method} compares the losses of one batch: set zo.batch_per_query=false"
        )


def _check_optimizer(config: Config) -> None:
    optimizer, rate = config.optimizer, config.optimizer.learning_rate
    if rate == "auto" and config.mode != "zo":
        raise ConfigError(
            f"optimizer.learning_rate=auto is found by zeroth-order trials: it needs mode=zo, got "
            f"{config.mode}; set a number"
        )
    if rate == "auto" and config.zo.exact != "none":
        raise ConfigError(
            f"optimizer.learning_rate=auto is found by trials along directions, which have no part "
            f"in zo.exact={config.zo.exact}; set a number, or zo.exact=none"
        )
    if rate == "auto" and config.zo.groups != "none":
        raise ConfigError(
            f"optimizer.learning_rate=auto is found by trials whose shares of zo.groups="
            f"{config.zo.groups} stay what they are at the start; set a number, or zo.groups=none"
        )
    if rate == "auto" and optimizer.adam_learning_rate:
        raise ConfigError(
            f"optimizer.learning_rate=auto finds one rate, and optimizer.adam_learning_rate="
            f"{optimizer.adam_learning_rate} is another; set a number, or adam_learning_rate=0"
        )
    is_number = rate != "auto"
    if optimizer.schedule == "cosine" and is_number and optimizer.min_learning_rate > rate:
        raise ConfigError(
            "optimizer.min_learning_rate must be at most optimizer.learning_rate; got "
            f"{optimizer.min_learning_rate} and {rate}"
        )
    if config.train.num_steps:
        check_warmup(config)


def check_warmup(config: Config) -> None:
    optimizer, num_steps = config.optimizer, config.train.num_steps
    if optimizer.schedule == "cosine" and optimizer.warmup_steps >= num_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} must be less than the run's "
            f"{num_steps} steps; shorten it, or set a larger train.num_steps"
        )


def check_mesh(config: Config, sizes: Mapping[str, int]) -> None:
    """Whether batches divide over the data axis of a mesh of these sizes.

    Raises:
      ConfigError: they do not; or activations are to be kept, and there are several devices.
    """
    if config.train.keep_activations and any(size > 1 for size in sizes.values()):
        raise ConfigError(
            "train.keep_activations is for one device; got a mesh of "
            f"{', '.join(f'{name}={size}' for name, size in sizes.items())}; set it to false, or "
            "mesh.query, mesh.data and mesh.model to 1"
        )
    batches = {"train.batch_size": config.train.batch_size}
    if config.mode != "zo":
        parts = config.fo.gradient_accumulation_steps
        batches["the backprop batch"] = config.fo.batch_size or config.train.batch_size
        batches["the backprop micro-batch"] = batches["the backprop batch"] // parts
    for name, size in batches.items():
        if size % sizes["data"]:
            raise ConfigError(
                f"{name} must be divisible by mesh.data; got {size} and {sizes['data']}; set a "
                f"batch that is, or a "
                "smaller mesh.data"
            )
