"""Processes that call a reward, each call with a time limit.

A process that a call has killed, or that is killed for taking too long, is replaced.
"""

from collections.abc import Sequence
from concurrent import futures
import json
import os
from pathlib import Path
import queue
import selectors
import subprocess
import sys
import time
from typing import Any, NamedTuple
import weakref

import numpy as np

from zo_jax.train.config import ConfigError
from zo_jax.train.data.corpus import digest_text
from zo_jax.train.signals import RunStopped

_WORKER = Path(__file__).parent / "worker.py"
# Seconds in which the file of a reward must be imported.
_START = 120.0


class RewardFailed(RunStopped):
    """A reward that scores nothing any more, in any process; EX_SOFTWARE of sysexits.h."""

    exit_code, together = 70, True


class Call(NamedTuple):
    """What a reward is called with: of each completion its prompt and its row."""

    prompts: list[str]
    completions: list[str]
    rows: list[dict[str, Any]]

    def only(self, i: int) -> "Call":
        return Call([self.prompts[i]], [self.completions[i]], [self.rows[i]])


class _Failed(NamedTuple):
    """Why a call has no scores, and whether because what came were none."""

    reason: str
    is_wrong: bool = False


class _Worker:
    """One process."""

    def __init__(self, path: Path, name: str):
        self._buffer = b""
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the run alone
        )
        try:
            first = self._read(_START)
        except (TimeoutError, EOFError) as error:
            first = {"broken": str(error) or "its process ended"}
        if "broken" in first:
            self.close()
            raise ConfigError(f"objective.path={path}:{name} cannot be used: {first['broken']}")

    def ask(self, call: Call, timeout: float) -> dict[str, Any]:
        """Its answer.

        Raises:
          TimeoutError, EOFError, BrokenPipeError: it is of no more use.
        """
        assert self.process.stdin
        self.process.stdin.write(json.dumps(call).encode() + b"\n")
        self.process.stdin.flush()
        return self._read(timeout)

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self.process.stdout
        end = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError(f"it took longer than {timeout:g} seconds")
                part = os.read(self.process.stdout.fileno(), 1 << 16)
                if not part:
                    raise EOFError("its process ended")
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                try:
                    pipe.close()
                except OSError:  # what was still to be written
                    pass
        self.process.wait()


class Reward:
    """A function of a file, called in processes of their own.

    Attributes:
      num_failed: completions that it has not scored so far.
    """

    def __init__(self, path: str, timeout: float):
        """Of `objective.path`; the processes begin with the first call.

        Raises:
          ConfigError: there is no such file.
        """
        file, _, self.name = path.rpartition(":")
        self.path, self.timeout = Path(file).expanduser().absolute(), timeout
        try:
            self.digest = digest_text([self.path.read_text()])
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"objective.path={path}: {file} cannot be read ({error}); give a Python file and "
                "one of its functions, like my_reward.py:score"
            ) from None
        self.num_failed, self._told, self._reason = 0, 0, ""
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
        for _ in range(self._num_workers):
            self._idle.put(None)
        self._threads = futures.ThreadPoolExecutor(self._num_workers)
        self.close = weakref.finalize(self, _close, self._idle, self._threads)

    def try_out(self, call: Call) -> None:
        """A first call, which may raise, but must not return what are no scores.

        Raises:
          ConfigError: it does, or it cannot be called at all.
        """
        found = self._ask(call)
        if isinstance(found, _Failed) and found.is_wrong:
            raise ConfigError(f"objective.path={self.path}:{self.name}: {found.reason}")

    def score(self, calls: Sequence[Call]) -> np.ndarray:
        """The scores, float64 [calls, completions], each call with as many completions.

        A completion that it fails for has the lowest score of all.

        Raises:
          RewardFailed: it fails for all of them.
        """
        return self.settle(self.ask(calls))

    def ask(self, calls: Sequence[Call]) -> np.ndarray:
        """`score`, but nan where it fails."""
        found = list(self._threads.map(self._score_call, calls))
        if reasons := [reason for one in found for _, reason in one if reason]:
            self._tell(reasons)
        return np.array([[score for score, _ in one] for one in found])

    def settle(self, scores: np.ndarray) -> np.ndarray:
        """What `score` makes of what `ask` gives."""
        failed = np.isnan(scores)
        if failed.all():
            raise RewardFailed(
                f"{self.path.name}:{self.name} failed for each of {scores.size} completions"
                f"{self._reason and f': {self._reason}'}; mend it and begin another run, or raise "
                "objective.timeout"
            )
        return np.where(failed, np.nanmin(scores), scores)

    def _score_call(self, call: Call) -> list[tuple[float, str]]:
        """(score, "") or (nan, reason) of each completion; those of a call that fails are called
        for one by one.
        """
        found = self._ask(call)
        if not isinstance(found, _Failed):
            return [(score, "") for score in found]
        if len(call.prompts) == 1:
            return [(np.nan, found.reason)]
        return [self._score_call(call.only(i))[0] for i in range(len(call.prompts))]

    def _ask(self, call: Call) -> list[float] | _Failed:
        worker = self._idle.get()
        try:
            worker = worker or _Worker(self.path, self.name)
            answer = worker.ask(call, self.timeout)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            assert worker
            worker.close()
            worker = None
            reason = "its process ended" if isinstance(error, BrokenPipeError) else str(error)
            return _Failed(reason)
        finally:
            self._idle.put(worker)
        if "scores" in answer:
            return answer["scores"]
        return _Failed(answer.get("wrong") or answer["error"], "wrong" in answer)

    def _tell(self, reasons: list[str]) -> None:
        """Counts failures, and says so whenever there are twice as many as were told."""
        self.num_failed, self._reason = self.num_failed + len(reasons), reasons[0]
        if self.num_failed >= 2 * self._told:
            self._told = self.num_failed
            print(
                f"{self.path.name}:{self.name} has failed for {self.num_failed} completions so far "
                f"(lowest score of the step): {reasons[-1]}",
                file=sys.stderr,
                flush=True,
            )


def _close(idle: queue.SimpleQueue, threads: futures.ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    while not idle.empty():
        worker = idle.get()
        if worker:
            worker.close()
