"""What a model's parameters are called: in the pytree, in Hugging Face's files and in GGUF's."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of the parameters.

    Attributes:
      shape: with the axis of layers in front where there is one.
      hf: the tensor's name in Hugging Face's files, without the prefix of the body; "{}" stands for
        the layer.
      gguf: its name in a GGUF file.
      transposed: whether Hugging Face has it [in, out] (GPT-2's).
    """

    shape: tuple[int, ...]
    hf: str
    gguf: str
    transposed: bool = False

    @property
    def is_stacked(self) -> bool:
        return "{}" in self.hf

    @property
    def num_tensors(self) -> int:
        return self.shape[0] if self.is_stacked else 1

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of one layer."""
        return self.shape[1:] if self.is_stacked else self.shape


def matrix(
    hf: str,
    gguf: str,
    shape: tuple[int, ...],
    *,
    bias: bool = False,
    transposed: bool = False,
) -> dict[str, Leaf]:
    """A weight [..., out, in] and perhaps its bias [..., out]."""
    part = {"weight": Leaf(shape, f"{hf}.weight", f"{gguf}.weight", transposed)}
    return part | (_bias(hf, gguf, shape[:-1]) if bias else {})


def norm(hf: str, gguf: str, shape: tuple[int, ...], *, bias: bool = False) -> dict[str, Leaf]:
    """A scale [..., C] and perhaps a bias; the files call the scale a weight."""
    part = {"scale": Leaf(shape, f"{hf}.weight", f"{gguf}.weight")}
    return part | (_bias(hf, gguf, shape) if bias else {})


def _bias(hf: str, gguf: str, shape: tuple[int, ...]) -> dict[str, Leaf]:
    return {"bias": Leaf(shape, f"{hf}.bias", f"{gguf}.bias")}
