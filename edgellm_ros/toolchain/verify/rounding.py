"""Rounds a layer's input as a quantised checkpoint's activation scales say, in the reference decoder.

This is what a checkpoint gives where its inputs are rounded as it says (W8A8, FP8). Of the executors only an engine of
an fp8 checkpoint uses these scales. ONNX Runtime rounds to int8 inside its int4 and int8 products (accuracy_level 4),
and `cuda` to FP8 in prompts with fp8 weights, both by scales of their own.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from edgellm_ros.manifest import ModelSpec
from edgellm_ros.toolchain.checkpoint import Checkpoint
from edgellm_ros.toolchain.families import family_of
from edgellm_ros.toolchain.layers import layer_prefix
from edgellm_ros.toolchain.quantized.packed import ActivationScale
from edgellm_ros.toolchain.reference import FloatArray, ReferenceDecoder


class RoundedDecoder(ReferenceDecoder):
    """A reference decoder whose linear layers round what they read."""

    def __init__(
        self, model: ModelSpec, ropes: dict[str, tuple[FloatArray, FloatArray]], scales: dict[str, ActivationScale]
    ) -> None:
        """scales: by stem, `layers.0.attn.qkv`; a layer without one reads its input as it is."""
        super().__init__(model, ropes)
        self._scales = scales
        self._layer = 0

    def layer(self, index: int, weights: dict[str, FloatArray]) -> None:
        """See ReferenceDecoder.layer."""
        self._layer = index
        super().layer(index, weights)

    def linear(self, x: FloatArray, weights: dict[str, FloatArray], stem: str) -> FloatArray:
        """See ReferenceDecoder.linear."""
        scale = self._scales.get(f"layers.{self._layer}.{stem}")
        return super().linear(x if scale is None else round_activations(x, scale), weights, stem)


def round_activations(x: FloatArray, scale: ActivationScale) -> FloatArray:
    """`x` as a layer sees it whose input is stored in int8 or FP8 (E4M3) with one scale for the tensor."""
    if scale.factor is not None:  # multiplied before rounding, and part of the weights afterwards
        x = x * scale.factor
    y = x / np.float32(scale.value)
    if scale.kind == "int8":
        y = np.clip(np.rint(y), -128, 127)
    else:
        y = np.clip(y, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    y = y * np.float32(scale.value)
    rounded: FloatArray = y if scale.factor is None else y / scale.factor
    return rounded


def activation_scales(source: Checkpoint, model: ModelSpec) -> dict[str, ActivationScale]:
    """The scales of every stored linear layer's input, by stem; of layers stored together, the largest."""
    found: dict[str, ActivationScale] = {}
    for layer in range(model.num_layers):
        for stem, modules in family_of(model).linears.items():
            names = (f"{layer_prefix(layer)}{module}.weight" for module in modules)
            scales = [scale for name in names if (scale := source.activation_scale(name)) is not None]
            if scales:
                found[f"layers.{layer}.{stem}"] = max(scales, key=lambda scale: scale.value)
    return found
