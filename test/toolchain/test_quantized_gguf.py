"""GGUF's blocks keep their integers: dequantising what is stored gives what the gguf package (ggml's own) gives."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import tiny
import torch
import transformers
from test_export import PROMPT, hf_logits, relative_error, run_executor, run_portable
from test_reduced_head import kept_tokens

from edgellm_ros.bundle import DECODER, Bundle
from edgellm_ros.executors.embedding import EmbeddingTable
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.quantized.gguf_blocks import KEPT, unpack


def pack_q4_k(weight: np.ndarray) -> np.ndarray:
    """(out, in) to Q4_K rows: weight = d * scale * q - dmin * min, six bits for scale and min of 32 weights."""
    groups = weight.reshape(-1, 8, 32)
    least = np.maximum(-groups.min(-1), 0)
    step = (groups.max(-1) + least) / 15
    d = np.maximum(step.max(-1) / 63, 1e-6).astype(np.float16)
    dmin = np.maximum(least.max(-1) / 63, 1e-6).astype(np.float16)
    scale = np.rint(step / d[:, None].astype(np.float32)).clip(1, 63).astype(np.uint8)
    minimum = np.rint(least / dmin[:, None].astype(np.float32)).clip(0, 63).astype(np.uint8)
    wide = d[:, None].astype(np.float32) * scale
    shift = dmin[:, None].astype(np.float32) * minimum
    q = np.rint((groups + shift[..., None]) / wide[..., None]).clip(0, 15).astype(np.uint8)
    packed = np.zeros((len(groups), 12), np.uint8)
    for j in range(4):  # as ggml's get_scale_min_k4 reads them
        packed[:, j] = scale[:, j] | (scale[:, j + 4] >> 4 << 6)
        packed[:, j + 4] = minimum[:, j] | (minimum[:, j + 4] >> 4 << 6)
        packed[:, j + 8] = (scale[:, j + 4] & 15) | (minimum[:, j + 4] & 15) << 4
    nibbles = np.concatenate([q[:, 2 * j] | q[:, 2 * j + 1] << 4 for j in range(4)], -1)
    heads = [d[:, None].view(np.uint8), dmin[:, None].view(np.uint8)]
    return np.concatenate([*heads, packed, nibbles], -1).reshape(len(weight), -1)


def pack_q6_k(weight: np.ndarray) -> np.ndarray:
    """(out, in) to Q6_K rows: weight = d * scale * (q - 32), an int8 scale for 16 weights."""
    groups = weight.reshape(-1, 16, 16)
    step = np.abs(groups).max(-1) / 31
    d = np.maximum(step.max(-1) / 127, 1e-6).astype(np.float16)
    scale = np.rint(step / d[:, None].astype(np.float32)).clip(1, 127).astype(np.int8)
    wide = d[:, None].astype(np.float32) * scale
    q = (np.rint(groups / wide[..., None]).clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.concatenate([q[:, :, 0] & 15 | (q[:, :, 2] & 15) << 4, q[:, :, 1] & 15 | (q[:, :, 3] & 15) << 4], -1)
    high = q[:, :, 0] >> 4 | q[:, :, 1] >> 4 << 2 | q[:, :, 2] >> 4 << 4 | q[:, :, 3] >> 4 << 6
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), scale.view(np.uint8), d[:, None].view(np.uint8)]
    return np.concatenate(parts, -1).reshape(len(weight), -1)


@pytest.mark.parametrize("kind", KEPT)
def test_a_block_of_any_bytes_means_what_ggml_says(kind: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(1)
    raw = generator.integers(0, 256, (8, 3 * size), np.uint8).reshape(-1, size)
    halves = {"Q8_0": [0], "Q4_0": [0], "Q5_0": [0], "Q6_K": [208]}.get(kind, [0, 2])
    for at in halves:  # any bytes but those that are no number
        raw[:, at : at + 2] = generator.uniform(-0.1, 0.1, (len(raw), 1)).astype(np.float16).view(np.uint8)
    raw = raw.reshape(8, -1)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    got = unpack(kind, raw, size)
    assert got.shape == (8, 3 * block) and got.scheme == KEPT[kind]
    np.testing.assert_allclose(got.dequantize(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    largest = 2 ** (3 if got.kind == "int4" else 7)
    assert got.values.min() >= -largest and got.values.max() < largest


def dequantised(path: Path) -> torch.nn.Module:
    """transformers' reading of the file."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize(
    ("quantisation", "kind", "scheme", "group"),
    [("Q4_0", "llama", "int4", 32), ("Q4_1", "llama_tied", "int4", 32), ("Q5_1", "qwen2", "int8", 32),
     ("Q8_0", "llama_tied", "int8", 32)],
)  # fmt: skip
def test_a_gguf_file_keeps_its_blocks(quantisation: str, kind: str, scheme: str, group: int, tmp_path: Path) -> None:
    tiny.save_gguf(kind, tmp_path / "model.gguf", quantisation)
    expected = hf_logits(dequantised(tmp_path / "model.gguf"), PROMPT)
    bundle = export_bundle(tmp_path / "model.gguf", tmp_path / "bundle")
    quant = bundle.manifest.quantization
    assert (quant.weights, quant.group_size, quant.kept) == (scheme, group, f"GGUF {quantisation}")
    assert not quant.notes, "fp16 scales are stored as they are"
    assert relative_error(run_executor(bundle, PROMPT)[0], expected) < 0.08  # activations in int8
    assert relative_error(run_portable(bundle, PROMPT), expected) < 0.01  # activations in fp16


