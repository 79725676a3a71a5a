"""The verbs that look at a machine or a bundle: what they show is true, and their exit codes can be trusted."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_bundle import write_bundle

from edgellm_ros.bundle import TOKENIZER, Bundle
from edgellm_ros.cli import checks
from edgellm_ros.cli.checks import Check, State
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import CheckpointError
from edgellm_ros.manifest import MANIFEST


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "160")
    return write_bundle(tmp_path / "bundle", think_start="<think>", think_end="</think>")


def test_inspect_shows_the_facts_of_the_manifest(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    for fact in ("tiny [bold] robot (llama)", "2 of width 8", "4 heads, 1 KV heads of 8", "theta 500000", "256 tokens"):
        assert fact in shown
    for fact in ("int4 in groups of 32", "<think> … </think>", "made by a test", TOKENIZER, "sizes and sha256 agree"):
        assert fact in shown


def test_inspect_json_is_the_manifest(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((bundle / MANIFEST).read_text())


def test_inspect_finds_a_changed_file_unless_told_not_to_look(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (bundle / TOKENIZER).read_text()
    (bundle / TOKENIZER).write_text(text.replace("B", "b", 1))
    assert main(["inspect", str(bundle)]) == 2
    assert TOKENIZER in capsys.readouterr().err
    assert main(["inspect", str(bundle), "--no-verify"]) == 0
    assert "not checked" in capsys.readouterr().out


def test_export_passes_everything_on_and_ends_with_the_table(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export = pytest.importorskip("edgellm_ros.toolchain.export")
    seen: dict[str, Any] = {}

    def fake(checkpoint: Path, output: Path, *, progress: Any, **options: Any) -> Bundle:
        seen.update(checkpoint=checkpoint, output=output, **options)
        progress("weights", 1, 2)
        progress("weights", 2, 2)
        return Bundle.open(bundle)

    monkeypatch.setattr(export, "export_bundle", fake)
    options = ["--weights", "int8", "--max-context", "128", "--name", "n", "--force", "--max-lora-rank", "8", "--lm-head", "int8"]
    options += ["--dialect", "plugin"]
    assert main(["export", "checkpoint", "-o", "out", *options]) == 0
    assert callable(seen.pop("accept"))  # looks at the chat template
    assert seen == {
        "checkpoint": Path("checkpoint"),
        "output": Path("out"),
        "weights": "int8",
        "max_context": 128,
        "name": "n",
        "overwrite": True,
        "vocab_map": None,
        "max_lora_rank": 8,
        "lm_head": "int8",
        "dialect": "plugin",
    }
    assert "tiny [bold] robot" in capsys.readouterr().out


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_terminal_without_unicode_gets_the_table_all_the_same(
    errors: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["inspect", str(bundle)]) == 0
    out.flush()
    assert b"tiny [bold] robot" in out.buffer.getvalue() and b"\\u2026" in out.buffer.getvalue()


def test_export_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    export = pytest.importorskip("edgellm_ros.toolchain.export")

    def fail(*args: Any, **options: Any) -> None:
        raise CheckpointError("tensor x is missing")

    monkeypatch.setattr(export, "export_bundle", fail)
    assert main(["export", "c", "-o", "o"]) == 2
    assert "error: tensor x is missing" in capsys.readouterr().err


def test_export_without_the_toolchain_extra_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "edgellm_ros.toolchain.export", raising=False)
    for name in [n for n in sys.modules if n == "onnx" or n.startswith(("onnx.", "edgellm_ros.toolchain."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", "c", "-o", "o"]) == 2
    assert "pip install 'edgellm_ros[toolchain]'" in capsys.readouterr().err


def doctor(monkeypatch: pytest.MonkeyPatch, *found: Check) -> int:
    def fake(bundle: Path | None = None) -> Iterator[Check]:
        yield from found

    monkeypatch.setattr(checks, "all_checks", fake)
    return main(["doctor"])


def test_doctor_fails_only_for_what_the_base_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = Check("base", "Python", State.OK, "3.12")
    optional = Check("ROS", "rclpy", State.MISSING, "none", "source ROS [first]")
    broken = Check("base", "numpy", State.FAILED, "not installed", "pip install edgellm_ros")
    assert doctor(monkeypatch, fine, optional) == 0
    assert "source ROS [first]" in capsys.readouterr().out
    assert doctor(monkeypatch, fine, broken) == 1
    assert "failed: numpy" in capsys.readouterr().out


def test_doctor_runs_here_and_the_base_that_runs_the_tests_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in ("Python", "onnxruntime", "rclpy", "C++ compiler", "NVIDIA GPU", "TensorRT", "CPU", "free memory"):
        assert name in shown


def test_doctor_works_where_rich_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n == "rich" or n.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert doctor(monkeypatch, Check("base", "rich", State.FAILED, "not installed", "pip install rich")) == 1
    assert "failed   base: rich: not installed  pip install rich" in capsys.readouterr().out


def test_a_missing_package_and_an_old_python_are_failures() -> None:
    assert checks.check_package("base", "no-such-package", State.FAILED, "r").state is State.FAILED
    assert checks.check_python((3, 9, 18)).state is State.FAILED
    assert checks.check_python((3, 10, 0)).state is State.OK


def test_the_packages_that_doctor_looks_for_are_those_of_pyproject() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()

    def names(pattern: str) -> set[str]:
        match = re.search(pattern, text, re.DOTALL | re.MULTILINE)
        assert match
        return set(re.findall(r'"([A-Za-z0-9_-]+)', match.group(1)))

    assert names(r"^dependencies = \[(.*?)\]") == set(checks.BASE)
    assert names(r"^toolchain = \[(.*?)\]") == set(checks.TOOLCHAIN)


def test_cpu_features_and_memory_are_read_from_proc() -> None:
    cpuinfo = "processor\t: 0\nmodel name\t: Testcore 3000\nflags\t\t: fpu avx2 avx512_vnni fma nothing\n"
    found = checks.check_cpu(cpuinfo)
    assert found.state is State.OK and "Testcore 3000" in found.found and found.found.endswith("avx2 fma avx512_vnni")


def test_free_memory_is_what_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "available_memory", lambda: 50 * 2**20)
    [found] = [check.found for check in checks.all_checks() if check.name == "free memory"]
    assert found == "50.0 MiB"


def test_nvcc_is_found_where_building_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = {check.name: check for check in checks.check_compiler()}
    assert found["CUDA compiler"] == checks.Check("build", "CUDA compiler", State.OK, str(nvcc))
    assert found["CMake"].state is State.MISSING


def test_ros_that_is_sourced_but_not_usable_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    rclpy, interfaces = checks.check_ros({"ROS_DISTRO": "jazzy"})
    assert rclpy.state is State.MISSING and "jazzy is sourced" in rclpy.found
    assert interfaces.state is State.MISSING and "colcon build" in interfaces.remedy
    assert next(checks.check_ros({})).found == "none"


def test_a_bundle_is_checked_for_wholeness_and_for_fitting_in_memory(bundle: Path) -> None:
    cache = 2 * 2 * 1 * 8 * 4 * 256 * 4  # K and V, layers, KV heads, head dim, bytes, tokens, slots
    size = sum(file.stat().st_size for file in bundle.iterdir() if file.name != MANIFEST)
    config = EngineConfig()
    files, memory, engine = checks.check_bundle(bundle, cache + size, config)
    assert files.state is memory.state is State.OK
    assert engine.state is State.MISSING and f"edgellm build {bundle}" in engine.found
    assert [c.state for c in checks.check_bundle(bundle, cache + size - 1, config)][:2] == [State.OK, State.FAILED]
    (memory,) = (check for check in checks.check_bundle(bundle, 1, config) if check.name == "memory")
    assert memory.remedy == "load it with a smaller max_slots or max_context"  # in int4 it is
    os.truncate(bundle / TOKENIZER, 10)
    (broken,) = checks.check_bundle(bundle, cache + size, config)
    assert broken.state is State.FAILED and "truncated" in broken.found


@pytest.mark.parametrize(("free", "state"), [(7 * 2**30, State.OK), (5 * 2**30, State.FAILED)])
def test_where_the_gpu_will_run_a_bundle_its_plan_and_memory_count(
    free: int, state: State, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "plan_on_gpu", lambda bundle, config: (6 * 2**30, free))
    memory = list(checks.check_bundle(bundle, 1, EngineConfig()))[1]
    assert memory.state is state and memory.found.startswith("about 6.0 GiB of the GPU's memory (4 slots of 256 tokens), ")
    assert ("or with kv_cache fp8" in memory.remedy) == (state is State.FAILED)


def test_doctor_needs_none_of_the_packages_that_it_looks_for() -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({[*checks.BASE, *checks.TOOLCHAIN, 'yaml']!r}))\n"
        "del sys.modules['rich']\n"  # which shows the table
        "from edgellm_ros.cli.main import main; main(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "free memory" in done.stdout and not done.stderr, (done.stdout, done.stderr)
