"""zo.method in the program: the step is that of the method in the library, and replays."""

import copy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zo_jax
from zo_jax import ledger, methods
from zo_jax.replay import replay
from zo_jax.train import choices, run_state, steps
from zo_jax.train.config import KEPT, METHODS, UNRECORDED, ConfigError
from zo_jax.train.data import batches
from zo_jax.train.data.corpus import load_corpus
from zo_jax.train.losses import next_token_loss, next_token_losses
from zo_jax.train.model import make_model
from zo_jax.train.optimizers import make_optimizer
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.run_folder import checkpoint, metrics
from zo_jax.train.run_folder.resume import run_header
from zo_jax.train.settings import replace_value
from zo_jax.train.tools import ledger as ledger_tool
from zo_jax.train.validation import resolve, validate


def begin(config):
    """A valid configuration resolved, its corpus and model, and the state before the first step."""
    validate(config)
    corpus = load_corpus(config.data)
    config = resolve(config, len(corpus.train_NT))
    model = make_model(config.model, corpus.tokenizer.vocab_size)
    return config, corpus, model, run_state.init_state(config, model)


def test_fzoo_steps_are_those_of_the_library_and_replay(tiny_config, tmp_path):
    config = tiny_config
    config.zo.method, config.zo.difference, config.zo.epsilon = "fzoo", "forward", 1e-2
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 1e-2
    config, corpus, model, state = begin(config)
    start = jax.tree.map(np.array, state.params)
    writer = ledger.Writer(tmp_path / "ledger.bin", run_header(config, model, state))
    train_step = steps.make_train_step(config, model)
    for step in range(2):
        tokens, _ = batches.read_batches(config, corpus.train_NT, step)
        state, _, record = train_step(state, step, tokens, None)
        assert record is not None
        writer.append(step + 1, ledger.REPLAYABLE, *record)
        if step == 0:
            first, first_tokens = jax.tree.map(np.array, state.params), tokens
    end = jax.tree.map(np.array, state.params)
    writer.close()

    method = methods.Fzoo(choices.make_estimator(config))
    transformation = method.transformation(choices.base_key(config))
    loss = lambda params, tokens: next_token_loss(model, params, tokens)
    updates, _ = jax.jit(
        lambda p: transformation.update(
            None, transformation.init(p), p, value_fn=loss, batch=(first_tokens,)
        )
    )(start)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, u, b: near(a - 1e-2 * u, b), start, updates, first)
    assert max(np.max(np.abs(x)) for x in jax.tree.leaves(updates)) > 1, "far from the plain mean"

    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    again = replay(start, ledger.read(tmp_path / "ledger.bin"), optimizer)
    jax.tree.map(near, again.params, end)


def test_steps_along_kept_directions_are_those_of_the_library(tiny_config):
    """In both halves, in a step after the factors have changed."""
    config = tiny_config
    config.zo.perturbation, config.zo.rank, config.zo.epsilon = "lozo", 2, 1e-2
    config.zo.period = 1
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 1e-2
    config, corpus, model, state = begin(config)
    train_step = steps.make_train_step(config, model)
    for step in range(2):
        before = jax.tree.map(np.array, state.params)
        tokens, _ = batches.read_batches(config, corpus.train_NT, step)
        state, _, record = train_step(state, step, tokens, None)

    method = methods.Lozo(choices.make_estimator(config), rank=2, period=1)
    transformation = method.transformation(choices.base_key(config))
    loss = lambda params, tokens: next_token_loss(model, params, tokens)

    @jax.jit
    def second(params):
        start = transformation.init(params)._replace(count=jnp.int32(1))
        return transformation.update(None, start, params, value_fn=loss, batch=(tokens,))

    updates, there = second(before)
    np.testing.assert_allclose(record.projections, there.numbers, rtol=1e-3, atol=1e-4)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, u, b: near(a - 1e-2 * u, b), before, updates, state.params)


# What the tiny model and few steps need in the place of the papers' settings.
OPTIONS = {
    "lozo": '{"rank": 2, "period": 1, "decay": 0.9}',
    "subzero": '{"rank": 2, "period": 1}',
    "tezo": '{"rank": 2, "decay": 0.9}',
    "mopi": '{"num_directions": 2}',
    "zo_muon": '{"rank": 2, "period": 1}',
    "hizoo": '{"smoothing": 0.1}',
    "svrg": '{"period": 2, "small_batch": 2}',
}
MADE_FOR = {"zo_muon": dict(difference="forward"), "conmezo": dict(perturbation="sphere")}


