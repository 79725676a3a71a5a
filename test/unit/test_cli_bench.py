"""`edgellm bench`: a real measurement of a small model, its JSON and its plot."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_bundle import write_bundle
from doubles import EOS, FakeExecutor
from run_double import RunFakeExecutor

from edgellm_ros import native
from edgellm_ros.benchmark import read_bandwidth
from edgellm_ros.benchmark.figures import SCHEMA, SCHEMA_VERSION
from edgellm_ros.benchmark.measure import Benchmark
from edgellm_ros.benchmark.read_bandwidth import ReadBandwidth
from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.bench import _doubling
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import ConfigError, DeviceError

SVG = "{http://www.w3.org/2000/svg}"
FAST = ("--rounds", "2", "--new-tokens", "16")


@pytest.fixture
def path(tiny_bundle: Callable[[str, str], Bundle], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    return str(tiny_bundle("qwen3", "int4").path)


def check_spread(spread: dict[str, Any], rounds: int) -> None:
    assert len(spread["rounds"]) == rounds
    assert 0 < spread["min"] <= spread["median"] <= spread["max"] < 60_000
    assert spread["min"] == min(spread["rounds"]) and spread["max"] == max(spread["rounds"])


def test_json_has_every_figure_with_what_it_needs_to_mean_something(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prompt-tokens", "20", "50", "--context", "64", "32", "--batch", "2", "1", "--temperature", "0")
    command = ["bench", "--bundle", path, *FAST, "--executor", "onnxruntime", *options, "--json", "-"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["schema"], report["schema_version"], report["complete"]) == (SCHEMA, SCHEMA_VERSION, True)
    assert report["command"].split() == ["edgellm", *command]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", report["date"])
    assert report["machine"]["cpu"] and report["machine"]["physical_cores"] >= 1
    assert set(report["versions"]) >= {"edgellm_ros", "python", "numpy", "onnxruntime"}
    assert report["model"]["family"] == "qwen3" and report["model"]["weights"] == "int4"
    assert report["settings"]["contexts"] == [32, 64] and report["settings"]["sampling"]["temperature"] == 0
    assert [(run["executor"], run["batch"]) for run in report["runs"]] == [("onnxruntime", 1), ("onnxruntime", 2)]
    assert [row["prompt_tokens"] for row in report["runs"][0]["prefill"]] == [20, 50]
    for run in report["runs"]:
        assert run["read_bandwidth"]["gb_per_s"] > 0 and "NumPy" in run["read_bandwidth"]["method"]
        assert run["ratios"] is None  # nothing feeds itself on a CPU
        assert run["load_s"] > 0 and run["memory"]["device_bytes"] is None
        assert 0 < run["memory"]["resident_bytes"] <= run["memory"]["peak_bytes"]
        assert run["memory"]["planned_parts"] is None  # onnxruntime plans a sum only
        assert 64 + 16 <= run["capacity"] <= 256 and run["memory"]["planned_bytes"] > 0
        assert [(row["batch"], row["context"]) for row in run["decode"]] == [(run["batch"], 32), (run["batch"], 64)]
        for row in run["prefill"]:
            check_spread(row["executor"]["ms"], 2)
            check_spread(row["engine"]["time_to_first_token_ms"], 2)
            ms = row["executor"]["ms"]["median"]
            assert row["executor"]["tokens_per_s"] * ms == pytest.approx(1e3 * row["prompt_tokens"])
            assert row["executor"]["tflop_per_s"] > 0
        for row in run["decode"]:
            for way in ("executor", "engine"):
                check_spread(row[way]["ms_per_token"], 2)
                ms = row[way]["ms_per_token"]["median"]
                assert row[way]["tokens_per_s"] * ms == pytest.approx(1e3 * row["batch"])
                assert row[way]["gb_per_s"] * ms == pytest.approx(row["bytes_per_step"] * 1e-6)
                assert 0 < row[way]["read_share"] < 1.5
            assert row["engine_over_executor"] > 0


def test_tables_show_the_machine_the_command_and_both_paths(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    assert main(["bench", "--bundle", path, *FAST, "--context", "40", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["machine"]["cpu"] in shown and report["command"] in shown and "interrupted" not in shown
    decode = report["runs"][0]["decode"][0]
    for words in ("prefill", "decode", "first token", f"{decode['engine']['tokens_per_s']:,.1f}", "of read", "█"):
        assert words in shown
    assert f"{decode['executor']['ms_per_token']['median']:.3f} (" in shown


def test_comparing_executors_gives_ratios_to_the_first(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU the second executor is the first one under another name."""
    from edgellm_ros import executors

    create = executors.create_executor

    def as_cuda(bundle: Bundle, config: Any) -> Any:
        made = create(bundle, dataclasses.replace(config, executor="onnxruntime"))
        if config.executor == "cuda":
            made.info = dataclasses.replace(made.info, name="cuda")
            made.decode_tokens = lambda slots, at, first, count: [  # type: ignore[attr-defined]
                made.step([executors.SequenceStep(0, first_ids, at[0] + i)]) for i in range(count)
            ]
        return made

    import numpy as np

    first_ids = np.array([7], np.int32)
    monkeypatch.setattr(executors, "create_executor", as_cuda)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "")
    monkeypatch.setattr("edgellm_ros.executors.cuda.unsupported_reason", lambda bundle: "")
    bandwidth = "edgellm_ros.benchmark.measure.measure_read_bandwidth"
    monkeypatch.setattr(bandwidth, lambda executor, threads: ReadBandwidth(10.0, executor))
    monkeypatch.setattr("edgellm_ros.benchmark.measure.free_device_bytes", lambda: 1000)
    monkeypatch.setattr("edgellm_ros.benchmark.machine._gpu", lambda: None)
    assert main(["bench", "--bundle", path, *FAST, "--compare", "onnxruntime", "cuda"]) == 0
    shown = capsys.readouterr().out
    assert (
        shown.count("ratios are tokens/s to onnxruntime's") == 1 and shown.count("ratio\n") + shown.count("ratio ") > 1
    )
    assert main(["bench", "--bundle", path, "--compare", "cuda", "--executor", "cuda"]) == 2
    assert "--compare names the executors already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])  # whose bytes are known without a GPU's kernels
