"""A node whose executor loses its device at the 40th position of a slot, as long as the file named first exists."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import DeviceError
from edgellm_ros.executors.base import SequenceStep
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor
from edgellm_ros.llm import LLM
from edgellm_ros.ros.llm_node import LLMNode
from edgellm_ros.ros.process import run_node

WORDS = "graph.hpp:49: cudaGraphLaunch failed: cudaErrorIllegalAddress"


class FailingExecutor(OnnxRuntimeExecutor):
    """Computes until a step reaches position 40."""

    def step(self, batch: Sequence[SequenceStep]) -> npt.NDArray[np.float32]:
        """As the executor's, or DeviceError."""
        if any(item.position >= 40 for item in batch) and Path(sys.argv[1]).exists():
            raise DeviceError(WORDS)
        return super().step(batch)


def open_llm(path: str, config: EngineConfig) -> LLM:
    """As LLM.open, over that executor."""
    bundle = Bundle.open(path)
    return LLM(bundle, config, FailingExecutor(bundle, config))


if __name__ == "__main__":
    raise SystemExit(run_node(lambda: LLMNode(open_llm), sys.argv[2:]))
