"""One step of training, in each mode: `project`, all the forward passes, then `update`, all the
optimisation.

Axes: B blocks of a batch, T tokens of a block, q queries.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zo_jax.anchor import distance
from zo_jax.estimators import Estimator
from zo_jax.layout import Layout
from zo_jax.train import feedback, guided_steps
from zo_jax.train.activation_cache import ActivationCache
from zo_jax.train.choices import (
    base_key,
    kept_directions,
    make_estimator,
    make_rules,
    own_method,
    scope_of,
    step_of,
    unrecorded_method,
)
from zo_jax.train.config import FEEDBACK_MODES, KEPT, QUERY_MODES, Config, keeps_ledger
from zo_jax.train.losses import next_token_loss, next_token_losses
from zo_jax.train.optimizers import make_schedule
from zo_jax.train.run_state import RunState, StepMetrics, StepRecord
from zo_jax.trees import Subset
from zo_jax.update import TrainState, Update, UpdateMetrics

# (parameters, batch) -> loss, float32 scalar.
Loss = Callable[[Any, Any], jax.Array]


def make_loss(
    model: Any, scope: Subset, loss_fn: Loss | None = None
) -> Callable[[Any], Callable[..., jax.Array]]:
    """(parameters) -> loss of (trained parameters, batch), a pytree: the frozen ones are neither
    perturbed nor copied, and `shard_map` is handed them.

    Args:
      model: what is trained.
      scope: the part of it.
      loss_fn: of (parameters, batch); None for the next token of tokens [B, T]. Of an
        `ActivationCache` a batch is what its `of` returns.
    """
    if isinstance(loss_fn, ActivationCache):
        return lambda params: jax.tree_util.Partial(loss_fn.above, params)
    loss_fn = loss_fn or functools.partial(next_token_loss, model)
    whole = lambda params, trained, batch: loss_fn(scope.merge(params, trained), batch)
    return lambda params: jax.tree_util.Partial(whole, params)


def make_project(
    config: Config, model: Any, layout: Layout | None = None, loss_fn: Loss | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted forward passes of a step: (params, key, batch) -> (loss, projections [q]), or the
    numbers of a method. What the state has as `family` is a fourth argument, and the step from 0,
    which methods and directions with kept factors read, a fifth.

    The leaves of a batch are [B, ...], or [q, B, ...] with `zo.batch_per_query`. A query whose
    loss is not finite has the projection nan. `loss_fn` is as in `make_loss`.
    """
    scope = scope_of(config, model)
    loss = make_loss(model, scope, loss_fn)
    estimator, method = make_estimator(config, layout, model), own_method(config, layout)

    @jax.jit
    def project(
        params: Any, key: jax.Array, batch: Any, family: Any = None, step: Any = 0
    ) -> tuple[jax.Array, ...]:
        trained = scope.select(params)
        if method is not None:
            return method.project(loss(params), trained, family, step_of(config, step), batch)
        if config.zo.perturbation in KEPT:
            family = kept_directions(config, trained, step)
        return _along(estimator, family).project(loss(params), trained, key, batch)

    return project


def make_update(
    config: Config, model: Any, layout: Layout | None = None
) -> Callable[..., tuple[RunState, StepMetrics]]:
    """The jitted optimisation of a step without backprop: (state, key, loss, projections [q], or
    the numbers of a method) -> (state, metrics).

    The state is donated. Replay calls the same function.
    """
    rules = make_rules(config, model, layout)
    tell = _make_tell(config, rules.subset)
    always, method = make_estimator(config).family, own_method(config, layout)

    def update(
        state: RunState, key: jax.Array, loss: jax.Array, projections: jax.Array
    ) -> tuple[RunState, StepMetrics]:
        family = always
        if method is not None:
            trained = rules.subset.select(state.params)
            parts = trained, state.train.family, step_of(config, state.step)
            gradient, memory = method.combine(*parts, projections)
            new, metrics = rules.from_gradient(state.train, key, loss, gradient)
            # A step that changes nothing leaves the memory as it is too.
            taken = new.skipped_in_row == 0
            keep = lambda new, old: jnp.where(taken, new, old)
            memory = jax.tree.map(keep, memory, state.train.family)
            return tell(state, new._replace(family=memory), metrics)
        if config.zo.perturbation in KEPT:
            trained = rules.subset.floating(state.params).select(state.params)
            family = kept_directions(config, trained, state.step)
        new, metrics = tell(
            state, *rules.from_projections(family, state.train, key, loss, projections)
        )
        if state.num_flat is None:
            return new, metrics
        has_signal = jnp.any(jnp.isfinite(projections) & (projections != 0))
        num_flat = state.num_flat + 1 - has_signal.astype(jnp.int32)
        return new._replace(num_flat=num_flat), metrics._replace(num_flat=num_flat)

    return jax.jit(update, donate_argnums=0)


