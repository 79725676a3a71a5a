"""A stored verdict: what fails a mark, and that whoever loads a bundle which did is told."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
from cli_bundle import serve_with_fakes, write_bundle

from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.errors import BundleError
from edgellm_ros.llm import LLM
from edgellm_ros.manifest import MANIFEST
from edgellm_ros.quality import Quality, QualityMark, TaskScore

RATIO = QualityMark("max_perplexity_ratio", 1.1234, 1.08)
VERDICT = Quality(
    scheme="int4", text="built-in", num_tokens=4000, perplexity=11.234, original_perplexity=10.0, marks=(RATIO,),
    tasks=(TaskScore("copy", 5, 3, 4), TaskScore("count", 4, 1, 2)),
)  # fmt: skip


def bundle_with(root: Path, quality: Quality) -> Path:
    write_bundle(root)
    manifest = dataclasses.replace(Bundle.open(root).manifest, quality=quality)
    (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("name", "value", "passed"),
    [("max_x", 1.08, True), ("max_x", 1.0801, False), ("max_x", float("nan"), False), ("max_x", float("inf"), False),
     ("min_x", 1.08, True), ("min_x", 1.0799, False), ("min_x", float("nan"), False)],
)  # fmt: skip
def test_a_mark_is_a_bound_that_includes_its_limit_and_nothing_undefined(name: str, value: float, passed: bool) -> None:
    assert QualityMark(name, value, 1.08).passed is passed


def test_a_verdict_survives_the_manifest(tmp_path: Path) -> None:
    assert Bundle.open(bundle_with(tmp_path / "b", VERDICT)).manifest.quality == VERDICT


def test_a_manifest_without_a_verdict_is_read_as_not_verified(tmp_path: Path) -> None:
    root = write_bundle(tmp_path / "b")
    raw = json.loads((root / MANIFEST).read_text())
    del raw["quality"]
    (root / MANIFEST).write_text(json.dumps(raw))
    assert Bundle.open(root).manifest.quality.summary() == "not verified"
    raw["quality"] = {"marks": [{"name": "max_x", "value": "1", "limit": 2}]}
    (root / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="quality: marks: value is '1'"):
        Bundle.open(root)


def test_tasks_are_summed_and_one_that_the_original_was_not_asked_leaves_its_sum_open() -> None:
    assert (VERDICT.tasks_passed, VERDICT.num_tasks, VERDICT.original_tasks_passed) == (4, 9, 6)
    tasks = (*VERDICT.tasks, TaskScore("capital", 5, 5))
    assert dataclasses.replace(VERDICT, tasks=tasks).original_tasks_passed is None


@pytest.mark.parametrize(("accepted", "text"), [(False, "FAILED as int4"), (True, "FAILED (let through) as int4")])
def test_inspect_and_whoever_loads_a_failed_bundle_are_told_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, accepted: bool, text: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "160")
    root = bundle_with(tmp_path / "b", dataclasses.replace(VERDICT, accepted=accepted))
    assert main(["inspect", str(root)]) == 0
    assert f"{text}: perplexity ratio 1.123, allowed is at most 1.08" in capsys.readouterr().out
    serve_with_fakes(monkeypatch)
    with caplog.at_level(logging.WARNING, "edgellm_ros"), LLM.open(root):
        pass
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and text in record.message and "1.123" in record.message


@pytest.mark.parametrize("quality", [Quality(), dataclasses.replace(VERDICT, marks=(QualityMark("max_x", 1, 2),))])
def test_a_bundle_that_passed_or_was_never_verified_is_loaded_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, quality: Quality
) -> None:
    root = bundle_with(tmp_path / "b", quality)
    serve_with_fakes(monkeypatch)
    with caplog.at_level(logging.WARNING, "edgellm_ros"), LLM.open(root):
        pass
    assert not caplog.records
