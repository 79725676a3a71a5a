"""Whether a model fits a robot's computer, and how fast its memory lets it decode; arithmetic only.

Decoding reads every weight once a token, so the memory's bandwidth bounds its speed. What a plan adds to that bound are
assumptions; each is a constant here and is printed with the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_ros.benchmark.costs import decode_bytes, kv_bytes
from edgellm_ros.benchmark.devices import Device
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors.cuda_formats import native_formats
from edgellm_ros.manifest import ModelSpec, QuantSpec

SYSTEM_GB = 1.5  # Linux without a desktop, ROS 2 and the node's own process
CONTEXT_GB = 0.4  # what the CUDA driver takes for a process
# A module's memory is not all Linux's (an 8 GB one shows less than 8 GiB), and a desktop takes about as much.
TIGHT_GB = 1.0
# Share of the stated bandwidth that decoding reaches. On an H100 a kernel that only reads reaches 94 % of what is
# stated, and decoding 78 to 95 % of that at 8B; a Jetson was never measured.
REACHED = 0.75
# Microseconds that a stage costs beside its bytes: measured as 1.0 to 1.5 on an H100, with dependent launch.
STAGE_US, STAGE_US_PLAIN = 1.5, 3.0
STAGES_PER_LAYER, STAGES_PER_STEP = 5, 3

_MIB = 1 << 20
_COPIED_BYTES_OF_HBM, _UNCACHED_BYTES = 256 * _MIB, 64 * _MIB  # as decoder_config.cpp has them
_STAGING_BYTES = 32 * _MIB
_SMALL_L2_BYTES = 16 * _MIB
_CUBLAS_BYTES = 32 * _MIB
_BATCH, _LOGIT_ROWS = 8, 16
_CODE_BYTES, _GRAPH_KERNEL_BYTES = 32 * _MIB, 4096
_CONTEXT_CLASSES = (1024, 8192)  # attention_decode.hpp: and more
_DECODE_TAILS, _DRAFT_GRAPHS = 4, 8  # drafts of 2, 4, 8 and 16 nodes, chains and trees
_RANK_STEP = 8  # lora.hpp: kLoraAlign


@dataclass(frozen=True)
class Budget:
    """Bytes by purpose, what the device has, and the speed at some contexts."""

    device: Device
    parts: dict[str, int]  # purpose -> bytes; all of the executor
    exact: bool  # from the native module's own plan, not from the formula
    tokens_per_s: dict[int, float]  # context -> one sequence's
    bound_tokens_per_s: dict[int, float]  # the same at the stated bandwidth, with nothing else

    @property
    def total(self) -> int:
        """Bytes of the executor, the CUDA context and the system."""
        return sum(self.parts.values()) + int((SYSTEM_GB + CONTEXT_GB) * 1e9)

    @property
    def fits(self) -> bool:
        """Whether the device has that."""
        return self.total <= self.device.memory_gb * 1e9

    @property
    def tight(self) -> bool:
        """Whether it fits with so little to spare that it may not."""
        return self.fits and self.device.memory_gb * 1e9 - self.total < TIGHT_GB * 1e9


def kv_bytes_per_token(model: ModelSpec, kv_cache: str) -> int:
    """Bytes that one token's keys and values take in all layers."""
    element = 1 if kv_cache == "fp8" else 2
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * element


def estimate_parts(
    model: ModelSpec, quant: QuantSpec, config: EngineConfig, l2_bytes: int | None = None
) -> dict[str, int]:
    """The cuda executor's memory by purpose, as native/src/decoder_config.cpp plans it but for small tensors.

    l2_bytes: of the GPU's L2 cache, whose memory is not HBM; None: its memory is HBM.
    """
    tokens = max(config.prefill_chunk, config.prefill_chunk_busy)
    hidden, width, rows = model.hidden_size, model.intermediate_size, model.num_rows
    q_width = model.num_heads * model.head_dim
    qkv = q_width + 2 * model.num_kv_heads * model.head_dim
    formats = native_formats(model, quant)
    weights = decode_bytes(model, quant)  # the layers and the head
    if quant.head_tensor(model) != "embed":
        embed = formats["embed"]
        weights += int(hidden * model.vocab_size * (1 + 2 / embed.group if embed.format == "int8" else 2))
    weights += len(model.rope_tables()) * model.max_context * model.head_dim * 4
    largest = 2 * hidden * 2 * width  # of a layer's matrices, in bf16: gate_up
    workspace = tokens * (hidden * 10 + qkv * 2 + q_width * 4 + width * 6)
    layers = [form for stem, form in formats.items() if stem.startswith("layers.")]
    in_layers = {form.format for form in layers}
    copied, size = in_layers - {"bf16"}, _COPIED_BYTES_OF_HBM
    if l2_bytes is not None:
        size = l2_bytes
        if l2_bytes < _SMALL_L2_BYTES:  # int4 is multiplied as it is stored
            copied, size = copied - {"int4"}, _UNCACHED_BYTES
    often = copied - ({"fp8"} if config.fp8_prefill else set())  # not only with an adapter
    if not often:
        size = min(size, _UNCACHED_BYTES)
    if in_layers - {"int4"} or copied:
        workspace += _CUBLAS_BYTES
    scratch = _STAGING_BYTES  # of weights on their way to the GPU, int4 as a whole
    for form in layers:
        if form.format == "int4":
            scratch = max(scratch, int(largest / 2 * (0.5 + 2 / form.group)))
    shapes = ((qkv, hidden), (hidden, q_width), (2 * width, hidden), (hidden, width)) if copied else ()
    parts_of = [(_part_rows(out, cols, size) * cols * 2, out * cols * 2) for out, cols in shapes]
    workspace += max([scratch, *(part for part, _ in parts_of)])
    cut = [part for part, whole in parts_of if part < whole]
    if cut and often:  # parts take turns on two streams
        workspace += max(cut) + _CUBLAS_BYTES
    if "fp8" in in_layers and config.fp8_prefill:
        workspace += tokens * max(hidden, q_width, width)
    parts = {
        "weights": weights,
        "kv_cache": config.max_slots * capacity_of(model, config) * kv_bytes_per_token(model, config.kv_cache),
        "workspace": workspace,
        "logits": rows * 4 * (_LOGIT_ROWS + 2 * _BATCH) + rows * _BATCH * 4,
        "graphs": _driver_bytes(model, config),
    }
    if config.max_loras:
        parts["adapters"] = config.max_loras * adapter_bytes(model, config.max_lora_rank)
    return parts


