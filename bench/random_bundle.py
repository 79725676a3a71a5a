"""Bundles of published shapes with random weights, made in memory: what a benchmark needs without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.bundle import Bundle, GraphSpec, Manifest, ModelSpec, QuantSpec, TokenSpec

MAX_CONTEXT = 32768


def _model(name: str, family: str, **dims: Any) -> ModelSpec:
    return ModelSpec(family=family, name=f"{name} (random weights)", max_context=MAX_CONTEXT, **dims)


SHAPES: dict[str, ModelSpec] = {
    "llama-1b": _model(
        "Llama-3.2-1B", "llama", num_layers=16, hidden_size=2048, intermediate_size=8192, num_heads=32, num_kv_heads=8,
        head_dim=64, vocab_size=128256, rms_norm_eps=1e-5, tied_head=True, rope_theta=500000.0,
    ),
    "qwen3-4b": _model(
        "Qwen3-4B", "qwen3", num_layers=36, hidden_size=2560, intermediate_size=9728, num_heads=32, num_kv_heads=8,
        head_dim=128, vocab_size=151936, rms_norm_eps=1e-6, qk_norm=True, tied_head=True, rope_theta=1e6,
    ),
    "llama-8b": _model(
        "Llama-3.1-8B", "llama", num_layers=32, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8,
        head_dim=128, vocab_size=128256, rms_norm_eps=1e-5, rope_theta=500000.0,
    ),
}  # fmt: skip
# Layers, group, head, embedding. The first three are what export writes; fp8 is made of fp16 weights at load, and the
# last one is the fastest that the kernels have.
SCHEMES: dict[str, QuantSpec] = {
    "bf16": QuantSpec("fp16", 0, "fp16", "fp16"),
    "int8": QuantSpec("int8", 64, "int8", "int8"),
    "int4": QuantSpec("int4", 64, "int8", "int8"),
    "fp8": QuantSpec("fp8", 0, "fp8", "fp16"),
    "int4-fp8": QuantSpec("int4", 128, "fp8", "fp16"),
}
_FLOATS = ("fp16", "fp8")  # stored as fp16


class RandomWeights:
    """Like a WeightFile; every tensor is a view of one block of random numbers, so that 8B cost no time to make."""

    def __init__(self, model: ModelSpec, quant: QuantSpec) -> None:
        """Plan the names and shapes of every tensor."""
        generator = np.random.default_rng(0)
        self._tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        hidden, table = model.hidden_size, (model.vocab_size, model.hidden_size)
        q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        for layer in range(model.num_layers):
            at = f"layers.{layer}."
            self._linear(f"{at}attn.qkv", (q_width + 2 * kv_width, hidden), quant.weights, quant.group_size)
            self._linear(f"{at}attn.o", (hidden, q_width), quant.weights, quant.group_size)
            self._linear(f"{at}mlp.gate_up", (2 * model.intermediate_size, hidden), quant.weights, quant.group_size)
            self._linear(f"{at}mlp.down", (hidden, model.intermediate_size), quant.weights, quant.group_size)
            norms = {"input_norm": hidden, "post_norm": hidden}
            if model.qk_norm:
                norms |= {"attn.q_norm": model.head_dim, "attn.k_norm": model.head_dim}
            for name, width in norms.items():
                self._tensors[f"{at}{name}.weight"] = "ones", (width,)
        self._linear("embed", table, quant.embedding, quant.group_size)
        if quant.head_tensor(model) == "head":
            self._linear("head", table, quant.lm_head, quant.group_size)
        self._tensors["final_norm.weight"] = "ones", (hidden,)
        for name in ("rope.cos", "rope.sin"):
            self._tensors[name] = name, (model.max_context, model.head_dim // 2)
        largest = max(int(np.prod(shape)) for kind, shape in self._tensors.values() if not kind.startswith("rope"))
        block = generator.integers(0, 256, 1 << 24, np.uint8)
        self._bytes = np.resize(block, largest)
        floats = (generator.standard_normal(1 << 22) * 0.02).astype(np.float16)
        self._floats = np.resize(floats, largest) if "fp16" in (quant.weights, quant.embedding) else floats
        angles = np.outer(np.arange(model.max_context), 1 / model.rope_theta ** (np.arange(0, 1, 2 / model.head_dim)))
        self._rope = {"rope.cos": np.cos(angles).astype(np.float32), "rope.sin": np.sin(angles).astype(np.float32)}

    def _linear(self, stem: str, shape: tuple[int, int], scheme: str, group: int) -> None:
        rows, cols = shape
        stored = (rows, cols // 2) if scheme == "int4" else shape
        self._tensors[f"{stem}.weight"] = scheme, stored
        if scheme not in _FLOATS:
            self._tensors[f"{stem}.scale"] = f"{scheme} scale", (rows, cols // group)

    def names(self) -> list[str]:
        """As WeightFile.names."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        kind, shape = self._tensors[name]
        count = int(np.prod(shape))
        if kind in self._rope:
            return self._rope[kind]
        if kind == "ones":
            return np.ones(shape, np.float32)
        if kind.endswith("scale"):  # a standard deviation of about 0.02 whatever the number of bits
            return np.full(shape, 0.02 / (74 if kind.startswith("int8") else 4.6), np.float16)
        if kind in _FLOATS:
            return self._floats[:count].reshape(shape)
        data = self._bytes[:count]
        return (data.view(np.int8) if kind == "int8" else data).reshape(shape)


class RandomBundle(Bundle):
    """A bundle without a directory: its manifest and weights are all that an executor reads."""

    def __init__(self, shape: str, weights: str) -> None:
        """Make the bundle of a name in SHAPES with weights of a name in SCHEMES."""
        model, quant = SHAPES[shape], SCHEMES[weights]
        manifest = Manifest(1, model, TokenSpec(), quant, GraphSpec(), {"source": "random"}, {})
        super().__init__(Path(f"{shape}-{weights}"), manifest)

    def weights(self) -> Any:
        """The random weights."""
        return RandomWeights(self.manifest.model, self.manifest.quantization)


def decode_bytes(shape: str, weights: str) -> int:
    """Bytes of weights that one decode step reads: every layer and the head, with scales; not the embedding table."""
    model, quant = SHAPES[shape], SCHEMES[weights]
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * q_width + 2 * kv_width + 3 * model.intermediate_size)
    head = model.hidden_size * model.vocab_size

    def size(count: int, scheme: str) -> float:
        per_weight = {"fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}[scheme]
        return count * (per_weight + (2.0 / quant.group_size if scheme not in _FLOATS else 0.0))

    return int(size(model.num_layers * layer, quant.weights) + size(head, quant.lm_head))
