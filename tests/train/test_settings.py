"""Every setting has an effect where it says so, and is refused where it has none.

A case sets one field away from its default, in a configuration where its condition holds. What
changes is looked for where the field is read: in the text of the compiled programs, in the blocks
that steps read, or in the folder of a run.
"""

import contextlib
import functools
import json
import math
import re
from typing import Any, NamedTuple

import fine_tune
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from zo_jax import estimators, families, ledger
from zo_jax.evolution import SHAPINGS
from zo_jax.guided import METHODS
from zo_jax.tiers import pack
from zo_jax.train import choices, describe, model, run_state, steps
from zo_jax.train.config import HUB_SOURCES, KEPT, SETTINGS, SIZES, Config, ConfigError
from zo_jax.train.data import batches, sources
from zo_jax.train.rewards.pool import RewardFailed
from zo_jax.train.run import make_layout, train_and_evaluate
from zo_jax.train.run_folder import metrics
from zo_jax.train.settings import replace_value, walk
from zo_jax.train.signals import RunStopped
from zo_jax.train.subject import load_sources, make_subject
from zo_jax.train.validation import resolve, validate, without_effect


class Case(NamedTuple):
    """A field away from its default.

    Attributes:
      value: that it has.
      where: fields of the configuration in which it is read, as it is before and after.
      also: fields that change with it, for want of which the configuration would be impossible.
    """

    value: Any
    where: dict[str, Any] = {}
    also: dict[str, Any] = {}


BASE = {
    "scope": "ln_f|wpe",  # few leaves, for short programs
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.width": 8,
    "model.context_length": 16,
    "data.block_size": 8,
    "train.num_steps": 4,
}
BACKPROP = {"mode": "fo"}
CALIBRATE = {"mode": "calibrate", "fo.bp_interval": 2}
INSTRUCT = {"mode": "instruct", "fo.bp_interval": 2}
ADAPTIVE = INSTRUCT | {"instruct.adaptive": True}
FEEDBACK = {"mode": "feedback", "scope": "full"}
COSINE = {"optimizer.schedule": "cosine", "optimizer.warmup_steps": 1}
OF = lambda name: {"optimizer.name": name}
# A pretrained model and examples, which the fixture `fine_tunes` writes.
FINE = {
    **{f"model.{name}": 0 for name in ("num_layers", "num_heads", "width")},
    "model.context_length": 1024,
    "data.block_size": 128,
    "scope": "lora",
    "model.path": "a/base",
    "task.name": "file",
    "task.path": "examples.jsonl",
    "task.template": "{text}:",
    "task.labels": fine_tune.LABELS,
    "task.num_train": 10,
    "task.num_validation": 8,
    "task.num_test": 4,
    "train.batch_size": 4,
}
ANSWERS = FINE | {"task.labels": "", "task.target": "answer"}
LOW_RANK = {"zo.perturbation": "low_rank"}
REWARD = (
    FINE
    | LOW_RANK
    | {
        "task.labels": "",
        "objective.name": "reward",
        "objective.path": "reward.py:length",
        "objective.max_new_tokens": 16,
        "zo.num_queries": 2,
        "zo.epsilon": 0.3,
    }
)
# Files that the fixture `folder` writes, in the current folder.
TEXT = {"data.source": "text", "data.path": "a.txt"}
TEXTS = {"data.source": "text", "data.path": "?.txt"}

