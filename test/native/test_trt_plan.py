"""What an engine's decode loop would hold, decided without TensorRT and without a GPU: sizes, bounds, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import GRAPH, MODEL, OPTIONS, make_bundle, write_engine

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.errors import UnsupportedError
from edgellm_ros.executors.engine_settings import engine_settings
from edgellm_ros.executors.engines import Engine
from edgellm_ros.manifest import LinearFormat, QuantSpec

NATIVE, NO_MODULE = native.import_module()
pytestmark = pytest.mark.skipif(bool(NO_MODULE), reason=NO_MODULE)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return with_embedding(make_bundle(tmp_path / "bundle"), LinearFormat("int8", 32))


def with_embedding(bundle: Bundle, form: LinearFormat) -> Bundle:
    quant = QuantSpec("int4", 32, "int8", form.scheme, formats={"embed": form})
    return Bundle(bundle.path, replace(bundle.manifest, quantization=quant))


def settings(engine: Engine, bundle: Bundle, **config: Any) -> Any:
    return engine_settings(NATIVE, engine, bundle, EngineConfig(**config))


def test_the_limits_are_those_of_the_engines_profiles(bundle: Bundle) -> None:
    found = settings(write_engine(bundle), bundle)
    assert (found.decode_tokens, found.loop.max_tokens, found.max_logits) == (8, 32, 16)
    assert (found.engine_capacity, found.loop.capacity, found.max_batch) == (64, 64, 1)
    single = settings(write_engine(bundle, "single", replace(OPTIONS, profile="single")), bundle)
    assert single.decode_tokens == single.loop.max_tokens == 32


def test_where_slots_decode_together_one_place_is_for_idle_ones(bundle: Bundle) -> None:
    engine = write_engine(bundle)
    fast = settings(engine, bundle, decode_batching="fast")
    assert (fast.loop.capacity, fast.max_batch) == (63, 2)
    assert settings(engine, bundle, decode_batching="fast", max_slots=1).loop.capacity == 64
    assert settings(engine, bundle, decode_batching="fast", max_context=40).loop.capacity == 40


@pytest.mark.parametrize("group", [0, -32, 48])
def test_an_int8_embedding_without_whole_groups_is_refused(bundle: Bundle, group: int) -> None:
    found = settings(write_engine(bundle), bundle)
    found.loop.group_size = group
    with pytest.raises(ValueError, match=f"an embedding of {MODEL.hidden_size} columns has no groups of {group}"):
        NATIVE.plan_trt_memory(found, 0)


@pytest.mark.parametrize("slots", [1, 4])
def test_the_plan_holds_cache_context_and_embedding(bundle: Bundle, slots: int) -> None:
    plan = NATIVE.plan_trt_memory(settings(write_engine(bundle), bundle, max_slots=slots), 12345 * 256)
    assert plan["kv_cache"] == slots * 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * 64 * 2
    assert plan["context"] == 12345 * 256
    assert plan["weights"] == MODEL.vocab_size * MODEL.hidden_size * (1 + 2 / 32)
    assert plan["total"] == sum(size for name, size in plan.items() if name != "total")


def test_adapters_take_places_of_the_rank_that_was_asked_for(bundle: Bundle) -> None:
    engine = write_engine(bundle, options=replace(OPTIONS, lora=True))

    def adapters(**config: Any) -> int:
        return int(NATIVE.plan_trt_memory(settings(engine, bundle, **config), 0)["adapters"])

    per_rank = sum(
        parts * 2 * (into + out)
        for into, out, parts in ((64, 96, 3), (64, 64, 1), (64, 192, 2), (96, 64, 1))
    ) * MODEL.num_layers  # fmt: skip
    assert adapters(max_loras=0) == 256, "an address for inputs of rank 0"
    for loras, rank in ((1, 8), (3, 8), (3, 2)):
        padding = 256 * 8 * MODEL.num_layers
        assert 0 <= adapters(max_loras=loras, max_lora_rank=rank) - 256 - loras * rank * per_rank <= loras * padding


@pytest.mark.parametrize(
    ("form", "expected"),
    [(LinearFormat("int8", 32), ("int8", 32)), (LinearFormat("fp16"), ("fp16", 0)), (LinearFormat("fp32"), ("fp16", 0))],
)
def test_the_embedding_keeps_its_digits(bundle: Bundle, form: LinearFormat, expected: tuple[str, int]) -> None:
    loop = settings(write_engine(bundle), with_embedding(bundle, form)).loop
    assert (loop.embedding_format.name, loop.group_size) == expected


@pytest.mark.parametrize(("options", "order"), [(OPTIONS, "apart"), (replace(OPTIONS, dialect="plugin"), "together")])
def test_both_orders_of_the_cache_have_the_same_size(bundle: Bundle, options: BuildOptions, order: str) -> None:
    plan = NATIVE.plan_trt_memory(settings(write_engine(bundle, order, options), bundle), 0)
    assert plan["kv_cache"] == 4 * 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * 64 * 2


@pytest.mark.parametrize(("dialect", "windows"), [("standard", 2), ("plugin", 0)])
def test_trees_take_masks_for_each_window_or_bits(tmp_path: Path, dialect: str, windows: int) -> None:
    model = replace(MODEL, sliding_windows=(16, 0))
    bundle = with_embedding(make_bundle(tmp_path / "windows", model), LinearFormat("int8", 32))
    found = [
        settings(write_engine(bundle, key, replace(OPTIONS, dialect=dialect, trees=trees)), bundle)
        for key, trees in (("without", False), ("with", True))
    ]
    assert [each.loop.max_verify_tokens for each in found] == [0, OPTIONS.max_verify]
    without, with_trees = (NATIVE.plan_trt_memory(each, 0)["workspace"] for each in found)
    masks = 2 * 64 * (32 + 4 * 1)  # fp16, of a context of 64: a prompt's 32 tokens, and one of each of 4 slots
    assert windows * masks <= with_trees - without <= windows * masks + 8 * 1024, "more is padding"


def test_trees_beyond_what_the_engine_takes_are_refused(bundle: Bundle) -> None:
    found = settings(write_engine(bundle, options=replace(OPTIONS, trees=True)), bundle)
    loop = found.loop
    loop.max_verify_tokens = 9
    found.loop = loop
    with pytest.raises(ValueError, match="trees of 9 nodes exceed the 8 tokens .* build it with a larger --max-verify"):
        found.check()
    plain = settings(write_engine(bundle, "plain"), bundle)
    loop = plain.loop
    loop.max_verify_tokens = 4
    plain.loop = loop
    with pytest.raises(ValueError, match="takes no trees; build it with --trees"):
        plain.check()


def test_a_cache_in_fp8_is_half_as_large_and_of_engines_with_plugins_alone(bundle: Bundle) -> None:
    options = replace(OPTIONS, dialect="plugin")
    sizes = {}
    for kv_cache in ("auto", "fp8"):
        found = settings(write_engine(bundle, kv_cache, replace(options, kv_cache=kv_cache)), bundle)
        sizes[found.loop.kv_format.name] = NATIVE.plan_trt_memory(found, 0)["kv_cache"]
        assert not found.is_bf16
    assert sizes["fp16"] == 2 * sizes["fp8"]
    with pytest.raises(UnsupportedError, match="an engine's cache is what it computes in, fp16 or bf16, or fp8 with plugins"):
        settings(write_engine(bundle, "standard", replace(OPTIONS, kv_cache="fp8")), bundle)


def test_a_cache_whose_slots_tensorrt_could_not_take_is_refused(tmp_path: Path) -> None:
    model = replace(MODEL, head_dim=8, num_heads=8)
    bundle = with_embedding(make_bundle(tmp_path / "odd", model), LinearFormat("int8", 32))
    engine = write_engine(bundle, options=replace(OPTIONS, max_context=63, max_input=32))
    with pytest.raises(UnsupportedError, match="multiples of 256; build the engine with a --max-context"):
        settings(engine, bundle)
    assert settings(engine, bundle, max_slots=1).loop.capacity == 63


def test_activations_in_fp32_are_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "wide", graph=replace(GRAPH, activation_dtype="float32"))
    with pytest.raises(UnsupportedError, match="computes in float32; the decode loop takes fp16 and bf16"):
        settings(write_engine(bundle), bundle)


def test_a_wrong_role_is_no_tensor_of_an_engine() -> None:
    config = NATIVE.TrtDecoderConfig()
    with pytest.raises(ValueError, match="role bias"):
        config.set_tensors([("bias", "bias", -1, [1], 0, 0)])
