"""What needs several devices; test_sharding.py runs it in a process that has eight virtual ones."""

import functools
import re

import fine_tune
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import zo_jax
from zo_jax import families, rounding
from zo_jax.layout import Layout
from zo_jax.train import choices, run_state, steps
from zo_jax.train.config import ConfigError, ObjectiveConfig
from zo_jax.train.data import batches
from zo_jax.train.evolve import make_population_step
from zo_jax.train.losses import next_token_loss
from zo_jax.train.mesh import AXES, make_mesh
from zo_jax.train.model import RULES, make_model
from zo_jax.train.run import make_layout, train_and_evaluate
from zo_jax.train.run_folder import checkpoint, metrics
from zo_jax.train.subject import load_sources, make_subject
from zo_jax.train.validation import resolve

# Every axis alone, every two of them, all three.
MESHES = [(1, 8, 1), (1, 1, 8), (2, 4, 1), (4, 1, 2), (1, 2, 4), (2, 2, 2)]
# One leaf or two of each rule of `RULES` and one that is replicated: half a program.
FEW = "/fc/|qkv/kernel|wte|ln_f/scale"


def layout_of(*shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return Layout(make_mesh(*shape, devices=devices), RULES)


@pytest.fixture
def config(tmp_path):
    config = tiny.get_config()
    path = tmp_path / "bottles.txt"
    path.write_text(tiny.TEXT)
    config.data.source, config.data.path = "text", str(path)
    config.model.width, config.model.context_length = 64, 16
    config.zo.num_queries, config.train.batch_size = 8, 8
    return config


def setup(config, layout=None):
    corpus = batches.load_corpora(config)
    model = make_model(config.model, corpus.tokenizer.vocab_size)
    read = lambda step: batches.read_batches(config, corpus.train_NT, step, None, layout)
    return model, read


@functools.cache
def fresh(model):
    return jax.jit(model.fresh)(jax.random.key(0))


def params_on(model, layout):
    return jax.device_put(fresh(model), layout and layout.shardings(fresh(model)))


def collectives(compiled):
    """(kind, dtype, number of entries) of what devices exchange."""
    pattern = r"= \(?(\w+)\[([\d,]*)\]\S* (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)"  # noqa: E501
    return [
        (kind, dtype, int(np.prod([int(n) for n in dims.split(",") if n] or [1])))
        for dtype, dims, kind in re.findall(pattern, compiled.as_text())
    ]


def project_on(config, layout):
    model, read = setup(config, layout)
    params, place = params_on(model, layout), steps.make_step_key(config, layout)
    loss, c = steps.make_project(config, model, layout)(params, place(0), read(0)[0])
    return np.asarray(loss), np.asarray(c)


@pytest.fixture(scope="module")
def alone():
    """Projections on one device, by configuration."""
    found = {}

    def of(config):
        key = f"{config.scope} {config.zo}"
        if key not in found:
            found[key] = project_on(config, None)
        return found[key]

    return of


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_projections_do_not_depend_on_the_mesh(config, alone, shape):
    config.scope = "full" if shape == (2, 2, 2) else FEW
    loss, c = project_on(config, layout_of(*shape))
    expected_loss, expected = alone(config)
    np.testing.assert_allclose(c, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)


@pytest.mark.parametrize(
    "shape, perturbation, difference, per_query, at_once",
    [
        ((2, 2, 2), "gaussian", "forward", True, 1),
        ((2, 2, 1), "rademacher", "jvp", False, 3),
        ((2, 2, 2), "low_rank", "central", True, 2),
    ],
)
def test_other_estimates(config, alone, shape, perturbation, difference, per_query, at_once):
    config.scope, config.zo.perturbation, config.zo.difference = FEW, perturbation, difference
    config.zo.batch_per_query, config.zo.parallel_batch_size = per_query, at_once
    config.zo.num_queries = 5  # not divisible by the query axis: padded
    _, c = project_on(config, layout_of(*shape))
    _, expected = alone(config)
    assert c.shape == (5,)
    np.testing.assert_allclose(c, expected, rtol=5e-3, atol=5e-3 * np.abs(expected).max())


@pytest.mark.parametrize("num_groups", [2, 8])
def test_groups_of_queries_are_one_device_to_the_bit(config, alone, num_groups):
    loss, c = project_on(config, layout_of(num_groups, 1, 1))
    expected_loss, expected = alone(config)
    assert c.tobytes() == expected.tobytes() and loss == expected_loss


def test_other_estimates_of_groups_are_one_device_to_the_bit(config, alone):
    config.scope, config.zo.perturbation, config.zo.difference = FEW, "gaussian", "forward"
    config.zo.batch_per_query, config.zo.num_queries = True, 5
    _, c = project_on(config, layout_of(8, 1, 1))
    _, expected = alone(config)
    assert c.shape == (5,) and c.tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_what_queries_share_is_evaluated_in_every_group(config, alone, shape):
    config.model.num_layers, config.scope = 3, "^blocks/2/|^ln_f"
    loss, c = project_on(config, layout_of(*shape))
    expected_loss, expected = alone(config)
    if shape[1:] == (1, 1):
        assert c.tobytes() == expected.tobytes() and loss == expected_loss
    np.testing.assert_allclose(c, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_query_groups_exchange_scalars_alone(config):
    config.scope, layout = FEW, layout_of(8, 1, 1)
    model, read = setup(config, layout)
    project = steps.make_project(config, model, layout)
    key = steps.make_step_key(config, layout)(0)
    found = collectives(project.lower(params_on(model, layout), key, read(0)[0]).compile())
    assert found and sum(size for *_, size in found) <= 2 * config.zo.num_queries, found


@pytest.mark.parametrize("optimizer, perturbation", [("adam", "rademacher"), ("sgd", "low_rank")])
def test_update_gathers_nothing(config, optimizer, perturbation):
    config.optimizer.name, config.zo.perturbation = optimizer, perturbation
    config.scope, layout = "full", layout_of(1, 1, 4)
    model, _ = setup(config)
    state = run_state.init_state(config, model, layout)
    kernel = state.params["blocks"]["fc_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 64, 64) and kernel.shape == (1, 256, 64)
    key = steps.make_step_key(config, layout)(0)
    c = layout.put_everywhere(np.ones(8, np.float32))
    update = steps.make_update(config, model, layout)
    compiled = update.lower(state, key, layout.put_everywhere(np.float32(1)), c).compile()
    # Inner products of the directions are sums over all devices; nothing else leaves one.
    found = collectives(compiled)
    assert all(kind == "all-reduce" and size <= 64 for kind, _, size in found), found


@pytest.mark.parametrize(
    "name, shape",
    [
        *((name, (2, 2, 2)) for name in ("rademacher", "gaussian", "sphere", "low_rank")),
        ("rademacher", (1, 1, 8)),
        ("low_rank", (1, 1, 8)),
    ],
)
def test_directions_do_not_depend_on_the_mesh(config, name, shape):
    layout = layout_of(*shape)
    config.scope = FEW
    model, _ = setup(config)
    params = choices.scope_of(config, model).select(fresh(model))
    keys, weights = jax.random.split(jax.random.key(5), 3), jnp.array([1.0, -2.0, 0.5])
    family = families.by_name(name)
    alone = jax.jit(lambda p: family.combine(p, keys, weights))(params)
    placed = jax.device_put(params, layout.shardings(params))
    on_mesh = jax.jit(lambda p: family.on(layout).combine(p, keys, weights))(placed)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(on_mesh), strict=True):
        # The norm on the sphere is a sum over devices.
        np.testing.assert_allclose(
            a, b, rtol=1e-5 if name == "sphere" else 0, atol=1e-6 if name == "sphere" else 0
        )


def losses_of(folder):
    rows = metrics.read(folder / "metrics.csv")
    return np.array([[float(r["loss"] or "nan"), float(r["eval_loss"] or "nan")] for r in rows])


def test_a_run_goes_on_on_other_devices_and_is_one_device_to_the_bit(config, tmp_path, capsys):
    run = lambda name, *mesh: (
        [setattr(config.mesh, axis, size) for axis, size in zip(AXES, mesh, strict=True)],
        train_and_evaluate(config, tmp_path / name),
    )[1]
    config.scope, config.train.sample_tokens, config.train.num_steps = FEW, 0, 3
    run("run", 2, 2, 2)
    assert "8 of 8: query=2, data=2, model=2" in capsys.readouterr().out
    config.train.num_steps = 6
    run("run", 8, 1, 1)
    assert "continuing from the checkpoint of step 3" in capsys.readouterr().out
    whole = run("whole", 8, 1, 1)
    np.testing.assert_allclose(
        losses_of(tmp_path / "run"), losses_of(tmp_path / "whole"), rtol=2e-3
    )
    assert whole["step"] == 6
    # The run on eight groups of queries is that on one device, to the bit.
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: one)
        run("alone", 1, 1, 1)
    np.testing.assert_array_equal(losses_of(tmp_path / "alone"), losses_of(tmp_path / "whole"))
    ledgers = [(tmp_path / name / "ledger.bin").read_bytes() for name in ("alone", "whole")]
    assert ledgers[0] == ledgers[1]
    assert checkpoint.complete_steps(tmp_path / "alone/checkpoints") == [4, 6]


@pytest.mark.parametrize("mode", ["fo", "calibrate", "instruct"])
def test_every_mode_on_a_mesh(config, mode):
    config.mode, config.scope = mode, FEW
    config.fo.bp_interval = {"fo": 0, "calibrate": 2, "instruct": 1}[mode]
    config.optimizer.name, config.zo.num_queries = "sgd", 4
    results = []
    for layout in (None, layout_of(2, 2, 2) if mode != "instruct" else layout_of(2, 2, 1)):
        model, read = setup(config, layout)
        state = run_state.init_state(config, model, layout)
        step_on = steps.make_train_step(config, model, layout)
        for step in range(config.fo.bp_interval or 1):
            state, info, _ = step_on(state, step, *read(step))
        results.append(jax.tree.map(np.asarray, (state.params, info.loss)))
    apart = [
        np.abs(a - b) > 2e-5 + 1e-3 * np.abs(b)
        for a, b in zip(*map(jax.tree.leaves, results), strict=True)
    ]
    # A coordinate whose |g| is that of the smallest in the guided set may be in or out of it by
    # rounding.
    assert sum(x.sum() for x in apart) <= (5 if mode == "instruct" else 0)


def test_estimator_of_any_loss_on_a_mesh():
    layout = layout_of(4, 1, 2)
    params = {"kernel": jax.random.normal(jax.random.key(1), (6, 4)), "b": jnp.ones(4)}
    x = jax.random.normal(jax.random.key(2), (5, 6))
    loss_fn = lambda p, x: jnp.mean(jnp.tanh(x @ p["kernel"] + p["b"][None]) ** 2)
    estimate = lambda mesh, perturbation=None: jax.jit(
        lambda p, key: zo_jax.estimate_gradient(
            loss_fn, p, key, x, num_queries=6, mesh=mesh, perturbation=perturbation
        )
    )
    alone = estimate(None)(params, jax.random.key(0))
    placed = jax.device_put(params, layout.shardings(params))
    # Sharded parameters alone; the queries split too; and the directions drawn where the parameters
    # live.
    family = zo_jax.rademacher()
    for mesh, perturbation in (
        (None, family),
        (layout.mesh, family),
        (layout.mesh, family.on(layout)),
    ):
        on_mesh = estimate(mesh, perturbation)(placed, jax.random.key(0))
        np.testing.assert_allclose(on_mesh.projections, alone.projections, rtol=1e-2, atol=1e-3)
        for a, b in zip(
            jax.tree.leaves(on_mesh.gradient), jax.tree.leaves(alone.gradient), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)
    tx = optax.chain(
        zo_jax.zeroth_order(jax.random.key(0), num_queries=6, mesh=layout.mesh), optax.sgd(0.1)
    )
    step = jax.jit(lambda p, s: tx.update(None, s, p, value_fn=lambda q: loss_fn(q, x)))
    moved, _ = step(placed, tx.init(placed))
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="no axis 'queries'; its axes are query, data, model"):
        zo_jax.estimate_gradient(
            loss_fn, params, jax.random.key(0), x, mesh=layout.mesh, query_axis="queries"
        )


