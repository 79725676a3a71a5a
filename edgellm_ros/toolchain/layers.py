"""Which of a checkpoint's tensors become which stored tensor: the fused names that all executors share."""

from __future__ import annotations

import numpy as np

from edgellm_ros.bundle import ModelSpec, QuantSpec
from edgellm_ros.toolchain.checkpoint import Checkpoint
from edgellm_ros.toolchain.reference import FloatArray
from edgellm_ros.toolchain.weights import TensorPlan, plan_linear

# Stored stem -> the checkpoint's modules, stacked along the output features.
LINEARS: dict[str, tuple[str, ...]] = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
NORMS: dict[str, str] = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
HEAD_NORMS: dict[str, str] = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    """The checkpoint's prefix of a layer."""
    return f"model.layers.{layer}."


def read_layer(checkpoint: Checkpoint, model: ModelSpec, layer: int) -> dict[str, FloatArray]:
    """One layer's tensors in fp32 under their stored stems: `attn.qkv.weight`, `attn.qkv.bias`, `input_norm`, …"""
    prefix = layer_prefix(layer)
    found: dict[str, FloatArray] = {}
    for stem, modules in LINEARS.items():
        weights = [checkpoint.read(f"{prefix}{m}.weight") for m in modules]
        found[f"{stem}.weight"] = np.concatenate(weights) if len(weights) > 1 else weights[0]
        if has_bias(checkpoint, layer, stem):
            biases = [
                checkpoint.read(f"{prefix}{m}.bias")
                if f"{prefix}{m}.bias" in checkpoint
                else np.zeros(len(w), np.float32)
                for m, w in zip(modules, weights, strict=True)
            ]
            found[f"{stem}.bias"] = np.concatenate(biases)
    norms = {**NORMS, **HEAD_NORMS} if model.qk_norm else NORMS
    for stem, module in norms.items():
        found[stem] = checkpoint.read(f"{prefix}{module}.weight")
    return found


def has_bias(checkpoint: Checkpoint, layer: int, stem: str) -> bool:
    """Whether any module of a stored linear layer has a bias."""
    return any(f"{layer_prefix(layer)}{m}.bias" in checkpoint for m in LINEARS[stem])


def plan_weights(checkpoint: Checkpoint, model: ModelSpec, quant: QuantSpec) -> list[TensorPlan]:
    """Every tensor of weights.safetensors."""
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes = {
        "attn.qkv": (q_width + 2 * kv_width, model.hidden_size),
        "attn.o": (model.hidden_size, q_width),
        "mlp.gate_up": (2 * model.intermediate_size, model.hidden_size),
        "mlp.down": (model.hidden_size, model.intermediate_size),
    }
    plan: list[TensorPlan] = []
    for layer in range(model.num_layers):
        at = f"layers.{layer}."
        for stem, (n, k) in shapes.items():
            plan += plan_linear(at + stem, n, k, quant.format_of(at + stem))
            if has_bias(checkpoint, layer, stem):
                plan.append(TensorPlan(f"{at}{stem}.bias", np.float32, (n,)))
        plan += [TensorPlan(f"{at}{stem}.weight", np.float32, (model.hidden_size,)) for stem in NORMS]
        if model.qk_norm:
            plan += [TensorPlan(f"{at}{stem}.weight", np.float32, (model.head_dim,)) for stem in HEAD_NORMS]
    table = (model.vocab_size, model.hidden_size)
    plan += plan_linear("embed", *table, quant.format_of("embed"))
    if quant.head_tensor(model) == "head":
        plan += plan_linear("head", model.num_rows, model.hidden_size, quant.format_of("head"))
    plan.append(TensorPlan("final_norm.weight", np.float32, (model.hidden_size,)))
    half = model.head_dim // 2
    return plan + [TensorPlan(f"rope.{t}", np.float32, (model.max_context, half)) for t in ("cos", "sin")]
