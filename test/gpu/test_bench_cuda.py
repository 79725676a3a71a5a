"""`edgellm bench` on a GPU: a shape with random weights, and a bundle through both executors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main


def measure(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["bench", *options, "--rounds", "2", "--json", "-"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["complete"] is True
    return report


@pytest.mark.alone  # of what the GPU has free before and after
def test_a_shape_with_random_weights_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--shape", "llama-1b", "--weights", "int4", "--new-tokens", "32", "--prompt-tokens", "512", "--context")
    report = measure(capsys, *options, "512", "1024", "--batch", "1", "2")
    assert report["machine"]["gpu"]["name"] in report["runs"][0]["device"]
    assert [(run["executor"], run["batch"]) for run in report["runs"]] == [("cuda", 1), ("cuda", 2)]
    assert report["runs"][0]["read_bandwidth"]["gb_per_s"] > 10
    assert "kernel" in report["runs"][0]["read_bandwidth"]["method"]
    for run in report["runs"]:
        # Allocations are rounded up, and the context's own memory may have been taken before.
        assert run["memory"]["device_bytes"] > 0.5 * run["memory"]["planned_bytes"] > 300e6
        ratios = run["ratios"]
        assert ratios["context"] == 512 and 0.8 < ratios["plain_launches_over_graph"] < 20
        assert 1.0 < ratios["host_over_device"] < 50  # 128,256 logits cross and are drawn from
        for row in run["decode"]:
            for path in ("executor", "engine"):
                assert 0 < row[path]["read_share"] < 1.5
                ms = row[path]["ms_per_token"]["median"]
                assert row[path]["tokens_per_s"] * ms == pytest.approx(1e3 * row["batch"])
    (prefill,) = report["runs"][0]["prefill"]
    assert prefill["executor"]["tflop_per_s"] > 0 and prefill["engine"]["tokens_per_s"] > 0


@pytest.mark.alone
def test_a_bundle_is_measured_with_both_executors(
    gpu_bundle: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(gpu_bundle("gpu_qwen3", "int4").path)
    report = measure(capsys, "--bundle", path, "--compare", "onnxruntime", "cuda", "--new-tokens", "16")
    assert [run["executor"] for run in report["runs"]] == ["onnxruntime", "cuda"]
    assert report["runs"][0]["memory"]["device_bytes"] is None and report["runs"][1]["memory"]["device_bytes"] > 0
    for run in report["runs"]:
        assert all(row["executor"]["tokens_per_s"] > 0 and row["engine"]["tokens_per_s"] > 0 for row in run["decode"])
