"""GGUF files: the same tensors and configuration as the safetensors directory of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import transformers

from edgellm_ros.errors import CheckpointError
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.detect import check_tensors, load_spec
from edgellm_ros.toolchain.gguf_file import GgufFile
from edgellm_ros.toolchain.rope import rope_tables


@pytest.mark.parametrize("kind", tiny.GGUF_KINDS)
def test_tensors_and_spec_are_those_of_the_safetensors_checkpoint(kind: str, tmp_path: Path) -> None:
    tiny.save_checkpoint(kind, tmp_path / "hf")
    tiny.save_gguf(kind, tmp_path / "model.gguf")
    directory, file = open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "model.gguf")
    assert sorted(file.names()) == sorted(directory.names())
    for name in directory.names():
        np.testing.assert_array_equal(file.read(name), directory.read(name), err_msg=name)
    (family, spec), (family_gguf, spec_gguf) = load_spec(directory), load_spec(file)
    check_tensors(file, family_gguf, spec_gguf)
    assert family_gguf is family
    for field in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_context",
                  "sliding_windows", "qk_norm", "tied_head", "intermediate_size"):  # fmt: skip
        assert getattr(spec_gguf, field) == getattr(spec, field), field
    assert spec_gguf.rms_norm_eps == pytest.approx(spec.rms_norm_eps, rel=1e-6)
    for ours, theirs in zip(rope_tables(spec_gguf, 200), rope_tables(spec, 200), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert file.token_spec() == directory.token_spec()
    assert file.chat_template() == directory.chat_template()


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_quantised_tensors_are_what_transformers_makes_of_them(kind: str, quantisation: str, tmp_path: Path) -> None:
    tiny.save_gguf(kind, tmp_path / "model.gguf", quantisation)
    _assert_equals_transformers(tmp_path / "model.gguf")


def test_the_real_smollm2_file_is_what_transformers_makes_of_it(smollm2_gguf: Path, smollm2_transformers: Any) -> None:
    _assert_equals(smollm2_gguf, smollm2_transformers)


def _assert_equals_transformers(path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    _assert_equals(path, model)


def _assert_equals(path: Path, model: Any) -> None:
    checkpoint = open_checkpoint(path)
    check_tensors(checkpoint, *load_spec(checkpoint))
    expected = dict(model.named_parameters())
    assert sorted(expected) == sorted(checkpoint.names())
    for name, parameter in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), parameter.detach().numpy(), err_msg=name)


@pytest.mark.parametrize("quantisation", ["Q4_K", "Q5_K", "Q6_K", "Q3_K", "IQ4_NL"])
def test_rows_of_a_quantised_tensor_are_those_of_the_whole(quantisation: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[quantisation]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns = 2 * max(block, 256)
    raw = np.random.default_rng(3).integers(0, 60, (7, columns // block * block_bytes), dtype=np.uint8)
    path = tmp_path / "one.gguf"
    _write(path, {"token_embd.weight": (raw, kind)})
    file = GgufFile(path)
    whole = gguf.dequantize(raw, kind)
    assert file.shape("token_embd.weight") == (7, columns)
    np.testing.assert_array_equal(file.read_rows("token_embd.weight", 0, 7), whole)
    np.testing.assert_array_equal(file.read_rows("token_embd.weight", 2, 5), whole[2:5])


def test_metadata_and_tensors_are_those_of_the_gguf_packages_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny.save_gguf("llama_yarn", path)
    reader, file = gguf.GGUFReader(path), GgufFile(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == theirs
    assert {t.name: tuple(t.shape.tolist()[::-1]) for t in reader.tensors} == {n: file.shape(n) for n in file.names()}


def test_a_file_cut_anywhere_is_refused_and_named(tmp_path: Path) -> None:
    path, cut = tmp_path / "model.gguf", tmp_path / "cut.gguf"
    tiny.save_gguf("llama", path)
    data = path.read_bytes()
    for length in [4, 5, 20, 30, 100, 1000, *range(2000, len(data), len(data) // 37), len(data) - 40]:
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf.*(truncated|damaged)"):
            open_checkpoint(cut)


def test_damaged_header_bytes_never_end_in_another_error(tmp_path: Path) -> None:
    path, bad = tmp_path / "model.gguf", tmp_path / "bad.gguf"
    tiny.save_gguf("llama", path)
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(200):
        changed = bytearray(data)
        for position in generator.integers(4, 2500, 3):
            changed[position] = generator.integers(256)
        bad.write_bytes(changed)
        try:
            checkpoint = open_checkpoint(bad)
            check_tensors(checkpoint, *load_spec(checkpoint))
        except Exception as error:
            assert error.__class__.__module__ == "edgellm_ros.errors", repr(error)


def test_a_withdrawn_type_of_block_is_named_and_not_called_damage(tmp_path: Path) -> None:
    tiny.save_gguf("llama", tmp_path / "model.gguf", "Q4_0")
    data = (tmp_path / "model.gguf").read_bytes()
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8  # after its two sizes
    assert data[at] == gguf.GGMLQuantizationType.Q4_0
    (tmp_path / "model.gguf").write_bytes(data[:at] + bytes([31]) + data[at + 1 :])
    with pytest.raises(CheckpointError, match=r"attn_q\.weight is of type 31, Q4_0_4_4, .*: take the model's Q4_0"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_part_of_a_split_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    _write(tmp_path / "part.gguf", {}, **{"split.count": 3})
    with pytest.raises(CheckpointError, match=r"3 parts.*llama-gguf-split --merge"):
        open_checkpoint(tmp_path / "part.gguf")


@pytest.mark.parametrize("key", ["attention.scale", "logit_scale"])
def test_metadata_of_another_decoder_is_refused_by_name(key: str, tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", {}, **{f"llama.{key}": 8})
    with pytest.raises(CheckpointError, match=rf"llama\.{key} is 8"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_llama_of_experts_is_left_out_as_it_is_elsewhere(tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", {}, **{"llama.expert_count": 8})  # Mixtral's files call themselves llama
    with pytest.raises(CheckpointError, match=r"is left out: num_experts is 8, so it is a mixture of experts"):
        open_checkpoint(tmp_path / "model.gguf")


def test_an_unknown_rope_setting_is_refused_by_name(tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", {}, **{"llama.attention.key_length": 16, "llama.rope.scaling.attn_factor": 2, "llama.rope.scaling.factor": 2,
                                           "llama.rope.scaling.type": "yarn"})  # fmt: skip
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.attn_factor beside yarn"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_directory_with_one_gguf_file_opens_it_and_with_two_asks(tmp_path: Path) -> None:
    tiny.save_gguf("llama", tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).path.name == "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files"):
        open_checkpoint(tmp_path)


def _write(path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]], **keys: int | str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
