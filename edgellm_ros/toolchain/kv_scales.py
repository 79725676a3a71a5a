"""A checkpoint's scales of an FP8 KV cache, as powers of two that are multiplied into the weights.

A scale is the largest number that calibration saw, over E4M3's largest, 448. Above 1, numbers would be cut off without
it. Below 1, a float needs none before numbers come near E4M3's subnormals, so the largest becomes 0.9 to 1.75, at least
56 times the smallest normal number, and no more: attention's output projection gets the factor, in fp16 scales.
"""

from __future__ import annotations

import math

import numpy as np

from edgellm_ros.executors.kv_scales import FloatArray, projection_factors, row_factors
from edgellm_ros.manifest import ModelSpec
from edgellm_ros.toolchain.checkpoint import Checkpoint
from edgellm_ros.toolchain.layers import layer_prefix

_UNUSED = 256  # of E4M3's range at its upper end: nothing is gained by filling it
Scales = tuple[tuple[float, float], ...]  # of keys and values, for each layer; empty when all are 1


def read_kv_scales(source: Checkpoint, num_layers: int) -> tuple[Scales, tuple[str, ...]]:
    """The powers of two that keys and values are divided by in the cache, and what to tell about them.

    Raises CheckpointError for a scale that is no positive number.
    """
    found = [source.kv_scales(layer_prefix(layer)) for layer in range(num_layers)]
    known = [scales for scales in found if scales is not None]
    if not known:
        return (), ()
    powers = tuple((1.0, 1.0) if scales is None else (_power(scales[0]), _power(scales[1])) for scales in found)
    least, largest = min(map(min, known)), max(map(max, known))
    about = f"scales of the KV cache (k_scale, v_scale) from {least:.3g} to {largest:.3g}"
    moved = sum(pair != (1.0, 1.0) for pair in powers)
    if not moved:
        return (), (f"{about}: E4M3 holds these keys and values as they are, so none is divided",)
    return powers, (f"{about}: keys and values of {moved} layers are stored divided by powers of two",)


def scale_layer(model: ModelSpec, layer: int, tensors: dict[str, FloatArray]) -> None:
    """Multiply the factors into a layer's fp32 tensors (as `read_layer` names them), in place."""
    factors = projection_factors(model, layer)
    for stem, tensor in tensors.items():
        kind, _, what = stem.rpartition(".")
        rows = row_factors(model, f"layers.{layer}.{kind}")
        if rows is not None and what == "weight":
            tensor *= rows[:, None]
        elif rows is not None and kind == "attn.qkv":
            tensor *= rows
        elif stem in ("attn.q_norm", "attn.k_norm"):
            tensor *= np.float32(factors.get(stem.removeprefix("attn."), 1.0))


def _power(scale: float) -> float:
    """What numbers of that scale are divided by: the next power of two if it is above 1, else what is needed, or 1."""
    mantissa, exponent = math.frexp(scale)
    above = math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
    return above if above > 1 else min(1.0, above * _UNUSED)
