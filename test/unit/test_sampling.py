"""Sampling: the distribution is that of Hugging Face's processors, the draws follow it, and a seed decides them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from edgellm_ros.core import SamplingParams
from edgellm_ros.errors import DeviceError
from edgellm_ros.runtime.sampling import Sampler, logprob_of, uniform

PROMPT = [3, 5, 5, 8]
ANSWER = [7, 3, 7]


def logits_of(vocab: int, seed: int = 0, scale: float = 3.0) -> Any:
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


def huggingface(params: SamplingParams, logits: Any, prompt: list[int], answer: list[int]) -> Any:
    """The distribution by transformers, in the order in which its generate() applies processors and warpers."""
    torch = pytest.importorskip("torch")
    lp = pytest.importorskip("transformers.generation.logits_process")
    ids = torch.tensor([prompt + answer])
    scores = torch.tensor(logits)[None]
    if params.logit_bias:
        scores = lp.SequenceBiasLogitsProcessor([[[t], float(b)] for t, b in params.logit_bias.items()])(ids, scores)
    if params.repetition_penalty != 1.0:
        scores = lp.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token, count in Counter(answer).items():  # OpenAI's definition; transformers has none
        scores[0, token] -= count * params.frequency_penalty + params.presence_penalty
    scores = lp.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = lp.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1.0:
        scores = lp.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p > 0.0:
        scores = lp.MinPLogitsWarper(params.min_p)(ids, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


@pytest.mark.parametrize("vocab", [10, 99, 989, 49152])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 4},
        {"top_k": 50},
        {"top_k": 10**6},
        {"top_p": 0.9},
        {"top_p": 0.05},
        {"top_p": 0.999, "temperature": 1.7},
        {"min_p": 0.1},
        {"min_p": 0.9, "temperature": 0.5},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.03, "temperature": 0.8},
        {"top_p": 0.8, "min_p": 0.02},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "top_k": 5},
        {"presence_penalty": 1.5, "frequency_penalty": -0.5},
        {"logit_bias": {1: 4.0, 7: -100.0}, "repetition_penalty": 1.2, "top_p": 0.95},
        {"frequency_penalty": 0.4, "presence_penalty": 0.2, "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 3},
    ],
)
def test_the_distribution_is_that_of_hugging_face(vocab: int, fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    logits = logits_of(vocab, vocab)
    before = logits.copy()
    sampler = Sampler(params, vocab, PROMPT)
    for token in ANSWER:
        only = np.zeros(vocab, bool)
        only[token] = True
        assert sampler.draw(logits_of(vocab, 1), only) == token
    wanted = huggingface(params, logits, PROMPT, ANSWER)
    found = sampler.distribution(logits)
    assert np.array_equal(found > 0, wanted > 0)
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-7)
    assert np.array_equal(logits, before), "the executor's logits are left as they are"


@pytest.mark.parametrize(
    "fields", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"temperature": 1.6, "top_k": 9}]
)
def test_drawn_frequencies_follow_the_distribution(fields: dict[str, Any]) -> None:
    params, logits, count = SamplingParams(seed=11, **fields), logits_of(20, 4, 1.5), 8000
    sampler = Sampler(params, 20)
    probabilities = sampler.distribution(logits)
    drawn = np.bincount([sampler.draw(logits) for _ in range(count)], minlength=20)
    assert not drawn[probabilities == 0].any()
    expected = probabilities[probabilities > 0] * count
    chi_square = (((drawn[probabilities > 0] - expected) ** 2) / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4.0 * np.sqrt(2.0 * freedom) + 4.0


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.97}, {"temperature": 3.0}])
def test_drawn_frequencies_follow_the_distribution_of_a_large_vocabulary(fields: dict[str, Any]) -> None:
    vocab, count = 49152, 4000
    params, logits = SamplingParams(seed=2, **fields), logits_of(vocab, 6, 2.0)
    logits[:1000] = -np.inf
    sampler = Sampler(params, vocab)
    probabilities = sampler.distribution(logits)
    drawn = np.bincount([sampler.draw(logits) for _ in range(count)], minlength=vocab)
    assert not drawn[probabilities == 0].any()
    bins = np.arange(vocab) % 32  # spread over all blocks
    places = np.arange(vocab) * 32 // vocab  # and along them
    for group in (bins, places):
        expected = np.bincount(group, probabilities, 32) * count
        found = np.bincount(group, drawn, 32)
        kept = expected > 1
        assert ((found - expected)[kept] ** 2 / expected[kept]).sum() < 31 + 4.0 * np.sqrt(62.0) + 4.0


def test_equally_likely_tokens_at_the_border_of_top_p_are_cut_to_the_smallest_set() -> None:
    for vocab in (10, 4000):
        found = Sampler(SamplingParams(top_p=0.55), vocab).distribution(np.zeros(vocab, np.float32))
        assert np.count_nonzero(found) == int(0.55 * vocab) + (vocab == 10)


def test_uniform_numbers_are_uniform_and_independent_of_neighbours() -> None:
    grid = np.array([[uniform(seed, index) for index in range(64)] for seed in range(64)])
    assert grid.min() >= 0.0 and grid.max() < 1.0
    counts = np.histogram(grid, 16, (0, 1))[0]
    assert ((counts - 256) ** 2 / 256).sum() < 45  # 15 degrees of freedom, p < 1e-4
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[1:, :-1], grid[:-1, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.07
    for step in (1, 2**32, 0x9E3779B97F4A7C15):  # the last is SplitMix64's own increment
        assert uniform(2**63 - 1, 1) != uniform((2**63 - 1 + step) % 2**64, 0)


def test_a_seed_decides_the_draws_and_none_is_fresh() -> None:
    logits = logits_of(500, 2, 0.5)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), 500)
        return [sampler.draw(logits) for _ in range(30)]

    assert draws(5) == draws(5) != draws(6)
    assert draws(None) != draws(None)
    assert draws(2**63 - 1) == draws(2**63 - 1)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-9}]
)
def test_the_most_likely_token_is_taken(fields: dict[str, Any]) -> None:
    for seed in range(20):
        logits = logits_of(989, seed)
        assert Sampler(SamplingParams(**fields), 989).draw(logits) == int(logits.argmax())


def test_penalties_and_bias_change_the_greedy_choice() -> None:
    logits = np.zeros(300, np.float32)
    logits[[9, 4]] = 5.0, 4.0
    assert Sampler(SamplingParams(temperature=0.0, repetition_penalty=2.0), 300, [9]).draw(logits) == 4
    assert Sampler(SamplingParams(temperature=0.0, logit_bias={9: -3.0}), 300).draw(logits) == 4
    sampler = Sampler(SamplingParams(temperature=0.0, frequency_penalty=0.3), 300)
    assert [sampler.draw(logits) for _ in range(6)] == [9, 9, 9, 9, 4, 9]


def test_penalties_hold_for_more_tokens_than_the_first_buffer() -> None:
    sampler = Sampler(SamplingParams(temperature=0.0, presence_penalty=100.0), 989)
    logits = logits_of(989, 8)
    assert [sampler.draw(logits) for _ in range(900)] == np.argsort(-logits, kind="stable")[:900].tolist()


@pytest.mark.parametrize("vocab", [500, 49152])
@pytest.mark.parametrize("share", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_range_do_not_draw_what_is_ruled_out(vocab: int, share: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("edgellm_ros.runtime.sampling.uniform", lambda seed, index: share)
    mask = np.zeros(vocab, bool)
    mask[[100, vocab - 100]] = True
    plain = SamplingParams(temperature=1.0, min_p=0.0)
    assert Sampler(plain, vocab).draw(logits_of(vocab), mask) == (100 if share == 0.0 else vocab - 100)


def test_a_mask_is_obeyed() -> None:
    logits, mask = logits_of(500, 3), np.zeros(500, bool)
    mask[[2, 71, 400]] = True
    for fields in ({"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.2}, {"temperature": 50.0}):
        sampler = Sampler(SamplingParams(seed=1, **fields), 500)  # type: ignore[arg-type]
        assert {sampler.draw(logits, mask) for _ in range(50)} <= {2, 71, 400}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {}, {"top_k": 5}])
def test_logits_that_are_not_finite_are_an_error(value: float, fields: dict[str, Any]) -> None:
    logits = logits_of(99)
    logits[50] = value
    with pytest.raises(DeviceError, match="token 50"):
        Sampler(SamplingParams(**fields), 99).draw(logits)


@pytest.mark.parametrize("vocab", [5, 989, 49152])
def test_logprobs_are_the_log_softmax_of_the_logits(vocab: int) -> None:
    torch = pytest.importorskip("torch")
    logits = logits_of(vocab, 1, 8.0)
    wanted = torch.log_softmax(torch.tensor(logits).double(), -1)
    top = torch.topk(wanted, 5)
    found = logprob_of(logits, 3, 5)
    assert found.logprob == pytest.approx(float(wanted[3]), abs=1e-4)
    assert [token for token, _ in found.top] == top.indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert logprob_of(logits, 3, 0).top == ()


def test_ties_at_the_kth_place_are_all_kept_as_in_hugging_face() -> None:
    logits = np.array([1.0, 3.0, 2.0, 2.0, 0.0], np.float32)
    assert np.flatnonzero(Sampler(SamplingParams(top_k=2), 5).distribution(logits)).tolist() == [1, 2, 3]
