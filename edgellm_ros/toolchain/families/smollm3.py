"""SmolLM3: Llama's decoder, in which every fourth layer does not know positions (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm_ros.errors import CheckpointError
from edgellm_ros.manifest import GLOBAL_ROPE, NO_ROPE
from edgellm_ros.toolchain.config_values import flag, positive_int
from edgellm_ros.toolchain.families.base import Family, Ropes, layer_windows
from edgellm_ros.toolchain.rope import read_rope


class SmolLM3(Family):
    """SmolLM3ForCausalLM."""

    name = "smollm3"
    model_types = ("smollm3",)
    architectures = ("SmolLM3ForCausalLM",)
    gguf_architectures = ("smollm3",)
    gguf_interleaved_rope = True
    tied_by_default = True
    default_theta = 2000000.0

    def biases(self, config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        """attention_bias covers all four attention projections, mlp_bias the other three."""
        attention = flag(config, "attention_bias", False)
        return attention, attention, flag(config, "mlp_bias", False)

    def ropes(self, config: Mapping[str, Any], num_layers: int, max_context: int) -> Ropes:
        """One table, and none where no_rope_layers has a 0, or in every no_rope_layer_interval-th layer."""
        turned = _turned(config, num_layers)
        layers = tuple(GLOBAL_ROPE if turn else NO_ROPE for turn in turned)
        return Ropes(*read_rope(config, max_context, self.default_theta), layers)

    def sliding_windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
        """By layer_types; where they are missing, the layers without positions have the window."""
        if config.get("layer_types") is None:
            kinds = ["full_attention" if turn else "sliding_attention" for turn in _turned(config, num_layers)]
            config = {**config, "layer_types": kinds}
        return layer_windows(config, num_layers)

    def default_kv_heads(self, num_heads: int) -> int:
        """SmolLM3-3B's 4."""
        return 4


def _turned(config: Mapping[str, Any], num_layers: int) -> list[bool]:
    given = config.get("no_rope_layers")
    if given is None:
        interval = positive_int(config, "no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if not isinstance(given, list) or len(given) < num_layers or any(value not in (0, 1) for value in given):
        raise CheckpointError(
            f"the configuration's no_rope_layers is {given!r}; it must have a 1 (rope) or 0 (none) for each of "
            f"{num_layers} layers"
        )
    return [bool(value) for value in given[:num_layers]]
