"""The model families that export knows; a new one is a module here and a line in FAMILIES (docs/adding-a-model.md)."""

from __future__ import annotations

from edgellm_ros.errors import UnknownModelError
from edgellm_ros.manifest import ModelSpec
from edgellm_ros.toolchain.families.base import Family
from edgellm_ros.toolchain.families.gemma3 import Gemma3
from edgellm_ros.toolchain.families.llama import Llama
from edgellm_ros.toolchain.families.mistral import Mistral
from edgellm_ros.toolchain.families.phi3 import Phi3
from edgellm_ros.toolchain.families.qwen2 import Qwen2
from edgellm_ros.toolchain.families.qwen3 import Qwen3
from edgellm_ros.toolchain.families.smollm3 import SmolLM3

FAMILIES: list[Family] = [Llama(), Mistral(), Qwen2(), Qwen3(), SmolLM3(), Phi3(), Gemma3()]

__all__ = ["FAMILIES", "Family", "family_of"]


def family_of(model: ModelSpec) -> Family:
    """The family that `model` names; raises UnknownModelError when there is none of that name."""
    for family in FAMILIES:
        if family.name == model.family:
            return family
    raise UnknownModelError(f"no family is named {model.family!r}; known are {', '.join(f.name for f in FAMILIES)}")