IN_PROGRAMS = {
    "mode": Case("fo"),
    "scope": Case("wte"),
    "model.size": Case("20M", also={f"model.{x}": 0 for x in ("num_layers", "num_heads", "width")}),
    "model.num_layers": Case(2),
    "model.num_heads": Case(4),
    "model.width": Case(16),
    "model.context_length": Case(32),
    "model.param_dtype": Case("bfloat16"),
    "model.compute_dtype": Case("bfloat16"),
    "model.checkpoint_activations": Case(True, BACKPROP),
    "zo.num_queries": Case(2),
    "zo.epsilon": Case(1e-2),
    "zo.perturbation": Case("sphere"),
    "zo.rank": Case(2, {"zo.perturbation": "low_rank"}),
    "zo.period": Case(3, {"zo.perturbation": "lozo"}),
    "zo.difference": Case("forward"),
    "zo.parallel_batch_size": Case(2),
    "zo.batch_chunks": Case(2),
    "zo.batch_per_query": Case(True),
    "zo.method": Case("fzoo", {"zo.difference": "forward"}),
    "zo.method_options": Case('{"smoothing": 0.5}', {"zo.method": "hizoo"}),
    "zo.exact": Case("^ln_f/"),
    "zo.relative_rate": Case(0.3, {"zo.exact": "^ln_f/"}),
    "zo.groups": Case("layers"),
    "zo.tiers": Case(pack(bytes(10) + bytes([1] * 10)), {"zo.groups": "tokens", "scope": "wte"}),
    "fo.gradient_accumulation_steps": Case(2, BACKPROP),
    "fo.relative_rate": Case(3.0, INSTRUCT, {"fo.relative_rate": 1.0}),
    "instruct.method": Case("gram_schmidt", INSTRUCT),
    "instruct.cosine_target": Case(0.5, INSTRUCT),
    "instruct.noise_scale": Case(0.7, INSTRUCT),
    "instruct.num_guided": Case(2, INSTRUCT),
    "instruct.blend_ratio": Case(0.3, INSTRUCT),
    "instruct.normalize": Case(True, INSTRUCT),
    "instruct.grad_clip_norm": Case(0.3, INSTRUCT),
    "instruct.adaptive": Case(True, INSTRUCT),
    "instruct.adaptive_start": Case(3.0, ADAPTIVE),
    "instruct.adaptive_interval": Case(0.3, ADAPTIVE),
    "instruct.cosine_step": Case(0.2, ADAPTIVE),
    "instruct.cosine_max": Case(0.8, ADAPTIVE),
    "instruct.noise_step": Case(0.2, ADAPTIVE),
    "instruct.noise_min": Case(0.3, ADAPTIVE),
    "optimizer.name": Case("adamw"),
    "optimizer.learning_rate": Case(0.3),
    "optimizer.schedule": Case("cosine", also=COSINE),
    "optimizer.warmup_steps": Case(2, COSINE),
    "optimizer.min_learning_rate": Case(1e-5, COSINE),
    "optimizer.momentum": Case(0.7, OF("sgd")),
    "optimizer.b1": Case(0.7, OF("adam")),
    "optimizer.b2": Case(0.7, OF("muon")),
    "optimizer.eps": Case(0.7, OF("mudamw")),
    "optimizer.weight_decay": Case(0.7, OF("adamw")),
    "optimizer.anchor": Case(0.7),
    "optimizer.rounding": Case("nearest", {"model.param_dtype": "bfloat16"}),
    "optimizer.cautious": Case(True, OF("mudamw")),
    "optimizer.orthogonalize_embedding": Case(False, OF("muon")),
    "optimizer.adam_learning_rate": Case(0.5, OF("muon")),
    "model.tied_head": Case(False),
    "model.embedding_std": Case(0.5),
    "feedback.matrix": Case("random", FEEDBACK),
    "feedback.errors": Case("last", FEEDBACK),
    "feedback.handed_to": Case("sublayers", FEEDBACK),
    "feedback.attention": Case("none", FEEDBACK),
    "feedback.num_draws": Case(2, FEEDBACK),
    "feedback.sigma": Case(0.1, FEEDBACK),
    "feedback.discount": Case(0.5, FEEDBACK | {"feedback.attention": "qkv"}),
}
IN_BLOCKS = {
    "seed": Case(1),
    "data.source": Case("text", also=TEXT),
    "data.path": Case("b.txt", TEXT),
    "data.text_column": Case("other", {"data.source": "disk", "data.path": "disk"}),
    "data.max_samples": Case(1, TEXTS),
    "data.tokenizer": Case("bpe", TEXT, {"data.bpe_vocab_size": 270}),
    "data.tokenizer_path": Case(
        "gpt2_b", TEXT | {"data.tokenizer": "gpt2", "data.tokenizer_path": "gpt2_a"}
    ),
    "data.bpe_vocab_size": Case(270, TEXT | {"data.tokenizer": "bpe"}),
    "data.block_size": Case(16),
    "data.validation_fraction": Case(0.5, TEXT),
    "data.cache_dir": Case("cache", TEXT | {"data.tokenizer": "bpe"}),
    "fo.bp_interval": Case(3, TEXT | CALIBRATE),
    "fo.batch_size": Case(3, TEXT | CALIBRATE),
    "fo.source": Case("text", TEXT | CALIBRATE, {"fo.path": "b.txt"}),
    "fo.path": Case("c.txt", TEXT | CALIBRATE | {"fo.source": "text", "fo.path": "b.txt"}),
    "fo.max_samples": Case(1, TEXT | CALIBRATE | {"fo.source": "text", "fo.path": "?.txt"}),
    "fo.corpus_fraction": Case(0.5, TEXT | CALIBRATE),
    "train.num_steps": Case(7),
    "train.num_epochs": Case(2, TEXT | {"train.num_steps": 0}),
    "train.batch_size": Case(3, TEXT),
    "train.eval_source": Case("text", TEXT, {"train.eval_path": "b.txt"}),
    "train.eval_path": Case(
        "c.txt", TEXT | {"train.eval_source": "text", "train.eval_path": "b.txt"}
    ),
    "train.eval_max_samples": Case(
        1, TEXT | {"train.eval_source": "text", "train.eval_path": "?.txt"}
    ),
}
IN_FINE_TUNES = {
    "model.path": Case("b/base", FINE),
    "model.quantized": Case("int8", FINE),
    "lora.rank": Case(2, FINE),
    "lora.alpha": Case(4.0, FINE),
    "lora.targets": Case("gate_proj$", FINE),
    "lora.num_layers": Case(1, FINE),
    "task.name": Case("sst2", FINE, {"task.template": "", "task.labels": "", "task.path": "sst2"}),
    "task.path": Case("others.jsonl", FINE),
    "task.template": Case("{text}, ", FINE),
    "task.labels": Case('{"0": "no", "1": "+"}', FINE),
    "task.label_column": Case("other", FINE),
    "task.target": Case("text", ANSWERS),
    "task.chat": Case(True, FINE),
    "task.num_train": Case(12, FINE),
    "task.num_validation": Case(5, FINE),
    "task.num_test": Case(0, FINE),
    "task.max_tokens": Case(6, FINE),
    "task.answer_tokens": Case(3, ANSWERS),
    "train.keep_activations": Case(True, FINE),
    "objective.name": Case("accuracy", FINE | LOW_RANK),
    "objective.path": Case("reward.py:capitals", REWARD),
    "objective.shaping": Case("ranks", REWARD),
    "objective.max_new_tokens": Case(3, REWARD),
    "objective.temperature": Case(1.0, REWARD),
    "objective.stop": Case("e", REWARD | {"objective.temperature": 2.0}),
    "objective.timeout": Case(1e-6, REWARD),
    "objective.text_path": Case("a.txt", REWARD),
}
RUN = TEXT | BACKPROP | {"optimizer.learning_rate": 1e-2}
# Runs that differ in several fields, each of which shows in a part of what they leave.
RUNS = {
    "plain": RUN,
    "often": RUN
    | {
        "train.log_interval": 1,
        "train.eval_interval": 2,
        "train.checkpoint_interval": 2,
        "train.snapshot_delta": 1e-9,
        "train.sample_tokens": 3,
    },
    "other": RUN
    | {
        "train.checkpoint_minutes": 1e-9,
        "train.eval_blocks": 2,
        "train.sample_temperature": 0.1,
    },
    "tuned": FINE | {"train.eval_interval": 2},
    "tuned, best not kept": FINE | {"train.eval_interval": 2, "task.keep_best": False},
    "diverging": RUN | {"optimizer.learning_rate": 1e38, "train.checkpoint_interval": 1},
    "stopped": RUN
    | {
        "optimizer.learning_rate": 1e38,
        "train.checkpoint_interval": 1,
        "train.keep_checkpoints": 1,
        "train.max_skipped": 1,
    },
}
# Field: (the run in which it is away from its default, the one in which it is not, where that
# shows).
IN_RUNS = {
    "train.log_interval": ("often", "plain", "rows"),
    "train.eval_interval": ("often", "plain", "evaluated"),
    "train.checkpoint_interval": ("often", "plain", "checkpoints"),
    "train.snapshot_delta": ("often", "plain", "snapshots"),
    "train.sample_tokens": ("often", "plain", "length"),
    "train.checkpoint_minutes": ("other", "plain", "checkpoints"),
    "train.eval_blocks": ("other", "plain", "first loss"),
    "train.sample_temperature": ("other", "plain", "sample"),
    "task.keep_best": ("tuned, best not kept", "tuned", "best"),
    "train.keep_checkpoints": ("stopped", "diverging", "number"),
    "train.max_skipped": ("stopped", "diverging", "stop"),
}
ON_DEVICES = {
    "mesh.query": Case(2),
    "mesh.data": Case(2),
    "mesh.model": Case(2),
}
# What it changes is in test_tracking.py, for its library is an extra.
TRACKED = {"train.wandb": Case("a project")}
CASES = TRACKED | IN_PROGRAMS | IN_BLOCKS | IN_FINE_TUNES | ON_DEVICES
for name, (run, _, _) in IN_RUNS.items():
    others = {field: value for field, value in RUNS[run].items() if field != name}
    CASES[name] = Case(RUNS[run][name], others)

