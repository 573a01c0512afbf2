"""Several processes as one program: how they find each other, agree, and end together.

Every process runs the same steps on its own devices; the first one writes the files of the run
folder, which all of them see.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from typing import Any
import zlib

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from zo_jax.train import lifeline
from zo_jax.train.signals import RunStopped

# Seconds after which a process that is silent counts as dead.
_HEARTBEAT_TIMEOUT = 10
# Seconds for which all of them are waited for at the start and at the end.
_JOIN_TIMEOUT = 120
# Seconds for which a process that lives is waited for.
_PATIENCE = 3600
_turns = itertools.count()
_lifeline: lifeline.Lifeline | None = None


class AnotherProcessFailed(RunStopped):
    """Another process of the same run ended, or lost its connection."""

    exit_code = 76


class ProcessesDiffer(RunStopped):
    """The processes of a run were not started alike; EX_CONFIG of sysexits.h."""

    exit_code, together = 78, True


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --distributed and what belongs to it."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes, of a cluster that JAX knows or of those named next",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
    parser.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process_id", type=int, metavar="I", help="which this is, from 0")


def join_if_asked(args: Sequence[str]) -> None:
    """Joins the other processes if the command line has --distributed, whatever else it has.

    So that a process with a wrong command can tell the others; must come before the first use of a
    device.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_flags(parser)
    try:
        options, _ = parser.parse_known_args(args)
    except argparse.ArgumentError:  # which the parser of all flags explains
        return
    if options.distributed:
        join(options.coordinator, options.num_processes, options.process_id)


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes; must come before the first use of a device.

    What is None is found out from the cluster (SLURM, GKE, Cloud TPU, Open MPI). On CPUs they
    exchange numbers by gloo.

    Raises:
      AnotherProcessFailed: they do not all come, or there is no cluster to ask.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Who has not come cannot be told from who comes late, and JAX would abort with frames.
    too_late = threading.Timer(_JOIN_TIMEOUT, _end_alone)
    too_late.daemon = True
    too_late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=_JOIN_TIMEOUT + 60,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_JOIN_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        raise AnotherProcessFailed(
            f"--distributed: the processes did not come together ({str(error).splitlines()[0]}); "
            f"give "
            "--coordinator=HOST:PORT, --num_processes and --process_id to each, or start them in a "
            "cluster that JAX knows"
        ) from error
    finally:
        too_late.cancel()
    global _lifeline
    host = (distributed.global_state.coordinator_address or "").rpartition(":")[0]
    _lifeline = lifeline.connect(index(), count(), host, exchange, _end_with_the_others)


def _end_alone() -> None:
    """The others have not come."""
    _end_now(
        f"--distributed: not all processes came within {_JOIN_TIMEOUT} s; start all of them, with "
        "the same --coordinator=HOST:PORT and --num_processes"
    )


def _end_with_the_others() -> None:
    """Another process has died, and what this one waits for may never come."""
    _end_now(_gone("its connection is closed"))


def _end_now(reason: Any) -> None:
    """From a thread of its own, while the main one waits for what may never come."""
    print(f"stopped: {reason}", file=sys.stderr, flush=True)
    os._exit(AnotherProcessFailed.exit_code)


def say_goodbye() -> None:
    """Before this process ends as all of them do: with the run, or for a reason that all of them
    know.
    """
    if _lifeline:
        _lifeline.say_goodbye()


@contextlib.contextmanager
def explain_failures() -> Iterator[None]:
    """Inside, what JAX raises when it cannot reach another process says so, and what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if count() == 1:
            raise
        raise _gone(error) from error


def check_alive(error: Exception) -> None:
    """Raises AnotherProcessFailed if what several processes did together failed for want of one of
    them, not of the disk.
    """
    chain, text = error, ""
    while chain is not None:
        text, chain = f"{text} {type(chain).__name__} {chain}", chain.__cause__ or chain.__context__
    words = ("Gloo", "Connection", "arrier", "heartbeat", "coordination", "UNAVAILABLE", "DEADLINE")
    if count() > 1 and any(word in text for word in words):
        raise _gone(error) from error


def _gone(reason: Any) -> AnotherProcessFailed:
    return AnotherProcessFailed(
        f"process {index()} of {count()} cannot go on, most likely because another one ended "
        f"({str(reason).splitlines()[0]}); start all of them again, and the run goes on"
    )


def index() -> int:
    """The number of this process, known before any device is used."""
    return distributed.global_state.process_id


def count() -> int:
    """How many processes there are."""
    return distributed.global_state.num_processes or 1


def is_first() -> bool:
    """Whether this process writes the run's files."""
    return index() == 0


