"""Gemma 3 with images: its decoder is exported alone, and computes what transformers' whole model says of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
import transformers
from test_export import PROMPT, run_executor

from edgellm_ros.errors import CheckpointError
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.detect import load_spec
from edgellm_ros.toolchain.export import export_bundle


def save_model_with_images(path: Path) -> Any:
    text = {**tiny.CONFIGS["gemma3"]().to_dict(), "rope_parameters": None}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=317, boi_token_index=318,
        eoi_token_index=319, eos_token_id=[2, 7], attn_implementation="eager",
    )  # fmt: skip
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(0.12 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    tiny.save_tokenizer(path)
    return model


@pytest.mark.parametrize("names", ["as on the hub", "as transformers 4.52 wrote them"])
def test_the_decoder_alone_says_of_text_what_the_whole_model_does(names: str, tmp_path: Path) -> None:
    model = save_model_with_images(tmp_path / "source")
    if names != "as on the hub":
        file = tmp_path / "source" / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        renamed = {f"model.{name}".replace("model.language_model.model.", "model.language_model."): tensor
                   for name, tensor in tensors.items()}  # fmt: skip
        assert any(name.startswith("model.language_model.layers.0.") for name in renamed)
        safetensors.torch.save_file(renamed, file)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle", weights="fp32")
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(PROMPT[None].astype(np.int64))).logits[0].numpy()
    assert bundle.manifest.model.family == "gemma3" and bundle.manifest.tokens.stop_ids[:2] == (2, 7)
    assert np.abs(run_executor(bundle, PROMPT)[0] - expected).max() < 3e-4
    source = open_checkpoint(tmp_path / "source")
    assert source.num_bytes() == 4 * sum(p.numel() for n, p in model.named_parameters() if "language_model" in n)


def test_a_configuration_that_says_only_what_differs_is_transformers_own(tmp_path: Path) -> None:
    """As Gemma 3 4B is published."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
             "eos_token_id": [1, 106]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(whole))
    safetensors.torch.save_file({"language_model.model.norm.weight": torch.zeros(2560)}, tmp_path / "model.safetensors")
    family, spec = load_spec(open_checkpoint(tmp_path))
    config = transformers.Gemma3TextConfig(**text)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert family.expected_tensors(spec, text) == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert spec.rope_scaling == {"rope_type": "linear", "factor": 8.0} and spec.local_rope_theta == 10000.0
    assert [i for i, window in enumerate(spec.sliding_windows) if not window] == [5, 11, 17, 23, 29]
    assert spec.max_context == config.max_position_embeddings


def test_what_is_no_such_model_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"vision_tower.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    whole: dict[str, Any] = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="no tensors of a decoder"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**whole, "quantization_config": {"quant_method": "awq", "bits": 4}}))
    with pytest.raises(CheckpointError, match="quantised model for images and text"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**whole, "text_config": "none"}))
    with pytest.raises(CheckpointError, match="has no text_config"):
        open_checkpoint(tmp_path)
