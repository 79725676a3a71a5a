"""Unpacks small unsigned integers from 32-bit words."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def unpack_words(words: npt.NDArray[Any], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The last axis of int32 words as `count` numbers of `bits` (4 or 8), the lowest bits of a word first.

    words: (rows, ceil(count * bits / 32)). Returns (rows, count).
    """
    raw = np.ascontiguousarray(words).view("<u4").view(np.uint8)  # little-endian bytes of each row, in order
    if bits == 8:
        return raw[:, :count]
    assert bits == 4, bits
    return np.stack([raw & 15, raw >> 4], -1).reshape(len(words), -1)[:, :count]
