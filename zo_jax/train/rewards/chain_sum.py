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
_NUMBER = re.compile(r"-?\d+")


def score(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """The mean of two: reasoning-gym's score of the last number that is written, 1 if it is right;
    and the form, the part of the text that is this number, so 1 for a number and nothing else.
    """
    import reasoning_gym

    del prompts
    right = reasoning_gym.get_score_answer_fn("chain_sum")
    scores = []
    for text, row in zip(completions, rows, strict=True):
        number = next(iter(_NUMBER.findall(text)[::-1]), "")
        form = len(number) / max(1, len(text.strip().rstrip(".")))
        scores.append((form + (number != "" and right(number, row) == 1.0)) / 2)
    return scores


def write(folder: Path, num_rows: int = 2_000, seed: int = 0) -> None:
    """Questions and answers, each question once; a reply is an answer that ends its turn, as
    SmolLM2 and Qwen mark it.
    """
    import reasoning_gym

    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, str] = {}
    for row in reasoning_gym.create_dataset("chain_sum", size=4 * num_rows, seed=seed, **_OPTIONS):
        found.setdefault(row["question"], row["answer"])
    pairs = list(found.items())[:num_rows]
    lines = [
        json.dumps({"question": q, "answer": a, "reply": f"{a}<|im_end|>", "metadata": {}})
        for q, a in pairs
    ]
    (folder / "chain_sum.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
