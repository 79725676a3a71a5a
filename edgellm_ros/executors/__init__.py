"""Executors: token ids in, logits out. `create_executor` picks one for a bundle and says why."""

from __future__ import annotations

import logging

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import BundleError, ConfigError, DeviceError, UnsupportedError
from edgellm_ros.executors.base import DecodeRun, Executor, ExecutorInfo, RunSequence, RunStep, SequenceStep

__all__ = ["DecodeRun", "Executor", "ExecutorInfo", "RunSequence", "RunStep", "SequenceStep", "create_executor"]

_log = logging.getLogger(__name__)


def create_executor(bundle: Bundle, config: EngineConfig) -> Executor:
    """Load `bundle` with the executor that `config` names; auto is the first of tensorrt, cuda, onnxruntime that runs.

    The choice and its reason are logged. Raises UnsupportedError for an executor that cannot run here, BundleError,
    ConfigError and DeviceError from loading.
    """
    reasons: list[str] = []
    executor: Executor | None = None
    if config.executor in ("auto", "tensorrt"):
        executor, reason = _tensorrt(bundle, config)
        if executor is None and config.executor == "tensorrt":
            raise UnsupportedError(f"executor is 'tensorrt': {reason}; or use auto")
        reasons.append(f"tensorrt: {reason}")
    if executor is None and config.executor in ("auto", "cuda"):
        reason = _cuda_reason(bundle)
        if not reason:
            from edgellm_ros.executors.cuda import CudaExecutor

            executor = CudaExecutor(bundle, config)
        elif config.executor == "cuda":
            raise native.refusal(reason, f"executor is 'cuda': {reason}; use onnxruntime or auto")
        else:
            if reason.startswith(native.GPU_FAILS):
                _log.warning("there is a GPU, and the CPU is used: %s", reason)
            reasons.append(f"cuda: {reason}")
    if executor is None:
        from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor

        executor = OnnxRuntimeExecutor(bundle, config)
    why = "asked for" if config.executor != "auto" else "; ".join(reasons)
    _log.info("executor: %s on %s (%s)", executor.info.name, executor.info.device, why)
    return executor


def _tensorrt(bundle: Bundle, config: EngineConfig) -> tuple[Executor | None, str]:
    """The executor of the engine that fits, and why it is this one; or None, and why none does.

    Only a name in the configuration makes it an error that an engine cannot be loaded, fails, or does not give the
    self-test's logits; auto warns and goes on.
    """
    from edgellm_ros.executors.engine_preflight import choose_engine, probe_machine

    engine, reasons = choose_engine(bundle, config, probe_machine())
    if engine is None:
        return None, "; ".join(reasons)
    from edgellm_ros.executors.engine_settings import usable_context
    from edgellm_ros.executors.selftest import check_room, run_self_test
    from edgellm_ros.executors.tensorrt import TensorRTExecutor

    executor: Executor | None = None
    try:
        if config.self_test:
            capacity = usable_context(engine.options, config)
            check_room(bundle.manifest, capacity, "build the engine again with --max-context above")
        executor = TensorRTExecutor(bundle, config, engine)
        if config.executor == "auto" and config.self_test and bundle.manifest.self_test.cases:
            run_self_test(executor, bundle.manifest)
    except (BundleError, UnsupportedError, ConfigError, DeviceError) as error:
        if executor is not None:
            executor.close()
        if config.executor == "tensorrt":
            raise
        _log.warning("an engine fits and cannot be used: %s", error)
        return None, str(error)
    return executor, f"engines/{engine.key} fits"


def _cuda_reason(bundle: Bundle) -> str:
    """Why the CUDA executor cannot run `bundle` here; empty when it can."""
    reason = native.unavailable_reason()
    if reason:
        return reason
    from edgellm_ros.executors.cuda import unsupported_reason

    return unsupported_reason(bundle)
