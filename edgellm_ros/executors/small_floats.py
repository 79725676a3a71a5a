"""The numbers that 4 and 8 bits hold as floats: E2M1 and E4M3."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

# E2M1: sign, two exponent bits, one mantissa bit (OCP Microscaling Formats, 5.3.3).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3(raw: npt.NDArray[np.uint8]) -> FloatArray:
    """Bytes of OCP FP8 E4M3 (no infinities, NaN is 0x7f and 0xff) as float32."""
    return E4M3[raw]


def e4m3_bytes(values: FloatArray) -> npt.NDArray[np.uint8]:
    """The reverse for numbers that E4M3 has and that are not negative."""
    return np.searchsorted(E4M3[:127], values).astype(np.uint8)


def nibbles(packed: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """(rows, columns / 2) bytes, the low half first, as (rows, columns) numbers from 0 to 15."""
    raw = packed.view(np.uint8)
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)


def _make_e4m3() -> FloatArray:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    size[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -size, size).astype(np.float32)


E4M3 = _make_e4m3()
