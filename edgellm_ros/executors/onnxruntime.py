"""The CPU executor: ONNX Runtime over `decoder.ort.onnx`, its KV cache bound as both past and present.

All buffers are made here once and bound by address; a step only writes into them. Single-token steps of neighbouring
slots run as one batch, longer ones alone: GroupQueryAttention continues a prompt for one sequence at a time.

MatMulNBits' int8 kernels compute rows in pairs when int4 groups have 64 or more weights, and round a row that is left
over differently (by 1e-6, which the next layer's int8 activations amplify). Such bundles therefore decode sequence by
sequence unless the configuration prefers speed, and the scheduler cuts prompts at multiples of 8. With groups of 32, or
int8 groups up to 64, every row count gives the same bits on a CPU with AVX-512, but not on one with AVX2 alone (ONNX
Runtime 1.32, AMD EPYC): what several slots get is compared when a bundle is loaded.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgellm_ros.bundle import DECODER_ORT, DECODER_ORT_LORA, WEIGHTS, Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import BundleError, ConfigError, DeviceError, UnsupportedError
from edgellm_ros.executors import ort_windows
from edgellm_ros.executors.base import Executor, ExecutorInfo, LoadedAdapter, SequenceStep
from edgellm_ros.executors.embedding import EmbeddingTable
from edgellm_ros.executors.huge_pages import anonymous_regions, collapse_new_regions
from edgellm_ros.executors.lora import LoraAdapter
from edgellm_ros.executors.lora_layout import PackedLora
from edgellm_ros.executors.onnxruntime_lora import OrtAdapters, planned_bytes
from edgellm_ros.manifest import MANIFEST, GraphSpec, LinearFormat, ModelSpec, QuantSpec
from edgellm_ros.memory import available_memory, physical_cores

_log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 4096  # when neither the user nor the model says less: bounds the KV cache
_SETTLE_S = 0.5  # huge pages come after loading is done: collapsing competes with it for memory bandwidth
_TRIED_ROWS, _TRIED_TOKENS = 3, 4  # at load: what single tokens get alone and side by side
_WORKSPACE = 64 << 20  # bytes: activations of a prefill chunk and ONNX Runtime's own, a generous guess


class OnnxRuntimeExecutor(Executor):
    """Runs a bundle's decoder on the CPU."""

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        """Load the decoder and reserve everything.

        Raises ConfigError when the settings ask for more context than the bundle has, more memory than there is or
        another KV cache than fp32, UnsupportedError for adapters where the bundle has no decoder that takes them, and
        BundleError when ONNX Runtime refuses the graph or it is not the manifest's.
        """
        if config.kv_cache not in ("auto", "fp32"):
            raise ConfigError(
                f"kv_cache is {config.kv_cache!r}, but the onnxruntime executor's KV cache is fp32; use auto or fp32, "
                "or the executor cuda on an NVIDIA GPU"
            )
        model, self._graph = bundle.manifest.model, bundle.manifest.graph
        capacity = config.max_context or min(model.max_context, DEFAULT_CONTEXT)
        if capacity > model.max_context:
            raise ConfigError(
                f"max_context {capacity} exceeds the bundle's {model.max_context}; "
                f"export again with --max-context {capacity}, if the model allows it"
            )
        if config.max_loras and not bundle.has(DECODER_ORT_LORA):
            asked, without = f"max_loras is {config.max_loras}", "set max_loras to 0"
            if config.loras:
                asked, without = f"adapters are asked for ({', '.join(config.loras)})", "load it without them"
            raise UnsupportedError(
                f"{asked}, but {bundle.path} has no decoder that takes adapters; export it again with "
                f"--max-lora-rank 16 (or up to 64), or {without}"
            )
        self._model = model
        self._layers = model.num_layers
        vocab_map = bundle.vocab_map()
        threads = _usable_threads(config.num_threads)
        kv_per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4
        bundle.file(WEIGHTS)  # which says what is there, where it is not
        weight_bytes = bundle.manifest.files[WEIGHTS].size
        lora_bytes = planned_bytes(model, config.max_loras, config.max_lora_rank)
        planned = weight_bytes + config.max_slots * capacity * kv_per_token + _WORKSPACE + lora_bytes
        free = available_memory()
        if planned > free:
            raise ConfigError(
                f"the plan needs {planned / 1e6:.0f} MB ({weight_bytes / 1e6:.0f} MB weights, max_slots "
                f"{config.max_slots} x max_context {capacity} x {kv_per_token} bytes of KV cache"
                + (f", {lora_bytes / 1e6:.0f} MB for {config.max_loras} adapters" if lora_bytes else "")
                + f") but {free / 1e6:.0f} MB are free; lower max_slots or max_context"
                + (", max_loras or max_lora_rank" if lora_bytes else "")
            )
        self._embedding = EmbeddingTable(bundle)
        before = anonymous_regions()
        # The decoder that takes adapters is a little slower also without one, so it is loaded only where there may be.
        self._loras = (
            OrtAdapters(model, self._graph, config.max_loras, config.max_lora_rank) if config.max_loras else None
        )
        self._session = self._load(bundle, threads, DECODER_ORT_LORA if config.max_loras else DECODER_ORT)
        self._collapsing = collapse_new_regions(before, delay_s=_SETTLE_S)
        shape = (config.max_slots, model.num_kv_heads, capacity, model.head_dim)
        # Fresh zero pages: the kernel backs them as they are first written.
        self._cache = [np.zeros(shape, np.float32) for _ in range(2 * model.num_layers)]  # key, value, key, …
        self._max_tokens = max(config.prefill_chunk, config.prefill_chunk_busy) + 1
        rows = max(self._max_tokens, config.max_slots)
        self._embeds = np.zeros((rows, model.hidden_size), np.float32)
        self._seqlens = np.zeros(config.max_slots, np.int32)
        self._total = np.zeros((), np.int32)
        self._indices = np.zeros(rows, np.int64)
        self._logits = np.zeros((config.max_slots, model.num_rows), np.float32)
        self._scratch = np.zeros((config.max_slots, model.num_rows), np.float32)  # one run's share of a step
        self._bindings: dict[tuple[int, int, int], Any] = {}  # by first slot, count, adapter
        quant = bundle.manifest.quantization
        # A product of one row by a matrix that is no constant, as A and B, is summed in another order than one of more.
        self._batches_adapted = config.decode_batching == "fast"
        self.info = ExecutorInfo(
            name="onnxruntime",
            device=f"CPU, {threads} threads",
            precision=f"{quant.weights} weights, fp32 KV cache",
            num_slots=config.max_slots,
            capacity=capacity,
            vocab_size=model.vocab_size,
            kv_bytes_per_token=kv_per_token,
            memory_bytes=planned,
            vocab_map=vocab_map,
        )
        batches = config.decode_batching == "fast" or (
            config.max_slots > 1 and not _rounds_single_rows_apart(quant) and self._rows_agree()
        )
        self.info = dataclasses.replace(self.info, batches=batches)

    def _rows_agree(self) -> bool:
        """Whether single tokens get the same bits alone and side by side on this machine; the slots are empty yet."""
        generator = np.random.default_rng(0)
        count = min(self.info.num_slots, _TRIED_ROWS)
        for position in range(min(_TRIED_TOKENS, self.info.capacity)):
            ids = generator.integers(0, self.info.vocab_size, count).astype(np.int32)
            steps = [SequenceStep(slot, ids[slot : slot + 1], position) for slot in range(count)]
            alone = np.concatenate([self._logits_of([step]) for step in steps])
            if not all(np.array_equal(self._logits_of(steps[:rows]), alone[:rows]) for rows in range(2, count + 1)):
                return False
        return True

    def _logits_of(self, members: list[SequenceStep]) -> npt.NDArray[np.float32]:
        logits = np.empty((len(members), self._model.num_rows), np.float32)
        self._run(members, logits)
        return logits

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """See Executor.adapters."""
        return {} if self._loras is None else self._loras.loaded

    def load_adapter(self, name: str, source: str | Path | LoraAdapter | PackedLora) -> LoadedAdapter:
        """See Executor.load_adapter. A bundle's adapter is mapped, not copied."""
        if self._loras is None:
            raise UnsupportedError(f"adapter {name!r}: the model was loaded with max_loras 0; load it with more")
        return self._loras.load(name, source)

    def unload_adapter(self, name: str) -> None:
        """See Executor.unload_adapter."""
        if self._loras is None:
            super().unload_adapter(name)
            return
        index = self._loras.unload(name)
        self._bindings = {key: binding for key, binding in self._bindings.items() if key[2] != index}

    def _load(self, bundle: Bundle, threads: int, decoder: str) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # sequence lengths vary: a pattern would be kept for each
        options.log_severity_level = 3
        graph: str | bytes = str(bundle.file(decoder))
        if ort_windows.sees_one_more():
            graph = ort_windows.narrowed(bundle.file(decoder).read_bytes())
            options.add_session_config_entry(ort_windows.FOLDER_OPTION, str(bundle.path))
        try:
            session = ort.InferenceSession(graph, sess_options=options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a family of its own that derives from Exception alone
            raise BundleError(f"ONNX Runtime cannot load {bundle.path / decoder}: {error}") from error
        fault = _graph_fault(session, self._model, self._graph) or _weights_fault(bundle, self._model)
        if fault:
            raise BundleError(f"{bundle.path}: {MANIFEST}: {fault}; export the model again")
        return session

    def step(self, batch: Sequence[SequenceStep]) -> npt.NDArray[np.float32]:
        """See Executor.step. One decoding sequence costs one run; n in neighbouring slots cost one run as well."""
        starts, total = [], 0
        for item in batch:
            starts.append(total)
            total += item.num_logits
        if total > len(self._logits):
            self._logits = np.zeros((total, self._model.num_rows), np.float32)  # verifying drafts, self-test
        single = sorted((i for i, s in enumerate(batch) if len(s.token_ids) == 1), key=lambda i: batch[i].slot)
        groups: list[list[int]] = []
        for i in single:
            before = batch[groups[-1][-1]] if groups else None
            batches = self._batches_adapted if batch[i].adapter else self.info.batches
            if batches and before and (before.slot + 1, before.adapter) == (batch[i].slot, batch[i].adapter):
                groups[-1].append(i)
            else:
                groups.append([i])
        groups += [[i] for i, s in enumerate(batch) if len(s.token_ids) > 1]
        direct = len(groups) == 1
        for group in groups:
            members = [batch[i] for i in group]
            rows = self._run(members, self._logits[:total] if direct and group == sorted(group) else None)
            if rows is None:
                continue
            offset = 0
            for i in group:
                count = batch[i].num_logits
                self._logits[starts[i] : starts[i] + count] = rows[offset : offset + count]
                offset += count
        return self._logits[:total]

    def _run(self, members: list[SequenceStep], out: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32] | None:
        """Run neighbouring slots together; fills `out` if given, else returns the logits."""
        first, count = members[0].slot, len(members)
        length = len(members[0].token_ids)
        rows = count * length
        if rows > len(self._embeds):
            self._embeds = np.zeros((rows, self._model.hidden_size), np.float32)
            self._indices = np.zeros(rows, np.int64)
        num_logits = 0
        longest = 0
        for i, item in enumerate(members):
            end = item.position + length
            assert item.slot == first + i and item.position >= 0 and end <= self.info.capacity, item
            self._embedding.lookup(item.token_ids, self._embeds[i * length : (i + 1) * length])
            self._seqlens[i] = end - 1
            longest = max(longest, end)
            wanted = range((i + 1) * length - item.num_logits, (i + 1) * length)
            self._indices[num_logits : num_logits + item.num_logits] = wanted
            num_logits += item.num_logits
        self._total[...] = longest
        # A product without rows is not worth a special case in every kernel: one row is computed and dropped.
        computed = max(num_logits, 1)
        if not num_logits:
            self._indices[0] = rows - 1
        if out is not None and num_logits:
            result = out
        elif computed <= len(self._scratch):
            result = self._scratch[:computed]
        else:
            result = np.empty((computed, self._model.num_rows), np.float32)
        binding = self._binding(first, count, members[0].adapter)
        names = self._graph
        _bind(binding, names.embeds, self._embeds, (count, length, self._model.hidden_size))
        _bind(binding, names.seqlens_k, self._seqlens, (count,))
        _bind(binding, names.total_length, self._total, ())
        _bind(binding, names.logit_indices, self._indices, (computed,))
        binding.bind_output(names.logits, "cpu", 0, np.float32, (computed, result.shape[1]), result.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as in _load
            raise DeviceError(f"ONNX Runtime failed in a step of {rows} tokens: {error}") from error
        return None if result is out else result

    def _binding(self, first: int, count: int, adapter: int) -> Any:
        """The IOBinding for slots `first` to `first + count - 1`: their caches as past and present, and an adapter."""
        key = (first, count, adapter)
        if key not in self._bindings:
            binding = self._session.io_binding()
            names = self._graph
            for i, cache in enumerate(self._cache):
                past, present = (
                    (names.past_key, names.present_key) if i % 2 == 0 else (names.past_value, names.present_value)
                )
                view = cache[first : first + count]
                _bind(binding, past.format(layer=i // 2), view, view.shape)
                binding.bind_output(present.format(layer=i // 2), "cpu", 0, np.float32, view.shape, view.ctypes.data)
            if self._loras is not None:
                for name, values in self._loras.inputs(adapter).items():
                    _bind(binding, name, values, values.shape)
            self._bindings[key] = binding
        return self._bindings[key]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See Executor.copy_prefix."""
        for cache in self._cache:
            cache[target, :, :length] = cache[source, :, :length]

    def save_prefix(self, slot: int, length: int) -> npt.NDArray[np.uint8]:
        """See Executor.save_prefix."""
        return np.concatenate([cache[slot, :, :length].reshape(-1) for cache in self._cache]).view(np.uint8)

    def load_prefix(self, slot: int, data: npt.NDArray[np.uint8], length: int) -> None:
        """See Executor.load_prefix."""
        shape = (len(self._cache), self._model.num_kv_heads, length, self._model.head_dim)
        for cache, saved in zip(self._cache, data.view(np.float32).reshape(shape), strict=True):
            cache[slot, :, :length] = saved

    def close(self) -> None:
        """See Executor.close."""
        self._collapsing.cancel()
        self._collapsing.join()
        self._bindings.clear()
        self._cache.clear()
        self._session = None


def _usable_threads(asked: int) -> int:
    """Threads to compute with: beyond one for each logical CPU they wait for each other, for minutes where many do."""
    available = len(os.sched_getaffinity(0))
    if asked > available:
        _log.warning(
            "num_threads is %d, but this process has %d logical CPUs: %d threads compute", asked, available, available
        )
    return min(asked, available) or physical_cores()


def _graph_fault(session: Any, model: ModelSpec, graph: GraphSpec) -> str:
    """The manifest's first field that does not fit the loaded graph, its value and the graph's; empty without any."""
    inputs = {tensor.name: tensor.shape for tensor in session.get_inputs()}
    outputs = {tensor.name: tensor.shape for tensor in session.get_outputs()}
    for role in ("embeds", "seqlens_k", "total_length", "logit_indices", "past_key", "past_value"):
        if getattr(graph, role).format(layer=0) not in inputs:
            return f"graph: {role} is {getattr(graph, role)!r}; the graph's inputs are {_listed(inputs)}"
    for role in ("logits", "present_key", "present_value"):
        if getattr(graph, role).format(layer=0) not in outputs:
            return f"graph: {role} is {getattr(graph, role)!r}; the graph's outputs are {_listed(outputs)}"
    layers = next(i for i in itertools.count() if graph.past_key.format(layer=i) not in inputs)
    cache = inputs[graph.past_key.format(layer=0)]
    sizes = {
        "num_layers": (model.num_layers, layers),
        "hidden_size": (model.hidden_size, inputs[graph.embeds][-1]),
        "num_kv_heads": (model.num_kv_heads, cache[1]),
        "head_dim": (model.head_dim, cache[3]),
        "head_rows" if model.head_rows else "vocab_size": (model.num_rows, outputs[graph.logits][-1]),
    }
    for name, (said, found) in sizes.items():
        if isinstance(found, int) and said != found:  # a name where the graph leaves a size open
            return f"model: {name} is {said}; the graph has {found}"
    return ""


def _weights_fault(bundle: Bundle, model: ModelSpec) -> str:
    """The same for what the graph does not show and the shapes of the weights do."""
    weights = bundle.weights()
    rows, positions = len(weights["embed.weight"]), len(weights["rope.cos"])
    if model.vocab_size != rows:
        return f"model: vocab_size is {model.vocab_size}; the embedding has {rows} rows"
    if model.max_context > positions:
        return f"model: max_context is {model.max_context}; the position table has {positions} rows"
    return ""


def _listed(names: Iterable[str]) -> str:
    """The first few, which are those that do not belong to a layer."""
    shown = list(itertools.islice(names, 8))
    return ", ".join(shown) + (", …" if len(shown) == 8 else "")


def _rounds_single_rows_apart(quant: QuantSpec) -> bool:
    usual = LinearFormat(quant.weights, quant.group_size)
    return any(
        (form.scheme == "int4" and form.group_size >= 64) or (form.scheme == "int8" and form.group_size >= 128)
        for form in (usual, *quant.formats.values())
    )


def _bind(binding: Any, name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)
