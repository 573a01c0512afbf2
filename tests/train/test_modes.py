"""One step of each mode against NumPy, and what the modes have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax.guided import instruct_directions
from zo_jax.interpreter import record_formed
from zo_jax.train import choices, guided_steps, run_state, steps
from zo_jax.train.config import ConfigError, InstructConfig, blocks_per_step
from zo_jax.train.data import batches
from zo_jax.train.data.corpus import load_corpus
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import make_model
from zo_jax.train.scopes import make_scope
from zo_jax.train.validation import check_possible, resolve, validate

# A matrix, a vector and the embedding: half a program, in which all is done that is done to leaves.
FEW = "/fc/|wte"


def setup(config):
    check_possible(config)
    corpus = load_corpus(config.data)
    config = resolve(config, len(corpus.train_NT))
    model = make_model(config.model, corpus.tokenizer.vocab_size)
    return config, model, corpus, run_state.init_state(config, model)


def run(config, num_steps):
    config, model, corpus, state = setup(config)
    train_step = steps.make_train_step(config, model)
    for step in range(num_steps):
        state, info, _ = train_step(
            state, step, *batches.read_batches(config, corpus.train_NT, step)
        )
    return jax.tree.map(np.array, (state, info))


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def unflat(vector, like):
    leaves, out = jax.tree.leaves(like), []
    for leaf in leaves:
        out.append(jnp.asarray(vector[: leaf.size].reshape(leaf.shape), jnp.float32))
        vector = vector[leaf.size :]
    return jax.tree.unflatten(jax.tree.structure(like), out)


def gradient(model, params, tokens):
    return jax.jit(jax.grad(lambda params: next_token_loss(model, params, tokens)))(params)


def central(loss, start, directions, epsilon):
    at = lambda v: float(loss(unflat(v, start)))
    theta = flat(start)
    return np.array(
        [(at(theta + epsilon * z) - at(theta - epsilon * z)) / (2 * epsilon) for z in directions]
    )


@pytest.mark.parametrize(
    "method, num_guided, normalize",
    [
        ("hybrid", 0, False),
        ("hybrid", 2, False),
        ("hybrid", 2, True),
        ("gram_schmidt", 0, False),
    ],
)
def test_guided_step_equals_numpy(tiny_config, method, num_guided, normalize):
    q = 3
    tiny_config.mode, tiny_config.fo.bp_interval = "instruct", 1
    tiny_config.zo.epsilon = 1e-2
    tiny_config.zo.num_queries = q
    tiny_config.instruct = InstructConfig(
        method=method,
        num_guided=num_guided,
        blend_ratio=0.25,
        grad_clip_norm=0.5,
        cosine_target=0.6,
        normalize=normalize,
    )
    tiny_config.optimizer.name, tiny_config.scope = "sgd", FEW
    config, model, corpus, state = setup(tiny_config)
    tokens, fo_tokens = batches.read_batches(config, corpus.train_NT, 0)
    whole = jax.tree.map(np.array, state.params)
    new, info = steps.make_guided_step(config, model)(
        state, jax.random.fold_in(choices.base_key(config), 0), tokens, fo_tokens
    )

    scope = choices.scope_of(config, model)
    start = scope.select(whole)
    loss = jax.jit(lambda part: next_token_loss(model, scope.merge(whole, part), tokens))
    g_tree = scope.select(gradient(model, whole, fo_tokens))
    g = flat(g_tree)
    key, k = jax.random.fold_in(choices.base_key(config), 0), num_guided or q
    make = lambda g, key: instruct_directions(g, key, k, 0.6, 0.5, method)
    made = jax.jit(make)(g_tree, jax.random.fold_in(key, 0))
    z = [flat(jax.tree.map(lambda x: x[i], made)) for i in range(k)]
    family = choices.make_estimator(config).family
    z += (
        [
            flat(jax.jit(family.direction)(start, r))
            for r in jax.random.split(jax.random.fold_in(key, 1), q - k)
        ]
        if k < q
        else []
    )
    c = central(loss, start, z, 1e-2)
    parts = [ci * zi for ci, zi in zip(c, z, strict=True)]
    guided = sum(parts[:k]) / (g @ g if normalize else 1)
    estimate = (guided + sum(parts[k:])) / q
    estimate = estimate * min(1, 0.5 / np.linalg.norm(estimate))
    mixed = 0.75 * estimate + 0.25 * g
    np.testing.assert_allclose(info.grad_norm, np.linalg.norm(mixed), rtol=1e-3)
    moved = flat(scope.select(new.params))
    np.testing.assert_allclose(moved, flat(start) - 1e-2 * mixed, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose((info.cosine_target, info.noise_scale), (0.6, 0.5), rtol=1e-6)


def test_fo_step_equals_numpy(tiny_config):
    tiny_config.mode, tiny_config.optimizer.name, tiny_config.fo.batch_size = "fo", "sgd", 3
    config, model, corpus, state = setup(tiny_config)
    assert blocks_per_step(config) == 3
    _, tokens = batches.read_batches(config, corpus.train_NT, 0)
    assert len(tokens) == 3
    start = jax.tree.map(np.array, state.params)
    new, info = steps.make_fo_step(config, model)(state, tokens)
    g = flat(gradient(model, start, tokens))
    np.testing.assert_allclose(info.grad_norm, np.linalg.norm(g), rtol=1e-5)
    np.testing.assert_allclose(flat(new.params), flat(start) - 1e-2 * g, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_calibrate_every_step_is_fo_bit_for_bit(tiny_config, optimizer):
    tiny_config.optimizer.name = optimizer
    tiny_config.mode = "fo"
    fo, fo_info = run(tiny_config, 3)
    tiny_config.mode, tiny_config.fo.bp_interval = "calibrate", 1
    calibrated, info = run(tiny_config, 3)
    for a, b in zip(
        jax.tree.leaves((fo, fo_info)), jax.tree.leaves((calibrated, info)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_calibrate_takes_turns(tiny_config):
    tiny_config.mode, tiny_config.fo.bp_interval = "calibrate", 3
    turns = [batches.reads(tiny_config, step) for step in range(6)]
    assert turns == [(True, False), (True, False), (False, True)] * 2
    tiny_config.scope = FEW
    state, _ = run(tiny_config, 3)
    assert state.step == 3 and state.train.num_skipped == 0
    tiny_config.mode = "instruct"
    assert [batches.reads(tiny_config, step) for step in (1, 2)] == [(True, False), (True, True)]


@pytest.mark.parametrize("method", ["hybrid", "gram_schmidt"])
def test_cosine_target_one_without_noise_is_backprop(tiny_config, method):
    tiny_config.mode, tiny_config.fo.bp_interval = "instruct", 1
    tiny_config.zo.epsilon = 1e-2
    tiny_config.instruct = InstructConfig(method=method, cosine_target=1.0, noise_scale=0.0)
    tiny_config.optimizer.name, tiny_config.optimizer.learning_rate = "sgd", 1.0
    tiny_config.scope = FEW
    config, model, corpus, state = setup(tiny_config)
    tokens, fo_tokens = batches.read_batches(config, corpus.train_NT, 0)
    start = jax.tree.map(np.array, state.params)
    new, _ = steps.make_guided_step(config, model)(
        state, choices.base_key(config), tokens, fo_tokens
    )
    select = choices.scope_of(config, model).select
    g = flat(select(gradient(model, start, fo_tokens)))
    moved = flat(select(start)) - flat(select(new.params))
    assert moved @ g / np.linalg.norm(moved) / np.linalg.norm(g) >= 0.999


def test_a_zero_gradient_guides_nothing(tiny_config):
    # With no parameter in the loss's way but a bias that the last LayerNorm's zero scale hides,
    # backprop gives zero.
    tiny_config.mode, tiny_config.fo.bp_interval = "instruct", 1
    tiny_config.scope = "^blocks/0/fc/bias$"
    config, model, corpus, state = setup(tiny_config)
    params = state.params | {"ln_f": jax.tree.map(jnp.zeros_like, state.params["ln_f"])}
    state = state._replace(train=state.train._replace(params=params))
    tokens, fo_tokens = batches.read_batches(config, corpus.train_NT, 0)
    before = flat(state.params)
    new, info = steps.make_guided_step(config, model)(
        state, choices.base_key(config), tokens, fo_tokens
    )
    assert info.grad_norm == 0 and new.train.num_skipped == 0
    np.testing.assert_array_equal(flat(new.params), before)


def test_adaptive_schedule():
    config = InstructConfig(adaptive=True, cosine_target=0.01, noise_scale=10.0)
    for lowest in (np.inf, 7.0, 6.95, 6.5, 5.0, 1.0):
        k = np.floor((7.0 - lowest) / 0.2) if lowest < 7.0 else 0
        history = guided_steps.new_history()._replace(lowest=jnp.float32(lowest))
        expected = min(0.01 + 0.1 * k, 0.99), max(10 - 1.0 * k, 0.1)
        np.testing.assert_allclose(
            guided_steps.adaptive_schedule(config, history), expected, rtol=1e-5
        )


def test_history_is_the_lowest_mean_of_ten():
    losses = np.random.default_rng(0).uniform(1, 3, 25).astype(np.float32)
    losses[5] = np.nan  # left out
    history = guided_steps.new_history()
    finite, expected = [], np.inf
    for loss in losses:
        history = guided_steps.remember(history, jnp.float32(loss))
        finite += [loss] if np.isfinite(loss) else []
        if len(finite) >= 10:
            expected = min(expected, np.mean(finite[-10:]))
        np.testing.assert_allclose(history.lowest, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "mode, scope", [("zo", "reduced"), ("fo", r"blocks/1/.*kernel|wpe"), ("instruct", "reduced")]
)
def test_scopes_train_nothing_else(tiny_config, mode, scope):
    tiny_config.mode, tiny_config.scope, tiny_config.model.num_layers = mode, scope, 2
    tiny_config.fo.bp_interval = 2 if mode == "instruct" else 0
    config, model, _, state = setup(tiny_config)
    start = jax.tree.map(np.array, state.params)
    trained_shapes = jax.tree.map(jnp.shape, choices.scope_of(config, model).select(start))
    after, _ = run(tiny_config, 2)
    for path, old in jax.tree.leaves_with_path(start):
        names = [p.key for p in path]
        new = after.params
        for name in names:
            new = new[name]
        in_blocks = names[0] == "blocks"
        if scope == "reduced":
            trained = names[0] == "wte" or (in_blocks and names[1] in ("fc", "fc_proj", "ln_2"))
        else:
            trained = names[0] == "wpe" or names[-1] == "kernel"
        changed = np.any(new != old, axis=tuple(range(1, old.ndim)))
        if in_blocks:
            assert not changed[0] and changed[1] == trained
        else:
            assert changed.any() == trained
    # Adam's moments are of the trained parameters alone.
    moments = after.train.opt_state[0].mu
    assert jax.tree.map(jnp.shape, moments) == trained_shapes


def test_a_scope_that_matches_nothing_lists_the_paths(tiny_config):
    model = make_model(tiny_config.model, 11)
    with pytest.raises(
        ConfigError, match=r"matches no parameter; .*blocks/0..0/fc/bias.*wte/embedding"
    ):
        make_scope("attention", model)
    with pytest.raises(ConfigError, match="is none: "):
        make_scope("(", model)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(mode="calibrate"), "needs fo.bp_interval"),
        (dict(train__eval_max_samples=3), "only if train.eval_source is not empty or shakespeare"),
        (dict(mode="instruct"), "needs fo.bp_interval"),
        (dict(fo__bp_interval=2), "only if mode is calibrate or instruct"),
        (dict(instruct__blend_ratio=1.5, mode="instruct"), "from 0 to 1"),
        (dict(instruct__cosine_target=-1.5, mode="instruct"), "from -1 to 1"),
        (dict(instruct__noise_scale=0.1), "only if mode is instruct, but mode is zo"),
        (
            dict(instruct__num_guided=9, mode="instruct", fo__bp_interval=1),
            "more than zo.num_queries",
        ),
        (dict(optimizer__name="lion"), "must be one of sgd, adam, adamw, muon, mudamw"),
        (dict(optimizer__momentum=0.9), "only if optimizer.name is sgd"),
    ],
)
def test_bad_fields(tiny_config, fields, message):
    for name, value in fields.items():
        section, _, leaf = name.rpartition("__")
        setattr(getattr(tiny_config, section) if section else tiny_config, leaf, value)
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config)


def test_corpora_of_their_own(tiny_config, tmp_path):
    tiny_config.data.block_size = 8
    for name in ("fo", "eval"):
        (tmp_path / f"{name}.txt").write_text(f"First {name} then the rest of it, to the end. " * 4)
    tiny_config.mode, tiny_config.fo.bp_interval = "calibrate", 2
    tiny_config.fo.source, tiny_config.fo.path = "text", str(tmp_path / "fo.txt")
    tiny_config.train.eval_source, tiny_config.train.eval_path = "text", str(tmp_path / "eval.txt")
    validate(tiny_config)
    corpus = batches.load_corpora(tiny_config)
    read = corpus.tokenizer.decode
    assert read(corpus.validation_NT.ravel()).startswith("First eval then")
    assert read(corpus.fo_NT.ravel()).startswith("First fo then")
    tokens, none = batches.read_batches(tiny_config, corpus.train_NT, 0, corpus.fo_NT)
    assert none is None and tokens.shape == (2, 8)
    none, fo_tokens = batches.read_batches(tiny_config, corpus.train_NT, 1, corpus.fo_NT)
    assert none is None and all(block.tolist() in corpus.fo_NT.tolist() for block in fo_tokens)
    tiny_config.fo.corpus_fraction = 0.5
    with pytest.raises(ConfigError, match=r"only if fo.source is empty, but fo.source is text"):
        validate(tiny_config)


@pytest.mark.parametrize("perturbation", ["rademacher", "low_rank"])
@pytest.mark.parametrize("difference", ["central", "jvp"])
def test_a_stack_in_part_is_perturbed_layer_by_layer(tiny_config, perturbation, difference):
    tiny_config.scope, tiny_config.model.num_layers = "blocks/[13]/.*", 4
    tiny_config.zo.perturbation, tiny_config.zo.difference = perturbation, difference
    tiny_config.zo.epsilon = 1e-2
    config, model, corpus, state = setup(tiny_config)
    tokens, _ = batches.read_batches(config, corpus.train_NT, 0)
    scope, key = choices.scope_of(config, model), jax.random.key(0)
    with record_formed() as formed:
        _, c = steps.make_project(config, model)(state.params, key, tokens)
    # No operation but those on one layer forms anything: the stacks are neither formed nor copied
    # whole.
    assert not [f for f in formed if f.primitive in ("scatter", "scan")]
    trained = scope.select(state.params)
    loss = jax.jit(lambda t: next_token_loss(model, scope.merge(state.params, t), tokens))
    family = choices.make_estimator(config).family
    z = [flat(jax.jit(family.direction)(trained, k)) for k in jax.random.split(key, 3)]
    if difference == "central":
        expected = central(loss, trained, z, 1e-2)
    else:
        g = flat(jax.jit(jax.grad(loss))(trained))
        expected = [zi @ g for zi in z]
    np.testing.assert_allclose(c, expected, rtol=1e-3, atol=1e-3)


def test_exact_step_equals_backprop_of_the_head_and_directions_for_the_rest(tiny_config):
    tiny_config.zo.exact, tiny_config.model.tied_head = "head", False
    tiny_config.zo.epsilon, tiny_config.optimizer.name = 1e-2, "sgd"
    config, model, corpus, state = setup(tiny_config)
    tokens, _ = batches.read_batches(config, corpus.train_NT, 0)
    start, key = jax.tree.map(np.array, state.params), jax.random.key(0)
    new, info = steps.make_exact_step(config, model)(state, key, tokens)
    g = gradient(model, start, tokens)
    for name in ("head", "ln_f"):
        a, b, there = (flat(tree[name]) for tree in (g, new.params, start))
        np.testing.assert_allclose(b, there - 1e-2 * a, rtol=1e-4, atol=1e-7)

    rest = {k: v for k, v in start.items() if k not in ("head", "ln_f")}
    loss = jax.jit(lambda rest: next_token_loss(model, {**start, **rest}, tokens))
    direction = jax.jit(choices.make_estimator(config).family.direction)
    z = [flat(direction(rest, k)) for k in jax.random.split(key, 3)]
    c = central(loss, rest, z, 1e-2)
    estimate = sum(ci * zi for ci, zi in zip(c, z, strict=True)) / 3
    moved = flat({k: new.params[k] for k in rest})
    np.testing.assert_allclose(moved, flat(rest) - 1e-2 * estimate, rtol=1e-3, atol=1e-5)
    assert np.isfinite(info.loss)


def test_what_cannot_be_exact_is_told(tiny_config):
    def message(scope="full", **zo):
        tiny_config.scope = scope
        for name, value in zo.items():
            setattr(tiny_config.zo, name, value)
        config, model, _, _ = setup(tiny_config)
        with pytest.raises(ConfigError) as error:
            steps.make_train_step(config, model)
        return str(error.value)

    assert "set model.tied_head=false" in message(exact="head")
    assert "matches no parameter" in message(exact="nothing")
    assert "zo.exact must be none, head or a regular expression" in message(exact="(")
    assert "leaves nothing to directions" in message(exact=".")
    assert "finds nothing of what is trained" in message(scope="^wpe/", exact="^ln_f/")
    tiny_config.optimizer.learning_rate = "auto"
    with pytest.raises(ConfigError, match=r"no part in zo.exact"):
        validate(tiny_config)
