"""Sizes that cannot be: refused by arithmetic, and explained where memory ran out all the same."""

import jax
import pytest
import tiny

from zo_jax.train import limits
from zo_jax.train.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    ZOConfig,
)
from zo_jax.train.model import SIZES, make_model
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.settings import replace_value
from zo_jax.train.tools import memory
from zo_jax.train.validation import resolve


def make(mode, optimizer, **zo):
    config = Config(
        mode=mode,
        model=ModelConfig(num_layers=4, num_heads=4, width=128, context_length=128),
        data=DataConfig(block_size=64),
        zo=ZOConfig(**zo),
        optimizer=OptimizerConfig(name=optimizer),
        train=TrainConfig(num_steps=1, batch_size=32),
    )
    return resolve(config, 1)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_counted_right(size):
    config = resolve(Config(model=ModelConfig(size=size), train=TrainConfig(num_steps=1)), 1)
    shapes = make_model(config.model, 50257).shapes()
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert limits.least_memory(config, make_model(config.model, 50257))["parameters"] == 4 * count


@pytest.mark.parametrize(
    "config, measure",
    [
        (make("zo", "sgd", num_queries=2), memory.zeroth_order),
        (make("zo", "adam", num_queries=2, parallel_batch_size=2), memory.zeroth_order),
        (make("fo", "adam"), memory.backprop),
    ],
)
def test_the_least_is_less_than_what_xla_takes_and_not_far_from_it(config, measure):
    least = sum(limits.least_memory(config, make_model(config.model, 1000)).values())
    need = measure(config, 1000).total
    assert need / 4 < least < need


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train.batch_size": 10**7}, "lower train.batch_size=10000000 .* raise zo.batch_chunks=1"),
        ({"model.width": 10**6}, "lower model.width=1000000, .*optimizer.name=sgd"),
        (
            {"model.num_layers": 10**9, "optimizer.name": "sgd"},
            "model.num_layers=1000000000 or model.context_length=16$",
        ),
        ({"model.context_length": 10**11}, "model.context_length=100000000000"),
        (
            {"zo.num_queries": 2**20, "train.batch_size": 2**12, "zo.batch_per_query": True},
            "lower train.batch_size=4096 or zo.num_queries=1048576",
        ),
        ({"mode": "fo", "train.batch_size": 10**7}, "raise fo.gradient_accumulation_steps=1"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_there_is_a_folder(
    tiny_config, tmp_path, monkeypatch, fields, message
):
    monkeypatch.setattr(limits, "device_memory", lambda: 10**10)
    if "mode" in fields:
        tiny.to_backprop(tiny_config)
    for name, value in fields.items():
        replace_value(tiny_config, name, value)
    with pytest.raises(ConfigError, match=r"needs at least [\d.]+ GB.*has 10.0 GB; .*" + message):
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_devices_divide_what_they_can():
    class Layout:
        mesh = type("Mesh", (), {"shape": {"query": 1, "data": 4, "model": 2}})

    config = make("fo", "adam")
    model = make_model(config.model, 1000)
    alone, split = (limits.least_memory(config, model, layout) for layout in (None, Layout()))
    for what, factor in {"parameters": 2, "optimiser state": 2, "activations": 4}.items():
        assert split[what] == alone[what] // factor


def test_memory_of_this_machine():
    assert 2**28 < limits.device_memory() < 2**50


def allocate_with_jax():
    jax.numpy.zeros(2**46).block_until_ready()


def allocate_with_python():
    bytearray(2**62)


def allocate_in_a_dispatched_computation():
    raise jax.errors.JaxRuntimeError(
        "INTERNAL: Error dispatching computation: Out of memory allocating 6335376704 bytes."
    )


@pytest.mark.parametrize(
    "run_out",
    [allocate_with_jax, allocate_with_python, allocate_in_a_dispatched_computation],
)
def test_running_out_is_explained(run_out):
    config = make("zo", "adam")
    with pytest.raises(limits.OutOfMemory, match=r"out of memory \(.*\): .* GB") as error:
        with limits.explain_memory(config, make_model(config.model, 1000)):
            run_out()
    assert "\n" not in str(error.value) and error.value.exit_code == 71


def test_other_errors_are_left_as_they_are():
    config = make("zo", "adam")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        with limits.explain_memory(config, make_model(config.model, 1000)):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")
