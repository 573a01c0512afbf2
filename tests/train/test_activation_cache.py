"""What lies below the trained part, kept by batch: the same results for a part of the work."""

import fine_tune
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax.train import run_state, steps
from zo_jax.train.activation_cache import ActivationCache
from zo_jax.train.choices import scope_of
from zo_jax.train.combinations import check_mesh
from zo_jax.train.config import ConfigError, LoraConfig, ZOConfig
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.subject import load_sources, make_subject
from zo_jax.train.tools import ledger
from zo_jax.train.validation import resolve, validate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a base of four layers, and examples."""
    path = tmp_path_factory.mktemp("below")
    fine_tune.write_base(path / "base", num_hidden_layers=4)
    fine_tune.write_examples(path / "examples.jsonl")
    return path


def get_config(folder, scope="lora", **model):
    config = fine_tune.get_config(folder)
    config.scope, config.train.keep_activations, config.train.num_steps = scope, True, 12
    config.lora = LoraConfig()
    if scope == "lora":
        config.lora = LoraConfig(rank=1, targets="down_proj$", num_layers=1)
    for name, value in model.items():
        setattr(config.model, name, value)
    validate(config)
    return config


def make(config):
    config = resolve(config, 20)
    subject = make_subject(config, load_sources(config))
    return config, subject, run_state.init_state(config, subject.model).params


SCOPES = [
    ("lora", {}),
    ("lora", {"quantized": "int8"}),
    ("lora", {"compute_dtype": "bfloat16"}),
    ("layers/3/mlp", {}),
    ("norm", {}),
    ("full", {}),
]


@pytest.mark.parametrize("scope, options", SCOPES)
def test_the_loss_is_the_same_whatever_the_trained_part_has_become(folder, scope, options):
    config, subject, params = make(get_config(folder, scope, **options))
    part = scope_of(config, subject.model)
    kept = ActivationCache(subject.task.loss, part)
    batches = [subject.task.batches(step)[0] for step in range(2)]
    for i, batch in enumerate([*batches, *batches]):
        grown = lambda x, i=i: x + i * 0.05 * jax.random.normal(jax.random.key(i), x.shape, x.dtype)
        now = part.merge(params, jax.tree.map(grown, part.select(params)))
        tolerance = 2e-2 if options.get("compute_dtype") else 1e-5
        np.testing.assert_allclose(
            kept(now, batch), jax.jit(subject.task.loss)(now, batch), rtol=tolerance
        )


def test_with_the_last_layer_alone_little_is_left_and_little_is_kept(folder):
    config, subject, params = make(get_config(folder))
    part = scope_of(config, subject.model)
    kept = ActivationCache(subject.task.loss, part)
    batch = subject.task.batches(0)[0]
    both, trained = kept.of(params, batch), part.select(params)
    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    assert flops(kept.above, params, trained, both) < 0.05 * flops(subject.task.loss, params, batch)
    # Of each row what the last product reads and what it is added to, at one place.
    assert sum(x.size for x in jax.tree.leaves(both[0])) <= 4 * 3 * 32 + 64


def test_what_finds_no_room_is_evaluated_each_time(folder, capsys):
    config, subject, params = make(get_config(folder))
    loss, part = subject.task.loss, scope_of(config, subject.model)
    batches = [subject.task.batches(step)[0] for step in range(3)]
    size = sum(
        x.nbytes for x in jax.tree.leaves(ActivationCache(loss, part).of(params, batches[0])[0])
    )
    kept = ActivationCache(loss, part, limit=2 * size)
    for batch in 2 * batches:
        np.testing.assert_allclose(kept(params, batch), loss(params, batch), rtol=1e-5)
    assert capsys.readouterr().out.count("2 batches are kept, and there is no room for more") == 1


@pytest.mark.parametrize("scope", ["lora", "layers/3/mlp"])
def test_projections_are_those_of_the_plain_program(folder, scope):
    config, subject, params = make(get_config(folder, scope))
    loss, key = subject.task.loss, jax.random.key(3)
    kept = ActivationCache(loss, scope_of(config, subject.model))
    batch = subject.task.batches(1)[0]
    plain = steps.make_project(config, subject.model, None, loss)(params, key, batch)
    found = steps.make_project(config, subject.model, None, kept)(
        params, key, kept.of(params, batch)
    )
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], plain[1], atol=1e-3 * float(jnp.max(jnp.abs(plain[1]))))


@pytest.mark.parametrize("scope", ["lora", "layers/3/mlp"])
def test_so_are_steps_by_backprop(folder, scope):
    config = get_config(folder, scope)
    config.mode, config.zo = "fo", ZOConfig()
    validate(config)
    config, subject, params = make(config)
    loss = subject.task.loss
    kept = ActivationCache(loss, scope_of(config, subject.model), keep_vjp=True)
    batch = subject.task.batches(1)[1]
    step = lambda loss, batch: steps.make_fo_step(config, subject.model, None, loss)(
        run_state.init_state(config, subject.model), batch
    )
    (plain, told), (found, tells) = step(loss, batch), step(kept, kept.of(params, batch))
    np.testing.assert_allclose(tells.loss, told.loss, rtol=1e-5)
    np.testing.assert_allclose(tells.grad_norm, told.grad_norm, rtol=1e-4)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, found.params, plain.params)


def test_a_run_goes_on_to_the_same_bits_and_is_rebuilt_from_its_ledger(folder, capsys):
    train_and_evaluate(get_config(folder), folder / "whole")
    config = get_config(folder)
    config.train.num_steps = 7
    train_and_evaluate(config, folder / "parts")
    train_and_evaluate(get_config(folder), folder / "parts")
    for name in ("ledger.bin", "adapter/adapter_model.safetensors"):
        assert (folder / "parts" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    capsys.readouterr()
    assert ledger.main([str(folder / "whole"), f"--base={folder / 'base'}"]) == 0
    assert "are equal to the bit to its checkpoint" in capsys.readouterr().out


def test_several_devices_and_other_ways_of_learning_are_refused(folder):
    with pytest.raises(ConfigError, match=r"is for one device; got a mesh of query=2, data=1"):
        check_mesh(get_config(folder), dict(query=2, data=1, model=1))
    config = get_config(folder)
    config.zo.batch_per_query = True
    with pytest.raises(ConfigError, match="keep_activations=true has no effect"):
        validate(config)
