"""The command line of `generate`: a model's continuation of prompts, or its answer in a
conversation.
"""

import argparse
from collections.abc import Sequence
import sys
from typing import Any

import jax.numpy as jnp

from zo_jax.models import lora
from zo_jax.models.generate import generate
from zo_jax.models.model import load


def main(args: Sequence[str] | None = None) -> int:
    """Writes texts to standard output, and how fast to standard error.

    Args:
      args: the command line, without the program; None for `sys.argv`.

    Returns:
      The exit code: 0, or 2 with one line that says what was wrong.
    """
    options = _parser().parse_intermixed_args(args)
    try:
        _run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zo-jax generate", description="Text from a pretrained model."
    )
    add = parser.add_argument
    add("model", help="a Hugging Face folder, or a .gguf file")
    add("prompt", nargs="*", help="texts to go on with; standard input where there are none")
    add(
        "--chat",
        action="store_true",
        help="prompts are messages of a user, by the model's template",
    )
    add("--system", default="", help="the system's message, with --chat")
    add("--max-tokens", type=int, default=128, help="the most that are written to a prompt")
    add("--temperature", type=float, default=0.0, help="0 for the likeliest token")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens of so much probability",
    )
    add("--stop", action="append", default=[], help="a string that ends a text; may be repeated")
    add("--seed", type=int, default=0, help="of the draws")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the file's")
    add(
        "--keep-quantized",
        action="store_true",
        help="leave a .gguf file's weights quantised in memory",
    )
    add("--adapter", help="a LoRA adapter's folder, in PEFT's format")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.system and not options.chat:
        raise ValueError("--system needs --chat")
    texts = options.prompt or [sys.stdin.read().removesuffix("\n")]
    prompts: list[Any] = [
        _messages(text, options.system) if options.chat else text for text in texts
    ]
    dtype = options.dtype and jnp.dtype(options.dtype)
    model = load(options.model, dtype, keep_quantized=options.keep_quantized)
    params = model.params
    if options.adapter:
        params = lora.attach(params, lora.load(options.adapter, model))
    out = generate(
        model,
        params,
        prompts,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        stop=options.stop,
        seed=options.seed,
    )
    for text, continued in zip(texts, out.texts, strict=True):
        print(continued.strip() if options.chat else text + continued)
    count = sum(map(len, out.tokens))
    print(f"{count} tokens, {out.tokens_per_second:.1f} a second", file=sys.stderr)


def _messages(text: str, system: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


if __name__ == "__main__":
    sys.exit(main())
