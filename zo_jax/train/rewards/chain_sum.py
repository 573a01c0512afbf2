"""Sums of a few small numbers, made and scored by reasoning-gym (`pip install 'zo_jax[rewards]'`).

python -m zo_jax.train.rewards.chain_sum DIR    writes DIR/chain_sum.jsonl

Stojanovski et al., "Reasoning Gym: reasoning environments for reinforcement learning with
verifiable rewards", 2025.
"""

import json
from pathlib import Path
import re
import sys

# Of the sums: two or three numbers of one digit.
_OPTIONS = dict(min_terms=2, max_terms=3, min_digits=1, max_digits=1)
# What is given for a number in the right form, whatever it is.
_FORM = 0.1
_NUMBER = re.compile(r"-?\d+")


def score(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """reasoning-gym's score of the last number that is written, 1 if it is right; a tenth of the
    reward is for a text that is a number and nothing else.
    """
    import reasoning_gym

    del prompts
    right = reasoning_gym.get_score_answer_fn("chain_sum")
    scores = []
    for text, row in zip(completions, rows, strict=True):
        numbers = _NUMBER.findall(text)
        is_right = float(right(numbers[-1], row) == 1.0) if numbers else 0.0
        has_form = bool(_NUMBER.fullmatch(text.strip().rstrip(".")))
        scores.append((1 - _FORM) * is_right + _FORM * has_form)
    return scores


def write(folder: Path, num_rows: int = 2_000, seed: int = 0) -> None:
    """Questions and answers, each question once."""
    import reasoning_gym

    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, str] = {}
    for row in reasoning_gym.create_dataset("chain_sum", size=4 * num_rows, seed=seed, **_OPTIONS):
        found.setdefault(row["question"], row["answer"])
    pairs = list(found.items())[:num_rows]
    lines = [json.dumps({"question": q, "answer": a, "metadata": {}}) for q, a in pairs]
    (folder / "chain_sum.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
