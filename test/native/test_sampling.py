"""The device draws what edgellm_ros/runtime/sampling.py draws, and leaves the token where the next step reads it."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from kernel_case import AWKWARD, K, make_weight, needs_gpu, random_bf16, stream, torch

from edgellm_ros.core import SamplingParams
from edgellm_ros.runtime.sampling import Sampler, logprob_of, uniform

pytestmark = needs_gpu
MAX_BIAS = 8


def row_bytes(params: SamplingParams, draw_index: int = 0, use_mask: bool = False) -> bytes:
    """The C struct SamplingRow."""
    return struct.pack(
        "<Q6f4i", params.seed or 0, params.temperature, params.top_p, params.min_p, params.repetition_penalty,
        params.presence_penalty, params.frequency_penalty, params.top_k, draw_index, len(params.logit_bias), use_mask,
    )  # fmt: skip


class Device:
    """A batch's buffers, and one call of the kernel."""

    def __init__(self, params: list[SamplingParams], vocab: int, masks: npt.NDArray[np.bool_] | None = None) -> None:
        batch = len(params)
        data = b"".join(row_bytes(p, use_mask=masks is not None) for p in params)
        assert len(data) == batch * K.SAMPLING_ROW_BYTES
        self.rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(batch, -1).cuda()
        ints = dict(dtype=torch.int32, device="cuda")
        self.token_ids, self.step_counts = torch.full((batch,), -9, **ints), torch.zeros(batch, **ints)
        self.positions = torch.full((batch,), 5, **ints)
        self.history = torch.full((batch, 4), -9, **ints)
        self.counts = torch.zeros((batch, vocab), **ints)
        self.bias_ids = torch.zeros((batch, MAX_BIAS), **ints)
        self.bias_values = torch.zeros((batch, MAX_BIAS), device="cuda")
        for b, p in enumerate(params):
            for i, (token, value) in enumerate(p.logit_bias.items()):
                self.bias_ids[b, i], self.bias_values[b, i] = token, value
        self.mask = None
        if masks is not None:
            padded = np.zeros((batch, (vocab + 31) // 32 * 32), np.bool_)
            padded[:, :vocab] = masks
            self.mask = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32)).cuda()
        self.logprobs = torch.full((batch,), float("nan"), device="cuda")

    @property
    def state(self) -> tuple[Any, ...]:
        return self.token_ids, self.positions, self.history, self.step_counts

    def sample(self, logits: npt.NDArray[np.float32], **more: Any) -> list[int]:
        on_device = torch.from_numpy(logits).cuda()
        K.sample(
            on_device, torch.empty_like(on_device), self.rows, self.state, self.counts, self.bias_ids,
            self.bias_values, self.mask, self.logprobs, stream=stream(), **more,
        )  # fmt: skip
        return [int(t) for t in self.token_ids]


def agrees(sampler: Sampler, index: int, logits: npt.NDArray[np.float32], token: int, mask: Any = None) -> bool:
    """Whether `token` lies where the draw falls, give or take the rounding of the weights."""
    probabilities = sampler.distribution(logits, mask)
    if sampler.params.greedy:
        return token == int(probabilities.argmax())
    share, sums = uniform(sampler.seed, index), np.cumsum(probabilities)
    return bool(probabilities[token] > 0 and sums[token] - probabilities[token] - 2e-5 <= share <= sums[token] + 2e-5)


def random_logits(rng: np.random.Generator, batch: int, vocab: int, spread: float = 3.0) -> npt.NDArray[np.float32]:
    return (rng.standard_normal((batch, vocab)) * spread).astype(np.float32)


