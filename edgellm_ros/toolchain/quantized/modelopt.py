"""Checkpoints of NVIDIA ModelOpt (export_hf_checkpoint): FP8, INT8, INT4 AWQ, W4A8 AWQ and NVFP4.

Layouts, as ModelOpt 0.47 writes them, for a weight [out, in]:
- FP8: weight E4M3 [out, in], weight_scale [] or [out]; FP8_PB_WO: weight_scale [out / 128, 1, in / 128, 1].
- INT8_SQ, W8A16: weight int8 [out, in], weight_scale [out].
- W4A16_AWQ, W4A8_AWQ: weight uint8 [out / 2, in], two rows a byte, the even one in the low nibble; weight_scale
  [out, in / group]. weight_scale_2 of W4A8 turns the dequantised weight into FP8 and is no factor of it.
- NVFP4: weight uint8 [out, in / 2], even input feature low; weight_scale E4M3 [out, in / 16]; weight_scale_2 [].
pre_quant_scale [in] multiplies the input. input_scale, k_scale and v_scale are of activations.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from edgellm_ros.executors.small_floats import e4m3
from edgellm_ros.toolchain.quantized.base import PLAIN, Module, QuantReader, Rows, is_excluded, text_list
from edgellm_ros.toolchain.quantized.fp8_blocks import spread_blocks
from edgellm_ros.toolchain.quantized.packed import NVFP4_GROUP, ActivationScale, PackedWeight, Scheme

CONFIG_FILE = "hf_quant_config.json"
# quant_algo: how the weight is stored, and whether activations have scales as well.
_ALGORITHMS = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "FP8_PB_WO": "fp8 blocks",
    "INT8_SQ": "int8",
    "W8A8_SQ_PER_CHANNEL": "int8",
    "W8A16": "int8",
    "W4A16_AWQ": "int4",
    "INT4_AWQ": "int4",
    "W4A8_AWQ": "int4",
    "NVFP4": "nvfp4",
    "NVFP4_AWQ": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "W4A8_NVFP4_FP8": "nvfp4",
}
_MIXED = "MIXED_PRECISION"
_FOLDING = {"INT8_SQ", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "INT4_AWQ", "W4A8_AWQ", "NVFP4_AWQ"}
_DTYPES = {"fp8": "F8_E4M3", "fp8 blocks": "F8_E4M3", "int8": "I8", "int4": "U8", "nvfp4": "U8"}
_BLOCK = 128
_ACTIVATION_SUFFIXES = (".input_scale", ".k_scale", ".v_scale", ".q_scale", ".weight_scale_2")


class ModelOpt(QuantReader):
    """The unified Hugging Face format."""

    method = "ModelOpt"

    def scan(self) -> None:
        """See QuantReader.scan."""
        self._details = self._read_details()
        layers = self._details.get("quantized_layers")
        self._per_layer: Mapping[str, Any] = layers if isinstance(layers, Mapping) else {}
        self._algorithm = str(self._details.get("quant_algo"))
        if self._algorithm != _MIXED:
            self._kind(self._algorithm)
        excluded = text_list(self._details.get("exclude_modules"))
        self._kinds: dict[str, str] = {}
        for name in list(self.tensors.names()):
            module, _, last = name.rpartition(".")
            if last == "weight" and self.tensors.dtype(name) not in PLAIN:
                self.modules[module] = self._scan_module(module)
            elif "svdquant_lora" in last:
                raise self.error(f"{name}: SVDQuant adds a low-rank product, which is not read")
        if not self.modules:
            raise self.error(f"quant_algo is {self._algorithm}, yet no weight is quantised")
        each = [details for details in self._per_layer.values() if isinstance(details, Mapping)]
        algorithms = {self._algorithm, *(str(details.get("quant_algo")) for details in each)}
        # Export folds what a norm can take, and stores the rest.
        self.folded = bool(algorithms & _FOLDING) and not all(
            f"{module}.pre_quant_scale" in self.tensors
            for module in self.modules if module.endswith(("q_proj", "qkv_proj"))
        )
        self._check_excluded(excluded)
        self._take_activation_scales()
        self.reject_leftovers((".weight_scale", ".pre_quant_scale"))

    def describe(self) -> str:
        """See QuantReader.describe."""
        counts = Counter(m.scheme.kind for m in self.modules.values())
        group = next((m.scheme.group for m in self.modules.values() if m.scheme.group), 0)
        kinds = ", ".join(counts)
        return f"ModelOpt {self._algorithm}, {kinds}" + (f" in groups of {group}" if group else "")

    def read(self, module: str) -> PackedWeight:
        """See QuantReader.read."""
        return self._read(module, None)

    def read_parts(self, module: str, step: int) -> Iterator[PackedWeight]:
        """See QuantReader.read_parts."""
        if self._kinds[module] == "fp8 blocks":
            yield from super().read_parts(module, step)
            return
        for start in range(0, self.modules[module].shape[0], step):
            yield self._read(module, (start, start + step))

    def _read(self, module: str, part: Rows) -> PackedWeight:
        """All rows, or those of `part`."""
        kind, info = self._kinds[module], self.modules[module]
        rows, columns = info.shape
        of_rows = part if rows in self.tensors.shape(f"{module}.weight_scale") else None
        if part is not None:
            part = (part[0], min(part[1], rows))
            rows = part[1] - part[0]
        half = None if part is None else (part[0] // 2, -(-part[1] // 2))
        values = self.tensors.raw(f"{module}.weight", half if kind == "int4" else part)
        scale_name = f"{module}.weight_scale"
        factor = f"{module}.pre_quant_scale"
        input_factor = self.tensors.floats(factor).reshape(columns) if factor in self.parts else None
        if kind == "nvfp4":
            block_scales = e4m3(self.tensors.raw(scale_name, of_rows)).reshape(rows, -1)
            total = np.full(rows, float(self.tensors.floats(f"{module}.weight_scale_2").reshape(())), np.float32)
            return PackedWeight("nvfp4", NVFP4_GROUP, values, block_scales, None, input_factor, total)
        scale = self.tensors.floats(scale_name, of_rows)
        if kind == "int4":
            low, high = values & 15, values >> 4
            unsigned = np.stack([low, high], 1).reshape(rows, columns).astype(np.int8)
            nibbles = np.where(unsigned > 7, unsigned - 16, unsigned).astype(np.int8)
            return PackedWeight("int4", info.scheme.group, nibbles, scale, None, input_factor)
        if kind == "fp8 blocks":
            blocks = scale.reshape(-(-rows // _BLOCK), -1)
            wide = spread_blocks(blocks, info.shape, (_BLOCK, _BLOCK))
            return PackedWeight("fp8", info.scheme.group, values, wide, None, input_factor)
        of_each = np.broadcast_to(scale.reshape(-1, 1), (rows, 1)).copy()
        return PackedWeight(kind, 0, values, of_each, None, input_factor)

    def activation_scale(self, module: str) -> ActivationScale | None:
        """See QuantReader.activation_scale: int8 with int8 weights, else FP8; NVFP4's are not known beforehand."""
        name, kind = f"{module}.input_scale", self._kinds[module]
        if name not in self.tensors or kind == "nvfp4":
            return None
        factor = f"{module}.pre_quant_scale"
        values = self.tensors.floats(factor).reshape(-1) if factor in self.parts else None
        return ActivationScale("int8" if kind == "int8" else "fp8", float(self.tensors.floats(name).max()), values)

    def _scan_module(self, module: str) -> Module:
        name = f"{module}.weight"
        algorithm, group = self._settings(module)
        kind = self._kind(algorithm)
        why = f"quant_algo {algorithm}"
        stored = self.tensors.shape(name)
        if len(stored) != 2:
            raise self.error(f"{name} is {list(stored)}; {why} needs two axes")
        self.need(name, [stored], [_DTYPES[kind]], why)
        rows, columns = (stored[0] * (2 if kind == "int4" else 1), stored[1] * (2 if kind == "nvfp4" else 1))
        self._kinds[module] = kind
        scale = f"{module}.weight_scale"
        if kind in ("int4", "nvfp4"):
            if kind == "nvfp4" and group not in (None, NVFP4_GROUP):
                raise self.error(f"group_size is {group}; NVFP4 has {NVFP4_GROUP}")
            group = NVFP4_GROUP if kind == "nvfp4" else group
            if isinstance(group, bool) or not isinstance(group, int) or group < 1:
                raise self.error(f"group_size of {module} is {group!r}; {why} needs a number of input features")
            groups = self.groups(module, columns, group)
            dtypes = ["F8_E4M3"] if kind == "nvfp4" else list(PLAIN)
            self.need(scale, [(rows, groups)], dtypes, f"{why} with groups of {group}")
            if kind == "nvfp4":
                self.need(f"{module}.weight_scale_2", [(), (1,)], ["F32"], why)
        elif kind == "fp8 blocks":
            blocks = (-(-rows // _BLOCK), -(-columns // _BLOCK))
            group = math.gcd(columns, _BLOCK)
            self.groups(module, columns, group)
            self.need(scale, [blocks, (blocks[0], 1, blocks[1], 1)], PLAIN, why)
        else:
            group = 0
            self.groups(module, columns, 0)
            self.need(scale, [(), (1,), (rows,), (rows, 1)], PLAIN, why)
        factor = f"{module}.pre_quant_scale"
        if factor in self.tensors:
            self.need(factor, [(columns,)], PLAIN, why)
        return Module((rows, columns), Scheme(kind.split()[0], group, input_factor=factor in self.tensors))

    def _settings(self, module: str) -> tuple[str, Any]:
        if self._algorithm != _MIXED:
            return self._algorithm, self._details.get("group_size")
        entry = self._per_layer.get(module)
        if not isinstance(entry, Mapping):
            raise self.error(f"{module}.weight is quantised, yet quantized_layers of {CONFIG_FILE} does not list it")
        return str(entry.get("quant_algo")), entry.get("group_size")

    def _kind(self, algorithm: str) -> str:
        if algorithm not in _ALGORITHMS:
            raise self.error(f"quant_algo is {algorithm}; read are {', '.join(_ALGORITHMS)} and {_MIXED}")
        return _ALGORITHMS[algorithm]

    def _check_excluded(self, excluded: list[str]) -> None:
        if self._algorithm != _MIXED:
            self.check_covered(excluded)
            return
        missing = [name for name in self._per_layer if name not in self.modules and not is_excluded(name, excluded)]
        if missing:
            raise self.error(f"{missing[0]}.weight is not quantised, yet quantized_layers of {CONFIG_FILE} lists it")

    def _take_activation_scales(self) -> None:
        found = [n for n in self.tensors.names() if n.endswith(_ACTIVATION_SUFFIXES) and n not in self.parts]
        self.parts.update(found)
        scaled = {name.removesuffix(".input_scale") for name in found if name.endswith(".input_scale")}
        if any(self._kinds.get(module) == "nvfp4" for module in scaled):
            self.notes.append("activations of nvfp4 layers stay floating point: input_scale is not used")

    def _read_details(self) -> Mapping[str, Any]:
        """The `quantization` object of hf_quant_config.json, or what config.json says in its place."""
        own = {
            "quant_algo": self.config.get("quant_algo"),
            "exclude_modules": self.config.get("ignore", self.config.get("exclude_modules")),
            "quantized_layers": self.config.get("quantized_layers"),
            "group_size": self.config.get("group_size", self._group_of_config_groups()),
        }
        path = self.path / CONFIG_FILE
        if not path.is_file():
            return own
        try:
            details = json.loads(path.read_text(encoding="utf-8"))["quantization"]
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise self.error(f"{CONFIG_FILE} has no readable object `quantization` ({error!r})") from error
        if not isinstance(details, dict):
            raise self.error(f"{CONFIG_FILE}: quantization is {details!r}; it must be an object")
        for key in ("quant_algo", "group_size"):
            if own[key] is not None and details.get(key) is not None and own[key] != details[key]:
                raise self.error(f"{key} is {details[key]!r} in {CONFIG_FILE} and {own[key]!r} in config.json",
                                 "they must agree: download both again")  # fmt: skip
        return {**own, **{key: value for key, value in details.items() if value is not None}}

    def _group_of_config_groups(self) -> Any:
        groups = self.config.get("config_groups")
        first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
        weights = first.get("weights") if isinstance(first, Mapping) else None
        return weights.get("group_size") if isinstance(weights, Mapping) else None
