"""A checkpoint's logits, by the NumPy reference decoder: one walk over it for all passages together.

Between layers it holds the hidden states of all passages (tokens x width, fp32), and afterwards the head.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from edgellm_ros.errors import ToolchainError
from edgellm_ros.manifest import ModelSpec
from edgellm_ros.memory import physical_cores
from edgellm_ros.tokenizer import Tokenizer
from edgellm_ros.toolchain.checkpoint import Checkpoint, open_checkpoint
from edgellm_ros.toolchain.detect import check_tensors, load_spec
from edgellm_ros.toolchain.layers import EMBEDDING, FINAL_NORM, HEAD, read_layer, read_norm
from edgellm_ros.toolchain.reference import FloatArray, ReferenceDecoder
from edgellm_ros.toolchain.rope import rope_tables
from edgellm_ros.toolchain.verify.kept import KeptStates, check_cache
from edgellm_ros.toolchain.verify.passages import Ids, Passage
from edgellm_ros.toolchain.verify.rounding import RoundedDecoder, activation_scales
from edgellm_ros.toolchain.weights import Progress
from edgellm_ros.vocab_map import VocabMap

_SAME = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
_ROWS_AT_ONCE = 128


class CheckpointReading:
    """What a checkpoint says of some passages, in fp32; with `rounded`, activations are rounded where it says how."""

    def __init__(self, path: Path, rounded: bool = False, cache: Path | None = None) -> None:
        """Open `path`; raises ToolchainError and its kinds. cache: a directory where what was read is kept."""
        if cache is not None:  # not after minutes of reading
            check_cache(cache)
        self.source: Checkpoint = open_checkpoint(path)
        self.name = self.source.path.name
        family, self.model = load_spec(self.source)
        check_tensors(self.source, family, self.model)
        self._scales = activation_scales(self.source, self.model) if rounded else {}
        self._passages: Sequence[Passage] = ()
        self._key: tuple[object, ...] = ()
        self._vocab: VocabMap | None = None
        self._cache = cache
        self._decoder: ReferenceDecoder | None = None  # with the hidden states after the last layer

    @property
    def description(self) -> str:
        """How the numbers come about, for people."""
        kinds = sorted({scale.kind for scale in self._scales.values()})
        rounded = f", activations rounded to {' and '.join(kinds)} with the checkpoint's scales" if kinds else ""
        return f"NumPy in fp32{rounded}"

    def read(self, passages: Sequence[Passage], max_context: int, vocab: VocabMap | None, progress: Progress,
             stage: str = "original") -> None:  # fmt: skip
        """Run all passages through the decoder, unless it has read just these; `logits` gives what it says of them.

        max_context: what the model is run with, on which some frequencies depend (longrope). vocab: the head's rows.
        """
        model = dataclasses.replace(self.model, max_context=max_context)
        longest = max(len(passage.ids) for passage in passages)
        ropes = {kind: rope_tables(model, longest, kind) for kind in model.rope_tables()}
        key = (*(table.tobytes() for pair in ropes.values() for table in pair), *(p.ids.tobytes() for p in passages))
        if self._key != key:
            self._decoder = ReferenceDecoder(model, ropes)
            self._decoder.hidden = self._states(passages, model, ropes, progress, stage)
        self._key, self._passages, self._vocab = key, passages, vocab
        embedding = self.source.read(EMBEDDING)
        self._final_norm = read_norm(self.source, model, FINAL_NORM)
        head = embedding if model.tied_head else self.source.read(HEAD)
        self._head = head if vocab is None else head[vocab.token_ids]

    def logits(self, passage: int, positions: slice) -> FloatArray:
        """(positions, rows) logits after some positions of a passage."""
        assert self._decoder is not None, "nothing was read"
        return self._decoder.logits_at(passage, positions, self._final_norm, self._head)

    def pieces(self, passage: int, count: int) -> Iterator[tuple[int, FloatArray]]:
        """Position and logits of the last `count` tokens of a passage, a piece at a time."""
        end = len(self._passages[passage].ids)
        for start in range(end - count, end, _ROWS_AT_ONCE):
            yield start, self.logits(passage, slice(start, min(start + _ROWS_AT_ONCE, end)))

    def rows(self, token_ids: Ids) -> Ids:
        """The logits' columns of some tokens; -1 for one that a reduced head has no row for."""
        return token_ids if self._vocab is None else self._vocab.rows(token_ids)

    def check_same(self, other: ModelSpec, tokenizer_json: str, text: str) -> None:
        """Raise ToolchainError when this is another model than `other`.

        Tokenizers are compared by what they make of `text`: a GGUF file and a directory write them differently.
        """
        own, theirs = dataclasses.asdict(self.model), dataclasses.asdict(other)
        differing = [f"{key} {own[key]} (the bundle has {theirs[key]})" for key in _SAME if own[key] != theirs[key]]
        if differing:
            raise ToolchainError(f"{self.source.path} is another model than the bundle: {', '.join(differing)}; "
                                 "give the checkpoint that the bundle was made from")  # fmt: skip
        if Tokenizer(self.source.tokenizer_json()).encode(text) != Tokenizer(tokenizer_json).encode(text):
            raise ToolchainError(
                f"{self.source.path} has another tokenizer than the bundle, so their logits are of different tokens; "
                "give the checkpoint that the bundle was made from"
            )

    def _states(
        self,
        passages: Sequence[Passage],
        model: ModelSpec,
        ropes: dict[str, tuple[FloatArray, FloatArray]],
        progress: Progress,
        stage: str,
    ) -> list[FloatArray]:
        """(tokens, width) of each passage after the last layer, computed or as they were kept."""
        if self._cache is None:
            return self._run(passages, model, ropes, progress, stage)
        tables = (table.tobytes() for pair in ropes.values() for table in pair)
        parts = (repr(self.model).encode(), repr(sorted(ropes)).encode(), *tables,
                 *(passage.ids.tobytes() for passage in passages), self._scale_bytes())  # fmt: skip
        kept = KeptStates(self._cache, self.source.source_files(), parts)
        states = kept.load([len(passage.ids) for passage in passages], model.hidden_size)
        if states is None:
            states = self._run(passages, model, ropes, progress, stage)
            kept.save(states)
        return states

    def _scale_bytes(self) -> bytes:
        """What tells apart how activations are rounded."""
        found = []
        for stem, scale in sorted(self._scales.items()):
            factor = b"" if scale.factor is None else scale.factor.tobytes()
            found.append(f"{stem} {scale.kind} {scale.value!r} ".encode() + factor)
        return b"\n".join(found)

    def _run(
        self,
        passages: Sequence[Passage],
        model: ModelSpec,
        ropes: dict[str, tuple[FloatArray, FloatArray]],
        progress: Progress,
        stage: str,
    ) -> list[FloatArray]:
        # A thread for each core, with its share of the passages: products of this size are too small to be split.
        threads = min(physical_cores(), len(passages))
        decoders = [RoundedDecoder(model, ropes, self._scales) for _ in range(threads)]
        embedding = self.source.read(EMBEDDING)
        for i, decoder in enumerate(decoders):
            decoder.embed(embedding, [p.ids.astype(np.int64) for p in passages[i::threads]])
        with _one_blas_thread(), ThreadPoolExecutor(threads, "edgellm-reference") as pool:
            for layer in range(model.num_layers):
                progress(stage, layer, model.num_layers)
                tensors = read_layer(self.source, model, layer)
                list(pool.map(partial(_run_layer, layer, tensors), decoders))
        progress(stage, model.num_layers, model.num_layers)
        return [decoders[i % threads].hidden[i // threads] for i in range(len(passages))]


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
