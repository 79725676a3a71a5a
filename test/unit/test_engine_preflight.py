"""Which engine is loaded, and what is refused before anything is: reports, settings and bindings, without TensorRT."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import MODEL, OPTIONS, ORIN, bindings_of, make_bundle, write_engine

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import build_parser
from edgellm_ros.cli.options import settings_from
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.errors import BundleError
from edgellm_ros.executors.engine_preflight import (
    Binding,
    Machine,
    check_bindings,
    choose_engine,
    memory_needed,
    probe_machine,
)
from edgellm_ros.executors.engines import ENGINE, REPORT, build_command, check_engine

DEFAULT = EngineConfig()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def test_a_matching_engine_is_chosen_and_others_are_named_with_their_reason(bundle: Bundle) -> None:
    right = write_engine(bundle)
    write_engine(bundle, "old", sources={"decoder.onnx": "other"})
    write_engine(bundle, "broken")
    os.truncate(bundle.path / "engines" / "broken" / ENGINE, 3)
    chosen, reasons = choose_engine(bundle, DEFAULT, ORIN)
    assert chosen == right
    assert len(reasons) == 2 and "3 bytes instead of" in reasons[0] and "--force" in reasons[0]
    assert "built from other weights" in reasons[1] and "old" in reasons[1]


def test_without_an_engine_the_command_that_builds_one_is_named(bundle: Bundle) -> None:
    chosen, reasons = choose_engine(bundle, DEFAULT, Machine("no NVIDIA GPU: none"))
    assert chosen is None and f"edgellm build {bundle.path}" in reasons[0]
    write_engine(bundle)
    assert choose_engine(bundle, DEFAULT, Machine("no NVIDIA GPU: none")) == (None, ["no NVIDIA GPU: none"])


def test_engines_that_this_user_may_not_read_are_a_reason_and_no_crash(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = write_engine(bundle)

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched, pytest.raises(BundleError, match="decoder.engine cannot be read .*let this user"):
        patched.setattr("edgellm_ros.executors.engines.hash_file", refuse)
        check_engine(engine, bundle)
    monkeypatch.setattr(Path, "iterdir", refuse)
    chosen, reasons = choose_engine(bundle, DEFAULT, ORIN)
    assert chosen is None and "engines cannot be read" in reasons[0] and "let this user read it" in reasons[0]


@pytest.mark.parametrize(
    ("changed", "machine", "words"),
    [
        ({}, {"version": (10, 13, 2, 6)}, ["10.13.3.9", "10.13.2.6", "edgellm build"]),
        ({}, {"version": (10, 13)}, ["10.13.3.9"]),
        ({}, {"capability": (11, 0)}, ["sm87", "sm110", "Orin"]),
        ({"target": "sm89"}, {}, ["sm89", "sm87"]),
        ({"builder": {"name": "tensorrt_rtx", "version": "1.7.1"}}, {}, ["tensorrt_rtx", "edgellm build"]),
        ({}, {"free_bytes": 10 << 20}, ["KV cache", "are free", "max_slots"]),
    ],
)
def test_an_engine_of_another_machine_is_refused_by_what_differs(
    bundle: Bundle, changed: dict[str, Any], machine: dict[str, Any], words: list[str]
) -> None:
    write_engine(bundle, **changed)
    chosen, reasons = choose_engine(bundle, DEFAULT, replace(ORIN, **machine))
    assert chosen is None and len(reasons) == 1
    assert all(word in reasons[0] for word in words), reasons


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_context": 128}, ["max_context 128", "64", "--max-context 128"]),
        ({"kv_cache": "fp8"}, ["fp8", "fp16", "--kv-cache fp8 --dialect plugin", "auto"]),
        ({"kv_cache": "bf16"}, ["bf16", "fp16", "auto"]),
        ({"max_loras": 1, "max_lora_rank": 8}, ["max_loras is 1", "--lora"]),
        ({"max_loras": 1, "max_lora_rank": 16}, ["max_lora_rank 16", "8"]),
    ],
)
def test_settings_that_an_engine_cannot_have_are_refused_with_the_build_that_has_them(
    bundle: Bundle, config: dict[str, Any], words: list[str]
) -> None:
    write_engine(bundle)
    chosen, reasons = choose_engine(bundle, EngineConfig(**config), ORIN)
    assert chosen is None and all(word in reasons[0] for word in words), reasons


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "built",
    [
        {},
        {"activations": "bf16"},
        {"profile": "single", "memory_limit": 512},
        {"dialect": "plugin", "kv_cache": "fp8", "trees": True},
        {"lora": True, "max_batch": 4, "max_verify": 16},
    ],
)
def test_the_command_that_is_named_builds_that_engine_but_for_what_did_not_fit(
    built: dict[str, Any], wide: bool, tmp_path: Path
) -> None:
    """The command line is the oracle: what it makes of the command has the options of the engine's report."""
    bundle = make_bundle(tmp_path / "bundle", replace(MODEL, wide_activations=wide))
    options = replace(OPTIONS, **{"dialect": "standard", **built})
    command = build_command(bundle, options, max_context=128)
    args = build_parser().parse_args(command.split()[1:])
    asked = settings_from(args, BuildOptions()).resolved(bundle)
    dialect = "standard" if asked.dialect == "auto" else asked.dialect  # as the TensorRT that is here
    assert replace(asked, dialect=dialect) == replace(options, max_context=128), command
    assert ("--activations" in command) == (options.activations != ("bf16" if wide else "fp16"))


