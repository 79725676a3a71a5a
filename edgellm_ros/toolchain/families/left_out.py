"""Model families that are left out on purpose, by name, with the reason and what to take instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EXPERTS = (
    "a mixture of experts: which weights a token needs is decided while running, and all of them have to be in memory, "
    "which neither the graphs nor the kernels here are made for; take a dense model, such as {instead}"
)
_IMAGES = "a model for images and text; its text decoder alone is not exported; take {instead}"
_OTHER = "a decoder with {what}, which no family here has; take {instead}"

# config.json's model_type, or GGUF's general.architecture where it is written differently: the model's name, why not.
LEFT_OUT: dict[str, tuple[str, str]] = {
    "llama4": ("Llama 4", _EXPERTS.format(instead="Llama 3.2 1B or 3B")),
    "llama4_text": ("Llama 4", _EXPERTS.format(instead="Llama 3.2 1B or 3B")),
    "qwen2_moe": ("Qwen MoE", _EXPERTS.format(instead="Qwen3 1.7B or 4B")),
    "qwen2moe": ("Qwen MoE", _EXPERTS.format(instead="Qwen3 1.7B or 4B")),
    "qwen3moe": ("Qwen3 MoE", _EXPERTS.format(instead="Qwen3 1.7B or 4B")),
    "deepseek2": ("DeepSeek V2 to R1", _EXPERTS.format(instead="a DeepSeek-R1 distill")),
    "qwen3_moe": ("Qwen3 MoE", _EXPERTS.format(instead="Qwen3 1.7B or 4B")),
    "qwen3_next": ("Qwen3-Next", _EXPERTS.format(instead="Qwen3 1.7B or 4B")),
    "mixtral": ("Mixtral", _EXPERTS.format(instead="Mistral 7B")),
    "phimoe": ("Phi-3.5-MoE", _EXPERTS.format(instead="Phi-4-mini")),
    "deepseek_v2": ("DeepSeek V2", _EXPERTS.format(instead="a DeepSeek-R1 distill")),
    "deepseek_v3": ("DeepSeek V3 and R1", _EXPERTS.format(instead="a DeepSeek-R1 distill")),
    "gpt_oss": ("gpt-oss", _EXPERTS.format(instead="Qwen3 4B")),
    "granitemoe": ("Granite MoE", _EXPERTS.format(instead="Qwen3 1.7B")),
    "olmoe": ("OLMoE", _EXPERTS.format(instead="Qwen3 1.7B")),
    "qwen2_vl": ("Qwen2-VL", _IMAGES.format(instead="Qwen2.5")),
    "qwen2_5_vl": ("Qwen2.5-VL", _IMAGES.format(instead="Qwen2.5")),
    "phi4_multimodal": ("Phi-4-multimodal", _IMAGES.format(instead="Phi-4-mini")),
    "gemma": ("Gemma 1", _OTHER.format(what="scaled embeddings and Llama's norms", instead="Gemma 3")),
    "gemma2": ("Gemma 2", _OTHER.format(what="capped attention scores", instead="Gemma 3")),
    "gemma3n_text": ("Gemma 3n", _OTHER.format(what="an embedding for each layer", instead="Gemma 3")),
    "phi": ("Phi-1 and Phi-2", _OTHER.format(what="LayerNorm and parallel blocks", instead="Phi-3 or Phi-4-mini")),
}
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def why_left_out(config: Mapping[str, Any]) -> str:
    """Why models of this configuration are left out, as the end of a sentence; empty when they are not in the table.

    A configuration that counts more than one expert is a mixture of experts, whatever its type is called.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in LEFT_OUT:
        name, reason = LEFT_OUT[kind]
        return f"{name} is {reason}"
    text = config.get("text_config")  # of the decoder, where the model has images as well
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in _EXPERT_KEYS:
            count = part.get(key)
            if isinstance(count, int) and count > 1:
                return f"{key} is {count}, so it is {_EXPERTS.format(instead='Qwen3 1.7B or 4B')}"
    return ""
