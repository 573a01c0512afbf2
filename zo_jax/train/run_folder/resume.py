"""Where a run goes on: what its folder holds, mended and opened for writing.

The state is that of the latest checkpoint that is whole, or of the seed, and the ledger has the
steps after it. What else is missing is made again where that can be, and told.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
from pathlib import Path
import sys
from typing import Any, NamedTuple

import numpy as np

from zo_jax import ledger
from zo_jax.atomic import set_aside
from zo_jax.layout import Layout
from zo_jax.replay import make_header
from zo_jax.train import processes
from zo_jax.train.choices import num_numbers, rule_of, tiers_of
from zo_jax.train.config import Config, ConfigError, fixed_fields, keeps_ledger, method_of
from zo_jax.train.pretrained import Pretrained
from zo_jax.train.run_folder import checkpoint, metrics
from zo_jax.train.run_folder.checkpoint import CheckpointError, Checkpoints, open_checkpoints
from zo_jax.train.run_folder.folder import LEDGER, Workdir
from zo_jax.train.run_folder.rebuild import Past
from zo_jax.train.run_folder.reports import Reports, make_row
from zo_jax.train.run_folder.tracking import Tracker
from zo_jax.train.run_state import RunState, StepMetrics, init_state, kept_part
from zo_jax.train.steps import make_update
from zo_jax.train.tasks.task import Task
from zo_jax.trees import Subset


class Run(NamedTuple):
    """A run that is open.

    Attributes:
      workdir: its folder.
      layout: its devices, None for one alone.
      state: where it begins.
      records: the ledger's, of which those after `state.step` are to be replayed.
      log, checkpoints: what it writes to.
      snapshots, best: where it keeps some, and the best; or None.
      writer: of the ledger; None in modes without queries, and in all processes but the first.
    """

    workdir: Workdir
    layout: Layout | None
    state: RunState
    records: np.ndarray
    log: metrics.Log
    checkpoints: Checkpoints
    snapshots: Checkpoints | None
    best: Checkpoints | None
    writer: ledger.Writer | None


def run_header(config: Config, model: Any, start: RunState, identity: str = "") -> dict[str, Any]:
    """The header of a run's ledger, from its resolved configuration."""
    base = model.base_fingerprint(start.params) if isinstance(model, Pretrained) else None
    return make_header(
        start,
        num_queries=num_numbers(config),
        perturbation=config.zo.perturbation,
        groups=rule_of(config),
        tiers=tiers_of(config, model),
        rank=config.zo.rank,
        scope=config.scope,
        clip_norm=config.instruct.grad_clip_norm,
        rounding=config.optimizer.rounding,
        method=method_of(config),
        vocab_size=model.vocab_size,
        config=fixed_fields(config),
        identity=identity,
        **({} if base is None else {"base": base}),
    )


def _open_files(config: Config, folder: Path, rows: list[metrics.Row]) -> metrics.Files:
    project = config.train.wandb
    tracker = Tracker(project, folder, dataclasses.asdict(config)) if project else None
    return metrics.Files(folder, rows, tracker)


