"""By what AWQ or SmoothQuant multiplied what a layer reads and gives, where that was folded into the layers before.

An adapter of the original model then needs the same: x A becomes (x p) (A / p), and the rows of a B whose projection
was multiplied are multiplied too. `edgellm quantize` writes the factors beside the weights, export hands them on, and
`edgellm lora pack` uses them. Checkpoints that others made so do not have them.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.bundle import Bundle
from edgellm_ros.errors import CheckpointError, ToolchainError
from edgellm_ros.executors.lora import LoraAdapter, LoraTensors

# Of a checkpoint and of a bundle: layers.N.TARGET.in and .out, fp32. Other programs read each .safetensors as weights.
FILE = "input_factors.npz"
FOLDED = "factors of AWQ or SmoothQuant are in its norms, unknown ones: adapters of the original model do not fit"
_STACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
            "up_proj": "gate_up_proj"}  # fmt: skip
Factors = Mapping[str, npt.NDArray[np.float32]]


def write_input_factors(root: Path, factors: Factors) -> None:
    """`factors` by module, with `.in` or `.out` after it; none says that nothing was folded."""
    short: dict[str, Any] = {}
    for name, factor in factors.items():
        module, _, side = name.rpartition(".")
        parts = module.split(".")
        if "layers" in parts:  # the head takes no adapters
            short[f"layers.{parts[parts.index('layers') + 1]}.{parts[-1]}.{side}"] = factor
    np.savez(root / FILE, **short)


def hand_on(checkpoint: Path, root: Path) -> bool:
    """Copy a checkpoint's file into a bundle that is being written; whether there was one."""
    if not (checkpoint / FILE).is_file():
        return False
    _read(checkpoint / FILE)
    shutil.copyfile(checkpoint / FILE, root / FILE)
    return True


def for_folded(adapter: LoraAdapter, bundle: Bundle) -> LoraAdapter:
    """The adapter, its stacked projections taken apart, for the inputs and outputs of the bundle's layers.

    Raises ToolchainError where factors were folded and nobody wrote them down.
    """
    if not bundle.has(FILE):
        if bundle.manifest.quantization.folded:
            raise ToolchainError(
                f"{bundle.path}: {FOLDED}; merge the adapter into the original and quantise that, or pass --any-base "
                "if it was trained on this very checkpoint"
            )
        return adapter
    factors = _read(bundle.file(FILE))
    return replace(adapter, tensors=tuple(_converted(item, factors) for item in adapter.tensors))


def _read(path: Path) -> Factors:
    try:
        with np.load(path) as file:
            found = dict(file)
        for name, factor in found.items():
            if factor.ndim != 1 or factor.dtype != np.float32 or not (np.isfinite(factor) & (factor > 0)).all():
                raise ValueError(f"{name} is not a list of numbers above 0")
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged: {error}; quantise the model again") from error
    return found


def _converted(item: LoraTensors, factors: Factors) -> LoraTensors:
    def of(target: str, side: str) -> npt.NDArray[np.float32] | None:
        found = factors.get(f"layers.{item.layer}.{target}.{side}")
        return found if found is not None or target not in _STACKED else of(_STACKED[target], side)

    read, given = of(item.target, "in"), of(item.target, "out")
    if (read is not None and len(read) != item.a.shape[1]) or (given is not None and len(given) != len(item.b)):
        raise ToolchainError(f"{FILE} is of another model: layers.{item.layer}.{item.target}; quantise the model again")
    a = item.a if read is None else item.a / read
    b = item.b if given is None else item.b * given[:, None]
    return replace(item, a=a, b=b)
