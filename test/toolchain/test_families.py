"""Families: what their configurations and tensor lists say is what transformers builds."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers

from edgellm_ros.errors import CheckpointError
from edgellm_ros.toolchain.families import FAMILIES, Family

BY_NAME = {family.name: family for family in FAMILIES}


def _family(config: Any) -> Family:
    return next(f for f in FAMILIES if config.model_type in f.model_types)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_the_expected_tensors_are_those_that_transformers_builds(kind: str) -> None:
    config = tiny.CONFIGS[kind]()
    family = _family(config)
    model = transformers.AutoModelForCausalLM.from_config(config)
    spec = family.spec(config.to_dict(), kind)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert family.expected_tensors(spec, config.to_dict()) == built


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_a_configuration_of_minimal_keys_gets_transformers_defaults(kind: str) -> None:
    config = tiny.CONFIGS[kind]()
    needed = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "vocab_size",
              "max_position_embeddings", "num_key_value_heads")  # fmt: skip
    minimal = {key: getattr(config, key) for key in needed}
    filled = type(config)(**minimal)
    family = _family(config)
    assert family.spec(minimal, kind) == family.spec(filled.to_dict(), kind)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen2_window"])
def test_each_layers_window_is_the_one_that_transformers_attention_has(kind: str) -> None:
    config = tiny.CONFIGS[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = tuple(
        getattr(layer.self_attn, "sliding_window", None) or (config.sliding_window if kind == "mistral" else 0) or 0
        for layer in model.model.layers
    )
    ours = _family(config).spec(config.to_dict(), kind).sliding_windows
    assert (ours or (0,) * len(theirs)) == theirs
    assert any(theirs) == (kind != "qwen2")


def test_a_window_reaches_back_as_far_as_transformers_does() -> None:
    """`w` positions, itself included: changing token 0 changes position w - 1's output, not position w's."""
    model = tiny.make_model("mistral")
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    (window,) = set(_family(model.config).spec(model.config.to_dict(), "x").sliding_windows)
    ids = torch.randint(0, tiny.VOCAB_SIZE, (1, window + 4), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % tiny.VOCAB_SIZE
    with torch.no_grad():
        changed = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
    assert changed[window - 1] > 1e-6
    assert changed[window] == 0


def test_windows_by_layer_types_and_by_first_layer_agree() -> None:
    base = tiny.CONFIGS["qwen2_window"]().to_dict()
    assert base["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    by_types = BY_NAME["qwen2"].spec(base, "x")
    by_first = BY_NAME["qwen2"].spec({**base, "layer_types": None}, "x")
    assert by_types.sliding_windows == by_first.sliding_windows == (0, 16, 16)
    assert BY_NAME["qwen2"].spec({**base, "use_sliding_window": False}, "x").sliding_windows == ()


def test_a_window_as_long_as_the_context_is_none() -> None:
    base = tiny.CONFIGS["mistral"]().to_dict()
    assert BY_NAME["mistral"].spec({**base, "sliding_window": tiny.MAX_CONTEXT}, "x").sliding_windows == ()
    assert BY_NAME["mistral"].spec({**base, "sliding_window": None}, "x").sliding_windows == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_attention_heads": [4, 4]}, r"num_attention_heads is \[4, 4\]"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"head_dim": 24}, "positions turn 24 of a head's 24 channels; .* multiples of 16"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
        ({"layer_types": 3}, "layer_types is 3; it must be a list"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"use_sliding_window": True, "sliding_window": -4, "layer_types": None}, "sliding_window is -4"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"layer_types": ["full_attention"]}, "1 entries"),
    ],
)
def test_impossible_values_are_refused_with_key_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        BY_NAME["qwen2"].spec({**tiny.CONFIGS["qwen2"]().to_dict(), **change}, "x")


def test_a_rope_scaling_that_is_no_object_is_refused() -> None:
    config = tiny.CONFIGS["gemma3"]().to_dict()
    with pytest.raises(CheckpointError, match="rope_scaling is 'linear'; it must be an object"):
        BY_NAME["gemma3"].spec({**config, "rope_scaling": "linear"}, "x")
    with pytest.raises(CheckpointError, match="rope_parameters is .*'linear'.*; each kind must have an object"):
        BY_NAME["gemma3"].spec({**config, "rope_parameters": {"full_attention": "linear"}}, "x")


def test_names_types_and_architectures_belong_to_one_family_each() -> None:
    for attribute in ("model_types", "architectures", "gguf_architectures"):
        values = [value for family in FAMILIES for value in getattr(family, attribute)]
        assert len(values) == len(set(values))
    assert len(BY_NAME) == len(FAMILIES)
