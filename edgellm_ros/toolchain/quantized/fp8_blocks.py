"""quant_method `fp8`: E4M3 weights as DeepSeek and Qwen publish them, with scales of blocks or of whole tensors.

For a weight [out, in]: weight E4M3 [out, in]; weight_scale_inv (or weight_scale) [ceil(out / rows), ceil(in / columns)]
for weight_block_size [rows, columns], else [] or [out, 1]. It multiplies, whatever its name.
"""

from __future__ import annotations

import math

import numpy as np

from edgellm_ros.toolchain.quantized.base import PLAIN, SMALLEST_GROUP, Module, QuantReader, text_list
from edgellm_ros.toolchain.quantized.packed import ActivationScale, FloatArray, PackedWeight, Scheme

_SCALES = ("weight_scale_inv", "weight_scale")
_EXCLUDED = ("modules_to_not_convert", "ignored_layers")  # transformers' name, AutoFP8's and vLLM's
_ACTIVATIONS = (".input_scale", ".activation_scale", ".input_scale_inv")


class Fp8(QuantReader):
    """Weights, and activations where they have one static scale."""

    method = "FP8"

    def scan(self) -> None:
        """See QuantReader.scan."""
        if self.config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise self.error(f"quantization_config: fmt is {self.config['fmt']!r}; read is e4m3")
        block = self.config.get("weight_block_size")
        whole = isinstance(block, (list, tuple)) and len(block) == 2
        if block is not None and not (whole and all(type(n) is int and n > 0 for n in block)):
            raise self.error(f"quantization_config: weight_block_size is {block!r}; it must be [rows, columns] or null")
        self._scale_of: dict[str, str] = {}
        self._block: tuple[int, int] | None = (block[0], block[1]) if block else None
        for name in list(self.tensors.names()):
            if name.endswith(".weight") and self.tensors.dtype(name) == "F8_E4M3":
                self._scan_module(name.removesuffix(".weight"))
        activations = [name for name in self.tensors.names() if name.endswith(_ACTIVATIONS)]
        self.parts.update(activations)
        if all(self.activation_scale(module) is None for module in self.modules):
            self.notes.append("activations stay floating point: the checkpoint was made for FP8 ones")
        self.reject_leftovers(tuple(f".{scale}" for scale in _SCALES))
        excluded = [name for key in _EXCLUDED for name in text_list(self.config.get(key))]
        self.check_covered(excluded, prefixes=True)

    def describe(self) -> str:
        """See QuantReader.describe."""
        return "FP8" + (f" in blocks of {self._block[0]} x {self._block[1]}" if self._block else "")

    def read(self, module: str) -> PackedWeight:
        """See QuantReader.read."""
        info = self.modules[module]
        scale = self.tensors.floats(f"{module}.{self._scale_of[module]}")
        values = self.tensors.raw(f"{module}.weight")
        if self._block is None:
            return PackedWeight("fp8", 0, values, np.broadcast_to(scale.reshape(-1, 1), (info.shape[0], 1)).copy())
        return PackedWeight("fp8", info.scheme.group, values, spread_blocks(scale, info.shape, self._block))

    def activation_scale(self, module: str) -> ActivationScale | None:
        """See QuantReader.activation_scale: for activation_scheme `static`."""
        name = next((module + s for s in _ACTIVATIONS if module + s in self.tensors), None)
        if name is None or self.config.get("activation_scheme") != "static":
            return None
        scale = self.tensors.floats(name)
        return ActivationScale("fp8", float(scale.reshape(()))) if scale.size == 1 else None

    def _scan_module(self, module: str) -> None:
        name = f"{module}.weight"
        shape = self.tensors.shape(name)
        if len(shape) != 2:
            raise self.error(f"{name} is {list(shape)}; FP8 needs two axes")
        rows, columns = shape
        self.need(name, [shape], ["F8_E4M3"], "FP8")
        suffix = next((s for s in _SCALES if f"{module}.{s}" in self.tensors), _SCALES[0])
        self._scale_of[module] = suffix
        group = 0
        if self._block:
            blocks = (-(-rows // self._block[0]), -(-columns // self._block[1]))
            self.need(f"{module}.{suffix}", [blocks], PLAIN, f"weight_block_size {list(self._block)}")
            group = math.gcd(columns, self._block[1])
            if group % SMALLEST_GROUP:
                raise self.error(
                    f"{module} has {columns} input features in blocks of {self._block[1]}; what is stored are groups "
                    f"that divide both, multiples of {SMALLEST_GROUP}"
                )
        else:
            self.need(f"{module}.{suffix}", [(), (1,), (rows,), (rows, 1)], PLAIN, "FP8 without weight_block_size")
        self.modules[module] = Module((rows, columns), Scheme("fp8", group))


def spread_blocks(scale: FloatArray, shape: tuple[int, int], block: tuple[int, int]) -> FloatArray:
    """Scales of blocks to (out, in / group), group being the largest that divides the input features and a block's."""
    rows, columns = shape
    group = math.gcd(columns, block[1])
    of_group = np.arange(columns // group) * group // block[1]
    wide: FloatArray = scale[np.arange(rows) // block[0]][:, of_group]
    return wide
