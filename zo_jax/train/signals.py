"""How a run ends before its last step: with everything saved, a word, and an exit code of its
own.
"""

from collections.abc import Callable, Iterator
import contextlib
import signal
import threading
from types import FrameType


class RunStopped(Exception):
    """The run ended early; the message says how to go on.

    Attributes:
      exit_code: of the program.
      together: whether all processes of the run end so, and can take leave of each other.
    """

    exit_code = 1
    together = False


class Interrupted(RunStopped):
    """A signal or a preemption notice came; EX_TEMPFAIL of sysexits.h says: run the same command
    again.
    """

    exit_code, together = 75, True


class Diverged(RunStopped):
    """Too many steps in a row had no finite loss."""

    exit_code, together = 3, True


class CannotWrite(RunStopped):
    """The run folder cannot be written to; EX_IOERR of sysexits.h."""

    exit_code = 74


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[int], str | None]]:
    """Inside, the first SIGTERM or SIGINT is only noted, and a second one ends the process at once.

    Gives a function that returns, after a step, the name of the signal that came, or None. In a
    thread other than the main one, where Python allows no handlers, signals do what they did.
    """
    came: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None
        return

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        came.append(signal.Signals(number).name)
        for handled in before:
            signal.signal(handled, signal.SIG_DFL)
        print(
            f"\n{came[0]}: finishing the step, then saving; a second signal ends the run at once",
            flush=True,
        )

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, note)
        yield lambda step: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
