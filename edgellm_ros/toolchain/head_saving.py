"""What a reduced head saves: bytes that a decode step reads, and bytes of the bundle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edgellm_ros.manifest import ModelSpec, QuantSpec
from edgellm_ros.toolchain.checkpoint import Checkpoint, open_checkpoint
from edgellm_ros.toolchain.detect import load_spec
from edgellm_ros.toolchain.export import SCHEMES, with_groups
from edgellm_ros.toolchain.layers import plan_weights


@dataclass(frozen=True)
class HeadSaving:
    """Bytes as weights.safetensors stores them, with the whole head and with the reduced one."""

    head: tuple[int, int]
    decode_step: tuple[int, int]  # weights that one step reads: layers and head
    file: tuple[int, int]  # a tied head that is cut needs a tensor of its own

    @property
    def decode_share(self) -> float:
        """Share of a decode step's time that is saved where reading weights bounds it, as it does at batch 1."""
        whole, cut = self.decode_step
        return 1.0 - cut / whole


def head_saving(checkpoint: Path, weights: str, num_rows: int) -> HeadSaving:
    """For an export with `weights`, a key of SCHEMES, and a head of `num_rows` rows."""
    source = open_checkpoint(Path(checkpoint))
    _, model = load_spec(source)
    quant = with_groups(SCHEMES[weights], model)
    whole, cut = (_bytes(source, m, quant) for m in (model, replace(model, head_rows=num_rows)))
    return HeadSaving((whole[0], cut[0]), (whole[1], cut[1]), (whole[2], cut[2]))


def _bytes(source: Checkpoint, model: ModelSpec, quant: QuantSpec) -> tuple[int, int, int]:
    """Of the head, of a decode step and of the file."""
    plan = plan_weights(source, model, quant)
    stem = quant.head_tensor(model)
    head = sum(tensor.num_bytes for tensor in plan if tensor.name.startswith(f"{stem}."))
    layers = sum(tensor.num_bytes for tensor in plan if tensor.name.startswith("layers."))
    return head, head + layers, sum(tensor.num_bytes for tensor in plan)
