"""One step of training, in each mode: `project`, all the forward passes, then `update`, all the
optimisation.

Axes: B blocks of a batch, T tokens of a block, q queries.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zo_jax import families
from zo_jax.estimators import Estimator
from zo_jax.layout import Layout
from zo_jax.train import feedback, hybrid
from zo_jax.train.config import QUERY_MODES, Config
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import GPT, init_params
from zo_jax.train.optimizers import make_optimizer, make_schedule
from zo_jax.train.scopes import make_scope
from zo_jax.trees import Subset
from zo_jax.update import TrainState, Update, UpdateMetrics


class RunState(NamedTuple):
    """All that a run changes.

    Attributes:
      train: step, parameters, optimiser state and counts.
      history: of the losses, for the adaptive schedule of mode instruct; elsewhere None.
    """

    train: TrainState
    history: hybrid.LossHistory | None

    @property
    def step(self) -> jax.Array:
        return self.train.step

    @property
    def params(self) -> Any:
        return self.train.params


class StepMetrics(NamedTuple):
    """Scalars of one step, nan where it has no such thing.

    Attributes:
      loss, grad_norm, learning_rate: float32.
      num_skipped, skipped_in_row: int32, as in `TrainState`, after this step.
      cosine_target, noise_scale: float32, of guided directions.
    """

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    num_skipped: jax.Array
    skipped_in_row: jax.Array
    cosine_target: jax.Array
    noise_scale: jax.Array


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


def make_estimator(config: Config, layout: Layout | None = None) -> Estimator:
    """The estimator that the configuration names."""
    zo = config.zo
    return Estimator(
        num_queries=zo.num_queries,
        epsilon=zo.epsilon,
        perturbation=families.by_name(zo.perturbation, zo.rank).on(layout),
        difference=zo.difference,
        parallel_batch_size=zo.parallel_batch_size,
        batch_per_query=zo.batch_per_query,
        batch_chunks=zo.batch_chunks,
        mesh=None if layout is None else layout.mesh,
    )


def base_key(config: Config) -> jax.Array:
    """The run's key: threefry whatever JAX's default is, since its noise is the same under vmap."""
    return jax.random.key(config.seed, impl="threefry2x32")


def scope_of(config: Config, model: GPT) -> Subset:
    """The parameters that a run trains."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), base_key(config))
    return make_scope(config.scope, shapes)


