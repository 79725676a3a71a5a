"""Checkpoints of llm-compressor and what writes compressed-tensors: integers, FP8 and NVFP4.

For a weight [out, in], by a group's format:
- pack-quantized: weight_packed int32 [out, in * bits / 32], numbers + 2^(bits - 1), lowest bits first; weight_shape
  [2]; weight_zero_point int32 [out * bits / 32, groups], packed along `out`, where not symmetric.
- int-quantized, float-quantized, naive-quantized: weight int8 or E4M3 [out, in]; weight_zero_point int8 as the scale.
- nvfp4-pack-quantized: weight_packed uint8 [out, in / 2], even input feature low; weight_scale E4M3 [out, in / 16];
  weight_global_scale [1], which divides.
weight_scale is [1] (tensor), [out, 1] (channel), [out, in / group] (group) or a number for each block. With actorder
`group`, weight_g_idx int32 [in] says each input feature's group.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.executors.small_floats import e4m3
from edgellm_ros.toolchain.quantized.base import (
    PLAIN,
    SMALLEST_GROUP,
    Module,
    QuantReader,
    Rows,
    group_order,
    is_excluded,
    text_list,
)
from edgellm_ros.toolchain.quantized.bits import unpack_words
from edgellm_ros.toolchain.quantized.fp8_blocks import spread_blocks
from edgellm_ros.toolchain.quantized.packed import (
    NVFP4_GROUP,
    ActivationScale,
    FloatArray,
    PackedWeight,
    Scheme,
)

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized")
_MIXED = "mixed-precision"
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
_OF_ACTIVATIONS = (
    ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale",
)  # fmt: skip

RECIPE = "recipe.yaml"  # what llm-compressor did, beside the weights


@dataclass(frozen=True)
class _Group:
    """One of config_groups: which layers, and how their weights are quantised."""

    targets: tuple[str, ...]
    format: str
    kind: str  # int4, int8, fp8, nvfp4
    strategy: str
    group: int  # input features; 0: a row
    symmetric: bool
    block: tuple[int, int]


class CompressedTensors(QuantReader):
    """Every layer's group is the first whose targets name it, a name or pattern before the class Linear."""

    method = "compressed-tensors"

    def scan(self) -> None:
        """See QuantReader.scan."""
        self._check_plain_parts()
        groups = self.config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise self.error(f"quantization_config: config_groups is {groups!r}; it must hold at least one group")
        self._groups = [self._read_group(str(name), entry) for name, entry in groups.items()]
        ignored = text_list(self.config.get("ignore"))
        self._of: dict[str, _Group] = {}
        for name in list(self.tensors.names()):
            module, _, last = name.rpartition(".")
            if last == "weight_packed" or (last == "weight" and self.tensors.dtype(name) not in PLAIN):
                self._of[module] = self._find(module, ignored)
                self.modules[module] = self._scan_module(module, self._of[module])
        self._take_activations()
        self.folded = _names_factors(self.path / RECIPE)
        self.reject_leftovers(tuple(f".weight_{s}" for s in ("packed", "scale", "zero_point", "shape", "g_idx")))
        if any("Linear" in group.targets for group in self._groups):
            self.check_covered(ignored)

    def describe(self) -> str:
        """See QuantReader.describe."""
        kinds = Counter((g.format, g.kind, g.group, g.symmetric) for g in self._of.values())
        texts = []
        for form, kind, group, symmetric in kinds:
            zeros = "" if symmetric else " with zero points"
            texts.append(f"{form} {kind}" + (f" in groups of {group}" if group else "") + zeros)
        return "compressed-tensors, " + ", ".join(texts)

    def read(self, module: str) -> PackedWeight:
        """See QuantReader.read."""
        return self._read(module, None)

    def read_parts(self, module: str, step: int) -> Iterator[PackedWeight]:
        """See QuantReader.read_parts."""
        form, whole = self._of[module], self.modules[module].shape[0]
        if form.strategy == "block" or not form.symmetric:  # zero points are packed along the rows
            yield from super().read_parts(module, step)
            return
        for start in range(0, whole, step):
            yield self._read(module, (start, min(start + step, whole)))

    def _read(self, module: str, part: Rows) -> PackedWeight:
        """All rows, or those of `part`."""
        form, info = self._of[module], self.modules[module]
        rows, columns = info.shape
        of_rows = part if self.tensors.shape(f"{module}.weight_scale")[:1] == (rows,) else None
        if part is not None:
            rows = part[1] - part[0]
        if form.kind == "nvfp4":
            scale = e4m3(self.tensors.raw(f"{module}.weight_scale", of_rows))
            whole = 1 / float(self.tensors.floats(f"{module}.weight_global_scale").reshape(()))
            values = self.tensors.raw(f"{module}.weight_packed", part)
            return PackedWeight(
                "nvfp4", NVFP4_GROUP, values, scale, global_scale=np.full(rows, whole, np.float32)
            )
        scale = self._spread(self.tensors.floats(f"{module}.weight_scale", of_rows), form, (rows, columns))
        if form.kind == "fp8":
            return PackedWeight("fp8", info.scheme.group, self.tensors.raw(f"{module}.weight", part), scale)
        bits = 4 if form.kind == "int4" else 8
        if form.format == "pack-quantized":
            numbers = unpack_words(self.tensors.raw(f"{module}.weight_packed", part), bits, columns)
            values = _signed(numbers, bits)
        else:
            values = self.tensors.raw(f"{module}.weight", part)
        offset = None
        if not form.symmetric:
            offset = -self._zeros(module, form, info.shape, bits) * scale
        order = group_order(self.tensors.raw(f"{module}.weight_g_idx")) if info.scheme.ordered else None
        if order is not None:
            values = values[:, order]
        return PackedWeight(form.kind, info.scheme.group, values, scale, offset, order=order)

    def activation_scale(self, module: str) -> ActivationScale | None:
        """See QuantReader.activation_scale: input_scale of a layer whose activations have one static scale."""
        name, kind = f"{module}.input_scale", self._of[module].kind
        if kind not in ("fp8", "int8") or name not in self.tensors or f"{module}.input_zero_point" in self.tensors:
            return None
        scale = self.tensors.floats(name)
        return ActivationScale(kind, float(scale.reshape(()))) if scale.size == 1 else None

    def _zeros(self, module: str, form: _Group, shape: tuple[int, int], bits: int) -> FloatArray:
        raw = self.tensors.raw(f"{module}.weight_zero_point")
        if form.format == "pack-quantized":
            zeros = _signed(unpack_words(raw.T, bits, shape[0]).T, bits)
        else:
            zeros = raw
        return self._spread(zeros.astype(np.float32), form, shape)

    def _spread(self, scale: FloatArray, form: _Group, shape: tuple[int, int]) -> FloatArray:
        """A weight's scales, or what has their shape, to (out, groups)."""
        if form.strategy == "block":
            return spread_blocks(scale, shape, form.block)
        if scale.size == 1:
            return np.full((shape[0], 1), scale.reshape(()), np.float32)
        rows: FloatArray = scale.reshape(shape[0], -1)
        return rows

    def _find(self, module: str, ignored: list[str]) -> _Group:
        named = [g for g in self._groups if is_excluded(module, [t for t in g.targets if t != "Linear"])]
        found = named or [g for g in self._groups if "Linear" in g.targets]
        if is_excluded(module, ignored) or not found:
            why = "ignore names it" if found else "no group of config_groups names it"
            raise self.error(f"{module} is quantised, yet {why}", "correct the quantization_config")
        return found[0]

    def _scan_module(self, module: str, form: _Group) -> Module:
        why = f"{form.format} with {form.kind}"
        packed = form.format in ("pack-quantized", "nvfp4-pack-quantized")
        name = f"{module}.weight_packed" if packed else f"{module}.weight"
        stored = self.tensors.shape(name) if name in self.tensors else ()
        if len(stored) != 2:
            raise self.error(f"{name} is {list(stored) or 'missing'}; {why} needs it with two axes")
        if form.kind == "nvfp4":
            rows, columns = stored[0], stored[1] * 2
            self.need(name, [stored], ["U8"], why)
            self.need(f"{module}.weight_scale", [(rows, self.groups(module, columns, NVFP4_GROUP))], ["F8_E4M3"], why)
            self.need(f"{module}.weight_global_scale", [(1,), ()], ["F32"], why)
            return Module((rows, columns), Scheme("nvfp4", NVFP4_GROUP))
        bits = 4 if form.kind == "int4" else 8
        rows, columns = stored
        if packed:
            self.need(name, [stored], ["I32"], why)
            self.need(f"{module}.weight_shape", [(2,)], ["I64", "I32"], why)
            rows, columns = (int(n) for n in self.tensors.raw(f"{module}.weight_shape"))
            if stored != (rows, -(-columns * bits // 32)):
                raise self.error(
                    f"{name} is {list(stored)}; {why} needs [{rows}, {-(-columns * bits // 32)}] for weight_shape "
                    f"[{rows}, {columns}]"
                )
        else:
            self.need(name, [stored], ["F8_E4M3" if form.kind == "fp8" else "I8"], why)
        shapes, group = self._scale_shapes(module, form, rows, columns)
        why += f" and strategy {form.strategy}" + (f" of {form.group}" if form.group else "")
        self.need(f"{module}.weight_scale", shapes, PLAIN, why)
        if not form.symmetric:
            if packed:
                groups = self.tensors.shape(f"{module}.weight_scale")[1]
                self.need(f"{module}.weight_zero_point", [(-(-rows * bits // 32), groups)], ["I32"], why)
            else:
                self.need(f"{module}.weight_zero_point", shapes, ["I8"], why)
        elif f"{module}.weight_zero_point" in self.tensors:
            raise self.error(f"{module}.weight_zero_point is there, yet quantization_config says symmetric")
        offset, ordered = not form.symmetric, self._is_ordered(module, columns, group)
        scheme = Scheme(form.kind, group, offset, ordered=ordered, zero_points=offset and form.kind == "int4")
        return Module((rows, columns), scheme)

    def _scale_shapes(self, module: str, form: _Group, rows: int, columns: int) -> tuple[list[tuple[int, ...]], int]:
        """What weight_scale may be, and the group of input features that it makes."""
        if form.strategy == "block":
            group = math.gcd(columns, form.block[1])
            self.groups(module, columns, group)
            return [(-(-rows // form.block[0]), -(-columns // form.block[1]))], group
        if form.strategy == "group":
            return [(rows, self.groups(module, columns, form.group))], form.group
        self.groups(module, columns, 0)
        return ([(1,), (), (1, 1)] if form.strategy == "tensor" else [(rows, 1), (rows,)]), 0

    def _is_ordered(self, module: str, columns: int, group: int) -> bool:
        name = f"{module}.weight_g_idx"
        if name not in self.tensors:
            return False
        self.need(name, [(columns,)], ["I32", "I64"], "actorder")
        index = self.tensors.raw(name)
        if (index == -1).all():  # never filled: the order is the features' own
            return False
        return self.check_order(name, index, columns // (group or columns))

    def _read_group(self, name: str, entry: Any) -> _Group:
        weights = entry.get("weights") if isinstance(entry, Mapping) else None
        where = f"quantization_config: config_groups.{name}"
        if not isinstance(weights, Mapping):
            raise self.error(f"{where} has no weights")
        form = entry.get("format") or self.config.get("format")
        if form not in _FORMATS:
            raise self.error(f"{where}: format is {form!r}; read are {', '.join(_FORMATS)}")
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        found = {"4 int": "int4", "8 int": "int8", "8 float": "fp8", "4 float": "nvfp4"}.get(f"{bits} {kind}")
        if found is None or (found == "nvfp4") != (form == "nvfp4-pack-quantized") or (
            found == "fp8" and form == "pack-quantized") or (found == "int4" and form != "pack-quantized"):  # fmt: skip
            raise self.error(f"{where}: num_bits {bits!r} of type {kind!r} as {form} is not read")
        group = weights.get("group_size")
        strategy = weights.get("strategy") or ("group" if group and group > 0 else "channel" if group else "tensor")
        if strategy not in _STRATEGIES:
            raise self.error(f"{where}: strategy is {strategy!r}; read are {', '.join(_STRATEGIES)}")
        if found == "nvfp4":
            if group != NVFP4_GROUP:
                raise self.error(f"{where}: group_size is {group!r}; NVFP4 has {NVFP4_GROUP}")
        elif strategy == "tensor_group" or (strategy == "group" and (type(group) is not int or group < SMALLEST_GROUP)):
            raise self.error(f"{where}: strategy {strategy} with group_size {group!r} is not read")
        block = weights.get("block_structure") or (0, 0)
        if strategy == "block" and not (len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise self.error(f"{where}: block_structure is {block!r}; it must be [rows, columns]")
        symmetric = bool(weights.get("symmetric", True))
        if not symmetric and found not in ("int4", "int8"):
            raise self.error(f"{where}: {found} is not symmetric; only integers have zero points")
        size = int(group or 0) if strategy in ("group", "tensor_group") else 0
        return _Group(
            tuple(text_list(entry.get("targets"))), form, found, strategy, size, symmetric, (block[0], block[1])
        )

    def _check_plain_parts(self) -> None:
        sparsity = self.config.get("sparsity_config") or {}
        if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
            raise self.error(f"quantization_config: sparsity_config has format {sparsity['format']!r}; read is dense")
        transforms = self.config.get("transform_config") or {}
        if isinstance(transforms, Mapping) and transforms.get("config_groups"):
            raise self.error("quantization_config: transform_config rotates weights at run time, which is not read")
        form = self.config.get("format")
        if form not in (*_FORMATS, _MIXED, None):
            raise self.error(f"quantization_config: format is {form!r}; read are {', '.join((*_FORMATS, _MIXED))}")

    def _take_activations(self) -> None:
        groups = self.config.get("config_groups") or {}
        self.parts.update(name for name in self.tensors.names() if name.endswith(_OF_ACTIVATIONS))
        made_for = any(entry.get("input_activations") for entry in groups.values())
        if made_for and all(self.activation_scale(module) is None for module in self.modules):
            self.notes.append("activations stay floating point: the checkpoint was made for quantised ones")
        scheme = self.config.get("kv_cache_scheme")
        if scheme and not any(name.endswith((".k_scale", ".v_scale")) for name in self.tensors.names()):
            self.notes.append("kv_cache_scheme has no scales in the checkpoint: they are 1")
        kind = f"{scheme.get('num_bits')} bit {scheme.get('type')}" if isinstance(scheme, Mapping) else "8 bit float"
        if kind != "8 bit float":
            self.notes.append(f"the checkpoint was made for a KV cache of {kind}; the executors' formats are floats")


def _signed(numbers: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int8]:
    """Numbers from 0 to numbers around 0."""
    if bits == 8:
        numbers = numbers ^ np.uint8(0x80)
        return numbers.view(np.int8)
    values: npt.NDArray[np.int8] = numbers.astype(np.int8) - np.int8(8)
    return values


def _names_factors(recipe: Path) -> bool:
    """Whether llm-compressor's recipe has a step that puts factors into norms; the configuration does not say it."""
    try:
        text = recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return any(f"{step}Modifier" in text for step in ("AWQ", "SmoothQuant"))
