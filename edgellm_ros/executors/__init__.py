"""Executors: token ids in, logits out. `create_executor` picks one for a bundle and says why."""

from __future__ import annotations

import logging

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import UnsupportedError
from edgellm_ros.executors.base import DecodeRun, Executor, ExecutorInfo, RunSequence, RunStep, SequenceStep

__all__ = ["DecodeRun", "Executor", "ExecutorInfo", "RunSequence", "RunStep", "SequenceStep", "create_executor"]

_log = logging.getLogger(__name__)

_NO_TENSORRT = "tensorrt: this version has no such executor yet"


def create_executor(bundle: Bundle, config: EngineConfig) -> Executor:
    """Load `bundle` with the executor that `config` names; auto is the first of tensorrt, cuda, onnxruntime that runs.

    The choice and its reason are logged. Raises UnsupportedError for an executor that cannot run here, BundleError,
    ConfigError and DeviceError from loading.
    """
    if config.executor == "tensorrt":
        raise UnsupportedError(f"executor is 'tensorrt': {_NO_TENSORRT.partition(': ')[2]}; use onnxruntime or auto")
    reasons = [_NO_TENSORRT]
    executor: Executor | None = None
    if config.executor in ("auto", "cuda"):
        reason = _cuda_reason(bundle)
        if not reason:
            from edgellm_ros.executors.cuda import CudaExecutor

            executor = CudaExecutor(bundle, config)
        elif config.executor == "cuda":
            raise UnsupportedError(f"executor is 'cuda': {reason}; use onnxruntime or auto")
        else:
            reasons.append(f"cuda: {reason}")
    if executor is None:
        from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor

        executor = OnnxRuntimeExecutor(bundle, config)
    why = "asked for" if config.executor != "auto" else "; ".join(reasons)
    _log.info("executor: %s on %s (%s)", executor.info.name, executor.info.device, why)
    return executor


def _cuda_reason(bundle: Bundle) -> str:
    """Why the CUDA executor cannot run `bundle` here; empty when it can."""
    from edgellm_ros import native

    reason = native.unavailable_reason()
    if reason:
        return reason
    from edgellm_ros.executors.cuda import unsupported_reason

    return unsupported_reason(bundle)
