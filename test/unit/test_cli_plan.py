"""`edgellm plan`: the memory of the native module's own plan, speed from the bandwidth, and what would fit."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from cli_bundle import write_bundle
from engines import GRAPH, MODEL, write_engine

from edgellm_ros import native
from edgellm_ros.benchmark.budget import estimate_parts, kv_bytes_per_token, make_budget, predict_ms, remedies
from edgellm_ros.benchmark.costs import decode_bytes, kv_bytes
from edgellm_ros.benchmark.devices import DEVICES, Device
from edgellm_ros.benchmark.random_bundle import SCHEMES, SHAPES, RandomBundle
from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.manifest import LinearFormat, ModelSpec


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.skipif(bool(native.import_module()[1]), reason=native.import_module()[1])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_is_within_five_percent_of_the_native_plan(shape: str, scheme: str) -> None:
    from edgellm_ros.executors.cuda import plan_memory

    bundle = RandomBundle(shape, scheme)
    other = EngineConfig(max_slots=1, max_context=16384, prefill_chunk=2048, kv_cache="fp8")
    wide = EngineConfig(fp8_prefill=False)
    for config, l2_bytes in itertools.product((EngineConfig(), other, wide), (None, 4 << 20, 32 << 20, 72 << 20)):
        plan = plan_memory(bundle, config, l2_bytes)
        parts = estimate_parts(SHAPES[shape], SCHEMES[scheme], config, l2_bytes)
        assert parts["workspace"] == pytest.approx(plan["workspace"], rel=0.15)
        assert sum(parts.values()) == pytest.approx(plan["total"], rel=0.05)
        assert (parts["kv_cache"], parts["graphs"]) == (plan["kv_cache"], plan["graphs"])
        assert parts["weights"] == pytest.approx(plan["weights"], rel=0.01)
        assert "adapters" not in plan and "adapters" not in parts


@pytest.mark.skipif(bool(native.import_module()[1]), reason=native.import_module()[1])
@pytest.mark.parametrize(("count", "rank"), [(1, 16), (4, 20), (2, 64)])
def test_places_for_adapters_are_counted_as_the_native_plan_counts_them(count: int, rank: int) -> None:
    from edgellm_ros.executors.cuda import plan_memory

    config = EngineConfig(max_loras=count, max_lora_rank=rank)
    plan = plan_memory(RandomBundle("llama-1b", "int4"), config)
    parts = estimate_parts(SHAPES["llama-1b"], SCHEMES["int4"], config)
    assert parts["adapters"] == pytest.approx(plan["adapters"], rel=0.02)
    assert parts["graphs"] == plan["graphs"]
    assert sum(parts.values()) == pytest.approx(plan["total"], rel=0.05)


def test_the_command_shows_what_adapters_take(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--shape", "llama-8b", "--device", "thor", "--json", "--formula"]
    with_them = json.loads(run(capsys, *command, "--max-loras", "2", "--max-lora-rank", "16")[1])[0]
    without = json.loads(run(capsys, *command)[1])[0]
    # 8B: rank 16 of every projection is 41.9 million numbers, as PEFT counts them, here with 2 bytes each
    assert with_them["parts"]["adapters"] == 2 * 2 * 41_943_040
    graphs = with_them["parts"]["graphs"] - without["parts"]["graphs"]  # a second one of each, once one is loaded
    assert graphs > without["parts"]["graphs"] / 3
    assert with_them["needed_bytes"] - without["needed_bytes"] == with_them["parts"]["adapters"] + graphs


def test_the_cache_of_llama_8b_is_128_kib_a_token() -> None:
    model = SHAPES["llama-8b"]
    assert kv_bytes_per_token(model, "bf16") == kv_bytes_per_token(model, "auto") == 131072
    assert kv_bytes_per_token(model, "fp8") == 65536


def test_speed_is_below_what_the_bandwidth_allows_and_falls_with_the_context() -> None:
    model, quant = SHAPES["llama-8b"], SCHEMES["int4"]
    for device in DEVICES.values():
        budget = make_budget(model, quant, EngineConfig(max_slots=1, max_context=8192), device)
        assert list(budget.tokens_per_s) == [512, 8192]
        for context, speed in budget.tokens_per_s.items():
            assert 0 < speed < budget.bound_tokens_per_s[context]
        assert budget.tokens_per_s[8192] < budget.tokens_per_s[512]
        # 7.5e9 weights of 4.25 bits and the head's 0.53e9 of 8.25 are 4.26 GB; the cache of 512 tokens 0.07 GB.
        assert budget.bound_tokens_per_s[512] == pytest.approx(device.bandwidth_gb_per_s / 4.33, rel=0.02)
    fewer_stages = predict_ms(model, quant, DEVICES["thor"], 512, "bf16")
    assert fewer_stages < predict_ms(model, quant, DEVICES["agx-orin"], 512, "bf16")


@pytest.mark.parametrize(
    ("shape", "capability", "stages", "stage_us"),
    [
        ("llama-8b", (8, 7), 5 * 32 + 3, 3.0),
        ("llama-8b", (11, 0), 5 * 32 + 3, 1.5),  # launches depend on each other
        ("gemma3-1b", (8, 7), 7 * 26 + 3, 3.0),  # with norms behind attention and the MLP
    ],
)
def test_speed_is_three_quarters_of_the_bandwidth_and_a_time_for_each_stage(
    shape: str, capability: tuple[int, int], stages: int, stage_us: float
) -> None:
    model, quant = SHAPES[shape], SCHEMES["int4"]
    device = Device("a board", 8, 100.0, capability, "")
    read = decode_bytes(model, quant) + kv_bytes(model, kv_bytes_per_token(model, "fp16"), 512)
    ms = read / (0.75 * 100e9) * 1e3 + stages * stage_us * 1e-3
    assert predict_ms(model, quant, device, 512, "fp16") == pytest.approx(ms)
    budget = make_budget(model, quant, EngineConfig(max_context=512, kv_cache="fp16"), device)
    assert budget.tokens_per_s == {512: pytest.approx(1e3 / ms)}
    assert budget.bound_tokens_per_s == {512: pytest.approx(100e9 / read)}


@pytest.mark.parametrize("devices", [("orin-nano", "thor"), ("thor", "orin-nano")])
def test_one_device_that_it_does_not_fit_is_enough_for_the_exit_code(
    devices: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--shape", "llama-8b", "--weights", "bf16", "--formula", "--json", "--device")
    code, out, _ = run(capsys, *command, *devices)
    assert code == 1 and [budget["fits"] for budget in json.loads(out)] == [name == "thor" for name in devices]
    assert run(capsys, *command, "thor", "agx-orin")[0] == 0


@pytest.mark.parametrize("formula", [[], ["--formula"]])
def test_every_remedy_that_is_named_fits(formula: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ("--shape", "llama-8b", "--device", "orin-nano", *formula)
    code, out, _ = run(capsys, *command)
    assert code == 1 and "does not fit" in out
    named = " ".join(out.split()).partition("would fit with ")[2]
    ways = re.findall(r"--(?:max-context|max-slots|kv-cache) \w+", named)
    assert len(ways) == 3
    model, quant, config = SHAPES["llama-8b"], SCHEMES["int4"], EngineConfig(executor="cuda")
    if formula:
        assert ways == remedies(model, quant, config, make_budget(model, quant, config, DEVICES["orin-nano"]))
    for way in ways:
        code, out_with, _ = run(capsys, *command, *way.split())
        assert code == 0 and "fits" in out_with


def test_what_fits_with_less_than_a_gigabyte_to_spare_is_called_tight(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--shape", "llama-8b", "--max-slots", "1", "--device", "orin-nano", "orin-nx", "--formula"]
    command += ["--max-context", "6144"]
    code, out, _ = run(capsys, *command)
    text = " ".join(out.split())
    assert code == 0 and text.count("fits, tight") == 1 and "Nano 8GB: 865 MB to spare; below 1,000 it may not" in text
    found = json.loads(run(capsys, *command, "--json")[1])
    assert [(budget["fits"], budget["tight"]) for budget in found] == [(True, True), (True, False)]
    assert 0 < found[0]["memory_bytes"] - found[0]["needed_bytes"] < 1e9
    not_at_all = json.loads(run(capsys, "--shape", "qwen3-14b", "--device", "orin-nano", "--formula", "--json")[1])
    assert (not_at_all[0]["fits"], not_at_all[0]["tight"]) == (False, False)


@pytest.mark.parametrize("formula", [[], ["--formula"]])
def test_orins_small_cache_saves_the_memory_of_a_copy_of_int4_weights(
    formula: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    devices = ["--device", "agx-orin", "thor", "--json", *formula]
    orin, thor = json.loads(run(capsys, "--shape", "llama-8b", "--weights", "int4", *devices)[1])
    # The second of two parts in bf16 at a time, 16 MiB each, and cuBLASLt's memory for both; loading takes the first.
    assert thor["needed_bytes"] - orin["needed_bytes"] == pytest.approx(83.9e6, rel=0.02)
    assert {name: size for name, size in orin["parts"].items() if size != thor["parts"][name]}.keys() == {"workspace"}
    orin, thor = json.loads(run(capsys, "--shape", "llama-8b", "--weights", "bf16", *devices)[1])
    assert thor["needed_bytes"] == orin["needed_bytes"]


def test_model_and_context_are_other_words_for_shape_and_max_context(capsys: pytest.CaptureFixture[str]) -> None:
    short = run(capsys, "--model", "qwen3-8b", "--weights", "int4", "--context", "8192", "--device", "thor")
    long = run(capsys, "--shape", "qwen3-8b", "--weights", "int4", "--max-context", "8192", "--device", "thor")
    assert short == long and short[0] == 0 and "tokens/s at 8192" in short[1]


def test_the_formula_gives_the_same_numbers_with_and_without_the_native_module(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--model", "llama-1b", "--device", "orin-nx", "--json")
    _, formula, _ = run(capsys, *arguments, "--formula")
    assert json.loads(formula)[0]["exact"] is False
    monkeypatch.setattr("edgellm_ros.cli.plan._exact_plan", lambda *_: {"weights": 1, "kv_cache": 2})
    assert run(capsys, *arguments, "--formula")[1] == formula
    assert json.loads(run(capsys, *arguments)[1])[0]["parts"] == {"weights": 1, "kv_cache": 2}


def test_what_nothing_helps_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--shape", "llama-8b", "--weights", "bf16", "--device", "orin-nano-4gb")
    assert code == 1 and "a smaller model, or weights of fewer bits" in " ".join(out.split())


def test_weights_that_the_gpu_holds_wider_than_stored_are_named_and_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--shape", "llama-8b", "--weights", "int4", "--device", "thor", "--json", "--formula")
    usual = json.loads(run(capsys, *arguments)[1])[0]
    mixed = replace(SCHEMES["int4"], formats={"mlp.down": LinearFormat("nvfp4", 16)})
    monkeypatch.setitem(SCHEMES, "int4", mixed)
    found = json.loads(run(capsys, *arguments)[1])[0]
    assert usual["widened"] == [] and len(found["widened"]) == 1
    assert found["widened"][0].startswith("32 x mlp.down: nvfp4 with two levels of scales as int8, +")
    more = 32 * 4096 * 14336 * (1 + 2 / 16 - (0.5 + 2 / 64))
    assert found["parts"]["weights"] - usual["parts"]["weights"] == pytest.approx(more, rel=1e-6)
    assert found["tokens_per_s"]["512"] < usual["tokens_per_s"]["512"]
    text = " ".join(run(capsys, *arguments[:-2], "--formula")[1].split())
    assert "wider than stored, 32 x mlp.down: nvfp4 with two levels of scales as int8" in text


def test_json_is_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--shape", "qwen3-4b", "--device", "agx-orin", "thor", "--max-slots", "1", "--json")
    budgets = json.loads(out)
    assert code == 0 and [b["device"] for b in budgets] == ["Jetson AGX Orin 64GB", "Jetson AGX Thor T5000"]
    for budget in budgets:
        assert budget["fits"] and budget["needed_bytes"] < budget["memory_bytes"]
        assert budget["parts"]["kv_cache"] == 4096 * 2 * 36 * 8 * 128 * 2
        assert budget["exact"] is not bool(native.import_module()[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "llama-1b", "--device", "orin-nano", "--max-context", "99999"], ["99999", "32768"]),
        (["--bundle", "nowhere", "--device", "thor", "--weights", "int4"], ["--weights", "--shape"]),
        (["--bundle", "nowhere", "--device", "thor"], ["nowhere"]),
    ],
)
def test_bad_input_is_named(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2 and all(word in err for word in words)


def test_an_unknown_device_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(capsys, "--shape", "llama-1b", "--device", "toaster")
    assert exit_info.value.code == 2 and "orin-nano" in capsys.readouterr().err


@pytest.fixture
def with_engine(tmp_path: Path) -> Bundle:
    """A manifest, and an engine for an Orin: a small file, 64 tokens of context, 3 MiB of scratch in its report."""
    bundle = Bundle.open(write_bundle(tmp_path / "bundle"))
    write_manifest(bundle, MODEL)
    bundle = Bundle.open(bundle.path, verify=False)
    options = BuildOptions(max_input=32, max_context=64, activations="fp16")
    write_engine(bundle, "orin", options, activation_memory_bytes=[1 << 20, 3 << 20])
    return bundle


@pytest.mark.parametrize("how", [["--formula"], []])
def test_an_engine_is_planned_by_its_file_its_cache_and_its_report(
    with_engine: Bundle, how: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--bundle", str(with_engine.path), "--device", "orin-nano", "--executor", "tensorrt", *how]
    code, out, _ = run(capsys, *command, "--max-slots", "3", "--json")
    found = json.loads(out)[0]
    model, file = with_engine.manifest.model, with_engine.path / "engines" / "orin" / "decoder.engine"
    assert code == 0 and found["engine"] == "orin" and found["executor"] == "tensorrt" and found["fits"]
    assert found["exact"] is (not how and not native.import_module()[1])
    parts = found["parts"]
    assert parts["engine"] == file.stat().st_size and parts["scratch"] == 3 << 20
    assert "weights" not in parts and ("embedding" in parts) is found["exact"]
    assert parts["kv_cache"] == 3 * 64 * 2 * model.num_layers * model.num_kv_heads * model.head_dim * 2
    assert found["needed_bytes"] == sum(parts.values()) + 1_900_000_000
    assert found["tokens_per_s"] == {} and list(found["bound_tokens_per_s"]) == ["64"]
    text = " ".join(run(capsys, *command)[1].split())
    assert "scratch" in text and "engines/orin" in text and "No engine was measured" in text


def test_what_no_engine_is_planned_for_is_said_with_the_reason(
    with_engine: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--bundle", str(with_engine.path), "--executor", "tensorrt", "--device"]
    for arguments, words in (
        (["thor"], ["sm110", "engines/orin: it is for sm87", "edgellm build", "--executor cuda"]),
        (["orin-nano", "--max-context", "128"], ["max_context 128 exceeds the engine's 64"]),
        (["orin-nano", "--kv-cache", "fp8"], ["kv_cache is 'fp8'", "--kv-cache fp8 --dialect plugin"]),
    ):
        code, _, err = run(capsys, *command, *arguments)
        assert code == 2 and all(word in err for word in words), err
    code, _, err = run(capsys, "--shape", "llama-1b", "--device", "thor", "--executor", "tensorrt")
    assert code == 2 and "--bundle" in err
    code, out, _ = run(capsys, "--shape", "llama-1b", "--device", "thor")
    assert code == 0 and "--executor tensorrt, once it is built" in " ".join(out.split())


def test_an_engine_that_does_not_fit_would_with_another_build(with_engine: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    large = replace(with_engine.manifest.model, num_layers=24, num_kv_heads=64, head_dim=256, max_context=8192)
    write_manifest(with_engine, large)
    options = BuildOptions(max_input=32, max_context=8192, activations="fp16")
    write_engine(Bundle.open(with_engine.path, verify=False), "large", options, activation_memory_bytes=[])
    command = ["--bundle", str(with_engine.path), "--device", "agx-orin-32gb", "--executor", "tensorrt", "--formula"]
    code, out, _ = run(capsys, *command)
    text = " ".join(out.split())
    assert code == 1 and "does not say how much scratch memory" in text
    ways = text.split("would fit with ")[1]
    assert "an engine of `edgellm build --max-context" in ways and "edgellm build --dialect plugin --kv-cache fp8`" in ways
    slots = re.search(r"--max-slots (\d)", ways)
    assert slots is not None and run(capsys, *command, "--max-slots", slots[1])[0] == 0
    assert run(capsys, *command, "--max-slots", str(int(slots[1]) + 1))[0] == 1


def write_manifest(bundle: Bundle, model: ModelSpec) -> None:
    changed = replace(bundle.manifest, model=model, graph=GRAPH)
    (bundle.path / "manifest.json").write_text(changed.to_json(), encoding="utf-8")


def test_a_cache_that_the_cuda_executor_lacks_is_refused_by_the_formula_too(capsys: pytest.CaptureFixture[str]) -> None:
    for how in ([], ["--formula"]):
        code, _, err = run(capsys, "--shape", "llama-1b", "--device", "thor", "--kv-cache", "fp32", *how)
        assert code == 2 and "--kv-cache fp32" in err and "bf16, fp16, fp8" in err
