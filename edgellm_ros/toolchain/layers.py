"""Which of a checkpoint's tensors become which stored tensor: the fused names that all executors share."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from edgellm_ros.manifest import ModelSpec, QuantSpec
from edgellm_ros.toolchain.checkpoint import Checkpoint
from edgellm_ros.toolchain.families import family_of
from edgellm_ros.toolchain.reference import FloatArray
from edgellm_ros.toolchain.weights import TensorPlan, plan_linear

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    """The checkpoint's prefix of a layer."""
    return f"model.layers.{layer}."


def read_layer(
    checkpoint: Checkpoint, model: ModelSpec, layer: int, buffers: dict[str, FloatArray] | None = None
) -> dict[str, FloatArray]:
    """One layer's tensors in fp32 under their stored stems: `attn.qkv.weight`, `attn.qkv.bias`, `input_norm`, …

    The weights lie in `buffers`, which is filled at the first call and overwritten by the next.
    """
    prefix = layer_prefix(layer)
    family = family_of(model)
    buffers = {} if buffers is None else buffers
    found: dict[str, FloatArray] = {}
    for stem, modules in family.linears.items():
        shapes = [checkpoint.shape(f"{prefix}{m}.weight") for m in modules]
        ends = list(accumulate(rows for rows, _ in shapes))
        if stem not in buffers:
            buffers[stem] = np.empty((ends[-1], shapes[0][1]), np.float32)
        found[f"{stem}.weight"] = buffers[stem]
        for module, (rows, _), end in zip(modules, shapes, ends, strict=True):
            checkpoint.read_into(f"{prefix}{module}.weight", buffers[stem][end - rows : end])
        if has_bias(checkpoint, layer, modules):
            biases = [
                checkpoint.read(f"{prefix}{m}.bias")
                if f"{prefix}{m}.bias" in checkpoint
                else np.zeros(rows, np.float32)
                for m, (rows, _) in zip(modules, shapes, strict=True)
            ]
            found[f"{stem}.bias"] = np.concatenate(biases)
    for stem, module in {**family.norms, **(family.head_norms if model.qk_norm else {})}.items():
        found[stem] = read_norm(checkpoint, model, f"{prefix}{module}.weight")
    return found


def read_norm(checkpoint: Checkpoint, model: ModelSpec, name: str) -> FloatArray:
    """The gain of a norm in fp32, with what its family adds to it; a GGUF file stores the sum already."""
    offset = 0.0 if checkpoint.kind == "gguf" else family_of(model).norm_offset
    return checkpoint.read(name) + np.float32(offset) if offset else checkpoint.read(name)


def has_bias(checkpoint: Checkpoint, layer: int, modules: tuple[str, ...]) -> bool:
    """Whether any of the modules of a stored linear layer has a bias."""
    return any(f"{layer_prefix(layer)}{m}.bias" in checkpoint for m in modules)


def plan_weights(checkpoint: Checkpoint, model: ModelSpec, quant: QuantSpec) -> list[TensorPlan]:
    """Every tensor of weights.safetensors."""
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes = {
        "attn.qkv": (q_width + 2 * kv_width, model.hidden_size),
        "attn.o": (model.hidden_size, q_width),
        "mlp.gate_up": (2 * model.intermediate_size, model.hidden_size),
        "mlp.down": (model.hidden_size, model.intermediate_size),
    }
    family = family_of(model)
    plan: list[TensorPlan] = []
    for layer in range(model.num_layers):
        at = f"layers.{layer}."
        for stem, (n, k) in shapes.items():
            plan += plan_linear(at + stem, n, k, quant.format_of(at + stem))
            if has_bias(checkpoint, layer, family.linears[stem]):
                plan.append(TensorPlan(f"{at}{stem}.bias", np.float32, (n,)))
        plan += [TensorPlan(f"{at}{stem}.weight", np.float32, (model.hidden_size,)) for stem in family.norms]
        if model.qk_norm:
            plan += [TensorPlan(f"{at}{stem}.weight", np.float32, (model.head_dim,)) for stem in family.head_norms]
    table = (model.vocab_size, model.hidden_size)
    plan += plan_linear("embed", *table, quant.format_of("embed"))
    if quant.head_tensor(model) == "head":
        plan += plan_linear("head", model.num_rows, model.hidden_size, quant.format_of("head"))
    plan.append(TensorPlan("final_norm.weight", np.float32, (model.hidden_size,)))
    half = (model.max_context, model.num_rotated // 2)
    ropes = [f"{stem}.{part}" for stem in model.rope_tables().values() for part in ("cos", "sin")]
    return plan + [TensorPlan(name, np.float32, half) for name in ropes]
