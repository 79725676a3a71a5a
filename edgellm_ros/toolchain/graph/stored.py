"""How both graphs read a stored linear layer: the nodes between its bytes and a product.

What multiplies a layer's input, and what is added to every weight of a group, are nodes around the product: TensorRT
and MatMulNBits know scales only. A group's offset meets the sum of the inputs of that group:
    sum_k x[k] * (q[n, k] * scale + offset[n, g]) = product(x, q * scale) + sum_g offset[n, g] * sum_{k in g} x[k]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from edgellm_ros.manifest import LinearFormat
from edgellm_ros.toolchain.graph.builder import GraphBuilder
from edgellm_ros.weight_file import WeightFile

_WHOLE = 1e-3  # how far from a whole number a zero point may come out of fp32
# E2M1's sixteen numbers, doubled, as bytes with an offset of 128: what MatMulNBits takes for 8 bits.
_E2M1_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
# The two of each byte, the lower nibble first: with them ONNX Runtime loads a model in a third of the time.
_E2M1_PAIRS_TWICE = np.stack([np.tile(_E2M1_TWICE, 16), np.repeat(_E2M1_TWICE, 16)], -1)


Caster = Callable[[str, tuple[int, ...]], str]  # the name of a stored fp32 tensor in the activations' dtype


def input_of(
    g: GraphBuilder, x: str, name: str, form: LinearFormat, k: int, cast: Caster, *, rounds: bool = False
) -> str:
    """`x` as the layer's columns want it: times its input factor, rounded if asked, and in their order."""
    if form.input_factor:
        x = g.node("Mul", [x, cast(f"{name}.input_factor", (k,))], f"{name}.scaled_input")
    if form.activation and rounds:
        scale = cast(f"{name}.input_scale", ())
        kind = TensorProto.FLOAT8E4M3FN
        small = g.node("QuantizeLinear", [x, scale], f"{name}.rounded_input", output_dtype=kind)
        x = g.node("DequantizeLinear", [small, scale], f"{name}.input")
    if form.input_order:
        order = g.weight(f"{name}.input_order", TensorProto.INT32, (k,))
        x = g.node("Gather", [x, order], f"{name}.ordered_input", axis=-1)
    return x


def add_offset(
    g: GraphBuilder, x: str, product: str, name: str, form: LinearFormat, shape: tuple[int, int],
    cast: Caster, *, flat: bool, output: str,
) -> str:  # fmt: skip
    """Add to the `product` of (n, k) `shape` what the groups' offsets contribute; x is (rows, k) if flat, else 3-D."""
    n, k = shape
    groups = k // form.group_size
    lead = [0] if flat else [0, 0]
    split = g.constant(f"groups_{len(lead)}_{groups}_{form.group_size}", [*lead, groups, form.group_size], np.int64)
    last = g.constant("axis_last", [-1], np.int64)
    sums = g.node("ReduceSum", [g.node("Reshape", [x, split], f"{name}.in_groups"), last], f"{name}.sums", keepdims=0)
    offset = g.node("Transpose", [cast(f"{name}.offset", (n, groups))], f"{name}.offset_t", perm=[1, 0])
    return g.node("Add", [product, g.node("MatMul", [sums, offset], f"{name}.shift")], output)


