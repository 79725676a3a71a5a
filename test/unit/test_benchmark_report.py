"""What a benchmark shows people: ratios to the right figure, a warning of a busy machine, points where they belong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from edgellm_ros.benchmark import report as shown
from edgellm_ros.benchmark.figures import Decode, Prefill, Run
from edgellm_ros.benchmark.measure import Plan
from edgellm_ros.benchmark.random_bundle import RandomBundle
from edgellm_ros.benchmark.read_bandwidth import ReadBandwidth
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import SamplingParams
from edgellm_ros.executors import ExecutorInfo


def run(executor: str, batch: int, ms: float, prefill_ms: float = 0.0) -> Run:
    """Three rounds of decoding, with `ms`, half and twice as long a step; through the engine each takes twice that."""
    made = Run(ExecutorInfo(executor, "a device", "int4", batch, 128, 99, 4, 1000), batch, load_s=1.0)
    made.read = ReadBandwidth(10.0, "by hand")
    rounds = [ms, ms / 2, ms * 2]
    made.decode.append(Decode(batch, 64, 8, 5e6 * ms, rounds, [2 * one for one in rounds]))
    if prefill_ms:
        made.prefill.append(Prefill(50, 1e9, [prefill_ms], [2 * prefill_ms]))
    return made


def report(*runs: Run, load: float = 0.0) -> dict[str, Any]:
    """As `edgellm bench` has it at its end, on a machine with 4 logical cores."""
    plan = Plan(("onnxruntime",), (50,), (64,), (1,), 8, 3, EngineConfig(), SamplingParams())
    made = shown.begin_report("edgellm bench", RandomBundle("llama-1b", "int4"), plan)
    made["machine"] |= {"logical_cores": 4, "load_average": load}
    return made | {"complete": True, "runs": [each.to_dict() for each in runs]}


def printed(made: dict[str, Any]) -> str:
    from rich.console import Console

    out = io.StringIO()
    shown.print_report(made, Console(file=out, width=200))
    return out.getvalue()


def rows(text: str, *begin: str) -> list[list[str]]:
    """The table's rows that begin with these words, without bars."""
    found = [line.replace("█", " ").split() for line in text.splitlines()]
    return [words for words in found if words[: len(begin)] == list(begin)]


def test_a_ratio_is_of_tokens_per_second_to_the_first_executors_of_the_same_batch_and_path() -> None:
    text = printed(
        report(
            run("onnxruntime", 1, 100.0, prefill_ms=500.0), run("onnxruntime", 2, 125.0),
            run("cuda", 1, 25.0, prefill_ms=50.0), run("cuda", 2, 25.0),
        )
    )  # fmt: skip
    for path, tokens_per_s in (("executor", ("10.0", "16.0", "40.0", "80.0")), ("engine", ("5.0", "8.0", "20.0", "40.0"))):
        found = rows(text, "64", path)
        assert [words[2] for words in found] == list(tokens_per_s)
        first, second, third, fourth = ({"4.00", "5.00", "8.00", "0.25", "0.20"} & set(words) for words in found)
        assert not first and not second, "nothing is compared with itself"
        assert (third, fourth) == ({"4.00"}, {"5.00"})
    assert text.count("ratios are tokens/s to onnxruntime's") == 2
    assert ["10.00" in words for words in rows(text, "50", "executor")] == [False, True]
    # 5e6 bytes a millisecond are 5 GB/s of the 10 that are read.
    assert all({"5.0", "50%"} <= set(words) for words in rows(text, "64", "executor"))


def test_a_figure_that_the_first_executor_lacks_has_no_ratio() -> None:
    text = printed(report(run("onnxruntime", 1, 100.0), run("cuda", 2, 25.0)))
    (words,) = [words for words in rows(text, "64", "executor") if words[2] == "80.0"]
    assert "8.00" not in words and "0.12" not in words


@pytest.mark.parametrize(("load", "busy"), [(0.0, False), (0.99, False), (1.0, True), (7.5, True)])
def test_a_quarter_of_the_cores_at_work_is_a_busy_machine(load: float, busy: bool) -> None:
    made = report(run("onnxruntime", 1, 100.0), load=load)
    assert bool(shown.busy_line(made)) is busy
    warning = f"the machine was busy when this began (load average {load} on 4 logical cores)"
    assert (warning in printed(made)) is busy


def test_the_plot_has_tokens_per_second_with_the_slowest_round_below_and_the_fastest_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from edgellm_ros.benchmark.plot import write_plot

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **options: drawn.append(self))
    write_plot(report(run("cuda", 1, 25.0), run("cuda", 2, 40.0), load=1.0), tmp_path / "speed.svg")
    (axes,) = drawn[0].axes
    assert axes.get_ylabel().startswith("decode speed (tokens/s") and axes.get_xlabel().startswith("context (tokens")
    found = []
    for container in axes.containers:
        line, _, (bars,) = container.lines
        ((x, y),) = line.get_xydata()
        ((x_low, low), (x_high, high)) = bars.get_segments()[0]
        assert x == x_low == x_high == 64
        found.append((low, y, high))
    # The slowest round takes twice the median's time, the fastest half of it.
    assert found == [pytest.approx((s / 2, s, s * 2)) for s in (40.0, 20.0, 50.0, 25.0)]
    assert "on a busy machine (load average 1.0)" in drawn[0].get_supxlabel()
