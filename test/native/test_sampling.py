"""The device draws what edgellm_ros/runtime/sampling.py draws, and leaves the token where the next step reads it."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from draws import agrees
from kernel_case import AWKWARD, K, make_weight, needs_gpu, random_bf16, stream, torch

from edgellm_ros.core import SamplingParams
from edgellm_ros.runtime.sampling import Sampler, logprob_of
from edgellm_ros.vocab_map import VocabMap

pytestmark = needs_gpu
MAX_BIAS = 8
HISTORY = 4
LOGPROB_WORDS = 42  # struct TokenLogprobs: logprob, num_top, 20 ids, 20 values


def row_bytes(params: SamplingParams, draw_index: int = 0, use_mask: bool = False) -> bytes:
    """The C struct SamplingRow."""
    return struct.pack(
        "<Q6f6i", params.seed or 0, params.temperature, params.top_p, params.min_p, params.repetition_penalty,
        params.presence_penalty, params.frequency_penalty, params.top_k, draw_index, len(params.logit_bias), use_mask,
        -1 if params.logprobs is None else params.logprobs, 0,
    )  # fmt: skip


class Device:
    """A batch's buffers, and one call of the kernel."""

    def __init__(
        self,
        params: list[SamplingParams],
        vocab: int,
        masks: npt.NDArray[np.bool_] | None = None,
        vocab_map: VocabMap | None = None,
    ) -> None:
        """`vocab` is the number of logits; bias and masks are by row of them, whatever tokens they stand for."""
        batch = len(params)
        self.row_tokens = () if vocab_map is None else (torch.from_numpy(vocab_map.token_ids).cuda(),)
        data = b"".join(row_bytes(p, use_mask=masks is not None) for p in params)
        assert len(data) == batch * K.SAMPLING_ROW_BYTES
        self.rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(batch, -1).cuda()
        ints = dict(dtype=torch.int32, device="cuda")
        self.token_ids, self.step_counts = torch.full((batch,), -9, **ints), torch.zeros(batch, **ints)
        self.positions = torch.full((batch,), 5, **ints)
        self.history = torch.full((batch, HISTORY), -9, **ints)
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
        self.logprobs = torch.full((batch, HISTORY, LOGPROB_WORDS), -9, **ints)

    @property
    def state(self) -> tuple[Any, ...]:
        return self.token_ids, self.positions, self.history, self.step_counts, *self.row_tokens

    def sample(self, logits: npt.NDArray[np.float32], plain: bool = False) -> list[int]:
        """`plain` leaves out all but temperature, top-k, top-p and min-p, which another kernel draws with."""
        on_device = torch.from_numpy(logits).cuda()
        scores = torch.full_like(on_device, float("nan"))
        if plain:
            K.sample(on_device, scores, self.rows, self.state, stream=stream())
        else:
            K.sample(
                on_device, scores, self.rows, self.state, self.counts, self.bias_ids, self.bias_values, self.mask,
                self.logprobs, stream=stream(),
            )  # fmt: skip
        return [int(t) for t in self.token_ids]

    def logprob(self, b: int, step: int) -> tuple[float, list[tuple[int, float]]]:
        """What the kernel wrote for a token of that step: its logprob, and the most likely tokens'."""
        words = self.logprobs[b, step % HISTORY].cpu().numpy()
        floats, num_top = words.view(np.float32), int(words[1])
        ids, values = words[2 : 2 + num_top].tolist(), floats[22 : 22 + num_top].tolist()
        return float(floats[0]), list(zip(ids, values, strict=True))


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
    "most_few": {"temperature": 1.0, "top_k": 256, "top_p": 0.97, "min_p": 0.0},  # the most that few_wanted takes
    "one_too_many": {"temperature": 1.0, "top_k": 257, "top_p": 0.97, "min_p": 0.0},
    "wide": {"temperature": 3.0, "top_p": 0.99, "min_p": 0.0},  # a nucleus of thousands
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab", [*AWKWARD, 49152, 151936])
def test_draws_fall_where_the_reference_says(case: str, vocab: int, plain: bool) -> None:
    rng = np.random.default_rng(vocab)
    params = [SamplingParams(seed=s, logprobs=0, **CASES[case]) for s in range(8)]
    device = Device(params, vocab)
    samplers = [Sampler(p, vocab) for p in params]
    for step in range(4):
        logits = random_logits(rng, 8, vocab)
        tokens = device.sample(logits, plain)
        for b, token in enumerate(tokens):
            assert 0 <= token < vocab and agrees(samplers[b], step, logits[b], token), (step, b, token)
            if not plain:
                wanted = logprob_of(logits[b], token, 0).logprob
                got, top = device.logprob(b, step)
                assert abs(got - wanted) < 1e-4 * max(1.0, abs(wanted)) and top == []
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
    said = torch.from_numpy(prompt.astype(np.int32)).cuda()
    for counts in device.counts:
        K.count_tokens(said, len(prompt), counts, stream=stream())
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


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 99), (99, 151936), (16000, 49152)])
def test_with_a_cut_head_tokens_are_the_models_own(rows: int, vocab: int, plain: bool) -> None:
    """Bias, masks and penalties by row; what is drawn, its history and the log-probabilities by token."""
    rng = np.random.default_rng(rows)
    found = VocabMap(np.sort(rng.choice(vocab, rows, replace=False)), vocab)
    tokens = found.token_ids.tolist()
    cases: list[dict[str, Any]] = [*CASES.values()]
    if not plain:
        penalties = {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "logit_bias": {tokens[-1]: 3.0}}
        cases = [{**case, **penalties} for case in cases]
    params = [SamplingParams(seed=s, logprobs=None if plain else 3, **case) for s, case in enumerate(cases)]
    by_row = [replace(p, logit_bias={tokens.index(t): v for t, v in p.logit_bias.items()}) for p in params]
    allowed = np.ones((len(params), vocab), np.bool_)
    allowed[:, tokens[:-1:3]] = False
    device = Device(by_row, rows, None if plain else allowed[:, found.token_ids], found)
    samplers = [Sampler(p, vocab, [], found) for p in params]
    for step in range(4):
        logits = random_logits(rng, len(params), rows)
        drawn = device.sample(logits, plain)
        for b, token in enumerate(drawn):
            mask = None if plain else allowed[b]
            assert token in found and agrees(samplers[b], step, logits[b], token, mask), (step, b, token)
            if plain:
                continue
            assert samplers[b]._seen is not None
            samplers[b]._seen.add(int(found.rows(token)))
            wanted = logprob_of(logits[b], token, 3, found)
            got, top = device.logprob(b, step)
            assert abs(got - wanted.logprob) < 1e-4 * max(1.0, abs(wanted.logprob))
            assert [t for t, _ in top] == [t for t, _ in wanted.top]
    assert device.history[:, 3].tolist() == device.token_ids.tolist()
    counted = (device.counts.cpu().numpy() & 0x7FFFFFFF).sum(axis=1)
    assert counted.tolist() == [0 if plain else 4] * len(params)


