"""From a checkpoint to a bundle: one walk over the weights, then graphs, tokenizer, manifest and self-test.

Everything is written beside the final name and renamed at the end, so that a bundle is either whole or not there.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import edgellm_ros
from edgellm_ros import bundle as names
from edgellm_ros.bundle import Bundle, hash_file
from edgellm_ros.errors import CheckpointError, ToolchainError
from edgellm_ros.executors.lora_layout import LARGEST_RANK
from edgellm_ros.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    GraphSpec,
    LinearFormat,
    Manifest,
    ModelSpec,
    QuantSpec,
    SelfTest,
)
from edgellm_ros.toolchain.checkpoint import Checkpoint, open_checkpoint
from edgellm_ros.toolchain.detect import check_tensors, load_spec
from edgellm_ros.toolchain.graph.onnxruntime import write_onnxruntime_graph
from edgellm_ros.toolchain.graph.plugin import check_plugin_support, write_plugin_graph
from edgellm_ros.toolchain.graph.portable import write_portable_graph
from edgellm_ros.toolchain.input_factors import FOLDED, hand_on
from edgellm_ros.toolchain.keep import WHOLE_INPUT, KeptWeights
from edgellm_ros.toolchain.kv_scales import read_kv_scales, scale_layer
from edgellm_ros.toolchain.layers import EMBEDDING, FINAL_NORM, HEAD, plan_weights, read_layer, read_norm
from edgellm_ros.toolchain.quantize_weights import quantize_int4, quantize_int8
from edgellm_ros.toolchain.reference import FloatArray, ReferenceDecoder
from edgellm_ros.toolchain.rope import rope_tables, short_context
from edgellm_ros.toolchain.self_test import encode_prompts, finish_self_test, make_cases
from edgellm_ros.toolchain.vocab_file import load_vocab_map, tokenizer_hash, write_vocab_file
from edgellm_ros.toolchain.weights import Progress, WeightWriter
from edgellm_ros.toolchain.whole_output import whole_output
from edgellm_ros.vocab_map import VocabMap
from edgellm_ros.weight_file import WeightFile

DEFAULT_MAX_CONTEXT = 8192  # bounds the position tables; --max-context raises it to the model's own limit
# Input features that share a scale, the first that divides every layer's. 64 decodes 13 % faster than 32 on a CPU, and
# with the search of quantize_weights.py loses no more perplexity.
GROUP_SIZES = (64, 32, 16)
KEEP = "keep"
TABLES = ("fp16", "int8")
DIALECTS = ("standard", "plugin")
_TABLE_NUMBERS = 1 << 20  # of an embedding or a head that are in memory at once
_HEAD_DIM_MULTIPLE = 16  # of GroupQueryAttention with rotary embedding
# The head stays int8: in int4 it costs a small model more perplexity than all its layers together.
SCHEMES: dict[str, QuantSpec] = {
    "int4": QuantSpec("int4", lm_head="int8", embedding="int8"),
    "int8": QuantSpec("int8", lm_head="int8", embedding="int8"),
    "fp16": QuantSpec("fp16", lm_head="fp16", embedding="fp16"),
    "fp32": QuantSpec("fp32", lm_head="fp32", embedding="fp32"),
}


def export_bundle(
    checkpoint: Path,
    output: Path,
    weights: str | None = None,
    max_context: int | None = None,
    name: str = "",
    overwrite: bool = False,
    progress: Progress | None = None,
    vocab_map: Path | None = None,
    max_lora_rank: int = 0,
    accept: Callable[[Bundle], object] | None = None,
    lm_head: str | None = None,
    dialect: str = "standard",
) -> Bundle:
    """Write the bundle `output` from `checkpoint`, a Hugging Face directory or a GGUF file.

    weights: a key of SCHEMES, or KEEP: what others quantised keeps its integers; None is KEEP for such a checkpoint and
    int4 for any other. max_context: tokens the bundle can be run with, at most the model's own limit.
    progress is called with (stage, done, total). vocab_map: a file by `edgellm reduce-vocab`; the head then has rows
    for its tokens only. max_lora_rank: above 0, decoders that take adapters as inputs are written as well, for
    projections of at most that rank. accept is called with the finished bundle before it gets its name; raising there
    refuses it. lm_head: one of TABLES, of a kept checkpoint's head and embedding where they are floats; None is fp16.
    dialect: one of DIALECTS; plugin writes decoders for TensorRT with the project's plugins as well.
    Raises ToolchainError and its kinds; then nothing is left behind.
    """
    if weights is not None and weights not in (*SCHEMES, KEEP):
        raise ToolchainError(f"weights is {weights!r}; allowed are {', '.join((*SCHEMES, KEEP))}")
    if lm_head is not None and lm_head not in TABLES:
        raise ToolchainError(f"lm-head is {lm_head!r}; allowed are {', '.join(TABLES)}")
    if dialect not in DIALECTS:
        raise ToolchainError(f"dialect is {dialect!r}; allowed are {', '.join(DIALECTS)}")
    if not 0 <= max_lora_rank <= LARGEST_RANK:
        raise ToolchainError(f"max-lora-rank is {max_lora_rank}; allowed are 0 (no adapters) to {LARGEST_RANK}")
    output = Path(output)
    if output.exists() and not overwrite:
        raise ToolchainError(f"{output} exists; choose another directory, or let it be replaced with --force")
    if output.exists() and not (output / MANIFEST).exists():
        raise ToolchainError(f"{output} exists and is not a bundle; it is not replaced")
    source = open_checkpoint(Path(checkpoint))
    with whole_output(output, source.path) as partial:
        scheme = _scheme(source, weights)
        if lm_head is not None and scheme is not None:
            raise ToolchainError(
                f"lm-head {lm_head} is for checkpoints whose weights are kept; with {scheme.weights} weights the head "
                f"is {scheme.lm_head}: leave it out"
            )
        tables = lm_head or TABLES[0]
        _write(
            source, partial, scheme, max_context, name, progress or _silent, vocab_map, max_lora_rank, tables,
            dialect == "plugin",
        )  # fmt: skip
        if accept is not None:
            accept(Bundle.open(partial, verify=False))
    return Bundle.open(output, verify=False)


def _write(
    source: Checkpoint,
    root: Path,
    quant: QuantSpec | None,
    max_context: int | None,
    name: str,
    progress: Progress,
    vocab_map: Path | None,
    max_lora_rank: int,
    tables: str,
    plugins: bool,
) -> None:
    family, model = load_spec(source)
    check_tensors(source, family, model)
    _check_supported(model)
    tokens = source.token_spec()
    tokenizer_json = source.tokenizer_json()
    prompts = encode_prompts(tokenizer_json, model.vocab_size)
    context = _context(model, max_context, max(map(len, prompts)))
    model = replace(model, name=name or model.name, max_context=context)
    scales, kv_notes = read_kv_scales(source, model.num_layers)
    model = replace(model, kv_scales=scales)
    kept = None
    if quant is None:
        kept = KeptWeights(source, model, tables)
        quant = kept.quant
    else:
        quant = with_groups(quant, model)
    if plugins:
        check_plugin_support(model, quant)
    (root / names.TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
    template = source.chat_template()
    if template:
        (root / names.CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    vocab = load_vocab_map(vocab_map, source, model) if vocab_map is not None else None
    if vocab is not None:
        write_vocab_file(root / names.VOCAB_MAP, vocab, tokenizer_hash(tokenizer_json))
        model = replace(model, head_rows=len(vocab))
    known = bool(source.quantization()) and source.kind == "safetensors" and hand_on(source.path, root)
    quant = replace(quant, folded=source.folded and not known)
    logits = _write_weights(source, root / names.WEIGHTS, model, quant, prompts, progress, vocab, kept)
    notes = kept.quant.notes if kept is not None else quant.notes  # with those that writing made
    quant = replace(quant, notes=(*notes, *kv_notes, *((FOLDED,) if quant.folded else ())))
    graph = GraphSpec(
        activation_dtype="float32" if quant.weights == "fp32" else "float16", max_lora_rank=max_lora_rank
    )
    stored = WeightFile(root / names.WEIGHTS)
    write_portable_graph(root / names.DECODER, model, quant, graph, stored)
    write_onnxruntime_graph(root / names.DECODER_ORT, model, quant, graph, stored)
    if max_lora_rank:  # files of their own: the extra nodes cost some per cent of the speed where there is no adapter
        write_portable_graph(root / names.DECODER_LORA, model, quant, graph, stored, lora=True)
        write_onnxruntime_graph(root / names.DECODER_ORT_LORA, model, quant, graph, stored, lora=True)
    if plugins:
        write_plugin_graph(root / names.DECODER_PLUGIN, model, quant, graph, stored)
    if plugins and max_lora_rank:
        write_plugin_graph(root / names.DECODER_PLUGIN_LORA, model, quant, graph, stored, lora=True)
    files = {path.name: hash_file(path) for path in sorted(root.iterdir())}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=model,
        tokens=tokens,
        quantization=quant,
        graph=graph,
        provenance=_provenance(source, quant),
        files=files,
        self_test=SelfTest(_reference(source), 1.0, make_cases(prompts, logits, vocab)),
    )
    progress("self-test", 0, 1)
    manifest = finish_self_test(root, manifest)
    (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    progress("self-test", 1, 1)


def _write_weights(
    source: Checkpoint,
    path: Path,
    model: ModelSpec,
    quant: QuantSpec,
    prompts: list[npt.NDArray[np.int64]],
    progress: Progress,
    vocab: VocabMap | None,
    kept: KeptWeights | None,
) -> list[FloatArray]:
    """Write all weights, and return the reference's logits for the prompts: both in one walk over the checkpoint."""
    ropes = {kind: rope_tables(model, model.max_context, kind) for kind in model.rope_tables()}
    reference = ReferenceDecoder(model, ropes)
    writer = WeightWriter(path, plan_weights(source, model, quant), {"format": "edgellm_ros", "scheme": quant.weights})
    total = model.num_layers + 2
    try:
        for kind, stem in model.rope_tables().items():
            for part, table in zip(("cos", "sin"), ropes[kind], strict=True):
                writer.write(f"{stem}.{part}", table)
        for first, rows in _tables(source, EMBEDDING, writer, "embed", quant, kept):
            reference.embed(rows, prompts, first)
        progress("weights", 1, total)
        buffers: dict[str, FloatArray] = {}
        for layer in range(model.num_layers):
            tensors = read_layer(source, model, layer, buffers)
            reference.layer(layer, tensors)
            scale_layer(model, layer, tensors)
            for stem, tensor in tensors.items():
                at = f"layers.{layer}.{stem}"
                if tensor.ndim == 2:
                    _write_linear(writer, at.removesuffix(".weight"), tensor, quant, kept)
                elif at.endswith(".bias"):
                    writer.write(at, tensor)
                else:
                    writer.write(f"{at}.weight", tensor)
            progress("weights", layer + 2, total)
        final_norm = read_norm(source, model, FINAL_NORM)
        writer.write("final_norm.weight", final_norm)
        stem = "head" if quant.head_tensor(model) == "head" else ""
        chosen = None if vocab is None else vocab.token_ids
        parts = [
            reference.logits(final_norm, rows, last=8)
            for _, rows in _tables(source, EMBEDDING if model.tied_head else HEAD, writer, stem, quant, kept, chosen)
        ]
        logits = [np.concatenate(columns, -1) for columns in zip(*parts, strict=True)]
        if not all(np.isfinite(rows).all() for rows in logits):
            raise CheckpointError(
                f"{source.path}: the logits of its own weights, in fp32, are not finite, so a weight is NaN or "
                "infinite; download the checkpoint again"
            )
        progress("weights", total, total)
    except BaseException:
        writer.abort()
        raise
    writer.close()
    return logits