@contextlib.contextmanager
def open_run(
    config: Config,
    model: Any,
    task: Task,
    workdir: Workdir,
    layout: Layout | None = None,
) -> Iterator[Run]:
    """Opens what a claimed run folder holds, and says from where it goes on.

    Raises:
      ConfigError: the run is past its last step.
      CheckpointError: there are checkpoints, but none can be read, and no ledger can replace them.
    """
    folder, identity, num_steps = workdir.path, workdir.identity, config.train.num_steps
    part = kept_part(config, model)
    init = lambda: init_state(config, model, layout)
    state, start = init(), 0
    if isinstance(model, Pretrained):
        workdir.claim_base(model.base_fingerprint(state.params))
    has_ledger = keeps_ledger(config)
    header = run_header(config, model, state, identity) if has_ledger else None
    find = lambda name: checkpoint.find_whole(folder / name, state, identity, part)
    whole, damaged, latest = find("checkpoints")
    if latest is not None:
        state, start, latest = latest, whole[-1], None
    last = processes.first_tells(
        lambda: _find_last(folder, header, num_steps, start, damaged=bool(damaged))
    )
    _tell_gone(config, folder / "checkpoints", whole, damaged, last)
    with contextlib.ExitStack() as stack:
        writer, kept = None, None
        if header:
            if processes.is_first():
                writer = stack.enter_context(_open_ledger(folder / LEDGER, header, last))
            # What the first process has mended is what all of them replay.
            processes.all_agree(True)
            kept = ledger.read(folder / LEDGER)
        past = Past(
            kept,
            [0, *whole],
            lambda step: _load(folder / "checkpoints", step, init(), identity, part),
            lambda: make_update(config, model, layout),
            layout,
        )
        kept_snapshots, lost_snapshots, _ = find("snapshots")
        kept_best, _, _ = find("best")
        open_kept = lambda name, keep: stack.enter_context(
            open_checkpoints(folder / name, keep, identity, part)
        )
        snapshots = best = None
        if config.train.snapshot_delta or lost_snapshots:
            snapshots = open_kept("snapshots", None)
        if config.task.name != "text" and config.task.keep_best:
            best = open_kept("best", 1)

        rows, missing = _share_rows(workdir, start, last)

        def make_again(step: int, state: RunState, told: StepMetrics | None) -> None:
            if step in missing:
                has_results = workdir.reports.has_evaluation(step)
                results = task.evaluate(state.params) if has_results else None
                row = make_row(config, task, step, told, results)
                rows.append(metrics.format_row(row, identity))
            if step in lost_snapshots and snapshots:
                snapshots.save(step, state)

        if wanted := sorted({*missing, *(step for step in lost_snapshots if step <= start)}):
            past.visit(wanted, make_again)
            rows.sort(key=lambda row: int(row["step"]))
        if snapshots:
            snapshots.wait()
            kept_snapshots = snapshots.steps
        if best:
            step = Reports.best_step(task.measure, metrics.results_of(rows))
            if 0 <= step <= start and step not in kept_best:
                _make_best_again(best, past, step)
        files = _open_files(config, folder, rows) if processes.is_first() else None
        log = metrics.Log(identity, rows, files)
        stack.callback(log.close)
        _tell_missing(workdir, start, log, missing, kept_snapshots)
        workdir.go_on(config, last)
        checkpoints = open_kept("checkpoints", config.train.keep_checkpoints)
        if start == num_steps:
            processes.say(f"this run is complete: {start} of {num_steps} steps; nothing to train")
        elif last:
            origin = f"the checkpoint of step {start}" if start else "the seed"
            replayed = f", replaying steps {start + 1} to {last} from the ledger"
            processes.say(f"continuing from {origin}{replayed if last > start else ''}")
        records = kept.records if kept else np.zeros(0)
        yield Run(workdir, layout, state, records, log, checkpoints, snapshots, best, writer)


def _load(folder: Path, step: int, start: RunState, identity: str, part: Subset) -> RunState:
    """The state after a step that has a checkpoint, or at the start."""
    return checkpoint.restore(folder, step, start, identity, part) if step else start


def _make_best_again(best: Checkpoints, past: Past, step: int) -> None:
    """The best state, that of a step, where replay reaches it; tells if it does not."""
    past.visit([step], lambda step, state, _: best.save(step, state) and None)
    best.wait()
    word = "made again by replay" if step in best.steps else "lost, and no replay makes it again"
    processes.say(f"{best.folder}: the best state, of step {step}, is {word}")


def _find_last(
    folder: Path, header: dict[str, Any] | None, num_steps: int, start: int, damaged: bool
) -> int:
    """The last step that the run has taken and need not train again."""
    there = _read_ledger(folder / LEDGER, header) if header else None
    last = there.replayable(start) if there else start
    if damaged and last == 0:
        raise CheckpointError(
            f"no checkpoint in {folder / 'checkpoints'} can be used; use --restart to delete the "
            f"run and train from "
            "scratch, or another --workdir"
        )
    if last > num_steps:
        raise ConfigError(
            f"the run in {folder} is at step {last}, past train.num_steps={num_steps}; raise "
            "it, use --restart to train from scratch, or another --workdir"
        )
    return last


@contextlib.contextmanager
def _open_ledger(path: Path, header: dict[str, Any], last: int) -> Iterator[ledger.Writer]:
    """The ledger, mended up to a step; tells what it lacks."""
    writer = ledger.Writer(path, header, last)
    if writer.lost:
        print(
            f"the ledger lacks {len(writer.lost)} of the steps up to {last}: no replay can pass "
            f"step "
            f"{writer.lost[-1]} but from a later checkpoint"
        )
    try:
        yield writer
    finally:
        writer.close()


