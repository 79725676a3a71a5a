"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: stacked projections, longrope, and rope of a part of the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm_ros.toolchain.config_values import positive_int
from edgellm_ros.toolchain.families.base import FUSED, Family, Ropes


class Phi3(Family):
    """Phi3ForCausalLM."""

    name = "phi3"
    model_types = ("phi3",)
    architectures = ("Phi3ForCausalLM",)
    linears = FUSED
    default_eps = 1e-5
    partial_rotary = True

    def biases(self, config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        """No projection has one."""
        return False, False, False

    def ropes(self, config: Mapping[str, Any], num_layers: int, max_context: int) -> Ropes:
        """Hugging Face's configuration has the original context beside the rope settings, and 4096 without the key."""
        return super().ropes({"original_max_position_embeddings": 4096, **config}, num_layers, max_context)

    def sliding_windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
        """The same window in every layer, if there is one."""
        if config.get("sliding_window") is None:
            return (0,) * num_layers
        return (positive_int(config, "sliding_window"),) * num_layers
