"""Qwen2 and Qwen2.5: biases on query, key and value, and a sliding window in the upper layers if switched on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm_ros.toolchain.families.base import Family, layer_windows


class Qwen2(Family):
    """Qwen2ForCausalLM."""

    name = "qwen2"
    model_types = ("qwen2",)
    architectures = ("Qwen2ForCausalLM",)
    gguf_architectures = ("qwen2",)

    def biases(self, config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        """Query, key and value always have one."""
        return True, False, False

    def sliding_windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
        """By layer_types, or from max_window_layers on."""
        return layer_windows(config, num_layers)