def test_stochastic_rounding_does_not_depend_on_the_mesh():
    layout = layout_of(1, 1, 4)
    params = {"kernel": jnp.ones((8, 64), jnp.bfloat16)}
    steps_ = {"kernel": jnp.full((8, 64), 1e-3, jnp.float32)}
    alone = jax.jit(rounding.apply)(params, steps_, jax.random.key(3))
    placed = jax.device_put((params, steps_), layout.shardings((params, steps_)))
    on_mesh = jax.jit(rounding.apply)(*placed, jax.random.key(3))
    np.testing.assert_array_equal(alone["kernel"], on_mesh["kernel"])


def test_meshes_that_do_not_fit(config, tmp_path):
    for mesh, message in (
        ((3, 1, 1), "must multiply to the 8 devices; got query=3, data=1, model=1"),
        ((-1, 3, 1), "must multiply to the 8 devices"),
        ((-1, -1, 1), "at least 1, or -1 for one of them"),
        ((0, 1, 1), "at least 1, or -1"),
        ((1, 8, 1), "train.batch_size must be divisible by mesh.data; got 6 and 8"),
    ):
        config.train.batch_size = 6
        config.mesh.query, config.mesh.data, config.mesh.model = mesh
        with pytest.raises(ConfigError, match=message):
            make_layout(config, None)
    config.mesh.query, config.mesh.data, config.mesh.model = 1, 4, 2
    config.train.batch_size, config.mode = 8, "fo"
    config.fo.gradient_accumulation_steps = 4
    with pytest.raises(
        ConfigError, match=r"micro-batch must be divisible by mesh.data; got 2 and 4"
    ):
        make_layout(config, None)