@pytest.mark.parametrize("vocab", [989, 49152])
def test_of_equal_tokens_at_the_nucleus_border_the_first_ids_stay(vocab: int) -> None:
    logits = np.zeros((8, vocab), np.float32)
    params = [SamplingParams(seed=s, temperature=1.0, top_p=0.3, min_p=0.0) for s in range(8)]
    tokens = Device(params, vocab).sample(logits)
    assert max(tokens) <= int(np.ceil(0.3 * vocab)) and len(set(tokens)) > 1
    for b, token in enumerate(tokens):
        assert agrees(Sampler(params[b], vocab), 0, logits[b], token)


@pytest.mark.parametrize("vocab", [99, 49152, 151936])
@pytest.mark.parametrize("num_equal", [40, 600])
def test_tokens_as_likely_as_the_kth_stay_as_in_the_reference(vocab: int, num_equal: int) -> None:
    """40 equal ones are compared each with each, 600 are more than that part takes."""
    rng = np.random.default_rng(vocab)
    logits = random_logits(rng, 8, vocab, 0.5)
    equal = rng.choice(vocab, min(num_equal, vocab), replace=False)
    logits[:, equal] = 6.0
    params = [SamplingParams(seed=s, temperature=1.0, top_k=10, top_p=(1.0, 0.5)[s % 2], min_p=0.0) for s in range(8)]
    tokens = Device(params, vocab).sample(logits, plain=True)
    for b, token in enumerate(tokens):
        assert token in equal and agrees(Sampler(params[b], vocab), 0, logits[b], token), b
    assert len(set(tokens)) > 2


