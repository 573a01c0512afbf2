"""Text to tokens and back, and conversations to text, by what a model's folder says."""

from collections.abc import Sequence
import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import numpy as np
import tokenizers

from zo_jax.atomic import write_atomic


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with its conversation template.

    Attributes:
      backend: Hugging Face's `tokenizers.Tokenizer`.
      chat_template: Jinja source, or None.
      special: names of special tokens, like {"bos_token": "<s>"}, which templates use.
    """

    backend: tokenizers.Tokenizer
    chat_template: str | None = None
    special: dict[str, str] = dataclasses.field(default_factory=dict)

    def encode(self, text: str, *, special: bool = True) -> np.ndarray:
        """Token ids, int32 [num_tokens]; with `special` those that the tokenizer puts around a
        text, like one that begins it.
        """
        return np.asarray(self.backend.encode(text, add_special_tokens=special).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """The text of token ids; without `special` the special ones are left out."""
        return self.backend.decode(
            np.asarray(ids, np.int64).tolist(), skip_special_tokens=not special
        )

    def chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, by the model's template; encode it with `special=False`.

        Args:
          messages: each with "role" (system, user, assistant) and "content".
          add_generation_prompt: whether the text ends where the assistant begins.

        Raises:
          ValueError: the model has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "the model has no chat template; give the prompt as text, or take an instruct model"
            )
        try:
            return _compile(self.chat_template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self.special
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template fails: {error}") from error

    def write(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        write_atomic(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special}
        if self.chat_template is not None:
            fields["chat_template"] = self.chat_template
        write_atomic(folder / "tokenizer_config.json", json.dumps(fields, indent=2) + "\n")


def from_folder(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, or None where there is no tokenizer.json.

    Raises:
      ValueError: a file is damaged.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{folder / 'tokenizer.json'} is no tokenizer: {error}") from error
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) if path.is_file() else {}
    # A special token is its text, or an object that has it as its content.
    texts = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in fields.items()
        if name in ("bos_token", "eos_token", "unk_token", "pad_token") and value
    }
    return Tokenizer(backend, _template(folder, fields), texts)


def _template(folder: Path, fields: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    template = fields.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _compile(template: str) -> jinja2.Template:
    """With what Hugging Face's templates may call; a template comes with the weights, so it is run
    in a sandbox.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    # Jinja's own would escape characters for HTML.
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(
        x, ensure_ascii=False, indent=indent
    )
    functions = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template, globals=functions)
