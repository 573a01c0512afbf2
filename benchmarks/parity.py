"""Whether models compute what transformers computes, and how fast.

  python benchmarks/parity.py             logits of every architecture and option against
                                          transformers', adapters against PEFT's
  python benchmarks/parity.py --freeze    also writes the logits that tests/models compares with
  python benchmarks/parity.py --speed     the time of a forward pass, in turn with transformers' on
                                          the same cores

On a machine that does other work too, OMP_NUM_THREADS=1 taskset -c 0 makes the times of --speed
comparable: threads that wait for each other lose more than their share.

Needs the extra `parity` (torch, transformers, peft). Weights are random, arithmetic is float32 on
the CPU. An error is the largest difference of a logit over the standard deviation of all of them.
"""

import argparse
from pathlib import Path
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

from zo_jax import models

TESTS = Path(__file__).parents[1] / "tests" / "models"
sys.path.insert(0, str(TESTS))
import reference_models as reference

LIMIT = 2e-5
SIZES = {
    "gpt2, 124M": dict(model_type="gpt2", vocab_size=50257),
    "llama, 135M": dict(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        tie_word_embeddings=True,
    ),
}


def make_theirs(fields: dict[str, Any]) -> Any:
    """transformers' model of a config.json, with its own random weights."""
    config = transformers.AutoConfig.for_model(**fields)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def fill(theirs: Any) -> None:
    """Gives a model the weights that the tests' formula makes."""
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            x.copy_(torch.from_numpy(reference.tensor(name, tuple(x.shape))))


def their_logits(theirs: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens).long()).logits.numpy()


def error(ours: Any, theirs: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.std(theirs))


def compare_logits() -> dict[str, Any]:
    """Prints the error of every case, both ways: their folder read here, and the folder written
    here read by them.
    """
    print("| model | ours, of their folder | theirs, of our folder |\n|---|---|---|")
    frozen, worst = {}, 0.0
    for name, fields in reference.CASES.items():
        theirs = make_theirs(fields)
        fill(theirs)
        expected = their_logits(theirs, reference.TOKENS)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(f"{folder}/theirs")
            m = models.load(f"{folder}/theirs")
            read = error(m.logits(m.params, jnp.asarray(reference.TOKENS)), expected)
            models.save(f"{folder}/ours", m, m.params)
            # And one that has no config.json to copy.
            again = models.Model(m.config, m.params)
            models.save(f"{folder}/bare", again, again.params)
            written = max(
                error(
                    their_logits(
                        transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{kind}"),
                        reference.TOKENS,
                    ),
                    expected,
                )
                for kind in ("ours", "bare")
            )
        print(f"| {name} | {read:.1e} | {written:.1e} |", flush=True)
        worst = max(worst, read, written)
        frozen[name] = expected[:, reference.POSITIONS]
    finish(worst)
    return frozen


def compare_adapters() -> None:
    """Prints the error of adapters, both ways: PEFT's folder read here, and the folder written here
    read by PEFT.
    """
    print("\n| adapter | ours, of PEFT's folder | PEFT, of our folder |\n|---|---|---|")
    targets = {"gpt2": ["c_attn", "mlp.c_proj"], "llama 2": ["q_proj", "down_proj", "lm_head"]}
    worst = 0.0
    for (name, modules), rslora in zip(targets.items(), (False, True), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            base = make_theirs(reference.CASES[name])
            fill(base)
            base.save_pretrained(f"{folder}/base")
            config = peft.LoraConfig(
                r=3,
                lora_alpha=6,
                target_modules=modules,
                fan_in_fan_out=name == "gpt2",
                use_rslora=rslora,
                task_type="CAUSAL_LM",
            )
            adapted = peft.get_peft_model(base, config).eval()
            fill_adapter(adapted)
            adapted.save_pretrained(f"{folder}/theirs")
            expected = their_logits(adapted, reference.TOKENS)
            m = models.load(f"{folder}/base")
            factors = models.lora.load(f"{folder}/theirs", m)
            params = models.lora.attach(m.params, factors)
            read = error(m.logits(params, jnp.asarray(reference.TOKENS)), expected)
            models.lora.save(f"{folder}/ours", m, factors)
            base = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base")
            again = peft.PeftModel.from_pretrained(base, f"{folder}/ours").eval()
            written = error(their_logits(again, reference.TOKENS), expected)
        print(f"| {name}, {', '.join(modules)} | {read:.1e} | {written:.1e} |", flush=True)
        worst = max(worst, read, written)
    finish(worst)


def fill_adapter(adapted: Any) -> None:
    """Gives an adapter factors that change something."""
    with torch.no_grad():
        for name, x in adapted.named_parameters():
            if "lora_" in name:
                x.copy_(torch.from_numpy(reference.tensor(name, tuple(x.shape))))


def finish(worst: float) -> None:
    """Says whether the largest error is within the limit, and ends the program if it is not."""
    print(f"\nlargest error {worst:.1e}, limit {LIMIT:.0e}: {'ok' if worst <= LIMIT else 'FAILED'}")
    if worst > LIMIT:
        sys.exit(1)


def compare_speed(rounds: int, batch: int, length: int) -> None:
    """Prints the time of a forward pass to the logits, theirs and ours in turn."""
    print(
        f"{batch} x {length} tokens, {torch.get_num_threads()} threads, median of {rounds} rounds"
    )
    print("| model | theirs, s | ours, s | theirs / ours |\n|---|---|---|---|")
    for name, fields in SIZES.items():
        theirs = make_theirs(fields)
        tokens = np.random.default_rng(0).integers(0, 1000, (batch, length)).astype(np.int32)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            m = models.load(folder)
        ours = jax.jit(m.logits)
        runs = {
            "theirs": lambda theirs=theirs, tokens=tokens: their_logits(theirs, tokens),
            "ours": lambda ours=ours, m=m, tokens=tokens: jax.block_until_ready(
                ours(m.params, tokens)
            ),
        }
        seconds = {who: [] for who in runs}
        for _ in range(rounds + 1):  # the first is a warm-up
            for who, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[who].append(time.perf_counter() - start)
        a, b = (np.array(seconds[who][1:]) for who in runs)
        print(
            f"| {name} | {np.median(a):.3f} | {np.median(b):.3f} | {np.median(a / b):.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Parity with transformers.")
    parser.add_argument("--freeze", action="store_true", help="write tests/models/logits.npz")
    parser.add_argument("--speed", action="store_true", help="time a forward pass instead")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2, help="sequences of the timed pass")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if args.speed:
        return compare_speed(args.rounds, args.batch, args.length)
    frozen = compare_logits()
    compare_adapters()
    if args.freeze:
        np.savez_compressed(TESTS / "logits.npz", **frozen)
        print(f"{sum(x.size for x in frozen.values())} logits written to {TESTS / 'logits.npz'}")


if __name__ == "__main__":
    main()
