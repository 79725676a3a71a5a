"""What an engine is as a decoder: the native settings, from its report, the manifest and the engine's configuration."""

from __future__ import annotations

from typing import Any

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.errors import UnsupportedError
from edgellm_ros.executors.contract import lora_ranks
from edgellm_ros.executors.cuda_formats import native_format
from edgellm_ros.executors.engines import CACHE_DTYPES, Engine, activation_dtype, cache_format, engine_contract

_MOST_NODES = 64  # of a tree: bits of a mask


def batched_slots(options: BuildOptions, config: EngineConfig) -> int:
    """Slots that decode in one enqueue: 1 in exact mode, for an engine may round a batch in another way."""
    return min(options.max_batch, config.max_slots) if config.decode_batching == "fast" else 1


def usable_context(options: BuildOptions, config: EngineConfig) -> int:
    """Tokens that a slot may hold: where slots decode together, idle ones between them write into the last place."""
    return (options.max_context or 0) - (1 if batched_slots(options, config) > 1 else 0)


def engine_settings(module: Any, engine: Engine, bundle: Bundle, config: EngineConfig) -> Any:
    """The native TrtDecoderConfig; raises UnsupportedError for what the decode loop cannot have. Needs no GPU."""
    model, graph, options = bundle.manifest.model, bundle.manifest.graph, engine.options
    dtype = activation_dtype(options, graph)
    if CACHE_DTYPES[dtype] not in ("fp16", "bf16"):
        raise UnsupportedError(f"the engine computes in {dtype}; the decode loop takes fp16 and bf16: export again")
    loop = module.DecoderConfig()
    for name in (
        "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
        "head_rows", "embed_scale",
    ):  # fmt: skip
        setattr(loop, name, getattr(model, name))
    loop.kv_format = module.KvFormat.__members__[cache_format(options, graph)]
    loop.embedding_format, loop.group_size = _embedding_format(module, bundle)
    loop.num_slots = config.max_slots
    loop.capacity = min(config.max_context or usable_context(options, config), usable_context(options, config))
    loop.max_verify_tokens = min(options.max_verify, _MOST_NODES) if options.trees else 0
    loop.max_adapters, loop.max_lora_rank = config.max_loras, config.max_lora_rank
    profiles = engine.profiles
    loop.max_tokens = profiles[-1][graph.embeds][2][1]
    settings = module.TrtDecoderConfig()
    settings.loop = loop
    settings.is_bf16 = dtype == "bfloat16"
    settings.engine_capacity = options.max_context
    settings.max_batch = batched_slots(options, config)
    settings.decode_tokens = profiles[0][graph.embeds][2][1]
    settings.max_logits = min(profile[graph.logit_indices][2][0] for profile in profiles)
    ranks = lora_ranks(model, graph) if options.lora else {}
    contract = engine_contract(bundle.manifest, options)
    settings.set_tensors(
        [
            (
                t.name, t.role, t.layer, list(t.sizes),
                _max_rank(ranks.get(t.name, 0), graph.max_lora_rank, config), t.window,
            )
            for t in contract
        ]
    )
    try:
        settings.check()
    except ValueError as error:
        raise UnsupportedError(f"engines/{engine.key}: {error}") from error
    return settings


def _max_rank(largest: int, per_projection: int, config: EngineConfig) -> int:
    """Of an adapter's tensor, as far as the settings let adapters go."""
    if not (largest and per_projection and config.max_loras):
        return 0
    return largest // per_projection * min(config.max_lora_rank, per_projection)


def _embedding_format(module: Any, bundle: Bundle) -> tuple[Any, int]:
    model, quant = bundle.manifest.model, bundle.manifest.quantization
    found = native_format("embed", quant.format_of("embed"), model)
    formats = module.WeightFormat.__members__
    if found.format == "int8":
        return formats["int8"], found.group
    if found.format == "bf16":  # floats, which fp16 holds with three more bits
        return formats["fp16"], 0
    raise UnsupportedError(f"the embedding is stored as {found.format}; engines take it in int8 groups or floats")
