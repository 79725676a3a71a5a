"""Checkpoints of any shape with random weights, as the tools that quantise models write them.

Words, bytes and blocks are drawn as they are stored, so that a billion of them take seconds; scales give the weights a
usual size. What is not quantised (the embedding, norms, the head) is bfloat16 or, in a GGUF file, Q6_K and float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from edgellm_ros.benchmark.random_bundle import word_tokenizer
from edgellm_ros.manifest import ModelSpec
from edgellm_ros.toolchain.families import family_of

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
Tensor = tuple[str, str, np.ndarray]  # suffix of the module's name, safetensors' dtype, numbers
_GROUP = 128
_HEAD = "lm_head"
_RNG = np.random.default_rng(0)
_START = _RNG.bit_generator.state  # what is written does not depend on what was written before


def _bytes(*shape: int) -> np.ndarray:
    return _RNG.integers(0, 256, shape, np.uint8)


def _nibbles(*shape: int) -> np.ndarray:
    """Bytes of two numbers from 1 to 15: their mean is 8, so that a layer's outputs have no common part."""
    found = _bytes(*shape)
    found[found & 0x0F == 0] |= 0x08
    found[found & 0xF0 == 0] |= 0x80
    return found


def _words(rows: int, columns: int) -> np.ndarray:
    return _nibbles(rows, 4 * columns).view("<i4")


def _scales(shape: tuple[int, ...], columns: int, spread: float, dtype: Any = np.float16) -> np.ndarray:
    """For numbers whose standard deviation is `spread`, so that a product keeps the size of its input."""
    return np.full(shape, columns**-0.5 / spread, dtype)


def _bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2")


def _plain(shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return _bf16(1 + 0.1 * _RNG.standard_normal(shape, np.float32))
    return _bf16(_RNG.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5))