def say(text: str) -> None:
    """Prints in the first process alone."""
    if is_first():
        print(text, flush=True)


def exchange(mine: Any) -> list[Any]:
    """What every process gave [JSON], in their order. All of them must call it, and it waits for
    all.

    Over the coordination service, which is there before any device is used and does not care how
    long a process takes.
    """
    if not jax.distributed.is_initialized():
        return [mine]
    # Values have no public way between processes but through programs of equal shapes, which
    # differing ones have not.
    client, turn = distributed.global_state.client, next(_turns)
    key = lambda turn, i: f"zo_jax/{turn}/{i}"
    try:
        client.key_value_set_bytes(key(turn, index()), zlib.compress(json.dumps(mine).encode()))
        told = [
            json.loads(
                zlib.decompress(client.blocking_key_value_get_bytes(key(turn, i), 1000 * _PATIENCE))
            )
            for i in range(count())
        ]
        if turn:  # all of them have read the turn before, or they would not have written this one
            client.key_value_delete(key(turn - 1, index()))
        return told
    except jax.errors.JaxRuntimeError as error:
        raise _gone(error) from error


def agree(prepare: Callable[[], dict[str, Any]]) -> None:
    """Sees that `prepare` returns the same [JSON] in every process, or fails alike.

    Raises:
      ProcessesDiffer: in all of them, if it does not; the message says in what.
      Exception: what `prepare` raises, if it raises the same in all.
    """
    facts, failure = {}, None
    try:
        facts = prepare()
    except Exception as error:
        failure = error
    word = failure and (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    told = exchange([facts, word])
    words = [word for _, word in told]
    if len({json.dumps(one, sort_keys=True) for one in told}) == 1:
        if failure:
            raise failure
        return
    if any(words):
        different = [
            f"process {i} cannot begin: {word}" for i, word in enumerate(words) if word is not None
        ]
    else:
        different = [
            f"{name} is "
            f"{', '.join(f'{x.get(name)!r} in process {i}' for i, (x, _) in enumerate(told))}"
            for name in dict.fromkeys(name for x, _ in told for name in x)
            if any(x.get(name) != told[0][0].get(name) for x, _ in told)
        ]
    raise ProcessesDiffer(
        f"the processes of the run differ: {'; '.join(different)}; start all of them with the same "
        f"command, files and versions"
    ) from failure


def agree_on_failure(failure: Exception) -> Exception:
    """What to end with, for a process that fails before it has anything for the others to `agree`
    on.
    """

    def fail() -> dict[str, Any]:
        raise failure

    try:
        agree(fail)
    except Exception as error:
        return error
    return failure


def all_agree(holds: bool) -> bool:
    """Whether something holds in every process."""
    return all(exchange(bool(holds)))


def first_tells(work: Callable[[], Any]) -> Any:
    """What `work` returns [JSON] in the first process, in all of them.

    Raises:
      AnotherProcessFailed: in the others, if it raised in the first.
    """
    result, error = None, None
    if is_first():
        try:
            result = work()
        except Exception as problem:
            error = problem
    if count() > 1:
        result, failed = exchange([result, error is not None])[0]
        if failed and error is None:
            raise AnotherProcessFailed("the first process gave up; its message says why")
    if error is not None:
        raise error
    return result


def first_does(work: Callable[[], Any]) -> None:
    """`first_tells` for work that returns nothing."""

    def do() -> None:
        work()

    first_tells(do)


def leave(code: int) -> None:
    """Ends this process without waiting for the others, which may be gone or hang; the first one
    lets them speak before.
    """
    if _lifeline:
        _lifeline.let_go()
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(1)
    os._exit(code)


@contextlib.contextmanager
def forward_interrupts() -> Iterator[Callable[[int], str | None]]:
    """`signals.catch_signals` for several processes: gives a function that says, after a step,
    whether all of them stop now.

    JAX's preemption service catches a SIGTERM in any of them, and finds a step that none has
    passed; a SIGINT is made a SIGTERM. All of them must ask after every step.
    """
    before = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield (
            lambda step: "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        )
    finally:
        signal.signal(signal.SIGINT, before)
