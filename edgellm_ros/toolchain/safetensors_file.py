"""Which bytes of a safetensors file are which tensor: read without torch, bfloat16 included.

Format: 8 bytes little-endian header length, a JSON header, the data (github.com/huggingface/safetensors). The bundle
reader in edgellm_ros.bundle is separate: it knows no bfloat16, and a robot needs nothing from here.
"""

from __future__ import annotations

import json
import math
import mmap
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import CheckpointError

FLOATS: dict[str, npt.DTypeLike] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# What quantised checkpoints add; 8-bit floats are read as bytes.
_PACKED: dict[str, npt.DTypeLike] = {
    "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F8_E4M3": "u1", "F8_E5M2": "u1", "BOOL": "?",
}  # fmt: skip
_DTYPES = {**FLOATS, **_PACKED}
Float32 = npt.NDArray[np.float32]
_CHUNK = 1 << 20  # numbers read at once
_REMEDY = "download or copy the file again"


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


class SafetensorsFile:
    """Read-only; a tensor's bytes are read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Map `path` and check every tensor's range; raises CheckpointError when the file is not whole."""
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file; {_REMEDY}")
        self.size = path.stat().st_size
        if self.size < 8:
            raise CheckpointError(f"{path} is truncated: {self.size} bytes are no safetensors header; {_REMEDY}")
        self._file = open(path, "rb")  # noqa: SIM115  (closed with the object)
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._entries = self._read_header()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All tensor names, in the header's order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._entries[name].shape

    def num_bytes(self, name: str) -> int:
        """Bytes that a tensor takes in the file."""
        return self._entries[name].end - self._entries[name].begin

    def location(self, name: str) -> tuple[str, int]:
        """The dtype that a tensor is stored in, by safetensors' name, and its first byte in the file."""
        return self._entries[name].dtype, self._entries[name].begin

    def dtype(self, name: str) -> str:
        """The dtype's name in the file: F32, BF16, U8, F8_E4M3, …"""
        return self._entries[name].dtype

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """A tensor (or rows start to stop - 1) as it is stored, an own array; bfloat16 as uint16, FP8 as uint8."""
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{self.path}: {name} is stored as {entry.dtype}; read are {', '.join(_DTYPES)}")
        shape, begin = entry.shape, entry.begin
        if stop is not None:
            row = math.prod(shape[1:]) * np.dtype(_DTYPES[entry.dtype]).itemsize
            shape, begin = (min(stop, shape[0]) - start, *shape[1:]), begin + start * row
        values = np.empty(math.prod(shape), _DTYPES[entry.dtype])
        done = 0
        while done < values.nbytes:  # read, not mapped, as in read_rows; a call reads at most 2 GiB
            count = os.preadv(self._file.fileno(), [values.view(np.uint8)[done:].data], begin + done)
            if count == 0:
                raise CheckpointError(f"{self.path} became shorter while {name} was read; {_REMEDY}")
            done += count
        return values.reshape(shape)

    def read_rows(self, name: str, start: int, stop: int, out: Float32 | None = None) -> Float32:
        """Rows start to stop - 1 of a tensor's first axis as float32, in `out` (contiguous) or an own array."""
        entry = self._entries[name]
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {entry.dtype} and config.json has no quantization_config that says "
                f"what it means; read without one are {', '.join(FLOATS)}: use the model's unquantised checkpoint"
            )
        dtype = np.dtype(FLOATS[entry.dtype])
        row = math.prod(entry.shape[1:])
        values = np.empty((stop - start) * row, np.float32) if out is None else out.reshape(-1)
        assert values.size == (stop - start) * row and (out is None or values.base is not None), (name, values.size)
        first = entry.begin + start * row * dtype.itemsize
        # Read, not mapped: pages of a map would count as the process's memory, and faulting them in costs more.
        chunk = np.empty(min(_CHUNK, values.size), dtype)
        for done in range(0, values.size, _CHUNK):
            part = chunk[: values.size - done]
            if os.preadv(self._file.fileno(), [part.data], first + done * dtype.itemsize) != part.nbytes:
                raise CheckpointError(f"{self.path} became shorter while {name} was read; {_REMEDY}")
            into = values[done : done + part.size]
            if entry.dtype == "BF16":  # the upper half of a float32
                np.left_shift(part, 16, out=into.view(np.uint32), dtype=np.uint32)
            else:
                into[...] = part
        return values.reshape(stop - start, *entry.shape[1:]) if out is None else out

    def _read_header(self) -> dict[str, _Entry]:
        length = int.from_bytes(self._map[:8], "little")
        start = 8 + length
        if start > self.size:
            raise CheckpointError(
                f"{self.path} is truncated or no safetensors file: its header ends at byte {start} of "
                f"{self.size}; {_REMEDY}"
            )
        try:
            header: dict[str, Any] = json.loads(self._map[8:start])
            header.pop("__metadata__", None)
            entries = {
                name: _Entry(
                    str(e["dtype"]),
                    tuple(operator.index(size) for size in e["shape"]),
                    start + operator.index(e["data_offsets"][0]),
                    start + operator.index(e["data_offsets"][1]),
                )
                for name, e in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{self.path} has no readable safetensors header: {error!r}; {_REMEDY}") from error
        for name, entry in entries.items():
            if not start <= entry.begin <= entry.end <= self.size or min(entry.shape, default=0) < 0:
                raise CheckpointError(
                    f"{self.path} is truncated or damaged: tensor {name} of shape {entry.shape} lies at "
                    f"bytes {entry.begin} to {entry.end} of {self.size}; {_REMEDY}"
                )
            if entry.dtype in _DTYPES:
                needed = math.prod(entry.shape) * np.dtype(_DTYPES[entry.dtype]).itemsize
                if needed != entry.end - entry.begin:
                    raise CheckpointError(
                        f"{self.path}: tensor {name} of shape {entry.shape} needs {needed} bytes and has "
                        f"{entry.end - entry.begin}; {_REMEDY}"
                    )
        return entries
