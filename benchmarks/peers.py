"""A step of this library beside a step of others: the same model, the same data, as many loss
evaluations, in turn in one run.

  python benchmarks/peers.py                          this library, plain JAX, optax
  python benchmarks/peers.py --rounds=3 --width=128   a smaller model, coarser medians
  python benchmarks/peers.py --eggroll=FOLDER --mezo=FOLDER
                                                      and checkouts of ESHyperscale/HyperscaleES and
                                                      princeton-nlp/MeZO

evosax (Open_ES, Sep_CMA_ES) takes part where it is installed (`pip install evosax`), and MeZO's
PyTorch loop where torch and transformers are: all of them in an environment outside the project's.
Who is absent is named.

The model is a decoder of blocks written with `jax.numpy` alone, the loss that of its next token. A
step has 16 loss evaluations, for 8 directions in both senses, or 16 members, and plain SGD; the
floor is those 16 evaluations of the unperturbed model by `lax.map`, jitted. Ratios are medians over
rounds in which all run once, in turn. MeZO's has one direction a step and PyTorch's GPT-2 of the
same widths, so that its floor is two evaluations of that. Memory is argument + temp + output -
alias of XLA's `memory_analysis()` over that of one plain evaluation. Lines are those that a user
writes for the step, of the functions below.
"""

import argparse
import ast
from collections.abc import Callable
import importlib.util
import inspect
import os
from pathlib import Path
import sys
import time
import types
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

import zo_jax

NUM_QUERIES, EPSILON, RATE = 8, 1e-3, 1e-4
VOCAB_SIZE, NUM_LAYERS, NUM_HEADS, CONTEXT = 8192, 8, 4, 128


class Step(NamedTuple):
    """A step that can be timed and measured.

    Attributes:
      run: () -> what is to be waited for; changes what it keeps.
      program: what is compiled, or None.
      source: the function whose lines a user writes.
    """

    run: Callable[[], Any]
    program: Any
    source: Callable[..., Any]


# The model: products go through `mm(name, x)`, so that those who perturb products can.