# How each part of a condition is made not to hold.
BROKEN = {
    "mode is zo or calibrate or instruct": {"mode": "fo"},
    "mode is fo or calibrate or instruct": {"mode": "zo"},
    "mode is feedback or block_local": {"mode": "zo"},
    "mode is feedback": {"mode": "block_local", "scope": "full"},
    "zo.exact is not none": {"zo.exact": "none"},
    "zo.method is not plain or fzoo": {"zo.method": "plain"},
    "mode is zo or fo": {"mode": "calibrate", "fo.bp_interval": 2},
    "fo.gradient_accumulation_steps is 1": {"mode": "fo", "fo.gradient_accumulation_steps": 2},
    "zo.method is plain or fzoo": {"zo.method": "hizoo"},
    "zo.groups is none": {"zo.groups": "layers"},
    "zo.groups is tokens": {"zo.groups": "layers"},
    "zo.exact is none": {"zo.exact": "head"},
    "zo.batch_per_query is false": {"zo.batch_per_query": True},
    "zo.batch_chunks is 1": {"zo.batch_chunks": 2},
    "feedback.errors is all": {"feedback.errors": "last"},
    "feedback.attention is weights or qkv": {"feedback.attention": "closed_form"},
    "feedback.attention is qkv": {"feedback.attention": "weights"},
    "optimizer.name is muon": {"optimizer.name": "mudamw"},
    "mode is instruct": {"mode": "calibrate"},
    "mode is zo": {"mode": "calibrate", "fo.bp_interval": 2},
    "objective.name is loss": {"objective.name": "reward"},
    "objective.name is not loss": {"objective.name": "loss"},
    "objective.name is reward": {"objective.name": "accuracy"},
    "mode is calibrate or instruct": {"mode": "zo"},
    "mode is not fo or fo.batch_size is 0": {"mode": "fo", "fo.batch_size": 4},
    "model.size is custom": {"model.size": "20M"},
    "model.path is empty": {"model.path": "a/base"},
    "model.path is not empty": {"model.path": ""},
    "scope is lora": {"scope": "full"},
    "task.name is text": {"task.name": "sst2"},
    "task.name is not text": {"task.name": "text"},
    "task.name is file": {"task.name": "sst2"},
    "task.labels is not empty": {"task.labels": ""},
    "task.name is squad or drop or task.target is not empty": {"task.target": ""},
    "model.param_dtype is not float32": {"model.param_dtype": "float32"},
    "data.source is text or disk": {"data.source": "wikitext-103"},
    "data.source is not shakespeare": {"data.source": "shakespeare"},
    "data.source is not shakespeare or text or fo.source is not empty or shakespeare or text "
    "or train.eval_source is not empty or shakespeare or text": {"data.source": "text"},
    "data.tokenizer is bpe": {"data.tokenizer": "gpt2"},
    "data.tokenizer is gpt2": {"data.tokenizer": "bpe"},
    "zo.difference is not jvp": {"zo.difference": "jvp"},
    "zo.perturbation is low_rank or lozo or subzero or tezo": {"zo.perturbation": "gaussian"},
    "zo.perturbation is lozo or subzero": {"zo.perturbation": "tezo"},
    "fo.source is text or disk": {"fo.source": "shakespeare"},
    "fo.source is not empty or shakespeare": {"fo.source": "shakespeare"},
    "fo.source is empty": {"fo.source": "shakespeare"},
    "instruct.method is hybrid": {"instruct.method": "gram_schmidt"},
    "instruct.adaptive is true": {"instruct.adaptive": False},
    "optimizer.schedule is cosine": {"optimizer.schedule": "constant"},
    "optimizer.name is sgd": {"optimizer.name": "adam"},
    "optimizer.name is not sgd": {"optimizer.name": "sgd"},
    "optimizer.name is adamw or muon or mudamw": {"optimizer.name": "adam"},
    "optimizer.name is mudamw": {"optimizer.name": "muon"},
    "optimizer.name is muon or mudamw": {"optimizer.name": "adamw"},
    "train.num_steps is 0": {"train.num_steps": 4},
    "train.eval_source is text or disk": {"train.eval_source": "c4"},
    "train.eval_source is not empty or shakespeare": {"train.eval_source": ""},
    "train.checkpoint_interval is not 0 or train.checkpoint_minutes is not 0": {
        "train.checkpoint_interval": 0
    },
    "train.sample_tokens is not 0": {"train.sample_tokens": 0},
}