def make_exact_step(
    config: Config, model: Any, layout: Layout | None = None, loss_fn: Loss | None = None
) -> Callable[..., tuple[RunState, StepMetrics]]:
    """The jitted step along directions for a part of the parameters and the gradient of the rest,
    `zo.exact`: (state, key, batch) -> (state, metrics), the state donated.
    """
    rules = make_rules(config, model, layout)
    tell = _make_tell(config, rules.subset)
    loss = make_loss(model, rules.subset, loss_fn)
    estimator = make_estimator(config, layout, model)

    def exact_step(state: RunState, key: jax.Array, batch: Any) -> tuple[RunState, StepMetrics]:
        trained = rules.subset.select(state.params)
        before = state.train
        now = _along(estimator, before.family)
        estimate = now.estimate(loss(state.params), trained, key, batch)
        if before.family is not None:
            before = before._replace(family=now.learn(trained, key, estimate.projections))
        new = rules.from_gradient(before, key, estimate.loss, estimate.gradient)
        return tell(state, *new)

    return jax.jit(exact_step, donate_argnums=0)


def make_method_step(
    config: Config, model: Any, layout: Layout | None = None, loss_fn: Loss | None = None
) -> Callable[..., tuple[RunState, StepMetrics]]:
    """The jitted step of a method that looks at its data in ways that no numbers tell: (state, key,
    batch) -> (state, metrics), the state donated.
    """
    rules = make_rules(config, model, layout)
    tell = _make_tell(config, rules.subset)
    method = unrecorded_method(config, layout, model)
    assert method is not None
    transformation = method.transformation(base_key(config))
    if method.reads_tokens:
        loss_fn = functools.partial(next_token_losses, model)
    loss, estimator = make_loss(model, rules.subset, loss_fn), make_estimator(config, layout)

    def along(state: RunState, updates: Any, trained: Any, batch: Any) -> tuple[Any, Any]:
        return transformation.update(
            updates, state.train.family, trained, value_fn=loss(state.params), batch=(batch,)
        )

    def first(state: RunState, key: jax.Array, batch: Any) -> tuple[RunState, StepMetrics]:
        trained = rules.subset.select(state.params)
        gradient, memory = along(state, None, trained, batch)
        new, metrics = rules.from_gradient(state.train, key, memory.loss, gradient)
        return tell(state, new._replace(family=memory), metrics)

    def last(state: RunState, key: jax.Array, batch: Any) -> tuple[RunState, StepMetrics]:
        trained = rules.subset.select(state.params)
        estimate = estimator.estimate(loss(state.params), trained, key, batch)
        new, metrics = rules.from_gradient(state.train, key, estimate.loss, estimate.gradient)
        moved = rules.subset.select(new.params)
        updates, memory = along(state, jax.tree.map(jnp.zeros_like, moved), moved, batch)
        params = rules.subset.merge(new.params, optax.apply_updates(moved, updates))
        return tell(state, new._replace(params=params, family=memory), metrics)

    return jax.jit(last if method.is_last else first, donate_argnums=0)


