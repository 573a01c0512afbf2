"""One step of training, in each mode: `project`, all the forward passes, then `update`, all the optimisation.

Axes: B blocks of a batch, T tokens of a block, q queries.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zo_jax import estimators, instruct, perturbations, updates
from zo_jax.config import Config
from zo_jax.directions import Perturbation
from zo_jax.losses import next_token_loss
from zo_jax.model import GPT, init_params
from zo_jax.optimizers import make_optimizer
from zo_jax.scopes import Scope, make_scope
from zo_jax.sharding import Layout
from zo_jax.updates import StepMetrics, TrainState, new_state


class StepRecord(NamedTuple):
    """What `update` needs to take a step again.

    Attributes:
      key: uint32 [2], the words of the step's key.
      loss: float32.
      projections: float32 [q].
    """

    key: jax.Array
    loss: jax.Array
    projections: jax.Array


def make_perturbation(config: Config) -> Perturbation:
    """The family of directions that the configuration names."""
    return perturbations.by_name(config.zo.perturbation, config.zo.rank)


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


def init_state(config: Config, model: GPT, layout: Layout | None = None) -> TrainState:
    """Fresh parameters and optimiser state, from the seed alone, each array where it belongs."""
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    scope = scope_of(config, model)
    key = jax.random.fold_in(base_key(config), 2**31)
    if layout is None:
        return jax.jit(lambda key: new_state(init_params(model, key), optimizer, scope))(key)
    init = lambda: new_state(init_params(model, key), optimizer, scope)
    return jax.jit(init, out_shardings=layout.shardings(jax.eval_shape(init)))()


def make_loss(model: GPT, scope: Scope) -> Callable[[Any], Callable[..., jax.Array]]:
    """(parameters) -> loss of (trained parameters, tokens [B, T]): the frozen ones are neither perturbed nor copied."""
    return lambda params: (
        lambda trained, tokens_BT: next_token_loss(model, scope.merge(params, trained), tokens_BT)
    )


def make_project(
    config: Config, model: GPT, layout: Layout | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted forward passes of a step: (params, key, tokens) -> (loss, projections [q]).

    Tokens are int32 [B, T], or [q, B, T] with `zo.batch_per_query`. A query whose loss is not
    finite has the projection nan.
    """
    scope = scope_of(config, model)
    loss = make_loss(model, scope)
    perturbation = make_perturbation(config).on(layout)

    @jax.jit
    def project(params: Any, key: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        trained = scope.select(params)
        return _project(config, perturbation, loss(params), trained, key, tokens, layout)

    return project


def make_update(
    config: Config, model: GPT, layout: Layout | None = None
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted optimisation of a step without backprop: `updates.make_update` of the configured parts."""
    return updates.make_update(
        make_optimizer(config.optimizer, config.train.num_steps),
        make_perturbation(config),
        scope=scope_of(config, model),
        clip_norm=config.instruct.grad_clip_norm,
        rounding=config.optimizer.rounding,
        layout=layout,
    )


def make_fo_step(
    config: Config, model: GPT, layout: Layout | None = None
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted backprop step: (state, tokens [B, T]) -> (state, metrics), the state donated."""
    scope = scope_of(config, model)
    finish = _make_finish(config, scope, layout)
    loss_and_grad = _make_loss_and_grad(config, model, scope)

    def fo_step(state: TrainState, tokens_BT: jax.Array) -> tuple[TrainState, StepMetrics]:
        loss, gradient = loss_and_grad(state.params, tokens_BT)
        norm = optax.global_norm(gradient)
        usable = jnp.isfinite(loss) & jnp.isfinite(norm)
        key = jax.random.fold_in(base_key(config), state.step)
        return finish(state, loss, gradient, norm, usable, key)

    return jax.jit(fo_step, donate_argnums=0)


def make_guided_step(
    config: Config, model: GPT, layout: Layout | None = None
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted step of mode instruct with a backprop gradient: (state, key, tokens, fo_tokens [B, T]) -> (state, metrics).

    The first `instruct.num_guided` queries go along directions that the backprop gradient guides, the others along
    random ones. If the gradient is zero all do.
    """
    scope = scope_of(config, model)
    finish = _make_finish(config, scope, layout)
    loss = make_loss(model, scope)
    loss_and_grad = _make_loss_and_grad(config, model, scope)
    settings, q = config.instruct, config.zo.num_queries
    num_guided = min(settings.num_guided or q, q)
    random = make_perturbation(config).on(layout)

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
                        layout,
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
            updates.clip(gradient, settings.grad_clip_norm),
            backprop,
        )
        mean_loss = jnp.where(usable, mean_loss, jnp.nan)
        grad_norm = optax.global_norm(gradient)
        usable &= jnp.isfinite(grad_norm)
        state, metrics = finish(state, mean_loss, gradient, grad_norm, usable, key)
        return state, metrics._replace(cosine_target=cosine, noise_scale=noise_scale)

    return jax.jit(guided_step, donate_argnums=0)


def make_train_step(
    config: Config, model: GPT, layout: Layout | None = None
) -> Callable[..., tuple[TrainState, StepMetrics, StepRecord | None]]:
    """The step of the configured mode: (state, step from 0, tokens, fo_tokens) -> (state, metrics, record).

    Each of the two batches is None where the step does not read it; see `batches.reads`. A step with backprop has no record.
    """
    step_key = make_step_key(config, layout)
    words = jax.jit(jax.random.key_data)
    if config.mode in ("fo", "calibrate"):
        fo_step = make_fo_step(config, model, layout)
    if config.mode == "instruct":
        guided_step = make_guided_step(config, model, layout)
    if config.mode != "fo":
        project = make_project(config, model, layout)
        update = make_update(config, model, layout)

    def train_step(state, step, tokens, fo_tokens_BT):
        if fo_tokens_BT is None:
            k = step_key(step)
            loss, projections = project(state.params, k, tokens)
            return *update(state, k, loss, projections), StepRecord(words(k), loss, projections)
        if tokens is None:
            return *fo_step(state, fo_tokens_BT), None
        return *guided_step(state, step_key(step), tokens, fo_tokens_BT), None

    return train_step


def make_step_key(config: Config, layout: Layout | None) -> Callable[[int], jax.Array]:
    """(step from 0) -> its key, on all devices of the layout."""
    if layout is None:
        key, fold_in = base_key(config), jax.jit(jax.random.fold_in)
        return lambda step: fold_in(key, step)
    everywhere = layout.split(0, None)
    fold_in = jax.jit(
        lambda step: jax.random.fold_in(base_key(config), step), out_shardings=everywhere
    )
    return lambda step: fold_in(np.uint32(step))


def _make_finish(config: Config, scope: Scope, layout: Layout | None) -> Callable[..., Any]:
    """`updates.descend` of the configured parts: (state, loss, gradient, its norm, usable, key) -> (state, metrics)."""
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)

    def finish(state, loss, gradient, norm, usable, key):
        new, metrics = updates.descend(
            optimizer, scope, state, loss, gradient, norm, usable, key, config.optimizer.rounding
        )
        return (new if layout is None else layout.constrain(new)), metrics

    return finish


def _project(config, perturbation, loss, trained, key, tokens, layout, num_queries=None):
    num_queries, chunks = num_queries or config.zo.num_queries, config.zo.batch_chunks
    if chunks > 1:
        *queries, B, T = tokens.shape
        tokens = tokens.reshape(*queries, chunks, B // chunks, T)
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
        batch_in_chunks=chunks > 1,
        mesh=None if layout is None else layout.mesh,
    )


def _combine(perturbation, trained, key, projections, count=None):
    """Σ cᵢ zᵢ over the number of finite projections, or over `count`."""
    keys = jax.random.split(key, len(projections))
    if count is None:
        weights = estimators.mean_weights(projections)
    else:
        weights = jnp.where(jnp.isfinite(projections), projections, 0) / count
    return perturbation.combine(trained, keys, weights)


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
