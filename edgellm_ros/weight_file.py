"""A safetensors file as it lies on the disk: tensors that are mapped, and where their bytes are."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import BundleError

_SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


class WeightFile:
    """Read-only, memory-mapped tensors of a safetensors file; nothing is copied until it is used."""

    def __init__(self, path: Path) -> None:
        """Map `path`; raises BundleError when the header or a tensor's range does not fit the file."""
        self.path = path
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            length = int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8 : 8 + length])
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path} has no readable safetensors header: {error}") from error
        self._start = 8 + length
        for name, (_, _, _, end) in self._entries.items():
            if self._start + end > len(self._map):
                raise BundleError(
                    f"{path} is truncated: tensor {name} ends at byte {self._start + end} of "
                    f"{len(self._map)}"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._entries)

    def location(self, name: str) -> tuple[int, int]:
        """Byte offset in the file and length in bytes, as ONNX external data wants them."""
        _, _, begin, end = self._entry(name)
        return self._start + begin, end - begin

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        dtype, shape, begin, end = self._entry(name)
        kind = np.dtype(_SAFETENSORS_DTYPES[dtype])
        count = (end - begin) // kind.itemsize
        return np.frombuffer(self._map, kind, count, self._start + begin).reshape(shape)

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        if name not in self._entries:
            raise BundleError(f"{self.path} has no tensor {name!r}; export the model again")
        return self._entries[name]