def test_slots_that_would_not_be_aligned_are_refused_before_the_engine_is_loaded(bundle: Bundle) -> None:
    write_engine(bundle, options=replace(OPTIONS, max_context=63))
    chosen, reasons = choose_engine(bundle, EngineConfig(max_slots=2), ORIN)
    assert chosen is None and "63 tokens has 4032 bytes" in reasons[0] and "--max-context 64" in reasons[0]
    assert "set max_slots to 1" in reasons[0] and choose_engine(bundle, EngineConfig(max_slots=1), ORIN)[0] is not None
    write_engine(bundle, "aligned", replace(OPTIONS, max_context=100))
    assert choose_engine(bundle, EngineConfig(max_slots=2), ORIN)[0] is not None


def test_of_several_the_one_without_needless_adapters_and_with_the_context_asked_for(bundle: Bundle) -> None:
    small = write_engine(bundle, "a")
    large = write_engine(bundle, "b", replace(OPTIONS, max_context=128))
    lora = write_engine(bundle, "c", replace(OPTIONS, max_context=256, lora=True))

    def chosen(**config: Any) -> Any:
        return choose_engine(bundle, EngineConfig(**config), ORIN)[0]

    assert chosen() == large and chosen(max_context=64) == small and chosen(max_context=65) == large
    assert chosen(max_loras=1, max_lora_rank=8) == lora


def test_memory_is_weighed_by_slots(bundle: Bundle) -> None:
    model = replace(bundle.manifest.model, num_layers=32, num_kv_heads=8, head_dim=128, max_context=4096)
    large = make_bundle(bundle.path, model)
    write_engine(large, options=replace(OPTIONS, max_context=4096))
    slot = 2 * 32 * 8 * 128 * 2 * 4096  # K and V in fp16
    machine = replace(ORIN, free_bytes=3 * slot + (100 << 20))
    assert choose_engine(large, EngineConfig(max_slots=3), machine)[0] is not None
    assert choose_engine(large, EngineConfig(max_slots=4), machine)[0] is None


def test_a_changed_plan_is_found_by_its_hash(bundle: Bundle) -> None:
    engine = write_engine(bundle)
    check_engine(engine, bundle)
    data = bytearray(engine.file.read_bytes())
    data[0] ^= 1
    engine.file.write_bytes(data)
    with pytest.raises(BundleError, match="was changed; build it again with --force"):
        check_engine(engine, bundle)


