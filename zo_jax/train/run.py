"""A run from its configuration to its results, or from where it was interrupted."""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import jax

import zo_jax
from zo_jax.layout import Layout
from zo_jax.train import describe, limits, processes
from zo_jax.train.choices import count_trained
from zo_jax.train.combinations import check_mesh
from zo_jax.train.config import GRADIENT_MODES, Config, ConfigError, MeshConfig
from zo_jax.train.data.sources import DataError
from zo_jax.train.export import as_tokenizer
from zo_jax.train.find import find_settings
from zo_jax.train.finish import finish
from zo_jax.train.loop import Loop
from zo_jax.train.mesh import MeshError, make_mesh
from zo_jax.train.run_folder import tracking
from zo_jax.train.run_folder.checkpoint import CheckpointError
from zo_jax.train.run_folder.folder import Workdir
from zo_jax.train.run_folder.rescue import rescue
from zo_jax.train.run_folder.resume import open_run
from zo_jax.train.settings import walk
from zo_jax.train.signals import CannotWrite, RunStopped
from zo_jax.train.subject import Sources, Subject, load_sources, make_subject
from zo_jax.train.tasks import spread
from zo_jax.train.validation import resolve, validate

# What `train_and_evaluate` raises for reasons that its messages explain.
FAILURES = (ConfigError, DataError, CheckpointError, RunStopped)


def train_and_evaluate(config: Config, workdir: Path, restart: bool = False) -> dict[str, float]:
    """Trains in a run folder, or continues what it holds, and reports in it and on stdout.

    Args:
      config: the experiment.
      workdir: the run folder, made if it is not there.
      restart: delete the run that the folder holds first.

    Returns:
      step, loss (of the last step's batch) and eval_loss at the end.

    Raises:
      ConfigError: the configuration is impossible, or the folder holds another run or is in use.
      DataError: there is no such corpus.
      CheckpointError: the run's checkpoints cannot be read, and nothing else holds its state.
      RunStopped: the run ended early, for the reason that its message gives, and can go on.
    """
    folder = Path(workdir).expanduser()
    config, subject = _prepare(config, folder, restart)
    with processes.explain_failures():
        layout = make_layout(config, subject.model)
        limits.check_memory(config, subject.model, layout)
        explained = limits.explain_memory(config, subject.model, layout)
        with explained, Workdir(folder) as opened:
            opened.claim(config, subject.digests, restart)
            if not config.model.path:
                opened.keep_tokenizer(as_tokenizer(subject.tokenizer))
            found = find_settings(config, subject, opened, layout)
            return _train(found, subject, opened, layout)


def _train(
    config: Config, subject: Subject, folder: Workdir, layout: Layout | None
) -> dict[str, float]:
    """`train_and_evaluate` in a folder that is claimed."""
    model, task = subject.model, subject.task
    num_trained = count_trained(config, model)
    processes.say(describe.describe(config, task, model, num_trained, folder.path, layout))
    if layout and (whole := list(layout.replicated(model.shapes()))):
        size = layout.mesh.shape["model"]
        processes.say(f"not divided over model={size}, so replicated: {', '.join(whole)}")
    try:
        with open_run(config, model, task, folder, layout) as run:
            loop = Loop(config, model, task, run)
            try:
                state = loop.finish()
            except OSError as error:
                raise CannotWrite(rescue(run, loop.state, error)) from error
        return finish(config, subject, state, folder, layout)
    except OSError as error:  # before the first step or after the last, which is saved
        raise CannotWrite(f"{error}; put that right and run the same command again") from error


def _prepare(config: Config, folder: Path, restart: bool) -> tuple[Config, Subject]:
    """The resolved configuration and what the run is about, which are the same in all processes;
    see `processes.agree`.
    """
    found: list[Sources] = []

    def check() -> dict[str, Any]:
        validate(config)
        tracking.check(config)
        return (
            dict(walk(config))
            | {"--workdir": str(folder.absolute()), "--restart": restart}
            | versions()
        )

    def load() -> dict[str, Any]:
        found.append(load_sources(config))
        return {f"corpus.{name}": value for name, value in found[0].digests.items()}

    processes.agree(check)
    processes.agree(load)
    queries = config.zo.num_queries, config.zo.parallel_batch_size
    if queries[1] > queries[0]:
        processes.say(
            f"zo.parallel_batch_size={queries[1]} is more than the queries: taken as {queries[0]}"
        )
    resolved = resolve(config, found[0].num_examples, found[0].count_tokens)
    return resolved, make_subject(resolved, found[0])


def versions() -> dict[str, str]:
    """Of what the numbers of a run come from besides its configuration, known before any device is
    used.
    """
    settings = ("jax_enable_x64", "jax_default_matmul_precision", "jax_platforms")
    packages = ("jax", "jaxlib", "numpy", "optax")
    sources = Path(zo_jax.__file__).parent.rglob("*.py")
    code = b"".join(path.read_bytes() for path in sorted(sources))
    return {
        **{name: importlib.metadata.version(name) for name in packages},
        **{name: str(jax.config.values[name]) for name in settings},
        "zo_jax": hashlib.sha256(code).hexdigest()[:16],
    }


def make_layout(config: Config, model: Any) -> Layout | None:
    """The devices of a run: None for one alone.

    Raises:
      ConfigError: the mesh does not fit the devices, or the batches the mesh.
    """
    mesh, devices = config.mesh, jax.devices()
    if config.mode in GRADIENT_MODES:  # they have no queries to split
        devices = devices[:1] if mesh == MeshConfig() else devices
        is_open = -1 in (mesh.data, mesh.model)
        mesh = MeshConfig(1 if is_open else mesh.query, mesh.data, mesh.model)
    try:
        mesh = make_mesh(mesh.query, mesh.data, mesh.model, devices)
    except MeshError as error:
        raise ConfigError(str(error)) from error
    check_mesh(config, mesh.shape)
    if config.objective.name != "loss":
        spread.check(2 * config.zo.num_queries, mesh.shape)
    return None if mesh.size == 1 else Layout(mesh, model.rules)