def _share_rows(workdir: Workdir, start: int, last: int) -> tuple[list[metrics.Row], list[int]]:
    """`_find_rows` for all processes, of which those that write none need little of each row."""
    rows: list[metrics.Row] = []

    def find() -> tuple[list[metrics.Row], list[int]]:
        found, missing = _find_rows(workdir, start, last)
        rows.extend(found)
        brief = ("step", *metrics.MEASURES)
        return [{name: row[name] for name in brief} for row in found], missing

    brief, missing = processes.first_tells(find)
    return rows or brief, missing


def _find_rows(workdir: Workdir, start: int, last: int) -> tuple[list[metrics.Row], list[int]]:
    """The rows of a run up to its last step, and the steps up to `start` whose rows are missing;
    tells what is damaged.
    """
    path, reports = workdir.path / "metrics.csv", workdir.reports
    there, wrong = metrics.read_checked(path, workdir.identity)
    if wrong:
        print(f"{path}: {' and '.join(wrong)}", file=sys.stderr)
    rows = {int(row["step"]): row for row in there}
    if rows and last == 0 and max(rows) > 0:
        print(f"nothing of the run is left but its rows up to step {max(rows)}: it begins again")
    expected = [step for step in range(last + 1) if reports.has_row(step)]
    missing = [step for step in expected if step not in rows]
    # Steps past the start are taken again, and write their rows from the first that is missing on.
    end = min([last + 1, *(step for step in missing if step > start)])
    rows = [row for step, row in rows.items() if step < end]
    return rows, [step for step in missing if step <= start and start]


def _tell_missing(
    workdir: Workdir, start: int, log: metrics.Log, missing: list[int], snapshots: list[int]
) -> None:
    """Says what became of the rows that were missing, and which snapshots are."""
    again = [step for step in missing if step in log.steps]
    lost = [step for step in missing if step not in log.steps]
    path = workdir.path / "metrics.csv"
    if again:
        processes.say(
            f"{path}: the rows of {_steps(again)} were missing, and are made again by replay"
        )
    if lost:
        processes.say(
            f"{path}: the rows of {_steps(lost)} are lost: replay does not reach them, and nothing "
            f"is guessed"
        )
    due = [step for step in log.results if workdir.reports.has_snapshot(step, log.results)]
    if gone := [step for step in due if step <= start and step not in snapshots]:
        processes.say(f"the snapshots of {_steps(gone)} are gone, and no replay makes them again")


def _tell_gone(config: Config, folder: Path, whole: list[int], aside: list[int], last: int) -> None:
    """Says which of the newest checkpoints that were due by a step are neither there nor put
    aside; older ones may have made room for others.
    """
    interval, room = config.train.checkpoint_interval, config.train.keep_checkpoints - len(aside)
    if not interval or room < 1:
        return
    due = [*range(interval, last + 1, interval)][-room:]
    oldest = whole[0] if len(whole) >= room else 0
    if gone := [step for step in due if step > oldest and step not in {*whole, *aside}]:
        processes.say(
            f"{folder}: there is no checkpoint of {_steps(gone)}: deleted, or not yet written when "
            f"the run ended"
        )


def _steps(steps: list[int]) -> str:
    """Some of the steps, and how many there are."""
    few = ", ".join(map(str, steps[:10]))
    return (
        f"step {few}"
        if len(steps) == 1
        else f"{len(steps)} steps ({few}{', ...' * (len(steps) > 10)})"
    )


def _read_ledger(path: Path, header: dict[str, Any]) -> ledger.Ledger | None:
    """The ledger of a run folder; one that is not this run's is put aside, for the run goes on
    without it.
    """
    if not path.exists():
        return None
    try:
        there = ledger.read(path)
        if not ledger.same_run(there.header, header):
            raise ledger.LedgerError(f"{path} is the ledger of another run")
    except ledger.LedgerError as error:
        print(f"{error}; it is now {set_aside(path)}, and a new one begins", file=sys.stderr)
        return None
    if there.corrupt:
        print(f"{path}: the records of {_steps(there.corrupt)} are damaged", file=sys.stderr)
    before, now = there.header.get("versions"), header["versions"]
    if before != now:
        print(
            f"the run began with {before}, and goes on with {now}: its numbers may differ in their "
            f"last bits",
            file=sys.stderr,
        )
    return there
