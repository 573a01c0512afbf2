"""What a run is called, what it is about to do in plain words, and what it has done after so many
steps.
"""

from collections.abc import Mapping
import hashlib
import json
from pathlib import Path
import re
from typing import Any

import jax

from zo_jax.estimators import Estimator
from zo_jax.layout import Layout
from zo_jax.train.config import (
    GRADIENT_MODES,
    OWN_DIRECTIONS,
    QUERY_MODES,
    UNRECORDED,
    Config,
    ZOConfig,
    blocks_per_step,
    fixed_fields,
)
from zo_jax.train.named_methods import make_method
from zo_jax.train.settings import as_word
from zo_jax.train.tasks.task import MEASURES, Task
from zo_jax.train.unrecorded import make_unrecorded
from zo_jax.train.validation import fill_in


def default_run_name(config: Config) -> str:
    """Folder name of a run that is given none: what the reference script's names say, and a hash of
    all that fixes the run.

    Fields in which a run may change are no part of it, so that a run with more steps goes on in its
    folder.
    """
    mode, parts = config.mode, [config.mode, _word(config.scope)]
    if config.model.path:
        parts.append(_word(Path(config.model.path).stem))
    if config.task.name != "text":
        parts.append(
            _word(Path(config.task.path).stem if config.task.name == "file" else config.task.name)
        )
    if config.objective.name != "loss":
        parts.append(_word(config.objective.path.rpartition(":")[2] or config.objective.name))
    if mode in QUERY_MODES:
        parts.append(f"q{config.zo.num_queries}")
    if mode in ("calibrate", "instruct"):
        parts.append(f"bp{config.fo.bp_interval}")
    parts.append(f"opt{config.optimizer.name}_lr{as_word(config.optimizer.learning_rate)}")
    parts.append(f"bs{config.train.batch_size}")
    if mode == "instruct":
        parts.append(f"ct{config.instruct.cosine_target:g}_ns{config.instruct.noise_scale:g}")
    fixed = fixed_fields(fill_in(config))
    if fixed["train"].get("num_steps") == 0:  # the length is part of a cosine, and not known yet
        fixed["train"]["num_epochs"] = config.train.num_epochs
    text = json.dumps(fixed, sort_keys=True)
    return "_".join([*parts, hashlib.sha256(text.encode()).hexdigest()[:8]])


