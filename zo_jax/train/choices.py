"""What a configuration chooses: the estimator and its directions, which parameters are trained,
and how they are updated.
"""

import dataclasses
from typing import Any

import jax
import optax

from zo_jax import families, methods
from zo_jax.estimators import Estimator
from zo_jax.family import Family
from zo_jax.grouped import grouped
from zo_jax.layout import Layout
from zo_jax.methods import Method, Step, weights_of
from zo_jax.tiers import Tiers, unpack
from zo_jax.train.config import KEPT, Config, ConfigError, method_of
from zo_jax.train.named_methods import make_method
from zo_jax.train.optimizers import make_optimizer, make_optimizer_in_turns, scale_part
from zo_jax.train.scopes import make_exact, make_scope
from zo_jax.train.unrecorded import Unrecorded, make_unrecorded
from zo_jax.trees import Subset, path_name
from zo_jax.update import Update


def make_estimator(config: Config, layout: Layout | None = None, model: Any = None) -> Estimator:
    """The estimator that the configuration names; without the model, which is asked for it, what
    is exact is left out.
    """
    zo = config.zo
    # In the place of kept directions, which differ from step to step: see `kept_directions`.
    name = "gaussian" if zo.perturbation in KEPT else zo.perturbation
    family = families.by_name(name, zo.rank)
    if zo.groups != "none":
        family = grouped(rule_of(config), family)
        family = dataclasses.replace(family, tiers=tiers_of(config, model))
    return Estimator(
        num_queries=zo.num_queries,
        epsilon=zo.epsilon,
        perturbation=family.on(layout),
        difference=zo.difference,
        parallel_batch_size=zo.parallel_batch_size,
        batch_per_query=zo.batch_per_query,
        batch_chunks=zo.batch_chunks,
        mesh=None if layout is None else layout.mesh,
        exact=exact_of(config, model) if model else None,
    )


def rule_of(config: Config) -> str:
    """What `zo_jax.grouped` makes groups by, besides tiers; "none" for directions of all."""
    return "layers" if config.zo.groups == "tokens" else config.zo.groups


def tiers_of(config: Config, model: Any) -> Tiers:
    """Those of the tables of tokens that have directions; none without a model.

    Raises:
      ConfigError: no table has directions, or they are of another vocabulary.
    """
    if config.zo.groups != "tokens" or model is None:
        return ()
    shapes = model.shapes()
    directed = jax.eval_shape(scope_of(config, model).floating(shapes).select, shapes)
    if exact := exact_of(config, model):
        directed = jax.eval_shape(exact.rest(directed).select, directed)
    paths = {path_name(path) for path, _ in jax.tree.leaves_with_path(directed)}
    if not paths & set(model.tables):
        raise ConfigError(
            f"zo.groups=tokens needs a table of tokens among what has directions, "
            f"{' or '.join(model.tables)}; widen scope, or set zo.groups=layers"
        )
    rows = unpack(config.zo.tiers)
    if len(rows) != model.vocab_size:
        raise ConfigError(
            f"zo.tiers tells the tiers of {len(rows)} tokens, and the model has "
            f"{model.vocab_size}; leave it empty"
        )
    return tuple((path, rows) for path in sorted(model.tables) if path in paths)


def kept_directions(config: Config, trained: Any, step: Any) -> Family:
    """The directions of a step of LOZO, SubZero or TeZO, whose factors last several steps.

    Args:
      trained: the parameters that are trained, or their shapes.
      step: int32, from 0.
    """
    zo = config.zo
    period = {} if zo.perturbation == "tezo" else dict(period=zo.period)
    kinds = {"lozo": methods.Lozo, "subzero": methods.SubZero, "tezo": methods.Tezo}
    method = kinds[zo.perturbation](rank=zo.rank, **period)
    return method.family(trained, (), step_of(config, step))


def own_method(config: Config, layout: Layout | None = None) -> Method | None:
    """The method of a run, if it has numbers or a memory of its own."""
    return make_method(config, make_estimator(config, layout)) if config.mode == "zo" else None


def unrecorded_method(
    config: Config, layout: Layout | None = None, model: Any = None
) -> Unrecorded | None:
    """The method of a run whose steps no numbers tell, if it has one."""
    if config.mode != "zo":
        return None
    return make_unrecorded(config, make_estimator(config, layout), model)


def num_numbers(config: Config) -> int:
    """The numbers of a step's record: q, unless a method has others."""
    method = own_method(config)
    return method.num_numbers if method else config.zo.num_queries


def step_of(config: Config, count: Any) -> Step:
    """What a method draws a step from; its key is the run's `make_step_key` of the count."""
    return Step(jax.random.key_data(base_key(config)), count)


def exact_of(config: Config, model: Any) -> Subset | None:
    """The part of what a run trains whose gradient is exact beside its directions."""
    return make_exact(config.zo.exact, model, scope_of(config, model))


def base_key(config: Config) -> jax.Array:
    """The run's key: threefry whatever JAX's default is, since its noise is the same under vmap."""
    return jax.random.key(config.seed, impl="threefry2x32")


def scope_of(config: Config, model: Any) -> Subset:
    """The parameters that a run trains."""
    return make_scope(config.scope, model)


def count_trained(config: Config, model: Any) -> int:
    """The number of parameters that a run trains."""
    trained = jax.eval_shape(scope_of(config, model).select, model.shapes())
    return sum(leaf.size for leaf in jax.tree.leaves(trained))


def make_rules(
    config: Config, model: Any, layout: Layout | None = None, is_gradient: bool = False
) -> Update:
    """The optimisation that the configuration names, of steps along estimates or along backprop
    gradients.
    """
    return Update(
        _make_optimizer(config, model, is_gradient),
        subset=scope_of(config, model),
        clip_norm=config.instruct.grad_clip_norm,
        rounding=config.optimizer.rounding,
        layout=layout,
        weights=weights_of(method_of(config) if config.zo.method == "fzoo" else None),
    )


def _make_optimizer(config: Config, model: Any, is_gradient: bool) -> optax.GradientTransformation:
    num_steps, fo, scaled = config.train.num_steps, config.fo, None
    if fo.relative_rate:
        return make_optimizer_in_turns(
            config.optimizer, num_steps, fo.bp_interval, fo.relative_rate, is_gradient
        )
    if config.zo.relative_rate != 1 and (exact := exact_of(config, model)):
        trained = jax.eval_shape(scope_of(config, model).select, model.shapes())
        scaled = scale_part(exact.rest(trained), config.zo.relative_rate)
    return make_optimizer(config.optimizer, num_steps, scaled)
