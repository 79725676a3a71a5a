"""The published shapes and weight formats that a benchmark can run with random weights, in plain words and numbers.

Importing this costs nothing: the command line lists the names.
"""

from __future__ import annotations

from typing import Any

MAX_CONTEXT = 32768
_GEMMA3_1B_LAYERS = ("local",) * 5 + ("global",)  # in turn

# ModelSpec's fields; the name is that of the model whose shape it is.
SHAPE_FIELDS: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "name": "Llama-3.2-1B", "family": "llama", "num_layers": 16, "hidden_size": 2048, "intermediate_size": 8192,
        "num_heads": 32, "num_kv_heads": 8, "head_dim": 64, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "tied_head": True, "rope_theta": 500000.0,
    },
    "qwen3-4b": {
        "name": "Qwen3-4B", "family": "qwen3", "num_layers": 36, "hidden_size": 2560, "intermediate_size": 9728,
        "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "qk_norm": True, "tied_head": True, "rope_theta": 1e6,
    },
    "llama-8b": {
        "name": "Llama-3.1-8B", "family": "llama", "num_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "qwen3-0.6b": {
        "name": "Qwen3-0.6B", "family": "qwen3", "num_layers": 28, "hidden_size": 1024, "intermediate_size": 3072,
        "num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "qk_norm": True, "tied_head": True, "rope_theta": 1e6,
    },
    "qwen3-1.7b": {
        "name": "Qwen3-1.7B", "family": "qwen3", "num_layers": 28, "hidden_size": 2048, "intermediate_size": 6144,
        "num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "qk_norm": True, "tied_head": True, "rope_theta": 1e6,
    },
    "llama-3b": {
        "name": "Llama-3.2-3B", "family": "llama", "num_layers": 28, "hidden_size": 3072, "intermediate_size": 8192,
        "num_heads": 24, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "tied_head": True, "rope_theta": 500000.0,
    },
    "qwen3-8b": {
        "name": "Qwen3-8B", "family": "qwen3", "num_layers": 36, "hidden_size": 4096, "intermediate_size": 12288,
        "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "qk_norm": True, "rope_theta": 1e6,
    },
    "qwen3-14b": {
        "name": "Qwen3-14B", "family": "qwen3", "num_layers": 40, "hidden_size": 5120, "intermediate_size": 17408,
        "num_heads": 40, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "qk_norm": True, "rope_theta": 1e6,
    },
    "qwen3-32b": {
        "name": "Qwen3-32B", "family": "qwen3", "num_layers": 64, "hidden_size": 5120, "intermediate_size": 25600,
        "num_heads": 64, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "qk_norm": True, "rope_theta": 1e6,
    },
    "danube3-500m": {
        "name": "H2O-Danube3-500M", "family": "llama", "num_layers": 16, "hidden_size": 1536, "intermediate_size": 4096,
        "num_heads": 16, "num_kv_heads": 8, "head_dim": 96, "vocab_size": 32000, "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
    },
    "danube2-1.8b": {
        "name": "H2O-Danube2-1.8B", "family": "mistral", "num_layers": 24, "hidden_size": 2560,
        "intermediate_size": 6912, "num_heads": 32, "num_kv_heads": 8, "head_dim": 80, "vocab_size": 32000,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    },
    "gemma3-1b": {
        "name": "Gemma-3-1B", "family": "gemma3", "num_layers": 26, "hidden_size": 1152, "intermediate_size": 6912,
        "num_heads": 4, "num_kv_heads": 1, "head_dim": 256, "vocab_size": 262144, "rms_norm_eps": 1e-6,
        "qk_norm": True, "tied_head": True, "activation": "gelu_tanh", "output_norms": True, "embed_scale": 1152**0.5,
        "rope_theta": 1e6, "local_rope_theta": 1e4, "layer_ropes": (_GEMMA3_1B_LAYERS * 5)[:26],
        "sliding_windows": tuple(512 if kind == "local" else 0 for kind in _GEMMA3_1B_LAYERS * 5)[:26],
    },
}  # fmt: skip
# QuantSpec's fields: layers, group, head, embedding. bf16, int8 and int4 are what export writes; fp8 is made of fp16
# weights at load, and the last one is the fastest that the kernels have.
SCHEME_FIELDS: dict[str, tuple[str, int, str, str]] = {
    "bf16": ("fp16", 0, "fp16", "fp16"),
    "fp8": ("fp8", 0, "fp8", "fp16"),
    "int8": ("int8", 64, "int8", "int8"),
    "int4": ("int4", 64, "int8", "int8"),
    "int4-fp8": ("int4", 128, "fp8", "fp16"),
}
