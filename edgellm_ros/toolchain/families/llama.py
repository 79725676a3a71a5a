"""Llama 1 to 3.x and what is built like it (SmolLM2, TinyLlama): optional biases, no window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm_ros.toolchain.config_values import flag
from edgellm_ros.toolchain.families.base import Family


class Llama(Family):
    """LlamaForCausalLM."""

    name = "llama"
    model_types = ("llama",)
    architectures = ("LlamaForCausalLM", "LLaMAForCausalLM")
    gguf_architectures = ("llama",)
    gguf_interleaved_rope = True

    def biases(self, config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        """attention_bias covers all four attention projections, mlp_bias the other three."""
        attention = flag(config, "attention_bias", False)
        return attention, attention, flag(config, "mlp_bias", False)
