"""Mistral 7B and what is built like it: no bias, and one sliding window for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm_ros.toolchain.config_values import positive_int
from edgellm_ros.toolchain.families.base import Family


class Mistral(Family):
    """MistralForCausalLM."""

    name = "mistral"
    model_types = ("mistral",)
    architectures = ("MistralForCausalLM",)
    gguf_architectures = ("mistral",)
    gguf_interleaved_rope = True

    def biases(self, config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        """No projection has one."""
        return False, False, False

    def sliding_windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
        """The same window in every layer; a missing key means 4096 tokens, as in Hugging Face's configuration."""
        if "sliding_window" in config and config["sliding_window"] is None:
            return (0,) * num_layers
        return (positive_int(config, "sliding_window", 4096),) * num_layers

    def default_kv_heads(self, num_heads: int) -> int:
        """Mistral 7B's 8."""
        return 8
