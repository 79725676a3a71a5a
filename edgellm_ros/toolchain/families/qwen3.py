"""Qwen3 dense models: normalised queries and keys, and heads whose size does not follow from the hidden size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm_ros.toolchain.config_values import flag
from edgellm_ros.toolchain.families.base import Family, layer_windows


class Qwen3(Family):
    """Qwen3ForCausalLM."""

    name = "qwen3"
    model_types = ("qwen3",)
    architectures = ("Qwen3ForCausalLM",)
    gguf_architectures = ("qwen3",)
    qk_norm = True

    def biases(self, config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        """attention_bias covers all four attention projections."""
        attention = flag(config, "attention_bias", False)
        return attention, attention, False

    def sliding_windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
        """By layer_types, or from max_window_layers on."""
        return layer_windows(config, num_layers)

    def default_head_dim(self, hidden_size: int, num_heads: int) -> int:
        """Qwen3's 128."""
        return 128