def with_method(config, name):
    config.zo.method, config.zo.epsilon = name, 1e-2
    config.zo.method_options = OPTIONS.get(name, "")
    for field, value in MADE_FOR.get(name, {}).items():
        setattr(config.zo, field, value)
    config.zo.num_queries = config.train.batch_size = 4
    return config


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_what_zo_says_or_refuses_it(tiny_config, name):
    params = {"w": jax.random.normal(jax.random.key(1), (6, 5))}
    x = jax.random.normal(jax.random.key(2), (4, 6))
    loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]) ** 2)
    step = methods.Step(np.zeros(2, np.uint32), jnp.int32(0))

    def numbers(**fields):
        config = copy.deepcopy(with_method(tiny_config, name))
        for field, value in fields.items():
            setattr(config.zo, field, value)
        validate(config)
        method = choices.own_method(config)
        return method.project(loss, params, method.init(params), step, x)[1]

    before = numbers()
    others = dict(
        perturbation=("rademacher", "gaussian", "sphere"),
        difference=("central", "forward"),
        batch_chunks=(2,),
    )
    for field, values in others.items():
        for value in values:
            if value == getattr(tiny_config.zo, field):
                continue
            try:
                after = numbers(**{field: value})
            except ConfigError:
                continue
            assert not np.array_equal(before, after), (field, value)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_tells_its_evaluations(tiny_config, name):
    method, calls = choices.own_method(with_method(tiny_config, name)), []
    count = lambda x: (calls.append(1), np.float32(x))[1]

    def loss(params, x):
        value = jnp.sum((x @ params["w"]) ** 2)
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(count, shape, value, vmap_method="sequential")

    params, x = {"w": jnp.ones((6, 5))}, jnp.ones((4, 6))

    def count_calls(count):
        calls.clear()
        step = methods.Step(np.zeros(2, np.uint32), jnp.int32(count))
        jax.block_until_ready(method.project(loss, params, method.init(params), step, x))
        jax.effects_barrier()
        return len(calls)

    # GRZO's passes are of the examples, one by one.
    each = len(x) if name == "grzo" else 1
    first, second = count_calls(0), count_calls(1)
    assert second == method.num_evaluations * each
    # SVRG's first step takes a snapshot.
    assert first == (second / 2 if name == "svrg" else second)
    assert first + second == method.evaluations_until(2) * each


@pytest.mark.parametrize("name", METHODS)
def test_a_method_makes_the_steps_of_the_library_and_takes_them_again(tiny_config, name):
    config = with_method(tiny_config, name)
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 1e-3
    config, corpus, model, state = begin(config)
    start = jax.tree.map(jnp.copy, state)
    train_step, records, read = steps.make_train_step(config, model), [], []
    for step in range(2):
        tokens, _ = batches.read_batches(config, corpus.train_NT, step)
        state, _, record = train_step(state, step, tokens, None)
        records.append(jax.tree.map(np.array, record))
        read.append(tokens)
    assert records[0].projections.shape == (choices.num_numbers(config),)

    method = choices.own_method(config)
    tx = optax.chain(method.transformation(choices.base_key(config)), optax.sgd(1e-3))
    loss = lambda params, tokens: next_token_loss(model, params, tokens)
    params, own = start.params, tx.init(start.params)
    update = jax.jit(lambda own, p, x: tx.update(None, own, p, value_fn=loss, batch=(x,)))
    for record, tokens in zip(records, read, strict=True):
        updates, own = update(own, params, tokens)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(record.projections, own[0].numbers, rtol=2e-2, atol=1e-3)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    jax.tree.map(near, params, state.params)
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), start.params, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-5

    again, take = start, steps.make_update(config, model)
    for record in records:
        key = jax.random.wrap_key_data(record.key)
        again, _ = take(again, key, record.loss, record.projections)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_method_without_anything_to_move_is_refused(tiny_config):
    config = without_ledger(tiny_config, "agzo")
    config.scope = "ln_|^w"
    with pytest.raises(ConfigError, match=r"matrices of layers, and scope=ln_\|\^w trains none"):
        begin(config)