def make_unrecorded_step(
    config: Config, model: Any, layout: Layout | None = None, loss_fn: Loss | None = None
) -> Callable[..., tuple[RunState, StepMetrics]]:
    """The step of a run of mode zo without a ledger, `make_exact_step` or `make_method_step`."""
    make = make_method_step if config.zo.exact == "none" else make_exact_step
    return make(config, model, layout, loss_fn)


def make_fo_step(
    config: Config, model: Any, layout: Layout | None = None, loss_fn: Loss | None = None
) -> Callable[..., tuple[RunState, StepMetrics]]:
    """The jitted backprop step: (state, batch) -> (state, metrics), the state donated."""
    rules = make_rules(config, model, layout, is_gradient=True)
    tell = _make_tell(config, rules.subset)
    loss_and_grad = _make_loss_and_grad(config, make_loss(model, rules.subset, loss_fn), rules)

    def fo_step(state: RunState, batch: Any) -> tuple[RunState, StepMetrics]:
        loss, gradient = loss_and_grad(state.params, batch)
        key = jax.random.fold_in(base_key(config), state.step)
        return tell(state, *rules.from_gradient(state.train, key, loss, gradient))

    return jax.jit(fo_step, donate_argnums=0)


def make_feedback_step(
    config: Config, model: Any, layout: Layout | None = None
) -> Callable[..., tuple[RunState, StepMetrics]]:
    """The jitted step of modes feedback and block_local of the GPT from scratch: (state, tokens [B,
    T]) -> (state, metrics), the state donated.
    """
    rules = make_rules(config, model, layout)
    tell = _make_tell(config, rules.subset)
    loss_and_gradient = feedback.make_gradient(config, model)

    def feedback_step(state: RunState, tokens_BT: jax.Array) -> tuple[RunState, StepMetrics]:
        key = jax.random.fold_in(base_key(config), state.step)
        loss, gradient = loss_and_gradient(state.params, key, tokens_BT)
        trained = rules.subset.select(gradient)
        return tell(state, *rules.from_gradient(state.train, key, loss, trained))

    return jax.jit(feedback_step, donate_argnums=0)


def make_guided_step(
    config: Config, model: Any, layout: Layout | None = None, loss_fn: Loss | None = None
) -> Callable[..., tuple[RunState, StepMetrics]]:
    """The jitted step of mode instruct with a backprop gradient: (state, key, batch, fo_batch) ->
    (state, metrics).
    """
    rules = make_rules(config, model, layout, is_gradient=True)
    tell = _make_tell(config, rules.subset)
    loss = make_loss(model, rules.subset, loss_fn)
    loss_and_grad = _make_loss_and_grad(config, loss, rules)
    estimator = make_estimator(config, layout)

    def guided_step(
        state: RunState, key: jax.Array, batch: Any, fo_batch: Any
    ) -> tuple[RunState, StepMetrics]:
        trained = rules.subset.select(state.params)
        _, backprop = loss_and_grad(state.params, fo_batch)

        def project_part(part: guided_steps.Part) -> tuple[jax.Array, jax.Array]:
            of_part = lambda x: x[part.first : part.end]
            own = jax.tree.map(of_part, batch) if config.zo.batch_per_query else batch
            some = dataclasses.replace(
                estimator, perturbation=part.family, num_queries=part.end - part.first
            )
            return some.project(loss(state.params), trained, part.key, own)

        mean_loss, gradient, cosine, noise_scale = guided_steps.estimate_guided(
            config.instruct,
            backprop,
            state.history,
            estimator.family,
            key,
            estimator.num_queries,
            project_part,
        )
        new = rules.from_gradient(state.train, key, mean_loss, gradient)
        return tell(state, *new, cosine, noise_scale)

    return jax.jit(guided_step, donate_argnums=0)


