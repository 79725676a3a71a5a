"""Detection: the right family, or an error that says what was found; tensors that do not fit are named and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from edgellm_ros.errors import CheckpointError, UnknownModelError
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.detect import check_tensors, detect, load_spec
from edgellm_ros.toolchain.families import FAMILIES
from edgellm_ros.toolchain.families.left_out import LEFT_OUT


def _save(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors or {"a": np.zeros(1, np.float32)}, path / "model.safetensors")
    return path


@pytest.fixture
def tiny_llama(tmp_path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    tiny.save_checkpoint("llama_tied", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    return config, load_file(tmp_path / "source" / "model.safetensors")


def _check(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    check_tensors(checkpoint, *load_spec(checkpoint))


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_every_familys_own_checkpoint_is_detected_and_fits(kind: str, tmp_path: Path) -> None:
    tiny.save_checkpoint(kind, tmp_path)
    assert load_spec(open_checkpoint(tmp_path))[0].name == kind.split("_")[0]
    _check(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "architectures", "family"),
    [
        ("llama", ["LlamaForCausalLM"], "llama"),
        ("llama", None, "llama"),
        (None, ["MistralForCausalLM"], "mistral"),
        ("qwen2", ["Qwen2ForCausalLM"], "qwen2"),
        ("qwen3", [], "qwen3"),
    ],
)
def test_either_of_model_type_and_architectures_is_enough(
    model_type: str | None, architectures: list[str] | None, family: str, tmp_path: Path
) -> None:
    config = {"model_type": model_type, "architectures": architectures}
    assert detect(open_checkpoint(_save(tmp_path, config))).name == family


@pytest.mark.parametrize(
    ("model_type", "architectures"),
    [
        ("bloom", ["BloomForCausalLM"]),
        ("opt", ["Gemma3ForCausalLM"]),
        ("llama", ["LlamaForSequenceClassification"]),
        ("falcon", ["LlamaForCausalLM"]),
        (None, None),
        (["llama"], "LlamaForNothing"),
    ],
)
def test_an_unknown_family_is_named_beside_the_known_ones(model_type: Any, architectures: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_save(tmp_path, {"model_type": model_type, "architectures": architectures}))
    with pytest.raises(UnknownModelError) as caught:
        detect(checkpoint)
    text = str(caught.value)
    assert repr(model_type) in text
    for known in ("llama", "mistral", "qwen2", "qwen3", "LlamaForCausalLM"):
        assert known in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}, "Llama 4 is a mixture of experts"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3 MoE is a mixture.*Qwen3 1.7B"),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "take a dense model, such as Mistral 7B"),
        ({"model_type": "newest", "num_local_experts": 8}, "num_local_experts is 8, so it is a mixture of experts"),
        ({"model_type": "qwen3_5_moe", "text_config": {"num_experts": 256}}, "num_experts is 256, so it is a mixture"),
        ({"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}, "images and text.*Qwen2.5"),
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "Gemma 2 is .* capped attention scores"),
    ],
)
def test_families_that_are_left_out_are_refused_by_name_with_what_to_take(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnknownModelError, match=f"is left out: .*{message}"):
        detect(open_checkpoint(_save(tmp_path, config)))


def test_no_family_is_both_known_and_left_out() -> None:
    assert not set(LEFT_OUT) & {kind for family in FAMILIES for kind in family.model_types}


@pytest.mark.parametrize(("architecture", "message"), [("gemma3", "Hugging Face directory only"), ("qwen3moe", "mixture")])
def test_a_gguf_file_of_a_family_that_is_not_read_from_gguf_says_so(
    architecture: str, message: str, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnknownModelError, match=message):
        detect(open_checkpoint(tmp_path / "x.gguf"))


def test_an_unknown_gguf_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnknownModelError, match=r"general\.architecture 'mamba'.*llama.*qwen3"):
        detect(open_checkpoint(tmp_path / "x.gguf"))


def test_missing_extra_and_wrongly_shaped_tensors_are_counted_and_named(
    tiny_llama: tuple[dict[str, Any], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    config, tensors = tiny_llama
    for layer in range(3):
        for stem in ("q_proj", "k_proj"):
            del tensors[f"model.layers.{layer}.self_attn.{stem}.weight"]
    tensors["model.layers.0.self_attn.rotary_phase"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(65, np.float32)
    with pytest.raises(CheckpointError) as caught:
        _check(_save(tmp_path / "bad", config, tensors))
    text = str(caught.value)
    assert "6 missing (model.layers.0.self_attn.q_proj.weight" in text
    assert "and 2 more" in text
    assert "1 extra (model.layers.0.self_attn.rotary_phase)" in text
    assert "1 wrongly shaped (model.norm.weight is [65] instead of [64])" in text


def test_more_layers_than_the_configuration_says_are_extra(
    tiny_llama: tuple[dict[str, Any], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    config, tensors = tiny_llama
    with pytest.raises(CheckpointError, match=r"9 extra \(model\.layers\.2\."):
        _check(_save(tmp_path / "bad", {**config, "num_hidden_layers": 2}, tensors))


def test_saved_rotary_tables_are_ignored(
    tiny_llama: tuple[dict[str, Any], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    config, tensors = tiny_llama
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    _check(_save(tmp_path / "good", config, tensors))


def test_a_head_beside_a_tied_one_must_equal_the_embedding(
    tiny_llama: tuple[dict[str, Any], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    config, tensors = tiny_llama
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    _check(_save(tmp_path / "same", config, tensors))
    tensors["lm_head.weight"][-1, -1] += 1e-3
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings, yet lm_head\.weight differs"):
        _check(_save(tmp_path / "other", config, tensors))


def test_an_untied_model_without_its_head_is_refused(
    tiny_llama: tuple[dict[str, Any], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    config, tensors = tiny_llama
    with pytest.raises(CheckpointError, match=r"1 missing \(lm_head\.weight\)"):
        _check(_save(tmp_path / "bad", {**config, "tie_word_embeddings": False}, tensors))