def make(*fields):
    config = Config()
    for name, value in functools.reduce(dict.__or__, fields, BASE).items():
        replace_value(config, name, value)
    return config


def before_and_after(name):
    case = CASES[name]
    configs = make(case.where), make(case.where, case.also, {name: case.value})
    for config in configs:
        validate(config)
    return configs


@pytest.fixture(scope="module")
def fine_tunes(tmp_path_factory):
    """A folder with a text, bases and examples, from which much is read and to which nothing is
    written.
    """
    folder = tmp_path_factory.mktemp("fine_tunes")
    (folder / "a.txt").write_text(tiny.TEXT)
    for i, name in enumerate("ab"):
        (folder / name).mkdir()
        fine_tune.write_base(folder / name / "base", seed=i)
    for i, name in enumerate(("examples", "others")):
        path = fine_tune.write_examples(folder / f"{name}.jsonl", 24, seed=i)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"other": 1 - row["label"]} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def length(prompts, texts, rows): return [-len(set(text)) for text in texts]\n"
        "def capitals(prompts, texts, rows): return [sum(map(str.isupper, t)) for t in texts]\n"
    )
    (folder / "sst2").mkdir()
    for name in ("train", "validation"):
        rows = [{"sentence": f"{name} {i}", "label": i % 2} for i in range(24)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "sst2" / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: texts, a saved data set, two GPT-2 vocabularies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for i, name in enumerate("abc"):
        (tmp_path / f"{name}.txt").write_text(tiny.TEXT[100 * i :])
    return tmp_path


def write_vocabularies(folder):
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for name, characters in (("gpt2_a", alphabet), ("gpt2_b", alphabet[::-1])):
        (folder / name).mkdir()
        words = {word: i for i, word in enumerate([*characters, "<|endoftext|>"])}
        (folder / name / "vocab.json").write_text(json.dumps(words))
        (folder / name / "merges.txt").write_text("#version: 0.2\n")


# Settings of `zo` that the second half of a step reads.
UPDATED = ("zo.method", "zo.method_options", "zo.relative_rate")

# By configuration and function: most cases begin with the same program.
PROGRAMS = {}


def program(config, name):
    """The text of the compiled function that reads a field, for a vocabulary of 20 words."""
    config = resolve(config, 100, lambda: np.ones(20))
    is_init = name == "model.embedding_std"
    is_update = name.startswith("optimizer.") or name in UPDATED
    is_update = is_update and config.mode == "zo"
    key = is_init, is_update, repr(config)
    if key not in PROGRAMS:
        PROGRAMS[key] = lower(config, is_init, is_update).as_text()
    return PROGRAMS[key]


def lower(config, is_init, is_update):
    gpt = model.make_model(config.model, 20)
    state = run_state.state_shapes(config, gpt)
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    q, B, T = config.zo.num_queries, config.train.batch_size, config.data.block_size
    tokens_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    tokens = jax.ShapeDtypeStruct((q, B, T), jnp.int32) if config.zo.batch_per_query else tokens_BT
    if is_init:
        return jax.jit(gpt.fresh).lower(jax.random.key(0))
    if config.mode == "fo":
        return steps.make_fo_step(config, gpt).lower(state, tokens_BT)
    if config.mode == "feedback":
        return steps.make_feedback_step(config, gpt).lower(state, tokens_BT)
    if config.mode == "instruct":
        return steps.make_guided_step(config, gpt).lower(state, key, tokens, tokens_BT)
    if is_update:
        numbers = (choices.num_numbers(config),)
        loss, c = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), numbers))
        return steps.make_update(config, gpt).lower(state, key, loss, c)
    return steps.make_project(config, gpt).lower(
        state.params, key, tokens, state.train.family, state.step
    )