def make_train_step(
    config: Config, model: Any, layout: Layout | None = None, loss_fn: Loss | None = None
) -> Callable[..., tuple[RunState, StepMetrics, StepRecord | None]]:
    """The step of the configured mode: (state, step from 0, batch, fo_batch) -> (state, metrics,
    record).

    Each of the two batches is None where the step does not read it; see `batches.reads`. A step
    along a gradient has no record. `loss_fn` is as in `make_loss`.
    """
    step_key = make_step_key(config, layout)
    words = jax.jit(jax.random.key_data)
    parts = config, model, layout
    # A pretrained model hands errors to its layers by itself: `Pretrained.hidden`.
    is_pretrained = bool(config.model.path)
    if config.mode in ("fo", "calibrate") or (config.mode in FEEDBACK_MODES and is_pretrained):
        fo_step = make_fo_step(*parts, loss_fn)
    elif config.mode in FEEDBACK_MODES:
        fo_step = make_feedback_step(*parts)
    if config.mode == "instruct":
        guided_step = make_guided_step(*parts, loss_fn)
    if config.mode == "zo" and not keeps_ledger(config):
        one_step = make_unrecorded_step(*parts, loss_fn)
        return lambda state, step, batch, _: (*one_step(state, step_key(step), batch), None)
    if config.mode in QUERY_MODES:
        project = make_project(*parts, loss_fn)
        update = make_update(*parts)

    def train_step(state, step, batch, fo_batch):
        if fo_batch is None:
            k = step_key(step)
            loss, projections = project(state.params, k, batch, state.train.family, state.step)
            return *update(state, k, loss, projections), StepRecord(words(k), loss, projections)
        if batch is None:
            return *fo_step(state, fo_batch), None
        return *guided_step(state, step_key(step), batch, fo_batch), None

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


def _along(estimator: Estimator, family: Any) -> Estimator:
    """The estimator with the family of a state, if there is one."""
    return estimator if family is None else dataclasses.replace(estimator, perturbation=family)


def _make_tell(config: Config, scope: Subset) -> Callable[..., tuple[RunState, StepMetrics]]:
    """(state before, updated state and metrics, of guided directions cosine and noise) -> the state
    after, and what is told.
    """
    schedule = make_schedule(config.optimizer, config.train.num_steps)

    def tell(
        before: RunState,
        train: TrainState,
        metrics: UpdateMetrics,
        cosine_target: Any = jnp.nan,
        noise_scale: Any = jnp.nan,
    ) -> tuple[RunState, StepMetrics]:
        history = before.history and guided_steps.remember(before.history, metrics.loss)
        drift = jnp.float32(jnp.nan)
        if config.optimizer.anchor:
            anchor = train.opt_state[-1]
            drift = distance(anchor, scope.floating(train.params).select(train.params))
        return RunState(train, history), StepMetrics(
            loss=metrics.loss,
            grad_norm=metrics.grad_norm,
            learning_rate=schedule(metrics.num_updates),
            num_skipped=metrics.num_skipped,
            skipped_in_row=metrics.skipped_in_row,
            cosine_target=jnp.float32(cosine_target),
            noise_scale=jnp.float32(noise_scale),
            drift=drift,
            num_flat=np.nan,
            best_score=np.nan,
        )

    return tell


def _make_loss_and_grad(config: Config, loss: Any, rules: Update) -> Callable[..., Any]:
    """(params, batch) -> (loss, gradient of the trained parameters), in micro-batches, summed in
    float32; `loss` is that of `make_loss`.
    """
    num_parts = config.fo.gradient_accumulation_steps

    def loss_and_grad(params, batch):
        trained = rules.subset.select(params)
        one_part = jax.value_and_grad(loss(params))
        if num_parts == 1:  # of a batch from an `ActivationCache` not all leaves can be cut
            total = one_part(trained, batch)
            return jax.tree.map(lambda x: x.astype(jnp.float32), total)

        def add_part(total, part):
            one = one_part(trained, part)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, one), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
        parts = jax.tree.map(lambda x: x.reshape(num_parts, -1, *x.shape[1:]), batch)
        total, _ = jax.lax.scan(add_part, (jnp.zeros((), jnp.float32), zeros), parts)
        return jax.tree.map(lambda x: x / num_parts, total)

    return loss_and_grad