def _driver_bytes(model: ModelSpec, config: EngineConfig) -> int:
    """What the driver takes for kernels' code and for captured graphs, as native/src/driver_memory.cpp counts it.

    But for layers whose inputs have an order or factors of their own, whose graphs have four kernels more.
    """
    classes = 1 + sum(capacity_of(model, config) > longest for longest in _CONTEXT_CLASSES)
    decode = min(config.max_slots, _BATCH) * _DECODE_TAILS * classes
    in_layer, others = 5 + 2 * model.output_norms, 8

    def kernels(num_graphs: int, more: int = 0) -> int:
        return num_graphs * ((in_layer + more) * model.num_layers + others)

    count = kernels(decode) + kernels(_DRAFT_GRAPHS, 4)
    if config.max_loras:
        count += kernels(decode + _DRAFT_GRAPHS, 4)
    return _CODE_BYTES + count * _GRAPH_KERNEL_BYTES


def _part_rows(rows: int, cols: int, size: int) -> int:
    """Rows of a weight's copy that are made at once: all, or parts of about the same size, in multiples of 128."""
    if rows * cols * 2 <= size:
        return rows
    most = max(1, size // 2 // (cols * 2 * 128)) * 128
    even = -(-rows // -(-rows // most))
    return min(-(-even // 128) * 128, rows)


def adapter_bytes(model: ModelSpec, max_rank: int) -> int:
    """Bytes of the place for one adapter, whatever it changes: A and B of every linear layer in bf16."""
    hidden, width = model.hidden_size, model.intermediate_size
    q_width = model.num_heads * model.head_dim
    qkv = q_width + 2 * model.num_kv_heads * model.head_dim
    # rows of A for each that a layer stacks, and B once: q, k and v; o; gate and up; down
    columns = (3 * hidden + qkv) + (q_width + hidden) + (2 * hidden + 2 * width) + (width + hidden)
    return 2 * model.num_layers * columns * (-(-max_rank // _RANK_STEP) * _RANK_STEP)


def capacity_of(model: ModelSpec, config: EngineConfig) -> int:
    """Tokens that a slot holds."""
    return config.max_context or min(model.max_context, 4096)


def predict_ms(model: ModelSpec, quant: QuantSpec, device: Device, context: int, kv_cache: str) -> float:
    """Milliseconds of one sequence's decode step with `context` tokens in its cache."""
    read = decode_bytes(model, quant) + kv_bytes(model, kv_bytes_per_token(model, kv_cache), context)
    stages = (STAGES_PER_LAYER + 2 * model.output_norms) * model.num_layers + STAGES_PER_STEP
    stage_us = STAGE_US if device.has_dependent_launch else STAGE_US_PLAIN
    return read / (REACHED * device.bandwidth_gb_per_s) * 1e-6 + stages * stage_us * 1e-3


def make_budget(
    model: ModelSpec, quant: QuantSpec, config: EngineConfig, device: Device, exact: dict[str, int] | None = None
) -> Budget:
    """The budget on `device`; `exact` is the native module's plan without its "total", where that is installed."""
    capacity = capacity_of(model, config)
    contexts = sorted({min(512, capacity), capacity})
    per_token = kv_bytes_per_token(model, config.kv_cache)
    bound = {c: (decode_bytes(model, quant) + kv_bytes(model, per_token, c)) for c in contexts}
    return Budget(
        device,
        exact or estimate_parts(model, quant, config, device.l2_bytes),
        exact is not None,
        {c: 1e3 / predict_ms(model, quant, device, c, config.kv_cache) for c in contexts},
        {c: device.bandwidth_gb_per_s * 1e9 / read for c, read in bound.items()},
    )


def remedies(model: ModelSpec, quant: QuantSpec, config: EngineConfig, budget: Budget) -> list[str]:
    """What would make the model fit, each alone enough; empty when nothing of these does or it fits already."""
    if budget.fits:
        return []
    room = budget.device.memory_gb * 1e9 - (budget.total - budget.parts["kv_cache"])
    found = []
    per_token = config.max_slots * kv_bytes_per_token(model, config.kv_cache)
    tokens = int(room // per_token) // 64 * 64 if room > 0 else 0
    if tokens >= 512:
        found.append(f"--max-context {tokens}")
    one_slot = capacity_of(model, config) * kv_bytes_per_token(model, config.kv_cache)
    slots = int(room // one_slot) if room > 0 else 0
    if 1 <= slots < config.max_slots:
        found.append(f"--max-slots {slots}")
    if config.kv_cache != "fp8" and budget.total - budget.parts["kv_cache"] // 2 <= budget.device.memory_gb * 1e9:
        found.append("--kv-cache fp8")
    return found
