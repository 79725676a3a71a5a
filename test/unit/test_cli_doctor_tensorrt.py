"""`edgellm doctor` on a robot with TensorRT: the library, what `edgellm build` needs, and the plugins of older versions."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from edgellm_ros import native, trt_plugins
from edgellm_ros.cli.check import Check, State
from edgellm_ros.cli.engine_checks import check_tensorrt
from edgellm_ros.errors import UnsupportedError


class ModuleOfATest:
    """Stands for the native module on a robot."""

    TENSORRT_HEADERS, ARCHITECTURES, PTX_ARCHITECTURE = "10.3", ("87",), ""

    def __init__(self, version: tuple[int, ...], reason: str = "", path: str = "libnvinfer.so.10") -> None:
        self._found = path, version, reason

    def find_tensorrt(self, candidates: list[str]) -> tuple[str, tuple[int, ...], str]:
        return self._found

    def count_devices(self) -> tuple[int, str]:
        return 1, ""

    def device_info(self) -> dict[str, Any]:
        return {"name": "Orin", "compute_capability": (8, 7)}


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Any:
    def look(module: Any, builder: bool = True, plugins: bool = True) -> dict[str, Check]:
        def find_library() -> Path:
            if plugins:
                return Path("/opt/libedgellm_plugins.so")
            raise UnsupportedError("libedgellm_plugins.so is not in /opt: it is built with NvInfer.h; install the headers")

        monkeypatch.setattr(native, "import_module", lambda: (module, ""))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if builder else None)
        monkeypatch.setattr(trt_plugins, "find_library", find_library)
        return {check.name: check for check in check_tensorrt()}

    return look


def test_where_engines_can_be_loaded_what_building_one_needs_is_checked_too(doctor: Any) -> None:
    whole = doctor(ModuleOfATest((10, 3, 0, 30)))
    assert {check.state for check in whole.values()} == {State.OK} and len(whole) == 3
    assert "used by the executor `tensorrt`" in whole["TensorRT"].found
    assert "engines of this TensorRT need" in whole["TensorRT plugins"].found
    bare = doctor(ModuleOfATest((10, 3, 0, 30)), builder=False, plugins=False)
    assert bare["TensorRT"].state is State.OK
    assert bare["TensorRT's builder"].state is State.MISSING and "--system-site-packages" in bare["TensorRT's builder"].remedy
    plugins = bare["TensorRT plugins"]
    assert plugins.state is State.MISSING and "need them" in plugins.found and plugins.remedy == "install the headers"


def test_plugins_are_not_missed_where_tensorrt_has_attention(doctor: Any) -> None:
    assert "TensorRT plugins" not in doctor(ModuleOfATest((10, 15, 1, 29)), plugins=False)
    assert doctor(ModuleOfATest((10, 14, 1, 48)), plugins=False)["TensorRT plugins"].state is State.MISSING


def test_what_is_not_used_is_said_alone(doctor: Any) -> None:
    other = doctor(ModuleOfATest((), "libz.so is not TensorRT's runtime: it has no getInferLibVersion", "libz.so"))
    assert list(other) == ["TensorRT"] and other["TensorRT"].state is State.MISSING
    assert other["TensorRT"].found.startswith("not TensorRT (libz.so)") and "has no getInferLibVersion" in other["TensorRT"].found
    assert list(doctor(ModuleOfATest((), "libnvinfer.so.10: cannot open", ""))) == ["TensorRT"]