def _tables(
    source: Checkpoint,
    name: str,
    writer: WeightWriter,
    stem: str,
    quant: QuantSpec,
    kept: KeptWeights | None,
    chosen: npt.NDArray[np.int32] | None = None,
) -> Iterator[tuple[int, FloatArray]]:
    """The rows of the embedding or the head, or the `chosen` ones (ascending), a part of them at a time.

    Yields the number of the part's first row in what is stored, and its rows; each part is written to `stem`, unless
    that is empty. A table in fp32 at once could be twice the size of a small model.
    """
    total, columns = source.shape(name)
    step, first = max(8, _TABLE_NUMBERS // columns // 8 * 8), 0
    packed = source.packed_parts(name, step) if source.scheme(name) is not None else None
    for start in range(0, total, step):
        stop = min(start + step, total)
        part = next(packed) if packed is not None else None
        taken: Any = slice(None)
        if chosen is not None:
            taken = chosen[(chosen >= start) & (chosen < stop)] - start
            if not len(taken):
                continue
        part = part.take(taken) if part is not None else None
        rows = source.read_rows(name, start, stop)[taken] if part is None else part.dequantize()
        if stem:
            _check_numbers(source, name, rows, quant.format_of(stem))
            if kept is not None and kept.is_kept(stem):
                assert part is not None, stem
                tensors = kept.stored(stem, [part])
            else:
                tensors = _stored(rows, quant.format_of(stem))
            for tensor, data in tensors.items():
                if tensor in WHOLE_INPUT:
                    writer.write(f"{stem}.{tensor}", data)
                else:
                    writer.write_rows(f"{stem}.{tensor}", first, data)
        yield first, rows
        first += len(rows)


def _check_numbers(source: Checkpoint, name: str, rows: FloatArray, form: LinearFormat) -> None:
    """Raise CheckpointError for what cannot be stored: the self-test's prompts look up few rows of an embedding."""
    largest = float(max(rows.max(), -rows.min()))
    if not np.isfinite(largest):
        raise CheckpointError(
            f"{source.path}: {name} has a number that is NaN or infinite; download the checkpoint again"
        )
    if form.scheme == "fp16" and largest > float(np.finfo(np.float16).max):
        raise CheckpointError(
            f"{source.path}: {name} has a number of {largest:.6g}, and fp16 holds up to 65504; choose --weights int8, "
            "or --lm-head int8 where weights are kept"
        )


def _write_linear(
    writer: WeightWriter,
    stem: str,
    weight: FloatArray,
    quant: QuantSpec,
    kept: KeptWeights | None,
) -> None:
    """Write a layer's tensors: from `weight`, or the checkpoint's own integers where they are kept."""
    tensors = kept.tensors(stem) if kept is not None and kept.is_kept(stem) else None
    for name, tensor in (tensors or _stored(weight, quant.format_of(stem))).items():
        writer.write(f"{stem}.{name}", tensor)


def _stored(weight: FloatArray, form: LinearFormat) -> dict[str, npt.NDArray[Any]]:
    """What is stored for fp32 rows, by the name after the stem."""
    if form.scheme in ("int4", "int8"):
        quantize = quantize_int4 if form.scheme == "int4" else quantize_int8
        values, scales = quantize(weight, form.group_size)
        return {"weight": values, "scale": scales}
    return {"weight": weight.astype(np.float16 if form.scheme == "fp16" else np.float32)}


def _scheme(source: Checkpoint, weights: str | None) -> QuantSpec | None:
    """The entry of SCHEMES; None is to keep what the checkpoint has."""
    if weights == KEEP and not source.quantization():
        raise ToolchainError(
            f"{source.path} is not quantised, so there is nothing to keep; choose --weights {', '.join(SCHEMES)}"
        )
    if weights in (None, KEEP):
        return None if source.quantization() else SCHEMES["int4"]
    return SCHEMES[weights]


def _reference(source: Checkpoint) -> str:
    whose = f"the checkpoint's dequantised weights ({source.quantization()})" if source.quantization() else ""
    return f"{whose or 'the original weights'} in fp32 (NumPy)"


def _check_supported(model: ModelSpec) -> None:
    if model.head_dim % _HEAD_DIM_MULTIPLE:
        raise ToolchainError(
            f"{model.name} has head_dim {model.head_dim}; the attention kernels take multiples of {_HEAD_DIM_MULTIPLE}"
        )


def with_groups(quant: QuantSpec, model: ModelSpec) -> QuantSpec:
    """One of SCHEMES with the group size that fits `model`; raises ToolchainError when none does."""
    return replace(quant, group_size=_group_size(model)) if quant.weights in ("int4", "int8") else quant


def _group_size(model: ModelSpec) -> int:
    widths = (model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim)
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise ToolchainError(
        f"{model.name} has layers of {', '.join(map(str, sorted(set(widths))))} input features, which do not divide "
        f"into groups of {GROUP_SIZES[-1]}; export with --weights fp16"
    )


def _context(model: ModelSpec, asked: int | None, needed: int) -> int:
    """The bundle's context; `needed` is what the self-test's prompts take, which every bundle has room for."""
    largest = model.max_context
    if largest < needed:
        raise ToolchainError(
            f"{model.name} has a context of {largest} tokens, and the self-test's prompts have up to {needed}; take a "
            "model with more"
        )
    if asked is None:
        return max(needed, min(largest, DEFAULT_MAX_CONTEXT, short_context(model)))
    if not needed <= asked <= largest:
        raise ToolchainError(
            f"max-context is {asked}; {model.name} allows {needed} (the self-test's prompts) to {largest}"
        )
    return asked


def _provenance(source: Checkpoint, quant: QuantSpec) -> dict[str, str]:
    import onnx

    requantised = source.quantization() and not quant.kept
    return {
        "source": source.path.name,
        "source_kind": source.kind,
        **({"converted": f"{source.quantization()} to {quant.weights}, not kept"} if requantised else {}),
        "source_sha256": ", ".join(f"{p.name} {hash_file(p).sha256}" for p in source.source_files()),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "edgellm_ros": edgellm_ros.__version__,
        "onnx": onnx.__version__,
        "numpy": np.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def _silent(stage: str, done: int, total: int) -> None:
    """No progress wanted."""