CASES = {
    "plain": {"temperature": 0.8, "min_p": 0.0},
    "hot": {"temperature": 2.5, "min_p": 0.0},
    "cold": {"temperature": 0.05, "min_p": 0.0},
    "top_k": {"temperature": 1.0, "top_k": 7, "min_p": 0.0},
    "top_k_1": {"temperature": 1.0, "top_k": 1, "min_p": 0.0},
    "top_p": {"temperature": 1.0, "top_p": 0.8, "min_p": 0.0},
    "top_p_tiny": {"temperature": 1.0, "top_p": 1e-6, "min_p": 0.0},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab", [*AWKWARD, 49152, 151936])
def test_draws_fall_where_the_reference_says(case: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    params = [SamplingParams(seed=s, **CASES[case]) for s in range(8)]
    device = Device(params, vocab)
    samplers = [Sampler(p, vocab) for p in params]
    for step in range(4):
        logits = random_logits(rng, 8, vocab)
        tokens = device.sample(logits)
        for b, token in enumerate(tokens):
            assert 0 <= token < vocab and agrees(samplers[b], step, logits[b], token), (step, b, token)
            wanted = logprob_of(logits[b], token, 0).logprob
            assert abs(float(device.logprobs[b]) - wanted) < 1e-4 * max(1.0, abs(wanted))
    assert device.positions.tolist() == [9] * 8 and device.step_counts.tolist() == [4] * 8
    assert device.history[:, 3].tolist() == device.token_ids.tolist()


@pytest.mark.parametrize("vocab", [99, 49152])
def test_penalties_follow_prompt_and_answer(vocab: int) -> None:
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, vocab, 30)
    params = [
        SamplingParams(seed=1, temperature=0.7, min_p=0.0, repetition_penalty=1.3),
        SamplingParams(seed=2, temperature=0.7, min_p=0.0, presence_penalty=1.5, frequency_penalty=0.4),
        SamplingParams(seed=3, temperature=0.0, repetition_penalty=0.8, frequency_penalty=2.0),
    ]
    device, samplers = Device(params, vocab), [Sampler(p, vocab, prompt.tolist()) for p in params]
    device.counts[:, torch.from_numpy(np.unique(prompt)).cuda()] = -(2**31)
    base = random_logits(rng, 3, vocab)
    for step in range(12):
        logits = base + random_logits(rng, 3, vocab, 0.1)
        tokens = device.sample(logits)
        for b, token in enumerate(tokens):
            assert agrees(samplers[b], step, logits[b], token), (step, b)
            assert samplers[b].draw(logits[b]) == token
    answered = device.counts.cpu().numpy() & 0x7FFFFFFF
    assert answered.sum(axis=1).tolist() == [12, 12, 12]


@pytest.mark.parametrize("vocab", [99, 49152])
def test_bias_and_mask(vocab: int) -> None:
    rng = np.random.default_rng(4)
    params = [
        SamplingParams(seed=5, temperature=1.0, logit_bias={3: 12.0, vocab - 1: 11.5, 50: -100.0}),
        SamplingParams(seed=6, temperature=0.0, logit_bias={7: 40.0}),
        SamplingParams(seed=7, temperature=1.0, top_k=5),
        SamplingParams(seed=8, temperature=1.0, top_p=0.7, min_p=0.0),
    ]
    masks = rng.random((4, vocab)) < 0.3
    masks[:, :8] = True
    device, samplers = Device(params, vocab, masks), [Sampler(p, vocab) for p in params]
    for step in range(6):
        logits = random_logits(rng, 4, vocab)
        for b, token in enumerate(device.sample(logits)):
            assert masks[b, token] and agrees(samplers[b], step, logits[b], token, masks[b]), (step, b, token)


@pytest.mark.parametrize("vocab", [989, 49152])
def test_of_equal_tokens_at_the_nucleus_border_the_first_ids_stay(vocab: int) -> None:
    logits = np.zeros((8, vocab), np.float32)
    params = [SamplingParams(seed=s, temperature=1.0, top_p=0.3, min_p=0.0) for s in range(8)]
    tokens = Device(params, vocab).sample(logits)
    assert max(tokens) <= int(np.ceil(0.3 * vocab)) and len(set(tokens)) > 1
    for b, token in enumerate(tokens):
        assert agrees(Sampler(params[b], vocab), 0, logits[b], token)


def test_every_share_of_the_distribution_is_drawn_as_often_as_it_weighs() -> None:
    logits = np.tile(np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32)), (64, 1))
    device = Device([SamplingParams(seed=s, temperature=1.0, min_p=0.0) for s in range(64)], 4)
    counts = np.zeros(4)
    for _ in range(40):
        counts += np.bincount(device.sample(logits), minlength=4)
    assert np.abs(counts / counts.sum() - [0.5, 0.25, 0.125, 0.125]).max() < 0.04


def test_logits_that_are_not_finite_reach_the_host_as_minus_one_and_free_places_stay() -> None:
    logits = np.zeros((3, 989), np.float32)
    logits[0, 500] = np.nan
    logits[1, 3] = np.inf
    device = Device([SamplingParams(seed=1)] * 3, 989)
    device.positions[2] = -1
    assert device.sample(logits) == [-1, -1, -9]
    assert device.history[:2, 0].tolist() == [-1, -1] and device.positions.tolist() == [6, 6, -1]


@pytest.mark.parametrize("rows", AWKWARD)
def test_greedy_takes_the_largest_key_and_embeds_the_token(rows: int) -> None:
    weight, table = make_weight("bf16", rows, 64), make_weight("int8", rows, 96, group=32)
    x = random_bf16(3, 64)
    logits = torch.empty((3, rows), device="cuda")
    keys = torch.zeros((3, K.gemv_num_blocks(weight.view, 3)), dtype=torch.int64, device="cuda")
    K.gemv(weight.view, x, logits, K.Epilogue.logits, block_max=keys, stream=stream())
    device = Device([SamplingParams()] * 3, 4)
    residual = torch.full((3, 96), float("nan"), device="cuda")
    copy = residual.to(torch.bfloat16)
    device.positions[1] = -1
    K.greedy(keys, device.state, table.view, residual, copy, 2.0, stream=stream())
    best = logits.argmax(1)
    assert device.token_ids.tolist() == [int(best[0]), -9, int(best[2])]
    assert device.positions.tolist() == [6, -1, 6] and device.history[:, 0].tolist() == device.token_ids.tolist()
    assert torch.allclose(residual[[0, 2]].double(), table.values[best[[0, 2]]] * 2)
    assert torch.equal(copy[[0, 2]], residual[[0, 2]].to(torch.bfloat16)) and bool(torch.isnan(residual[1]).all())
