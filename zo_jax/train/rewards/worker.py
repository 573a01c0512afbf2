"""A process that calls a reward: started by the path of this file, so that it has no JAX.

python -P worker.py FILE.py FUNCTION

Requests come on standard input and answers go to standard output, a line of JSON each: [prompts,
completions, rows], and {"scores": [...]}, {"error": "..."} (the function raised) or {"wrong":
"..."} (it returned what are no scores). The first answer is {"ready": true} or {"broken": "..."}.
"""

import importlib.util
import json
import math
import os
from pathlib import Path
import queue
import sys
import threading
import traceback
from typing import Any


class NoScores(ValueError):
    """What a function returned are no scores; the message says why."""


def main(path: str, name: str) -> None:
    """Answers requests until there are no more."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What the function reads is nothing, and what it prints goes where errors go.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, waiting), daemon=True).start()

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    # Its neighbours are found as if it were run.
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        function = load(path, name)
    except BaseException as error:
        answer(broken=tell(error, path))
        return
    answer(ready=True)
    while True:
        prompts, completions, rows = json.loads(waiting.get())
        try:
            answer(scores=checked(function(prompts, completions, rows), len(prompts)))
        except NoScores as error:
            answer(wrong=str(error))
        except BaseException as error:
            answer(error=tell(error, path))


def _listen(requests: Any, waiting: queue.SimpleQueue) -> None:
    """Ends the process with the one that asks, whatever the function is at."""
    for line in requests:
        waiting.put(line)
    os._exit(0)


def load(path: str, name: str) -> Any:
    """The function of a file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise AttributeError(f"it has no function {name}")
    return function


def checked(scores: Any, count: int) -> list[float]:
    """Scores as floats.

    Raises:
      NoScores: they are not `count` finite numbers.
    """
    if isinstance(scores, str | bytes | dict) or not hasattr(scores, "__iter__"):
        raise NoScores(f"it must return a list of scores; got {scores!r:.60}")
    scores = list(scores)
    if len(scores) != count:
        raise NoScores(f"it must return a score for each of {count} completions; got {len(scores)}")
    numbers = []
    for score in scores:
        try:
            number = math.nan if isinstance(score, str | bytes) else float(score)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise NoScores(f"scores must be finite numbers; got {score!r:.60}")
        numbers.append(number)
    return numbers


def tell(error: BaseException, path: str) -> str:
    """What went wrong, and at which line of the file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}" + (f" (line {line})" if line else "")


if __name__ == "__main__":
    main(*sys.argv[1:])
