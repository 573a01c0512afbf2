"""The tokenizer that the metadata of a GGUF file describes, as Hugging Face's `tokenizers` builds
it.
"""

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors

from zo_jax.models.tokenizer import Tokenizer

# How text is cut into words before it is encoded, by the name in `tokenizer.ggml.pre`. None: as
# GPT-2 does.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _WORDS % "1,3",
    "llama3": _WORDS % "1,3",
    "qwen2": _WORDS % "1",
    "tekken": _TEKKEN,
}
# Their vocabularies have whole words that no merges make, and their texts begin with a token.
_LLAMA_3 = ("llama-bpe", "llama3", "tekken")
# Kinds of tokens in `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4


def from_gguf(metadata: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer, or None where the file has none.

    Args:
      metadata: the values of the file by their keys.

    Raises:
      ValueError: a kind of tokenizer, or of cutting words, that is not known here.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    kind, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"the tokenizer of a GGUF file must be gpt2 or llama; got {kind!r}")
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        f"{name}_token": tokens[metadata[key]]
        for name in ("bos", "eos", "unk", "pad")
        if (key := f"tokenizer.ggml.{_LONG.get(name, name)}_token_id") in metadata
    }
    backend = _byte_level(metadata, pre) if kind == "gpt2" else _sentencepiece(metadata, special)
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for token, token_kind in zip(tokens, kinds, strict=False):
        if token_kind == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif token_kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    begins = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _LLAMA_3)
    if begins and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    return Tokenizer(backend, metadata.get("tokenizer.chat_template"), special)


_LONG = {"unk": "unknown", "pad": "padding"}


def _byte_level(metadata: dict[str, Any], pre: str) -> tokenizers.Tokenizer:
    """Byte-level BPE with the file's merges."""
    if pre not in _CUTS:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of {', '.join(_CUTS)}; got {pre!r}; take the model's "
            f"Hugging Face folder"
        )
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, ignore_merges=pre in _LLAMA_3)
    )
    cut = _CUTS[pre]
    if cut is None:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if pre == "smollm":
            steps = [pre_tokenizers.Digits(individual_digits=True), *steps]
    else:
        steps = [
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: dict[str, Any], special: dict[str, str]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: a pair is merged before another if what it makes has the better
    score.
    """
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        ranked += [(-score, pair) for pair in pairs]
    merges = [pair for _, pair in sorted(ranked, key=lambda entry: entry[0])]
    model = tokenizers.models.BPE(
        vocab, merges, unk_token=special.get("unk_token"), fuse_unk=True, byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix, strip = [normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]
    backend.normalizer = normalizers.Sequence(
        [*prefix[: int(has_prefix)], normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *strip[: int(has_prefix)],
        ]
    )
    return backend