def test_a_step_without_a_finite_loss_leaves_the_memory_as_it_is(tiny_config):
    config, _, model, state = begin(with_method(tiny_config, "conmezo"))
    update = steps.make_update(config, model)
    key = choices.base_key(config)
    taken, _ = update(state, key, jnp.float32(4), jnp.ones(4))
    before = jax.tree.map(np.array, taken)
    after, metrics = update(taken, key, jnp.float32(jnp.nan), jnp.full(4, jnp.nan))
    assert metrics.num_skipped == 1
    jax.tree.map(np.testing.assert_array_equal, after.train.family, before.train.family)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_a_run_with_a_memory_goes_on_and_is_rebuilt_from_its_ledger(tiny_config, tmp_path, capsys):
    """HiZOO has twice as many numbers as queries, and a number a parameter that it keeps."""
    config = tiny_config
    config.zo.method, config.zo.method_options = "hizoo", '{"smoothing": 0.1}'
    config.train.num_steps, config.train.checkpoint_interval = 6, 2
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_and_evaluate(config, whole)
    out = capsys.readouterr().out
    assert "by hizoo" in out and f"{2 * config.zo.num_queries + 1} loss evaluations" in out

    shutil.copytree(whole, cut)
    # The later checkpoints are lost: the steps are taken again from the ledger.
    for step in checkpoint.complete_steps(cut / "checkpoints")[1:]:
        shutil.rmtree(cut / "checkpoints" / str(step))
    train_and_evaluate(config, cut)
    assert "replaying steps" in capsys.readouterr().out
    assert ledger_tool.main([str(cut), "--to-step=6"]) == 0
    out = capsys.readouterr().out
    assert "6 steps of 6 numbers of hizoo" in out
    assert "are equal to the bit to its checkpoint" in out


# (zo.method_options, forward passes in three steps of four queries, of what the run says).
WITHOUT_LEDGER = {
    "agzo": (
        '{"num_iterations": 2}',
        3 * 9,
        "the transposes of products: 4 directions a step",
    ),
    "dizo": ('{"period": 2, "num_iterations": 3}', 3 * 8 + 6, "forward passes only: 4 rademacher"),
    "addax": ('{"alpha": 0.1, "small_batch": 1}', 3 * 9, "backprop for the first examples of each"),
}


def without_ledger(config, name):
    assert set(WITHOUT_LEDGER) == set(UNRECORDED)
    config.zo.method, config.zo.method_options = name, WITHOUT_LEDGER[name][0]
    config.zo.num_queries, config.zo.epsilon, config.train.batch_size = 4, 1e-2, 4
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 1e-3
    return config


@pytest.mark.parametrize("name", UNRECORDED)
def test_a_method_without_a_ledger_makes_the_steps_of_the_library(tiny_config, name):
    config, corpus, model, state = begin(without_ledger(tiny_config, name))
    start, key = jax.tree.map(jnp.copy, state.params), choices.base_key(config)
    estimator, sgd = choices.make_estimator(config), optax.sgd(1e-3)
    loss = lambda params, tokens: next_token_loss(model, params, tokens)
    if name == "agzo":
        loss = lambda params, tokens: next_token_losses(model, params, tokens)
        in_layers = lambda path, leaf: path.startswith("blocks/")
        own = methods.Agzo(estimator, num_iterations=2, is_matrix=in_layers)
        tx = optax.chain(own.transformation(key), sgd)
    elif name == "dizo":
        zo = zo_jax.zeroth_order(key, estimator=estimator)
        tx = optax.chain(zo, sgd, methods.dizo(key, period=2, num_iterations=3))
    else:
        tx = optax.chain(methods.addax(key, 0.1, estimator, small_batch=1), sgd)
    update = jax.jit(lambda own, p, x: tx.update(None, own, p, value_fn=loss, batch=(x,)))

    params, own = start, tx.init(start)
    train_step = steps.make_train_step(config, model)
    for step in range(3):
        tokens, _ = batches.read_batches(config, corpus.train_NT, step)
        state, told, record = train_step(state, step, tokens, None)
        assert record is None and np.isfinite(told.loss)
        updates, own = update(own, params, tokens)
        params = optax.apply_updates(params, updates)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    jax.tree.map(near, params, state.params)
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), start, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("name", UNRECORDED)
def test_a_run_without_a_ledger_resumes_to_the_bit_and_says_so(tiny_config, name, tmp_path, capsys):
    config = without_ledger(tiny_config, name)
    config.train.num_steps, config.train.checkpoint_interval = 3, 2
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = train_and_evaluate(config, whole)
    _, passes, words = WITHOUT_LEDGER[name]
    out = capsys.readouterr().out
    assert words in out and "no ledger" in out and not (whole / "ledger.bin").exists()
    assert metrics.read(whole / "metrics.csv")[-1]["forward_passes"] == str(passes)
    assert ledger_tool.main([str(whole)]) == 2
    assert "zo.method=agzo, dizo, addax" in capsys.readouterr().err

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "3")
    assert train_and_evaluate(config, cut) == result
    assert "continuing from the checkpoint of step 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", KEPT)
