"""A head with fewer rows on the GPU: logits are ONNX Runtime's, and the engine draws the model's own ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_executor_contract import prompt, step
from test_export import relative_error
from test_reduced_head import kept_tokens

from edgellm_ros.config import EngineConfig
from edgellm_ros.core import Request, SamplingParams
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor
from edgellm_ros.llm import LLM
from edgellm_ros.toolchain.export import export_bundle


def rows_of(executor: Any, ids: np.ndarray) -> np.ndarray:
    """Logits after every token, the last ten decoded one by one."""
    rows = [executor.step([step(1, ids[:-10], 0, len(ids) - 10)]).copy()]
    rows += [executor.step([step(1, ids[i : i + 1], i)]).copy() for i in range(len(ids) - 10, len(ids))]
    return np.concatenate(rows)


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
    assert got.shape == (50, len(kept)) and executor.run is None
    assert relative_error(got, expected) < 0.08
    with LLM(bundle, config, executor) as llm:
        sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
        answer = llm.complete(Request(prompt_ids=tuple(int(i) for i in ids), sampling=sampling))
    assert len(answer.token_ids) == 40 and set(answer.token_ids) <= set(kept) and np.ptp(answer.token_ids) > 0
