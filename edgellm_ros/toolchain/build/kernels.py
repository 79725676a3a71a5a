"""Which kernels an engine has: TensorRT-RTX stores their CUDA source as text, which the target's driver compiles.

So what was fused can be read off an engine that nobody ran. TensorRT's engines hold machine code: nothing is found there.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from edgellm_ros.errors import ToolchainError

_BOUNDS = rb"__launch_bounds__\s*\([^)]*\)"
_DEFINITION = re.compile(rb"__global__(?:[^({};]|" + _BOUNDS + rb"){0,300}?\b(?!__launch_bounds__)(\w+)\s*\(")
_NUMBER = re.compile(r"_0x[0-9a-f]{32}")  # of a fusion's contents
ATTENTION = "mha"  # part of the names of fused attention kernels


def kernel_counts(engine: Any) -> dict[str, int]:
    """In the bytes of an engine: kernel name, without the number of what it fuses, to how often it is defined: once for each layer and profile."""
    names = (match.decode() for match in _DEFINITION.findall(engine))
    return dict(Counter(_NUMBER.sub("", name) for name in names).most_common())


def fused_attentions(counts: dict[str, int]) -> int:
    """How many of the kernels are fused attention."""
    return sum(count for name, count in counts.items() if ATTENTION in name.lower())


def check_kernels(counts: dict[str, int], wanted: int) -> None:
    """Raise ToolchainError when some attentions were fused and others not; `wanted` is layers times profiles.

    An engine without readable kernels, or with names that this version does not know, passes: it says nothing.
    """
    found = fused_attentions(counts)
    if found and found != wanted:
        raise ToolchainError(
            f"the engine has {found} fused attention kernels for {wanted} attentions (layers x profiles); build it with "
            "--profile single, or with another version of the builder"
        )
