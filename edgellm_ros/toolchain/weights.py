"""How weights.safetensors is laid out, and a writer that streams it one tensor at a time.

Linear layers keep Hugging Face's [out, in] order, so that rows of fused layers (q, k, v; gate, up) stay contiguous.
int4 is two signed nibbles a byte along the input features, low nibble first: exactly ONNX's INT4 [out, in], which
`decoder.onnx` names by byte offset; `decoder.ort.onnx` turns the same bytes into MatMulNBits' offset-8 nibbles with
one constant-folded BitwiseXor. int8 is signed, one byte. Both have fp16 scales [out, in / group].

Checkpoints quantised by others add fp8 (E4M3 bytes [out, in]; fp32 scales [out], or [out, in / 128] for blocks) and
nvfp4 (two E2M1 a byte, low first; E4M3 scales [out, in / 16]; global_scale [out] fp32, one for ONNX's second level),
and the tensors that bundle.LinearFormat names: offset, input_factor, input_order and input_scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import ToolchainError
from edgellm_ros.manifest import LinearFormat

ALIGNMENT = 64  # bytes: a cache line, and what vector loads of the native executor want

_DTYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor's name, dtype and shape, known before its data is."""

    name: str
    dtype: npt.DTypeLike
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def plan_linear(name: str, out_features: int, in_features: int, form: LinearFormat) -> list[TensorPlan]:
    """The tensors that store one linear layer's weight in `form`."""
    weight, group = f"{name}.weight", form.group_size
    if group and in_features % group:
        raise ToolchainError(
            f"{name} has {in_features} input features, which do not divide into groups of {group}; "
            "export with --weights fp16"
        )
    scales = (out_features, in_features // group) if group else (out_features,)
    plan: list[TensorPlan]
    if form.scheme == "int4":
        plan = [TensorPlan(weight, np.uint8, (out_features, in_features // 2))]
        plan.append(TensorPlan(f"{name}.scale", np.float16, scales))
    elif form.scheme == "int8":
        plan = [TensorPlan(weight, np.int8, (out_features, in_features))]
        plan.append(TensorPlan(f"{name}.scale", np.float16, scales))
    elif form.scheme == "fp8":
        plan = [TensorPlan(weight, np.uint8, (out_features, in_features))]
        plan.append(TensorPlan(f"{name}.scale", np.float32, scales))
    elif form.scheme == "nvfp4":
        plan = [TensorPlan(weight, np.uint8, (out_features, in_features // 2))]
        plan.append(TensorPlan(f"{name}.scale", np.uint8, scales))
        plan.append(TensorPlan(f"{name}.global_scale", np.float32, (out_features,)))
    else:
        plan = [TensorPlan(weight, np.float16 if form.scheme == "fp16" else np.float32, (out_features, in_features))]
    if form.offset:
        plan.append(TensorPlan(f"{name}.offset", np.float32, scales))
    if form.input_factor:
        plan.append(TensorPlan(f"{name}.input_factor", np.float32, (in_features,)))
    if form.activation:
        plan.append(TensorPlan(f"{name}.input_scale", np.float32, (1,)))
    if form.input_order:
        plan.append(TensorPlan(f"{name}.input_order", np.int32, (in_features,)))
    return plan


class WeightWriter:
    """Writes a safetensors file whose tensors arrive in any order, each straight to its place.

    The header is written first, from the plan: peak memory is one tensor, whatever the model's size.
    """

    def __init__(self, path: Path, plan: list[TensorPlan], metadata: dict[str, str]) -> None:
        """Create `path` with room for the tensors of `plan`."""
        # Tensors whose size is a multiple of the alignment come first, so that every one of them is aligned: the
        # format allows no holes.
        ordered = sorted(plan, key=lambda t: (t.num_bytes % ALIGNMENT != 0, -np.dtype(t.dtype).itemsize))
        header: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        self._offsets: dict[str, int] = {}
        self._plan = {t.name: t for t in plan}
        for tensor in ordered:
            end = offset + tensor.num_bytes
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[np.dtype(tensor.dtype)],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            self._offsets[tensor.name] = offset
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self._start = 8 + len(text)
        self._missing = set(self._plan)
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115  (closed by close or abort)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + offset)

    def write(self, name: str, data: npt.NDArray[Any]) -> None:
        """Write one planned tensor; its dtype and shape must be the plan's."""
        plan = self._plan[name]
        assert data.dtype == np.dtype(plan.dtype) and data.shape == plan.shape, (name, data.dtype, data.shape, plan)
        self._file.seek(self._start + self._offsets[name])
        self._file.write(np.ascontiguousarray(data).data)
        self._missing.discard(name)

    def write_rows(self, name: str, first: int, data: npt.NDArray[Any]) -> None:
        """Write rows of a planned tensor from row `first` on; the last row completes it."""
        plan = self._plan[name]
        row = plan.num_bytes // plan.shape[0]
        assert data.dtype == np.dtype(plan.dtype) and data.shape[1:] == plan.shape[1:], (name, data.dtype, data.shape)
        self._file.seek(self._start + self._offsets[name] + first * row)
        self._file.write(np.ascontiguousarray(data).data)
        if first + len(data) == plan.shape[0]:
            self._missing.discard(name)

    def close(self) -> None:
        """Finish the file; a tensor that was planned but never written is our own bug."""
        self._file.close()
        assert not self._missing, f"never written: {sorted(self._missing)[:4]}"

    def abort(self) -> None:
        """Close without the completeness check, after an error."""
        self._file.close()


Progress = Callable[[str, int, int], None]  # stage, done, total
