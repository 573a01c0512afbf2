"""Rotary positions: a query or key at position t is turned by t times the frequencies of its
coordinates' pairs.

Axes: B batch, T positions, H heads, D width of a head.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """How fast heads turn.

    Attributes:
      theta: the base θ; pair j of D / 2 turns by θ^(−2j/D) radians a position.
      kind: "default"; "linear", all frequencies over `factor`; "llama3", the slow ones alone.
      factor: how many times longer the context is made.
      low_factor: of llama3; a wave longer than original_context / low_factor is slowed by `factor`.
      high_factor: of llama3; a wave shorter than original_context / high_factor is left alone.
      original_context: of llama3, positions the model was first trained with.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"the rotary positions must be of type {', '.join(KINDS)}; got {self.kind!r}"
            )


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians a position of each pair of coordinates, float32 [D / 2].

    θ^(−2j/D), slowed as `rope.kind` says (Su et al., "RoFormer", 2021; Llama 3.1's interpolation
    between f and f / factor).

    >>> frequencies(Rope(theta=100.0), 4).round(3).tolist()
    [1.0, 0.10000000149011612]
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1) / np.float32(rope.theta) ** exponents
    if rope.kind == "linear":
        return frequency / np.float32(rope.factor)
    if rope.kind == "llama3":
        waves = rope.original_context * frequency / (2 * math.pi)
        fast = np.clip((waves - rope.low_factor) / (rope.high_factor - rope.low_factor), 0, 1)
        frequency = (1 - fast) * frequency / rope.factor + fast * frequency
    return frequency.astype(np.float32)


def turns(rope: Rope, head_dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles at the positions, float32 [B, T, 1, D / 2] each."""
    frequency = jnp.asarray(frequencies(rope, head_dim))
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def turn(x_BTHD: jax.Array, cos: jax.Array, sin: jax.Array) -> Any:
    """The heads turned; coordinate j pairs with j + D / 2, as in Hugging Face's weights."""
    a, b = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHD.dtype)