def _fp8(rows: int, columns: int) -> np.ndarray:
    return _RNG.standard_normal((rows, columns), np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def _awq(rows: int, columns: int) -> Iterator[Tensor]:
    groups = columns // _GROUP
    yield "qweight", "I32", _words(columns, rows // 8)
    yield "qzeros", "I32", np.full((groups, rows // 8), 0x88888888, np.uint32).view(np.int32)
    yield "scales", "F16", _scales((groups, rows), columns, 4.6)


def _gptq(rows: int, columns: int) -> Iterator[Tensor]:
    groups = columns // _GROUP
    yield "qweight", "I32", _words(columns // 8, rows)
    yield "qzeros", "I32", np.full((groups, rows // 8), 0x77777777, np.int32)
    yield "scales", "F16", _scales((groups, rows), columns, 4.6)
    yield "g_idx", "I32", (np.arange(columns) // _GROUP).astype(np.int32)


def _ct_int4(rows: int, columns: int) -> Iterator[Tensor]:
    yield "weight_packed", "I32", _words(rows, columns // 8)
    yield "weight_scale", "BF16", _bf16(_scales((rows, columns // _GROUP), columns, 4.6))
    yield "weight_shape", "I64", np.array([rows, columns])


def _ct_fp8(rows: int, columns: int) -> Iterator[Tensor]:
    yield "weight", "F8_E4M3", _fp8(rows, columns)
    yield "weight_scale", "BF16", _bf16(_scales((rows, 1), columns, 1))


def _modelopt_fp8(rows: int, columns: int) -> Iterator[Tensor]:
    yield "weight", "F8_E4M3", _fp8(rows, columns)
    yield "weight_scale", "F32", _scales((), columns, 1, np.float32)
    yield "input_scale", "F32", np.array(0.05, np.float32)


def _modelopt_int4(rows: int, columns: int) -> Iterator[Tensor]:
    yield "weight", "U8", _nibbles(rows // 2, columns) ^ 0x88  # signed
    yield "weight_scale", "F16", _scales((rows, columns // _GROUP), columns, 4.6)


def _modelopt_int8(rows: int, columns: int) -> Iterator[Tensor]:
    yield "weight", "I8", _bytes(rows, columns)
    yield "weight_scale", "F32", _scales((rows,), columns, 74, np.float32)


def _modelopt_nvfp4(rows: int, columns: int) -> Iterator[Tensor]:
    yield "weight", "U8", _bytes(rows, columns // 2)
    yield "weight_scale", "F8_E4M3", np.full((rows, columns // 16), 0x40, np.uint8)  # 2.0
    yield "weight_scale_2", "F32", _scales((), columns, 6, np.float32)


def _modelopt(algorithm: str, group: int | None = None, *, head: bool = False) -> dict[str, Any]:
    excluded = [] if head else [_HEAD]
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": excluded, "group_size": group}


def _compressed(form: str, bits: int, kind: str, strategy: str, group: int | None = None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": [_HEAD]}


# A form's quantization_config, what stands for a linear weight, and whether the head is one of those.
Packer = Callable[[int, int], Iterator[Tensor]]
FORMS: dict[str, tuple[dict[str, Any], Packer | None, bool]] = {
    "bf16": ({}, None, False),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": _GROUP, "zero_point": True}, _awq, False),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "sym": True}, _gptq, False),
    "gptq-head": ({"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "sym": True, "lm_head": True}, _gptq, True),
    "ct-int4": (_compressed("pack-quantized", 4, "int", "group", _GROUP), _ct_int4, False),
    "ct-fp8": (_compressed("float-quantized", 8, "float", "channel"), _ct_fp8, False),
    "modelopt-fp8": (_modelopt("FP8"), _modelopt_fp8, False),
    "modelopt-fp8-head": (_modelopt("FP8", head=True), _modelopt_fp8, True),
    "modelopt-int4": (_modelopt("W4A16_AWQ", _GROUP), _modelopt_int4, False),
    "modelopt-int4-head": (_modelopt("W4A16_AWQ", _GROUP, head=True), _modelopt_int4, True),
    "modelopt-int8": (_modelopt("W8A16"), _modelopt_int8, False),
    "modelopt-nvfp4": (_modelopt("NVFP4"), _modelopt_nvfp4, False),
    "modelopt-nvfp4-head": (_modelopt("NVFP4", head=True), _modelopt_nvfp4, True),
}
ALL_FORMS = (*FORMS, "gguf-q4_0", "gguf-q4_1", "gguf-q4_k", "gguf-q8_0")
_HALVES = {"q4_0": (0,), "q4_1": (0, 2), "q8_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}  # a block's fp16 numbers
_SPREADS = {"q4_0": 4.6, "q4_1": 4.6, "q8_0": 74.0, "q4_k": 4.6 * 37, "q6_k": 18.5 * 74}


def write_checkpoint(model: ModelSpec, form: str, path: Path) -> int:
    """Write `path`, a directory or for `gguf-…` a file, in one of ALL_FORMS; returns the weight file's bytes."""
    _RNG.bit_generator.state = _START
    if form.startswith("gguf-"):
        _write_gguf(model, form.removeprefix("gguf-"), path)
        return path.stat().st_size
    quantization, pack, head = FORMS[form]
    path.mkdir(parents=True, exist_ok=True)
    config = _config(model) | ({"quantization_config": quantization} if quantization else {})
    if head:
        config["tie_word_embeddings"] = False
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(word_tokenizer(model.vocab_size))
    shapes = family_of(model).expected_tensors(model, config)
    if head:
        shapes[f"{_HEAD}.weight"] = (model.vocab_size, model.hidden_size)
    return _write_safetensors(path / "model.safetensors", shapes, pack)


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], pack: Packer | None) -> int:
    """The data first, behind room for a header whose length is not known before."""
    header: dict[str, Any] = {}
    offset, room = 0, 1 << 20
    with open(path, "wb") as file:
        file.seek(8 + room)
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            is_linear = len(shape) == 2 and "embed_tokens" not in name
            parts = pack(*shape) if pack and is_linear else [("weight", "BF16", _plain(shape))]
            for suffix, dtype, data in parts:
                size = data.nbytes
                header[f"{module}.{suffix}"] = {
                    "dtype": dtype, "shape": list(data.shape), "data_offsets": [offset, offset + size]
                }  # fmt: skip
                file.write(np.ascontiguousarray(data).tobytes())
                offset += size
        text = json.dumps(header).encode()
        file.seek(0)
        file.write(room.to_bytes(8, "little") + text.ljust(room))
    return path.stat().st_size


def _config(model: ModelSpec) -> dict[str, Any]:
    return {
        "model_type": model.family, "architectures": [ARCHITECTURES[model.family]], "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size, "num_hidden_layers": model.num_layers, "head_dim": model.head_dim,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size, "max_position_embeddings": model.max_context, "rope_theta": model.rope_theta,
        "rms_norm_eps": model.rms_norm_eps, "tie_word_embeddings": model.tied_head, "eos_token_id": 0,
    }  # fmt: skip


def _write_gguf(model: ModelSpec, kind: str, path: Path) -> None:
    writer = gguf.GGUFWriter(path, model.family, use_temp_file=True)
    writer.add_context_length(model.max_context)
    writer.add_block_count(model.num_layers)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    vocab = [*letters, "ab", *(f"{i}·" for i in range(model.vocab_size - len(letters) - 1))]
    writer.add_token_list(vocab)
    writer.add_token_types([1] * len(vocab))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model.family.upper()], model.num_layers)
    for name, shape in family_of(model).expected_tensors(model, _config(model)).items():
        stored = names.get_name(name, try_suffixes=(".weight",))
        if len(shape) == 1:
            writer.add_tensor(stored, np.ones(shape, np.float32))
        else:
            _add_blocks(writer, stored, "q6_k" if "embed" in name and kind != "q8_0" else kind, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_blocks(writer: gguf.GGUFWriter, name: str, kind: str, shape: tuple[int, ...]) -> None:
    rows, columns = shape
    dtype = gguf.GGMLQuantizationType[kind.upper()]
    block, size = gguf.GGML_QUANT_SIZES[dtype]
    blocks = _bytes(rows * columns // block, size)
    scale = np.float16(columns**-0.5 / _SPREADS[kind])
    for i, at in enumerate(_HALVES[kind]):
        value = scale if i == 0 else np.float16(scale * (-8 if kind == "q4_1" else 8))  # Q4_K's is subtracted
        blocks[:, at : at + 2] = np.array([value], "<f2").view(np.uint8)
    writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=dtype)
