"""Training on rewards: members that write, a function that scores them, and runs that go on."""

import csv
import json
from pathlib import Path
import subprocess
import sys
import time

import fine_tune
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zo_jax
from zo_jax import ledger, models
from zo_jax.models import population
from zo_jax.train import choices, run_state, steps
from zo_jax.train.config import Config, ConfigError, LoraConfig, ObjectiveConfig
from zo_jax.train.data.sources import DataError
from zo_jax.train.evolve import make_population_step
from zo_jax.train.rewards import brackets
from zo_jax.train.rewards.pool import Call, Reward, RewardFailed
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.settings import replace_value
from zo_jax.train.subject import load_sources, make_subject
from zo_jax.train.tools import ledger as ledger_tool
from zo_jax.train.validation import resolve, validate

REWARD = """
def few_capitals(prompts, completions, rows):
    assert all(row["text"] + ":" == prompt for row, prompt in zip(rows, prompts))
    return [-sum(c.isupper() for c in text) / 8 for text in completions]

def fails(prompts, completions, rows):
    raise KeyError("nothing here")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a base, examples and a reward."""
    path = tmp_path_factory.mktemp("rewards")
    fine_tune.write_base(path / "base")
    fine_tune.write_examples(path / "examples.jsonl")
    (path / "reward.py").write_text(REWARD)
    (path / "text.txt").write_text("bcd\n" * 100)
    return path


def get_config(folder, **fields) -> Config:
    config = fine_tune.get_config(folder)
    config.task.labels, config.task.answer_tokens = "", 50
    config.objective = ObjectiveConfig(
        name="reward",
        path=f"{folder / 'reward.py'}:few_capitals",
        max_new_tokens=8,
        temperature=1.0,
        shaping="prompt",
    )
    config.zo.num_queries, config.zo.epsilon, config.zo.perturbation = 3, 0.3, "low_rank"
    config.optimizer.anchor = 0.5
    for name, value in fields.items():
        replace_value(config, name.replace("__", "."), value)
    return config


def rows(run):
    with (run / "metrics.csv").open() as file:
        return [row | {"timestamp": "", "check": ""} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def run(folder):
    """A finished run."""
    result = train_and_evaluate(
        get_config(folder, objective__text_path=str(folder / "text.txt")), folder / "run"
    )
    return folder / "run", result


def subject_of(config):
    config = resolve(config, 20)
    return config, make_subject(config, load_sources(config))


def test_a_run_tells_rewards(run):
    run, result = run
    told = rows(run)
    assert result["eval_loss"] == -result["eval_reward"] and -1 <= result["eval_reward"] <= 0
    for row in told[1:]:
        assert float(row["reward"]) == -float(row["loss"])
        assert float(row["best_reward"]) >= float(row["reward"]) and row["flat_steps"] == "0"
        assert row["forward_passes"] == str(6 * int(row["step"]))
    drift = [float(row["drift"]) for row in told[1:]]
    assert drift == sorted(drift) and drift[0] > 0
    assert all(float(row["eval_text_loss"]) > 0 for row in told if row["eval_reward"])
    tested = json.loads((run / "results.json").read_text())["test"]
    assert "eval_reward" in tested["before"]


@pytest.mark.parametrize("scope", ["full", "lora", "layers/1/"])
def test_a_step_is_that_of_members_that_write_alone(folder, scope):
    """Every member formed, its texts by itself, scores by hand, and the sum of directions."""
    config = get_config(folder, scope=scope, optimizer__anchor=0.0, objective__temperature=0.0)
    if scope != "lora":
        config.lora, config.zo.epsilon = LoraConfig(), 0.02
    config, (model, task, *_) = subject_of(config)
    state = run_state.init_state(config, model)
    subset = choices.scope_of(config, model)
    key = steps.make_step_key(config, None)(0)
    batch = task.batches(0)[0]
    es, trained = task.strategy, subset.select(state.params)
    members, prompts = es.ask(key), [task.train.tokens[i] for i in batch]
    scores = np.zeros((6, len(batch)))
    for i in range(6):
        params = subset.merge(state.params, es.member(trained, members, i))
        out = models.generate(model.model, model.weights(params), prompts, max_tokens=8)
        scores[i] = [-sum(c.isupper() for c in text) / 8 for text in out.texts]
    np.testing.assert_array_equal(
        scores.astype(np.float32), task.make_score(None)(state.params, key, batch)
    )
    z = (scores - scores.mean(0)) / np.where(scores.std(0) > 0, scores.std(0), 1)
    plus, minus = z.mean(1).reshape(3, 2).T
    expected = -(plus - minus) / (2 * config.zo.epsilon)
    before = jax.tree.map(jnp.copy, trained)
    state, metrics, record = make_population_step(config, model, task)(state, 0, batch, None)
    np.testing.assert_allclose(record.projections, expected, rtol=1e-4, atol=1e-4)
    assert np.isclose(metrics.loss, -scores.mean()) and record.loss == metrics.loss
    assert np.isclose(metrics.best_score, scores.mean(1).max())
    keys = jax.random.split(key, 3)
    gradient = es.family.combine(before, keys, jnp.asarray(expected, jnp.float32) / 3)
    moved = jax.tree.map(lambda p, g: p - 1e-2 * g, before, gradient)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, subset.select(state.params), moved)


