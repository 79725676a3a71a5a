"""bench/: a script that needs a GPU says so in one line, with the remedy, where there is none."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from edgellm_ros import native
from edgellm_ros.errors import UnsupportedError

BENCH = Path(__file__).parents[2] / "bench"


def no_gpu() -> None:
    raise UnsupportedError("no NVIDIA GPU: no NVIDIA driver is installed")


@pytest.mark.parametrize("name", ["decode", "engine", "lora", "soak", "verify"])
def test_without_a_gpu_a_script_ends_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", no_gpu)
    monkeypatch.setattr(sys, "argv", [f"bench_{name}.py"])
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    with pytest.raises(SystemExit, match=r"^no GPU: no NVIDIA GPU: no NVIDIA driver is installed$"):
        runpy.run_path(str(BENCH / f"bench_{name}.py"), run_name="__main__")
