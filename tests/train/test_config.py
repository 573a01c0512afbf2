import importlib.util
import inspect
import math
from pathlib import Path

import numpy as np
import pytest

from zo_jax.train import choices, experiment
from zo_jax.train.arguments import Parser, add_experiment, help_text, parse, read_experiment
from zo_jax.train.config import SETTINGS, ConfigError, blocks_per_step
from zo_jax.train.model import make_model
from zo_jax.train.validation import resolve, validate

DEFAULT = Path(__file__).parents[2] / "configs" / "default.py"


def change(config, **fields):
    for name, value in fields.items():
        section, _, leaf = name.rpartition("__")
        setattr(getattr(config, section) if section else config, leaf, value)
    return config


def test_tiny_is_valid(tiny_config):
    validate(tiny_config)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(mode="zoo"),
            "mode must be one of zo, fo, calibrate, instruct, feedback, block_local; got 'zoo'; "
            "did you mean zo",
        ),
        (dict(mode="ZO"), "did you mean zo?"),
        (dict(model__size="1b"), "did you mean 1B?"),
        (dict(optimizer__name="adamm"), "did you mean adam"),
        (dict(zo__perturbation="gausian"), "did you mean gaussian"),
        (dict(zo__difference="x"), "central, forward, jvp"),
        (dict(optimizer__schedule="x"), "constant, cosine"),
        (dict(model__param_dtype="int8"), "float32"),
        (dict(model__size="2B"), "20M"),
        (dict(data__source="wikitext103"), "did you mean wikitext-103"),
        (dict(data__tokenizer="x"), "char, bpe, gpt2"),
        (dict(zo__num_queries=0), "zo.num_queries must be an integer of at least 1"),
        (dict(zo__num_queries=10**9), "at least 1 and at most 1048576; got 1000000000"),
        (dict(train__num_steps=2**31), "train.num_steps"),
        (dict(zo__perturbation="low_rank", zo__rank=9), "no low rank for matrices of width 8"),
        (dict(zo__num_queries="8"), "must be of type int"),
        (dict(zo__num_queries=True), "must be of type int"),
        (dict(zo__num_queries=8.0), "must be of type int"),
        (dict(zo__batch_per_query=1), "must be of type bool"),
        (dict(zo__epsilon=[1e-3]), "must be of type float"),
        (dict(zo__epsilon=0.0), "zo.epsilon"),
        (dict(zo__epsilon=math.nan), "zo.epsilon"),
        (dict(zo__epsilon=math.inf), "zo.epsilon"),
        (dict(zo__epsilon=1e-60), "zo.epsilon"),
        (dict(zo__rank=0), "zo.rank"),
        (
            dict(zo__rank=2),
            "zo.rank=2 has no effect: it is read only if zo.perturbation is low_rank or lozo",
        ),
        (dict(optimizer__learning_rate=-1.0), "optimizer.learning_rate"),
        (dict(optimizer__b1=1.0), "optimizer.b1"),
        (dict(data__block_size=1), "at least 2"),
        (dict(data__block_size=17), "longer than the model can read"),
        (dict(data__validation_fraction=1.0), "data.validation_fraction"),
        (
            dict(data__path="x.txt"),
            "only if data.source is text or disk, but data.source is shakespeare",
        ),
        (dict(data__source="text"), "needs data.path"),
        (dict(data__tokenizer_path="x"), "only if data.tokenizer is gpt2"),
        (dict(model__width=15), "divisible by model.num_heads"),
        (dict(model__num_layers=0), "needs model.num_layers"),
        (dict(model__size="gpt2"), "or leave them at 0, 0, 0"),
        (dict(mode="calibrate", fo__bp_interval=2, fo__gradient_accumulation_steps=3), "divisible"),
        (
            dict(fo__gradient_accumulation_steps=2),
            "no effect: it is read only if mode is fo or calibrate or instruct",
        ),
        (dict(optimizer__schedule="cosine", optimizer__warmup_steps=6), "less than the run's 6"),
        (dict(optimizer__schedule="cosine", optimizer__min_learning_rate=9.0), "at most"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**32), "seed"),
        (dict(train__checkpoint_interval=-1), "train.checkpoint_interval"),
        (dict(train__keep_checkpoints=0), "train.keep_checkpoints"),
        (dict(zo=3), "zo must be a ZOConfig"),
        (dict(mode="fo", zo__batch_chunks=2), "zo.num_queries=3, zo.batch_chunks=2 have no effect"),
        (dict(zo__batch_chunks=3), "divisible by zo.batch_chunks"),
        (dict(model__checkpoint_activations=True), "only if mode is fo or calibrate or instruct"),
        (
            dict(optimizer__rounding="nearest"),
            "only if model.param_dtype is not float32, but model.param_dtype is float32",
        ),
        (dict(optimizer__rounding="up"), "one of stochastic, nearest"),
        (dict(mesh__query=0), "mesh.query must be at least 1, or -1"),
        (dict(train__max_skipped=-1), "train.max_skipped"),
        (dict(model__param_dtype="float16", zo__epsilon=1e-5), "underflows"),
    ],
)
def test_impossible(tiny_config, fields, message):
    with pytest.raises(ConfigError) as error:
        validate(change(tiny_config, **fields))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_not_a_config():
    with pytest.raises(ConfigError, match=r"must return a zo_jax.train.config.Config; got int"):
        validate(3)


