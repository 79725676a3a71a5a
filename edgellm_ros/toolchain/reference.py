"""The decoder in plain NumPy and fp32, fed one layer at a time: the reference that a bundle's self-test stores.

It reads the original weights, never the quantised ones, and shares nothing with the ONNX graphs or the executors.
It is fed while export walks through the checkpoint anyway, so it costs no second read and one layer of memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgellm_ros.manifest import NO_ROPE, ModelSpec

FloatArray = npt.NDArray[np.float32]


class ReferenceDecoder:
    """Runs a few prompts through the decoder, layer by layer as their weights come."""

    def __init__(self, model: ModelSpec, ropes: dict[str, tuple[FloatArray, FloatArray]]) -> None:
        """ropes: cosines and sines (positions, num_rotated / 2) for each of model.rope_tables()."""
        self._model, self._ropes = model, ropes
        self._hidden: list[FloatArray] = []

    def embed(self, embedding: FloatArray, prompts: list[npt.NDArray[np.int64]], first: int = 0) -> None:
        """Start with the prompts' rows of the embedding; `embedding` (rows, hidden) are those from row `first` on."""
        if not self._hidden:
            self._hidden = [np.zeros((len(p), self._model.hidden_size), np.float32) for p in prompts]
        for hidden, prompt in zip(self._hidden, prompts, strict=True):
            here = (prompt >= first) & (prompt < first + len(embedding))
            hidden[here] = embedding[prompt[here] - first] * np.float32(self._model.embed_scale)

    @property
    def hidden(self) -> list[FloatArray]:
        """(tokens, hidden) of each prompt after the layers that were run; setting it continues from there."""
        return self._hidden

    @hidden.setter
    def hidden(self, states: list[FloatArray]) -> None:
        self._hidden = states

    def layer(self, index: int, weights: dict[str, FloatArray]) -> None:
        """Run layer `index`; `weights` has the stems of toolchain/weights.py, without the layer's own prefix."""
        m = self._model
        for i, x in enumerate(self._hidden):
            y = self._attention(_rms_norm(x, weights["input_norm"], m.rms_norm_eps), weights, index)
            if m.output_norms:
                y = _rms_norm(y, weights["attn.out_norm"], m.rms_norm_eps)
            x = x + y
            y = self.linear(_rms_norm(x, weights["post_norm"], m.rms_norm_eps), weights, "mlp.gate_up")
            gate, up = np.split(y, 2, -1)
            y = self.linear(_ACTIVATIONS[m.activation](gate) * up, weights, "mlp.down")
            if m.output_norms:
                y = _rms_norm(y, weights["mlp.out_norm"], m.rms_norm_eps)
            self._hidden[i] = x + y

    def logits(self, final_norm: FloatArray, head: FloatArray, last: int) -> list[FloatArray]:
        """(min(last, prompt length), rows of head) logits after the last positions of each prompt."""
        return [self.logits_at(i, slice(-last, None), final_norm, head) for i in range(len(self._hidden))]

    def logits_at(self, prompt: int, positions: slice, final_norm: FloatArray, head: FloatArray) -> FloatArray:
        """(positions, rows of head) logits after some positions of one prompt."""
        x = self._hidden[prompt][positions]
        logits: FloatArray = _rms_norm(x, final_norm, self._model.rms_norm_eps) @ head.T
        cap = np.float32(self._model.logit_softcap)
        return np.tanh(logits / cap) * cap if cap else logits

    def _attention(self, y: FloatArray, weights: dict[str, FloatArray], layer: int) -> FloatArray:
        m = self._model
        window, rope = m.window(layer), m.rope(layer)
        length = len(y)
        qkv = self.linear(y, weights, "attn.qkv").reshape(length, -1, m.head_dim).swapaxes(0, 1)
        q, k, v = np.split(qkv, [m.num_heads, m.num_heads + m.num_kv_heads])
        if m.qk_norm:
            q = _rms_norm(q, weights["attn.q_norm"], m.rms_norm_eps)
            k = _rms_norm(k, weights["attn.k_norm"], m.rms_norm_eps)
        if rope != NO_ROPE:
            q, k = self._rotate(q, rope), self._rotate(k, rope)
        group = m.num_heads // m.num_kv_heads
        k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
        scores = q @ k.swapaxes(1, 2) * np.float32(m.score_scale)
        distance = np.arange(length)[:, None] - np.arange(length)[None, :]
        hidden = (distance < 0) | ((distance >= window) if window else False)
        scores = np.where(hidden, np.float32(-np.inf), scores)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        return self.linear(mixed.swapaxes(0, 1).reshape(length, -1), weights, "attn.o")

    def linear(self, x: FloatArray, weights: dict[str, FloatArray], stem: str) -> FloatArray:
        """(tokens, out) of a linear layer."""
        y: FloatArray = x @ weights[f"{stem}.weight"].T
        bias = weights.get(f"{stem}.bias")
        return y if bias is None else y + bias

    def _rotate(self, x: FloatArray, rope: str) -> FloatArray:
        cos, sin = (table[: x.shape[1]] for table in self._ropes[rope])
        half = self._model.num_rotated // 2
        first, second, rest = np.split(x, [half, 2 * half], -1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _silu(x: FloatArray) -> FloatArray:
    y: FloatArray = x / (1 + np.exp(-x))
    return y


def _gelu_tanh(x: FloatArray) -> FloatArray:
    """https://arxiv.org/abs/1606.08415, section 2."""
    inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)
    y: FloatArray = np.float32(0.5) * x * (1 + np.tanh(inner))
    return y


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}


def _rms_norm(x: FloatArray, gain: FloatArray, eps: float) -> FloatArray:
    normed: FloatArray = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(eps)) * gain
    return normed
