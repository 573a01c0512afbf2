"""Several processes as one program: how they find each other, agree, and end together.

Every process runs the same steps on its own devices; the first one writes the files of the run folder, which all of them see.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from zo_jax.train.signals import RunStopped

# Seconds after which a process that is silent counts as dead.
_HEARTBEAT_TIMEOUT = 30


class AnotherProcessFailed(RunStopped):
    """Another process of the same run ended, or lost its connection."""

    exit_code = 76


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes; must come before the first use of a device.

    What is None is found out from the cluster (SLURM, GKE, Cloud TPU, Open MPI). On CPUs they exchange numbers by gloo.

    Raises:
      AnotherProcessFailed: they do not all come, or there is no cluster to ask.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=120,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        raise AnotherProcessFailed(
            f"--distributed: the processes did not come together ({str(error).splitlines()[0]}); give "
            "--coordinator=HOST:PORT, --num_processes and --process_id to each, or start them in a cluster that JAX knows"
        ) from error


@contextlib.contextmanager
def explain_failures() -> Iterator[None]:
    """Inside, what JAX raises when it cannot reach another process says so, and what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise AnotherProcessFailed(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on, most likely because another one ended "
            f"({str(error).splitlines()[0]}); start all of them again, and the run goes on"
        ) from error


def is_first() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints in the first process alone."""
    if is_first():
        print(text, flush=True)


def first_does(work: Callable[[], Any]) -> Any:
    """What `work` returns in the first process, None in the others, which wait for it.

    Raises:
      AnotherProcessFailed: in the others, if it raised in the first.
    """
    if jax.process_count() == 1:
        return work()
    result, error = None, None
    if is_first():
        try:
            result = work()
        except Exception as problem:
            error = problem
    failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
    if error is not None:
        raise error
    if failed:
        raise AnotherProcessFailed("the first process gave up; its message says why")
    return result


def leave(code: int) -> None:
    """Ends this process without waiting for the others, which may be gone or hang; the first one lets them speak before."""
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(1)
    os._exit(code)


@contextlib.contextmanager
def forward_interrupts() -> Iterator[Callable[[int], str | None]]:
    """`stops.catch_signals` for several processes: gives a function that says, after a step, whether all of them stop now.

    JAX's preemption service catches a SIGTERM in any of them, and finds a step that none has passed; a SIGINT is made a
    SIGTERM. All of them must ask after every step.
    """
    before = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield (
            lambda step: "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        )
    finally:
        signal.signal(signal.SIGINT, before)
