"""What a bundle says of a layer's input, done where that input is made: factors, and the order of its features.

AWQ multiplies a layer's input by a factor for each feature, and GPTQ may store a layer's columns in the order of their
activations. A kernel of its own does both (kernels/input_map.cu), once more a product. But the input of

- attn.qkv, mlp.gate_up and the head is a norm's output: the factor goes into the gain, which no other layer reads;
- mlp.down is a product with up's output: factor and order go into the rows of up, the order into those of gate too;
- attn.o is attention's mixture of values: the factor goes into v's rows where no two heads share them.

There it costs nothing. An adapter reads the same inputs, so its A is divided by the factor and has its columns in the
order, and its B has the rows that its layer has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import RequestError
from edgellm_ros.executors.cuda_formats import folds_factor, folds_order, linear_shapes, native_format
from edgellm_ros.executors.cuda_weights import half
from edgellm_ros.executors.lora import LoraAdapter, LoraTensors
from edgellm_ros.manifest import ModelSpec, QuantSpec
from edgellm_ros.weight_file import WeightFile

Array = npt.NDArray[Any]
_NORMS = {"input_norm": "attn.qkv", "post_norm": "mlp.gate_up"}  # whose output is which layer's input
_READERS = {"attn.qkv": "attn.o", "mlp.gate_up": "mlp.down"}  # which layer reads the rows of which
_STEMS = {
    "q_proj": "attn.qkv", "k_proj": "attn.qkv", "v_proj": "attn.qkv", "o_proj": "attn.o",
    "gate_proj": "mlp.gate_up", "up_proj": "mlp.gate_up", "down_proj": "mlp.down",
}  # fmt: skip


class LayerInputs:
    """The factors and orders of one bundle that other layers take over."""

    def __init__(self, model: ModelSpec, quant: QuantSpec, weights: WeightFile) -> None:
        """Nothing is read until it is asked for."""
        self._model, self._quant, self._weights = model, quant, weights

    def gain(self, name: str, values: Array) -> Array:
        """The norm `name` (layers.0.post_norm.weight, final_norm.weight, …) with its reader's factor."""
        stem = name.removesuffix(".weight")
        layer, _, norm = stem.rpartition(".")
        reader = "head" if stem == "final_norm" else f"{layer}.{_NORMS[norm]}" if norm in _NORMS else ""
        factor = self._factor(reader) if reader else None
        return values if factor is None else values * factor

    def rows(self, stem: str, values: Array, scale: Array | None = None) -> tuple[Array, Array | None]:
        """The weight (out, in) and its scales, or a bias (out,), of `stem` with the rows that its reader wants."""
        parts = stem.split(".")
        layer, reader = ".".join(parts[:2]), _READERS.get(".".join(parts[2:]))
        if reader is None:
            return values, scale
        factor, order = self._row_factor(layer, reader), self._row_order(layer, reader)
        if factor is not None:
            if scale is None:
                values = values.astype(np.float32) * factor.reshape(-1, *[1] * (values.ndim - 1))
            else:
                wide = scale.astype(np.float32) * factor.reshape(-1, *[1] * (scale.ndim - 1))
                scale = half(wide, stem) if scale.dtype == np.float16 else wide
        if order is not None:
            values, scale = values[order], None if scale is None else scale[order]
        return values, scale

    def mapped(self) -> Iterator[tuple[str, Array | None, Array | None, Array | None]]:
        """(stem, order, factor, gain) of the layers whose input the device maps: out[j] = x[order[j]] * factor[j].

        `gain` is that of the norm before the layer, in the order, where there is both.
        """
        norms = {kind: norm for norm, kind in _NORMS.items()}
        for layer in range(self._model.num_layers):
            for kind in linear_shapes(self._model):
                stem = f"layers.{layer}.{kind}"
                native = native_format(stem, self._quant.format_of(stem), self._model)
                if not (native.order or native.factor):
                    continue
                order = self._weights[f"{stem}.input_order"] if native.order else None
                factor = self._weights[f"{stem}.input_factor"] if native.factor else None
                gain = None
                if order is not None and kind in norms:
                    name = f"layers.{layer}.{norms[kind]}.weight"
                    gain = self.gain(name, self._weights[name])[order]
                yield stem, order, factor if factor is None or order is None else factor[order], gain

    def adapter(self, adapter: LoraAdapter) -> LoraAdapter:
        """The adapter for layers whose inputs and rows are these; raises RequestError where a factor is 0."""
        return replace(adapter, tensors=tuple(self._adapted(item) for item in adapter.tensors))

    def _adapted(self, item: LoraTensors) -> LoraTensors:
        layer, stem = f"layers.{item.layer}", f"layers.{item.layer}.{_STEMS[item.target]}"
        a: Array = item.a
        b: Array = item.b
        native = native_format(stem, self._quant.format_of(stem), self._model)
        factor = self._weights[f"{stem}.input_factor"] if native.factor else self._factor(stem)
        if factor is not None:
            if not factor.all():
                raise RequestError(f"{stem}.input_factor is 0 somewhere: adapters cannot be used with this bundle")
            a = a / factor
        own_order = self._weights[f"{stem}.input_order"] if native.order else self._order(stem)
        a = a if own_order is None else a[:, own_order]
        reader = _READERS.get(_STEMS[item.target])
        if reader is not None:
            part = self._part(item.target)
            row_factor, order = self._row_factor(layer, reader), self._row_order(layer, reader)
            b = b if row_factor is None else b * row_factor[part][:, None]
            b = b if order is None else b[self._order(f"{layer}.{reader}")]
        if a is item.a and b is item.b:
            return item
        return replace(item, a=np.ascontiguousarray(a, np.float32), b=np.ascontiguousarray(b, np.float32))

    def _part(self, target: str) -> slice:
        """A projection's rows of its stacked layer."""
        m = self._model
        q, kv, inner = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim, m.intermediate_size
        first, count = {
            "q_proj": (0, q), "k_proj": (q, kv), "v_proj": (q + kv, kv),
            "gate_proj": (0, inner), "up_proj": (inner, inner),
        }[target]  # fmt: skip
        return slice(first, first + count)

    def _factor(self, stem: str) -> Array | None:
        folded = self._quant.format_of(stem).input_factor and folds_factor(stem, self._model)
        return self._weights[f"{stem}.input_factor"] if folded else None

    def _order(self, stem: str) -> Array | None:
        folded = self._quant.format_of(stem).input_order and folds_order(stem)
        return self._weights[f"{stem}.input_order"] if folded else None

    def _row_factor(self, layer: str, reader: str) -> Array | None:
        """(out,) of the stacked layer whose last projection the reader's factor multiplies."""
        factor = self._factor(f"{layer}.{reader}")
        if factor is None:
            return None
        # q, k, v of as many heads each; or gate, up.
        ones = np.ones(len(factor) * (2 if reader == "attn.o" else 1), np.float32)
        joined: Array = np.concatenate([ones, factor])
        return joined

    def _row_order(self, layer: str, reader: str) -> Array | None:
        """(out,) of the stacked gate and up: which of their rows lies where."""
        order = self._order(f"{layer}.{reader}")
        return None if order is None else np.concatenate([order, order + len(order)])
