"""What a checkpoint is to the toolchain: a configuration, float32 tensors one at a time, and a tokenizer.

`open_checkpoint` decides by what lies at the path: a Hugging Face directory or a GGUF file.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import CheckpointError
from edgellm_ros.manifest import MANIFEST, TokenSpec
from edgellm_ros.toolchain.quantized.packed import ActivationScale, PackedWeight, Scheme


class Checkpoint(abc.ABC):
    """A trained model on disk. Tensors carry Hugging Face's names and layout ([out, in]) whatever the file's format."""

    path: Path
    kind: str  # "safetensors" or "gguf"
    config: dict[str, Any]  # as Hugging Face's config.json
    folded: bool = False  # whether factors of AWQ or SmoothQuant are in the norms

    @abc.abstractmethod
    def name(self) -> str:
        """What people call the model."""

    @abc.abstractmethod
    def names(self) -> list[str]:
        """All tensor names, in the file's order."""

    @abc.abstractmethod
    def __contains__(self, name: object) -> bool: ...

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; CheckpointError when there is no such tensor."""

    @abc.abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start to stop - 1 of the first axis, as an own float32 array; only they are in memory."""

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The whole tensor as an own float32 array; CheckpointError when there is no such tensor."""
        shape = self.shape(name)
        return self.read_rows(name, 0, shape[0]) if shape else self.read_rows(name, 0, 1).reshape(())

    def quantization(self) -> str:
        """How others quantised it, in a few words; empty when the linear layers are floats."""
        return ""

    def quantization_notes(self) -> list[str]:
        """What of the quantisation is not carried over, such as scales of activations."""
        return []

    def scheme(self, name: str) -> Scheme | None:
        """How the weight `name` is quantised in the file; None when it is floats."""
        return None

    def packed(self, name: str) -> PackedWeight:
        """A quantised weight's integers and scales; only for names that have a `scheme`."""
        raise AssertionError(f"{name} is not quantised")

    def packed_parts(self, name: str, step: int) -> Iterator[PackedWeight]:
        """`packed` in parts of `step` rows, a multiple of 8; the last one may be smaller."""
        whole = self.packed(name)
        for start in range(0, whole.shape[0], step):
            yield whole.take(slice(start, start + step))

    def read_into(self, name: str, out: npt.NDArray[np.float32]) -> None:
        """Write the whole tensor to `out`, contiguous and of its shape: memory used again costs no page faults."""
        out[...] = self.read(name)

    def activation_scale(self, name: str) -> ActivationScale | None:
        """How the input of the weight `name` is rounded where activations are quantised too; None when it is not."""
        return None

    def kv_scales(self, prefix: str) -> tuple[float, float] | None:
        """What keys and values of the layer `prefix` are divided by in an FP8 cache; None where nothing is said."""
        return None

    @abc.abstractmethod
    def num_bytes(self) -> int:
        """Bytes that all tensors take on disk."""

    @abc.abstractmethod
    def source_files(self) -> list[Path]:
        """Every file that was or will be read, for provenance."""

    @abc.abstractmethod
    def tokenizer_json(self) -> str:
        """The text of a tokenizer.json for the `tokenizers` library."""

    @abc.abstractmethod
    def chat_template(self) -> str | None:
        """The provider's Jinja template; None when the model has none."""

    @abc.abstractmethod
    def token_spec(self) -> TokenSpec:
        """The special tokens that the runtime and the chat template need."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the Hugging Face directory or the GGUF file at `path`.

    Raises CheckpointError when there is none, and for files that are missing, truncated or of a kind that export
    cannot read (pickled weights, an unknown quantisation, parts of a split GGUF); the text says what to do.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a directory with config.json, or a .gguf file")
    if path.is_file():
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file; give one, or the directory that holds config.json")
        return _open_gguf(path)
    if not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return _open_gguf(found[0])
        if found:
            raise CheckpointError(f"{path} holds {len(found)} .gguf files; name one, such as {found[0]}")
        if (path / MANIFEST).is_file():
            raise CheckpointError(f"{path} is a bundle; give the checkpoint that it was made from")
        raise CheckpointError(f"{path} has no config.json; it is not a Hugging Face checkpoint, or not a whole one")
    from edgellm_ros.toolchain.hf_checkpoint import HfCheckpoint, quantization_config
    from edgellm_ros.toolchain.quantized_checkpoint import QuantizedCheckpoint
    from edgellm_ros.toolchain.text_part import TEXT_PARTS, TextPartCheckpoint
    from edgellm_ros.toolchain.tokenizer_files import read_json_object

    config = read_json_object(path / "config.json")
    quantised = quantization_config(path, config) is not None
    if str(config.get("model_type")) in TEXT_PARTS and "text_config" in config:
        if quantised:
            raise CheckpointError(f"{path} is a quantised model for images and text; export the original one")
        return TextPartCheckpoint(path)
    return QuantizedCheckpoint(path) if quantised else HfCheckpoint(path)


def _open_gguf(path: Path) -> Checkpoint:
    from edgellm_ros.toolchain.gguf_checkpoint import GgufCheckpoint  # a Hugging Face directory needs no gguf package

    return GgufCheckpoint(path)
