"""The plugins' operators in NumPy, as ONNX's reference evaluator runs them: written from what their headers promise.

And what the evaluator has to hand over where it is a plugin object that runs a node.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from edgellm_ros.toolchain.build.packing import pack_int4, pack_scales


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


class EdgeLLMAttention(OpRun):
    op_domain = "edgellm"

    def _run(
        self, qkv: Any, past: Any, ids: Any, write: Any, cos: Any, sin: Any, *rest: Any, num_heads: int,
        num_kv_heads: int, head_dim: int, scale: float, window: int, qk_norm: int, norm_eps: float, tree: int,
        plugin_version: str, plugin_namespace: str,
    ) -> tuple[Any, Any]:  # fmt: skip
        assert (plugin_version, plugin_namespace) == ("1", "edgellm")
        batch, tokens, _ = qkv.shape
        heads = qkv.astype(np.float64).reshape(batch, tokens, -1, head_dim)
        q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=2)
        if qk_norm:
            q, k = (x / np.sqrt((x * x).mean(-1, keepdims=True) + norm_eps) * gain
                    for x, gain in zip((q, k), rest[:2], strict=True))  # fmt: skip
        turn = (table[ids][:, :, None, :].astype(np.float64) for table in (cos, sin))
        c, s = turn
        q, k = _rotate(q, c, s), _rotate(k, c, s)
        present, out = past.copy(), np.zeros((batch, tokens, num_heads, head_dim))
        for b in range(batch):
            first = int(write[b])
            present[b, :, :, first : first + tokens] = np.stack([k[b], v[b]]).transpose(0, 2, 1, 3)
            for t in range(tokens):
                if tree and 1 < tokens <= 64:
                    word, before = int(rest[-1][b, t]), int(ids[b, t]) - window if window else -1
                    seen = [*range(max(0, before + 1), first)]
                    seen += [first + j for j in range(tokens) if word >> j & 1 and ids[b, j] > before]
                else:
                    seen = list(range(max(0, first + t + 1 - window) if window else 0, first + t + 1))
                keys, values = present[b][:, :, seen].astype(np.float64).repeat(num_heads // num_kv_heads, axis=1)
                scores = np.einsum("hd,hpd->hp", q[b, t], keys) * scale
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[b, t] = np.einsum("hp,hpd->hd", weights / weights.sum(-1, keepdims=True), values)
        return out.reshape(batch, tokens, -1).astype(qkv.dtype), present


class _Gemm(OpRun):
    op_domain = "edgellm"

    def _values(self, weight: Any) -> Any:
        raise NotImplementedError

    def _run(
        self, x: Any, weight: Any, scales: Any, *bias: Any, rows: int, cols: int, group: int, float_output: int,
        plugin_version: str, plugin_namespace: str, **flags: int,
    ) -> tuple[Any]:  # fmt: skip
        assert (plugin_version, plugin_namespace, bool(flags["bias"])) == ("1", "edgellm", bool(bias))
        values = self._values(weight).astype(np.float64).reshape(rows, cols // group, group)
        dense = (values * scales.astype(np.float64)[..., None]).reshape(rows, cols)
        y = x.astype(np.float64) @ dense.T + (bias[0] if bias else 0)
        return (y.astype(np.float32 if float_output else x.dtype),)


class EdgeLLMInt4Gemm(_Gemm):
    def _values(self, weight: Any) -> Any:
        low, high = (weight << 4).astype(np.int8) >> 4, weight.astype(np.int8) >> 4
        return np.stack([low, high], axis=-1)


class EdgeLLMInt8Gemm(_Gemm):
    def _values(self, weight: Any) -> Any:
        return weight


OPS = [EdgeLLMAttention, EdgeLLMInt4Gemm, EdgeLLMInt8Gemm]


def handed_over(name: str, attributes: dict[str, Any], inputs: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """A node's inputs in the order that its plugin reads, and NaN where its first output goes."""
    x, *rest = inputs
    if name == "EdgeLLMAttention":
        return [x, *rest], np.full((*x.shape[:2], attributes["num_heads"] * attributes["head_dim"]), np.nan, x.dtype)
    if name == "EdgeLLMInt4Gemm":
        rest[:2] = pack_int4(rest[0].view(np.uint8)).view(np.int8), pack_scales(rest[1], attributes["group"])
    dtype = np.float32 if attributes["float_output"] else x.dtype
    return [x, *rest], np.full((*x.shape[:-1], attributes["rows"]), np.nan, dtype)
