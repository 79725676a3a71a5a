"""The original's logits, by the NumPy reference decoder: one walk over the checkpoint for all passages together.

Between layers it holds the hidden states of all passages (tokens x width, fp32), and afterwards the head.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from edgellm_ros.bundle import TOKENIZER, Bundle, ModelSpec
from edgellm_ros.errors import ToolchainError
from edgellm_ros.tokenizer import Tokenizer
from edgellm_ros.toolchain.checkpoint import Checkpoint, open_checkpoint
from edgellm_ros.toolchain.detect import check_tensors, load_spec
from edgellm_ros.toolchain.layers import EMBEDDING, FINAL_NORM, HEAD, read_layer
from edgellm_ros.toolchain.reference import FloatArray, ReferenceDecoder
from edgellm_ros.toolchain.rope import rope_tables
from edgellm_ros.toolchain.verify.passages import Passage
from edgellm_ros.toolchain.weights import Progress

_SAME = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")


class Original:
    """A checkpoint that has read some passages."""

    def __init__(self, path: Path, bundle: Bundle, text: str) -> None:
        """Open `path`; raises ToolchainError when it is another model than the bundle's, and its kinds.

        Tokenizers are compared by what they make of `text`: a GGUF file and a directory write them differently.
        """
        self._source = open_checkpoint(path)
        self.name = self._source.path.name
        family, self._model = load_spec(self._source)
        check_tensors(self._source, family, self._model)
        _check_same(self._source, self._model, bundle, text)
        vocab = bundle.vocab_map()
        self._kept = None if vocab is None else vocab.token_ids

    def read(self, passages: list[Passage], progress: Progress) -> None:
        """Run all passages through the decoder; `logits` gives what it says of them."""
        model = self._model
        longest = max(len(p.ids) for p in passages)
        cos, sin = rope_tables(model, longest)
        self._decoder = ReferenceDecoder(model, cos, sin)
        embedding = self._source.read(EMBEDDING)
        self._decoder.embed(embedding, [p.ids.astype(np.int64) for p in passages])
        for layer in range(model.num_layers):
            progress("original", layer, model.num_layers)
            with np.errstate(over="ignore"):  # a gate far below zero: exp(-gate) is inf, and the quotient 0
                self._decoder.layer(layer, read_layer(self._source, model, layer))
        progress("original", model.num_layers, model.num_layers)
        self._final_norm = self._source.read(FINAL_NORM)
        head = embedding if model.tied_head else self._source.read(HEAD)
        self._head = head if self._kept is None else head[self._kept]

    def logits(self, passage: int, positions: slice) -> FloatArray:
        """(positions, rows) logits after some positions of a passage."""
        return self._decoder.logits_at(passage, positions, self._final_norm, self._head)


def _check_same(source: Checkpoint, model: ModelSpec, bundle: Bundle, text: str) -> None:
    ours, theirs = dataclasses.asdict(bundle.manifest.model), dataclasses.asdict(model)
    differing = [f"{name} {theirs[name]} (the bundle has {ours[name]})" for name in _SAME if ours[name] != theirs[name]]
    if differing:
        raise ToolchainError(f"{source.path} is another model than the bundle: {', '.join(differing)}; "
                             "give the checkpoint that the bundle was made from")  # fmt: skip
    own = Tokenizer(source.tokenizer_json()).encode(text)
    if own != Tokenizer(bundle.read_text(TOKENIZER)).encode(text):
        raise ToolchainError(f"{source.path} has another tokenizer than the bundle, so their logits are of different "
                             "tokens; give the checkpoint that the bundle was made from")  # fmt: skip