def _word(text: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


def tell_results(results: Mapping[str, float], unit: str) -> str:
    """What an evaluation has measured, in plain words.

    >>> tell_results({"eval_loss": 0.5, "eval_accuracy": 0.774}, "example")
    '0.500000 nats per example, accuracy 77.4 %'
    """
    words = [f"{results['eval_loss']:.6f} nats per {unit}"]
    if "eval_reward" in results:
        words = [f"{results['eval_loss']:.6f}, which is minus the mean reward of a {unit}"]
    if "eval_text_loss" in results:
        words.append(f"text {results['eval_text_loss']:.4f} nats per token")
    for name in MEASURES:
        if name in results and name not in ("eval_loss", "eval_reward", "eval_text_loss"):
            word = {"eval_f1": "F1"}.get(name, name.removeprefix("eval_").replace("_", " "))
            words.append(f"{word} {100 * results[name]:.1f} %")
    return ", ".join(words)


def tell_flat(num_steps: int, num_flat: int) -> str:
    """How many steps had no signal, and what to raise."""
    return (
        f"{num_flat} of {num_steps} steps had no signal, for all members scored the same: raise "
        "zo.epsilon, objective.temperature, train.batch_size or zo.num_queries, or give a reward "
        "that tells more of them apart"
    )


def passes_until(config: Config, step: int) -> int:
    """Evaluations of the loss in the first `step` steps; a backprop gradient counts its
    micro-batches, any other one.
    """
    num_gradient = _num_gradient_steps(config, step)
    num_queries_steps = _num_query_steps(config, step)
    of_queries = _evaluations_until(config, num_queries_steps)
    return of_queries + num_gradient * config.fo.gradient_accumulation_steps


def _evaluations_until(config: Config, num_steps: int) -> int:
    """Of steps along directions."""
    zo = config.zo
    estimator = Estimator(
        num_queries=zo.num_queries,
        difference=zo.difference,
        batch_per_query=zo.batch_per_query,
        exact=None if zo.exact == "none" else zo.exact,
    )
    method = make_method(config, estimator) or make_unrecorded(config, estimator)
    if method:
        return method.evaluations_until(num_steps)
    return num_steps * estimator.num_evaluations


def blocks_until(config: Config, step: int) -> int:
    """Training blocks read in the first `step` steps, each counted once however many queries
    evaluate it.
    """
    num_gradient = _num_gradient_steps(config, step)
    num_queries_steps = _num_query_steps(config, step)
    fo_size = config.fo.batch_size or config.train.batch_size
    return num_queries_steps * blocks_per_step(config) + num_gradient * fo_size


def _num_query_steps(config: Config, step: int) -> int:
    if config.mode not in QUERY_MODES:
        return 0
    return step - _num_gradient_steps(config, step) if config.mode == "calibrate" else step


def _num_gradient_steps(config: Config, step: int) -> int:
    interval = {"zo": 0}.get(config.mode, config.fo.bp_interval)
    if config.mode in GRADIENT_MODES:
        interval = 1
    return step // interval if interval else 0


def make_row(config: Config, step: int, num_blocks: int, block_size: int) -> dict[str, Any]:
    """What a row of metrics.csv says about a step without having run it.

    `tokens` are training tokens read, each counted once however many queries evaluate it;
    `forward_passes` are evaluations of the loss on a batch (fo: on a micro-batch).
    """
    has_queries = config.mode in QUERY_MODES
    has_backprop = config.mode in ("fo", "calibrate", "instruct")
    blocks = blocks_until(config, step)
    return {
        "epoch": blocks / num_blocks,
        "step": step,
        "mode": config.mode,
        "scope": config.scope,
        "q": config.zo.num_queries if has_queries else "",
        "initial_lr": config.optimizer.learning_rate,
        "batch_size": config.train.batch_size,
        "gradient_accumulation_steps": config.fo.gradient_accumulation_steps
        if has_backprop
        else "",
        "effective_batch_size": blocks_per_step(config),
        "optimizer": config.optimizer.name,
        "bp_interval": config.fo.bp_interval or "",
        "forward_passes": passes_until(config, step),
        "tokens": blocks * block_size,
    }


def _describe_feedback(config: Config, batch: str) -> str:
    feedback = config.feedback
    way = {
        "identity": "as it is (residual feedback)",
        "random": "through fixed random matrices (a control)",
    }[feedback.matrix]
    whom = {"blocks": "every block", "sublayers": "every sublayer"}[feedback.handed_to]
    last = "block" if config.mode == "block_local" or config.model.path else "MLP"
    whom = {"all": whom, "last": f"the last {last} alone (a control)"}[feedback.errors]
    of_output = "" if config.model.path else " in closed form"
    start = f"the output error{of_output}, handed to {whom} {way}"
    end = f"a biased direction, no zeroth-order estimate of the gradient; {batch}"
    if config.mode == "block_local":
        return f"one forward pass a step: {start}; backprop inside every block, none between them; {end}"  # noqa: E501
    attention = {
        "weights": f"{feedback.num_draws} draws of signs on the weights of attention",
        "qkv": f"{feedback.num_draws} draws of signs on queries, keys and values each",
        "closed_form": "the derivative of attention in closed form",
        "none": "nothing through attention (a control)",
    }[feedback.attention]
    # A pretrained model's linear maps and norms are taken backwards layer by layer.
    what = "no backprop between blocks" if config.model.path else "forward passes only, no backprop"
    return (
        f"{what}, nothing from block to block: {start}; inside a block "
        f"differences of {feedback.sigma:g}, "
        f"{attention}, and linear maps and norms in closed form; {end}"
    )


def _describe_exact(zo: ZOConfig, queries: str) -> str:
    exact = zo.exact
    only = {
        "agzo": "forward passes, and the transposes of products",
        "addax": "backprop for the first examples of each batch, and forward passes",
    }.get(zo.method, "forward passes only")
    if zo.method in UNRECORDED:
        return f"{only}: {queries}; no ledger"
    if zo.relative_rate != 1:
        queries += f", {zo.relative_rate:g} times the learning rate"
    if exact == "none":
        return f"forward passes only: {queries}"
    if exact == "head":
        return (
            f"forward passes only, and the gradient of the last norm and the output head in closed "
            f"form; for the rest {queries}; no ledger"
        )
    return f"backprop for {exact}, down to the lowest of it; for the rest {queries}; no ledger"


def describe(
    config: Config,
    task: Task,
    model: Any,
    num_trained: int,
    workdir: Path,
    layout: Layout | None = None,
) -> str:
    """What a run is about to do, in plain words; `num_trained` of its parameters are trained."""
    zo, optimizer, train = config.zo, config.optimizer, config.train
    per_query = " each" if zo.batch_per_query else ", shared by them"
    ways = {
        "central": f"central differences of {zo.epsilon:g}",
        "forward": f"forward differences of {zo.epsilon:g}",
        "jvp": "exact forward-mode slopes",
    }
    what = "blocks" if config.task.name == "text" else "examples"
    batch = f"batches of {train.batch_size} {what}"
    fo_batch = f"batches of {config.fo.batch_size or train.batch_size} {what}"
    backprop = f"backprop; {fo_batch} in {config.fo.gradient_accumulation_steps} part(s)"
    # SVRG's first step takes a snapshot, the second is of the usual length.
    evaluations = _evaluations_until(config, 2) - _evaluations_until(config, 1)
    method = {"plain": "", "fzoo": " over the deviation of the losses (fzoo)"}.get(
        zo.method, f", by {zo.method} {zo.method_options}".rstrip()
    )
    of_groups = {
        "none": "",
        "layers": ", each of one layer or other entry, shared out by what their projections tell",
        "leaves": ", each of one leaf, shared out by what their projections tell",
        "tokens": ", each of one layer, or of tokens that are about as common, shared out by what "
        "their projections tell",
    }[zo.groups]
    kind = "" if zo.method in OWN_DIRECTIONS else f"{zo.perturbation} "
    queries = (
        f"{zo.num_queries} {kind}directions a step{of_groups}, "
        f"{ways[zo.difference]}{method}, "
        f"{evaluations} loss evaluations; {batch}{per_query}"
    )
    if config.objective.name != "loss":
        queries = (
            f"{config.objective.name} to be raised (the loss told is minus it); {zo.num_queries} "
            f"pairs of {zo.perturbation} members a step at a distance of {zo.epsilon:g}, scores "
            f"{config.objective.shaping}; {train.batch_size} prompts for all members"
        )
    every = f"every {config.fo.bp_interval} steps"
    if config.fo.relative_rate:
        every += f", with moments of its own and {config.fo.relative_rate:g} times the rate,"
    guided = config.instruct.num_guided or zo.num_queries
    how = {
        "feedback": _describe_feedback(config, batch),
        "block_local": _describe_feedback(config, batch),
        "fo": backprop,
        "zo": _describe_exact(zo, queries),
        "calibrate": f"{queries}; instead, {every}, {backprop}",
        "instruct": f"{queries}; {every} {guided} of them guided ({config.instruct.method}) by {backprop}",  # noqa: E501
    }[config.mode]
    rate = f"learning rate {optimizer.learning_rate:g}"
    if optimizer.anchor:
        rate += f", anchor {optimizer.anchor:g}"
    if optimizer.schedule == "cosine":
        rate += (
            f", {optimizer.warmup_steps} steps of warm-up, cosine to "
            f"{optimizer.min_learning_rate:g}"
        )
    device = jax.devices()[0]
    devices = f"1 of {jax.device_count()}"
    if layout:
        mesh = layout.mesh.shape
        devices = f"{layout.mesh.size} of {jax.device_count()}: query={mesh['query']}, data={mesh['data']}, model={mesh['model']}"  # noqa: E501
    return "\n".join(
        (
            f"model:     {model.summary}; scope {config.scope}: {num_trained:,} trained",
            f"data:      {task.summary}",
            f"gradient:  {how}",
            f"optimizer: {optimizer.name}, {rate}",
            f"length:    {train.num_steps:,} steps on {device.device_kind} "
            f"({device.platform}, {devices})",
            f"results:   {workdir}",
        )
    )
