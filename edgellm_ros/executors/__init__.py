"""Executors: token ids in, logits out. `create_executor` picks one for a bundle and says why."""

from __future__ import annotations

import logging

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import UnsupportedError
from edgellm_ros.executors.base import Executor, ExecutorInfo, SequenceStep

__all__ = ["Executor", "ExecutorInfo", "SequenceStep", "create_executor"]

_log = logging.getLogger(__name__)

# What a release may add, in the order in which `auto` prefers them.
_NOT_BUILT = {
    "tensorrt": "this version has no TensorRT executor yet",
    "cuda": "this version has no CUDA executor yet",
}


def create_executor(bundle: Bundle, config: EngineConfig) -> Executor:
    """Load `bundle` with the executor that `config` names, or the first that can run here.

    Raises UnsupportedError for an executor that this version cannot run, BundleError and ConfigError from loading.
    """
    if config.executor in _NOT_BUILT:
        raise UnsupportedError(f"executor is {config.executor!r}: {_NOT_BUILT[config.executor]}; use onnxruntime or auto")
    from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor

    executor = OnnxRuntimeExecutor(bundle, config)
    reason = "asked for" if config.executor != "auto" else "; ".join(_NOT_BUILT.values())
    _log.info("executor: %s on %s (%s)", executor.info.name, executor.info.device, reason)
    return executor
