"""Decides the range of every input in each optimisation profile."""

from __future__ import annotations

from typing import Any

from edgellm_ros.bundle import GraphSpec
from edgellm_ros.errors import ToolchainError
from edgellm_ros.config import BuildOptions

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]  # smallest, the one to be fastest at, largest


def profile_ranges(inputs: dict[str, Shape], graph: GraphSpec, options: BuildOptions) -> list[dict[str, Range]]:
    """A range for each input in each profile; `inputs` are the network's shapes with -1 where they vary.

    Decode has 1 to max_verify tokens a sequence and all their logits; it starts at 1 but does not stop there, because
    a profile of exactly one token would duplicate the weights. Raises ToolchainError for an input of unknown role.
    """
    assert options.max_context is not None, "options are resolved"
    verify, longest = options.max_verify, options.max_input
    lengths = [(1, 1, verify), (1, max(1, longest // 2), longest)]
    if options.profile == "single":
        lengths = [(1, 1, longest)]
    return [{name: _range(name, shape, graph, options, length) for name, shape in inputs.items()} for length in lengths]


def add_profiles(builder: Any, config: Any, profiles: list[dict[str, Range]]) -> None:
    """Hand the profiles to the builder."""
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in ranges.items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)


def _range(name: str, shape: Shape, graph: GraphSpec, options: BuildOptions, length: Shape) -> Range:
    batch, verify = options.max_batch, options.max_verify
    batches = (1, batch, batch)
    rows: list[Shape]
    if name == graph.embeds:
        rows = [(b, s, shape[2]) for b, s in zip(batches, length, strict=True)]
    elif name == graph.positions:
        rows = [(b, s) for b, s in zip(batches, length, strict=True)]
    elif name == graph.write_indices:
        rows = [(b,) for b in batches]
    elif name == graph.logit_indices:
        rows = [(1,), (batch,), (batch * verify,)]
    elif name.startswith((graph.past_key.split("{")[0], graph.past_value.split("{")[0])):
        rows = [(b, *shape[1:]) for b in batches]
    elif -1 not in shape:
        rows = [shape] * 3
    else:
        raise ToolchainError(f"{name} is an input of varying shape {shape} whose role is unknown to this version; "
                             "update edgellm_ros or export the model again")  # fmt: skip
    return rows[0], rows[1], rows[2]
