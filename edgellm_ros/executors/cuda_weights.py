"""A bundle's stored weight as the arrays that the native loader takes: numbers in the device's format, and scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import BundleError
from edgellm_ros.executors.cuda_formats import FLOATS, folds_factor, folds_order, native_format
from edgellm_ros.executors.small_floats import E2M1, e4m3, nibbles
from edgellm_ros.manifest import LinearFormat, ModelSpec
from edgellm_ros.weight_file import WeightFile

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]

_PART = 1 << 24  # weights that are dequantised at once, whose temporaries a host without much memory still has
_TWICE_E2M1 = (2 * E2M1).astype(np.int8)


def native_weight(weights: WeightFile, stem: str, form: LinearFormat, model: ModelSpec) -> tuple[Array, Array | None]:
    """Values and scales (or None) of the layer `stem`, stored in `form`, as cuda_formats.native_format has it.

    Factor and order of its input are in bf16 columns where no other layer does them.
    Raises BundleError for an offset that is not the zero point which the manifest promises, and scales beyond fp16.
    """
    native, values = native_format(stem, form, model), weights[f"{stem}.weight"]
    if native.format == "bf16":
        factor = weights[f"{stem}.input_factor"] if form.input_factor and not folds_factor(stem, model) else None
        order = np.argsort(weights[f"{stem}.input_order"]) if form.input_order and not folds_order(stem) else None
        if form.scheme in FLOATS and factor is None and order is None:
            return values, None
        return _dequantize(weights, stem, form, factor, order), None
    if native.format == "fp8" and f"{stem}.scale" not in weights:
        return values, None  # floats, which the device rounds
    scale: Array = weights[f"{stem}.scale"]
    if native.format == "fp8":
        return values, scale
    times = form.group_size // native.group
    if native.format == "fp8_blocks":
        return values, np.repeat(scale, times, axis=1) if times > 1 else scale
    if form.scheme == "nvfp4":
        product = e4m3(scale) * weights[f"{stem}.global_scale"][:, None] * np.float32(0.5)
        return _TWICE_E2M1[nibbles(values)], half(product, stem)
    if native.format != "int4" and form.scheme == "int4":
        values = _signed(values)
    if native.format == "int8_offset":
        pairs = np.stack([scale, half(weights[f"{stem}.offset"], stem)], axis=-1)
        return values, np.repeat(pairs, times, axis=1) if times > 1 else pairs
    if form.offset:
        zeros = _zero_points(weights[f"{stem}.offset"], scale, stem)
        grouped = values.reshape(*scale.shape, -1)
        values = (grouped + zeros[..., None]).reshape(values.shape)
    return values, np.repeat(scale, times, axis=1) if times > 1 else scale


def half(scale: FloatArray, stem: str) -> npt.NDArray[np.float16]:
    """Scales in the kernels' fp16; raises BundleError for one that is too large."""
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise BundleError(
            f"{stem} has a scale or offset of {np.abs(scale).max():.3g}, with its input's factor if it has one; the "
            "kernels' are fp16, up to 65504; export again with --weights int4 or int8"
        )
    return rounded


def _signed(packed: Array) -> npt.NDArray[np.int8]:
    both = packed.view(np.int8)
    return np.stack([(both << 4) >> 4, both >> 4], axis=-1).reshape(len(both), -1)


def _zero_points(offset: Array, scale: Array, stem: str) -> npt.NDArray[np.int8]:
    """(out, in / group): what to add to the values."""
    wide = scale.astype(np.float32)
    zeros: FloatArray = np.rint(np.divide(offset, wide, out=np.zeros_like(wide), where=wide != 0))
    # Scales may have been rounded to fp16 after the offset was made of them.
    if np.abs(zeros).max(initial=0) > 15 or (np.abs(offset - zeros * wide) > 2e-3 * np.abs(offset)).any():
        raise BundleError(f"{stem}.offset is not a zero point for each group, as the manifest says; export again")
    return zeros.astype(np.int8)


def _dequantize(
    weights: WeightFile, stem: str, form: LinearFormat, factor: Array | None, order: Array | None
) -> FloatArray:
    """(out, in) fp32, some rows at a time; `order` (in,) is where each input feature's column is stored."""
    values = weights[f"{stem}.weight"]
    scale: Array = np.ones((len(values), 1), np.float32) if form.scheme in FLOATS else weights[f"{stem}.scale"]
    columns = values.shape[1] * (2 if form.scheme in ("int4", "nvfp4") else 1)
    offset = weights[f"{stem}.offset"] if form.offset else None
    levels = weights[f"{stem}.global_scale"] if form.scheme == "nvfp4" else None
    wide = np.empty((len(values), columns), np.float32)
    step = max(_PART // columns, 1)
    for first in range(0, len(values), step):
        rows = slice(first, first + step)
        part = wide[rows]
        scales = e4m3(scale[rows]) if form.scheme == "nvfp4" else scale[rows].astype(np.float32)
        if levels is not None:
            scales *= levels[rows, None]
        scales = scales.reshape(len(part), -1)
        groups = part.reshape(*scales.shape, -1)
        np.multiply(_numbers(values[rows], form.scheme).reshape(groups.shape), scales[..., None], out=groups)
        if offset is not None:
            groups += offset[rows][..., None]
        if order is not None:
            part[...] = part[:, order]
        if factor is not None:
            part *= factor
    return wide


def _numbers(values: Array, scheme: str) -> Array:
    """(rows, columns): the values without any scale."""
    if scheme == "fp8":
        return e4m3(values)
    if scheme == "nvfp4":
        return E2M1[nibbles(values)]
    return _signed(values) if scheme == "int4" else values
