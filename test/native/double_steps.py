"""What tests of the tensorrt executor over the double of libnvinfer share: its settings, and steps of one sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgellm_ros import trt_plugins
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import UnsupportedError
from edgellm_ros.executors import Executor, SequenceStep

RNG = np.random.default_rng(17)
CONTEXT = 120  # of the cache's 128: one place is for slots without a token where slots are batched
BUILD = {"max_batch": 4, "max_input": 32, "max_context": 128, "max_verify": 8, "activations": "bf16"}
KINDS = ("gpu_llama", "gpu_mistral", "gpu_qwen2", "gpu_qwen3", "gpu_gemma3")


def config(executor: str, **settings: Any) -> EngineConfig:
    return EngineConfig(**{"executor": executor, "max_slots": 4, "max_context": CONTEXT, "kv_cache": "bf16", **settings})


def needed(dialect: str) -> str:
    """The dialect; skips the test where its plugin library is not built. The double loads it, and uses none of it."""
    if dialect == "plugin":
        try:
            trt_plugins.find_library()
        except UnsupportedError as error:
            pytest.skip(str(error))
    return dialect


def prompt(length: int) -> np.ndarray:
    return RNG.integers(5, 300, length).astype(np.int32)


def one(executor: Executor, slot: int, ids: Any, position: int, num_logits: int = 1, adapter: int = 0) -> np.ndarray:
    return executor.step([SequenceStep(slot, np.asarray(ids, np.int32), position, num_logits, adapter)]).copy()


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected - expected.mean(-1, keepdims=True)))
