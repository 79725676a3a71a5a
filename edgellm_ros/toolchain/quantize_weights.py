"""Round-to-nearest weight quantisation in groups along the input features, with a small search for the best scale.

Each int4 group tries a few scales around max|w| / 8 and keeps the one with the least squared error, weighted by the
squared weight itself: as llama.cpp does without calibration data, because clipping a large weight costs more than its
square. On SmolLM2-135M this beats both the plain scale and the unweighted search.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

# Multiples of the plain scale that are tried for each group. The scale takes the sign that makes the largest weight -8,
# which exists while +8 does not.
_INT4_FACTORS = (1.08, 1.0, 0.95, 0.9)
_WEIGHTS_AT_ONCE = 1 << 17  # quantised together, so that the temporaries stay in a core's cache: 3 times faster


def quantize_int4(weight: FloatArray, group: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """Quantise (out, in) fp32 to signed nibbles.

    Returns (out, in / 2) bytes with the even input feature in the low nibble, and (out, in / group) fp16 scales;
    weight ≈ nibble * scale, nibbles -8 to 7.
    """
    rows, columns = weight.shape
    packed = np.empty((rows, columns // 2), np.uint8)
    scales = np.empty((rows, columns // group), np.float16)

    def quantize(part: slice) -> None:
        block = weight[part]
        nibbles, scale = _best_int4(block.reshape(-1, group))
        flat = nibbles.reshape(block.shape).view(np.uint8) & 0xF
        packed[part] = flat[:, 0::2] | (flat[:, 1::2] << 4)
        scales[part] = scale.reshape(len(block), -1)

    _in_parts(quantize, rows, columns)
    return packed, scales


def dequantize_int4(packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.float16], group: int) -> FloatArray:
    """Undo `quantize_int4`: (out, in) fp32."""
    rows = packed.shape[0]
    unsigned = np.stack([packed & 0xF, packed >> 4], -1).reshape(rows, -1).astype(np.int8)
    nibbles = np.where(unsigned > 7, unsigned - 16, unsigned)
    return (nibbles.reshape(rows, -1, group) * scales.astype(np.float32)[..., None]).reshape(rows, -1)


def quantize_int8(weight: FloatArray, group: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Quantise (out, in) fp32 to (out, in) int8 and (out, in / group) fp16 scales; weight ≈ int8 * scale."""
    rows, columns = weight.shape
    values = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // group), np.float16)

    def quantize(part: slice) -> None:
        groups = weight[part].reshape(-1, columns // group, group)
        scales[part] = np.abs(groups).max(-1) / 127
        divisor = np.maximum(scales[part].astype(np.float32), _SMALLEST)
        values[part] = np.clip(np.rint(groups / divisor[..., None]), -127, 127).reshape(-1, columns)

    _in_parts(quantize, rows, columns)
    return values, scales


def _in_parts(quantize: Callable[[slice], None], rows: int, columns: int) -> None:
    """Call `quantize` for ranges of rows, on all cores: NumPy gives up its lock while it computes."""
    step = max(1, _WEIGHTS_AT_ONCE // columns)
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(quantize, parts):
            pass


_SMALLEST = np.float32(6e-8)  # the smallest fp16 above zero: an all-zero group keeps finite arithmetic


def _best_int4(groups: FloatArray) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Nibbles (n, group) and scales (n,) of least squared error among the candidate scales."""
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[:, None], -1)[:, 0]
    best_error: FloatArray = np.full(len(groups), np.inf, np.float32)
    best_scale: npt.NDArray[np.float16] = np.zeros(len(groups), np.float16)
    best = np.zeros(groups.shape, np.float32)
    nibbles, difference = np.empty_like(groups), np.empty_like(groups)
    for factor in _INT4_FACTORS:
        scale = (largest * np.float32(factor / -8)).astype(np.float16)
        wide = scale.astype(np.float32)
        safe = np.where(np.abs(wide) < _SMALLEST, _SMALLEST, wide)
        np.rint(np.divide(groups, safe[:, None], out=nibbles), out=nibbles)
        np.clip(nibbles, -8, 7, out=nibbles)
        np.subtract(groups, np.multiply(nibbles, wide[:, None], out=difference), out=difference)
        difference *= groups
        error = np.einsum("ij,ij->i", difference, difference)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        np.copyto(best, nibbles, where=better[:, None])
    return best.astype(np.int8), best_scale
