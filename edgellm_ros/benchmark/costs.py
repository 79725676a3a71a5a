"""What a step has to move and compute: bytes of weights and KV cache of a decode step, operations of a prompt.

The sizes are those in the executor's memory, which are not always the stored ones: a GPU holds floats in bf16 and
widens what no kernel has (executors/cuda_formats.py), ONNX Runtime on a CPU holds floats and scales in fp32. An engine
is taken to read what is stored; what TensorRT makes of it is not known.
"""

from __future__ import annotations

from edgellm_ros.executors.cuda_formats import as_on_device
from edgellm_ros.manifest import LinearFormat, ModelSpec, QuantSpec

_INTEGERS = {"int8": 1.0, "int4": 0.5}
_BYTES_PER_WEIGHT = {  # nvfp4 becomes int8 on a CPU, which holds twice its numbers exactly
    "cuda": {"fp32": 2.0, "fp16": 2.0, "fp8": 1.0, **_INTEGERS},
    "onnxruntime": {"fp32": 4.0, "fp16": 4.0, "fp8": 4.0, "nvfp4": 1.0, **_INTEGERS},
    "tensorrt": {"fp32": 4.0, "fp16": 2.0, "fp8": 1.0, "nvfp4": 0.5, **_INTEGERS},
}
_BYTES_PER_SCALE = {"cuda": 2.0, "onnxruntime": 4.0, "tensorrt": 2.0}
_BYTES_PER_OFFSET = {"cuda": 2.0, "onnxruntime": 4.0, "tensorrt": 2.0}


def layer_weights(model: ModelSpec) -> int:
    """Elements of one layer's four matrices."""
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return model.hidden_size * (2 * q_width + 2 * kv_width + 3 * model.intermediate_size)


def num_parameters(model: ModelSpec) -> int:
    """Elements of all matrices; a tied head is counted once. Norms and biases are not counted."""
    table, head = model.hidden_size * model.vocab_size, model.hidden_size * model.num_rows
    return model.num_layers * layer_weights(model) + table + (0 if model.tied_head else head)


def decode_bytes(model: ModelSpec, quant: QuantSpec, executor: str = "cuda") -> int:
    """Bytes of weights that one decode step reads: every layer and the head, with scales; not the embedding table."""
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    if executor == "cuda":
        quant = as_on_device(model, quant)
    per_weight, per_scale = _BYTES_PER_WEIGHT[executor], _BYTES_PER_SCALE[executor]

    def size(count: int, form: LinearFormat) -> float:
        grouped = 4.0 if form.scheme == "fp8" else per_scale + (_BYTES_PER_OFFSET[executor] if form.offset else 0.0)
        return count * (per_weight[form.scheme] + (grouped / form.group_size if form.group_size else 0.0))

    inner = model.intermediate_size
    kinds = {"attn.qkv": q_width + 2 * kv_width, "attn.o": q_width, "mlp.gate_up": 2 * inner, "mlp.down": inner}
    layers = sum(
        size(model.hidden_size * width, quant.format_of(f"layers.{layer}.{kind}"))
        for layer in range(model.num_layers)
        for kind, width in kinds.items()
    )
    return int(layers + size(model.hidden_size * model.num_rows, quant.format_of(quant.head_tensor(model))))


def kv_bytes(model: ModelSpec, kv_bytes_per_token: int, context: float) -> float:
    """Bytes of KV cache that one sequence's decode step reads with `context` tokens in it; windows read less."""
    windows = model.sliding_windows or (0,) * model.num_layers
    per_layer = kv_bytes_per_token / model.num_layers
    return sum(per_layer * (min(context, window) if window else context) for window in windows)


def prefill_flops(model: ModelSpec, num_tokens: int) -> float:
    """Floating-point operations for the first `num_tokens` of a sequence, with one position's logits.

    Two for each weight and token; attention's two products count what the causal mask and the windows leave. Every
    layer counts every token, also where an executor leaves out what the asked logits do not need of the last one.
    """
    products = 2.0 * num_tokens * model.num_layers * layer_weights(model)
    head = 2.0 * model.hidden_size * model.num_rows
    pairs = 0.0
    for window in model.sliding_windows or (0,) * model.num_layers:
        seen = min(num_tokens, window or num_tokens)
        pairs += seen * (seen + 1) / 2 + (num_tokens - seen) * seen
    return products + head + 4.0 * model.num_heads * model.head_dim * pairs
