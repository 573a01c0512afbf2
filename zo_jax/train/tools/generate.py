"""Text from a model: its continuation of prompts, or its answer in a conversation.

zo-jax generate MODEL --prompt='The capital of France is'
zo-jax generate RUN --prompt='ROMEO:' --temperature=0.8

MODEL is a Hugging Face folder or a .gguf file, RUN the folder of a run, whose best state is taken,
or its latest. Prompts come after --prompt, or one a line from standard input.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys
from typing import Any

import jax.numpy as jnp

from zo_jax.models import lora
from zo_jax.models.generate import generate
from zo_jax.models.model import Model, load
from zo_jax.train.arguments import Parser, fail, parse
from zo_jax.train.config import ConfigError
from zo_jax.train.export import is_run, load_run


def main(args: Sequence[str]) -> int:
    """Writes texts to standard output, and how fast to standard error; returns the exit code."""
    try:
        options = parse(_parser(), args)
        _run(options)
    except ValueError as error:
        return fail(error)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="zo-jax generate",
        usage="zo-jax generate MODEL_OR_RUN [--prompt=TEXT ...] [--FLAG=VALUE ...]",
        description=__doc__,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL_OR_RUN", help="a model's folder or file, or a run")
    add("--prompt", action="append", default=[], help="a text to go on with; may be repeated")
    add(
        "--chat",
        action="store_true",
        help="prompts are messages of a user, by the model's template",
    )
    add("--system", default="", help="the system's message, with --chat")
    add(
        "--max-tokens",
        type=int,
        default=128,
        help="the most that are written to a prompt (default %(default)s)",
    )
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
    texts = options.prompt or sys.stdin.read().splitlines()
    prompts: list[Any] = [
        _messages(text, options.system) if options.chat else text for text in texts
    ]
    model = _load(options)
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


def _load(options: argparse.Namespace) -> Model:
    if is_run(options.model):
        if options.dtype or options.keep_quantized or options.adapter:
            raise ConfigError(
                "--dtype, --keep-quantized and --adapter are of a model's files; a run has its own"
            )
        return load_run(options.model)
    dtype = options.dtype and jnp.dtype(options.dtype)
    return load(options.model, dtype, keep_quantized=options.keep_quantized)


def _messages(text: str, system: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]
