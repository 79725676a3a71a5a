"""The CUDA executor: the project's own kernels over the bundle's weight file, for NVIDIA GPUs without TensorRT.

Single tokens decode together as one CUDA graph; longer steps go through matrix products, sequence by sequence. The
two round differently, so `decode_batching="exact"` keeps every step of two or more tokens on the second path, and
where several sequences may decode together it leaves out the kernels that only one can use. "fast" takes what is
fastest: those kernels for a sequence alone, the first path for short steps, and for a prompt's products whatever was
fastest at load, where "exact" takes only what computes the same bits for any number of tokens.

A step of 2 to 16 tokens that asks for the logits of all of them verifies a draft and is one graph too, in both modes;
"exact" with several slots gives it the bits of single steps. Draft trees have calls of their own: `verify_tree`, then
`accept_path`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import ConfigError, RequestError, UnsupportedError
from edgellm_ros.executors.adapter_table import AdapterTable
from edgellm_ros.executors.base import ExecutorInfo, LoadedAdapter
from edgellm_ros.executors.cuda_formats import native_formats, widenings
from edgellm_ros.executors.cuda_heads import (
    layer_rope_stems,
    no_rope_tables,
    order_adapter,
    order_stacked,
    order_vector,
    whole_table,
)
from edgellm_ros.executors.cuda_inputs import LayerInputs
from edgellm_ros.executors.cuda_run import CudaRun
from edgellm_ros.executors.cuda_tiles import apply_tiles
from edgellm_ros.executors.cuda_weights import native_weight
from edgellm_ros.executors.lora import LoraAdapter, read_adapter
from edgellm_ros.executors.lora_layout import PackedLora, fit, unpack
from edgellm_ros.executors.native_executor import NativeExecutor
from edgellm_ros.memory import free_device_memory

_log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 4096  # when neither the user nor the model says less: bounds the KV cache
_ROUNDING = 3e-2  # relative error of logits that bf16 activations add: 1.0 to 2.2e-2 was measured
_FP8_ROUNDING = 8e-2  # where the KV cache has, or prompts round activations to E4M3, which keeps three bits
# Norms read the residual in fp32 where weights are bf16; tests that compare bits with an engine's 16 turn it off.
_WIDE_NORM_INPUTS = True
_MAX_PACKED_TOKENS = -1  # DecoderConfig's, by the GPU; tests set others
_COPIED_BYTES = 0  # the same
_MAX_VERIFY_TOKENS = 16  # nodes of a draft; tests and bench/bench_verify.py set others
# 16 tokens is the most that one decode kernel takes. Where no weight need be copied, 9 are enough.
_FEWEST_PRODUCT_TOKENS = {"exact": 2, "fast": 17}


def unsupported_reason(bundle: Bundle) -> str:
    """What of `bundle` the kernels cannot run; empty when they can. Needs the native module, but no GPU."""
    try:
        _settings(bundle, EngineConfig(max_context=min(bundle.manifest.model.max_context, 64)))
    except UnsupportedError as error:
        return str(error)
    return ""


def plan_memory(bundle: Bundle, config: EngineConfig, l2_bytes: int | None = None) -> dict[str, int]:
    """Bytes of device memory by purpose, and their "total", that `bundle` would take on a GPU that is not here.

    Takes none and needs no GPU; `plan_here` plans for the one that is. l2_bytes: of the GPU's L2 cache, whose memory is
    not HBM (no Jetson has that); None: its memory is HBM. cuBLASLt is taken to be there.

    Raises UnsupportedError without the native module or for a model that the kernels cannot run, ConfigError for
    settings that the bundle cannot have.
    """
    settings = _settings(bundle, config)
    module, _ = native.import_module()
    if l2_bytes is not None:
        settings = module.decide(settings, l2_bytes, bus_bits=0)
    plan: dict[str, int] = module.plan_memory(settings)
    return plan


def plan_here(bundle: Bundle, config: EngineConfig, module: Any, info: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """The native DecoderConfig, with what it leaves to the GPU, and its plan, as `plan_memory`'s; takes no memory.

    For the executor and for `edgellm doctor`, which promises what the executor will take. module: native.load();
    info: its device_info(). Raises as `plan_memory` does.
    """
    settings = module.decide(
        _settings(bundle, config), info["l2_bytes"], info["bus_bits"], not native.products_reason(module)
    )
    return settings, module.plan_memory(settings)


class CudaExecutor(NativeExecutor):
    """Runs a bundle's decoder on the current NVIDIA GPU."""

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        """Plan the memory, take it, upload the weights and capture the graphs.

        Raises UnsupportedError without a GPU or for a model that the kernels cannot run, ConfigError when the settings
        ask for more context than the bundle has or more memory than is free, DeviceError when the device fails.
        """
        module = native.load()
        vocab_map = bundle.vocab_map()
        info: dict[str, Any] = module.device_info()
        settings, plan = plan_here(bundle, config, module, info)
        if config.max_slots > module.MAX_BATCH:
            _log.warning(
                "max_slots is %d: %d sequences decode in one step, more take turns, and the host waits for each turn",
                config.max_slots,
                module.MAX_BATCH,
            )
        planned = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in plan.items())
        free = free_device_memory(info)
        _log.info("GPU memory planned: %s; %.0f MB are free", planned, free / 1e6)
        for line in widenings(bundle.manifest.model, bundle.manifest.quantization):
            _log.info("weights without kernels are widened: %s", line)
        _check_memory(plan, free, settings)
        self._decoder: Any = module.Decoder(settings)
        missing = native.products_reason(module)
        if missing and module.decide(_settings(bundle, config), info["l2_bytes"], info["bus_bits"]).needs_cublaslt:
            how = "slowly" if settings.needs_cublaslt else "more slowly where they are long"
            remedy = native.products_remedy(module, missing)
            _log.warning("prompts are read %s: no cuBLASLt (%s); %s", how, missing, remedy)
        _upload(self._decoder, bundle)
        apply_tiles(self._decoder, bundle, info, settings.batch_invariant)
        self._decoder.finish_load()
        self.device_info = info
        self.batch_invariant: bool = settings.batch_invariant
        self._max_loras = settings.max_adapters
        self._model = bundle.manifest.model
        self._inputs = LayerInputs(self._model, bundle.manifest.quantization, bundle.weights())
        self._max_lora_rank = config.max_lora_rank
        self._adapters = AdapterTable(config.max_loras)
        self.memory_plan = plan
        major, minor = info["compute_capability"]
        self.run = CudaRun(self._open, settings.vocab_size, vocab_map)
        self.info = ExecutorInfo(
            name="cuda",
            device=f"{info['name']}, compute capability {major}.{minor}",
            precision=f"{bundle.manifest.quantization.weights} weights, {settings.kv_format.name} KV cache",
            num_slots=settings.num_slots,
            capacity=settings.capacity,
            vocab_size=settings.vocab_size,
            vocab_map=vocab_map,
            kv_bytes_per_token=settings.kv_bytes_per_token,
            memory_bytes=plan["total"],
            rounding=_FP8_ROUNDING if _rounds_to_fp8(self._decoder, settings) else _ROUNDING,
        )

    def load_adapter(self, name: str, source: str | Path | LoraAdapter | PackedLora) -> LoadedAdapter:
        """See Executor.load_adapter; waits for the device."""
        index = self._adapters.free_place(name)
        if isinstance(source, PackedLora):
            adapter = unpack(source, self._model)
        else:
            found = source if isinstance(source, LoraAdapter) else read_adapter(source)
            adapter = fit(found, self._model, self._max_lora_rank, "; load the model with a larger max_lora_rank")
        adapter = order_adapter(self._model, self._inputs.adapter(adapter))
        try:
            self._open().load_adapter(index, [(t.layer, t.target, t.a, t.b, t.scale) for t in adapter.tensors])
        except ValueError as error:
            raise RequestError(f"adapter {name!r}: {error}") from error
        return self._adapters.add(name, index, adapter.fingerprint)


