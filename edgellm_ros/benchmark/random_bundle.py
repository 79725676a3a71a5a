"""Bundles of published shapes with random weights, made in memory: what a benchmark needs without a download."""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.benchmark.shapes import MAX_CONTEXT, SCHEME_FIELDS, SHAPE_FIELDS
from edgellm_ros.bundle import TOKENIZER, Bundle
from edgellm_ros.manifest import LOCAL_ROPE, ROPE_STEMS, GraphSpec, Manifest, ModelSpec, QuantSpec, TokenSpec

SHAPES: dict[str, ModelSpec] = {
    shape: ModelSpec(**{**fields, "name": f"{fields['name']} (random weights)"}, max_context=MAX_CONTEXT)
    for shape, fields in SHAPE_FIELDS.items()
}
SCHEMES: dict[str, QuantSpec] = {scheme: QuantSpec(*fields) for scheme, fields in SCHEME_FIELDS.items()}
_FLOATS = ("fp16", "fp8")  # stored as fp16


class RandomWeights:
    """Like a WeightFile; every tensor is a view of one block of random numbers, so that 8B cost no time to make."""

    def __init__(self, model: ModelSpec, quant: QuantSpec) -> None:
        """Plan the names and shapes of every tensor; numbers are drawn when the first one is read."""
        self._model = model
        self._tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._blocks: dict[str, npt.NDArray[Any]] = {}
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
            if model.output_norms:
                norms |= {"attn.out_norm": hidden, "mlp.out_norm": hidden}
            for name, width in norms.items():
                self._tensors[f"{at}{name}.weight"] = "ones", (width,)
        self._linear("embed", table, quant.embedding, quant.group_size)
        if quant.head_tensor(model) == "head":
            self._linear("head", table, quant.lm_head, quant.group_size)
        self._tensors["final_norm.weight"] = "ones", (hidden,)
        for stem in model.rope_tables().values():
            for name in (f"{stem}.cos", f"{stem}.sin"):
                self._tensors[name] = name, (model.max_context, model.head_dim // 2)

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
        if kind == "ones":
            return np.ones(shape, np.float32)
        if kind.endswith("scale"):  # a standard deviation of about 0.02 whatever the number of bits
            return np.full(shape, 0.02 / (74 if kind.startswith("int8") else 4.6), np.float16)
        block = self._block("floats" if kind in _FLOATS else kind if kind.startswith("rope") else "bytes")
        if kind.startswith("rope"):
            return block
        data = block[: int(np.prod(shape))].reshape(shape)
        return data.view(np.int8) if kind == "int8" else data

    def _block(self, kind: str) -> npt.NDArray[Any]:
        """The numbers that all tensors of a kind share."""
        if kind not in self._blocks:
            self._blocks[kind] = self._make_block(kind)
        return self._blocks[kind]

    def _make_block(self, kind: str) -> npt.NDArray[Any]:
        model = self._model
        if kind.startswith("rope"):
            steps = np.arange(0, 1, 2 / model.head_dim)
            is_local = kind.startswith(ROPE_STEMS[LOCAL_ROPE])
            theta = model.local_rope_theta if is_local else model.rope_theta
            angles = np.outer(np.arange(model.max_context), 1 / theta**steps)
            table: npt.NDArray[Any] = np.cos(angles) if kind.endswith(".cos") else np.sin(angles)
            return table.astype(np.float32)
        generator = np.random.default_rng(0)
        schemes = _FLOATS if kind == "floats" else ("int8", "int4")
        largest = max(int(np.prod(shape)) for scheme, shape in self._tensors.values() if scheme in schemes)
        if kind == "floats":
            return np.resize((generator.standard_normal(1 << 22) * 0.02).astype(np.float16), largest)
        return np.resize(generator.integers(0, 256, 1 << 24, np.uint8), largest)


class RandomBundle(Bundle):
    """A bundle without a directory: a manifest and weights, which are all that an executor reads, and a tokenizer."""

    def __init__(self, shape: str, weights: str) -> None:
        """Make the bundle of a name in SHAPES with weights of a name in SCHEMES."""
        model, quant = SHAPES[shape], SCHEMES[weights]
        manifest = Manifest(1, model, TokenSpec(), quant, GraphSpec(), {"source": "random"}, {})
        super().__init__(Path(f"{shape}-{weights}"), manifest)
        self.shape = shape

    def weights(self) -> Any:
        """The random weights."""
        return RandomWeights(self.manifest.model, self.manifest.quantization)

    def read_text(self, name: str) -> str:
        """The tokenizer is made up: one word of letters for each id, decoded as byte-level tokenizers are."""
        return word_tokenizer(self.manifest.model.vocab_size) if name == TOKENIZER else super().read_text(name)


def word_tokenizer(vocab_size: int) -> str:
    """The text of a tokenizer.json with that many made-up words."""
    words = map("".join, itertools.product(string.ascii_lowercase, repeat=4))  # 456,976 of them
    vocab = {f"\u0120{word}": i for i, word in enumerate(itertools.islice(words, vocab_size))}
    assert len(vocab) == vocab_size, vocab_size
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "\u0120aaaa"}
    return json.dumps({"version": "1.0", "added_tokens": [], "decoder": decoder, "model": model})
