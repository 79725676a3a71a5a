"""What a person runs on a robot that has an engine, over the double of libnvinfer: verify, bench, inspect and doctor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import double_driver
import pytest

from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main

pytestmark = [
    pytest.mark.usefixtures("use_the_double"),
    pytest.mark.skipif(bool(double_driver.NO_DOUBLE), reason=double_driver.NO_DOUBLE),
]


@pytest.fixture
def bundle(with_engine: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("COLUMNS", "200")
    return with_engine("gpu_qwen3", build={"max_context": 256})


def test_verify_reads_by_the_engine_what_the_cuda_executor_reads(bundle: Bundle, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A robot answers when it is asked, and waits when it is not. " * 8, encoding="utf-8")
    found = {}
    for executor in ("cuda", "tensorrt", "auto"):
        assert main(["verify", str(bundle.path), "--text", str(text), "--executor", executor]) == 0
        found[executor] = Bundle.open(bundle.path).manifest.quality
    assert [found[name].executor.split()[0] for name in found] == ["cuda", "tensorrt", "tensorrt"]
    assert found["tensorrt"].perplexity == pytest.approx(found["cuda"].perplexity, rel=0.03)  # bf16's rounding
    assert found["auto"].perplexity == found["tensorrt"].perplexity


def test_bench_compares_the_engine_with_the_cuda_executor(bundle: Bundle, take_output: Callable[[], str]) -> None:
    options = ("--prompt-tokens", "32", "--context", "64", "--new-tokens", "32", "--rounds", "2", "--json", "-")
    assert main(["bench", "--bundle", str(bundle.path), "--compare", "cuda", "tensorrt", *options]) == 0
    runs = json.loads(take_output())["runs"]
    assert [run["executor"] for run in runs] == ["cuda", "tensorrt"]
    for run in runs:
        assert "kernel" in run["read_bandwidth"]["method"] and run["ratios"] is not None
        for row in run["decode"]:
            assert row["executor"]["tokens_per_s"] > 0 and row["engine"]["tokens_per_s"] > 0


def test_inspect_and_doctor_name_the_engine_that_would_be_loaded(bundle: Bundle, take_output: Callable[[], str]) -> None:
    assert main(["inspect", str(bundle.path)]) == 0
    assert "fits this machine" in take_output()
    main(["doctor", "--bundle", str(bundle.path)])
    shown = take_output()
    assert "used by the executor `tensorrt`" in shown and "fits this machine" in shown
