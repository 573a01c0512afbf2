"""Training with forward passes only: zeroth-order gradient estimates for JAX."""

from importlib import metadata as _metadata

from zo_jax import credit, methods
from zo_jax.activation_feedback import ActivationFeedback
from zo_jax.activations import (
    ActivationEstimate,
    ActivationState,
    activation_feedback,
    activation_gradient,
    activation_zeroth_order,
    mean_activation_gradient,
)
from zo_jax.anchor import AnchorState, anchor
from zo_jax.estimators import (
    Estimate,
    Estimator,
    estimate_gradient,
    mean_weights,
    project,
)
from zo_jax.evolution import Evolution, EvolutionState, Members, evolution, shape_scores
from zo_jax.families import apply_directions, by_name, gaussian, low_rank, rademacher, sphere
from zo_jax.family import Family
from zo_jax.grouped import grouped
from zo_jax.guided import guided, instruct_directions
from zo_jax.interpreter import record_formed
from zo_jax.layout import Layout
from zo_jax.local import attention_by_draws, by_differences, residual_feedback
from zo_jax.mudamw import MudamwState, mudamw
from zo_jax.perturbed import Dense, LowRank, Perturbed
from zo_jax.probe import Probe, probe
from zo_jax.programs import lazily
from zo_jax.rules import register_rule
from zo_jax.scaled import scaled
from zo_jax.transforms import ZerothOrderState, fill_frozen, zeroth_order
from zo_jax.update import TrainState, Update, UpdateMetrics, make_update

try:  # of the installed package, from the tags of git
    __version__ = _metadata.version("zo_jax")
except _metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ActivationEstimate",
    "ActivationFeedback",
    "ActivationState",
    "AnchorState",
    "Dense",
    "Estimate",
    "Estimator",
    "Evolution",
    "EvolutionState",
    "Family",
    "Layout",
    "LowRank",
    "Members",
    "MudamwState",
    "Perturbed",
    "Probe",
    "TrainState",
    "Update",
    "UpdateMetrics",
    "ZerothOrderState",
    "activation_feedback",
    "activation_gradient",
    "activation_zeroth_order",
    "anchor",
    "apply_directions",
    "attention_by_draws",
    "by_differences",
    "by_name",
    "credit",
    "estimate_gradient",
    "evolution",
    "fill_frozen",
    "gaussian",
    "grouped",
    "guided",
    "instruct_directions",
    "lazily",
    "low_rank",
    "make_update",
    "mean_activation_gradient",
    "mean_weights",
    "methods",
    "mudamw",
    "probe",
    "project",
    "rademacher",
    "record_formed",
    "register_rule",
    "residual_feedback",
    "scaled",
    "shape_scores",
    "sphere",
    "zeroth_order",
]
