"""GGUF's quantised blocks as integers, scales and offsets.

A block's layout is ggml's (github.com/ggml-org/ggml/blob/master/src/ggml-common.h). Scales of 4 bit and wider blocks of
32 weights are fp16 and stay what they are; those of Q4_K, Q5_K and Q6_K are products of an fp16 and a small integer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgellm_ros.toolchain.quantized.packed import FloatArray, PackedWeight, Scheme

Bytes = npt.NDArray[np.uint8]
Unpacked = tuple[npt.NDArray[np.int8], FloatArray, FloatArray | None]  # (blocks, weights), (blocks, groups), as scale

KEPT = {
    "Q4_0": Scheme("int4", 32),
    "Q4_1": Scheme("int4", 32, offset=True),
    "Q5_0": Scheme("int8", 32),
    "Q5_1": Scheme("int8", 32, offset=True),
    "Q8_0": Scheme("int8", 32),
    "Q4_K": Scheme("int4", 32, offset=True),
    "Q5_K": Scheme("int8", 32, offset=True),
    "Q6_K": Scheme("int8", 16),
}


def unpack(kind: str, raw: Bytes, block_bytes: int) -> PackedWeight:
    """Rows (out, bytes of a row) of a type in KEPT; nothing is rounded but sums of fp32."""
    rows = len(raw)
    blocks = raw.reshape(-1, block_bytes)
    values, scale, offset = _UNPACKERS[kind](blocks)
    scheme = KEPT[kind]
    return PackedWeight(
        scheme.kind,
        scheme.group,
        values.reshape(rows, -1),
        scale.reshape(rows, -1),
        None if offset is None else offset.reshape(rows, -1),
    )


def _half(blocks: Bytes, start: int) -> FloatArray:
    """(blocks, 1): an fp16 number of each."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _halves(pairs: Bytes) -> npt.NDArray[np.int8]:
    """16 bytes to 32 numbers: all low nibbles, then all high ones."""
    nibbles: Bytes = np.concatenate([pairs & 15, pairs >> 4], -1)
    return nibbles.view(np.int8)


def _fifth_bits(blocks: Bytes, start: int) -> npt.NDArray[np.int8]:
    """(blocks, 32): a bit for each weight, moved to the fifth place."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[:, start : start + 4]), axis=-1, bitorder="little")
    return (bits << 4).view(np.int8)


def _q4_0(blocks: Bytes) -> Unpacked:
    return _halves(blocks[:, 2:]) - np.int8(8), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> Unpacked:
    scale = _half(blocks, 0)
    return _halves(blocks[:, 4:]) - np.int8(8), scale, _half(blocks, 2) + 8 * scale


def _q5_0(blocks: Bytes) -> Unpacked:
    return (_halves(blocks[:, 6:]) | _fifth_bits(blocks, 2)) - np.int8(16), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> Unpacked:
    scale = _half(blocks, 0)
    values = (_halves(blocks[:, 8:]) | _fifth_bits(blocks, 4)) - np.int8(16)
    return values, scale, _half(blocks, 2) + 16 * scale


def _q8_0(blocks: Bytes) -> Unpacked:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _half(blocks, 0), None


def _k_scales(blocks: Bytes) -> tuple[FloatArray, FloatArray]:
    """(blocks, 8) scales and minima: six bits each of 12 bytes, times the block's two fp16 numbers."""
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], -1)
    least = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], -1)
    return _half(blocks, 0) * scale, _half(blocks, 2) * least


def _q4_k(blocks: Bytes) -> Unpacked:
    scale, least = _k_scales(blocks)
    pairs = blocks[:, 16:].reshape(-1, 4, 32)  # 64 weights: 32 low nibbles, 32 high ones
    values = np.stack([pairs & 15, pairs >> 4], 2).reshape(-1, 256).view(np.int8) - np.int8(8)
    return values, scale, 8 * scale - least


def _q5_k(blocks: Bytes) -> Unpacked:
    scale, least = _k_scales(blocks)
    pairs = blocks[:, 48:].reshape(-1, 4, 32)
    low = np.stack([pairs & 15, pairs >> 4], 2).reshape(-1, 8, 32)
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None] & 1  # bit j of a byte: group j
    values = (low | high << 4).reshape(-1, 256).view(np.int8) - np.int8(16)
    return values, scale, 16 * scale - least


def _q6_k(blocks: Bytes) -> Unpacked:
    pairs = blocks[:, :128].reshape(-1, 2, 64)  # 128 weights: 64 low nibbles, 64 high ones
    low = np.stack([pairs & 15, pairs >> 4], 2).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[None, None, :, None] & 3
    values = (low | high << 4).reshape(-1, 256).view(np.int8) - np.int8(32)
    scale = _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return values, scale, None


_UNPACKERS: dict[str, Callable[[Bytes], Unpacked]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}  # fmt: skip
