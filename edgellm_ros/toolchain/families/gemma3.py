"""Gemma 3's text models: norms around every block, GELU, five layers in six with a window and their own rope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm_ros.errors import CheckpointError
from edgellm_ros.manifest import GLOBAL_ROPE, LOCAL_ROPE, ModelSpec
from edgellm_ros.toolchain.config_values import flag, positive_float, positive_int
from edgellm_ros.toolchain.families.base import Family, Ropes, layer_kinds
from edgellm_ros.toolchain.rope import read_rope

_DEFAULTS = {"num_attention_heads": 8, "max_position_embeddings": 131072, "vocab_size": 262208}


class Gemma3(Family):
    """Gemma3ForCausalLM, and the decoder of Gemma3ForConditionalGeneration."""

    name = "gemma3"
    model_types = ("gemma3_text",)
    architectures = ("Gemma3ForCausalLM",)
    norms = {  # noqa: RUF012  (a ClassVar of the base)
        "input_norm": "input_layernorm",
        "attn.out_norm": "post_attention_layernorm",
        "post_norm": "pre_feedforward_layernorm",
        "mlp.out_norm": "post_feedforward_layernorm",
    }
    norm_offset = 1.0
    activation_key = "hidden_activation"
    activations = {"gelu_pytorch_tanh": "gelu_tanh"}  # noqa: RUF012
    qk_norm = True
    tied_by_default = True

    def spec(self, config: Mapping[str, Any], name: str) -> ModelSpec:
        """The larger models' configurations leave out what is as in Gemma 3 4B."""
        return super().spec({**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}, name)

    def biases(self, config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        """attention_bias covers all four attention projections."""
        attention = flag(config, "attention_bias", False)
        return attention, attention, False

    def extra_facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Scaled embeddings, scores scaled by query_pre_attn_scalar, norms on outputs, and a cap on logits if any."""
        for key in ("attn_logit_softcapping", "use_bidirectional_attention"):
            if config.get(key):
                raise CheckpointError(f"the configuration's {key} is {config[key]!r}; the gemma3 family has none")
        cap = config.get("final_logit_softcapping")
        return {
            "embed_scale": positive_int(config, "hidden_size") ** 0.5,
            "attention_scale": positive_float(config, "query_pre_attn_scalar", 256.0) ** -0.5,
            "output_norms": True,
            "wide_activations": True,  # https://github.com/huggingface/transformers/issues/36822
            "logit_softcap": 0.0 if cap is None else positive_float(config, "final_logit_softcapping"),
        }

    def ropes(self, config: Mapping[str, Any], num_layers: int, max_context: int) -> Ropes:
        """The layers with a window have their own base; scaling written beside rope_theta is of the others."""
        given = config.get("rope_parameters") or {}
        if not isinstance(given, Mapping) or set(given) - {"full_attention", "sliding_attention"}:
            raise CheckpointError(
                f"the configuration's rope_parameters is {given!r}; it must have full_attention and sliding_attention"
            )
        scaling = config.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise CheckpointError(f"the configuration's rope_scaling is {scaling!r}; it must be an object or null")
        of_kind = [given.get(kind) or {} for kind in ("full_attention", "sliding_attention")]
        if not all(isinstance(settings, Mapping) for settings in of_kind):
            raise CheckpointError(f"the configuration's rope_parameters is {given!r}; each kind must have an object")
        whole, local = {**of_kind[0], **scaling}, of_kind[1]
        theta, scaling = read_rope(
            {"rope_theta": config.get("rope_theta"), "rope_parameters": whole}, max_context, 1000000.0
        )
        local_theta, local_scaling = read_rope(
            {"rope_theta": config.get("rope_local_base_freq"), "rope_parameters": local}, max_context
        )
        kinds = _kinds(config, num_layers)
        layers = tuple(LOCAL_ROPE if kind == "sliding_attention" else GLOBAL_ROPE for kind in kinds)
        return Ropes(theta, scaling, layers, local_theta, local_scaling)

    def sliding_windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
        """By layer_types; where they are missing, every sliding_window_pattern-th layer sees everything."""
        window = positive_int(config, "sliding_window", 4096)
        return tuple(window if kind == "sliding_attention" else 0 for kind in _kinds(config, num_layers))

    def default_kv_heads(self, num_heads: int) -> int:
        """Gemma 3 4B's 4."""
        return 4

    def default_head_dim(self, hidden_size: int, num_heads: int) -> int:
        """Gemma 3's 256."""
        return 256


def _kinds(config: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    kinds = layer_kinds(config, num_layers)
    if kinds is not None:
        return kinds
    pattern = positive_int(config, "sliding_window_pattern", 6)
    return tuple("full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(num_layers))
