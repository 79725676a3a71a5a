"""PEFT adapter directories: what is read, how strongly each projection acts, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from edgellm_ros.errors import EdgeLLMError, RequestError, UnsupportedError
from edgellm_ros.executors.lora import CONFIG, WEIGHTS, LoraTensors, make_adapter, read_adapter
from edgellm_ros.executors.lora_layout import PackedLora, fit, pack_matrices
from edgellm_ros.manifest import ModelSpec, QuantSpec

MODEL = ModelSpec("llama", "tiny", 4, 32, 80, 2, 1, 16, 64, 128, 1e-5)
Q = "base_model.model.model.layers.3.self_attn.q_proj"
UP = "base_model.model.model.layers.0.mlp.up_proj"


def write(path: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    if tensors is None:
        tensors = {**pair(Q, 4, 32, 48), **pair(UP, 4, 32, 80)}
    save_file(tensors, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    return path


def pair(module: str, rank: int, cols: int, rows: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rank + cols)
    return {
        f"{module}.lora_A.weight": rng.standard_normal((rank, cols)).astype(dtype),
        f"{module}.lora_B.weight": rng.standard_normal((rows, rank)).astype(dtype),
    }


def test_each_projection_has_its_matrices_and_its_scale(tmp_path: Path) -> None:
    tensors = {**pair(Q, 4, 32, 48, np.float16), **pair(UP, 4, 32, 80)}
    adapter = read_adapter(write(tmp_path, tensors))
    assert [(t.layer, t.target, t.scale) for t in adapter.tensors] == [(0, "up_proj", 2.0), (3, "q_proj", 2.0)]
    assert adapter.rank == 4
    up, q = adapter.tensors
    assert np.array_equal(up.b, tensors[f"{UP}.lora_B.weight"]) and up.b.dtype == np.float32
    assert np.array_equal(q.a, tensors[f"{Q}.lora_A.weight"].astype(np.float32))


def test_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    write(tmp_path)
    values = {name: torch.randn(4, 4).to(torch.bfloat16) for name in (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")}
    save_torch(values, tmp_path / WEIGHTS)
    (tensors,) = read_adapter(tmp_path).tensors
    assert np.array_equal(tensors.a, values[f"{Q}.lora_A.weight"].float().numpy())


def test_rslora_divides_by_the_root_and_patterns_name_modules(tmp_path: Path) -> None:
    tensors = {**pair(Q, 16, 32, 48), **pair(UP, 4, 32, 80)}
    settings = {"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}}
    plain = read_adapter(write(tmp_path, tensors, **settings))
    assert [t.scale for t in plain.tensors] == [3 / 4, 8 / 16]
    rooted = read_adapter(write(tmp_path, tensors, use_rslora=True, **settings))
    assert [t.scale for t in rooted.tensors] == [3 / math.sqrt(4), 8 / math.sqrt(16)]
    # `proj` ends no module's name by itself: a pattern is a whole component, as PEFT has it.
    with pytest.raises(RequestError, match=r"q_proj has lora_A \[16, 32\].* says rank 4"):
        read_adapter(write(tmp_path, tensors, rank_pattern={"proj": 16}))


def test_scales_and_patterns_are_pefts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.mlp.down_proj": 6},
        alpha_pattern={"q_proj": 5}, use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    model.save_pretrained(tmp_path)
    for t in read_adapter(tmp_path).tensors:
        block = model.base_model.model.model.layers[t.layer]
        linear = getattr(block.self_attn if t.target == "q_proj" else block.mlp, t.target)
        assert t.scale == pytest.approx(linear.scaling["default"])
        assert np.allclose(t.scale * t.b @ t.a, linear.get_delta_weight("default").detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has 'lm_head'"),
        ({"target_modules": ["model.embed_tokens"]}, "target_modules has 'model.embed_tokens'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path, config: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedError, match=what):
        read_adapter(write(tmp_path, **config))


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        f"{Q}.lora_magnitude_vector",
        "base_model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.query_key_value.lora_A.weight",
    ],
)
def test_tensors_of_other_places_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedError, match=name.replace(".", r"\.")):
        read_adapter(write(tmp_path, {**pair(Q, 4, 32, 48), name: np.ones((4, 32), np.float32)}))


def test_a_directory_that_is_not_whole_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"is no LoRA adapter: .*adapter_config\.json"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(RequestError, match=r"has only pickled weights \(adapter_model\.bin\).*save_pretrained"):
        read_adapter(tmp_path)
    write(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-10])
    with pytest.raises(RequestError, match="is damaged"):
        read_adapter(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    (tmp_path / CONFIG).write_text('{"lora_alpha": 8}')
    with pytest.raises(RequestError, match="must have r and lora_alpha"):
        read_adapter(tmp_path)
    with pytest.raises(RequestError, match=r"layers\.3\.self_attn\.q_proj lacks lora_B"):
        read_adapter(write(tmp_path, {f"{Q}.lora_A.weight": np.ones((4, 32), np.float32)}))
    bad = pair(Q, 4, 32, 48)
    bad[f"{Q}.lora_A.weight"][1, 1] = np.nan
    with pytest.raises(RequestError, match=r"q_proj\.lora_A\.weight has values that are not finite"):
        read_adapter(write(tmp_path, bad))


def test_a_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    first = read_adapter(write(tmp_path / "a")).fingerprint
    assert read_adapter(write(tmp_path / "b")).fingerprint == first
    assert read_adapter(write(tmp_path / "b", lora_alpha=9)).fingerprint != first
    a, b = np.ones((2, 3), np.float32), np.ones((4, 2), np.float32)
    made = [make_adapter((LoraTensors(0, "q_proj", a, b, scale),)).fingerprint for scale in (1.0, 1.0, 2.0)]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"r": "four"}, "r is 'four'; it must be a whole number"),
        ({"r": -1}, "r is -1"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": None}, "lora_alpha is None; it must be a finite number"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_alpha": 1e300}, r"lora_alpha is 1e\+300"),
        ({"lora_alpha": 3e38}, r"q_proj is too large|up_proj is too large"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\]; it must map"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern has 'q_proj': 2.5"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern has '\(', which is no pattern"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_name(tmp_path: Path, config: dict[str, Any], what: str) -> None:
    big = {name: values * 1e5 for name, values in {**pair(Q, 4, 32, 48), **pair(UP, 4, 32, 80)}.items()}
    with pytest.raises(RequestError, match=what):
        read_adapter(write(tmp_path, big, **config))


def test_a_projection_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    tensors = {**pair(Q, 4, 32, 48), **pair(Q.removeprefix("base_model.model."), 4, 32, 48)}
    with pytest.raises(RequestError, match=r"has lora_[AB] of .*layers\.3\.self_attn\.q_proj twice"):
        read_adapter(write(tmp_path, tensors))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "bias", "use_rslora", "peft_type",
         "base_model_name_or_path", "init_lora_weights", "modules_to_save", "anything")  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=_JSON | st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=4))
def test_no_configuration_gives_a_traceback(tmp_path: Path, config: Any) -> None:
    write(tmp_path)
    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / CONFIG).write_text(json.dumps({**whole, **config} if isinstance(config, dict) else config))
    try:
        assert read_adapter(tmp_path).rank == 4
    except EdgeLLMError as error:
        assert str(tmp_path) in str(error)


def test_the_cuda_executor_gives_its_kernels_a_bundles_adapter_projection_by_projection(tmp_path: Path) -> None:
    from edgellm_ros.executors.adapter_table import AdapterTable
    from edgellm_ros.executors.cuda import CudaExecutor
    from edgellm_ros.executors.cuda_inputs import LayerInputs

    loaded: list[tuple[int, list[Any]]] = []

    class Decoder:
        def load_adapter(self, index: int, tensors: list[Any]) -> None:
            if any(len(a) > 8 for _, _, a, _, _ in tensors):
                raise ValueError("the arena is full")
            loaded.append((index, tensors))

    executor = CudaExecutor.__new__(CudaExecutor)
    executor._decoder, executor._model = Decoder(), MODEL
    executor._max_lora_rank, executor._adapters = 16, AdapterTable(2)
    executor._inputs = LayerInputs(MODEL, QuantSpec("fp16"), None)  # type: ignore[arg-type]  # no factor: nothing is read
    adapter = read_adapter(write(tmp_path / "a", {**pair(Q, 4, 32, 32), **pair(UP, 3, 32, 80)}, rank_pattern={"up_proj": 3}))
    matrices, ranks = pack_matrices(fit(adapter, MODEL, 16), MODEL)
    assert executor.load_adapter("a", PackedLora("a", "print", matrices, ranks)) == executor.adapters["a"]
    ((index, tensors),) = loaded
    assert (index, executor.adapters["a"].fingerprint) == (1, "print")
    for original in adapter.tensors:
        (item,) = (t for t in tensors if t[:2] == (original.layer, original.target))
        assert np.allclose(item[4] * item[3] @ item[2], original.scale * original.b @ original.a, atol=1e-6)
    with pytest.raises(RequestError, match="adapter 'b': the arena is full"):
        executor.load_adapter("b", write(tmp_path / "b", pair(Q, 9, 32, 32), r=9))
    with pytest.raises(RequestError, match=r"layers\.3\.q_proj has rank 17; at most 16"):
        executor.load_adapter("b", write(tmp_path / "b", pair(Q, 17, 32, 32), r=17))
    with pytest.raises(RequestError, match=r"has rank 65; at most 16 .*none takes more than 64: merge it"):
        executor.load_adapter("b", write(tmp_path / "b2", pair(Q, 65, 32, 32), r=65))
    assert set(executor.adapters) == {"a"}
