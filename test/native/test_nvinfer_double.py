"""The double of libnvinfer against TensorRT's own headers: what it answers, and what it refuses, without a GPU.

That a program compiled against NvInfer.h 10.14 can call it shows that its classes have that ABI. It shows nothing of
TensorRT itself: which errors the real library logs, when, and what it does with an engine, is not in any header.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import double_driver
import numpy as np
import pytest
import tiny
import transformers
from double_driver import Driver
from double_plan import plan_bytes, plan_facts

from edgellm_ros import native, trt_plugins
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import BuildOptions
from edgellm_ros.errors import UnsupportedError

MODULE, NO_MODULE = native.import_module()
pytestmark = [
    pytest.mark.skipif(bool(NO_MODULE), reason=NO_MODULE),
    pytest.mark.skipif(bool(double_driver.NO_DOUBLE), reason=double_driver.NO_DOUBLE),
]
HAS_GPU = bool(MODULE is not None and MODULE.count_devices()[0])
OPTIONS = BuildOptions(max_batch=2, max_input=32, max_context=64, max_verify=4, lora=True)
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 7, "int64": 8, "int8": 2}  # of NvInfer.h


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from edgellm_ros.toolchain.export import export_bundle

    shape = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    tiny.CONFIGS["double_llama"] = lambda: transformers.LlamaConfig(**shape, **heads, bos_token_id=1, eos_token_id=2)
    root = tmp_path_factory.mktemp("double")
    (root / "checkpoint").mkdir()
    tiny.save_checkpoint("double_llama", root / "checkpoint")
    return export_bundle(root / "checkpoint", root / "bundle", weights="int8", max_lora_rank=8)


@pytest.fixture(scope="module")
def facts(bundle: Bundle) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return plan_facts(bundle, OPTIONS.resolved(bundle))


Open = Callable[..., Driver]


@pytest.fixture
def open_driver(facts: tuple[dict[str, Any], dict[str, np.ndarray]], tmp_path: Path) -> Iterator[Open]:
    """`open_driver(**changed)` is a driver of the plan with some of its facts changed; `raw` is a whole file instead."""
    opened: list[Driver] = []

    def get(raw: bytes | None = None, **changed: Any) -> Driver:
        plan = tmp_path / f"plan{len(opened)}"
        plan.write_bytes(plan_bytes({**facts[0], **changed}, facts[1]) if raw is None else raw)
        opened.append(Driver(plan))
        return opened[-1]

    yield get
    for driver in opened:
        driver.__exit__()


def text(shape: list[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


@pytest.mark.parametrize("kind", ["plain", "trees", "plugins, trees, bytes"])
def test_names_directions_dtypes_shapes_and_profiles_are_the_plans(
    kind: str, open_driver: Open, facts: Any, bundle: Bundle
) -> None:
    if kind != "plain":
        changed = {"dialect": "plugin", "kv_cache": "fp8"} if "plugins" in kind else {}
        facts = plan_facts(bundle, replace(OPTIONS, trees=True, **changed).resolved(bundle))
    driver = open_driver(raw=plan_bytes(*facts))
    assert (driver.version, driver.engine) == ("version 101401", "engine made")
    assert "this is a test double of libnvinfer, not TensorRT" in driver.greeting[0]
    first, *rest = driver.call("describe").split(" ; ")
    tensors, memory = [r for r in rest if r.startswith("tensor ")], [r for r in rest if r.startswith("memory ")]
    assert first == f"{len(facts[0]['bindings'])} tensors, 2 profiles, refittable 0"
    for line, binding in zip(tensors, facts[0]["bindings"], strict=True):
        wanted = ["tensor", binding["name"], "input" if binding["is_input"] else "output"]
        wanted += [str(DTYPES[binding["dtype"]]), text(binding["shape"])]
        for profile in facts[0]["profiles"] if binding["is_input"] else ():
            wanted += [text(profile[binding["name"]][select]) for select in ("min", "opt", "max")]
        assert line == " ".join(wanted)
    decode, prefill = (int(line.split()[1]) for line in memory)
    assert 0 < decode < prefill and decode % 256 == prefill % 256 == 0


def test_a_mask_must_fit_the_cache(open_driver: Open, bundle: Bundle) -> None:
    found = plan_facts(bundle, replace(OPTIONS, trees=True).resolved(bundle))
    driver = open_driver(raw=plan_bytes(*found))
    assert driver.call("create") == "true"
    assert driver.call("shape", "mask.0", 1, 1, 4, 64) == "true"
    assert driver.call("shape", "mask.0", 1, 1, 4, 32) == "false" and "outside profile 0" in driver.logs[0]
    assert driver.call("shape", "mask.0", 1, 1, 5, 64) == "false"


@pytest.mark.parametrize("cut", [0, 10, 35, 200, -300])
def test_a_file_that_is_cut_off_is_refused(cut: int, open_driver: Open, facts: Any) -> None:
    whole = plan_bytes(*facts)
    driver = open_driver(raw=whole[:cut] if cut else bytes(range(256)) * 64)
    assert driver.engine == "engine refused"
    wanted = "truncated" if cut not in (0, 10) else "no plan of the double"
    assert len(driver.logs) == 1 and wanted in driver.logs[0], driver.logs


def test_a_plan_of_another_tensorrt_is_refused_with_both_versions(open_driver: Open) -> None:
    driver = open_driver(tensorrt=[10, 13, 3])
    assert driver.engine == "engine refused"
    assert driver.logs == [
        "nvinfer double: no engine: the plan is of TensorRT [10, 13, 3], this library stands for [10, 14, 1]; build the "
        "engine again with this version"
    ]


def test_faults_are_shown_as_asked_for_and_unknown_ones_refused(open_driver: Open) -> None:
    assert "no engine: not today" in open_driver(faults={"deserialize": "not today"}).logs[0]
    assert "the double has no fault 'explode'" in open_driver(faults={"explode": 1}).logs[0]
    driver = open_driver(faults={"create_context": "no memory for it"})
    assert driver.call("create") == "false" and "no execution context: no memory for it" in driver.logs[0]


def test_a_profile_without_a_range_for_an_input_is_refused(open_driver: Open, facts: Any) -> None:
    profiles = [dict(profile) for profile in facts[0]["profiles"]]
    del profiles[1]["write_indices"]
    assert "a profile has no range of the input write_indices" in open_driver(profiles=profiles).logs[0]


def test_shapes_must_lie_in_the_profile_and_are_to_be_set_again_after_a_switch(open_driver: Open, facts: Any) -> None:
    driver = open_driver()
    assert driver.call("create") == "true" and driver.call("which_profile") == "0"
    assert driver.call("shape", "inputs_embeds", 2, 4, 128) == "true"
    assert driver.call("shape", "inputs_embeds", 2, 5, 128) == "false"
    assert "outside profile 0, which allows [1, 1, 128] to [2, 4, 128]" in driver.logs[0]
    assert driver.call("shape", "inputs_embeds", 2, 4, 127) == "false"
    assert driver.call("shape", "inputs_embeds", 2, 4) == "false"
    assert driver.call("shape", "logits", 1, 320) == "false" and "it is an output" in driver.logs[0]
    assert driver.call("shape", "nothing", 1) == "false" and "no tensor nothing" in driver.logs[0]
    assert driver.call("shape_of", "inputs_embeds") == "[2,4,128]"
    assert driver.call("profile", 1) == "true" and driver.call("which_profile") == "1"
    assert driver.call("shape_of", "inputs_embeds") == "[-1,-1,128]"
    assert driver.call("shape", "inputs_embeds", 2, 5, 128) == "true"
    assert driver.call("profile", 2) == "false" and "no profile 2 of 2" in driver.logs[0]


def test_outputs_follow_their_inputs_and_missing_shapes_are_named(open_driver: Open, facts: Any) -> None:
    driver = open_driver()
    driver.call("create")
    names = [b["name"] for b in facts[0]["bindings"] if b["is_input"]]
    count, *missing = driver.call("missing").split()
    assert int(count) == len(names) and missing == names
    assert driver.call("shape_of", "logits") == "[-1,320]" and driver.call("most_bytes", "logits") == str(8 * 320 * 4)
    driver.call("shape", "logit_indices", 3)
    driver.call("shape", "past_key.1", 2, 1, 64, 64)
    assert driver.call("shape_of", "logits") == "[3,320]"
    assert driver.call("shape_of", "present_key.1") == "[2,1,64,64]"
    assert driver.call("shape_of", "present_key.0") == "[-1,1,64,64]"
    assert driver.call("missing").split()[0] == str(len(names) - 2)


def test_a_cache_of_keys_and_values_together_is_one_tensor_a_layer(bundle: Bundle, open_driver: Open) -> None:
    options = replace(OPTIONS, lora=False, dialect="plugin").resolved(bundle)
    driver = open_driver(raw=plan_bytes(*plan_facts(bundle, options)))
    driver.call("create")
    assert driver.call("shape", "past_kv.1", 2, 2, 1, 64, 64) == "true"
    assert driver.call("shape_of", "present_kv.1") == "[2,2,1,64,64]"
    assert driver.call("shape_of", "past_key.0") == "none"


def test_a_plugin_library_is_loaded_and_its_creators_listed(open_driver: Open) -> None:
    try:
        library = trt_plugins.find_library()
    except UnsupportedError as error:
        pytest.skip(str(error))
    driver = open_driver()
    assert int(driver.call("plugins", library)) >= 3
    assert driver.call("plugins", "/nowhere/libplugins.so") == "false" and "no plugin library" in driver.logs[0]


def test_addresses_are_multiples_of_256(open_driver: Open) -> None:
    driver = open_driver()
    driver.call("create")
    assert driver.call("address", "logits", 4096) == "true"
    assert driver.call("address", "logits", 4096 + 128) == "false" and "not a multiple of 256" in driver.logs[0]


@pytest.mark.skipif(HAS_GPU, reason="here is a GPU")
def test_without_a_gpu_nothing_is_enqueued(open_driver: Open) -> None:
    driver = open_driver()
    driver.call("create")
    assert driver.call("enqueue") == "false" and driver.logs == ["nvinfer double: enqueueV3: there is no CUDA device"]


def test_an_engine_that_is_deleted_before_its_context_is_noticed(open_driver: Open) -> None:
    driver = open_driver()
    driver.call("create")
    assert driver.call("delete_engine") == "true"
    assert driver.logs == ["nvinfer double: an engine is deleted before its execution contexts"]
    assert driver.close() == 0


def test_what_is_deleted_in_order_is_not_complained_of(open_driver: Open) -> None:
    driver = open_driver()
    driver.call("create")
    assert driver.close() == 0 and driver.logs == []


def test_the_library_exports_what_the_headers_call_and_nothing_else() -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", double_driver.LIBRARY], capture_output=True, text=True, check=True)
    exported = {line.split()[-1] for line in listed.stdout.splitlines()}
    versions = {f"getInferLib{part}Version" for part in ("", "Major", "Minor", "Patch", "Build")}
    makers = {"createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL", "getPluginRegistry", "getLogger"}
    assert exported == versions | makers
