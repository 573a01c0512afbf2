"""One step of training, in each mode: `project`, all the forward passes, then `update`, all the optimisation.

Axes: B blocks of a batch, T tokens of a block, q queries.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zo_jax import estimators, instruct, perturbations
from zo_jax.config import Config, InstructConfig
from zo_jax.losses import next_token_loss
from zo_jax.model import GPT, init_params
from zo_jax.optimizers import make_optimizer, make_schedule
from zo_jax.scopes import Scope, make_scope


class TrainState(NamedTuple):
    """All that a run changes. Keys and batches are functions of the seed and the step.

    Attributes:
      step: int32, steps taken.
      params: the model's parameters.
      opt_state: optax's state, of the parameters that are trained.
      num_skipped: int32, those of the steps that changed nothing, for want of a finite loss.
      history: of the losses.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    num_skipped: jax.Array
    history: instruct.LossHistory


class StepMetrics(NamedTuple):
    """Of one step: float32 scalars, and the running count of skipped steps; nan where a step has no such thing."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    num_skipped: jax.Array
    cosine_target: jax.Array
    noise_scale: jax.Array


def make_perturbation(config: Config) -> perturbations.Perturbation:
    """The family of directions that the configuration names."""
    if config.zo.perturbation == "low_rank":
        return perturbations.low_rank(config.zo.rank)
    return getattr(perturbations, config.zo.perturbation)()


def base_key(config: Config) -> jax.Array:
    """The run's key: threefry whatever JAX's default is, since its noise is the same under vmap."""
    return jax.random.key(config.seed, impl="threefry2x32")


def scope_of(config: Config, model: GPT) -> Scope:
    """The parameters that a run trains."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), base_key(config))
    return make_scope(config.scope, shapes)


