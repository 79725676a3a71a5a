"""Runs of the CUDA executor: what a request asks for, as the rows that the sampling kernel reads.

Where the head is cut, the kernel knows which token a row of the logits is; here the tokens of a request become rows,
and those without one are left out: they cannot be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros import native
from edgellm_ros.core import SamplingParams, TokenLogprob
from edgellm_ros.executors.base import DecodeRun, RunSequence, RunStep
from edgellm_ros.vocab_map import VocabMap

_NO_IDS = np.zeros(0, np.int32)
_NO_VALUES = np.zeros(0, np.float32)


class CudaRun(DecodeRun):
    """See DecodeRun. Draws with everything that SamplingParams has, up to a number of bias entries."""

    def __init__(self, decoder: Callable[[], Any], vocab_size: int, vocab_map: VocabMap | None = None) -> None:
        """`decoder` returns the native decoder, or raises DeviceError once it is closed."""
        self._module: Any = native.load()
        self._decoder = decoder
        self._vocab_size = vocab_size
        self._map = vocab_map
        self.max_sequences: int = self._module.MAX_BATCH

    def can_sample(self, params: SamplingParams) -> bool:
        """See DecodeRun.can_sample."""
        num_bias: int = self._module.MAX_BIAS
        num_top: int = self._module.MAX_TOP_LOGPROBS
        return len(params.logit_bias) <= num_bias and (params.logprobs or 0) <= num_top

    def start(self, sequences: Sequence[RunSequence]) -> None:
        """See DecodeRun.start."""
        self._decoder().start_run([self._native(sequence) for sequence in sequences])

    def launch(self) -> None:
        """See DecodeRun.launch."""
        self._decoder().launch_run_step_async()

    def set_mask(self, index: int, mask: npt.NDArray[np.bool_]) -> None:
        """See DecodeRun.set_mask."""
        assert mask.shape == (self._vocab_size,) and mask.any(), "a mask allows at least one token"
        allowed = mask if self._map is None else mask[self._map.token_ids]
        assert allowed.any(), "a mask allows at least one token that the head has"
        padded = np.zeros(-(-len(allowed) // 32) * 32, np.bool_)
        padded[: len(allowed)] = allowed
        self._decoder().set_run_mask_async(index, np.packbits(padded, bitorder="little").view("<u4"))

    def read(self) -> RunStep:
        """See DecodeRun.read."""
        tokens, found = self._decoder().read_run_step()
        logprobs = [
            None if entry is None else TokenLogprob(token, entry[0], tuple(entry[1]))
            for token, entry in zip(tokens, found, strict=True)
        ]
        return RunStep(tokens, logprobs)

    def _native(self, sequence: RunSequence) -> tuple[Any, ...]:
        params = sequence.sampling
        row = self._module.SamplingRow(
            seed=sequence.seed,
            temperature=0.0 if params.greedy else params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            draw_index=len(sequence.answer_ids),
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            num_top=-1 if params.logprobs is None else params.logprobs,
            use_mask=sequence.masked,
        )
        bias, num_bias = params.logit_bias, len(params.logit_bias)
        bias_ids = np.fromiter(bias, np.int32, num_bias) if num_bias else _NO_IDS
        bias_values = np.fromiter(bias.values(), np.float32, num_bias) if num_bias else _NO_VALUES
        prompt_ids, answer_ids = sequence.prompt_ids, np.asarray(sequence.answer_ids, np.int32)
        if self._map is not None:
            bias_ids = self._map.rows(bias_ids)
            bias_ids, bias_values = bias_ids[bias_ids >= 0], bias_values[bias_ids >= 0]
            prompt_ids, answer_ids = (self._rows(ids) for ids in (prompt_ids, answer_ids))
        return (
            sequence.slot,
            sequence.position,
            sequence.answer_ids[-1],
            row,
            prompt_ids,
            answer_ids,
            bias_ids,
            bias_values,
            sequence.adapter,
        )

    def _rows(self, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Of the tokens that the head has, in their order."""
        assert self._map is not None
        rows = self._map.rows(token_ids)
        return rows[rows >= 0]
