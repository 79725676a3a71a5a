"""Adds an adapter to a checkpoint's weights: W + scale B A in fp32, then rounded to the dtype that W is stored in.

Files are copied and the changed tensors written over in place, so nothing else of the checkpoint changes, and one
tensor is in memory at a time.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import CheckpointError, ToolchainError
from edgellm_ros.executors.lora import LoraTensors, read_adapter
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.families.base import FUSED, SEPARATE
from edgellm_ros.toolchain.hf_checkpoint import HfCheckpoint, quantization_config
from edgellm_ros.toolchain.layers import layer_prefix
from edgellm_ros.toolchain.lora import check_base
from edgellm_ros.toolchain.safetensors_file import SafetensorsFile
from edgellm_ros.toolchain.weights import Progress
from edgellm_ros.toolchain.whole_output import whole_output

_DTYPES: dict[str, npt.DTypeLike] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def merge_adapter(
    checkpoint: Path,
    adapter: Path,
    output: Path,
    any_base: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the checkpoint `output`: `checkpoint` (a Hugging Face directory) with the PEFT `adapter` in its weights.

    Returns how many tensors changed. Raises CheckpointError for a checkpoint that is not whole, is quantised or lacks
    what the adapter changes, ToolchainError for other reasons, and what read_adapter raises; then nothing is left.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise ToolchainError(f"{output} exists; choose another directory, or let it be replaced with --force")
    if output.exists() and not (output / "config.json").exists():
        raise ToolchainError(f"{output} exists and is not a checkpoint; it is not replaced")
    source = open_checkpoint(checkpoint)
    if not isinstance(source, HfCheckpoint):
        raise ToolchainError(f"{checkpoint} is not a directory with safetensors; only such a checkpoint can be merged")
    if output.resolve() == source.path.resolve():
        raise ToolchainError(f"{output} is the checkpoint itself; merge into another directory")
    if quantization_config(source.path, source.config):
        raise CheckpointError(f"{checkpoint} is quantised; merge into the original one, then quantise the result")
    found = read_adapter(adapter)
    if not any_base:
        check_base(found, (source.name(),), str(checkpoint))
    work = {_tensor_name(item): item for item in found.tensors}
    _check(source, work)
    with whole_output(output, source.path, Path(adapter)) as partial:
        _copy(source, partial)
        _write(partial, {source.stored_name(name): item for name, item in work.items()}, progress or _silent)
    return len(work)


def _tensor_name(item: LoraTensors) -> str:
    modules = [module for stacks in (SEPARATE, FUSED) for stack in stacks.values() for module in stack]
    module = next(m for m in modules if m.rpartition(".")[2] == item.target)
    return f"{layer_prefix(item.layer)}{module}.weight"


def _check(source: HfCheckpoint, work: dict[str, LoraTensors]) -> None:
    for name, item in work.items():
        if name not in source:
            raise CheckpointError(f"{source.path} has no tensor {name}; the adapter was made for another model")
        wanted = (len(item.b), item.a.shape[1])
        if source.shape(name) != wanted:
            raise CheckpointError(
                f"{source.path}: {name} is {list(source.shape(name))}, but the adapter's B A is {list(wanted)}; it was "
                "made for another model"
            )


def _write(root: Path, work: dict[str, LoraTensors], progress: Progress) -> None:
    done = 0
    for path in sorted(root.glob("*.safetensors")):
        file = SafetensorsFile(path)
        with open(path, "r+b") as out:
            for name in file.names():
                if name not in work:
                    continue
                item = work[name]
                dtype, offset = file.location(name)
                merged = file.read_rows(name, 0, len(item.b))
                merged += np.float32(item.scale) * (item.b @ item.a)
                with np.errstate(over="ignore"):
                    rounded = merged.astype(_DTYPES[dtype])
                if not np.isfinite(rounded).all():
                    raise ToolchainError(f"{name} overflows {dtype} with the adapter added; convert the model to BF16")
                out.seek(offset)
                out.write(np.ascontiguousarray(rounded).tobytes())
                done += 1
                progress("merge", done, len(work))
    assert done == len(work), "checked before"


def _copy(source: HfCheckpoint, target: Path) -> None:
    """The checkpoint's own files and the small ones beside them; weights in other formats would be the old ones."""
    own = set(source.source_files())
    for path in sorted(source.path.iterdir()):
        if path in own or (path.is_file() and path.suffix not in _WEIGHTS):
            shutil.copyfile(path, target / path.name)  # contents only: a hub cache holds links to read-only files


def _silent(stage: str, done: int, total: int) -> None:
    """No progress wanted."""
