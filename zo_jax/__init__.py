"""Training with forward passes only: zeroth-order gradient estimates for JAX."""

from zo_jax.directions import Perturbation
from zo_jax.estimators import Estimate, estimate_gradient, mean_weights, project
from zo_jax.instruct import guided, instruct_directions
from zo_jax.lazy import lazily, record_formed
from zo_jax.optimizers import MudamwState, mudamw
from zo_jax.perturbations import (
    apply_directions,
    gaussian,
    low_rank,
    rademacher,
    sphere,
)
from zo_jax.transforms import ZerothOrderState, fill_frozen, zeroth_order

__version__ = "0.1.0"

__all__ = [
    "Estimate",
    "MudamwState",
    "Perturbation",
    "ZerothOrderState",
    "apply_directions",
    "estimate_gradient",
    "fill_frozen",
    "gaussian",
    "guided",
    "instruct_directions",
    "lazily",
    "low_rank",
    "mean_weights",
    "mudamw",
    "project",
    "rademacher",
    "record_formed",
    "sphere",
    "zeroth_order",
]