@pytest.mark.parametrize("field", ["builder", "options", "profiles", "target"])
def test_a_report_that_lacks_something_is_a_damaged_engine(bundle: Bundle, field: str) -> None:
    engine = write_engine(bundle)
    report = json.loads((engine.path / REPORT).read_text())
    del report[field]
    (engine.path / REPORT).write_text(json.dumps(report))
    chosen, reasons = choose_engine(bundle, DEFAULT, ORIN)
    assert chosen is None and "not a whole engine" in reasons[0] and field in reasons[0]


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("options.max_context", None, ["not a whole engine", "max_context"]),
        ("options.max_batch", 4, ["max_batch is 4", "decode profile takes 2 sequences"]),
        ("activation_memory_bytes", ["much"], ["not a whole engine", "much"]),
        ("activation_memory_bytes.1", float("inf"), ["not a whole engine", "infinity"]),
        ("profiles", [], ["0 profiles instead of 2"]),
        ("profiles.0.inputs_embeds", [], ["inputs_embeds", "[]", "decode profile"]),
        ("profiles.1.inputs_embeds.2", [2, 32], ["inputs_embeds", "(2, 32)", "prefill profile"]),
        ("profiles.1.inputs_embeds.2.1", "32", ["inputs_embeds", "(2, '32', 64)"]),
        ("profiles.1.inputs_embeds.2.1", 10**12, ["inputs_embeds", "1000000000000"]),
        ("profiles.0.past_key.1.2.2", 128, ["past_key.1", "128", "(-1, 2, 64, 16)"]),
        ("profiles.0.logit_indices.0.0", 99, ["logit_indices", "99"]),
    ],
)  # fmt: skip
def test_a_report_that_was_edited_is_refused_by_what_is_wrong(bundle: Bundle, place: str, value: Any, words: list[str]) -> None:
    engine = write_engine(bundle)
    report = json.loads((engine.path / REPORT).read_text())
    at, keys = report, place.replace("past_key.1", "past_key/1").split(".")
    for key in keys[:-1]:
        at = at[int(key) if isinstance(at, list) else key.replace("/", ".")]
    at[int(keys[-1]) if isinstance(at, list) else keys[-1]] = value
    (engine.path / REPORT).write_text(json.dumps(report))
    chosen, reasons = choose_engine(bundle, DEFAULT, ORIN)
    assert chosen is None and all(word in reasons[0] for word in [*words, "--force"]), reasons


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS, replace(OPTIONS, lora=True), replace(OPTIONS, profile="single", activations="bf16"),
        replace(OPTIONS, trees=True), replace(OPTIONS, trees=True, dialect="plugin"),
    ],
)  # fmt: skip
def test_an_engine_that_is_what_it_claims_passes(bundle: Bundle, options: BuildOptions) -> None:
    engine = write_engine(bundle, options=options)
    check_bindings(engine, bundle.manifest, bindings_of(engine, bundle), len(engine.profiles))


def test_a_cache_of_bytes_is_half_as_large_and_taken_where_it_is_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("edgellm_ros.trt_plugins.find_library", lambda: Path("libedgellm_plugins.so"))
    bundle = make_bundle(tmp_path / "plain")
    plain = write_engine(bundle, "a", replace(OPTIONS, dialect="plugin"))
    coarse = write_engine(bundle, "b", replace(OPTIONS, dialect="plugin", kv_cache="fp8"))
    needed = [memory_needed(engine, bundle, DEFAULT)["KV cache"] for engine in (plain, coarse)]
    assert needed[0] == 2 * needed[1] > 0
    assert choose_engine(bundle, DEFAULT, ORIN)[0] == plain
    assert choose_engine(bundle, EngineConfig(kv_cache="fp8"), ORIN)[0] == coarse
    found = bindings_of(coarse, bundle)
    assert {b.dtype for b in found if "_kv." in b.name} == {"int8"}
    check_bindings(coarse, bundle.manifest, found, 2)


def test_masks_are_compared_as_every_input_is(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "windows", replace(MODEL, sliding_windows=(16, 0)))
    engine = write_engine(bundle, options=replace(OPTIONS, trees=True))
    found = bindings_of(engine, bundle)
    assert [b.name for b in found if b.name.startswith("mask")] == ["mask.0", "mask.16"]
    check_bindings(engine, bundle.manifest, found, 2)
    with pytest.raises(BundleError, match=r"mask\.16 is float16 \(-1, 1, -1, 32\); the manifest says float16 \(-1, 1, -1, 64\)"):
        check_bindings(engine, bundle.manifest, change("mask.16", dims=(-1, 1, -1, 32))(found), 2)
    with pytest.raises(BundleError, match=r"input mask\.0 .* is not in the manifest"):
        check_bindings(write_engine(bundle, "plain"), bundle.manifest, found, 2)


def test_an_engine_that_takes_trees_is_taken_before_one_that_does_not(bundle: Bundle) -> None:
    write_engine(bundle, "a")
    trees = write_engine(bundle, "b", replace(OPTIONS, trees=True))
    assert choose_engine(bundle, DEFAULT, ORIN)[0] == trees
    faults = choose_engine(bundle, EngineConfig(max_loras=1, max_lora_rank=8), ORIN)[1]
    assert any("--lora --trees" in fault for fault in faults)


