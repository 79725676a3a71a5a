"""Reading checkpoints: the tensors are transformers' own, and a file that is not whole is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers

from edgellm_ros.errors import CheckpointError
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.safetensors_file import SafetensorsFile


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded") / "tiny-llama"
    tiny.save_checkpoint("llama", path, shard_size="100KB")
    return path


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["50GB", "100KB"])
def test_every_tensor_equals_transformers_own_in_every_dtype(
    tmp_path: Path, dtype: torch.dtype, shard_size: str
) -> None:
    model = tiny.save_checkpoint("qwen3", tmp_path, dtype=dtype, shard_size=shard_size)
    checkpoint = open_checkpoint(tmp_path)
    expected = {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, array in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, array, err_msg=name)
        assert checkpoint.shape(name) == array.shape
    assert checkpoint.num_bytes() == sum(p.numel() * p.element_size() for p in model.parameters())
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shard_size == "50GB")


def test_rows_are_those_of_the_whole_tensor(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        np.testing.assert_array_equal(checkpoint.read_rows(name, 5, 19), checkpoint.read(name)[5:19])


def test_a_read_tensor_is_the_callers_own(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    first = checkpoint.read("model.norm.weight")
    kept = first.copy()
    first *= 0.0
    np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), kept)


def test_source_files_are_all_that_was_read_and_exist(sharded: Path) -> None:
    names = {path.name for path in open_checkpoint(sharded).source_files() if path.is_file()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert {path.name for path in sharded.glob("*.safetensors")} <= names


def test_the_name_is_the_repositorys_in_the_hubs_cache(sharded: Path, tmp_path: Path) -> None:
    assert open_checkpoint(sharded).name() == "tiny-llama"
    cached = tmp_path / "models--someone--Small-1B" / "snapshots" / "0123abcd"
    shutil.copytree(sharded, cached)
    assert open_checkpoint(cached).name() == "Small-1B"


def test_a_tensor_that_is_not_there_is_named(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert "model.layers.99.mlp" not in checkpoint
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.99"):
        checkpoint.read("model.layers.99.mlp")


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_directory_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)


def test_pickled_weights_are_refused_with_the_conversion(copy: Path) -> None:
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        open_checkpoint(copy)
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        open_checkpoint(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(copy)


def test_a_model_saved_anew_over_its_shards_is_read_and_not_the_old_one(copy: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    shard = sorted(copy.glob("*.safetensors"))[0]
    old = shard.read_bytes()
    torch.nn.init.ones_(model.model.embed_tokens.weight)
    model.save_pretrained(copy)  # one file, beside an index of shards that are gone
    assert (copy / "model.safetensors.index.json").is_file() and not shard.exists()
    for _ in range(2):
        assert (open_checkpoint(copy).read("model.embed_tokens.weight") == 1).all()
        shard.write_bytes(old)  # or are there


def test_a_tensor_that_only_the_index_knows_is_named(copy: Path) -> None:
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    shard = sorted(copy.glob("*.safetensors"))[0].name
    index["weight_map"]["model.ghost.weight"] = shard
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{shard} lacks tensor model\.ghost\.weight"):
        open_checkpoint(copy)


def test_an_index_cannot_lead_out_of_the_directory(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(copy)


def test_several_files_without_an_index_are_refused(copy: Path) -> None:
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="which are one model"):
        open_checkpoint(copy)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_shard_is_named_wherever_it_ends(copy: Path, keep: float) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=rf"{shard.name}.*(truncated|header)"):
        open_checkpoint(copy)


def test_damaged_header_bytes_never_end_in_another_error(sharded: Path, tmp_path: Path) -> None:
    data = sorted(sharded.glob("*.safetensors"))[0].read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    generator = np.random.default_rng(0)
    bad = tmp_path / "bad.safetensors"
    for _ in range(300):
        changed = bytearray(data)
        for position in generator.integers(0, length, 3):
            changed[position] = generator.integers(32, 127)
        bad.write_bytes(changed)
        try:
            file = SafetensorsFile(bad)
            for name in file.names():
                file.read_rows(name, 0, file.shape(name)[0] if file.shape(name) else 1)
        except CheckpointError:
            pass


def test_a_header_whose_shape_and_bytes_disagree_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 16]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match=r"w of shape \(3, 4\) needs 48 bytes and has 16"):
        SafetensorsFile(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\ufffd"])
def test_a_damaged_configuration_is_named(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(copy)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(CheckpointError, match="not a GGUF"):
        open_checkpoint(path)
