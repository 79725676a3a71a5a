"""bench/: what a script lacks, or was asked wrongly, is said in one line, with the remedy."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from unittest.mock import MagicMock

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


def run_script(name: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> object:
    """Its exit status; nothing may be loaded."""
    monkeypatch.setattr(native, "load", lambda: pytest.fail("looked for a GPU"))
    monkeypatch.setattr(sys, "argv", [f"bench_{name}.py", *options])
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCH / f"bench_{name}.py"), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bundle", "/nope"), "error: /nope is not a directory; a bundle is what `edgellm export"),
        (("--requests", "0"), "error: --requests 0: allowed is 1 and more"),
        (("--callers", "0"), "error: --callers 0: allowed is 1 and more"),
        (("--context", "15"), "error: --context 15: allowed is 16 and more"),
        (("--different", "-1"), "error: --different -1: allowed is 1 and more"),
        (("--slots", "0"), "error: max_slots is 0"),
    ],
)
def test_a_soak_that_cannot_be_is_one_line_and_status_2(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_script("soak", options, monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(words) and captured.err.count("\n") == 1


@pytest.mark.parametrize("missing", ["rclpy", "edgellm_ros.action"])
def test_without_ros_the_nodes_benchmark_still_has_help_and_a_run_says_what_is_missing(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ("", ".action", ".context", ".executors", ".node", ".qos")
    for name in (*(f"rclpy{part}" for part in parts), "builtin_interfaces", "builtin_interfaces.msg"):
        monkeypatch.setitem(sys.modules, name, MagicMock())  # whether this machine has ROS or not
    monkeypatch.delitem(sys.modules, "edgellm_ros.ros.client", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert run_script("node", ("--help",), monkeypatch) == 0
    assert "--bundle BUNDLE" in capsys.readouterr().out
    assert run_script("node", ("--bundle", "b"), monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: the Python module {missing} is missing: ") and error.count("\n") == 1
    assert "run `make demo`, then . tools/env.sh" in error


@pytest.mark.parametrize("batch", ["0", "9"])
def test_a_batch_that_does_not_decode_together_is_refused_before_anything_is_loaded(
    batch: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_script("decode", ("--batch", "1", batch), monkeypatch) == 2
    assert f"argument --batch: {batch} is not allowed: 1 to 8" in capsys.readouterr().err


@pytest.mark.parametrize(("batch", "words"), [(1, "bf16 3.000 (1.50 x);"), (8, "bf16 3.000 (of one sequence);")])
def test_torchs_time_of_one_sequence_has_a_ratio_to_ours_of_one_only(
    batch: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    script = runpy.run_path(str(BENCH / "bench_decode.py"))
    result = script["Result"](
        "llama-1b", "bf16", "", batch, 512, ms_per_token=2.0, device_ms=2.0, sampled_ms=2.0, plain_ms=2.0, host_ms=2.0,
        gb_per_s=1.0, share=0.5, prefill_ms={}, torch_ms=3.0, load_s=1.0, memory_mb=1.0, tiles={}, untuned_ms=0.0,
    )  # fmt: skip
    script["print_result"](result)
    assert words in capsys.readouterr().out
