"""The soak's driver on the CPU: it repeats answers, and sees it when one differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from edgellm_ros.benchmark.soak import make_requests, soak
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import Request
from edgellm_ros.llm import LLM


@pytest.fixture(scope="module")
def llm(tiny_bundle: Callable[..., Bundle]) -> Iterator[LLM]:
    with LLM.open(tiny_bundle("qwen3", "int4"), EngineConfig(executor="onnxruntime", max_context=96, max_slots=3)) as it:
        yield it


def test_many_short_requests_get_the_answers_that_they_got_first(llm: LLM) -> None:
    requests = make_requests(12, llm.bundle.manifest.model.vocab_size, 96)
    report = soak(llm, requests, 120, 6, sample_s=0.05)
    assert report.num_requests == 120 == sum(report.finish_reasons.values())
    assert not report.errors and not report.different
    assert 0 < report.num_cancelled < 40
    assert report.finish_reasons["length"] > 0
    metrics = llm.metrics()
    assert metrics.active == 0 and metrics.waiting == 0


def test_an_answer_that_differs_and_a_refused_request_are_reported(llm: LLM) -> None:
    vocab = llm.bundle.manifest.model.vocab_size
    request = make_requests(2, vocab, 96)[1]
    unseeded = replace(request, sampling=replace(request.sampling, seed=None, temperature=5.0, max_tokens=40))
    report = soak(llm, [unseeded], 20, 1)
    assert set(report.different) == {0}
    too_long = Request(prompt_ids=(7,) * 200)
    report = soak(llm, [too_long], 3, 1)
    assert len(report.errors) == 3 and "200" in report.errors[0]
