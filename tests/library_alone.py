"""Run by .ci/run where jax, numpy and optax are all that is installed: the README's example of an
optax chain.
"""

import importlib.util

import jax
import jax.numpy as jnp
import optax

import zo_jax

assert not any(importlib.util.find_spec(name) for name in ("flax", "orbax", "datasets", "tqdm"))

loss_fn = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
params, batch = {"w": jnp.ones((3, 2))}, (jnp.eye(3),)
tx = optax.chain(zo_jax.zeroth_order(jax.random.key(0), num_queries=8), optax.adam(1e-1))
state = tx.init(params)


@jax.jit
def step(params, state):
    updates, state = tx.update(None, state, params, value_fn=lambda p: loss_fn(p, *batch))
    return optax.apply_updates(params, updates), state


before = loss_fn(params, *batch)
for _ in range(30):
    params, state = step(params, state)
after = loss_fn(params, *batch)
assert after < 0.2 * before
print(f"the library alone: loss {before:.3f} to {after:.3f}")