@pytest.mark.parametrize("name", IN_PROGRAMS)
def test_it_changes_the_program(name):
    before, after = before_and_after(name)
    assert program(before, name) != program(after, name)


def blocks(config, folder):
    """What the steps and evaluations of a configuration read, and what is written meanwhile."""
    corpus = batches.load_corpora(config)
    config = resolve(config, len(corpus.train_NT))
    read = [batches.read_batches(config, corpus.train_NT, i, corpus.fo_NT) for i in range(6)]
    arrays = jax.tree.map(np.ndarray.tolist, (read, corpus.validation_NT))
    cached = sorted(str(path.relative_to(folder)) for path in folder.glob("**/bpe-*"))
    return arrays, config.train.num_steps, cached


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_it_changes_what_is_read(name, folder):
    before, after = before_and_after(name)
    if name == "data.tokenizer_path":
        write_vocabularies(folder)
    if name == "data.text_column":
        datasets = pytest.importorskip("datasets")
        texts = {"text": [tiny.TEXT], "other": [tiny.TEXT[::-1]]}
        datasets.Dataset.from_dict(texts).save_to_disk("disk")
    assert blocks(before, folder) != blocks(after, folder)


# By configuration: most cases begin with the same one.
FINE_TUNES = {}


def fine_tune_of(config):
    """What a configuration makes of a pretrained model and its examples."""
    if repr(config) not in FINE_TUNES:
        try:
            FINE_TUNES[repr(config)] = str(_fine_tune_of(config))
        except RewardFailed as error:
            FINE_TUNES[repr(config)] = str(error)
    return FINE_TUNES[repr(config)]