def change(which: str, **changed: Any) -> Callable[[list[Binding]], list[Binding]]:
    return lambda found: [dataclasses.replace(b, **changed) if b.name == which else b for b in found]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change("inputs_embeds", dims=(-1, -1, 32)), ["inputs_embeds", "(-1, -1, 32)", "(-1, -1, 64)"]),
        (change("past_key.1", dtype="bfloat16"), ["past_key.1", "bfloat16", "float16"]),
        (change("past_key.1", name="past_k.1"), ["past_key.1 is missing", "past_k.1"]),
        (change("logits", is_input=True), ["input logits", "output logits is missing"]),
        (change("position_ids", on_host=True), ["position_ids", "host memory"]),
        (change("present_value.0", is_linear=False), ["present_value.0", "row-major"]),
        (lambda found: found[:-1], ["present_value.1 is missing"]),
        (change("position_ids", profiles=[[(1, 1)] * 3, [(1, 1)] * 3]), ["position_ids", "profile 0", "profile 1", "report"]),
    ],
)
def test_every_field_of_a_binding_is_compared(
    bundle: Bundle, damage: Callable[[list[Binding]], list[Binding]], words: list[str]
) -> None:
    engine = write_engine(bundle)
    with pytest.raises(BundleError, match="build it again with --force") as error:
        check_bindings(engine, bundle.manifest, damage(bindings_of(engine, bundle)), 2)
    assert all(word in str(error.value) for word in words), error.value


def test_all_differences_are_in_one_error(bundle: Bundle) -> None:
    engine = write_engine(bundle)
    damaged = change("logits", dtype="float16")(change("write_indices", dtype="int32")(bindings_of(engine, bundle)))
    with pytest.raises(BundleError) as error:
        check_bindings(engine, bundle.manifest, damaged, 3)
    assert all(word in str(error.value) for word in ("logits is float16", "write_indices is int32", "3 optimisation profiles"))


class ModuleOfATest:
    """Stands for the native module where a test decides what it finds."""

    TENSORRT_HEADERS = "10.14"
    ARCHITECTURES, PTX_ARCHITECTURE = ("87",), ""

    def __init__(self, *, path: str = "libnvinfer.so.10", gpus: int = 1, integrated: bool = False) -> None:
        self._path, self._gpus, self._integrated = path, gpus, integrated
        self.asked: list[str] = []

    def find_tensorrt(self, candidates: list[str]) -> tuple[str, tuple[int, ...], str]:
        self.asked = candidates
        return (self._path, (10, 13, 3, 9), "") if self._path else ("", (), "libnvinfer.so.10: cannot open")

    def count_devices(self) -> tuple[int, str]:
        return self._gpus, "" if self._gpus else "no NVIDIA driver is installed"

    def device_info(self) -> dict[str, Any]:
        return {"name": "Orin", "compute_capability": (8, 7), "free_bytes": 6 << 30, "integrated": self._integrated}


def test_what_is_missing_is_said_in_order_and_nothing_is_created(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(module: Any, reason: str = "") -> Machine:
        monkeypatch.setattr(native, "import_module", lambda: (module, reason))
        return probe_machine()

    assert probe(None, "the native module is not built: make native").reason == "the native module is not built: make native"
    monkeypatch.delenv("EDGELLM_NVINFER", raising=False)
    assert "JetPack has it" in probe(ModuleOfATest(path="")).reason
    assert "no NVIDIA driver is installed" in probe(ModuleOfATest(gpus=0)).reason
    assert probe(ModuleOfATest()) == Machine("", "libnvinfer.so.10", (10, 13, 3, 9), "Orin", (8, 7), 6 << 30)


def test_on_one_memory_with_the_cpu_what_linux_calls_available_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleOfATest(integrated=True)
    monkeypatch.setattr(native, "import_module", lambda: (module, ""))
    monkeypatch.setattr("edgellm_ros.memory.available_memory", lambda: 5 << 30)
    assert probe_machine().free_bytes == 5 << 30
    monkeypatch.setattr("edgellm_ros.memory.available_memory", lambda: 7 << 30)
    assert probe_machine().free_bytes == 7 << 30, "CUDA's 6 GiB leave out the files that Linux would drop"


def test_the_library_that_the_environment_names_is_the_only_one_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleOfATest()
    monkeypatch.setattr(native, "import_module", lambda: (module, ""))
    monkeypatch.setenv("EDGELLM_NVINFER", "/opt/libnvinfer.so")
    probe_machine()
    assert module.asked == ["/opt/libnvinfer.so"]
    monkeypatch.delenv("EDGELLM_NVINFER")
    probe_machine()
    names = [Path(name).name for name in module.asked]
    assert names[0] == "libnvinfer.so.10" and names[-1] == "libnvinfer_lean.so.10" and "libnvinfer_dispatch.so.10" in names
