"""A Hugging Face directory whose linear layers are quantised: the same names and shapes as the original's.

Reading a weight dequantises it; `packed` gives its integers and scales instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm_ros.toolchain.hf_checkpoint import HfCheckpoint, quantization_config
from edgellm_ros.toolchain.quantized.base import Tensors
from edgellm_ros.toolchain.quantized.create import create_reader
from edgellm_ros.toolchain.quantized.packed import ActivationScale, PackedWeight, Scheme


class QuantizedCheckpoint(HfCheckpoint):
    """Every reader in toolchain/quantized/ behind one face."""

    def __init__(self, path: Path) -> None:
        """Map the files and check the quantisation config against every tensor; nothing is read yet."""
        super().__init__(path)
        self._reader = create_reader(quantization_config(path, self.config), Tensors(path, self._home))
        self._modules = {f"{module}.weight": module for module in self._reader.modules}
        self.folded = self._reader.folded
        plain = [name for name in self._home if name not in self._reader.parts]
        self._names = dict.fromkeys([*plain, *self._modules])

    def names(self) -> list[str]:
        """All tensors, a quantised layer's as one `.weight`."""
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; a quantised weight's is (out, in)."""
        return self._reader.modules[self._modules[name]].shape if name in self._modules else super().shape(name)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start to stop - 1, dequantised."""
        if name not in self._modules:
            return super().read_rows(name, start, stop)
        return self._reader.read(self._modules[name]).take(slice(start, stop)).dequantize()

    def read_into(self, name: str, out: npt.NDArray[np.float32]) -> None:
        """See Checkpoint.read_into."""
        if name in self._modules:
            out[...] = self.read(name)
        else:
            super().read_into(name, out)

    def quantization(self) -> str:
        """See Checkpoint.quantization."""
        return self._reader.describe()

    def quantization_notes(self) -> list[str]:
        """See Checkpoint.quantization_notes."""
        return list(self._reader.notes)

    def scheme(self, name: str) -> Scheme | None:
        """See Checkpoint.scheme."""
        return self._reader.modules[self._modules[name]].scheme if name in self._modules else None

    def activation_scale(self, name: str) -> ActivationScale | None:
        """See Checkpoint.activation_scale."""
        return self._reader.activation_scale(self._modules[name]) if name in self._modules else None

    def kv_scales(self, prefix: str) -> tuple[float, float] | None:
        """See Checkpoint.kv_scales."""
        return self._reader.kv_scales(prefix)

    def packed_parts(self, name: str, step: int) -> Iterator[PackedWeight]:
        """See Checkpoint.packed_parts."""
        return self._reader.read_parts(self._modules[name], step)

    def packed(self, name: str) -> PackedWeight:
        """See Checkpoint.packed."""
        return self._reader.read(self._modules[name])