def _fine_tune_of(config):
    config = resolve(config, 10)
    subject = make_subject(config, load_sources(config))
    task, state = subject.task, run_state.init_state(config, subject.model)
    read = [jax.tree.map(np.ndarray.tolist, task.batches(i)) for i in range(3)]
    written = task.write(state.params, task.validation) if getattr(task, "writes", 0) else None
    key, scores = steps.make_step_key(config, None)(0), None
    if config.objective.name != "loss":
        scores = jnp.asarray(task.make_score(None)(state.params, key, task.batches(0)[0]))
        scores = scores.tolist(), task.strategy.projections(scores).tolist(), task.samples
    measured = task.evaluate_part(state.params, task.test) if task.test else None
    factors = jax.tree.map(lambda x: (x.shape, float(jnp.sum(jnp.abs(x)))), state.params["lora"])
    return read, task.evaluate(state.params), written, measured, factors, scores


@pytest.mark.parametrize("name", IN_FINE_TUNES)
def test_it_changes_the_fine_tune(name, fine_tunes, monkeypatch):
    monkeypatch.chdir(fine_tunes)
    monkeypatch.setenv("HOME", str(fine_tunes))
    before, after = before_and_after(name)
    assert fine_tune_of(before) != fine_tune_of(after)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, fine_tunes):
    """(name of a run) -> what it leaves in its folder, and says; each run is made once."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def of(name):
        config, folder = make(RUNS[name]), root / name
        stop = ""
        with contextlib.chdir(fine_tunes):
            try:
                train_and_evaluate(config, folder)
            except RunStopped as error:
                stop = str(error)
        steps_in = lambda part: [path.name for path in sorted((folder / part).glob("[0-9]*"))]
        rows = metrics.read(folder / "metrics.csv")
        sample = folder / "sample.txt"
        text = sample.read_text() if sample.exists() else ""
        return {
            "rows": [row["step"] for row in rows if not row["eval_loss"]],
            "evaluated": [row["step"] for row in rows if row["eval_loss"]],
            "first loss": rows[0]["eval_loss"],
            "checkpoints": steps_in("checkpoints"),
            "number": len(steps_in("checkpoints")),
            "snapshots": steps_in("snapshots"),
            "best": len(steps_in("best")),
            "length": len(text),
            "sample": text,
            "stop": stop,
        }

    return of


@pytest.mark.parametrize("name", IN_RUNS)
def test_it_changes_the_run(name, outcome):
    run, before, part = IN_RUNS[name]
    changed, default = make(RUNS[run]), make(RUNS[before])
    validate(changed)
    assert dict(walk(changed))[name] != dict(walk(default))[name] == SETTINGS[name].default
    assert outcome(run)[part] != outcome(before)[part]


@pytest.mark.parametrize("name", ON_DEVICES)
def test_it_changes_the_mesh(name):
    before, after = before_and_after(name)
    assert make_layout(before, None) is None
    with pytest.raises(ConfigError, match=f"the 1 devices; got .*{name.partition('.')[2]}=2"):
        make_layout(after, None)


def test_every_setting_has_a_case_away_from_its_default():
    assert set(CASES) == set(SETTINGS)
    assert not [name for name, one in SETTINGS.items() if CASES[name].value == one.default]


@pytest.mark.parametrize("name", CASES)
def test_the_name_of_a_run_says_all_that_is_fixed(name):
    before, after = (describe.default_run_name(config) for config in before_and_after(name))
    assert (before == after) is bool(SETTINGS[name].may_change)
    assert before == describe.default_run_name(before_and_after(name)[0])


def test_the_length_of_a_cosine_is_in_the_name():
    for steps_or_epochs in ({"train.num_steps": 5}, {"train.num_steps": 0, "train.num_epochs": 3}):
        configs = make(COSINE), make(COSINE, steps_or_epochs)
        assert len({describe.default_run_name(config) for config in configs}) == 2


def parts(name):
    return [part for part in SETTINGS[name].only_if.split(" and ") if part]


@pytest.mark.parametrize("name, part", [(name, part) for name in SETTINGS for part in parts(name)])
def test_without_effect_it_is_refused_if_it_was_changed(name, part):
    case = CASES[name]
    at_default = make(case.where, {name: SETTINGS[name].default}, BROKEN[part])
    assert name not in without_effect(at_default)
    config = make(case.where, {name: case.value}, BROKEN[part])
    assert without_effect(config)[name] == part
    with pytest.raises(ConfigError, match="no effect") as error:
        validate(config)
    # All that the message names as changed was changed.
    given = re.findall(r"(?:^|, )([a-z0-9_.]+)=", str(error.value).partition(" ha")[0])
    assert given and {*given} <= {*BASE, *case.where, *BROKEN[part], name}
    assert "\n" not in str(error.value)


def test_conditions_are_all_broken_once_and_name_settings():
    assert set(BROKEN) == {part for name in SETTINGS for part in parts(name)}


@pytest.mark.parametrize("name", [name for name, one in SETTINGS.items() if one.allowed])
def test_values_out_of_range_are_refused(name):
    one = SETTINGS[name]
    validate(make(CASES[name].where, CASES[name].also, {name: CASES[name].value}))
    below = [-2] if one.kind is int else [-2.0, math.nan, math.inf, -math.inf]
    for value in below:
        with pytest.raises(ConfigError, match=f"{name} must be .*; got {value}"):
            validate(make(CASES[name].where, {name: value}))


def test_choices_are_what_there_is():
    assert SIZES == ("custom", *model.SIZES) and HUB_SOURCES == tuple(sources.HUB_DATASETS)
    assert SETTINGS["instruct.method"].choices == METHODS
    assert SETTINGS["zo.difference"].choices == estimators.DIFFERENCES
    assert SETTINGS["objective.shaping"].choices == SHAPINGS
    assert SETTINGS["zo.perturbation"].choices == (*families.NAMES, *KEPT)
    # The largest number of queries is the largest of a ledger's records.
    validate(make({"zo.num_queries": ledger._MAX_QUERIES}))
    with pytest.raises(ConfigError, match=r"zo.num_queries"):
        validate(make({"zo.num_queries": ledger._MAX_QUERIES + 1}))