def test_k_quants_are_stored_with_their_own_integers_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**tiny._COMMON | sizes | {"tie_word_embeddings": True})
    monkeypatch.setitem(tiny.CONFIGS, "wide", lambda: config)

    def pack(name: str, weight: np.ndarray) -> tuple[str, np.ndarray]:  # as llama.cpp's Q4_K_M mixes them
        six = "v_proj" in name or "embed" in name or ("down_proj" in name and ".1." in name)
        return ("Q6_K", pack_q6_k(weight)) if six else ("Q4_K", pack_q4_k(weight))

    tiny.save_gguf("wide", tmp_path / "model.gguf", pack=pack)
    expected = hf_logits(dequantised(tmp_path / "model.gguf"), PROMPT)
    bundle = export_bundle(tmp_path / "model.gguf", tmp_path / "bundle")
    quant = bundle.manifest.quantization
    assert quant.format_of("layers.0.mlp.down").scheme == "int4" and quant.format_of("layers.1.mlp.down").scheme == "int8"
    qkv = quant.format_of("layers.0.attn.qkv")  # int8 holds q's and k's four bits beside v's six
    assert (qkv.scheme, qkv.group_size, qkv.offset) == ("int8", 16, True)
    assert any("scales rounded to fp16, by at most 0.0005" in note or "by at most 0.00049" in note for note in quant.notes)
    assert relative_error(run_executor(bundle, PROMPT)[0], expected) < 0.08
    assert relative_error(run_portable(bundle, PROMPT), expected) < 0.01
    onnx.checker.check_model(str(bundle.path / DECODER), full_check=True)


def test_an_embedding_with_offsets_is_looked_up_as_ggml_dequantises_it(tmp_path: Path) -> None:
    tiny.save_gguf("llama_tied", tmp_path / "model.gguf", "Q4_1")
    bundle = export_bundle(tmp_path / "model.gguf", tmp_path / "bundle", lm_head="int8")
    assert any(note.startswith("--lm-head changes nothing") for note in bundle.manifest.quantization.notes)
    expected = dequantised(tmp_path / "model.gguf").get_input_embeddings().weight.detach().numpy()
    got = np.empty_like(expected)
    EmbeddingTable(bundle).lookup(np.arange(len(expected), dtype=np.int32), got)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_1"])
def test_a_reduced_head_has_its_tokens_own_rows(quantisation: str, tmp_path: Path) -> None:
    tiny.save_gguf("llama_tied", tmp_path / "model.gguf", quantisation)
    tokens = kept_tokens(tmp_path / "model.gguf")
    (tmp_path / "map.json").write_text(json.dumps({"token_ids": tokens}))
    whole = export_bundle(tmp_path / "model.gguf", tmp_path / "whole")
    cut = export_bundle(tmp_path / "model.gguf", tmp_path / "cut", vocab_map=tmp_path / "map.json")
    for name in ("weight", "scale", "offset") if quantisation == "Q4_1" else ("weight", "scale"):
        assert np.array_equal(cut.weights()[f"head.{name}"], whole.weights()[f"embed.{name}"][tokens]), name
    logits = run_executor(cut, PROMPT)[0]
    np.testing.assert_allclose(logits, run_executor(whole, PROMPT)[0][:, tokens], atol=1e-4)


def test_types_without_a_place_are_dequantised_and_said_so(tmp_path: Path) -> None:
    tiny.save_gguf("llama", tmp_path / "model.gguf", pack=lambda _, w: ("IQ4_NL", fake_iq4_nl(w)))
    bundle = export_bundle(tmp_path / "model.gguf", tmp_path / "bundle")
    quant = bundle.manifest.quantization
    assert quant.weights == "fp16" and "IQ4_NL blocks are not kept: dequantised to fp16" in quant.notes


def fake_iq4_nl(weight: np.ndarray) -> np.ndarray:
    """Blocks of 32: an fp16 scale and 16 bytes of indices into a table; any indices are a model."""
    blocks = weight.size // 32
    generator = np.random.default_rng(0)
    scale = np.full((blocks, 1), 1e-3, np.float16).view(np.uint8)
    return np.concatenate([scale, generator.integers(0, 256, (blocks, 16), np.uint8)], -1).reshape(len(weight), -1)


def test_the_real_smollm2_keeps_its_q4_1_blocks(smollm2_gguf: Path, tmp_path: Path) -> None:
    bundle = export_bundle(smollm2_gguf, tmp_path / "bundle", max_context=512)
    quant = bundle.manifest.quantization
    assert quant.kept.startswith("GGUF Q4_1") and quant.format_of("layers.7.mlp.down").offset
    # Exported afresh, int4 is 0.4 from the original; kept, only activations are rounded (the floor of the test is 0.1).
    assert Bundle.open(bundle.path).manifest.self_test.max_error <= 0.12
