"""What `edgellm doctor` says of TensorRT: its library, what an engine is built with here, and a bundle's engines."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from edgellm_ros import native, trt_plugins
from edgellm_ros.cli.check import Check, State
from edgellm_ros.cli.gpu_checks import shorten_reason
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import DeviceError, UnsupportedError

if TYPE_CHECKING:
    from edgellm_ros.bundle import Bundle


def check_tensorrt() -> Iterator[Check]:
    """TensorRT's runtime library, as the executor `tensorrt` finds it; where it is used, what a build needs too."""
    module, reason = native.import_module()
    if module is None:
        yield Check("GPU", "TensorRT", State.MISSING, f"not looked for: {reason}", "not needed on a CPU")
        return
    path, version, reason = native.find_tensorrt(module)
    if not path:
        yield Check("GPU", "TensorRT", State.MISSING, reason, "not needed on a CPU; part of JetPack on a Jetson")
        return
    found = f"{'.'.join(map(str, version)) or 'not TensorRT'} ({path}), headers {module.TENSORRT_HEADERS}"
    reason = reason or shorten_reason(native.unavailable_reason())
    if reason:
        yield Check("GPU", "TensorRT", State.MISSING, f"{found}; not used: {reason}")
        return
    yield Check("GPU", "TensorRT", State.OK, f"{found}; used by the executor `tensorrt`")
    yield _check_builder()
    yield from _check_plugins(version)


def _check_builder() -> Check:
    from edgellm_ros.toolchain.build.targets import TENSORRT_REMEDY

    name = "TensorRT's builder"
    if importlib.util.find_spec("tensorrt") is None:
        found = "no Python module tensorrt; needed by `edgellm build` only"
        return Check("GPU", name, State.MISSING, found, TENSORRT_REMEDY)
    return Check("GPU", name, State.OK, "the Python module tensorrt; used by `edgellm build`")


def _check_plugins(version: tuple[int, ...]) -> Iterator[Check]:
    from edgellm_ros.toolchain.build.targets import ATTENTION_SINCE

    needed = version[:2] < ATTENTION_SINCE
    try:
        library = trt_plugins.find_library()
    except UnsupportedError as error:
        if needed:
            what, _, remedy = str(error).rpartition("; ")
            yield Check("GPU", "TensorRT plugins", State.MISSING, f"engines of this TensorRT need them: {what}", remedy)
        return
    use = "what engines of this TensorRT need" if needed else "for `edgellm build --dialect plugin`"
    yield Check("GPU", "TensorRT plugins", State.OK, f"{library}: {use}")


def check_engines(bundle: Bundle, config: EngineConfig) -> tuple[Check, tuple[int, int] | None]:
    """Which engine of a bundle would be loaded, with the GPU's bytes that it takes and those free; or why none."""
    from edgellm_ros.executors.engine_preflight import choose_engine, memory_needed, probe_machine

    try:
        machine = probe_machine()
    except DeviceError as error:
        found = f"{native.GPU_FAILS}: {error}"
        return Check("bundle", "engine", State.MISSING, found, native.SICK_REMEDY), None
    machine = replace(machine, reason=shorten_reason(machine.reason))
    chosen, reasons = choose_engine(bundle, config, machine)
    if chosen is not None:
        memory = sum(memory_needed(chosen, bundle, config).values()), machine.free_bytes
        return Check("bundle", "engine", State.OK, f"{chosen.key} fits this machine"), memory
    remedy = "not needed: another executor is used"
    return Check("bundle", "engine", State.MISSING, "; ".join(reasons), remedy), None