def dequantized(g: GraphBuilder, name: str, form: LinearFormat, n: int, k: int, dtype: int) -> str:
    """(n, k) of `dtype` (fp16 or fp32) by DequantizeLinear, for the portable graph."""
    group = form.group_size
    if form.scheme in ("int4", "int8"):
        stored = g.weight(f"{name}.weight", TensorProto.INT4 if form.scheme == "int4" else TensorProto.INT8, (n, k))
        scale = g.weight(f"{name}.scale", TensorProto.FLOAT16, (n, k // group))
        if dtype != TensorProto.FLOAT16:
            scale = g.node("Cast", [scale], f"{name}.scale32", to=dtype)
        return g.node("DequantizeLinear", [stored, scale], f"{name}.dequantized", axis=1, block_size=group)
    if form.scheme == "nvfp4":
        small = g.weight(f"{name}.scale", TensorProto.FLOAT8E4M3FN, (n, k // group))
        whole = _cast(g, g.weight(f"{name}.global_scale", TensorProto.FLOAT, (n,)), f"{name}.global", dtype)
        scale = g.node("DequantizeLinear", [small, whole], f"{name}.scales", axis=0)
        stored = g.weight(f"{name}.weight", TensorProto.FLOAT4E2M1, (n, k))
        return g.node("DequantizeLinear", [stored, scale], f"{name}.dequantized", axis=1, block_size=group)
    stored = g.weight(f"{name}.weight", TensorProto.FLOAT8E4M3FN, (n, k))
    shape = (n, k // group) if group else (n,)
    scale = _cast(g, g.weight(f"{name}.scale", TensorProto.FLOAT, shape), f"{name}.scales", dtype)
    if not group:
        return g.node("DequantizeLinear", [stored, scale], f"{name}.dequantized", axis=0)
    return g.node("DequantizeLinear", [stored, scale], f"{name}.dequantized", axis=1, block_size=group)


def widened(g: GraphBuilder, name: str, form: LinearFormat, n: int, k: int) -> str:
    """(n, k) fp32 of an fp8 weight, which ONNX Runtime folds to a constant when it loads the graph."""
    group = form.group_size or k
    groups = k // group
    stored = g.weight(f"{name}.weight", TensorProto.FLOAT8E4M3FN, (n, groups, group), alias=f"{name}.weight")
    wide = g.node("Cast", [stored], f"{name}.fp32", to=TensorProto.FLOAT)
    scale = g.weight(f"{name}.scale", TensorProto.FLOAT, (n, groups, 1))
    whole = g.node("Mul", [wide, scale], f"{name}.scaled")
    return g.node("Reshape", [whole, g.constant(f"shape_{n}_{k}", [n, k], np.int64)], f"{name}.dequantized")


def has_zero_points(weights: WeightFile, name: str, form: LinearFormat) -> bool:
    """Whether every offset of an int4 layer is 8 less a whole number from 0 to 15, times its scale."""
    if not (form.zero_points and form.scheme == "int4"):
        return False
    scale = weights[f"{name}.scale"].astype(np.float32)
    if not scale.all():
        return False
    zeros = 8 - weights[f"{name}.offset"] / scale
    return bool(np.abs(zeros - np.rint(zeros).clip(0, 15)).max() < _WHOLE)


def zero_points(g: GraphBuilder, name: str, form: LinearFormat, n: int, k: int, scale: str) -> str:
    """MatMulNBits' zero points, (n, ceil(groups / 2)) with two a byte, of the offsets and the fp32 `scale`."""
    groups = k // form.group_size
    ratio = g.node("Div", [g.weight(f"{name}.offset", TensorProto.FLOAT, (n, groups)), scale], f"{name}.offset_steps")
    zeros = g.node("Sub", [g.constant("middle", 8, np.float32), ratio], f"{name}.zero")
    zeros = g.node("Cast", [g.node("Round", [zeros], f"{name}.zero_round")], f"{name}.zero_bytes", to=TensorProto.UINT8)
    if groups % 2:
        pads = g.constant("pad_one_column", [0, 0, 0, 1], np.int64)
        zeros = g.node("Pad", [zeros, pads], f"{name}.zero_padded")
    pairs = g.constant(f"pairs_{n}_{groups}", [n, (groups + 1) // 2, 2], np.int64)
    zeros = g.node("Reshape", [zeros, pairs], f"{name}.zero_pairs")
    low, high = (
        g.node("Gather", [zeros, g.constant(f"index_{i}", i, np.int64)], f"{name}.zero_{i}", axis=2) for i in (0, 1)
    )
    high = g.node("BitShift", [high, g.constant("nibble", 4, np.uint8)], f"{name}.zero_high", direction="LEFT")
    return g.node("BitwiseOr", [low, high], f"{name}.zero_points")


def nvfp4_bytes(g: GraphBuilder, name: str, n: int, k: int, group: int) -> tuple[str, str]:
    """An nvfp4 weight as MatMulNBits' 8-bit one: exactly twice its numbers, (n, k / group, group), and fp32 scales."""
    pairs = g.weight(f"{name}.weight", TensorProto.UINT8, (n, k // 2))
    table = g.constant("e2m1_pairs_twice", _E2M1_PAIRS_TWICE + 128, np.uint8)
    index = g.node("Cast", [pairs], f"{name}.index", to=TensorProto.INT32)
    weight = g.node("Gather", [table, index], f"{name}.numbers", axis=0)
    shape = g.constant(f"blocks_{n}_{k}_{group}", [n, k // group, group], np.int64)
    weight = g.node("Reshape", [weight, shape], f"{name}.bytes")
    small = g.weight(f"{name}.scale", TensorProto.FLOAT8E4M3FN, (n, k // group))
    scale = g.node("Cast", [small], f"{name}.small_scale", to=TensorProto.FLOAT)
    scale = g.node("Mul", [scale, g.weight(f"{name}.global_scale", TensorProto.FLOAT, (n, 1))], f"{name}.whole_scale")
    return weight, g.node("Mul", [scale, g.constant("half", 0.5, np.float32)], f"{name}.half_scale")


def _cast(g: GraphBuilder, stored: str, name: str, dtype: int) -> str:
    return stored if dtype == TensorProto.FLOAT else g.node("Cast", [stored], f"{name}.cast", to=dtype)
