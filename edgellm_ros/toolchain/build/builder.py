"""Builds an engine with TensorRT or TensorRT-RTX, whose Python interfaces are alike, and puts it into engines/KEY.

The directory is written under another name and renamed at the end, so an engine is whole or not there. Nothing here
executes an engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import edgellm_ros
from edgellm_ros.bundle import Bundle, hash_file
from edgellm_ros.toolchain.whole_output import whole_output
from edgellm_ros.errors import ToolchainError
from edgellm_ros.executors import engines
from edgellm_ros.executors.contract import lora_ranks
from edgellm_ros.executors.engines import ENGINE, ENGINES, LAYERS, REPORT, Engine
from edgellm_ros.toolchain.build import report as reports
from edgellm_ros.toolchain.build import plugins, targets, timing
from edgellm_ros.toolchain.build.bfloat16 import to_bfloat16
from edgellm_ros.toolchain.build.check import check_network
from edgellm_ros.toolchain.build.kernels import check_kernels, kernel_counts
from edgellm_ros.toolchain.build.trees import take_trees
from edgellm_ros.toolchain.build.profiles import add_profiles, profile_ranges
from edgellm_ros.config import BuildOptions
from edgellm_ros.trt_plugins import DOMAIN

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all
_REMEDIES = (
    (r"HW-specific datatypes", "export with --weights int8 or fp16, or choose a newer target"),
    (r"block|divide", "export again: the groups of a quantised layer have to divide its input features"),
    (r"workspace", "raise --memory-limit, or leave it out"),
    (r"out of memory|alloc|memory", "close other programs, or lower --max-context, --max-input or --max-batch"),
    (r"static sequence length", "export the model again: the cache's capacity is not named 'capacity'"),
)


def build_engine(
    bundle: Bundle, target: str = "current", options: BuildOptions | None = None, builder: str = "auto",
    force: bool = False, progress: Progress | None = None, *, ignore_memory: bool = False,
) -> tuple[Engine, bool]:  # fmt: skip
    """Build an engine of `bundle` for `target`; returns it, and whether it was built now or was there already.

    builder: auto, tensorrt or tensorrt_rtx. Raises ToolchainError, and then nothing is left behind;
    BundleError when the engine that is there is damaged or of other weights. ignore_memory: start although an estimate
    says that memory is short.
    """
    here = targets.current_target()
    target = targets.resolve_target(target, here, bundle)
    targets.check_formats(bundle, target)
    options = (options or BuildOptions()).resolved(bundle)
    flavour, trt = targets.load_builder(builder, target, here)
    dialect = targets.choose_dialect(options.dialect, flavour, trt.__version__, bundle, options.lora)
    options = dataclasses.replace(options, dialect=dialect)
    targets.check_cache(options)
    final = bundle.path / ENGINES / reports.engine_key(flavour, trt.__version__, target, options)
    if final.exists() and not force:
        engine = engines.read_engine(final)
        engines.check_engine(engine, bundle)
        return engine, False
    targets.check_resources(bundle, None if ignore_memory else targets.memory_available())
    with _tidy(final.parent), whole_output(final) as partial:
        with _interruptible() as interrupted:
            facts = _build(trt, flavour, bundle, target, options, partial / ENGINE, progress or _silent, interrupted)
        facts["key"] = final.name
        (partial / LAYERS).write_text(reports.layer_table(facts["network"].pop("table")), encoding="utf-8")
        (partial / REPORT).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return engines.read_engine(final), True


@contextlib.contextmanager
def _tidy(directory: Path) -> Iterator[None]:
    """Remove `directory` at the end if it is empty."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C, or SIGTERM, is noted in the list that this gives, and raised at the end: none may pass through the builder."""
    interrupted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield interrupted
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(one, lambda number, _: interrupted.append(number)) for one in signals]
    try:
        yield interrupted
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)
    if interrupted:
        raise KeyboardInterrupt