def test_the_ledger_is_the_run_without_the_reward(folder, run, tmp_path, capsys):
    run, _ = run
    (folder / "reward.py").rename(tmp_path / "away.py")
    try:
        assert ledger_tool.main([str(run), f"--base={folder / 'base'}"]) == 0
    finally:
        (tmp_path / "away.py").rename(folder / "reward.py")
    assert "are equal to the bit to its checkpoint" in capsys.readouterr().out
    assert ledger.read(run / "ledger.bin").replayable(0) == 4


def test_killed_it_goes_on_to_the_same_bits(folder, run):
    """A process is killed in the middle, between any two of its steps."""
    killed = folder / "killed"
    config = get_config(folder, objective__text_path=str(folder / "text.txt"))
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\nimport test_rewards as t\nfrom pathlib import "
        "Path\nfolder = Path(sys.argv[3])\nt.train_and_evaluate(t.get_config(folder, "
        "objective__text_path=str(folder / 'text.txt')), folder / 'killed')"
    )
    here = Path(__file__).parent
    arguments = [sys.executable, "-c", code, str(here), str(here.parent), str(folder)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        path = killed / "ledger.bin"
        if path.exists() and len(ledger.read(path).records):
            break
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert len(ledger.read(killed / "ledger.bin").records) >= 1
    train_and_evaluate(config, killed)
    run, _ = run
    assert (killed / "ledger.bin").read_bytes() == (run / "ledger.bin").read_bytes()
    assert rows(killed) == rows(run)
    name = "adapter/adapter_model.safetensors"
    assert (killed / name).read_bytes() == (run / name).read_bytes()


@pytest.fixture
def reward_of(tmp_path):
    def make(code, timeout=20.0):
        (tmp_path / "own.py").write_text(code)
        return Reward(f"{tmp_path / 'own.py'}:score", timeout)

    return make


CALLS = [Call(["p"] * 2, ["a", "b"], [{}] * 2), Call(["p"] * 2, ["c", "d"], [{"x": 1}] * 2)]


def test_what_fails_has_the_lowest_score_and_is_counted(reward_of, capfd):
    code = (
        "import time, os, sys\n"
        "def score(prompts, completions, rows):\n"
        "    assert 'jax' not in sys.modules\n"
        "    print('said', input) or sys.stdout.flush()\n"
        "    if 'b' in completions: raise ValueError('no b')\n"
        "    if 'd' in completions: {}\n"
        "    return [ord(c) for c in completions]\n"
    )
    for deed, why in (
        ("time.sleep(60)", "longer than 0.5 seconds"),
        ("os._exit(3)", "its process ended"),
        ("return ['x'] * len(rows)", "finite numbers; got 'x'"),
        ("return [1.0]", "a score for each of 2 completions; got 1|finite"),
    ):
        reward = reward_of(code.format(deed), timeout=0.5 if "sleep" in deed else 20.0)
        scores = reward.score(CALLS)
        last = 1.0 if "[1.0]" in deed else 97.0
        lowest = min(last, 97.0)
        np.testing.assert_array_equal(scores, [[97, lowest], [99, last]])
        assert reward.num_failed == (1 if "[1.0]" in deed else 2)
        err = capfd.readouterr().err
        assert "no b (line 5)" in err or why in err
        reward.close()


def test_a_reward_that_always_fails_stops_the_run(folder, reward_of):
    reward = reward_of("def score(*_): return [1 / 0]")
    with pytest.raises(RewardFailed, match=r"each of 4 completions: ZeroDivisionError.*line 1"):
        reward.score(CALLS)
    config = get_config(folder)
    config.objective.path = f"{folder / 'reward.py'}:fails"
    with pytest.raises(RewardFailed, match=r"reward.py:fails failed .* KeyError: 'nothing here'"):
        train_and_evaluate(config, folder / "fails")


def test_workers_end_with_the_process_that_asks(reward_of, tmp_path):
    code = (
        "import os, pathlib\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "def score(*_):\n    while True: pass"
    )
    reward_of(code)
    script = (
        "import os, sys, threading\nfrom zo_jax.train.rewards.pool import Reward, Call\n"
        "threading.Timer(2, lambda: os.kill(os.getpid(), 9)).start()\n"
        "Reward(sys.argv[1], 60).score([Call(['p'], ['c'], [{}])])"
    )
    subprocess.run([sys.executable, "-c", script, f"{tmp_path / 'own.py'}:score"])
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.05)
    raise AssertionError("a worker is left behind")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mode": "fo"}, "objective.name=reward has no gradient .* needs mode=zo; got fo"),
        ({"objective__path": "reward.py"}, "a Python file and one of its functions"),
        ({"objective__path": "none.py:f"}, "none.py cannot be read"),
        ({"objective__path": "{}/reward.py:g"}, "it has no function g"),
        ({"objective__path": "{}/broken.py:f"}, r"cannot be used: SyntaxError.*\(line 1\)"),
        ({"objective__path": "{}/nan.py:f"}, "scores must be finite numbers; got nan"),
        ({"objective__path": "{}/nan.py:g"}, "scores must be finite numbers; got '1'"),
        ({"objective__path": "{}/nan.py:h"}, "a score for each of 2 completions; got 3"),
        ({"objective__path": "{}/nan.py:i"}, "must return a list of scores; got None"),
        ({"objective__max_new_tokens": 80}, "leaves no room for a prompt in the model's context"),
        ({"objective__max_new_tokens": 70}, "a prompt must have 1 to 10 tokens.* has 1[0-9]"),
        ({"zo__perturbation": "rademacher"}, "needs zo.perturbation=low_rank"),
        ({"zo__epsilon": "auto"}, "zo.epsilon=auto is found by a loss"),
        ({"optimizer__learning_rate": "auto"}, "learning_rate=auto is found by a loss"),
        ({"task__template": "{text} é"}, "tokenizer cannot read the prompt"),
        ({"objective__text_path": "none.txt"}, "text_path=none.txt cannot be read"),
        ({"task__labels": fine_tune.LABELS, "task__target": "answer"}, "either task.labels"),
    ],
)
def test_bad_input_is_told_before_anything_is_compiled(folder, fields, message, tmp_path):
    (folder / "broken.py").write_text("def f(")
    (folder / "nan.py").write_text(
        "def f(p, c, r): return [float('nan')] * len(p)\n"
        "def g(p, c, r): return ['1'] * len(p)\ndef h(p, c, r): return [1, 2, 3]\n"
        "def i(p, c, r): return None\n"
    )
    put = lambda v: v.replace("{}", str(folder)) if isinstance(v, str) else v
    texts = {name: put(value) for name, value in fields.items()}
    with pytest.raises((ConfigError, DataError), match=message) as error:
        train_and_evaluate(get_config(folder, **texts), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run/ledger.bin").exists()


def test_a_step_without_signal_is_counted(folder):
    (folder / "same.py").write_text("def f(p, c, r): return [1.0] * len(p)\n")
    path = f"{folder / 'same.py'}:f"
    config, (model, task, *_) = subject_of(get_config(folder, objective__path=path))
    state, step = run_state.init_state(config, model), make_population_step(config, model, task)
    for i in range(2):
        state, metrics, record = step(state, i, task.batches(i)[0], None)
        assert metrics.num_flat == i + 1 and not np.any(record.projections)


@pytest.mark.parametrize("answers", [False, True])
def test_accuracy_is_climbed(folder, tmp_path, answers):
    """Of options by the likeliest, of answers by what is written."""
    config = get_config(folder)
    config.objective = ObjectiveConfig(name="accuracy", shaping="zscore")
    config.optimizer.anchor, config.zo.epsilon = 0.0, 1.0
    if answers:
        config.task.target, config.task.answer_tokens = "answer", 6
    else:
        config.task.labels = fine_tune.LABELS
    validate(config)
    config, (model, task, *_) = subject_of(config)
    state = run_state.init_state(config, model)
    key, batch = steps.make_step_key(config, None)(0), task.batches(0)[0]
    scores = np.asarray(task.make_score(None)(state.params, key, batch))
    assert np.all((scores >= 0) & (scores <= 1)) and len(scores) == 6
    if not answers:
        assert scores.shape == (6,) and np.std(scores) > 0
        es, subset = task.strategy, choices.scope_of(config, model)
        trained = subset.select(state.params)
        for i in (0, 3):
            params = subset.merge(state.params, es.member(trained, es.ask(key), i))
            _, chosen = task._losses_and_choices(params, batch)
            assert np.isclose(scores[i], np.mean(chosen == batch.right))


def test_brackets():
    assert brackets.is_nested("([]{})") and not brackets.is_nested("([)]")
    assert not brackets.is_nested("(") and not brackets.is_nested("a")
    import random

    rng = random.Random(0)
    for _ in range(50):
        row, prompt = brackets.make_row(rng), brackets.make_prompt(rng)
        assert brackets.is_nested(row) and 6 <= len(row) <= 12
        assert not brackets.is_nested(prompt) and len(prompt) >= 3


def test_an_anchor_pulls_without_drift_in_bfloat16():
    """With no gradient, parameters that were moved away go back: on average by the exact factor."""
    rate, strength, n = 1e-3, 0.5, 200
    start = jnp.ones(20_000, jnp.bfloat16)
    optimizer = zo_jax.anchor(strength, rate)
    update = zo_jax.Update(optimizer)
    state = update.init(start)
    state = state._replace(params=state.params + jnp.bfloat16(0.25))
    step = jax.jit(lambda state, key: update.from_gradient(state, key, 0.0, jnp.zeros(20_000))[0])
    for i in range(n):
        state = step(state, jax.random.key(i))
    expected = 0.25 * (1 - rate * strength) ** n
    # The spacing at 1.25 is 2⁻⁷; a sum of roundings has at most √n / 2 of it a parameter.
    bound = 5 * 2**-8 * np.sqrt(n / 20_000)
    assert abs(float(jnp.mean(state.params.astype(jnp.float32))) - 1 - expected) < bound
    nearest = zo_jax.Update(optimizer, rounding="nearest")
    lost, _ = nearest.from_gradient(state, jax.random.key(0), 0.0, jnp.zeros(20_000))
    np.testing.assert_array_equal(lost.params, state.params)


def test_factors_of_some_layers_are_a_population(folder):
    m = models.load(folder / "base")
    factors = models.lora.init(jax.random.key(0), m, 2, num_layers=1)
    keys, scales = jax.random.split(jax.random.key(1), 2), jnp.array([0.5, -0.5])
    family = zo_jax.low_rank()
    members = models.lora.attach(m.params, population.populate(factors, family, keys, scales))
    logits = m.logits(members, np.array([[3, 4, 5]] * 2))
    for i in range(2):
        moved = zo_jax.Evolution(2).member(factors, zo_jax.Members(keys, scales), i)
        own = m.logits(models.lora.attach(m.params, moved), np.array([[3, 4, 5]]))
        assert np.max(np.abs(logits[i] - own[0])) < 1e-4 * np.std(own)
