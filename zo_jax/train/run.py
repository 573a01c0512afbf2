"""A run from its configuration to its results, or from where it was interrupted."""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import jax

import zo_jax
from zo_jax.atomic import write_atomic
from zo_jax.layout import Layout
from zo_jax.train import describe, evaluate, limits, processes
from zo_jax.train.config import GRADIENT_MODES, Config, ConfigError, MeshConfig
from zo_jax.train.data.batches import load_corpora
from zo_jax.train.data.corpus import Corpus
from zo_jax.train.data.sources import DataError
from zo_jax.train.loop import Loop
from zo_jax.train.mesh import RULES, MeshError, make_mesh
from zo_jax.train.model import GPT, make_model
from zo_jax.train.run_folder import metrics
from zo_jax.train.run_folder.checkpoint import CheckpointError
from zo_jax.train.run_folder.folder import Workdir
from zo_jax.train.run_folder.rescue import rescue
from zo_jax.train.run_folder.resume import open_run
from zo_jax.train.settings import walk
from zo_jax.train.signals import CannotWrite, RunStopped
from zo_jax.train.steps import RunState, base_key, count_trained, init_state
from zo_jax.train.tools import plots
from zo_jax.train.validation import check_mesh, resolve, validate

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
    config, corpus = _prepare(config, folder, restart)
    with processes.explain_failures():
        layout = make_layout(config)
        needs = config, corpus.tokenizer.vocab_size, layout
        limits.check_memory(*needs)
        with limits.explain_memory(*needs), Workdir(folder) as opened:
            opened.claim(config, corpus, restart)
            return _train(config, corpus, opened, layout)


def _train(
    config: Config, corpus: Corpus, folder: Workdir, layout: Layout | None
) -> dict[str, float]:
    """`train_and_evaluate` in a folder that is claimed."""
    model = make_model(config.model, corpus.tokenizer.vocab_size)
    evaluate_fn = evaluate.make_evaluate(model)
    held_out = evaluate.choose_blocks(corpus.validation_NT, config.train.eval_blocks)
    evaluate_params = lambda params: float(evaluate_fn(params, held_out))
    num_trained = count_trained(config, model)
    processes.say(describe.describe(config, corpus, model, num_trained, folder.path, layout))
    shapes = jax.eval_shape(lambda: init_state(config, model)).params
    if layout and (whole := list(layout.replicated(shapes))):
        size = layout.mesh.shape["model"]
        processes.say(f"not divided over model={size}, so replicated: {', '.join(whole)}")
    try:
        with open_run(config, corpus, model, evaluate_params, folder, layout) as run:
            loop = Loop(config, corpus, model, run, evaluate_params)
            try:
                state = loop.finish()
            except OSError as error:
                raise CannotWrite(rescue(run, loop.state, error)) from error
        eval_loss = evaluate_params(state.params)
        return _tell_results(config, corpus, model, state, eval_loss, folder.path)
    except OSError as error:  # before the first step or after the last, which is saved
        raise CannotWrite(f"{error}; put that right and run the same command again") from error


def _prepare(config: Config, folder: Path, restart: bool) -> tuple[Config, Corpus]:
    """The resolved configuration and the corpus, which are the same in all processes; see
    `processes.agree`.
    """
    corpus: list[Corpus] = []

    def check() -> dict[str, Any]:
        validate(config)
        return (
            dict(walk(config))
            | {"--workdir": str(folder.absolute()), "--restart": restart}
            | versions()
        )

    def load() -> dict[str, Any]:
        corpus.append(load_corpora(config))
        return {f"corpus.{name}": value for name, value in corpus[0].digests.items()}

    processes.agree(check)
    processes.agree(load)
    queries = config.zo.num_queries, config.zo.parallel_batch_size
    if queries[1] > queries[0]:
        processes.say(
            f"zo.parallel_batch_size={queries[1]} is more than the queries: taken as {queries[0]}"
        )
    return resolve(config, len(corpus[0].train_NT)), corpus[0]


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


def make_layout(config: Config) -> Layout | None:
    """The devices of a run: None for one alone.

    Raises:
      ConfigError: the mesh does not fit the devices, or the batches the mesh.
    """
    mesh, devices = config.mesh, jax.devices()
    if config.mode in GRADIENT_MODES:  # it has no queries to split
        devices = devices[:1] if mesh == MeshConfig() else devices
        is_open = -1 in (mesh.data, mesh.model)
        mesh = MeshConfig(1 if is_open else mesh.query, mesh.data, mesh.model)
    try:
        mesh = make_mesh(mesh.query, mesh.data, mesh.model, devices)
    except MeshError as error:
        raise ConfigError(str(error)) from error
    check_mesh(config, mesh.shape)
    return None if mesh.size == 1 else Layout(mesh, RULES)


def _tell_results(
    config: Config,
    corpus: Corpus,
    model: GPT,
    state: RunState,
    eval_loss: float,
    folder: Path,
) -> dict[str, float]:
    """Draws the curve, writes a sample, and says how the run ended."""
    text = None
    if config.train.sample_tokens:  # by all processes, which hold the parameters together
        text = evaluate.sample_text(
            model,
            state.params,
            corpus,
            jax.random.fold_in(base_key(config), 2**31 + 1),
            config.train.sample_tokens,
            config.train.sample_temperature,
        )
    rows = metrics.read(folder / "metrics.csv")
    loss = next((float(row["loss"]) for row in reversed(rows) if row["loss"]), float("nan"))
    result = dict(step=int(state.step), loss=loss, eval_loss=eval_loss)
    processes.say_goodbye()
    if not processes.is_first():
        return result
    plots.plot_losses(rows, folder / "loss_curve.png", folder.name)
    print(
        f"finished {int(state.step)} steps: training loss {loss:.6f} (last batch), validation loss "
        f"{eval_loss:.6f} nats per token"
    )
    if int(state.train.num_skipped):
        print(
            f"{int(state.train.num_skipped)} of the steps changed nothing: their loss was not "
            f"finite"
        )
    if text is not None:
        write_atomic(folder / "sample.txt", text + "\n")
        print(f"a sample of its text:\n{'-' * 40}\n{text}\n{'-' * 40}")
    print(f"results are in {folder}")
    return result
