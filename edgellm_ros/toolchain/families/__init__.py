"""The model families that export knows; a new one is a module here and a line in FAMILIES."""

from __future__ import annotations

from edgellm_ros.toolchain.families.base import Family
from edgellm_ros.toolchain.families.llama import Llama
from edgellm_ros.toolchain.families.mistral import Mistral
from edgellm_ros.toolchain.families.qwen2 import Qwen2
from edgellm_ros.toolchain.families.qwen3 import Qwen3

FAMILIES: tuple[Family, ...] = (Llama(), Mistral(), Qwen2(), Qwen3())

__all__ = ["FAMILIES", "Family"]
