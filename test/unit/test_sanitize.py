"""tools/sanitize.py: what it makes of compute-sanitizer's words, over stand-ins for the tool and for pytest."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

PARTS = "part load 2.5 s\n.part run 31.0 s\n"
# As compute-sanitizer 2025.3 ends a run.
CLEAN = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
HAZARD = (
    "========= Error: Race reported between Write access at edgellm::kernels::sample+0x90 in sampling.cu:12\n"
    "=========     and Read access at edgellm::kernels::sample+0xb0 in sampling.cu:14 [64 hazards]\n"
)
FOUND = HAZARD + "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
PYTHON = """#!/bin/bash
case "$*" in *--collect-only*) printf 'test_x.py::test_every_path_once[%s]\\n' clean racy slow; exit ;; esac
echo "part load 0.1 s"
[ -n "$EDGELLM_SHORT_RUN_BUNDLES" ] || exit 1
[ "$TOOL:$EDGELLM_SHORT_RUN" = "racecheck:no-products short" ] || [ "$TOOL" != racecheck ] || exit 1
case "$TOOL$*" in [a-z]*slow*)
  while [ $(ls "$MARKS" | wc -l) -lt 4 ]; do sleep 0.1; done
  sleep 1; kill -TERM "$TOLD"; sleep 60 ;;
esac
"""
STAND_IN = """#!/bin/bash
[ "$1 $3 $5" = "--tool --error-exitcode --kernel-name" ] || exit 5
tool=$2; shift 6
TOOL=$tool "$@"; code=$?; touch "$MARKS/$$"
case "$*" in *racy*) printf '%s' "$RACY"; exit 9 ;; esac
echo "========= ERROR SUMMARY: 0 errors"; exit $code
"""


@pytest.fixture(scope="module")
def sanitize() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "tools" / "sanitize.py"
    spec = importlib.util.spec_from_file_location("sanitize", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sanitize"] = module  # where its dataclass looks for its annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("code", "log", "clean", "words"),
    [
        (0, PARTS + CLEAN, True, "0 hazards displayed (0 errors, 0 warnings): load 2.5 s, run 31.0 s"),
        (9, PARTS + FOUND, False, "FOUND 1 hazard displayed (1 error, 0 warnings); first: Error: Race reported between"),
        (0, PARTS, False, "NO SUMMARY (exit 0): .part run 31.0 s"),
        (1, "E assert 0\n1 failed in 3 s\n" + CLEAN, False, "TEST FAILED (exit 1) after nothing, 0 hazards"),
        (None, PARTS + HAZARD, False, "CUT OFF after load 2.5 s, run 31.0 s; 1 findings so far"),
    ],
)
def test_only_a_summary_without_findings_of_a_test_that_passed_is_clean(
    code: int | None, log: str, clean: bool, words: str, sanitize: ModuleType
) -> None:
    found = sanitize.verdict("racecheck", code, log)
    assert found[0] is clean
    assert found[1].startswith(words)


def test_every_kind_and_tool_has_a_line_also_where_it_was_told_to_stop(
    sanitize: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool, python = tmp_path / "compute-sanitizer", tmp_path / "python"
    tool.write_text(STAND_IN)
    python.write_text(PYTHON)
    for path in (tool, python):
        path.chmod(0o755)
    (tmp_path / "marks").mkdir()
    for name, value in {"RACY": FOUND, "MARKS": str(tmp_path / "marks"), "TOLD": str(os.getpid())}.items():
        monkeypatch.setenv(name, value)
    code = sanitize.main(["--sanitizer", str(tool), "--python", str(python), "--limit-s", "60", "--jobs", "6"])
    assert code == 1
    lines = {tuple(line.split()[:2]): line for line in capsys.readouterr().out.splitlines()}
    for name in ("racecheck", "memcheck"):
        assert "0 errors: load 0.1 s" in lines[name, "clean"]
        assert "FOUND 1 hazard" in lines[name, "racy"]
        assert "CUT OFF after load 0.1 s; 0 findings so far" in lines[name, "slow"]


def test_jobs_share_the_processors(sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 6})
    assert [sanitize.share_of_cpus(place, 2) for place in range(2)] == [{0, 2, 6}, {1, 5}]
    assert [sanitize.share_of_cpus(place, 7) for place in (0, 4, 5, 6)] == [{0}, {6}, {0}, {1}]
