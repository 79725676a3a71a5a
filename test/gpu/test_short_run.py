"""Every path of the CUDA runtime once, on models small enough for compute-sanitizer (`tools/gpu_check.sh sanitize`).

Elsewhere each is tested against its oracle; here the same work is done alone and among others, and must agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_executor_contract import prompt, step

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import SamplingParams
from edgellm_ros.executors import RunSequence, SequenceStep, cuda
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.lora import LoraTensors, make_adapter

EVERYTHING = SamplingParams(
    temperature=0.9, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.1,
    logit_bias={7: 1.5}, logprobs=3, seed=4,
)  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, seed=1)
PLAIN = SamplingParams(temperature=0.8, top_k=20, seed=2)


@pytest.mark.parametrize(
    ("kind", "weights", "kv_cache"),
    [
        ("gpu_llama", "int4", "bf16"), ("gpu_qwen3", "fp16", "fp8"), ("gpu_mistral", "int8", "fp16"),
        ("gpu_gemma3", "int4", "bf16"), ("gpu_gemma3", "fp16", "fp8"),
    ],
)
def test_every_path_once(
    kind: str, weights: str, kv_cache: str, gpu_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    _leave_out(os.environ.get("EDGELLM_SHORT_RUN", ""), monkeypatch)
    config = EngineConfig(
        max_slots=3, max_context=128, prefill_chunk=48, kv_cache=kv_cache, max_loras=1, max_lora_rank=8,
        executor="cuda",
    )  # fmt: skip
    executor = CudaExecutor(gpu_bundle(kind, weights), config)
    try:
        prompts = [prompt(length) for length in (5, 33, 60)]  # the last in two chunks
        firsts = [int(executor.step([step(slot, ids, 0)])[0].argmax()) for slot, ids in enumerate(prompts)]
        together = executor.step(
            [step(slot, np.array([first], np.int32), len(prompts[slot])) for slot, first in enumerate(firsts)]
        ).copy()
        alone = executor.step([step(1, np.array([firsts[1]], np.int32), 33)])
        assert np.array_equal(alone[0], together[1])

        run = executor.run
        assert run is not None
        run.start(
            [
                RunSequence(slot, len(prompts[slot]), [first], prompts[slot], params, int(params.seed or 0))
                for slot, (first, params) in enumerate(zip(firsts, (EVERYTHING, GREEDY, PLAIN), strict=True))
            ]
        )
        for _ in range(3):
            run.launch()
        steps = [run.read() for _ in range(3)]
        assert steps[0].token_ids[1] == int(together[1].argmax())
        assert all(0 <= token < executor.info.vocab_size for read in steps for token in read.token_ids)

        draft, parents = prompt(5), np.array([-1, 0, 0, 1, 2], np.int32)
        chain = executor.step([step(0, draft, 5, 5)]).copy()
        tree = executor.verify_tree(0, 5, draft, parents).copy()
        assert np.linalg.norm(tree[1] - chain[1]) < 0.1 * np.linalg.norm(chain[1] - chain[1].mean())
        executor.accept_path(0, 5, [0, 2, 4])

        saved = executor.save_prefix(1, 33)
        executor.copy_prefix(1, 2, 20)
        executor.load_prefix(2, saved, 33)
        assert np.array_equal(executor.step([step(2, np.array([firsts[1]], np.int32), 33)])[0], together[1])

        model = gpu_bundle(kind, weights).manifest.model
        generator = np.random.default_rng(3)
        shapes = (4, model.hidden_size), (model.num_heads * model.head_dim, 4)
        lora_a, lora_b = (generator.standard_normal(shape).astype(np.float32) for shape in shapes)
        loaded = executor.load_adapter("one", make_adapter((LoraTensors(0, "q_proj", lora_a, lora_b, 0.5),)))
        tokens = [np.array([first], np.int32) for first in firsts]
        adapted = executor.step(
            [SequenceStep(1, tokens[1], 33, 1, loaded.index), SequenceStep(2, tokens[1], 33)]
        )  # fmt: skip
        assert not np.array_equal(adapted[0], together[1])
        assert np.array_equal(adapted[1], together[1])
    finally:
        executor.close()


def _leave_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tool cannot follow: "no-pdl", "no-products" (cuBLASLt's kernels), or both."""
    settings_of = cuda._settings

    def settings(*arguments: Any) -> Any:
        settings = settings_of(*arguments)
        settings.pdl = "no-pdl" not in what
        if "no-products" in what:
            settings.min_gemm_tokens = 1 << 20
        return settings

    monkeypatch.setattr(cuda, "_settings", settings)
