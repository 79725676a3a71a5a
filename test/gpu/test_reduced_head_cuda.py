"""A head with fewer rows on the GPU: logits are ONNX Runtime's, and the device draws the model's own ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from draws import agrees
from test_executor_contract import prompt, step
from test_export import relative_error
from test_reduced_head import kept_tokens

from edgellm_ros.config import EngineConfig
from edgellm_ros.core import Request, SamplingParams
from edgellm_ros.executors.base import RunSequence
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor
from edgellm_ros.llm import LLM
from edgellm_ros.runtime.sampling import Sampler, logprob_of
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.vocab_map import VocabMap


def rows_of(executor: Any, ids: np.ndarray) -> np.ndarray:
    """Logits after every token, the last ten decoded one by one."""
    rows = [executor.step([step(1, ids[:-10], 0, len(ids) - 10)]).copy()]
    rows += [executor.step([step(1, ids[i : i + 1], i)]).copy() for i in range(len(ids) - 10, len(ids))]
    return np.concatenate(rows)


PARAMS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.2, "top_p": 0.9, "min_p": 0.0},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {5: 2.0, 17: 1.0}, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 0},
)


def check_run(executor: CudaExecutor, ids: np.ndarray, params: SamplingParams, kept: VocabMap | None) -> None:
    """30 tokens that the device draws, each where the host's draw from the logits of its step falls."""
    assert kept is not None and executor.run is not None
    first = int(kept.token_ids[3])
    executor.step([step(0, ids, 0)])
    executor.run.start([RunSequence(0, len(ids), [first], ids, params, params.seed or 0)])
    answer: list[int] = [first]
    logprobs = []
    for _ in range(30):
        executor.run.launch()
        result = executor.run.read()
        answer.append(result.token_ids[0])
        logprobs.append(result.logprobs[0])
    sampler: Any = Sampler(params, executor.info.vocab_size, ids.tolist(), kept)
    for i, token in enumerate(answer[1:]):
        if sampler._seen is not None:
            sampler._seen.add(int(kept.rows(answer[i])))
        logits = executor.step([step(0, np.array([answer[i]], np.int32), len(ids) + i)])[0].copy()
        assert token in kept and agrees(sampler, i + 1, logits, token), (params, i, token)
        if params.logprobs is not None:
            wanted, found = logprob_of(logits, token, params.logprobs, kept), logprobs[i]
            assert found is not None and found.token_id == token and abs(found.logprob - wanted.logprob) < 1e-4
            assert [t for t, _ in found.top] == [t for t, _ in wanted.top]


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_a_cut_head_gives_the_rows_that_it_has(
    weights: str, gpu_model: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    source = gpu_model("gpu_llama")[1]
    kept = kept_tokens(source)
    (tmp_path / "map.json").write_text(json.dumps({"token_ids": kept}))
    bundle = export_bundle(source, tmp_path / "bundle", weights=weights, vocab_map=tmp_path / "map.json")
    ids = prompt(50)
    reference = OnnxRuntimeExecutor(bundle, EngineConfig(max_slots=2))
    expected = rows_of(reference, ids)
    reference.close()
    config = EngineConfig(executor="cuda", max_slots=2, max_context=128)
    executor = CudaExecutor(bundle, config)
    got = rows_of(executor, ids)
    assert got.shape == (50, len(kept)) and executor.run is not None
    assert relative_error(got, expected) < 0.08
    for params in PARAMS:
        check_run(executor, ids, SamplingParams(seed=11, **params), bundle.vocab_map())
    with LLM(bundle, config, executor) as llm:
        sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
        answer = llm.complete(Request(prompt_ids=tuple(int(i) for i in ids), sampling=sampling))
    assert len(answer.token_ids) == 40 and set(answer.token_ids) <= set(kept) and np.ptp(answer.token_ids) > 0
