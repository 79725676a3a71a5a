"""Configurations as their providers publish them, whole sizes: the tensors and tables are those that transformers builds.

Nothing is downloaded: the keys are written down here, longrope's factors are made up, and models are built without memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edgellm_ros.toolchain.families import FAMILIES
from edgellm_ros.toolchain.rope import rope_tables

_LONGROPE = {"long_factor": np.linspace(1, 60, 48).tolist(), "short_factor": np.linspace(1, 3, 48).tolist()}
CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM3-3B": {
        "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256, "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "rope_scaling": None, "use_sliding_window": False,
        "sliding_window": None, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "mlp_bias": False,
        "attention_bias": False, "layer_types": ["full_attention"] * 36, "max_window_layers": 28, "pretraining_tp": 2,
    },
    "Phi-3-mini-4k": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None,
        "sliding_window": 2047, "tie_word_embeddings": False, "attention_bias": False,
    },
    "Phi-3.5-mini": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": {**_LONGROPE, "type": "longrope"}, "sliding_window": 262144, "tie_word_embeddings": False,
    },
    "Phi-4-mini": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75, "rope_scaling": {**_LONGROPE, "type": "longrope"}, "sliding_window": 262144,
        "tie_word_embeddings": True, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False,
    },
    "Phi-4": {
        "model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352, "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 250000, "rope_scaling": None,
        "sliding_window": None, "tie_word_embeddings": False,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_local_base_freq": 10000,
        "rope_scaling": None, "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "attention_bias": False, "cache_implementation": "hybrid",
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6, "rope_theta": 10000, "sliding_window": 4096, "max_window_layers": 21, "use_mrope": False,
        "use_sliding_window": False, "tie_word_embeddings": False,
    },
    "DeepSeek-R1-Distill-Llama-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False,
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_configuration_is_what_transformers_makes_of_it(name: str) -> None:
    raw = CONFIGS[name]
    family = next(f for f in FAMILIES if raw["model_type"] in f.model_types)
    spec = family.spec(raw, name)
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert family.expected_tensors(spec, raw) == {n: tuple(p.shape) for n, p in model.named_parameters()}
    types = getattr(config, "layer_types", None) or []
    window = config.sliding_window if raw["model_type"] == "phi3" else 0
    theirs = [config.sliding_window if kind == "sliding_attention" else window or 0 for kind in types]
    theirs = [w if w < spec.max_context else 0 for w in theirs or [window or 0] * spec.num_layers]
    assert list(spec.sliding_windows or [0] * spec.num_layers) == theirs
    module = type(model.model.rotary_emb)(config)
    layer_types = {"global": "full_attention", "local": "sliding_attention"}
    for rope in spec.rope_tables():
        which = {"layer_type": layer_types[rope]} if family.name == "gemma3" else {}
        cos, sin = module(torch.zeros(1, 1, 1), torch.arange(spec.max_context)[None, ::61], **which)
        for table, expected in zip(rope_tables(spec, spec.max_context, rope), (cos, sin), strict=True):
            rounding = 1e-6 + np.arange(0, spec.max_context, 61)[:, None] * 2.4e-7  # of frequencies, carried along
            assert (np.abs(table[::61] - expected[0, :, : table.shape[1]].numpy()) <= rounding).all()