def init(key: jax.Array, width: int) -> dict[str, jax.Array]:
    """Matrices [out, in], vectors, and tables, by name."""
    shapes = {"embedding": (VOCAB_SIZE, width), "positions": (CONTEXT, width)}
    for i in range(NUM_LAYERS):
        shapes |= {
            f"{i}/qkv": (3 * width, width),
            f"{i}/out": (width, width),
            f"{i}/up": (4 * width, width),
            f"{i}/down": (width, 4 * width),
        }
    keys = jax.random.split(key, len(shapes))
    return {
        name: 0.02 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def forward(embedded: jax.Array, mm: Callable[[str, jax.Array], jax.Array]) -> jax.Array:
    """Logits [B, T, V] of embedded tokens [B, T, W]."""
    norm = lambda x: x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)
    x = embedded
    heads = lambda y: y.reshape(*y.shape[:2], NUM_HEADS, -1)
    for i in range(NUM_LAYERS):
        q, k, v = jnp.split(mm(f"{i}/qkv", norm(x)), 3, axis=-1)
        attended = jax.nn.dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
        x = x + mm(f"{i}/out", attended.reshape(x.shape))
        x = x + mm(f"{i}/down", jax.nn.gelu(mm(f"{i}/up", norm(x))))
    return mm("embedding", norm(x))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def loss_fn(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    embedded = params["embedding"][inputs] + params["positions"][: inputs.shape[1]]
    return cross_entropy(forward(embedded, lambda name, x: x @ params[name].T), targets)


# The steps.


def ours(params: Any, tokens: jax.Array, **options: Any) -> Step:
    tx = optax.chain(zo_jax.zeroth_order(jax.random.key(0), **options), optax.sgd(RATE))

    def step(params, state, tokens):
        updates, state = tx.update(None, state, params, value_fn=loss_fn, batch=(tokens,))
        return optax.apply_updates(params, updates), state

    return _of_two(step, params, tx.init(params), tokens, ours)


def plain_jax(params: Any, tokens: jax.Array) -> Step:
    """MeZO as it is written in JAX by hand: trees of normal entries from keys, made three times."""

    def moved(params, key, scale):
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        pairs = zip(leaves, keys, strict=True)
        new = [x + scale * jax.random.normal(k, x.shape) for x, k in pairs]
        return jax.tree.unflatten(treedef, new)

    def step(params, key, tokens):
        key, step_key = jax.random.split(key)
        keys = jax.random.split(step_key, NUM_QUERIES)

        def project(key):
            plus = loss_fn(moved(params, key, EPSILON), tokens)
            return (plus - loss_fn(moved(params, key, -EPSILON), tokens)) / (2 * EPSILON)

        def apply(params, key_and_projection):
            key, projection = key_and_projection
            return moved(params, key, -RATE / NUM_QUERIES * projection), None

        return lax.scan(apply, params, (keys, lax.map(project, keys)))[0], key

    return _of_two(step, params, jax.random.key(0), tokens, plain_jax)


def optax_perturbations(params: Any, tokens: jax.Array) -> Step:
    """The score-function gradient of the smoothed loss, all members at once (forward
    differences).
    """
    tx = optax.sgd(RATE)

    def step(params, key, tokens):
        key, step_key = jax.random.split(key)
        smoothed = optax.perturbations.make_perturbed_fun(
            lambda params: loss_fn(params, tokens),
            num_samples=2 * NUM_QUERIES,
            sigma=EPSILON,
            noise=optax.perturbations.Normal(),
        )
        gradient = jax.grad(smoothed, argnums=1)(step_key, params)
        return optax.apply_updates(params, tx.update(gradient, tx.init(params))[0]), key

    return _of_two(step, params, jax.random.key(0), tokens, optax_perturbations)


def evosax_step(params: Any, tokens: jax.Array, name: str) -> Step:
    import evosax.algorithms

    algorithm = getattr(evosax.algorithms, name)(2 * NUM_QUERIES, params)
    es_params = algorithm.default_params
    state = algorithm.init(jax.random.key(0), params, es_params)

    def step(state, key, tokens):
        key, ask_key, tell_key = jax.random.split(key, 3)
        population, state = algorithm.ask(ask_key, state, es_params)
        fitness = lax.map(lambda member: loss_fn(member, tokens), population)
        state, _ = algorithm.tell(tell_key, population, fitness, state, es_params)
        return state, key

    return _of_two(step, state, jax.random.key(0), tokens, evosax_step)


def eggroll(params: Any, tokens: jax.Array, folder: Path) -> Step:
    """Its noiser around the products of the same model, all members by vmap. It has no rule for
    look-ups: they are not perturbed, as its own models leave it.
    """
    # The packages themselves import environments of games.
    for name in ("hyperscalees", "hyperscalees.models", "hyperscalees.noiser"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder / "src" / name.replace(".", "/"))]
    from hyperscalees.models.common import MM_PARAM, simple_es_tree_key
    from hyperscalees.noiser.eggroll import EggRoll

    frozen, noiser = EggRoll.init_noiser(params, EPSILON, RATE, solver=optax.sgd)
    no_scan = jax.tree.map(lambda x: (), params)
    is_matrix = jax.tree.map(lambda x: MM_PARAM, params)
    threads = jnp.zeros(2 * NUM_QUERIES, jnp.int32), jnp.arange(2 * NUM_QUERIES)

    def step(params, key, tokens):
        key, step_key = jax.random.split(key)
        keys = simple_es_tree_key(params, step_key, no_scan)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        embedded = params["embedding"][inputs] + params["positions"][: inputs.shape[1]]

        def score(thread):
            mm = lambda name, x: EggRoll.do_mm(frozen, noiser, params[name], keys[name], thread, x)
            return -cross_entropy(forward(embedded, mm), targets)

        scores = EggRoll.convert_fitnesses(frozen, noiser, jax.vmap(score)(threads))
        state = dict(noiser)
        _, params = EggRoll.do_updates(frozen, state, params, keys, scores, threads, is_matrix)
        return params, key

    return _of_two(step, params, jax.random.key(0), tokens, eggroll)


def mezo(width: int, tokens: np.ndarray, folder: Path) -> tuple[Step, Callable[[], Any]]:
    """The functions of its trainer as they are, around a model of the same widths; and the floor:
    two evaluations of that.
    """
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    names = ("zo_perturb_parameters", "zo_step", "zo_update")
    tree = ast.parse((folder / "large_models" / "trainer.py").read_text())
    found = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name in names]
    scope: dict[str, Any] = {"torch": torch, "np": np}
    exec(compile(ast.Module(found, []), "trainer.py", "exec"), scope)
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=NUM_LAYERS,
        n_head=NUM_HEADS,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.tensor(tokens[:, :-1], dtype=torch.long)

    def evaluate(model, ids):
        with torch.inference_mode():
            return model(input_ids=ids, labels=ids).loss

    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(zo_eps=EPSILON, weight_decay=0, gradient_accumulation_steps=1),
        lr_scheduler=types.SimpleNamespace(step=lambda: None),
        _get_learning_rate=lambda: RATE,
        zo_forward=evaluate,
    )
    for name in names:
        setattr(trainer, name, types.MethodType(scope[name], trainer))

    def run():
        trainer.zo_step(model, ids)
        trainer.zo_update(model)

    return Step(run, None, mezo), lambda: [evaluate(model, ids) for _ in range(2)]


