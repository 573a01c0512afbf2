"""Fine-tuning a pretrained model, from its files to a model of its own."""

import csv
import json
import shutil

import fine_tune
import jax
import numpy as np
import pytest

from zo_jax import models
from zo_jax.models import lora
from zo_jax.train import experiment, run_state
from zo_jax.train.config import ConfigError, LoraConfig, TaskConfig, ZOConfig
from zo_jax.train.data.sources import DataError
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.run_folder import checkpoint
from zo_jax.train.run_folder.folder import read_config
from zo_jax.train.scopes import make_scope
from zo_jax.train.settings import replace_value
from zo_jax.train.subject import load_sources, make_subject
from zo_jax.train.tools import export, generate, ledger
from zo_jax.train.validation import resolve, validate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a base, and examples."""
    path = tmp_path_factory.mktemp("fine_tune")
    fine_tune.write_base(path / "base")
    fine_tune.write_examples(path / "examples.jsonl")
    return path


def rows(run):
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "timestamp"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def run(folder):
    """A finished run with low-rank factors."""
    result = train_and_evaluate(fine_tune.get_config(folder), folder / "run")
    return folder / "run", result


def test_a_run_tells_accuracy_and_leaves_an_adapter(folder, run):
    run, result = run
    told = rows(run)
    assert [row["step"] for row in told] == ["0", "1", "2", "3", "4"]
    measured = {int(row["step"]): row["eval_accuracy"] for row in told if row["eval_accuracy"]}
    assert set(measured) == {0, 2, 4} and 0 <= result["eval_accuracy"] <= 1
    assert told[0]["eval_f1"] == "" and float(told[-1]["eval_loss"]) > 0
    test = json.loads((run / "results.json").read_text())["test"]
    assert {"before", "last (step 4)"} <= set(test) and "eval_accuracy" in test["before"]
    m = models.load(folder / "base")
    factors = lora.load(run / "adapter", m)
    assert {f.down.shape[-2] for f in factors.values()} == {2}
    best = [int(path.name) for path in (run / "best").iterdir()]
    assert best == [max(measured, key=lambda step: (float(measured[step]), -step))]


def test_only_the_factors_are_kept(run):
    run, _ = run
    size = lambda path: sum(x.stat().st_size for x in path.rglob("*") if x.is_file())
    assert size(run / "checkpoints/4") < 40_000
    assert "base" in read_config(run / "config.json")


def test_base_and_ledger_are_the_model(folder, run, capsys):
    run, _ = run
    out = folder / "rebuilt"
    base, path = str(folder / "base"), folder / "sent.bin"
    shutil.copyfile(run / "ledger.bin", path)
    assert path.stat().st_size < 3000
    assert ledger.main([str(path), f"--base={base}", f"--out={out}"]) == 0
    # Of the run's own state: the last one, whose factors are merged into the base.
    config = resolve(fine_tune.get_config(folder), 20)
    model = make_subject(config, load_sources(config)).model
    state = run_state.init_state(config, model)
    part = run_state.kept_part(config, model)
    identity = read_config(run / "config.json")["identity"]
    last = checkpoint.restore(run / "checkpoints", 4, state, identity, part)
    expected, rebuilt = model.merged(last.params), models.load(out)
    jax.tree.map(np.testing.assert_array_equal, rebuilt.params, expected)
    m = models.load(folder / "base")
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), rebuilt.params, m.params)
    assert changed["layers"]["self_attn"]["q_proj"]["weight"] and not changed["norm"]["scale"]
    assert rebuilt.tokenizer.decode(rebuilt.tokenizer.encode("ab c")) == "ab c"
    # In the run's folder, compared with its checkpoints.
    assert ledger.main([str(run), f"--base={base}"]) == 0
    assert "are equal to the bit to its checkpoint" in capsys.readouterr().out
    other = fine_tune.write_base(folder / "other", seed=1)
    assert ledger.main([str(path), f"--base={other}", f"--out={out}"]) == 2
    assert "began with another base" in capsys.readouterr().err
    assert ledger.main([str(path), "--to-step=2"]) == 2
    assert "give it as --base=MODEL" in capsys.readouterr().err


def test_a_run_goes_on_to_the_same_bits(folder, run):
    config = fine_tune.get_config(folder)
    config.train.num_steps = 2
    train_and_evaluate(config, folder / "short")
    # The base may lie elsewhere by then.
    shutil.copytree(folder / "base", folder / "moved")
    config = fine_tune.get_config(folder)
    config.model.path = str(folder / "moved")
    train_and_evaluate(config, folder / "short")
    assert [row | {"check": ""} for row in rows(folder / "short")] == [
        row | {"check": ""} for row in rows(run[0])
    ]
    for name in ("ledger.bin", "adapter/adapter_model.safetensors"):
        assert (folder / "short" / name).read_bytes() == (run[0] / name).read_bytes()
    # Weights of which only the middle differs are other weights.
    path = folder / "moved/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    config.train.num_steps = 6
    with pytest.raises(ConfigError, match=r"model\.path holds other weights"):
        train_and_evaluate(config, folder / "short")


def test_what_is_lost_of_the_best_is_made_again(folder, run, capsys):
    copy = folder / "copy"
    shutil.copytree(run[0], copy)
    (step,) = (copy / "best").iterdir()
    shutil.rmtree(step)
    train_and_evaluate(fine_tune.get_config(folder), copy)
    assert [x.name for x in (copy / "best").iterdir()] == [step.name]
    assert "is made again by replay" in capsys.readouterr().out


def test_a_run_generates_and_is_exported(folder, run, capsys):
    assert generate.main([str(run[0]), "--prompt=bcd:", "--max-tokens=3"]) == 0
    text = capsys.readouterr().out
    assert export.main([str(run[0]), f"--out={folder / 'exported'}"]) == 0
    capsys.readouterr()
    assert generate.main([str(folder / "exported"), "--prompt=bcd:", "--max-tokens=3"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    "scope, quantized, mode",
    [
        ("full", "none", "zo"),
        ("norm", "int8", "zo"),
        ("lora", "int4", "zo"),
        ("lora", "none", "fo"),
        ("layers/1/mlp/up", "none", "calibrate"),
    ],
)
def test_every_scope_and_quantisation_trains(folder, tmp_path, scope, quantized, mode):
    config = fine_tune.get_config(folder)
    config.scope, config.model.quantized, config.mode = scope, quantized, mode
    config.task.num_test, config.train.num_steps = 0, 2
    if scope != "lora":
        config.lora = LoraConfig()
    if mode == "fo":
        config.zo = ZOConfig()
    if mode == "calibrate":
        config.fo.bp_interval = 2
    validate(config)
    result = train_and_evaluate(config, tmp_path / "run")
    told = rows(tmp_path / "run")
    assert np.isfinite(result["eval_loss"]) and told[0]["eval_loss"] != told[-1]["eval_loss"]


def test_answers_are_written_and_compared(folder, tmp_path):
    config = fine_tune.get_config(folder, target="answer", num_test=4, answer_tokens=4)
    config.train.num_steps = config.train.eval_interval = 1
    result = train_and_evaluate(config, tmp_path / "run")
    assert {"eval_f1", "eval_exact_match", "eval_loss"} <= set(result)
    assert rows(tmp_path / "run")[0]["eval_f1"] != ""


def test_the_loss_of_a_step_is_that_of_its_examples(folder):
    config = resolve(fine_tune.get_config(folder), 20)
    subject = make_subject(config, load_sources(config))
    params = run_state.init_state(config, subject.model).params
    batch, none = subject.task.batches(3)
    assert none is None and len(batch.tokens) == 4 and batch.tokens.shape[1] <= 16
    m = models.load(folder / "base")
    logits = np.asarray(m.logits(m.params, batch.tokens), np.float64)
    ends = logits[np.arange(4), batch.length - 1][:, m.tokenizer.encode("-+")]
    right = ends[np.arange(4), batch.right]
    expected = np.mean(np.log(np.sum(np.exp(ends), axis=1)) - right)
    np.testing.assert_allclose(subject.task.loss(params, batch), expected, rtol=1e-4)


def test_scopes_of_a_pretrained_model(folder):
    config = resolve(fine_tune.get_config(folder), 20)
    config.scope = "reduced"
    model = make_subject(config, load_sources(config)).model
    found = make_scope("reduced", model).select(model.start(jax.random.key(0)))
    names = {
        "/".join(str(k.key) for k in path): x.shape for path, x in jax.tree.leaves_with_path(found)
    }
    assert names == {
        "embed_tokens/weight": (100, 32),
        "layers/mlp/down_proj/weight": (1, 32, 32),
        "layers/mlp/gate_proj/weight": (1, 32, 32),
        "layers/mlp/up_proj/weight": (1, 32, 32),
        "layers/post_attention_layernorm/scale": (1, 32),
    }
    with pytest.raises(ConfigError, match=r"matches no parameter; .*layers/0\.\.1/mlp"):
        make_scope("blocks", model)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"scope": "full", "model.quantized": "int8"}, "cannot be trained themselves"),
        ({"scope": "embed", "model.quantized": "int8"}, "quantised weights"),
        ({"model.path": ""}, "only if model.path is not empty|needs a pretrained model|scope=lora"),
        ({"model.path": "none"}, "model.path=none: none must be a folder with a config.json"),
        ({"model.quantized": "file"}, "keeps the blocks of a .gguf file"),
        ({"lora.targets": "nothing"}, "lora: targets must find one of"),
        ({"mode": "feedback"}, "attention=closed_form, or none"),
        ({"task.labels": ""}, "needs either task.labels.* or task.target"),
        ({"task.template": ""}, "needs task.template"),
        ({"task.path": ""}, "needs task.path"),
        ({"model.width": 8}, "only if model.path is empty"),
        ({"data.block_size": 8}, "only if task.name is text"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_folder(folder, tmp_path, fields, message):
    config = fine_tune.get_config(folder)
    for name, value in fields.items():
        replace_value(config, name, value)
    if config.scope != "lora":
        config.lora = LoraConfig()
    if config.mode == "feedback":
        config.zo = ZOConfig()
    with pytest.raises((ConfigError, DataError), match=message) as error:
        train_and_evaluate(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists() or not (tmp_path / "run/metrics.csv").exists()


def test_text_for_a_pretrained_model(folder, tmp_path):
    (tmp_path / "text.txt").write_text("a bc dab\n" * 60)
    config = fine_tune.get_config(folder)
    config.task = TaskConfig()
    config.data.source, config.data.path = "text", str(tmp_path / "text.txt")
    config.data.block_size, config.train.sample_tokens, config.train.num_steps = 16, 5, 2
    result = train_and_evaluate(config, tmp_path / "run")
    assert np.isfinite(result["eval_loss"])
    assert (tmp_path / "run/sample.txt").read_text()


GPT2 = dict(model_type="gpt2", n_embd=32, n_head=4, n_layer=2, n_positions=80)


@pytest.mark.parametrize("fields, num_trained", [({}, 32), (GPT2, 64)])
def test_the_smallest_fine_tune_is_the_last_norm_and_a_small_ledger(
    folder, tmp_path, capsys, fields, num_trained
):
    base = fine_tune.write_base(tmp_path / "base", **fields)
    config = experiment.load(f"finetune_last_norm:{base}")
    config.task.path, config.task.template = str(folder / "examples.jsonl"), "{text}:"
    config.task.labels, config.task.max_tokens = fine_tune.LABELS, 24
    config.task.num_train, config.task.num_validation, config.task.num_test = 20, 8, 6
    config.train.batch_size, config.train.num_steps, config.train.eval_interval = 20, 30, 10
    config.optimizer.warmup_steps = 2
    train_and_evaluate(config, tmp_path / "run")
    assert f"{num_trained} trained" in capsys.readouterr().out
    losses = [float(row["loss"]) for row in rows(tmp_path / "run")[1:] if row["loss"]]
    assert losses[-1] < losses[0] - 0.03
    file = shutil.copy(tmp_path / "run/ledger.bin", tmp_path / "ledger.bin")
    # Of 8 directions a step.
    assert file.stat().st_size < 3000 + 56 * 30
    assert ledger.main([str(tmp_path / "run"), f"--base={base}"]) == 0
    assert "are equal to the bit to its checkpoint" in capsys.readouterr().out
    assert ledger.main([str(file), f"--base={base}", f"--out={tmp_path / 'tuned'}"]) == 0
    before, after = models.load(base).params, models.load(tmp_path / "tuned").params
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    norm = changed.pop("ln_f" if fields else "norm")
    assert all(jax.tree.leaves(norm)) and not any(jax.tree.leaves(changed))
