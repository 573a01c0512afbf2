import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from zo_jax.train import choices, run_state, steps
from zo_jax.train.config import ConfigError
from zo_jax.train.data import batches
from zo_jax.train.data.corpus import load_corpus
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import make_model
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.run_folder import metrics


@pytest.fixture(autouse=True)
def text(tmp_path, tiny_config):
    path = tmp_path / "bottles.txt"
    path.write_text(tiny.TEXT)
    tiny_config.data.source, tiny_config.data.path = "text", str(path)
    return path


def losses_of(workdir):
    return [(r["step"], r["loss"], r["eval_loss"]) for r in metrics.read(workdir / "metrics.csv")]


def setup(config):
    corpus = load_corpus(config.data)
    model = make_model(config.model, corpus.tokenizer.vocab_size)
    state = run_state.init_state(config, model)
    batch = lambda step: next(
        b for b in batches.read_batches(config, corpus.train_NT, step) if b is not None
    )
    return model, state, batch


def copy(tree):
    return jax.tree.map(np.array, tree)


def assert_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize(
    "perturbation, difference", [("rademacher", "central"), ("gaussian", "forward")]
)
def test_zo_step_equals_numpy(tiny_config, perturbation, difference):
    tiny_config.zo.perturbation, tiny_config.zo.difference = perturbation, difference
    tiny_config.zo.epsilon = 1e-2
    tiny_config.optimizer.name = "sgd"
    model, state, batch = setup(tiny_config)
    tokens, start = batch(0), copy(state.params)
    key = jax.random.fold_in(choices.base_key(tiny_config), 0)
    new, info, _ = steps.make_train_step(tiny_config, model)(state, 0, tokens, None)

    direction = jax.jit(choices.make_estimator(tiny_config).family.direction)
    loss = jax.jit(lambda params: next_token_loss(model, params, tokens))
    gradient = jax.tree.map(np.zeros_like, start)
    for query_key in jax.random.split(key, 3):
        z = copy(direction(start, query_key))
        up = float(loss(jax.tree.map(lambda p, z: p + np.float32(1e-2) * z, start, z)))
        if difference == "central":
            down = float(loss(jax.tree.map(lambda p, z: p - np.float32(1e-2) * z, start, z)))
            c = (up - down) / 2e-2
        else:
            c = (up - float(loss(start))) / 1e-2
        gradient = jax.tree.map(lambda g, z, c=c: g + c * z / 3, gradient, z)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(info.grad_norm, norm, rtol=1e-3)
    expected = jax.tree.map(lambda p, g: p - 1e-2 * g, start, gradient)
    assert_close(new.params, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fo_accumulation_equals_none(tiny_config, optimizer):
    tiny_config.mode, tiny_config.optimizer.name = "fo", optimizer
    tiny_config.optimizer.eps = 1e-3  # Adam divides tiny gradients by themselves otherwise
    tiny_config.train.batch_size = 4
    results = []
    for parts in (1, 4):
        tiny_config.fo.gradient_accumulation_steps = parts
        model, state, batch = setup(tiny_config)
        results.append(copy(steps.make_fo_step(tiny_config, model)(state, batch(0))))
    assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per_query", [False, True])
def test_compiled_once(tiny_config, per_query):
    tiny_config.zo.batch_per_query = per_query
    model, state, batch = setup(tiny_config)
    project, update = steps.make_project(tiny_config, model), steps.make_update(tiny_config, model)
    for step in range(3):
        key = jax.random.fold_in(choices.base_key(tiny_config), step)
        donated = state.params
        state, _ = update(state, key, *project(state.params, key, batch(step)))
    assert project._cache_size() == update._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))


def test_fo_compiled_once(tiny_config):
    tiny_config.mode = "fo"
    model, state, batch = setup(tiny_config)
    step = steps.make_fo_step(tiny_config, model)
    for i in range(3):
        state, _ = step(state, batch(i))
    assert step._cache_size() == 1


