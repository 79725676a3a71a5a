"""Brings int4 weights into the order that the plugin's kernels read: what native/kernels/quantized.cu does at load.

A tile of 16 rows and a block of 64 columns are 512 bytes, 16 for each of the warp's lanes (g, t) = (lane / 4, lane % 4):
of columns 16 s + 4 t + 2 p + e, byte s, e, p has row g in its lower nibble and row g + 8 in the upper one, plus 8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_TILE, _BLOCK = 16, 64


def pack_int4(stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(rows, cols / 2) signed nibbles, low first, to (tiles, blocks, 512)."""
    rows, pairs = stored.shape
    tiles, blocks = -(-rows // _TILE), -(-2 * pairs // _BLOCK)
    padded = np.zeros((tiles * _TILE, blocks * _BLOCK // 2), np.uint8)
    padded[:rows, :pairs] = stored
    padded ^= 0x88  # signed to plus 8
    nibbles = np.stack([padded & 15, padded >> 4], axis=-1)
    # tile, h, g, block, s, t, p, e: row 8 h + g
    split = nibbles.reshape(tiles, 2, 8, blocks, 4, 4, 2, 2)
    both = split[:, 0] | (split[:, 1] << 4)
    return np.ascontiguousarray(both.transpose(0, 2, 1, 4, 3, 6, 5)).reshape(tiles, blocks, 512)


def pack_scales(stored: npt.NDArray[Any], group: int) -> npt.NDArray[Any]:
    """(rows, groups) fp16 to (tiles, groups, 16), in pairs of rows g and g + 8; groups below 64 fill a last block."""
    rows, groups = stored.shape
    tiles = -(-rows // _TILE)
    whole = groups if group >= _BLOCK else -(-groups * group // _BLOCK) * _BLOCK // group
    padded = np.zeros((tiles * _TILE, whole), stored.dtype)
    padded[:rows, :groups] = stored
    return np.ascontiguousarray(padded.reshape(tiles, 2, 8, whole).transpose(0, 3, 2, 1)).reshape(tiles, whole, _TILE)
