"""Decides the range of every input in each optimisation profile."""

from __future__ import annotations

from typing import Any

from edgellm_ros.errors import ToolchainError
from edgellm_ros.executors.contract import TensorContract
from edgellm_ros.config import BuildOptions

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]  # smallest, the one to be fastest at, largest


def profile_ranges(
    inputs: dict[str, Shape], contract: tuple[TensorContract, ...], options: BuildOptions, max_lora: dict[str, int]
) -> list[dict[str, Range]]:
    """A range for each input in each profile; `inputs` are the network's shapes with -1 where they vary.

    Decode has 1 to max_verify tokens a sequence and all their logits; it starts at 1 but does not stop there, because
    a profile of exactly one token would duplicate the weights. max_lora: the largest R of each LoRA input. Raises
    ToolchainError for an input of unknown role.
    """
    assert options.max_context is not None, "options are resolved"
    verify, longest = options.max_verify, options.max_input
    lengths = [(1, 1, verify), (1, max(1, longest // 2), longest)]
    if options.profile == "single":
        lengths = [(1, 1, longest)]
    roles = {tensor.name: tensor.role for tensor in contract if tensor.is_input}
    loras = {name: _lora_range(inputs[name], rank) for name, rank in max_lora.items()}
    return [
        loras | {n: _range(n, shape, roles.get(n, ""), options, length) for n, shape in inputs.items() if n not in loras}
        for length in lengths
    ]


def _lora_range(shape: Shape, largest: int) -> Range:
    low, best, high = (tuple(rank if size == -1 else size for size in shape) for rank in (0, largest, largest))
    return low, best, high


def add_profiles(builder: Any, config: Any, profiles: list[dict[str, Range]]) -> None:
    """Hand the profiles to the builder."""
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in ranges.items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)


def _range(name: str, shape: Shape, role: str, options: BuildOptions, length: Shape) -> Range:
    batch, verify = options.max_batch, options.max_verify
    batches = (1, batch, batch)
    rows: list[Shape]
    if role == "embeds":
        rows = [(b, s, shape[2]) for b, s in zip(batches, length, strict=True)]
    elif role in ("positions", "tree_masks"):
        rows = [(b, s) for b, s in zip(batches, length, strict=True)]
    elif role == "mask":
        rows = [(b, 1, s, shape[3]) for b, s in zip(batches, length, strict=True)]
    elif role == "write_indices":
        rows = [(b,) for b in batches]
    elif role == "logit_indices":
        rows = [(1,), (batch,), (batch * verify,)]
    elif role in ("past_key", "past_value", "past_kv"):
        rows = [(b, *shape[1:]) for b in batches]
    elif -1 not in shape:
        rows = [shape] * 3
    else:
        raise ToolchainError(f"{name} is an input of varying shape {shape} whose role is unknown to this version; "
                             "update edgellm_ros or export the model again")  # fmt: skip
    return rows[0], rows[1], rows[2]
