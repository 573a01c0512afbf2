"""Noise on activations: how near to the gradient it comes, and what it learns.

  python benchmarks/activations.py --cosines            against draws and credit, five minutes
  python benchmarks/activations.py                      training with Adam, half an hour on a core
  python benchmarks/activations.py --rows=draws,feedback --draws=16 --steps=100

The model is that of configs/default.py, 2 layers; the last norm and the head have their exact
gradient in every row. The ceiling of a discount is `zo_jax.mean_activation_gradient`, what
infinitely many draws give; with discount 1 it is backprop. Cosines are those of everything below
the head, after 300 steps of backprop, mean of some keys, beside ceiling / sqrt(1 + c / draws) with
the c of the most draws. Feedback is `zo_jax.activation_feedback` of the output error, taught for
the cosines by other batches. A row's rate is the best of --rates by the first seed's validation
loss in the end.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
from learning import mean_and_spread
import numpy as np
import optax

import zo_jax
from zo_jax.train import experiment
from zo_jax.train.data.corpus import load_corpus
from zo_jax.train.evaluate import choose_blocks, make_evaluate
from zo_jax.train.losses import cross_entropy_gradient, next_token_losses
from zo_jax.train.model import make_model

EXACT = "^(ln_f|head)/"
DRAWS, DISCOUNTS, NUM_KEYS = (4, 16, 64, 256), (0.0, 0.9, 1.0), 4
TAUGHT_STEPS, TAUGHT_DRAWS = 100, 16
ROWS = ("draws", "feedback", "ceiling")


class Setup:
    """The data, the model and its losses."""

    def __init__(self):
        config = experiment.load("default")
        self.corpus = load_corpus(config.data)
        self.batch_size = config.train.batch_size
        self.model = make_model(config.model, self.corpus.tokenizer.vocab_size)
        self.held_out = choose_blocks(self.corpus.validation_NT, 256)
        self.evaluate = make_evaluate(self.model)

    def losses(self, params: Any, tokens_BT: jax.Array) -> jax.Array:
        return next_token_losses(self.model, params, tokens_BT)

    def output_error(self, params: Any, tokens_BT: jax.Array) -> jax.Array:
        """Of the last hidden state of each token in its own loss."""
        hidden_BTC = self.model.hidden(params, tokens_BT[:, :-1])
        flat_NC = hidden_BTC.reshape(-1, self.model.width)
        targets_N = tokens_BT[:, 1:].reshape(-1)
        _, error_NC, _ = cross_entropy_gradient(flat_NC, self.model.head(params), targets_N, 1.0)
        return error_NC.reshape(hidden_BTC.shape)

    def batch(self, seed: int, step: int) -> np.ndarray:
        blocks_NT = self.corpus.train_NT
        rng = np.random.default_rng([seed, step])
        return blocks_NT[rng.integers(0, len(blocks_NT), self.batch_size)]

    def feedback(self, params: Any) -> zo_jax.ActivationFeedback:
        return zo_jax.activation_feedback(
            self.losses, self.output_error, params, self.batch(0, 0), exact=EXACT
        )


def make_gradient(setup: Setup, row: str, num_draws: int, discount: float) -> Any:
    """(params, key, tokens, feedback or None) -> (gradient, feedback or None)."""

    def gradient(params, key, tokens_BT, feedback):
        options = dict(discount=discount, exact=EXACT)
        if row == "ceiling" and discount == 1:
            mean = lambda p: jnp.mean(setup.losses(p, tokens_BT))
            return jax.grad(mean)(params), feedback
        if row == "ceiling":
            found = zo_jax.mean_activation_gradient(setup.losses, params, tokens_BT, **options)
            return found, feedback
        options |= dict(num_draws=num_draws, feedback=feedback)
        found = zo_jax.activation_gradient(setup.losses, params, key, tokens_BT, **options)
        return found.gradient, found.feedback

    return gradient


def train(
    setup: Setup, row: str, num_draws: int, discount: float, rate: float, num_steps: int, seed: int
) -> tuple[float, Any]:
    """The validation loss after some steps of Adam, and the parameters."""
    gradient = make_gradient(setup, row, num_draws, discount)
    optimizer = optax.adam(optax.linear_schedule(rate, 0.02 * rate, num_steps), b2=0.99)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, key, tokens_BT):
        params, opt_state, feedback = state
        found, feedback = gradient(params, key, tokens_BT, feedback)
        updates, opt_state = optimizer.update(found, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, feedback

    params = setup.model.fresh(jax.random.key(seed))
    feedback = setup.feedback(params) if row == "feedback" else None
    state = params, optimizer.init(params), feedback
    for i in range(num_steps):
        state = step(state, jax.random.key(i), setup.batch(seed, i))
    return float(setup.evaluate(state[0], setup.held_out)), state[0]


def tell_training(setup: Setup, options: argparse.Namespace) -> None:
    print("| gradient | discount | draws | rate | validation loss |\n|---|---|---|---|---|")
    cases = [
        (row, discount, draws)
        for row in options.rows
        for discount in options.discounts
        for draws in ([0] if row == "ceiling" else options.draws)
    ]
    for row, discount, draws in cases:
        run = lambda rate, seed, row=row, discount=discount, draws=draws: train(
            setup, row, draws, discount, rate, options.steps, seed
        )[0]
        first, *others = options.seeds
        tried = {rate: np.nan_to_num(run(rate, first), nan=np.inf) for rate in options.rates}
        rate = min(tried, key=tried.__getitem__)
        found = [tried[rate], *(run(rate, seed) for seed in others)]
        shown = draws or ("backprop" if discount == 1 else "∞")
        print(
            f"| {row} | {discount:g} | {shown} | {rate:g} | {mean_and_spread(found)} |", flush=True
        )


def tell_cosines(setup: Setup) -> None:
    _, params = train(setup, "ceiling", 0, 1.0, 3e-3, 300, 0)
    tokens_BT = setup.batch(1, 0)
    below = lambda tree: jnp.concatenate(
        [jnp.ravel(x) for k in ("blocks", "wpe", "wte") for x in jax.tree.leaves(tree[k])]
    )
    cosine = lambda a, b: float(a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))
    of = lambda *case: jax.jit(make_gradient(setup, *case))
    true = below(of("ceiling", 0, 1.0)(params, None, tokens_BT, None)[0])
    print("| discount | draws | cosine | with feedback | ceiling / sqrt(1 + c / draws) |")
    print("|---|---|---|---|---|")
    for discount in DISCOUNTS:
        mean = below(of("ceiling", 0, discount)(params, None, tokens_BT, None)[0])
        ceiling = cosine(mean, true)
        found, feedback = {}, setup.feedback(params)
        teach = of("feedback", TAUGHT_DRAWS, discount)
        for i in range(TAUGHT_STEPS):
            _, feedback = teach(params, jax.random.key(i), setup.batch(2, i), feedback)
        keys = [jax.random.key(1000 + i) for i in range(NUM_KEYS)]
        for draws in DRAWS:
            plain, taught = of("draws", draws, discount), of("feedback", draws, discount)
            pair = [
                np.mean([cosine(below(f(params, key, tokens_BT, x)[0]), true) for key in keys])
                for f, x in ((plain, None), (taught, feedback))
            ]
            found[draws] = pair
        # From the most draws, whose cosine is known best, so that the others are told, not fitted.
        c = DRAWS[-1] * ((ceiling / found[DRAWS[-1]][0]) ** 2 - 1)
        for draws, (alone, with_feedback) in found.items():
            fit = ceiling / np.sqrt(1 + c / draws)
            print(f"| {discount:g} | {draws} | {alone:.3f} | {with_feedback:.3f} | {fit:.3f} |")
        print(f"| {discount:g} | ∞ | {ceiling:.3f} | | |", flush=True)


def main() -> None:
    split = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cosines", action="store_true")
    parser.add_argument("--rows", type=split(str), default=list(ROWS))
    parser.add_argument("--draws", type=split(int), default=[16])
    parser.add_argument("--discounts", type=split(float), default=list(DISCOUNTS))
    parser.add_argument("--rates", type=split(float), default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=split(int), default=[0])
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"--rows must be of {', '.join(ROWS)}; got {', '.join(unknown)}")
    setup = Setup()
    if options.cosines:
        tell_cosines(setup)
    else:
        tell_training(setup, options)


if __name__ == "__main__":
    main()
