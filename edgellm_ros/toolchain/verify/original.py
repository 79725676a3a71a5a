"""The original's logits, by the NumPy reference decoder: one walk over the checkpoint for all passages together.

Between layers it holds the hidden states of all passages (tokens x width, fp32), and afterwards the head.
"""

from __future__ import annotations

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from edgellm_ros.bundle import TOKENIZER, Bundle, ModelSpec
from edgellm_ros.errors import ToolchainError
from edgellm_ros.executors.memory import physical_cores
from edgellm_ros.tokenizer import Tokenizer
from edgellm_ros.toolchain.checkpoint import Checkpoint, open_checkpoint
from edgellm_ros.toolchain.detect import check_tensors, load_spec
from edgellm_ros.toolchain.layers import EMBEDDING, FINAL_NORM, HEAD, read_layer, read_norm
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
        family, model = load_spec(self._source)
        check_tensors(self._source, family, model)
        _check_same(self._source, model, bundle, text)
        # Some positions' frequencies depend on how long the context is said to be (longrope).
        self._model = dataclasses.replace(model, max_context=bundle.manifest.model.max_context)
        vocab = bundle.vocab_map()
        self._kept = None if vocab is None else vocab.token_ids

    def read(self, passages: list[Passage], progress: Progress) -> None:
        """Run all passages through the decoder; `logits` gives what it says of them."""
        model = self._model
        longest = max(len(p.ids) for p in passages)
        ropes = {kind: rope_tables(model, longest, kind) for kind in model.rope_tables()}
        # A thread for each core, with its share of the passages: products of this size are too small to be split.
        self._decoders = [ReferenceDecoder(model, ropes) for _ in range(min(physical_cores(), len(passages)))]
        embedding = self._source.read(EMBEDDING)
        for i, decoder in enumerate(self._decoders):
            decoder.embed(embedding, [p.ids.astype(np.int64) for p in passages[i :: len(self._decoders)]])
        with _one_blas_thread(), ThreadPoolExecutor(len(self._decoders), "edgellm-original") as pool:
            for layer in range(model.num_layers):
                progress("original", layer, model.num_layers)
                tensors = read_layer(self._source, model, layer)
                list(pool.map(partial(_run_layer, layer, tensors), self._decoders))
        progress("original", model.num_layers, model.num_layers)
        self._final_norm = read_norm(self._source, model, FINAL_NORM)
        head = embedding if model.tied_head else self._source.read(HEAD)
        self._head = head if self._kept is None else head[self._kept]

    def logits(self, passage: int, positions: slice) -> FloatArray:
        """(positions, rows) logits after some positions of a passage."""
        turn, decoder = divmod(passage, len(self._decoders))
        return self._decoders[decoder].logits_at(turn, positions, self._final_norm, self._head)


def _run_layer(layer: int, tensors: dict[str, FloatArray], decoder: ReferenceDecoder) -> None:
    with np.errstate(over="ignore"):  # a gate far below zero: exp(-gate) is inf, and the quotient 0
        decoder.layer(layer, tensors)


def _one_blas_thread() -> contextlib.AbstractContextManager[object]:
    """Keeps NumPy's products on the calling thread; where threadpoolctl is missing it is only slower."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return contextlib.nullcontext()
    limits: contextlib.AbstractContextManager[object] = threadpool_limits(1, "blas")
    return limits


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
