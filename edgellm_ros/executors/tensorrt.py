"""The TensorRT executor: a prebuilt engine of the bundle computes the logits, and the native module everything else.

The engine is chosen and compared with report and manifest by engine_preflight.py. With `decode_batching="exact"` every
sequence is an enqueue of its own, several in one CUDA graph, because an engine may round a batch in another way than a
row alone; "fast" lets a contiguous range of slots decode together, in which the idle ones write into their last place.
An engine of `edgellm build --trees` has calls for trees of drafts: `verify_tree`, then `accept_path`.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros import native, trt_plugins
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import ConfigError, RequestError, UnsupportedError
from edgellm_ros.executors.adapter_table import AdapterTable
from edgellm_ros.executors.base import ExecutorInfo, LoadedAdapter
from edgellm_ros.executors.cuda_run import CudaRun
from edgellm_ros.executors.cuda_weights import native_weight
from edgellm_ros.executors.engine_preflight import Binding, check_bindings, choose_engine, probe_machine
from edgellm_ros.executors.engine_settings import engine_settings
from edgellm_ros.executors.engines import (
    CACHE_DTYPES,
    Engine,
    activation_dtype,
    build_command,
    cache_format,
    check_engine,
)
from edgellm_ros.executors.lora import LoraAdapter, read_adapter
from edgellm_ros.executors.lora_layout import FloatArray, PackedLora, fit, pack_matrices, unpack
from edgellm_ros.executors.native_executor import NativeExecutor
from edgellm_ros.memory import free_device_memory

_log = logging.getLogger(__name__)

_ROUNDING = 3e-2  # relative error of logits that 16-bit activations add: the cuda executor's; no engine was measured
_FP8_ROUNDING = 8e-2  # the cuda executor's too
_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING}


class TensorRTExecutor(NativeExecutor):
    """Runs a bundle's engine on the current NVIDIA GPU."""

    def __init__(self, bundle: Bundle, config: EngineConfig, engine: Engine | None = None) -> None:
        """Check and load `engine`, or the one that fits best; then plan the memory, take it and capture graphs.

        Raises UnsupportedError without TensorRT, a GPU or an engine that fits, and when TensorRT refuses it;
        BundleError when it is not what the manifest says; ConfigError when memory is short; DeviceError when the device
        fails.
        """
        machine = probe_machine()
        if engine is None:
            engine, reasons = choose_engine(bundle, config, machine)
            if engine is None:
                raise UnsupportedError("; ".join(reasons))
        if config.verify_files:
            check_engine(engine, bundle)
        module = native.load()
        settings = engine_settings(module, engine, bundle, config)
        _check_memory(_plan(module, settings, engine, engine.context_bytes), module.device_info(), config)
        self._engine = _load(module, engine, bundle)
        plan = _plan(module, settings, engine, self._engine.context_bytes)
        beside = {**plan, "engine": 0, "total": plan["total"] - engine.size}  # which is loaded by now
        _check_memory(beside, module.device_info(), config)
        self._decoder = module.TrtDecoder(self._engine, settings)
        _load_embedding(self._decoder, settings, bundle)
        vocab_map = bundle.vocab_map()
        if vocab_map is not None:
            self._decoder.load_vocab_map(vocab_map.token_ids)
        self._decoder.finish_load()
        self._log_messages()
        self._bundle, self._config = bundle, config
        self._max_loras = settings.loop.max_adapters
        self._adapters = AdapterTable(config.max_loras)
        self.memory_plan = plan
        self.engine_key = engine.key
        command = build_command(bundle, engine.options, trees=True)
        self._no_trees = (
            f"engines/{engine.key} takes chains of drafts, as steps, and no trees; build one that does with `{command}`"
        )
        self.run = CudaRun(self._open, settings.loop.vocab_size, vocab_map)
        version = ".".join(map(str, self._engine.version[:3]))
        dtype = CACHE_DTYPES[activation_dtype(engine.options, bundle.manifest.graph)]
        cache = cache_format(engine.options, bundle.manifest.graph)
        self._is_bf16 = dtype == "bf16"
        self.info = ExecutorInfo(
            name="tensorrt",
            device=f"{machine.gpu}, TensorRT {version}",
            precision=f"{bundle.manifest.quantization.weights} weights, {dtype} activations, {cache} KV cache",
            num_slots=settings.loop.num_slots,
            capacity=settings.loop.capacity,
            vocab_size=settings.loop.vocab_size,
            vocab_map=vocab_map,
            kv_bytes_per_token=settings.loop.kv_bytes_per_token,
            memory_bytes=self.memory_plan["total"],
            rounding=_FP8_ROUNDING if cache == "fp8" else _ROUNDING,
        )
        _log.info("engine %s; memory planned: %s", engine.key,
                  ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in self.memory_plan.items()))  # fmt: skip

    def load_adapter(self, name: str, source: str | Path | LoraAdapter | PackedLora) -> LoadedAdapter:
        """See Executor.load_adapter; waits for the device. The engine gets A and B in its own 16 bits."""
        if not self._max_loras:
            raise UnsupportedError(f"adapter {name!r}: the model was loaded with max_loras 0; load it with more")
        index = self._adapters.free_place(name)
        model, graph = self._bundle.manifest.model, self._bundle.manifest.graph
        remedy = "; load the model with a larger max_lora_rank"
        if isinstance(source, PackedLora):
            fit(unpack(source, model), model, self._config.max_lora_rank, remedy)
            matrices, fingerprint = source.matrices, source.fingerprint
        else:
            found = source if isinstance(source, LoraAdapter) else read_adapter(source)
            adapter = fit(found, model, self._config.max_lora_rank, remedy)
            matrices, _ = pack_matrices(adapter, model)
            fingerprint = adapter.fingerprint
        tensors = []
        for (layer, stem), pair in matrices.items():
            a, b = balance(*pair)
            if a.shape[1]:
                for pattern, values in ((graph.lora_a, a), (graph.lora_b, b)):
                    data = np.ascontiguousarray(half_bits(values, self._is_bf16)).view(np.uint8).reshape(-1)
                    tensors.append((pattern.format(layer=layer, stem=stem), a.shape[1], data))
        try:
            self._open().load_adapter(index, tensors)
        except ValueError as error:
            raise RequestError(f"adapter {name!r}: {error}") from error
        return self._adapters.add(name, index, fingerprint)

    def close(self) -> None:
        """See Executor.close; the decoder goes before its engine."""
        super().close()
        self._engine = None

    def _log_messages(self) -> None:
        for severity, text in self._engine.take_log():
            _log.log(_LEVELS.get(severity, logging.DEBUG), "TensorRT: %s", text)