def test_what_feeds_itself_gets_the_ratios_of_graphs_and_draws(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a native executor; both batch sizes have ratios of their own, at the shortest context."""
    monkeypatch.setattr(read_bandwidth, "_read_gpu", lambda: ReadBandwidth(123.0, "a GPU's"))
    much = 1 << 40
    # Before a run's model, after it, and for a second copy; in the second run another process ends meanwhile.
    readings = iter([much, much - 5_000_000, much, much, much + 7_000_000, much])
    monkeypatch.setattr("edgellm_ros.benchmark.measure.free_device_bytes", lambda: next(readings, much))
    switched: list[bool] = []

    class Native(RunFakeExecutor):
        decoder = SimpleNamespace(use_graphs=switched.append)
        memory_plan: dict[str, int]

    def create(bundle: Bundle, config: EngineConfig) -> Native:
        made = Native(config.max_slots, config.max_context, allowed=128)
        made.info = dataclasses.replace(made.info, name=name, memory_bytes=1_302_000_000)
        made.memory_plan = {"weights": 1_200_000_000, "kv_cache": 102_000_000, "total": 1_302_000_000}
        return made

    monkeypatch.setattr("edgellm_ros.executors.create_executor", create)
    monkeypatch.setattr("edgellm_ros.benchmark.measure.NativeExecutor", Native)
    monkeypatch.setattr("edgellm_ros.benchmark.measure.fits_twice", lambda info: name == "tensorrt")
    file = tmp_path / "report.json"
    options = ("--rounds", "2", "--new-tokens", "8", "--prompt-tokens", "20", "--context", "40", "20", "--batch", "1", "2")
    assert main(["bench", "--bundle", str(write_bundle(tmp_path / "bundle")), *options, "--json", str(file)]) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    assert len(report["runs"]) == 2 and switched == [False, True] * 6  # a round that is not counted, then two
    for run in report["runs"]:
        assert (run["read_bandwidth"]["gb_per_s"] == 123.0) is (name == "tensorrt")
        assert all(row["executor"]["ms_per_token"]["median"] > 0 for row in run["decode"])
        ratios = run["ratios"]
        assert (ratios["context"], ratios["new_tokens"]) == (20, 8)
        for way in ("graph_ms", "plain_launches_ms", "drawn_on_device_ms", "drawn_on_host_ms"):
            check_spread(ratios[way], 2)
        assert ratios["host_over_device"] > 0
        memory = run["memory"]
        assert memory["planned_parts"] == {"weights": 1_200_000_000, "kv_cache": 102_000_000}
        assert sum(memory["planned_parts"].values()) == memory["planned_bytes"]
    taken = [run["memory"]["device_bytes"] for run in report["runs"]]
    assert taken == ([5_000_000, None] if name == "tensorrt" else [None, None])
    shown = capsys.readouterr().out
    assert shown.count("after 20 tokens: plain launches take") == 2
    assert shown.count("taken on the GPU") == (name == "tensorrt")
    assert shown.count("\nplanned for weights 1,200 MB, kv cache 102 MB\n") == 2


def test_a_model_that_would_end_at_once_is_measured_over_all_new_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ending(FakeExecutor):
        def step(self, batch: Any) -> Any:
            rows = super().step(batch)
            rows[:, EOS] = 100.0
            return rows

    made: list[Ending] = []

    def create(bundle: Bundle, config: EngineConfig) -> Ending:
        made.append(Ending(config.max_slots, config.max_context))
        made[-1].info = dataclasses.replace(made[-1].info, name="onnxruntime")
        return made[-1]

    monkeypatch.setattr("edgellm_ros.executors.create_executor", create)
    monkeypatch.setattr("edgellm_ros.benchmark.measure.measure_read_bandwidth", lambda *given: ReadBandwidth(1.0, "none"))
    command = ("--bundle", str(write_bundle(tmp_path / "bundle")), *FAST, "--context", "40", "--json", "-")
    assert main(["bench", *command]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"][0]["decode"]
    check_spread(row["engine"]["ms_per_token"], 2)
    ends = [step.position + len(step.token_ids) for call in made[0].calls for step in call]
    assert ends.count(40 + 16) == 3, "a round that is not counted, then two, each to its last token"


def test_the_plot_is_an_svg_with_a_point_for_each_context(path: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, file = tmp_path / "speed.svg", tmp_path / "report.json"
    assert main(["bench", "--bundle", path, *FAST, "--batch", "1", "2", "--plot", str(plot), "--json", str(file)]) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    contexts = report["settings"]["contexts"]
    assert len(contexts) >= 3 and contexts[-1] + 16 + 2 < report["runs"][0]["capacity"] <= 256
    root = ElementTree.parse(plot).getroot()
    assert root.tag == f"{SVG}svg"
    lines = {g.get("id"): g for g in root.iter(f"{SVG}g") if (g.get("id") or "").startswith("line-")}
    assert set(lines) == {f"line-onnxruntime-{b}-{way}" for b in (1, 2) for way in ("executor", "engine")}
    for line in lines.values():
        assert len(list(line.iter(f"{SVG}use"))) == len(contexts)


def test_the_plot_is_also_written_as_png(path: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "speed.png"
    assert main(["bench", "--bundle", path, *FAST, "--context", "20", "40", "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_plot_without_matplotlib_is_refused_at_once_with_the_extras_name(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    monkeypatch.setattr(Benchmark, "measure", lambda *args: pytest.fail("measured before the refusal"))
    assert main(["bench", "--bundle", path, "--plot", "speed.svg"]) == 2
    assert "pip install 'edgellm_ros[bench]'" in capsys.readouterr().err


def test_ctrl_c_shows_what_was_measured_so_far(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Benchmark.measure

    def interrupted(self: Benchmark, progress: Callable[[str], object]) -> None:
        def count(words: str) -> None:
            progress(words)
            if "after 48, engine" in words:
                raise KeyboardInterrupt

        measure(self, count)

    monkeypatch.setattr(Benchmark, "measure", interrupted)
    file = tmp_path / "report.json"
    options = ("--context", "24", "48", "--json", str(file))
    assert main(["bench", "--bundle", path, *FAST, *options]) == 130
    shown = capsys.readouterr().out
    assert "interrupted: this is what was measured so far" in shown and "first token" in shown
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["complete"] is False
    first, second = report["runs"][0]["decode"]
    assert first["engine"]["tokens_per_s"] > 0 and first["executor"]["read_share"] > 0
    assert second["executor"] is None and second["engine"] is None


def test_an_error_of_a_later_run_comes_after_what_was_measured(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm_ros import executors

    create = executors.create_executor

    def one_slot(bundle: Bundle, config: EngineConfig) -> Any:
        if config.max_slots > 1:
            raise ConfigError("the plan needs 900 MB, but 80 MB are free; lower max_slots")
        return create(bundle, config)

    monkeypatch.setattr(executors, "create_executor", one_slot)
    file = tmp_path / "report.json"
    options = ("--batch", "1", "2", "--context", "24", "--json", str(file))
    assert main(["bench", "--bundle", path, *FAST, *options]) == 2
    captured = capsys.readouterr()
    assert "stopped by an error: this is what was measured so far" in captured.out and "first token" in captured.out
    told = "the plan needs 900 MB, but 80 MB are free; lower max_slots; --batch is max_slots here"
    assert captured.err == f"error: {told}\n"
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["complete"] is False and report["stopped_by"] == told
    assert report["runs"][0]["decode"][0]["engine"]["tokens_per_s"] > 0
    assert main(["bench", "--bundle", path, *FAST, "--batch", "2", "--context", "24"]) == 2
    assert capsys.readouterr().out == ""  # nothing was measured


def test_ctrl_c_before_anything_was_measured_is_just_the_exit_code(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Benchmark, "measure", interrupted)
    assert main(["bench", "--bundle", path]) == 130
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("new_tokens", "longest"), [(128, 3966), (4092, 2), (4093, 4097), (5000, 3190)])
def test_many_new_tokens_leave_a_plot_contexts(
    new_tokens: int, longest: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a bundle that holds 8,192 tokens: 4,096 in all, or what fits where new tokens take so many."""
    plans: list[Any] = []

    def begin(self: Benchmark, bundle: Bundle, source: object, plan: Any) -> None:
        plans.append(plan)
        raise ConfigError("seen")

    opened = Bundle.open(Path(path))
    model = dataclasses.replace(opened.manifest.model, max_context=8192)
    opened = Bundle(opened.path, dataclasses.replace(opened.manifest, model=model))
    monkeypatch.setattr(Bundle, "open", lambda *args, **options: opened)
    monkeypatch.setattr(Benchmark, "__init__", begin)
    assert main(["bench", "--bundle", path, "--new-tokens", str(new_tokens), "--plot", "speed.svg"]) == 2
    assert plans[0].contexts[-1] == longest and plans[0].contexts[0] >= 1


def test_a_cpus_benchmark_does_not_ask_the_gpu(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose memory another process may hold, so that not even a context can be made."""

    def full() -> dict[str, Any]:
        raise DeviceError("memory.cpp:1: cudaMemGetInfo failed: out of memory")

    monkeypatch.setattr(native, "unavailable_reason", lambda: "")
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(device_info=full))
    options = ("--executor", "onnxruntime", "--context", "24", "--json", "-")
    assert main(["bench", "--bundle", path, *FAST, *options]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["gpu"] is None


def test_a_plots_contexts_double_up_to_the_capacity() -> None:
    assert _doubling(4096) == [512, 1024, 2048, 4096]
    assert _doubling(3900) == [512, 1024, 2048, 3900]
    assert _doubling(1100) == [275, 550, 1100]
    assert _doubling(100) == [25, 50, 100]
    assert _doubling(2) == [2]


def test_measuring_on_a_robot_loads_neither_torch_nor_the_toolchain(path: str) -> None:
    code = f"""
import sys
from edgellm_ros.cli.main import main
assert main(["bench", "--bundle", {path!r}, "--rounds", "1", "--new-tokens", "8", "--json", "-"]) == 0
heavy = ("torch", "transformers", "onnx", "edgellm_ros.toolchain", "matplotlib", "rclpy")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["complete"] is True
