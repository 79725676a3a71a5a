"""An engine whose slots are shorter than the bundle's self-test is not loaded, and what would help is said."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import ORIN, write_engine

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.errors import ConfigError
from edgellm_ros.executors import create_executor, engine_preflight, tensorrt


class Loaded(Exception):
    """The engine was loaded."""


def load(*_: Any) -> None:
    raise Loaded


@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_an_engine_too_short_for_the_self_test_is_not_loaded(
    batching: str,
    tiny_bundle: Callable[..., Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle("llama", "int8").path, tmp_path / "bundle"))
    needed = bundle.manifest.self_test.num_tokens
    usable = 32 - (batching == "fast")  # the last place is then for slots that idle
    write_engine(bundle, "short", BuildOptions(2, 16, 32, activations="fp16"))
    monkeypatch.setattr(engine_preflight, "probe_machine", lambda: ORIN)
    monkeypatch.setattr(tensorrt, "TensorRTExecutor", load)
    monkeypatch.setattr("edgellm_ros.executors._cuda_reason", lambda bundle: "no NVIDIA GPU")
    config = EngineConfig(max_slots=2, executor="tensorrt", decode_batching=batching)
    said = f"max_context is {usable} tokens, .* self-test needs {needed} or more; build .* --max-context above {needed}, or load"
    with pytest.raises(ConfigError, match=said):
        create_executor(bundle, config)
    with caplog.at_level(logging.WARNING):
        made = create_executor(bundle, EngineConfig(max_slots=2, decode_batching=batching))
    made.close()
    assert made.info.name == "onnxruntime" and "an engine fits and cannot be used: max_context is" in caplog.text
    with pytest.raises(Loaded):
        create_executor(bundle, EngineConfig(max_slots=2, executor="tensorrt", decode_batching=batching, self_test=False))
