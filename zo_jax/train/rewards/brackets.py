"""A reward of nested brackets, and the text and the prompts for it.

python -m zo_jax.train.rewards.brackets DIR    writes DIR/brackets.txt and DIR/prompts.jsonl

A line of the text is a row of brackets of three kinds, each closed by its own; a prompt is the
beginning of one, in which some are open. What is written to it counts if it closes all that is open
and what it opens itself, each bracket by its own kind.
"""

import json
from pathlib import Path
import random
import sys

PAIRS = {"(": ")", "[": "]", "{": "}"}
_DEEPEST, _SHORTEST, _LONGEST = 4, 6, 12


def valid(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """1 for each completion that makes a row of nested brackets of its prompt, else 0.

    >>> valid(["([", "(["], ["])", ")]"], [{}, {}])
    [1.0, 0.0]
    """
    del rows
    return [float(is_nested(a + b)) for a, b in zip(prompts, completions, strict=True)]


def is_nested(text: str) -> bool:
    """Whether each bracket is closed by its own kind, and nothing is left open."""
    opened = []
    for character in text:
        if character in PAIRS:
            opened.append(PAIRS[character])
        elif not opened or opened.pop() != character:
            return False
    return not opened


def make_row(rng: random.Random) -> str:
    """A row of nested brackets of even length."""
    length, text, opened = 2 * rng.randint(_SHORTEST // 2, _LONGEST // 2), "", []
    while len(text) < length:
        room = length - len(text) - len(opened)
        opens = not opened or (room and len(opened) < _DEEPEST and rng.random() < 0.5)
        if opens:
            opened.append(rng.choice("([{"))
            text += opened[-1]
        else:
            text += PAIRS[opened.pop()]
    return text


def make_prompt(rng: random.Random) -> str:
    """The beginning of a row, in which one to four brackets are open."""
    row = make_row(rng)
    depth, places = 0, []
    for i, character in enumerate(row, 1):
        depth += 1 if character in PAIRS else -1
        places += [i] * (depth > 0 and i >= 3)
    return row[: rng.choice(places)] if places else make_prompt(rng)


def write(folder: Path, num_rows: int = 20_000, num_prompts: int = 2_000, seed: int = 0) -> None:
    """The text to learn from, and the prompts, each once."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    rows = [make_row(rng) for _ in range(num_rows)]
    (folder / "brackets.txt").write_text("\n".join(rows) + "\n")
    prompts: dict[str, None] = {}
    while len(prompts) < num_prompts:
        prompts[make_prompt(rng)] = None
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