@pytest.mark.parametrize("vocab", [989, 49152, 151936])
def test_peaked_and_flat_distributions_give_the_reference_nucleus(vocab: int) -> None:
    """Whether few tokens have the mass, or it takes the whole vocabulary: every token drawn is one of the nucleus."""
    rng = np.random.default_rng(7)
    spreads = (0.0, 1e-3, 0.1, 1.0, 3.0, 6.0, 12.0, 40.0)  # nearer to each other, the reference rounds to ties
    params = [SamplingParams(seed=s, temperature=1.0, top_p=0.9, min_p=0.0) for s in range(8)]
    device, samplers = Device(params, vocab), [Sampler(p, vocab) for p in params]
    for step in range(8):
        logits = np.concatenate([random_logits(rng, 1, vocab, spread) for spread in spreads])
        for b, token in enumerate(device.sample(logits, plain=True)):
            assert agrees(samplers[b], step, logits[b], token), (step, spreads[b], token)


def test_rows_with_nothing_special_draw_the_same_in_both_kernels() -> None:
    rng = np.random.default_rng(8)
    params = [SamplingParams(seed=i, **case) for i, case in enumerate(CASES.values())]
    one, other = Device(params, 49152), Device(params, 49152)
    one.counts.fill_(5)  # of no consequence without a penalty
    for _ in range(6):
        logits = random_logits(rng, len(params), 49152)
        assert one.sample(logits) == other.sample(logits, plain=True)


@pytest.mark.parametrize("vocab", [*AWKWARD, 49152, 151936])
@pytest.mark.parametrize("num_top", [1, 5, 20])
def test_top_logprobs_are_log_softmax(vocab: int, num_top: int) -> None:
    rng = np.random.default_rng(vocab + num_top)
    params = [SamplingParams(seed=s, temperature=1.5, logit_bias={0: 4.0}, logprobs=num_top) for s in range(3)]
    device = Device(params, vocab)
    for step in range(HISTORY + 1):
        logits = random_logits(rng, 3, vocab)
        logits[2] = np.round(logits[2])  # many equal ones: the lower id comes first
        tokens = device.sample(logits)
        log_softmax = torch.log_softmax(torch.from_numpy(logits).double(), 1).numpy()
        for b, token in enumerate(tokens):
            got, top = device.logprob(b, step)
            order = np.argsort(-logits[b], kind="stable")[:num_top]
            assert [token_id for token_id, _ in top] == order.tolist()
            assert np.allclose([value for _, value in top], log_softmax[b, order], atol=1e-4)
            assert abs(got - log_softmax[b, token]) < 1e-4 * max(1.0, abs(got))


def test_counting_ids_marks_the_prompt_and_adds_up_the_answer() -> None:
    counts = torch.zeros(989, dtype=torch.int32, device="cuda")
    ids = np.random.default_rng(1).integers(0, 989, 3000).astype(np.int32)
    K.count_tokens(torch.from_numpy(ids).cuda(), 1000, counts, stream=stream())
    got = counts.cpu().numpy().view(np.uint32)
    assert np.array_equal(got & 0x7FFFFFFF, np.bincount(ids[1000:], minlength=989))
    assert np.array_equal(got >> 31, np.isin(np.arange(989), ids[:1000]))


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