def count_trained(config: Config, model: GPT) -> int:
    """The number of parameters that a run trains."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), base_key(config))
    trained = jax.eval_shape(scope_of(config, model).select, shapes)
    return sum(leaf.size for leaf in jax.tree.leaves(trained))


def make_rules(config: Config, model: GPT, layout: Layout | None = None) -> Update:
    """The optimisation that the configuration names."""
    return Update(
        make_optimizer(config.optimizer, config.train.num_steps),
        subset=scope_of(config, model),
        clip_norm=config.instruct.grad_clip_norm,
        rounding=config.optimizer.rounding,
        layout=layout,
    )


def init_state(config: Config, model: GPT, layout: Layout | None = None) -> RunState:
    """Fresh parameters and optimiser state, from the seed alone, each array where it belongs."""
    rules = make_rules(config, model, layout)
    key = jax.random.fold_in(base_key(config), 2**31)

    def init(key: jax.Array) -> RunState:
        history = hybrid.new_history() if config.instruct.adaptive else None
        return RunState(rules.init(init_params(model, key)), history)

    if layout is None:
        return jax.jit(init)(key)
    return jax.jit(lambda: init(key), out_shardings=layout.shardings(jax.eval_shape(init, key)))()


def make_loss(model: GPT, scope: Subset) -> Callable[[Any], Callable[..., jax.Array]]:
    """(parameters) -> loss of (trained parameters, tokens [B, T]): the frozen ones are neither
    perturbed nor copied.
    """
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
    estimator = make_estimator(config, layout)

    @jax.jit
    def project(params: Any, key: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
        return estimator.project(loss(params), scope.select(params), key, tokens)

    return project


def make_update(
    config: Config, model: GPT, layout: Layout | None = None
) -> Callable[..., tuple[RunState, StepMetrics]]:
    """The jitted optimisation of a step without backprop: (state, key, loss, projections [q]) ->
    (state, metrics).

    The state is donated. Replay calls the same function.
    """
    rules, tell = make_rules(config, model, layout), _make_tell(config)
    family = make_estimator(config).family

    def update(
        state: RunState, key: jax.Array, loss: jax.Array, projections: jax.Array
    ) -> tuple[RunState, StepMetrics]:
        return tell(state, *rules.from_projections(family, state.train, key, loss, projections))

    return jax.jit(update, donate_argnums=0)


def make_fo_step(
    config: Config, model: GPT, layout: Layout | None = None
) -> Callable[..., tuple[RunState, StepMetrics]]:
    """The jitted backprop step: (state, tokens [B, T]) -> (state, metrics), the state donated."""
    rules, tell = make_rules(config, model, layout), _make_tell(config)
    loss_and_grad = _make_loss_and_grad(config, model, rules.subset)

    def fo_step(state: RunState, tokens_BT: jax.Array) -> tuple[RunState, StepMetrics]:
        loss, gradient = loss_and_grad(state.params, tokens_BT)
        key = jax.random.fold_in(base_key(config), state.step)
        return tell(state, *rules.from_gradient(state.train, key, loss, gradient))

    return jax.jit(fo_step, donate_argnums=0)


def make_feedback_step(
    config: Config, model: GPT, layout: Layout | None = None
) -> Callable[..., tuple[RunState, StepMetrics]]:
    """The jitted step of modes feedback and block_local: (state, tokens [B, T]) -> (state,
    metrics), the state donated.
    """
    rules, tell = make_rules(config, model, layout), _make_tell(config)
    loss_and_gradient = feedback.make_gradient(config, model)

    def feedback_step(state: RunState, tokens_BT: jax.Array) -> tuple[RunState, StepMetrics]:
        key = jax.random.fold_in(base_key(config), state.step)
        loss, gradient = loss_and_gradient(state.params, key, tokens_BT)
        trained = rules.subset.select(gradient)
        return tell(state, *rules.from_gradient(state.train, key, loss, trained))

    return jax.jit(feedback_step, donate_argnums=0)


def make_guided_step(
    config: Config, model: GPT, layout: Layout | None = None
) -> Callable[..., tuple[RunState, StepMetrics]]:
    """The jitted step of mode instruct with a backprop gradient: (state, key, tokens, fo_tokens [B,
    T]) -> (state, metrics).
    """
    rules, tell = make_rules(config, model, layout), _make_tell(config)
    loss = make_loss(model, rules.subset)
    loss_and_grad = _make_loss_and_grad(config, model, rules.subset)
    estimator = make_estimator(config, layout)

    def guided_step(
        state: RunState, key: jax.Array, tokens: jax.Array, fo_tokens_BT: jax.Array
    ) -> tuple[RunState, StepMetrics]:
        trained = rules.subset.select(state.params)
        _, backprop = loss_and_grad(state.params, fo_tokens_BT)

        def project_part(part: hybrid.Part) -> tuple[jax.Array, jax.Array]:
            own = tokens[part.first : part.end] if config.zo.batch_per_query else tokens
            some = dataclasses.replace(
                estimator, perturbation=part.family, num_queries=part.end - part.first
            )
            return some.project(loss(state.params), trained, part.key, own)

        mean_loss, gradient, cosine, noise_scale = hybrid.estimate_guided(
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
    config: Config, model: GPT, layout: Layout | None = None
) -> Callable[..., tuple[RunState, StepMetrics, StepRecord | None]]:
    """The step of the configured mode: (state, step from 0, tokens, fo_tokens) -> (state, metrics,
    record).

    Each of the two batches is None where the step does not read it; see `batches.reads`. A step
    along a gradient has no record.
    """
    step_key = make_step_key(config, layout)
    words = jax.jit(jax.random.key_data)
    if config.mode in ("fo", "calibrate"):
        fo_step = make_fo_step(config, model, layout)
    if config.mode in ("feedback", "block_local"):
        fo_step = make_feedback_step(config, model, layout)
    if config.mode == "instruct":
        guided_step = make_guided_step(config, model, layout)
    if config.mode in QUERY_MODES:
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


def _make_tell(config: Config) -> Callable[..., tuple[RunState, StepMetrics]]:
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
        history = before.history and hybrid.remember(before.history, metrics.loss)
        return RunState(train, history), StepMetrics(
            loss=metrics.loss,
            grad_norm=metrics.grad_norm,
            learning_rate=schedule(metrics.num_updates),
            num_skipped=metrics.num_skipped,
            skipped_in_row=metrics.skipped_in_row,
            cosine_target=jnp.float32(cosine_target),
            noise_scale=jnp.float32(noise_scale),
        )

    return tell


def _make_loss_and_grad(config: Config, model: GPT, scope: Subset) -> Callable[..., Any]:
    """(params, tokens [B, T]) -> (loss, gradient of the trained parameters), in micro-batches,
    summed in float32.
    """
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
