"""Checkpoints of AutoGPTQ, GPTQModel and what writes their layout: 4 and 8 bits.

For a weight [out, in]: qweight int32 [in * bits / 32, out], packed along the input features, lowest first; qzeros int32
[groups, out * bits / 32]; scales [groups, out]; g_idx int32 [in], the group of each input feature.
weight[n, k] = (number - zero[g_idx[k], n]) * scale[g_idx[k], n]. The format `gptq` stores zero - 1, `gptq_v2` zero.
With desc_act, g_idx is not sorted: the input features are then stored sorted by group, and the layer's input is
gathered in that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from edgellm_ros.toolchain.quantized.base import PLAIN, Module, QuantReader, group_order
from edgellm_ros.toolchain.quantized.bits import unpack_words
from edgellm_ros.toolchain.quantized.packed import FloatArray, PackedWeight, Scheme

_FORMATS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format: what is added to a stored zero


class Gptq(QuantReader):
    """4 or 8 bits, groups along the input features, in their order or by activation."""

    method = "GPTQ"

    def scan(self) -> None:
        """See QuantReader.scan."""
        self._bits = self.integer("bits", (4, 8))
        self._group = self.group_size()
        layout = str(self.config.get("checkpoint_format") or "gptq")
        if layout not in _FORMATS:
            raise self.error(f"quantization_config: checkpoint_format is {layout!r}; read are {', '.join(_FORMATS)}")
        self._more = _FORMATS[layout]
        self._symmetric = bool(self.config.get("sym", True))
        for name in list(self.tensors.names()):
            if name.endswith(".qweight"):
                self._scan_module(name.removesuffix(".qweight"))
        self.reject_leftovers((".qweight", ".qzeros", ".scales", ".g_idx"))
        if not self.config.get("modules_in_block_to_quantize"):  # which names what is quantised instead
            self.check_covered(self._skipped())

    def describe(self) -> str:
        """See QuantReader.describe."""
        schemes = [m.scheme for m in self.modules.values()]
        text = f"GPTQ, {self._bits} bit in groups of {self._group}"
        text += " with zero points" if any(s.offset for s in schemes) else ""
        return text + (", in activation order" if any(s.ordered for s in schemes) else "")

    def read(self, module: str) -> PackedWeight:
        """See QuantReader.read."""
        return next(self.read_parts(module, self.modules[module].shape[0]))

    def read_parts(self, module: str, step: int) -> Iterator[PackedWeight]:
        """See QuantReader.read_parts; the words are read at once, and unpacked in parts."""
        words, scales = self.tensors.raw(f"{module}.qweight"), self.tensors.floats(f"{module}.scales")
        for start in range(0, words.shape[1], step):
            part = slice(start, start + step)
            yield self._unpack(module, words[:, part], scales[:, part], start)

    def _unpack(self, module: str, words: npt.NDArray[np.int32], scales: FloatArray, start: int) -> PackedWeight:
        """Rows of the weight, from `start` on, out of their columns of what is stored."""
        info, rows = self.modules[module], words.shape[1]
        columns = info.shape[1]
        middle = 1 << (self._bits - 1)
        numbers = unpack_words(words.T, self._bits, columns)
        values = (numbers ^ middle).view(np.int8) if self._bits == 8 else numbers.view(np.int8) - np.int8(middle)
        scale = np.ascontiguousarray(scales.T)
        offset = None
        if info.scheme.offset:
            zeros = self._zeros(module, info.shape[0])[:, start : start + rows]
            offset = (middle - zeros.T.astype(np.float32)) * scale
        order = None
        if info.scheme.ordered:
            order = group_order(self.tensors.raw(f"{module}.g_idx"))
            values = values[:, order]
        return PackedWeight(info.scheme.kind, info.scheme.group, values, scale, offset, order=order)

    def _zeros(self, module: str, rows: int) -> npt.NDArray[np.int32]:
        """(groups, out)."""
        stored = unpack_words(self.tensors.raw(f"{module}.qzeros"), self._bits, rows)
        return stored.astype(np.int32) + self._more

    def _scan_module(self, module: str) -> None:
        stored = self.tensors.shape(f"{module}.qweight")
        if len(stored) != 2:
            raise self.error(f"{module}.qweight is {list(stored)}; GPTQ needs two axes")
        columns, rows = stored[0] * 32 // self._bits, stored[1]
        why = f"GPTQ with {self._bits} bits"
        self.need(f"{module}.qweight", [stored], ["I32"], why)
        groups = self.groups(module, columns, self._group)
        why += f" and groups of {self._group}"
        self.need(f"{module}.scales", [(groups, rows)], PLAIN, why)
        self.need(f"{module}.qzeros", [(groups, rows * self._bits // 32)], ["I32"], why)
        ordered = False
        if f"{module}.g_idx" in self.tensors:
            self.need(f"{module}.g_idx", [(columns,)], ["I32", "I64"], why)
            ordered = self._check_order(module, groups)
        zeros = self._zeros(module, rows)
        middle = 1 << (self._bits - 1)
        if self._symmetric and (zeros != middle).any():
            found = f"{zeros.min()} to {zeros.max()} instead of {middle}"
            remedy = "correct sym, or checkpoint_format (gptq stores them less 1, gptq_v2 does not)"
            raise self.error(f"quantization_config says sym, yet {module}.qzeros has zero points from {found}", remedy)
        kind = "int4" if self._bits == 4 else "int8"
        offset = not self._symmetric
        scheme = Scheme(kind, max(self._group, 0), offset, ordered=ordered, zero_points=offset and kind == "int4")
        self.modules[module] = Module((rows, columns), scheme)

    def _check_order(self, module: str, groups: int) -> bool:
        """Whether the features are not sorted by group."""
        ordered = self.check_order(f"{module}.g_idx", self.tensors.raw(f"{module}.g_idx"), groups)
        if ordered and not self.config.get("desc_act", False):
            raise self.error(
                f"{module}.g_idx is not sorted, yet quantization_config says desc_act false", "correct desc_act"
            )
        return ordered

    def _skipped(self) -> list[str]:
        """What GPTQModel's `dynamic` leaves out; it may also change settings for some layers, which is not read."""
        dynamic = self.config.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise self.error(f"quantization_config: dynamic is {dynamic!r}; it must be an object")
        changed = [key for key in dynamic if not key.startswith("-:")]
        if changed:
            raise self.error(f"quantization_config: dynamic gives {changed[0]!r} settings of its own: not read")
        return ["re:" + key.removeprefix("-:") for key in dynamic]
