"""Where the plugin library is looked for, and that engines which need it are refused by name without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from engines import GRAPH, MODEL, OPTIONS, ORIN, bindings_of, make_bundle, write_engine

import edgellm_ros
from edgellm_ros import trt_plugins
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import UnsupportedError
from edgellm_ros.executors.contract import decoder_contract
from edgellm_ros.executors.engine_preflight import binding_faults, engine_faults
from edgellm_ros.executors.engines import build_command, source_hashes


def test_the_library_is_where_the_native_module_is_and_its_absence_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgellm_ros, "__path__", [str(tmp_path / "package"), str(tmp_path / "checked")])
    with pytest.raises(UnsupportedError, match=r"libedgellm_plugins.so is not in .*package: .*TENSORRT_ROOT.*build"):
        trt_plugins.find_library()
    (tmp_path / "checked").mkdir()
    (tmp_path / "checked" / trt_plugins.LIBRARY).touch()
    assert trt_plugins.find_library() == tmp_path / "checked" / trt_plugins.LIBRARY


def test_an_engine_with_plugins_has_one_cache_a_layer_and_needs_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    options = dataclasses.replace(OPTIONS, dialect="plugin")
    engine = write_engine(bundle, options=options, sources=source_hashes(bundle, False, "plugin"))
    monkeypatch.setattr(edgellm_ros, "__path__", [str(tmp_path)])
    faults = engine_faults(engine, bundle, EngineConfig(), ORIN)
    assert len(faults) == 1 and faults[0].startswith("it needs the project's plugins, and libedgellm_plugins.so is not in")
    (tmp_path / trt_plugins.LIBRARY).touch()
    assert engine_faults(engine, bundle, EngineConfig(), ORIN) == []
    contract = {t.name: t for t in decoder_contract(MODEL, GRAPH, capacity=64, dialect="plugin")}
    assert contract["past_kv.1"].shape == ("batch", 2, MODEL.num_kv_heads, 64, MODEL.head_dim)
    assert contract["past_kv.1"].is_input and not contract["present_kv.1"].is_input and "past_key.1" not in contract
    standard = bindings_of(write_engine(bundle, "standard"), bundle)
    found = binding_faults(engine, bundle.manifest, standard, len(engine.profiles))
    assert "input past_kv.0 is missing" in found and any(f.startswith("input past_key.0") for f in found)
    assert build_command(bundle, options).endswith("--dialect plugin")