def count_trained(config: Config, model: GPT) -> int:
    """The number of parameters that a run trains."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), base_key(config))
    trained = jax.eval_shape(scope_of(config, model).select, shapes)
    return sum(leaf.size for leaf in jax.tree.leaves(trained))


def init_state(config: Config, model: GPT) -> TrainState:
    """Fresh parameters and optimiser state, from the seed alone."""
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    scope = scope_of(config, model)

    @jax.jit
    def init(key):
        params = init_params(model, key)
        zero = jnp.zeros((), jnp.int32)
        opt_state = optimizer.init(scope.select(params))
        return TrainState(zero, params, opt_state, jnp.zeros_like(zero), instruct.new_history())

    return init(jax.random.fold_in(base_key(config), 2**31))


def make_loss(model: GPT, scope: Scope) -> Callable[[Any], Callable[..., jax.Array]]:
    """(parameters) -> loss of (trained parameters, tokens [B, T]): the frozen ones are neither perturbed nor copied."""
    return lambda params: (
        lambda trained, tokens_BT: next_token_loss(model, scope.merge(params, trained), tokens_BT)
    )


def make_project(config: Config, model: GPT) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted forward passes of a step: (params, key, tokens) -> (loss, projections [q]).

    Tokens are int32 [B, T], or [q, B, T] with `zo.batch_per_query`. A query whose loss is not
    finite has the projection nan.
    """
    scope = scope_of(config, model)
    loss = make_loss(model, scope)

    @jax.jit
    def project(params: Any, key: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _project(
            config, make_perturbation(config), loss(params), scope.select(params), key, tokens
        )

    return project


def make_update(config: Config, model: GPT) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted optimisation of a step: (state, key, loss, projections [q]) -> (state, metrics).

    The gradient is summed again from the key; the data has no part in it but the projections. The
    state is donated.
    """
    scope = scope_of(config, model)
    perturbation = make_perturbation(config)

    def update(
        state: TrainState, key: jax.Array, loss: jax.Array, projections_q: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        trained = scope.select(state.params)
        gradient = _combine(perturbation, trained, key, projections_q)
        if config.mode == "instruct":
            gradient = _clip(config.instruct, gradient)
        usable = jnp.any(jnp.isfinite(projections_q))
        return _descend(config, scope, state, loss, gradient, usable)

    return jax.jit(update, donate_argnums=0)


def make_fo_step(config: Config, model: GPT) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted backprop step: (state, tokens [B, T]) -> (state, metrics), the state donated."""
    scope = scope_of(config, model)
    loss_and_grad = _make_loss_and_grad(config, model, scope)

    def fo_step(state: TrainState, tokens_BT: jax.Array) -> tuple[TrainState, StepMetrics]:
        loss, gradient = loss_and_grad(state.params, tokens_BT)
        return _descend(config, scope, state, loss, gradient, jnp.isfinite(loss))

    return jax.jit(fo_step, donate_argnums=0)


def make_guided_step(config: Config, model: GPT) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted step of mode instruct with a backprop gradient: (state, key, tokens, fo_tokens [B, T]) -> (state, metrics).

    The first `instruct.num_guided` queries go along directions that the backprop gradient guides, the others along
    random ones. If the gradient is zero all do.
    """
    scope = scope_of(config, model)
    loss = make_loss(model, scope)
    loss_and_grad = _make_loss_and_grad(config, model, scope)
    settings, q = config.instruct, config.zo.num_queries
    num_guided = min(settings.num_guided or q, q)
    random = make_perturbation(config)

    def guided_step(
        state: TrainState, key: jax.Array, tokens: jax.Array, fo_tokens_BT: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        trained = scope.select(state.params)
        _, backprop = loss_and_grad(state.params, fo_tokens_BT)
        cosine, noise_scale = instruct.adaptive_schedule(settings, state.history.lowest)

        def estimate(parts):
            """(loss, ĝ, whether a loss was finite) of [(family, key, first query, end)]."""
            losses, projections = zip(
                *(
                    _project(
                        config,
                        family,
                        loss(state.params),
                        trained,
                        part_key,
                        tokens[first:end] if config.zo.batch_per_query else tokens,
                        end - first,
                    )
                    for family, part_key, first, end in parts
                ),
                strict=True,
            )
            finite = [jnp.sum(jnp.isfinite(c)) for c in projections]
            total = jnp.maximum(sum(finite), 1)
            sums = [
                _combine(family, trained, part_key, c, total)
                for (family, part_key, _, _), c in zip(parts, projections, strict=True)
            ]
            mean_loss = (
                sum(jnp.where(n > 0, x * n, 0) for x, n in zip(losses, finite, strict=True)) / total
            )
            return mean_loss, jax.tree.map(lambda *x: sum(x), *sums), sum(finite) > 0

        def along_guided():
            family = instruct.guided(backprop, cosine, noise_scale, settings.method)
            parts = [(family, jax.random.fold_in(key, 0), 0, num_guided)]
            if num_guided < q:
                parts.append((random, jax.random.fold_in(key, 1), num_guided, q))
            return estimate(parts)

        norm = jnp.sqrt(instruct.tree_dot(backprop, backprop))
        mean_loss, gradient, usable = jax.lax.cond(
            norm > instruct.MIN_NORM, along_guided, lambda: estimate([(random, key, 0, q)])
        )
        b = settings.blend_ratio
        gradient = jax.tree.map(
            lambda zo, fo: ((1 - b) * zo + b * fo).astype(zo.dtype),
            _clip(settings, gradient),
            backprop,
        )
        mean_loss = jnp.where(usable, mean_loss, jnp.nan)
        state, metrics = _descend(config, scope, state, mean_loss, gradient, usable)
        return state, metrics._replace(cosine_target=cosine, noise_scale=noise_scale)

    return jax.jit(guided_step, donate_argnums=0)


def make_train_step(config: Config, model: GPT) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The step of the configured mode: (state, step from 0, tokens, fo_tokens) -> (state, metrics).

    Each of the two batches is None where the step does not read it; see `reads`.
    """
    key, step_key = base_key(config), jax.jit(jax.random.fold_in)
    if config.mode in ("fo", "calibrate"):
        fo_step = make_fo_step(config, model)
    if config.mode == "instruct":
        guided_step = make_guided_step(config, model)
    if config.mode != "fo":
        project, update = make_project(config, model), make_update(config, model)

    def train_step(state, step, tokens, fo_tokens_BT):
        if fo_tokens_BT is None:
            k = step_key(key, step)
            return update(state, k, *project(state.params, k, tokens))
        if tokens is None:
            return fo_step(state, fo_tokens_BT)
        return guided_step(state, step_key(key, step), tokens, fo_tokens_BT)

    return train_step


def reads(config: Config, step: int) -> tuple[bool, bool]:
    """Whether a step (from 0) reads a batch for its queries, and whether it reads one for backprop."""
    interval = {"fo": 1, "zo": 0}.get(config.mode, config.fo.bp_interval)
    backprop = bool(interval) and (step + 1) % interval == 0
    return config.mode in ("zo", "instruct") or not backprop, backprop


def _project(config, perturbation, loss, trained, key, tokens, num_queries=None):
    num_queries = num_queries or config.zo.num_queries
    return estimators.project(
        loss,
        trained,
        key,
        tokens,
        num_queries=num_queries,
        epsilon=config.zo.epsilon,
        perturbation=perturbation,
        difference=config.zo.difference,
        parallel_batch_size=min(config.zo.parallel_batch_size, num_queries),
        batch_per_query=config.zo.batch_per_query,
    )


def _combine(perturbation, trained, key, projections, count=None):
    """Σ cᵢ zᵢ over the number of finite projections, or over `count`."""
    keys = jax.random.split(key, len(projections))
    if count is None:
        weights = estimators.mean_weights(projections)
    else:
        weights = jnp.where(jnp.isfinite(projections), projections, 0) / count
    return perturbation.combine(trained, keys, weights)


def _clip(config: InstructConfig, gradient: Any) -> Any:
    """The estimate with its global norm brought down to `grad_clip_norm`, if that is set."""
    if not config.grad_clip_norm:
        return gradient
    norm = jnp.sqrt(instruct.tree_dot(gradient, gradient))
    factor = jnp.minimum(1.0, config.grad_clip_norm / jnp.maximum(norm, instruct.MIN_NORM))
    return jax.tree.map(lambda g: (factor * g).astype(g.dtype), gradient)


def _make_loss_and_grad(config: Config, model: GPT, scope: Scope) -> Callable[..., Any]:
    """(params, tokens [B, T]) -> (loss, gradient of the trained parameters), in micro-batches, summed in float32."""
    num_parts = config.fo.gradient_accumulation_steps
    loss = make_loss(model, scope)

    def loss_and_grad(params, tokens_BT):
        trained = scope.select(params)
        one_part = jax.value_and_grad(loss(params))
        B, T = tokens_BT.shape

        def add_part(total, part_BT):
            one = one_part(trained, part_BT)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, one), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
        parts = tokens_BT.reshape(num_parts, B // num_parts, T)
        total, _ = jax.lax.scan(add_part, (jnp.zeros((), jnp.float32), zeros), parts)
        return jax.tree.map(lambda x: x / num_parts, total)

    return loss_and_grad


def _descend(
    config: Config,
    scope: Scope,
    state: TrainState,
    loss: jax.Array,
    gradient: Any,
    usable: jax.Array,
) -> tuple[TrainState, StepMetrics]:
    """One optimiser step, or, if the gradient is not usable, only the count of it."""
    grad_norm = optax.global_norm(jax.tree.map(lambda x: x.astype(jnp.float32), gradient))
    usable &= jnp.isfinite(grad_norm)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    old = scope.select(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, old)
    trained = optax.apply_updates(old, updates)
    # Adam's momentum would move the parameters with a zero gradient too.
    trained, opt_state = jax.tree.map(
        lambda new, old: jnp.where(usable, new, old).astype(old.dtype),
        (trained, opt_state),
        (old, state.opt_state),
    )
    # Skipped steps do not count for optax, so its schedule is behind by as many.
    schedule = make_schedule(config.optimizer, config.train.num_steps)
    learning_rate = schedule(state.step - state.num_skipped).astype(jnp.float32)
    num_skipped = state.num_skipped + (~usable).astype(jnp.int32)
    history = instruct.remember(state.history, loss)
    params = scope.merge(state.params, trained)
    state = TrainState(state.step + 1, params, opt_state, num_skipped, history)
    nan = jnp.float32(jnp.nan)
    return state, StepMetrics(loss, grad_norm, learning_rate, num_skipped, nan, nan)
