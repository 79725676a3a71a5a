"""The published shapes and weight formats that a benchmark can run with random weights, in plain words and numbers.

Importing this costs nothing: the command line lists the names.
"""

from __future__ import annotations

from typing import Any

MAX_CONTEXT = 32768

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
