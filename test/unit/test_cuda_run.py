"""What a request asks for reaches the native decoder as its rows have it; the module itself is not needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgellm_ros import native
from edgellm_ros.core import SamplingParams, TokenLogprob
from edgellm_ros.errors import DeviceError
from edgellm_ros.executors.base import RunSequence
from edgellm_ros.executors.cuda_run import CudaRun
from edgellm_ros.vocab_map import VocabMap

VOCAB = 99


class Decoder:
    """Records what it is told."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []
        self.masks: list[tuple[int, np.ndarray]] = []

    def start_run(self, sequences: list[tuple[Any, ...]]) -> None:
        self.started = sequences

    def set_run_mask_async(self, index: int, words: np.ndarray) -> None:
        self.masks.append((index, words))

    def read_run_step(self) -> tuple[list[int], list[Any]]:
        return [7, -1], [(-0.5, [(7, -0.5), (3, -1.5)]), None]


@pytest.fixture
def decoder() -> Decoder:
    return Decoder()


@pytest.fixture
def run(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> CudaRun:
    module = SimpleNamespace(SamplingRow=lambda **fields: fields, MAX_BATCH=8, MAX_BIAS=4, MAX_TOP_LOGPROBS=20)
    monkeypatch.setattr(native, "load", lambda: module)
    return CudaRun(lambda: decoder, VOCAB)


def test_the_request_alone_decides_whether_the_device_draws(run: CudaRun) -> None:
    assert run.max_sequences == 8
    assert run.can_sample(SamplingParams(logprobs=20, logit_bias={1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}))
    assert not run.can_sample(SamplingParams(logit_bias={1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}))


def test_a_sequence_goes_on_where_it_stands(run: CudaRun, decoder: Decoder) -> None:
    params = SamplingParams(
        temperature=0.6, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.4, logprobs=2, logit_bias={3: 1.5, 98: -2.0},
    )  # fmt: skip
    prompt = np.array([4, 5, 6], np.int32)
    run.start([RunSequence(2, 5, [9, 8, 7], prompt, params, 2**63 - 1, masked=True, adapter=3)])
    ((slot, position, token, row, prompt_ids, answer_ids, bias_ids, bias_values, adapter),) = decoder.started
    assert (slot, position, token, adapter) == (2, 5, 7, 3)
    assert row == {
        "seed": 2**63 - 1, "temperature": 0.6, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "draw_index": 3,
        "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.4, "num_top": 2, "use_mask": True,
    }  # fmt: skip
    assert prompt_ids.tolist() == [4, 5, 6] and answer_ids.tolist() == [9, 8, 7]
    assert dict(zip(bias_ids.tolist(), bias_values.tolist(), strict=True)) == {3: 1.5, 98: -2.0}


def test_with_a_cut_head_tokens_become_its_rows_and_those_without_one_are_left_out(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(SamplingRow=lambda **fields: fields, MAX_BATCH=8, MAX_BIAS=4, MAX_TOP_LOGPROBS=20)
    monkeypatch.setattr(native, "load", lambda: module)
    kept = np.array([4, 5, 9, 50, 98])
    run = CudaRun(lambda: decoder, VOCAB, VocabMap(kept, VOCAB))
    params = SamplingParams(repetition_penalty=1.2, logit_bias={3: 1.5, 98: -2.0, 9: 0.5})
    run.start([RunSequence(2, 5, [50, 7], np.array([4, 6, 5, 4], np.int32), params, 1, masked=True)])
    ((_, _, token, row, prompt_ids, answer_ids, bias_ids, bias_values, _),) = decoder.started
    assert token == 7 and row["draw_index"] == 2, "the token that is fed is the model's own, and draws go on"
    assert prompt_ids.tolist() == [0, 1, 0] and answer_ids.tolist() == [3]
    assert dict(zip(bias_ids.tolist(), bias_values.tolist(), strict=True)) == {4: -2.0, 2: 0.5}
    assert all(ids.dtype == np.int32 for ids in (prompt_ids, answer_ids, bias_ids))
    mask = np.zeros(VOCAB, np.bool_)
    mask[[6, 9, 98]] = True
    run.set_mask(0, mask)
    assert decoder.masks[0][1].tolist() == [0b10100]
    mask[[9, 98]] = False
    with pytest.raises(AssertionError, match="at least one token that the head has"):
        run.set_mask(0, mask)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 1}])
def test_greedy_is_greedy_by_whatever_name(run: CudaRun, decoder: Decoder, sampling: dict[str, Any]) -> None:
    run.start([RunSequence(0, 1, [9], np.array([4], np.int32), SamplingParams(**sampling), 1)])
    assert decoder.started[0][3]["temperature"] == 0.0 and decoder.started[0][3]["num_top"] == -1


def test_a_mask_is_one_bit_a_token(run: CudaRun, decoder: Decoder) -> None:
    mask = np.zeros(VOCAB, np.bool_)
    mask[[0, 33, 98]] = True
    run.set_mask(1, mask)
    index, words = decoder.masks[0]
    assert index == 1 and words.dtype == np.uint32 and words.tolist() == [1, 2, 0, 4]


def test_a_step_has_tokens_and_the_log_probabilities_asked_for(run: CudaRun) -> None:
    step = run.read()
    assert list(step.token_ids) == [7, -1]
    assert list(step.logprobs) == [TokenLogprob(7, -0.5, ((7, -0.5), (3, -1.5))), None]


def test_a_closed_executor_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed() -> Any:
        raise DeviceError("the CUDA executor is closed")

    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(MAX_BATCH=8))
    with pytest.raises(DeviceError, match="closed"):
        CudaRun(closed, VOCAB).launch()