def test_factors_are_kept_for_a_period(tiny_config, name):
    tiny_config.zo.perturbation, tiny_config.zo.rank, tiny_config.zo.period = name, 2, 3
    params = {"w": jnp.ones((4, 3))}
    kept = lambda step: jax.tree.leaves(choices.kept_directions(tiny_config, params, step))
    same = lambda a, b: all(map(np.array_equal, kept(a), kept(b)))
    assert same(0, 2) and same(3, 5) and same(2, 3) == (name == "tezo")
    kinds = {"lozo": methods.Lozo, "subzero": methods.SubZero, "tezo": methods.Tezo}
    assert type(choices.kept_directions(tiny_config, params, 0)) is type(
        kinds[name](rank=2).family(params, (), methods.Step(jnp.zeros(2, jnp.uint32), 0))
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"zo.method_options": "[1]"}, "must be an object"),
        (
            {"zo.method": "svrg", "zo.method_options": '{"small_batch": 99}'},
            "small_batch must be below train.batch_size",
        ),
        ({"zo.method_options": '{"smooth": 1}'}, "unexpected keyword argument 'smooth'"),
        ({"zo.method_options": '{"smoothing": 2}'}, "smoothing must be in"),
        ({"zo.difference": "forward"}, "needs an estimator with difference 'central'"),
        ({"zo.perturbation": "lozo"}, "are two methods"),
        ({"zo.epsilon": "auto"}, "needs a number as zo.epsilon"),
        ({"zo.exact": "head"}, "steps of another length"),
        ({"mesh.model": 2}, "set mesh.model=1"),
        ({"zo.method": "grzo", "zo.num_queries": 3}, "a direction for each example"),
        (
            {"zo.method": "grzo", "zo.num_queries": 2, "zo.parallel_batch_size": 2},
            "examples of a batch at once",
        ),
        ({"zo.method": "lozo", "zo.perturbation": "sphere"}, "its directions are its own"),
        ({"zo.method": "eggroll", "zo.difference": "forward"}, "compares members"),
        ({"mode": "calibrate", "fo.bp_interval": 2}, "it is read only if mode is zo"),
        ({"zo.method": "addax", "zo.batch_per_query": True}, "addax reads one batch"),
        (
            {"zo.method": "addax", "zo.method_options": '{"small_batch": 99}'},
            "small_batch must leave a multiple",
        ),
        ({"zo.method": "agzo", "zo.perturbation": "sphere"}, "its directions are its own"),
        ({"zo.method": "dizo", "zo.method_options": '{"clip": 2}'}, "clip must be in"),
    ],
)
def test_methods_that_cannot_be_made_are_refused(tiny_config, change, message):
    tiny_config.zo.method = "hizoo"
    for name, value in change.items():
        replace_value(tiny_config, name, value)
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(difference="central"), "zo.method=fzoo needs zo.difference=forward"),
        (dict(num_queries=1), "at least two losses"),
        (dict(batch_per_query=True), "losses of one batch"),
        (dict(exact="head"), "steps of another length"),
        (dict(groups="leaves"), "the groups' own projections"),
    ],
)
def test_impossible_methods_are_refused(tiny_config, change, message):
    tiny_config.zo.method, tiny_config.zo.difference = "fzoo", "forward"
    for name, value in change.items():
        setattr(tiny_config.zo, name, value)
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config)
    tiny_config.zo.method = "mezo"
    with pytest.raises(ConfigError, match=r"zo\.method must be one of plain, fzoo"):
        validate(tiny_config)


def test_a_rate_found_by_plain_trials_is_refused(tiny_config):
    tiny_config.zo.method, tiny_config.zo.difference = "fzoo", "forward"
    tiny_config.optimizer.learning_rate = "auto"
    with pytest.raises(ConfigError, match="trials of plain estimates"):
        validate(tiny_config)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"mode": "calibrate", "fo.bp_interval": 2},
            "needs mode=zo, zo.exact=none and zo.groups=none",
        ),
        ({"zo.exact": "head"}, "needs mode=zo, zo.exact=none and zo.groups=none"),
        ({"zo.epsilon": "auto"}, "auto is found along directions"),
    ],
)
def test_impossible_kept_directions_are_refused(tiny_config, change, message):
    tiny_config.zo.perturbation = "lozo"
    for name, value in change.items():
        replace_value(tiny_config, name, value)
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config)
