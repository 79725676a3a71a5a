"""The TensorRT path over the double of libnvinfer: what an engine of a bundle goes through from its report to its tokens.

Nothing here is TensorRT: docs/verified.md lists what the double proves of the code that calls TensorRT, and what it cannot.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import double_driver
import numpy as np
import pytest
from double_plan import TENSORRT, write_double_engine

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.errors import BundleError, UnsupportedError
from edgellm_ros.executors.engine_preflight import Binding, check_bindings, choose_engine, probe_machine
from edgellm_ros.executors.engines import Engine

MODULE = native.import_module()[0]
pytestmark = [
    pytest.mark.usefixtures("use_the_double"),
    pytest.mark.skipif(bool(double_driver.NO_DOUBLE), reason=double_driver.NO_DOUBLE),
    pytest.mark.skipif(not getattr(MODULE, "TENSORRT_HEADERS", ""), reason="the module was compiled without NvInfer.h"),
]
OPTIONS = BuildOptions(max_batch=4, max_input=32, max_context=128, max_verify=8, activations="bf16")


def target() -> str:
    major, minor = MODULE.device_info()["compute_capability"]
    return f"sm{major}{minor}"


@pytest.fixture
def copied(gpu_bundle: Callable[..., Bundle], tmp_path: Path) -> Callable[..., Bundle]:
    """`copied("gpu_qwen3", "int4")` is a bundle of the test's own, which engines may be added to."""

    def get(kind: str = "gpu_qwen3", weights: str = "fp16") -> Bundle:
        path = tmp_path / f"{kind}-{weights}"
        if not path.exists():
            shutil.copytree(gpu_bundle(kind, weights).path, path)
        return Bundle.open(path)

    return get


def load(engine: Engine) -> Any:
    return MODULE.TrtEngine(str(engine.file), native.tensorrt_candidates(MODULE))


def check(engine: Engine, bundle: Bundle) -> None:
    loaded = load(engine)
    check_bindings(engine, bundle.manifest, [Binding(*b) for b in loaded.bindings], loaded.num_profiles)


def test_an_engine_is_chosen_loaded_and_found_to_be_what_its_report_says(copied: Callable[..., Bundle]) -> None:
    bundle = copied()
    engine = write_double_engine(bundle, OPTIONS, target())
    machine = probe_machine()
    assert (machine.reason, machine.version, machine.target) == ("", TENSORRT, target())
    chosen, reasons = choose_engine(bundle, EngineConfig(max_slots=2), machine)
    assert chosen == engine and reasons == []
    loaded = load(engine)
    assert loaded.version == TENSORRT and loaded.num_profiles == 2 and loaded.context_bytes > 0
    assert any("test double of libnvinfer, not TensorRT" in text for _, text in loaded.take_log())
    check(engine, bundle)


def test_an_engine_of_another_gpu_or_tensorrt_is_refused_before_it_is_loaded(copied: Callable[..., Bundle]) -> None:
    bundle = copied()
    write_double_engine(bundle, OPTIONS, "sm87")
    other = {"name": "tensorrt", "version": "10.13.3.9", "edgellm_ros": ""}
    write_double_engine(bundle, OPTIONS, target(), report={"builder": other})
    chosen, reasons = choose_engine(bundle, EngineConfig(), probe_machine())
    assert chosen is None and len(reasons) == 2
    assert "it is for sm87" in " ".join(reasons) and "10.13.3.9" in " ".join(reasons) and "10.14.1.48" in " ".join(reasons)


def change_shape(facts: dict[str, Any]) -> None:
    next(b for b in facts["bindings"] if b["name"] == "past_key.1")["shape"][2] += 1


def change_dtype(facts: dict[str, Any]) -> None:
    next(b for b in facts["bindings"] if b["name"] == "inputs_embeds")["dtype"] = "float32"


def rename(facts: dict[str, Any]) -> None:
    next(b for b in facts["bindings"] if b["name"] == "logits")["name"] = "scores"


def narrow_profile(facts: dict[str, Any]) -> None:
    facts["profiles"][0]["position_ids"]["max"][1] -= 1


def drop_profile(facts: dict[str, Any]) -> None:
    del facts["profiles"][1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_shape, r"past_key\.1 is bfloat16 .*129.*the manifest says bfloat16"),
        (change_dtype, r"inputs_embeds is float32 .*the manifest says bfloat16"),
        (rename, r"output logits is missing"),
        (narrow_profile, r"position_ids ranges over .* in profile 0; the report says"),
        (drop_profile, r"it has 1 optimisation profiles; the report says 2"),
    ],
)
def test_an_engine_that_is_not_what_the_manifest_says_is_refused_by_field(
    change: Callable[[dict[str, Any]], None], words: str, copied: Callable[..., Bundle]
) -> None:
    bundle = copied()
    engine = write_double_engine(bundle, OPTIONS, target(), change=lambda facts: change(_own(facts)))
    with pytest.raises(BundleError, match=words):
        check(engine, bundle)


def _own(facts: dict[str, Any]) -> dict[str, Any]:
    """The report was made of the same lists: what changes must not change them."""
    facts.update(json.loads(json.dumps({key: facts[key] for key in ("bindings", "profiles")})))
    return facts


def test_a_plan_that_the_library_refuses_is_named_with_its_words(copied: Callable[..., Bundle]) -> None:
    bundle = copied()
    engine = write_double_engine(bundle, OPTIONS, target(), faults={"deserialize": "these weights are for something else"})
    with pytest.raises(UnsupportedError, match=r"decoder\.engine: .*for something else; build it again .*--force"):
        load(engine)
    engine = write_double_engine(bundle, OPTIONS, target(), change=lambda facts: facts.update(tensorrt=[10, 13, 3]))
    with pytest.raises(UnsupportedError, match=r"of TensorRT \[10, 13, 3\]"):
        load(engine)
    engine.file.write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    with pytest.raises(UnsupportedError, match="no plan of the double"):
        load(engine)
