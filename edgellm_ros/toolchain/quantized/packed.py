"""A quantised weight in the terms that all formats share: small numbers, a scale for each group, maybe an offset.

    weight[n, k] = (value[n, k] * scale[n, k // group] + offset[n, k // group]) * input_factor[k]

(column j being input feature order[j], where a checkpoint groups features by importance instead of place).
Values are kept as the checkpoint has them; only their packing and, where a group must become smaller, the number of
times a scale is stored change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import CheckpointError
from edgellm_ros.executors.small_floats import E2M1, e4m3

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int8]

INTEGERS = ("int4", "int8")
NVFP4_GROUP = 16


@dataclass(frozen=True)
class ActivationScale:
    """A layer's input is rounded to multiples of `value`: whole numbers, or those of FP8 (E4M3)."""

    kind: str  # int8, fp8
    value: float
    factor: FloatArray | None = None  # (in,) multiplies the input before; dequantised weights have it already


@dataclass(frozen=True)
class Scheme:
    """What a module's tensors are, known before they are read."""

    kind: str  # int4, int8, fp8, nvfp4
    group: int  # input features that share a scale; 0: the whole row
    offset: bool = False
    input_factor: bool = False
    ordered: bool = False  # the input features are stored in another order
    zero_points: bool = False  # offsets are whole numbers of scales, small enough for int8 to hold value and offset


@dataclass(frozen=True)
class PackedWeight:
    """One linear layer's quantised weight, (out, in), or several stacked along `out`."""

    kind: str  # int4, int8, fp8, nvfp4
    group: int  # as Scheme's; never 0 for int4, int8 and nvfp4 with as many scales as in / group
    values: npt.NDArray[Any]  # int4, int8: (out, in) int8; fp8: (out, in) bytes; nvfp4: (out, in / 2) bytes, low first
    scale: FloatArray  # (out, in / group); nvfp4: E4M3 numbers, without the global scale
    offset: FloatArray | None = None  # as scale
    input_factor: FloatArray | None = None  # (in,)
    global_scale: FloatArray | None = None  # nvfp4: (out,)
    order: npt.NDArray[np.int32] | None = None  # (in,): which input feature each column is; None: its own

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.values.shape
        return rows, columns * (2 if self.kind == "nvfp4" else 1)

    @property
    def scheme(self) -> Scheme:
        """Without the data."""
        group = 0 if self.scale.shape[1] == 1 and self.kind == "fp8" else self.group
        return Scheme(
            self.kind, group, self.offset is not None, self.input_factor is not None, self.order is not None
        )

    def take(self, rows: Any) -> PackedWeight:
        """Only these rows, a slice or an index array, in this order."""
        return replace(
            self,
            values=self.values[rows],
            scale=self.scale[rows],
            offset=None if self.offset is None else self.offset[rows],
            global_scale=None if self.global_scale is None else self.global_scale[rows],
        )

    def times_rows(self, factors: FloatArray) -> PackedWeight:
        """The same integers for the weight times (out,) `factors`."""
        if self.global_scale is not None:
            return replace(self, global_scale=self.global_scale * factors)
        offset = None if self.offset is None else self.offset * factors[:, None]
        return replace(self, scale=self.scale * factors[:, None], offset=offset)

    def dequantize(self) -> FloatArray:
        """(out, in) fp32, the input's factor included and its features in their own order."""
        rows, columns = self.shape
        grouped = self.numbers().reshape(rows, self.scale.shape[1], -1)
        grouped *= self.scale[..., None]
        if self.global_scale is not None:
            grouped *= self.global_scale[:, None, None]
        if self.offset is not None:
            grouped += self.offset[..., None]
        weight: FloatArray = grouped.reshape(rows, columns)
        if self.order is not None:
            weight = weight[:, np.argsort(self.order)]
        if self.input_factor is not None:
            weight *= self.input_factor
        return weight

    def numbers(self) -> FloatArray:
        """(out, in) fp32: the values without any scale."""
        if self.kind == "fp8":
            return e4m3(self.values)
        if self.kind == "nvfp4":
            return E2M1[np.stack([self.values & 15, self.values >> 4], -1).reshape(self.shape)]
        return self.values.astype(np.float32)

    def regroup(self, group: int) -> PackedWeight:
        """The same weight with its scales repeated for groups of `group`, which must divide the present ones."""
        columns = self.shape[1]
        present = columns // self.scale.shape[1]
        assert present % group == 0 and columns % group == 0, (present, group, columns)
        times = present // group
        if times == 1:
            return replace(self, group=group)
        offset = None if self.offset is None else np.repeat(self.offset, times, 1)
        return replace(self, group=group, scale=np.repeat(self.scale, times, 1), offset=offset)


def stack(parts: list[PackedWeight], name: str) -> PackedWeight:
    """Weights that share an input, of one kind and group, as one.

    Raises CheckpointError when they multiply the input by different factors.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    assert len({(p.kind, p.scale.shape[1]) for p in parts}) == 1, name
    factors = [np.ones(first.shape[1], np.float32) if p.input_factor is None else p.input_factor for p in parts]
    if any(not np.array_equal(f, factors[0]) for f in factors[1:]):
        raise CheckpointError(
            f"{name}: the layers that share this input multiply it by different pre_quant_scale; allowed is one; "
            "quantise again with ModelOpt's export_hf_checkpoint, which unifies them, or export with --weights int4"
        )
    orders = [np.arange(first.shape[1], dtype=np.int32) if p.order is None else p.order for p in parts]
    if any(not np.array_equal(o, orders[0]) for o in orders[1:]):
        raise CheckpointError(
            f"{name}: the layers that share this input have its features in different orders (g_idx); allowed is one; "
            "quantise again without desc_act, or export with --weights int4"
        )
    offset = None
    if any(p.offset is not None for p in parts):
        offset = np.concatenate([np.zeros_like(p.scale) if p.offset is None else p.offset for p in parts])
    return PackedWeight(
        first.kind,
        first.group,
        np.concatenate([p.values for p in parts]),
        np.concatenate([p.scale for p in parts]),
        offset,
        factors[0] if any(p.input_factor is not None for p in parts) else None,
        None if first.global_scale is None else np.concatenate([_global(p) for p in parts]),
        orders[0] if any(p.order is not None for p in parts) else None,
    )


def _global(part: PackedWeight) -> FloatArray:
    assert part.global_scale is not None
    return part.global_scale


def common_group(groups: list[int], columns: int) -> int:
    """The largest group of scales that divides all of `groups`; 0 stands for a whole row of `columns`."""
    return math.gcd(*(group or columns for group in groups))