def _of_two(
    step: Callable[..., Any], first: Any, second: Any, tokens: jax.Array, source: Callable[..., Any]
) -> Step:
    """A step of two values that it changes, which are donated."""
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(first, second, tokens).compile()
    kept = [jax.tree.map(jnp.array, (first, second))]

    def run():
        kept[0] = compiled(*kept[0], tokens)
        return kept[0]

    return Step(run, compiled, source)


def gigabytes(compiled: Any) -> float:
    memory = compiled.memory_analysis()
    parts = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return (parts + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e9


def num_lines(function: Callable[..., Any]) -> int:
    """Of a function without its signature, docstring, imports and comments."""
    tree = ast.parse(inspect.getsource(function)).body[0]
    assert isinstance(tree, ast.FunctionDef)
    body = [x for x in tree.body if not isinstance(x, ast.Import | ast.ImportFrom)]
    is_doc = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return sum(len(ast.unparse(x).splitlines()) for x in body[is_doc:-1])


def time_in_turn(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each in each round, after one that is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(found[1:]) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=256, help="of the model, of 8 layers")
    parser.add_argument("--batch", type=int, default=2, help="sequences of 128 tokens")
    parser.add_argument("--eggroll", type=Path, help="a checkout of ESHyperscale/HyperscaleES")
    parser.add_argument("--mezo", type=Path, help="a checkout of princeton-nlp/MeZO")
    args = parser.parse_args()
    params = init(jax.random.key(0), args.width)
    shape = args.batch, CONTEXT + 1
    tokens = jax.random.randint(jax.random.key(1), shape, 0, VOCAB_SIZE)
    plain = jax.jit(loss_fn).lower(params, tokens).compile()
    evaluations = jax.jit(
        lambda params, tokens: lax.map(
            # The condition is never true, which XLA cannot know: it would evaluate once.
            lambda i: loss_fn(params, jnp.where(i < 0, 0, tokens)),
            jnp.arange(2 * NUM_QUERIES),
        )
    )
    floor = evaluations.lower(params, tokens).compile()
    options = dict(num_queries=NUM_QUERIES, epsilon=EPSILON)
    low_rank = dict(perturbation="low_rank", **options)
    steps = {
        "zo_jax, signs": ours(params, tokens, **options),
        "zo_jax, normals": ours(params, tokens, perturbation="gaussian", **options),
        "zo_jax, low rank": ours(params, tokens, **low_rank),
        "plain JAX, by hand": plain_jax(params, tokens),
        "optax.perturbations": optax_perturbations(params, tokens),
    }
    absent = []
    if importlib.util.find_spec("evosax"):
        for name in ("Open_ES", "Sep_CMA_ES"):
            steps[f"evosax {name}"] = evosax_step(params, tokens, name)
    else:
        absent.append("evosax (pip install evosax)")
    if args.eggroll:
        steps["EGGROLL's noiser"] = eggroll(params, tokens, args.eggroll)
    else:
        absent.append("EGGROLL (--eggroll)")
    runs = {"floor": lambda: floor(params, tokens)}
    runs |= {name: step.run for name, step in steps.items()}
    floors = dict.fromkeys(steps, "floor")
    if args.mezo:
        name = "MeZO, PyTorch"
        steps[name], runs["floor of MeZO"] = mezo(args.width, np.asarray(tokens), args.mezo)
        runs[name], floors[name] = steps[name].run, "floor of MeZO"
    else:
        absent.append("MeZO (--mezo)")
    seconds = time_in_turn(runs, args.rounds)
    num_params = sum(x.size for x in jax.tree.leaves(params))
    print(
        f"{num_params / 1e6:.1f} M parameters, {args.batch} x {CONTEXT} tokens, {args.rounds} "
        f"rounds; the floor takes {np.median(seconds['floor']):.2f} s\n\n"
        "| step | time over its floor | memory over an evaluation's | lines |\n|---|---|---|---|"
    )
    for name, step in steps.items():
        ratio = np.median(seconds[name] / seconds[floors[name]])
        memory = step.program and f"{gigabytes(step.program) / gigabytes(plain):.2f}"
        print(f"| {name} | {ratio:.2f} | {memory or ''} | {num_lines(step.source)} |")
    if absent:
        print(f"\nabsent: {', '.join(absent)}")


if __name__ == "__main__":
    main()