def plan_memory(bundle: Bundle, engine: Engine, config: EngineConfig) -> dict[str, int]:
    """Bytes of device memory by purpose, and their "total", by the engine's report; needs no GPU."""
    module, reason = native.import_module()
    if module is None:
        raise UnsupportedError(reason)
    return _plan(module, engine_settings(module, engine, bundle, config), engine, engine.context_bytes)


def balance(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """A and B with a power of two moved between them, so that both keep their digits in fp16; A B stays the same.

    B alone, with alpha / rank in it, may fall into fp16's subnormal numbers.
    """
    largest = [float(np.abs(values).max(initial=0.0)) for values in (a, b)]
    if min(largest) == 0.0:
        return a, b
    shift = round(0.5 * math.log2(largest[0] / largest[1]))
    return np.ldexp(a, -shift), np.ldexp(b, shift)


def half_bits(values: FloatArray, is_bf16: bool) -> npt.NDArray[np.uint16]:
    """The bits of `values` in fp16 or bf16, rounded to the nearest."""
    if not is_bf16:
        return values.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _load(module: Any, engine: Engine, bundle: Bundle) -> Any:
    """The native TrtEngine, compared with report and manifest."""
    plugins = str(trt_plugins.find_library()) if engine.options.dialect == "plugin" else ""
    loaded = module.TrtEngine(str(engine.file), native.tensorrt_candidates(module), plugins)
    check_bindings(engine, bundle.manifest, [Binding(*binding) for binding in loaded.bindings], loaded.num_profiles)
    return loaded


def _plan(module: Any, settings: Any, engine: Engine, context_bytes: int) -> dict[str, int]:
    """Bytes of device memory by purpose, and their total."""
    plan: dict[str, int] = module.plan_trt_memory(settings, context_bytes)
    return {"engine": engine.size, **plan, "total": plan["total"] + engine.size}


def _check_memory(plan: dict[str, int], info: dict[str, Any], config: EngineConfig) -> None:
    """Raise ConfigError when what is planned is not free."""
    free = free_device_memory(info)
    if plan["total"] > free:
        parts = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in plan.items() if name != "total")
        raise ConfigError(
            f"the plan needs {plan['total'] / 1e6:.0f} MB of GPU memory ({parts}) but "
            f"{free / 1e6:.0f} MB are free; lower max_slots {config.max_slots} or max_loras, or build an engine with a "
            "smaller --max-context"
        )


def _load_embedding(decoder: Any, settings: Any, bundle: Bundle) -> None:
    model, quant = bundle.manifest.model, bundle.manifest.quantization
    values, scale = native_weight(bundle.weights(), "embed", quant.format_of("embed"), model)
    if settings.loop.embedding_format.name == "fp16":
        with np.errstate(over="ignore"):
            values = values.astype(np.float16)
        if not np.isfinite(values).all():
            raise UnsupportedError("the embedding has numbers beyond fp16's 65504; use the executor cuda")
    decoder.load_embedding(np.ascontiguousarray(values), None if scale is None else np.ascontiguousarray(scale))