def read(*args, default="default"):
    parser = Parser()
    add_experiment(parser, default)
    return read_experiment(parse(parser, args))


@pytest.mark.parametrize(
    "args, message",
    [
        (["--config.zo.num_querie=3"], "did you mean --config.zo.num_queries"),
        (["--config.zo.NUM_QUERIES=3"], "did you mean --config.zo.num_queries"),
        (["--config.zo=3"], "is a section"),
        (["--noconfig.zo.nope"], "is no flag"),
        (["--config.zo.num_queries=abc"], "--config.zo.num_queries=abc: .* type int"),
        (["--config.zo.epsilon=[1,2]"], r"--config.zo.epsilon=\[1,2\]: .* type float"),
        (["--config.zo.batch_per_query=maybe"], "must be true or false"),
        (["--config.zo.epsilon"], "expected one argument"),
        (["--config=absent.py"], "there is no file 'absent.py'"),
        (["--config", "absent.py"], "there is no file 'absent.py'"),
        (["--config=defualt"], "did you mean default"),
        (["--config=default:20M"], "cannot be called with the argument '20M'"),
        ([f"--config={Path(__file__).with_suffix('')}"], "there is no file"),
        (["stray"], "'stray' is no flag"),
    ],
)
def test_arguments(args, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(*args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1", "has no function get_config"),
        (
            "def get_config():\n    x = 1\n    raise RuntimeError('boo')",
            "line 3: RuntimeError: boo",
        ),
        ("import nothing_of_the_sort", "line 1: ModuleNotFoundError: No module"),
        ("x = (", "line 1: SyntaxError"),
        ("def get_config(size):\n    return size", "cannot be called with no argument"),
    ],
)
def test_the_users_file_is_named(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        experiment.load(str(file))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_flags_replace_fields():
    config = read("--config.zo.epsilon=1", "--config.data.path", "x", "--config.train.num_steps=7")
    expected = experiment.load("default")
    expected.zo.epsilon, expected.data.path, expected.train.num_steps = 1.0, "x", 7
    assert config == expected and isinstance(config.zo.epsilon, float)
    assert read("--config=icpram2025:200M").model.size == "200M"
    for flag, value in (
        ("--config.zo.batch_per_query", True),
        ("--config.zo.batch_per_query=False", False),
        ("--noconfig.zo.batch_per_query", False),
    ):
        assert read(flag, default="icpram2025").zo.batch_per_query is value


def test_help_explains_every_field():
    text = " ".join(help_text().split())
    for one in SETTINGS.values():
        assert f"--config.{one.name} " in text and one.help in text
        assert one.allowed in text and one.only_if in text and ", ".join(one.choices[1:]) in text


def test_resolve(tiny_config):
    change(tiny_config, zo__parallel_batch_size=9, train__num_steps=0, train__num_epochs=3)
    tiny_config.zo.epsilon = 1
    resolved = resolve(tiny_config, num_examples=10)
    assert resolved.train.num_steps == 15 and blocks_per_step(resolved) == 2
    assert resolved.zo.parallel_batch_size == resolved.zo.num_queries == 3
    assert isinstance(resolved.zo.epsilon, float)
    assert tiny_config.train.num_steps == 0  # the argument is left alone
    change(tiny_config, zo__batch_per_query=True)
    assert resolve(tiny_config, num_examples=10).train.num_steps == 5
    change(tiny_config, model__size="20M", model__num_layers=0, model__num_heads=0, model__width=0)
    assert resolve(tiny_config, 10).model.width == 280
    change(tiny_config, optimizer__schedule="cosine")
    with pytest.raises(ConfigError, match="warmup_steps=300"):
        resolve(tiny_config, 10)


@pytest.mark.parametrize(
    "scope, exact, tied, paths",
    [
        ("full", "none", True, ["wte/embedding"]),
        ("full", "none", False, ["head/embedding", "wte/embedding"]),
        ("full", "head", False, ["wte/embedding"]),
        ("full", "^(blocks/1|ln_f|head)/", False, ["wte/embedding"]),
        ("reduced", "none", True, ["wte/embedding"]),
        ("^blocks/1/|^head", "none", False, ["head/embedding"]),
    ],
)
def test_tokens_have_tiers_where_they_have_directions(tiny_config, scope, exact, tied, paths):
    tiny_config.zo.groups, tiny_config.zo.exact, tiny_config.scope = "tokens", exact, scope
    tiny_config.model.tied_head, tiny_config.model.num_layers = tied, 2
    config = resolve(tiny_config, 10, lambda: np.arange(100))
    model = make_model(config.model, 100)
    tiers = choices.tiers_of(config, model)
    assert [path for path, _ in tiers] == paths
    # Of 100 tokens the 64 that come most are the last.
    assert all(rows == bytes([1] * 36 + [0] * 64) for _, rows in tiers)
    choices.make_estimator(config, model=model)
    # What a run has recorded is what it goes on with.
    assert resolve(config, 10, lambda: np.ones(100)).zo.tiers == config.zo.tiers


def test_tokens_without_tiers_are_told(tiny_config):
    tiny_config.zo.groups = "tokens"
    with pytest.raises(ConfigError, match="needs a training text to count"):
        resolve(tiny_config, 10)
    config = resolve(tiny_config, 10, lambda: np.ones(100))
    with pytest.raises(ConfigError, match="tiers of 100 tokens, and the model has 99"):
        choices.tiers_of(config, make_model(config.model, 99))
    config.scope = "^blocks/"
    with pytest.raises(ConfigError, match="needs a table of tokens among what has directions"):
        choices.tiers_of(config, make_model(config.model, 100))
    for tiers in ("none", "Zm9v"):
        tiny_config.zo.tiers = tiers
        with pytest.raises(ConfigError, match=r"zo.tiers must be empty, or what a run recorded"):
            validate(tiny_config)


@pytest.mark.parametrize("path", sorted(DEFAULT.parent.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_how_to_run_it(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    needs_model = "model" in inspect.signature(module.get_config).parameters
    config = module.get_config(*["a/model"] * needs_model)
    if config.task.name == "file" and not config.task.path:
        config.task.path = "of_the_user.jsonl"
    validate(config)
    assert "Command: python main.py" in module.__doc__ and "MEASURE" not in module.__doc__
    measure = "accuracy" if path.stem[:8] == "finetune" else "reward" if needs_model else "loss"
    assert "Time" in module.__doc__ and measure in module.__doc__.lower()
