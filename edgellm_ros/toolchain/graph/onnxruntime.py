"""The decoder with ONNX Runtime's fused operators: MatMulNBits, GroupQueryAttention, skip layer norms.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Weights are stored once for
all executors; what MatMulNBits wants differently (offset-8 nibbles, fp32 scales) is made by constants that ONNX
Runtime folds when it loads the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from edgellm_ros.manifest import NO_ROPE, ROPE_STEMS, GraphSpec, LinearFormat, ModelSpec, QuantSpec
from edgellm_ros.toolchain.graph import stored
from edgellm_ros.toolchain.graph.builder import GraphBuilder
from edgellm_ros.weight_file import WeightFile

_FLOAT = TensorProto.FLOAT
OPSET = 21
IR_VERSION = 10
_INT8_ACTIVATIONS = 4  # MatMulNBits accuracy_level: products in int8, sums in fp32


def write_onnxruntime_graph(
    path: Path, model: ModelSpec, quant: QuantSpec, graph: GraphSpec, weights: WeightFile, lora: bool = False
) -> None:
    """Write `decoder.ort.onnx` to `path`; with `lora`, `decoder.lora.ort.onnx`, whose inputs include an adapter."""
    _Decoder(model, quant, graph, weights, lora).save(path)


class _Decoder:
    def __init__(
        self, model: ModelSpec, quant: QuantSpec, graph: GraphSpec, weights: WeightFile, lora: bool
    ) -> None:
        self.model, self.quant, self.graph, self.weights = model, quant, graph, weights
        self.lora = lora
        self.g = GraphBuilder(weights)
        self._declare()
        x = graph.embeds
        y = self._norm(x, "layers.0.input_norm.weight", "layers.0.input_norm")
        for layer in range(model.num_layers):
            x, y = self._layer(layer, x, y)
        self._head(y)

    def save(self, path: Path) -> None:
        self.g.save(path, opset=OPSET, ir_version=IR_VERSION, producer="edgellm_ros")

    def _declare(self) -> None:
        m, names, g = self.model, self.graph, self.g
        g.input(names.embeds, _FLOAT, ["batch", "sequence", m.hidden_size])
        g.input(names.seqlens_k, TensorProto.INT32, ["batch"])
        g.input(names.total_length, TensorProto.INT32, [])
        g.input(names.logit_indices, TensorProto.INT64, ["num_logits"])
        g.output(names.logits, _FLOAT, ["num_logits", m.num_rows])
        cache: list[int | str] = ["batch", m.num_kv_heads, "capacity", m.head_dim]
        for layer in range(m.num_layers):
            for past, present in ((names.past_key, names.present_key), (names.past_value, names.present_value)):
                g.input(past.format(layer=layer), _FLOAT, cache)
                g.output(present.format(layer=layer), _FLOAT, cache)

    def _layer(self, layer: int, x: str, y: str) -> tuple[str, str]:
        """Returns the residual stream and its norm for the next layer."""
        m, g, at = self.model, self.g, f"layers.{layer}"
        attention = self._attention(layer, y)
        o = self._adapted(attention, layer, "attn.o", m.hidden_size, m.num_heads * m.head_dim)
        if m.output_norms:
            o = self._norm(o, f"{at}.attn.out_norm.weight", f"{at}.attn.out_norm")
        x, y = self._skip_norm(x, o, f"{at}.post_norm.weight", f"{at}.post_norm")
        gate_up = self._adapted(y, layer, "mlp.gate_up", 2 * m.intermediate_size, m.hidden_size)
        gate, up = f"{at}.mlp.gate", f"{at}.mlp.up"
        g.node("Split", [gate_up], f"{at}.mlp.split", outputs=[gate, up], axis=-1, num_outputs=2)
        product = g.node("Mul", [self._activate(gate, f"{at}.mlp.{m.activation}"), up], f"{at}.mlp.product")
        down = self._adapted(product, layer, "mlp.down", m.hidden_size, m.intermediate_size)
        if m.output_norms:
            down = self._norm(down, f"{at}.mlp.out_norm.weight", f"{at}.mlp.out_norm")
        if layer == m.num_layers - 1:
            return "", g.node("Add", [x, down], f"{at}.output")
        following = f"layers.{layer + 1}.input_norm"
        return self._skip_norm(x, down, f"{following}.weight", following)

    def _activate(self, x: str, name: str) -> str:
        if self.model.activation == "gelu_tanh":
            return self.g.node("FastGelu", [x], name, contrib=True)
        # QuickGelu with alpha 1 is x * sigmoid(x), SiLU, in one operator.
        return self.g.node("QuickGelu", [x], name, contrib=True, alpha=1.0)

    def _adapted(self, x: str, layer: int, stem: str, n: int, k: int) -> str:
        """A linear layer of the decoder, with an adapter's share where the graph has them."""
        y = self._linear(x, f"layers.{layer}.{stem}", n, k)
        return self.g.lora(x, y, self.graph, layer, stem, _FLOAT, (n, k)) if self.lora else y

    def _attention(self, layer: int, y: str) -> str:
        m, g, names, at = self.model, self.g, self.graph, f"layers.{layer}.attn"
        q_width, kv_width = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
        qkv = self._adapted(y, layer, "attn.qkv", q_width + 2 * kv_width, m.hidden_size)
        query, key, value = qkv, "", ""
        if m.qk_norm:
            query, key, value = f"{at}.q", f"{at}.k", f"{at}.v"
            sizes = g.constant("qkv_sizes", [q_width, kv_width, kv_width], np.int64)
            g.node("Split", [qkv, sizes], f"{at}.split", outputs=[query, key, value], axis=-1)
            query = self._head_norm(query, m.num_heads, f"{at}.q_norm")
            key = self._head_norm(key, m.num_kv_heads, f"{at}.k_norm")
        tables: list[str] = []
        rope = m.rope(layer)
        if rope != NO_ROPE:  # a table narrower than half a head turns the first channels only
            shape = (m.max_context, m.num_rotated // 2)
            tables = [g.weight(f"{ROPE_STEMS[rope]}.{part}", _FLOAT, shape) for part in ("cos", "sin")]
        past = [n.format(layer=layer) for n in (names.past_key, names.past_value)]
        present = [n.format(layer=layer) for n in (names.present_key, names.present_value)]
        # The operator's window counts the token itself, as Hugging Face's sliding_window does.
        window = m.window(layer)
        local: dict[str, Any] = {"local_window_size": window} if window else {}
        inputs = [query, key, value, *past, names.seqlens_k, names.total_length, *tables]
        return g.node(
            "GroupQueryAttention", inputs, at, outputs=[at, *present], contrib=True, num_heads=m.num_heads,
            kv_num_heads=m.num_kv_heads, do_rotary=int(rope != NO_ROPE), rotary_interleaved=0, scale=m.score_scale,
            **local,
        )  # fmt: skip

    def _head(self, x: str) -> None:
        m, g = self.model, self.g
        flat = g.node("Reshape", [x, g.constant("rows", [-1, m.hidden_size], np.int64)], "flat")
        # Only the wanted rows go through the head: it is the largest product of a small model.
        rows = g.node("Gather", [flat, self.graph.logit_indices], "wanted", axis=0)
        y = self._norm(rows, "final_norm.weight", "final_norm")
        output = self.graph.logits if not m.logit_softcap else "logits.uncapped"
        self._linear(
            y, self.quant.head_tensor(m), m.num_rows, m.hidden_size, output=output, flat=True
        )
        if m.logit_softcap:
            g.softcap(output, m.logit_softcap, np.float32, self.graph.logits)

    def _norm(self, x: str, weight: str, name: str) -> str:
        gain = self.g.weight(weight, _FLOAT, (self.model.hidden_size,))
        return self.g.node(
            "SimplifiedLayerNormalization", [x, gain], name, axis=-1, epsilon=self.model.rms_norm_eps, stash_type=1
        )

    def _skip_norm(self, x: str, addend: str, weight: str, name: str) -> tuple[str, str]:
        gain = self.g.weight(weight, _FLOAT, (self.model.hidden_size,))
        total = f"{name}.sum"
        y = self.g.node(
            "SkipSimplifiedLayerNormalization", [x, addend, gain], name, outputs=[name, "", "", total], contrib=True,
            epsilon=self.model.rms_norm_eps,
        )  # fmt: skip
        return total, y

    def _head_norm(self, x: str, heads: int, name: str) -> str:
        """RMSNorm over head_dim of [B, S, heads * head_dim], as Qwen3 has it before RoPE."""
        m, g = self.model, self.g
        split = g.constant(f"to_{heads}_heads", [0, 0, heads, m.head_dim], np.int64)
        joined = g.constant(f"from_{heads}_heads", [0, 0, heads * m.head_dim], np.int64)
        gain = g.weight(f"{name}.weight", _FLOAT, (m.head_dim,))
        y = g.node("Reshape", [x, split], f"{name}.split")
        y = g.node("SimplifiedLayerNormalization", [y, gain], name, axis=-1, epsilon=m.rms_norm_eps, stash_type=1)
        return g.node("Reshape", [y, joined], f"{name}.joined")

    def _linear(self, x: str, name: str, n: int, k: int, *, output: str = "", flat: bool = False) -> str:
        """X [..., k], of two axes if flat, times the stored [n, k] weight, plus its bias if there is one."""
        g, form = self.g, self.quant.format_of(name)
        bias = f"{name}.bias" if f"{name}.bias" in self.weights else ""
        result = output or f"{name}.out"
        x = stored.input_of(g, x, name, form, k, self._float)
        if form.offset and not stored.has_zero_points(self.weights, name, form):
            y = self._product(x, name, n, k, bias, f"{name}.product")
            return stored.add_offset(g, x, y, name, form, (n, k), self._float, flat=flat, output=result)
        return self._product(x, name, n, k, bias, result)

    def _product(self, x: str, name: str, n: int, k: int, bias: str, result: str) -> str:
        g, form = self.g, self.quant.format_of(name)
        if form.scheme in ("int4", "int8", "nvfp4"):
            return self._matmul_nbits(x, name, n, k, form, bias, result)
        if form.scheme == "fp8":
            weight = stored.widened(g, name, form, n, k)
        else:
            weight = g.weight(f"{name}.weight", _FLOAT if form.scheme == "fp32" else TensorProto.FLOAT16, (n, k))
            if form.scheme == "fp16":
                weight = g.node("Cast", [weight], f"{name}.fp32", to=_FLOAT)
        transposed = g.node("Transpose", [weight], f"{name}.transposed", perm=[1, 0])
        y = g.node("MatMul", [x, transposed], f"{name}.unbiased" if bias else result)
        return g.node("Add", [y, g.weight(bias, _FLOAT, (n,))], result) if bias else y

    def _matmul_nbits(self, x: str, name: str, n: int, k: int, form: LinearFormat, bias: str, result: str) -> str:
        g, group = self.g, form.group_size
        bits = 4 if form.scheme == "int4" else 8
        if form.scheme == "nvfp4":
            weight, scale = stored.nvfp4_bytes(g, name, n, k, group)
        else:
            signed = g.weight(f"{name}.weight", TensorProto.UINT8, (n, k // group, group * bits // 8))
            # Signed to offset binary: the sign bit of each nibble (or byte) flips.
            flip = g.constant(f"flip_{bits}", 0x88 if bits == 4 else 0x80, np.uint8)
            weight = g.node("BitwiseXor", [signed, flip], f"{name}.offset_bits")
            scale = g.weight(f"{name}.scale", TensorProto.FLOAT16, (n, k // group))
            scale = g.node("Cast", [scale], f"{name}.scale32", to=_FLOAT)
        inputs = [x, weight, scale]
        if form.offset and stored.has_zero_points(self.weights, name, form):
            inputs.append(stored.zero_points(g, name, form, n, k, scale))
        if bias:
            inputs += [""] * (5 - len(inputs)) + [g.weight(bias, _FLOAT, (n,))]
        return g.node(
            "MatMulNBits", inputs, result, contrib=True, K=k, N=n, bits=bits, block_size=group,
            accuracy_level=_INT8_ACTIVATIONS,
        )  # fmt: skip

    def _float(self, name: str, shape: tuple[int, ...]) -> str:
        return self.g.weight(name, _FLOAT, shape)