REWARD = """
def capitals(prompts, completions, rows):
    return [sum(c.isupper() for c in text) / 8 for text in completions]
"""


@pytest.mark.parametrize("objective", ["reward", "accuracy"])
def test_a_population_is_spread_over_queries(tmp_path, objective):
    """Members of each device write what they write on one device, and are scored in their order."""
    (tmp_path / "reward.py").write_text(REWARD)
    fine_tune.write_base(tmp_path / "base")
    fine_tune.write_examples(tmp_path / "examples.jsonl")
    config = fine_tune.get_config(tmp_path)
    config.zo.num_queries, config.zo.epsilon, config.zo.perturbation = 8, 0.3, "low_rank"
    if objective == "reward":
        path = f"{tmp_path / 'reward.py'}:capitals"
        config.objective = ObjectiveConfig(name="reward", path=path, max_new_tokens=8)
        config.task.labels, config.task.answer_tokens = "", 50
    else:
        config.objective = ObjectiveConfig(name="accuracy", shaping="zscore")
    config = resolve(config, 20)
    model, task, *_ = make_subject(config, load_sources(config))
    layout = make_layout(config, model)
    assert layout.mesh.shape["query"] == 8
    found = []
    for place in (None, layout):
        state = run_state.init_state(config, model, place)
        step = make_population_step(config, model, task, place)
        state, metrics_, record = step(state, 0, task.batches(0, place)[0], None)
        found.append((np.asarray(record.projections), float(metrics_.loss)))
        results = task.evaluate(state.params)
        found[-1] += (results["eval_loss"],)
    for alone, spread_ in zip(*found, strict=True):
        np.testing.assert_allclose(alone, spread_, rtol=1e-4)
    assert np.any(found[0][0])
    for queries, mesh, message in (
        (3, (8, 1, 1), "the 6 members, two for each of zo.num_queries, must be divisible by the 8"),
        (8, (4, 2, 1), "spread over mesh.query alone.* got mesh.data=2, mesh.model=1"),
    ):
        config.zo.num_queries = queries
        config.mesh.query, config.mesh.data, config.mesh.model = mesh
        with pytest.raises(ConfigError, match=message):
            make_layout(config, model)


def test_leaves_that_do_not_divide_are_replicated(config):
    config.model.width, config.model.num_heads = 6, 1
    layout = layout_of(1, 1, 4)
    model, _ = setup(config)
    state = run_state.init_state(config, model, layout)
    assert "blocks/qkv/kernel [1, 6, 18]" in list(layout.replicated(state.params))
    assert state.params["blocks"]["qkv"]["kernel"].sharding.is_fully_replicated
    assert not state.params["blocks"]["fc"]["kernel"].sharding.is_fully_replicated


def test_loss_is_the_same_on_a_mesh(config):
    layout = layout_of(2, 2, 2)
    model, _ = setup(config)
    tokens = np.random.default_rng(0).integers(0, 20, (8, 8)).astype(np.int32)
    loss = jax.jit(lambda params, tokens_BT: next_token_loss(model, params, tokens_BT))
    on_mesh = loss(params_on(model, layout), layout.put_blocks(tokens, np.arange(8)))
    alone = loss(fresh(model), tokens)
    np.testing.assert_allclose(on_mesh, alone, rtol=1e-6)
