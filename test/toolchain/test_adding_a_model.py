"""docs/adding-a-model.md is run as it stands: its made-up family is exported and compared with transformers."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file
from test_export import PROMPT, hf_greedy, hf_logits, run_executor, run_portable

from edgellm_ros.errors import CheckpointError, UnknownModelError
from edgellm_ros.toolchain import families
from edgellm_ros.toolchain.export import export_bundle

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


@pytest.fixture
def rover_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's file as a module of the package, then its line in the table."""
    module_text, table_line = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    module = types.ModuleType("edgellm_ros.toolchain.families.rover")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(module_text, "rover.py", "exec"), module.__dict__)
    exec(table_line, {"FAMILIES": families.FAMILIES})  # nothing else is at hand: it has to import the class
    yield
    families.FAMILIES.pop()


def _rover() -> Any:
    """The same decoder put together from transformers' parts: SmolLM3 has layers without rope."""
    config = transformers.SmolLM3Config(
        vocab_size=tiny.VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=tiny.MAX_CONTEXT, hidden_act="gelu_pytorch_tanh",
        no_rope_layers=[1, 1, 0], tie_word_embeddings=False, attn_implementation="eager", bos_token_id=1, eos_token_id=2,
        pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj = torch.nn.Linear(64, 64, bias=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.12 * noise)
    return model


def _save(model: Any, path: Path, **change: Any) -> Path:
    path.mkdir()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    for layer in range(3):
        stem = f"model.layers.{layer}.mlp."
        parts = [tensors.pop(f"{stem}{part}_proj.weight") for part in ("gate", "up")]
        tensors[f"{stem}wheels.weight"] = torch.cat(parts)
    save_file(tensors, path / "model.safetensors")
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "hidden_act", "rms_norm_eps")  # fmt: skip
    config = {key: getattr(model.config, key) for key in keys}
    config |= {"model_type": "rover", "architectures": ["RoverForCausalLM"], **change}
    (path / "config.json").write_text(json.dumps(config))
    tiny.save_tokenizer(path)
    return path


def test_the_pages_family_is_exported_and_computes_what_transformers_does(rover_family: None, tmp_path: Path) -> None:
    model = _rover()
    bundle = export_bundle(_save(model, tmp_path / "rover"), tmp_path / "bundle", weights="fp32")
    assert bundle.manifest.model.family == "rover" and bundle.manifest.model.layer_ropes == ("global", "global", "none")
    expected = hf_logits(model, PROMPT)
    logits, tokens = run_executor(bundle, PROMPT, 32)
    assert np.abs(logits - expected).max() < 3e-4
    assert tokens == hf_greedy(model, PROMPT, 32)
    assert np.abs(run_portable(bundle, PROMPT) - expected).max() < 3e-4


def test_what_the_pages_family_does_not_have_is_refused(rover_family: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hidden_act is 'silu'; the rover family has gelu_pytorch_tanh"):
        export_bundle(_save(_rover(), tmp_path / "rover", hidden_act="silu"), tmp_path / "bundle")


def test_without_the_line_in_the_table_the_family_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="'rover'"):
        export_bundle(_save(_rover(), tmp_path / "rover"), tmp_path / "bundle")
