"""Checkpoints of AutoAWQ and what writes its GEMM layout.

For a weight [out, in]: qweight int32 [in, out / 8], eight 4-bit numbers a word; qzeros int32 [in / group, out / 8];
scales [in / group, out]. weight = (number - zero) * scale. A word holds its eight columns in the order of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.toolchain.quantized.base import PLAIN, Module, QuantReader, text_list
from edgellm_ros.toolchain.quantized.bits import unpack_words
from edgellm_ros.toolchain.quantized.packed import PackedWeight, Scheme

# Nibble i of a word, from the lowest, is column _COLUMNS[i] of its eight (AutoAWQ: awq/utils/packing_utils.py).
_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = np.argsort(_COLUMNS)  # where column j is
_MIDDLE = 8
_LAYOUT_KEYS = ("version", "format", "checkpoint_format")


class Awq(QuantReader):
    """4 bits, groups along the input features."""

    method = "AWQ"

    def scan(self) -> None:
        """See QuantReader.scan."""
        bits = "bits" if "bits" in self.config else "w_bit"
        self.integer(bits, (4,))
        layout = next((self.config[k] for k in _LAYOUT_KEYS if self.config.get(k)), "gemm")
        if str(layout).lower() != "gemm":
            raise self.error(f"quantization_config: version is {layout!r}; read is gemm")
        self._group = self.group_size("group_size" if "group_size" in self.config else "q_group_size")
        excluded = text_list(self.config.get("modules_to_not_convert"))
        for name in list(self.tensors.names()):
            if name.endswith(".qweight"):
                self._scan_module(name.removesuffix(".qweight"))
        self.folded = True  # its quantiser always does
        self.reject_leftovers((".qweight", ".qzeros", ".scales"))
        self.check_covered(excluded, prefixes=True)

    def describe(self) -> str:
        """See QuantReader.describe."""
        zeros = any(m.scheme.offset for m in self.modules.values())
        return f"AWQ, 4 bit in groups of {self._group}" + (" with zero points" if zeros else "")

    def read(self, module: str) -> PackedWeight:
        """See QuantReader.read."""
        return next(self.read_parts(module, self.modules[module].shape[0]))

    def read_parts(self, module: str, step: int) -> Iterator[PackedWeight]:
        """See QuantReader.read_parts; the words are read at once, and unpacked in parts."""
        scheme = self.modules[module].scheme
        words, scales = self.tensors.raw(f"{module}.qweight"), self.tensors.floats(f"{module}.scales")
        zero_words = self.tensors.raw(f"{module}.qzeros") if scheme.offset else None
        for start in range(0, scales.shape[1], step):
            rows, of_words = slice(start, start + step), slice(start // 8, (start + step) // 8)
            values = _numbers(words[:, of_words]).T.view(np.int8) - np.int8(_MIDDLE)  # (out, in)
            scale = np.ascontiguousarray(scales[:, rows].T)
            offset = None
            if zero_words is not None:
                offset = (_MIDDLE - _numbers(zero_words[:, of_words]).T.astype(np.float32)) * scale
            yield PackedWeight("int4", scheme.group, values, scale, offset)

    def _scan_module(self, module: str) -> None:
        stored = self.tensors.shape(f"{module}.qweight")
        if len(stored) != 2:
            raise self.error(f"{module}.qweight is {list(stored)}; AWQ needs two axes")
        columns, words = stored
        rows, why = words * 8, "AWQ"
        self.need(f"{module}.qweight", [stored], ["I32"], why)
        groups = self.groups(module, columns, self._group)
        why = f"AWQ with groups of {self._group}"
        self.need(f"{module}.scales", [(groups, rows)], PLAIN, why)
        zeros = bool(self.config.get("zero_point", True)) or f"{module}.qzeros" in self.tensors
        if zeros:
            self.need(f"{module}.qzeros", [(groups, words)], ["I32"], why + " and zero_point")
        scheme = Scheme("int4", max(self._group, 0), offset=zeros, zero_points=zeros)
        self.modules[module] = Module((rows, columns), scheme)


def _numbers(words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Words to eight times as many numbers, columns in order."""
    packed = unpack_words(words, 4, 8 * words.shape[1])
    return packed.reshape(len(packed), -1, 8)[..., _PLACE].reshape(len(packed), -1)