def test_step_without_a_finite_loss_changes_nothing_but_is_counted(tiny_config):
    model, state, _ = setup(tiny_config)
    update = steps.make_update(tiny_config, model)
    key = choices.base_key(tiny_config)
    state, _ = update(state, key, jnp.float32(1), jnp.ones(3))  # so that Adam has momentum
    before = copy((state.params, state.train.opt_state))
    state, info = update(state, key, jnp.float32(jnp.nan), jnp.full(3, jnp.nan))
    assert_close((state.params, state.train.opt_state), before, rtol=0)
    assert int(state.step) == 2 and int(state.train.num_skipped) == int(info.num_skipped) == 1
    # One query of three suffices.
    state, info = update(state, key, jnp.float32(1), jnp.array([1.0, jnp.nan, jnp.nan]))
    assert int(info.num_skipped) == 1 and np.isfinite(info.grad_norm)


def test_cosine_schedule_is_logged_as_used(tiny_config):
    tiny_config.optimizer.schedule, tiny_config.optimizer.warmup_steps = "cosine", 2
    model, state, batch = setup(tiny_config)
    step = steps.make_train_step(tiny_config, model)
    rates = []
    for i in range(6):
        state, info, _ = step(state, i, batch(i), None)
        rates.append(float(info.learning_rate))
    t = np.arange(3, 7) - 2
    cosine = 1e-6 + (1e-2 - 1e-6) * (1 + np.cos(np.pi * t / 4)) / 2
    np.testing.assert_allclose(rates, [5e-3, 1e-2, *cosine], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zo", "fo", "exact", "groups", "exact groups", "tokens"])
def test_run_resumes_bit_exactly(tiny_config, tmp_path, mode, capsys):
    if mode == "fo":
        tiny.to_backprop(tiny_config)
    if "exact" in mode:
        tiny_config.zo.exact = "^(blocks/0/fc_proj|ln_f)/"
    if "groups" in mode:
        tiny_config.zo.groups = "layers"
    if mode == "tokens":
        tiny_config.zo.groups = "tokens"
    if mode not in ("zo", "fo"):
        tiny_config.scope = "/fc|ln_f|wte"  # a shorter program
    whole = train_and_evaluate(tiny_config, tmp_path / "whole")
    again = train_and_evaluate(tiny_config, tmp_path / "again")
    assert whole == again and losses_of(tmp_path / "whole") == losses_of(tmp_path / "again")
    assert (tmp_path / "whole/ledger.bin").exists() is (mode in ("zo", "groups", "tokens"))

    tiny_config.train.num_steps = 3
    train_and_evaluate(tiny_config, tmp_path / "part")
    tiny_config.train.num_steps = 6
    capsys.readouterr()
    assert train_and_evaluate(tiny_config, tmp_path / "part") == whole
    assert "continuing from the checkpoint of step 3" in capsys.readouterr().out
    assert losses_of(tmp_path / "part") == losses_of(tmp_path / "whole")

    log = (tmp_path / "whole/metrics.csv").read_bytes()
    assert train_and_evaluate(tiny_config, tmp_path / "whole") == whole
    assert "complete" in capsys.readouterr().out
    assert (tmp_path / "whole/metrics.csv").read_bytes() == log


def test_run_folder(tiny_config, tmp_path, capsys):
    result = train_and_evaluate(tiny_config, tmp_path / "run")
    out = capsys.readouterr().out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["zo"]["num_queries"] == 3 and config["train"]["num_steps"] == 6
    rows = metrics.read(tmp_path / "run/metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(7))
    assert [row["step"] for row in rows if row["eval_loss"]] == ["0", "3", "6"]
    assert rows[-1]["forward_passes"] == "36" and rows[-1]["tokens"] == str(6 * 2 * 8)
    assert float(rows[-1]["eval_loss"]) == pytest.approx(result["eval_loss"], rel=1e-8)
    assert (tmp_path / "run/loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "run/sample.txt").read_text()) == 12 + 1
    assert f"{result['eval_loss']:.6f}" in out and "parameters" in out and str(tmp_path) in out
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_torn_log_and_later_rows_are_dropped(tiny_config, tmp_path):
    tiny.to_backprop(tiny_config)  # compiles fastest
    whole = train_and_evaluate(tiny_config, tmp_path / "run")
    before = losses_of(tmp_path / "run")
    log = tmp_path / "run/metrics.csv"
    # As after a kill: the last checkpoint is of step 4, rows go on, and one is torn.
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    log.write_text(log.read_text()[:-30])
    assert train_and_evaluate(tiny_config, tmp_path / "run") == whole
    assert losses_of(tmp_path / "run") == before


def test_another_run_is_left_alone(tiny_config, tmp_path):
    tiny.to_backprop(tiny_config)  # compiles fastest
    train_and_evaluate(tiny_config, tmp_path / "run")
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    tiny_config.optimizer.b1 = 0.8
    with pytest.raises(ConfigError, match=r"optimizer.b1 \(there 0.9, here 0.8\)"):
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert files == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    tiny_config.optimizer.b1, tiny_config.train.num_steps = 0.9, 2
    with pytest.raises(ConfigError, match=r"is at step 6, past"):
        train_and_evaluate(tiny_config, tmp_path / "run")
    tiny_config.optimizer.b1 = 0.8
    assert train_and_evaluate(tiny_config, tmp_path / "run", restart=True)["step"] == 2


def test_changed_text_is_noticed(tiny_config, tmp_path, text):
    tiny.to_backprop(tiny_config)  # compiles fastest
    train_and_evaluate(tiny_config, tmp_path / "run")
    # In capitals the characters have the same ids: the text itself is what counts.
    for changed in (tiny.TEXT[::-1], tiny.TEXT.upper(), tiny.TEXT + "1"):
        text.write_text(changed)
        with pytest.raises(ConfigError, match=r"corpus.text \(there"):
            train_and_evaluate(tiny_config, tmp_path / "run")


def test_length_of_a_cosine_run_is_fixed(tiny_config, tmp_path):
    tiny.to_backprop(tiny_config)  # compiles fastest
    tiny_config.optimizer.schedule, tiny_config.optimizer.warmup_steps = "cosine", 1
    train_and_evaluate(tiny_config, tmp_path / "run")
    tiny_config.train.num_steps = 9
    with pytest.raises(ConfigError, match=r"train.num_steps \(there 6, here 9\)"):
        train_and_evaluate(tiny_config, tmp_path / "run")


def test_files_without_a_config_are_no_run(tiny_config, tmp_path):
    (tmp_path / "metrics.csv").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        train_and_evaluate(tiny_config, tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "mine\n"


def test_outputs_beside_the_table(tiny_config, tmp_path):
    tiny_config.train.snapshot_delta = 1e-3
    tiny_config.train.eval_interval, tiny_config.train.num_steps = 1, 3
    train_and_evaluate(tiny_config, tmp_path / "run")
    log = tmp_path / "run/evaluations.jsonl"
    with log.open("a") as file:
        file.write('{"step": 9')  # what a killed run leaves
    tiny_config.train.num_steps = 6
    train_and_evaluate(tiny_config, tmp_path / "run")
    evaluations = metrics.read_evaluations(log)
    assert [line["step"] for line in evaluations] == list(range(7))
    losses = [line["eval_loss"] for line in evaluations]
    rows = metrics.read(tmp_path / "run/metrics.csv")
    np.testing.assert_allclose([float(row["eval_loss"]) for row in rows], losses, rtol=1e-6)
    levels = [int((losses[0] - min(losses[: i + 1])) / 1e-3) for i in range(7)]
    expected = [i for i in range(1, 7) if levels[i] > levels[i - 1]]
    kept = sorted(
        int(folder.name)
        for folder in (tmp_path / "run/snapshots").iterdir()
        if folder.name.isdigit()
    )
    assert kept == expected and expected
    assert list((tmp_path / "run/tensorboard").glob("events.out.tfevents.*"))
