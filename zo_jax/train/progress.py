"""How far a run is, on stderr: a bar in a terminal, a line now and then in a log file."""

import sys
import time

import tqdm

# Seconds between two lines of a log file.
_INTERVAL = 10.0


class Progress:
    """Of the steps of a run."""

    def __init__(self, done: int, num_steps: int, on: bool = True):
        """Begins after `done` of the steps; with `on` false nothing is shown."""
        self._done, self._num_steps, self._told = done, num_steps, time.monotonic()
        self._is_on, self._bar = on, None
        if on and sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=num_steps, initial=done, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, step: int, text: str) -> None:
        """Tells that a step is done, and what of it."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text, refresh=False)
        elif self._is_on and (
            time.monotonic() - self._told >= _INTERVAL or step == self._num_steps
        ):
            self._told = time.monotonic()
            print(f"step {step} of {self._num_steps}: {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line on stdout."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._is_on:
            print(text)
        sys.stdout.flush()