def _settings(bundle: Bundle, config: EngineConfig) -> Any:
    """The native DecoderConfig; raises ConfigError and UnsupportedError."""
    module, reason = native.import_module()
    if module is None:
        raise UnsupportedError(reason)
    model, quant = bundle.manifest.model, bundle.manifest.quantization
    capacity = config.max_context or min(model.max_context, DEFAULT_CONTEXT)
    if capacity > model.max_context:
        raise ConfigError(
            f"max_context {capacity} exceeds the bundle's {model.max_context}; "
            f"export again with --max-context {capacity}, if the model allows it"
        )
    kv_formats = module.KvFormat.__members__
    kv_format = config.kv_cache
    if kv_format == "auto":  # fp16 has three bits more and costs the same
        kv_format = "bf16" if model.wide_activations else "fp16"
    if kv_format not in kv_formats:
        raise ConfigError(
            f"kv_cache is {kv_format!r}, which the cuda executor does not have; use auto, {', '.join(kv_formats)}, or "
            "the executor onnxruntime"
        )
    formats = module.WeightFormat.__members__
    settings = module.DecoderConfig()
    for name in (
        "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
        "head_rows", "rms_norm_eps", "embed_scale", "attention_scale", "logit_softcap", "qk_norm", "output_norms",
    ):  # fmt: skip
        setattr(settings, name, getattr(model, name))
    settings.activation = module.Activation.__members__[model.activation]
    settings.num_positions = model.max_context
    settings.tied_head = quant.head_tensor(model) == "embed"
    settings.sliding_windows = list(model.sliding_windows)
    settings.layer_ropes = layer_rope_stems(model)
    settings.kv_format = kv_formats[kv_format]
    found = native_formats(model, quant)
    found.setdefault("head", found["embed"])
    settings.formats = {stem: (formats[form.format], form.group) for stem, form in found.items()}
    settings.ordered = {stem for stem, form in found.items() if form.order}
    settings.factored = {stem for stem, form in found.items() if form.factor}
    prefix = "layers.0."
    settings.biases = [
        name[len(prefix) : -len(".bias")]
        for name in bundle.weights().names()
        if name.startswith(prefix) and name.endswith(".bias")
    ]
    settings.num_slots = config.max_slots
    settings.capacity = capacity
    settings.max_adapters = config.max_loras
    settings.max_lora_rank = config.max_lora_rank
    settings.max_tokens = max(config.prefill_chunk, config.prefill_chunk_busy)
    settings.batch_invariant = config.decode_batching == "exact" and config.max_slots > 1
    settings.row_invariant = config.decode_batching == "exact"
    settings.fp8_prefill = config.fp8_prefill
    settings.wide_norm_inputs = _WIDE_NORM_INPUTS
    settings.max_packed_tokens = _MAX_PACKED_TOKENS
    settings.copied_bytes = _COPIED_BYTES
    settings.max_verify_tokens = _MAX_VERIFY_TOKENS
    settings.min_gemm_tokens = _FEWEST_PRODUCT_TOKENS[config.decode_batching]
    try:
        settings.check()
    except ValueError as error:
        raise UnsupportedError(f"{model.name}: {error}") from error
    return settings


