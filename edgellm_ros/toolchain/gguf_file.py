"""Which bytes of a GGUF file are which tensor, and what its metadata says.

The header is parsed here and not by gguf.GGUFReader, which makes an array of every token's length and text: seconds
and hundreds of megabytes for a vocabulary, and a truncated file ends in a NumPy error. Dequantising is the gguf
package's. Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_WITHDRAWN = {31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}  # of 2024, Q4_0 in an ARM CPU's order
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class _Entry:
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # outermost axis first
    begin: int  # bytes from the start of the file
    row_bytes: int  # of the innermost axis


class GgufFile:
    """Read-only; a tensor is read when it is asked for. `metadata` holds every key with plain Python values."""

    def __init__(self, path: Path) -> None:
        """Map `path`, parse its header and check every tensor's range; raises CheckpointError when it is not whole."""
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115  (closed with the object)
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, ValueError, OverflowError) as error:
            what = f"{path} is truncated or damaged at byte {self._at}: {error}; download it again"
            raise CheckpointError(what) from error

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All tensor names, as the file has them."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, outermost axis first (the file stores the reverse)."""
        return self._entries[name].shape

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_entry_bytes(entry) for entry in self._entries.values())

    def type_name(self, name: str) -> str:
        """How a tensor is stored: F16, Q4_0, Q6_K, …"""
        return str(self._entries[name].type.name)

    def raw_rows(self, name: str, start: int, stop: int) -> tuple[npt.NDArray[np.uint8], int]:
        """Rows start to stop - 1 of a matrix as bytes (rows, bytes of a row), an own array, and a block's bytes."""
        entry = self._entries[name]
        return self._bytes(entry, start, stop), int(gguf.GGML_QUANT_SIZES[entry.type][1])

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start to stop - 1 of a tensor's first axis, dequantised to an own float32 array."""
        entry = self._entries[name]
        if len(entry.shape) == 1:  # the only axis is the one that blocks run along
            rows: npt.NDArray[np.float32] = self._dequantise(entry, 0, 1).reshape(-1)[start:stop].copy()
            return rows
        inner = math.prod(entry.shape[1:-1])
        return self._dequantise(entry, start * inner, stop * inner).reshape(stop - start, *entry.shape[1:])

    def _dequantise(self, entry: _Entry, start: int, stop: int) -> npt.NDArray[np.float32]:
        raw = self._bytes(entry, start, stop)
        if entry.type.name in _FLOATS:
            return raw.reshape(-1).view(_FLOATS[entry.type.name]).astype(np.float32)
        try:
            return np.array(gguf.dequantize(raw, entry.type), dtype=np.float32)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: tensors of type {entry.type.name} cannot be read") from error

    def _bytes(self, entry: _Entry, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """(rows, bytes of a row); read, not mapped: pages of a map would count as the process's memory."""
        raw = np.empty((stop - start, entry.row_bytes), np.uint8)
        done, first = 0, entry.begin + start * entry.row_bytes
        while done < raw.nbytes:  # a call reads at most 2 GiB
            count = os.preadv(self._file.fileno(), [raw.reshape(-1)[done:].data], first + done)
            if count == 0:
                raise CheckpointError(f"{self.path} became shorter while it was read; download it again")
            done += count
        return raw

    def _read_header(self) -> None:
        magic, version, num_tensors, num_keys = self._unpack("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise CheckpointError(f"{self.path} is a GGUF of version {version}; read are 2 and 3, little-endian")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._unpack("I")[0])
        infos = []
        for _ in range(num_tensors):
            name = self._string()
            dims = self._unpack(f"{self._unpack('I')[0]}Q")
            infos.append((name, tuple(reversed(dims)), *self._unpack("IQ")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {alignment!r} is not a power of two")
        start = -(-self._at // alignment) * alignment
        self._entries: dict[str, _Entry] = {}
        for name, shape, type_number, offset in infos:
            kind = self._type(name, type_number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if not shape or shape[-1] % block:
                what = f"{self.path}: {name} has shape {list(shape)}, not whole blocks of {block} ({kind.name})"
                raise CheckpointError(what)
            entry = _Entry(kind, shape, start + offset, shape[-1] // block * block_bytes)
            end = entry.begin + _entry_bytes(entry)
            if end > len(self._map):
                raise CheckpointError(
                    f"{self.path} is truncated: tensor {name} ends at byte {end} of {len(self._map)}; download it again"
                )
            self._entries[name] = entry

    def _type(self, name: str, number: int) -> gguf.GGMLQuantizationType:
        try:
            return gguf.GGMLQuantizationType(number)
        except ValueError as error:
            withdrawn = f", {_WITHDRAWN[number]}, which llama.cpp has withdrawn" if number in _WITHDRAWN else ""
            raise CheckpointError(
                f"{self.path}: tensor {name} is of type {number}{withdrawn}; the gguf package does not know "
                "it: take the model's Q4_0 or another file, or update gguf where the type is new"
            ) from error

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._map, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def _string(self) -> str:
        length = self._unpack("Q")[0]
        if self._at + length > len(self._map):
            raise ValueError(f"a text of {length} bytes goes past the end")
        self._at += length
        return self._map[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._unpack("IQ")
            if item in _SCALARS:
                return list(self._unpack(f"{count}{_SCALARS[item]}"))
            if item == _ARRAY:
                raise ValueError("arrays of arrays are not read")
            return [self._value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        return self._unpack(_SCALARS[kind])[0]


def _entry_bytes(entry: _Entry) -> int:
    return math.prod(entry.shape[:-1]) * entry.row_bytes