def _build(
    trt: Any, flavour: str, bundle: Bundle, target: str, options: BuildOptions, output: Path, progress: Progress,
    interrupted: list[int],
) -> dict[str, Any]:  # fmt: skip
    assert options.max_context is not None, "options are resolved"
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    name = engines.graph_file(options.lora, options.dialect)
    graph = targets.load_graph(bundle, name, options.max_context)
    if options.trees:
        take_trees(graph, bundle.manifest, options)
    if options.activations == "bf16":
        to_bfloat16(graph)
    if options.kv_cache == "fp8":
        plugins.take_bytes(graph, bundle.manifest)
    log: list[tuple[str, str]] = []
    logger = _logger(trt, log)
    maker = trt.Builder(logger)
    network = maker.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        path = bundle.file(name)
        if options.dialect == "plugin":
            plugins.load_plugins(trt)
            path = stack.enter_context(plugins.packed_weights(bundle, graph, output.parent)) / name
        _parse(trt, network, logger, graph, path, log)
    parsed = time.monotonic()
    warnings = [text for level, text in log if level == "WARNING"]
    table = check_network(network, graph, bundle.manifest, options, warnings)
    inputs = {t.name: tuple(t.shape) for t in (network.get_input(i) for i in range(network.num_inputs))}
    model, names = bundle.manifest.model, bundle.manifest.graph
    contract = engines.engine_contract(bundle.manifest, options)
    profiles = profile_ranges(inputs, contract, options, lora_ranks(model, names) if options.lora else {})
    config = maker.create_builder_config()
    add_profiles(maker, config, profiles)
    config.clear_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.memory_limit:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.memory_limit << 20)
    if options.dialect == "plugin":  # a cache that is read and written is one tensor
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if flavour == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    # TensorRT measures kernels on the GPU and remembers; TensorRT-RTX does neither.
    cache = timing.load(config, output.parent.parent, trt.__version__, target) if flavour == "tensorrt" else None
    monitor = _monitor(trt, progress, interrupted)
    config.progress_monitor = monitor
    serialized = maker.build_serialized_network(network, config)
    if interrupted:
        raise KeyboardInterrupt
    if serialized is None:
        raise ToolchainError(_explain("the builder failed", [text for level, text in log if "ERROR" in level], graph))
    output.write_bytes(serialized)
    entry = hash_file(output)
    kernels = kernel_counts(serialized)
    if options.dialect != "plugin":
        check_kernels(kernels, model.num_layers * len(profiles))
    if cache is not None:
        timing.save(cache, output.parent.parent, trt.__version__, target)
    activation = [int(n) for _, text in log for n in re.findall(r"Total Activation Memory: (\d+)", text)]
    return {
        "builder": {"name": flavour, "version": trt.__version__, "edgellm_ros": edgellm_ros.__version__},
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "target": target,
        "options": dataclasses.asdict(options),
        "profiles": profiles,
        "seconds": {"parse": round(parsed - started, 3), "build": round(time.monotonic() - parsed, 3)},
        "peak_memory_bytes": _peak_memory(),
        "activation_memory_bytes": activation,  # of the engine on the GPU, for each profile
        "engine": {"size": entry.size, "sha256": entry.sha256},
        "sources": engines.source_hashes(bundle, options.lora, options.dialect),
        "network": table,
        "kernels": kernels,  # of TensorRT-RTX's engines, which hold their source; defined once a layer and profile
        "warnings": warnings,
        "executed": False,  # building proves shapes and layers, not numbers
    }


def _parse(trt: Any, network: Any, logger: Any, graph: Any, path: Path, log: list[tuple[str, str]]) -> None:
    parser = trt.OnnxParser(network, logger)
    for node in graph.graph.node:
        if node.domain != DOMAIN and not parser.supports_operator(node.op_type):
            raise ToolchainError(f"the builder {trt.__version__} has no operator {node.op_type} ({_place(node.name)}); "
                                 "use a newer TensorRT, or export for this one")  # fmt: skip
    if not parser.parse(graph.SerializeToString(), str(path)):
        errors = []
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            errors.append(f"{_place(error.node_name())}, operator {error.node_operator()}: {error.desc()}")
        raise ToolchainError(_explain(f"{path.name} cannot be parsed", errors or [text for _, text in log], graph))


def _explain(what: str, errors: list[str], graph: Any) -> str:
    text = "\n  ".join(errors[:5]) or "it gave no reason"
    names = [node.name for node in graph.graph.node if node.name and node.name in text]
    places = [_place(max(names, key=len))] if names else []
    remedy = next((r for pattern, r in _REMEDIES if re.search(pattern, text, re.IGNORECASE)),
                  "export the model again with this version, or use another version of the builder")  # fmt: skip
    return f"{what}{' at ' + places[0] if places else ''}:\n  {text}\n  {remedy}"


def _place(node: str) -> str:
    found = re.match(r"layers\.(\d+)\.([^/]+)", node)
    return f"node {node}" + (f" (layer {found[1]}, {found[2]})" if found else "")


def _peak_memory() -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        if found:
            return int(found[1]) * 1024
    return 0


def _logger(trt: Any, log: list[tuple[str, str]]) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = str(severity).rpartition(".")[2]
            if level != "VERBOSE":
                log.append((level, message))

    return Logger()


def _monitor(trt: Any, progress: Progress, interrupted: list[int]) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps

        def phase_finish(self, phase: str) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                progress(phase, step + 1, self.steps.get(phase, 0))
            except KeyboardInterrupt:
                interrupted.append(signal.SIGINT)
            return not interrupted  # false makes the builder stop

    return Monitor()


def _silent(phase: str, done: int, total: int) -> None:
    """No progress wanted."""
