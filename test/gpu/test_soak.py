"""Many short requests at once: each gets the answer it got first, nothing is allocated, and the host's memory stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgellm_ros import native
from edgellm_ros.benchmark.soak import make_requests, soak
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.llm import LLM


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_answers_repeat_and_nothing_is_allocated(weights: str, gpu_bundle: Callable[..., Bundle]) -> None:
    bundle = gpu_bundle("gpu_qwen3", weights)
    config = EngineConfig(executor="cuda", max_slots=4, max_context=160, max_queue=8)
    with LLM(bundle, config, CudaExecutor(bundle, config)) as llm:
        requests = make_requests(24, bundle.manifest.model.vocab_size, 160)
        soak(llm, requests, 200, 8)  # caches, thread stacks and the allocator's arenas come to rest
        allocations = native.load().allocation_count()
        report = soak(llm, requests, 600, 8, sample_s=0.1)
        assert native.load().allocation_count() == allocations
        metrics = llm.metrics()
    assert not report.errors and not report.different
    assert report.num_cancelled > 0 and report.num_tokens > 3000
    assert report.growth()[0] < 16e6
    assert metrics.active == 0 and metrics.waiting == 0
