"""Rotary tables: equal to transformers' modules for every kind of scaling and every way of writing it down."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from edgellm_ros.errors import CheckpointError
from edgellm_ros.toolchain.families import FAMILIES
from edgellm_ros.toolchain.rope import read_rope, read_rotary_dim, rope_frequencies, rope_tables, short_context

LLAMA = FAMILIES[0]
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "llama3.1": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "llama3.2": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn": {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn_betas": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "beta_fast": 20.0, "beta_slow": 2.0,
                   "original_max_position_embeddings": 2048, "truncate": False},
    "yarn_attention": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "attention_factor": 1.3,
                       "original_max_position_embeddings": 4096},
    "yarn_mscale": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.2, "mscale_all_dim": 0.8,
                    "original_max_position_embeddings": 4096},
    "yarn_without_original": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
}  # fmt: skip


def _config(rope: dict[str, Any], head_dim: int = 128) -> dict[str, Any]:
    return {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
            "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
            "rope_parameters": rope}  # fmt: skip


def _transformers_tables(config: dict[str, Any], positions: range) -> tuple[np.ndarray, np.ndarray]:
    rotary = LlamaRotaryEmbedding(transformers.LlamaConfig(**config))
    cos, sin = rotary(torch.zeros(1, 1, 1), torch.tensor([list(positions)]))
    half = cos.shape[-1] // 2
    return cos[0, :, :half].numpy(), sin[0, :, :half].numpy()


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_tables_equal_transformers_rotary_module(name: str, head_dim: int) -> None:
    config = _config(ROPES[name], head_dim)
    ours = rope_tables(LLAMA.spec(config, "x"), 9000)
    for table, expected in zip(ours, _transformers_tables(config, range(9000)), strict=True):
        assert table.dtype == np.float32
        assert table.shape == (9000, head_dim // 2)
        one_rounding = 1e-6 + np.arange(9000)[:, None] * 1.2e-7  # of the frequency, carried to each position
        assert (np.abs(table - expected) <= one_rounding).all()


@pytest.mark.parametrize("name", ROPES)
def test_the_older_writing_means_the_same(name: str) -> None:
    config = _config(dict(ROPES[name]))
    older = dict(config)
    rope = older.pop("rope_parameters")
    older["rope_theta"] = rope["rope_theta"]
    older["rope_scaling"] = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    older["rope_scaling"]["type"] = rope["rope_type"]  # the key before transformers 4.45
    assert read_rope(older, 131072) == read_rope(config, 131072)


def test_no_rope_settings_mean_base_10000() -> None:
    assert read_rope({}, 64) == (10000.0, {})
    assert read_rope({"rope_scaling": None, "rope_theta": 5e5}, 64) == (5e5, {})


def test_factors_divide_frequencies_one_by_one() -> None:
    spec = LLAMA.spec(_config({"rope_type": "default", "rope_theta": 10000.0}, 16), "x")
    factors = [1.0, 1.0, 2.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    scaled = dataclasses.replace(spec, rope_scaling={"rope_type": "factors", "factors": factors})
    np.testing.assert_allclose(rope_frequencies(scaled)[0] * factors, rope_frequencies(spec)[0], rtol=1e-6)
    short = dataclasses.replace(spec, rope_scaling={"rope_type": "factors", "factors": [1.0]})
    with pytest.raises(CheckpointError, match="1 rope factors; 16 turned channels have 8"):
        rope_tables(short, 4)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_tables_equal_every_tiny_models_own_module(kind: str) -> None:
    config = tiny.CONFIGS[kind]()
    family = next(f for f in FAMILIES if config.model_type in f.model_types)
    module = transformers.AutoModel.from_config(config).rotary_emb
    spec = family.spec(config.to_dict(), kind)
    layer_types = {"global": "full_attention", "local": "sliding_attention"} if family.name == "gemma3" else {}
    for rope in spec.rope_tables():
        which = {"layer_type": layer_types[rope]} if layer_types else {}
        theirs = module(torch.zeros(1, 1, 1), torch.arange(tiny.MAX_CONTEXT)[None], **which)
        for table, expected in zip(rope_tables(spec, tiny.MAX_CONTEXT, rope), theirs, strict=True):
            np.testing.assert_allclose(table, expected[0, :, : table.shape[1]].numpy(), atol=5e-5)
            assert table.shape[1] == expected.shape[2] // 2


@pytest.mark.parametrize("kind", ["phi3_longrope", "phi3_partial"])
def test_the_context_chooses_longropes_list_as_the_length_does_in_transformers(kind: str) -> None:
    config = tiny.CONFIGS[kind]()
    module = transformers.AutoModel.from_config(config).rotary_emb
    spec = next(f for f in FAMILIES if f.name == "phi3").spec(config.to_dict(), kind)
    original = config.rope_parameters["original_max_position_embeddings"]
    assert short_context(spec) == original < tiny.MAX_CONTEXT
    tables = []
    for context in (original, original + 1):
        cos, sin = module(torch.zeros(1, 1, 1), torch.arange(context)[None])
        ours = rope_tables(dataclasses.replace(spec, max_context=context), context)
        tables.append(ours[0])
        np.testing.assert_allclose(ours[0], cos[0, :, : cos.shape[2] // 2].numpy(), atol=5e-5)
        np.testing.assert_allclose(ours[1], sin[0, :, : sin.shape[2] // 2].numpy(), atol=5e-5)
    assert np.abs(tables[0] - tables[1][:original]).max() > 0.1, "the two lists differ"


def test_a_phi_without_its_original_context_has_the_4096_of_transformers() -> None:
    raw = tiny.CONFIGS["phi3_longrope"]().to_dict() | {"max_position_embeddings": 8192}
    raw.pop("original_max_position_embeddings")
    config = transformers.Phi3Config.from_dict(json.loads(json.dumps(raw)))
    spec = next(f for f in FAMILIES if f.name == "phi3").spec(raw, "x")
    module = transformers.AutoModel.from_config(config).rotary_emb
    assert short_context(spec) == config.original_max_position_embeddings == 4096
    assert spec.rope_scaling["attention_factor"] == module.attention_scaling > 1


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_the_early_names_of_longrope_mean_the_same(name: str) -> None:
    config = tiny.CONFIGS["phi3_longrope"]().to_dict()
    rope = config["rope_parameters"]
    older = {**config, "rope_scaling": {**rope, "type": name, "rope_type": None}, "rope_parameters": None}
    assert read_rope(older, tiny.MAX_CONTEXT) == read_rope(config, tiny.MAX_CONTEXT)


@pytest.mark.parametrize("share", [0.0, 1.5, 0.2, "half"])
def test_a_share_of_channels_that_cannot_be_turned_is_refused(share: object) -> None:
    with pytest.raises(CheckpointError, match=f"partial_rotary_factor.*{share}"):
        read_rotary_dim({"rope_parameters": {"partial_rotary_factor": share}}, 16)


@pytest.mark.parametrize("kind", ["dynamic", "mrope", 7])
def test_an_unknown_kind_is_refused_by_name(kind: object) -> None:
    with pytest.raises(CheckpointError, match=rf"rope type {kind!r} is not supported; supported are .*yarn"):
        read_rope({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, 64)
    spec = LLAMA.spec(_config(ROPES["default"]), "x")
    with pytest.raises(CheckpointError, match="not supported"):
        rope_tables(dataclasses.replace(spec, rope_scaling={"rope_type": kind}), 4)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear"}, "no factor"),
        ({"rope_type": "linear", "factor": 0}, "factor is 0"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor is nan"),
        ({"rope_type": "yarn", "factor": "4"}, "factor is '4'"),
        ({"rope_type": "yarn", "factor": 4, "mscale": "x", "mscale_all_dim": 1.0}, "mscale is 'x'"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "must be above"),
        ({"rope_theta": -1.0}, "rope_theta is -1"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_type": "longrope", "long_factor": [1.0]}, "short_factor is None"),
        ({"rope_type": "su", "short_factor": [1.0], "long_factor": [1.0, -1]}, "long_factor is -1"),
        ({"full_attention": {"rope_theta": 1e4}}, "not one flat object"),
        (["linear"], "not one flat object"),
    ],
)
def test_impossible_settings_are_refused_with_their_value(rope: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_rope({"rope_parameters": rope}, 64)