def _rounds_to_fp8(decoder: Any, settings: Any) -> bool:
    return bool(decoder.has_fp8_products) or settings.kv_format.name == "fp8"


def _check_memory(plan: dict[str, int], free: int, settings: Any) -> None:
    if plan["total"] <= free:
        return
    if plan["weights"] > free:  # no setting changes that
        raise ConfigError(
            f"the weights alone take {plan['weights'] / 1e6:.0f} MB of GPU memory but {free / 1e6:.0f} MB are free; "
            "end what else holds memory, or export the model in fewer bits (--weights int4), or take a smaller one"
        )
    adapters, remedy = "", "max_slots, max_context or prefill_chunk"
    if "adapters" in plan:
        adapters = f", {plan['adapters'] / 1e6:.0f} MB for {settings.max_adapters} adapters"
        remedy = f"{remedy}, max_loras or max_lora_rank"
    if settings.kv_format.name != "fp8":
        remedy = f"{remedy}, or set kv_cache to fp8"
    raise ConfigError(
        f"the plan needs {plan['total'] / 1e6:.0f} MB of GPU memory ({plan['weights'] / 1e6:.0f} MB weights, max_slots "
        f"{settings.num_slots} x max_context {settings.capacity} x {settings.kv_bytes_per_token} bytes of KV cache, "
        f"{plan['workspace'] / 1e6:.0f} MB workspace for prefill_chunk {settings.max_tokens}{adapters}) but "
        f"{free / 1e6:.0f} MB are free; lower {remedy}"
    )


def _upload(decoder: Any, bundle: Bundle) -> None:
    weights, model, quant = bundle.weights(), bundle.manifest.model, bundle.manifest.quantization
    inputs = LayerInputs(model, quant, weights)
    ropes = set(layer_rope_stems(model) or ["rope"])
    for name in weights.names():
        stem, _, what = name.rpartition(".")
        if what in ("scale", "offset", "global_scale", "input_scale", "input_factor", "input_order"):
            continue  # go with their weight or its neighbours, or are the portable graph's
        if stem.startswith("rope"):
            if stem in ropes:
                decoder.load_vector(name, whole_table(model, weights[name], float(what == "cos")))
        elif stem.endswith(("attn.q_norm", "attn.k_norm", "attn.qkv")) and weights[name].ndim == 1:
            values, _ = inputs.rows(stem, weights[name]) if what == "bias" else (weights[name], None)
            decoder.load_vector(name, order_vector(model, values, stem))
        elif weights[name].ndim == 1:
            values = inputs.rows(stem, weights[name])[0] if what == "bias" else inputs.gain(name, weights[name])
            decoder.load_vector(name, values)
        else:
            values, scale = inputs.rows(stem, *native_weight(weights, stem, quant.format_of(stem), model))
            if stem.endswith("attn.qkv"):
                values = order_stacked(model, values)
                scale = None if scale is None else order_stacked(model, scale)
            decoder.load_linear(stem, values, scale)
    for stem, order, factor, gain in inputs.mapped():
        if order is not None:
            decoder.load_order(stem, order)
        if factor is not None:
            decoder.load_vector(f"{stem}.input_factor", factor)
        if gain is not None:
            decoder.load_vector(f"{stem}.ordered_gain", gain)
    if (vocab_map := bundle.vocab_map()) is not None:
        decoder.load_vocab_map(vocab_map.token_ids)
    for name, values in no_rope_tables(model).items():
        decoder.load_vector(name, values)
