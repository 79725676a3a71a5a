#!/usr/bin/env python3
"""compute-sanitizer over the short run of every path: a process for each kind of model and tool, a line as each ends.

    tools/sanitize.py [--tool racecheck memcheck] [--limit-s 560] [-k gemma3]

A kind's test runs once without a tool, which also makes its bundle; then every tool runs it, many side by side. What
has not ended at --limit-s, or when SIGTERM comes, is stopped, and its line says how far it came. cuBLASLt's kernels are
not ours to check, and racecheck fails in them, so it runs prompts through the decode kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [ROOT / "test" / "gpu" / name for name in ("test_short_run.py", "test_short_products.py")]
_SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"
_DETAILS = 12  # lines of a log that is not clean
LEFT_OUT = {"racecheck": "no-products short", "memcheck": "short", "synccheck": "short", "initcheck": "short"}
_SUMMARY = re.compile(r"^========= (?:ERROR|RACECHECK) SUMMARY: (.*)$", re.MULTILINE)
_FINDING = re.compile(
    r"^========= ((?:Error: |Warning: Race|Invalid |Program hit |Uninitialized |Barrier error|Internal ).*)$",
    re.MULTILINE,
)
_PART = re.compile(r"part (\S+) ([\d.]+) s$", re.MULTILINE)


@dataclass
class Job:
    """One kind's test under one tool, or under none."""

    test: str  # pytest's name, file and all
    tool: str
    log: Path
    started: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None
    place: int = 0  # among those that run side by side

    @property
    def kind(self) -> str:
        """What stands between the brackets."""
        return kind_of(self.test)


def kind_of(test: str) -> str:
    """What pytest has between the brackets."""
    return test.partition("[")[2].rstrip("]")


def verdict(tool: str, code: int | None, text: str) -> tuple[bool, str]:
    """(clean?, what a log says); `code` is None where the process was stopped."""
    parts = ", ".join(f"{name} {seconds} s" for name, seconds in _PART.findall(text)) or "nothing"
    findings = _FINDING.findall(text)
    if code is None:
        return False, f"CUT OFF after {parts}; {len(findings)} findings so far"
    if not tool:
        return code == 0, f"passed: {parts}" if code == 0 else f"FAILED (exit {code}): {_last_line(text)}"
    summary = _SUMMARY.findall(text)
    if not summary:
        return False, f"NO SUMMARY (exit {code}): {_last_line(text)}"
    clean = all(re.match(r"0 (errors|hazards)\b", line) for line in summary) and not findings
    if clean and code == 0:
        return True, f"{summary[-1]}: {parts}"
    if clean:
        return False, f"TEST FAILED (exit {code}) after {parts}, {summary[-1]}"
    return False, f"FOUND {summary[-1]}; first: {findings[0] if findings else _last_line(text)}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"


def tests_of(files: list[Path], python: str, words: list[str]) -> list[str]:
    """The tests that have every path, as pytest names them."""
    command = [python, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *map(str, files), *words]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout
    return re.findall(r"^(\S+::test_every_path_once\[.+\])$", output, re.MULTILINE)


def share_of_cpus(place: int, jobs: int) -> set[int]:
    """The processors of job `place` of `jobs`: libraries start a spinning thread for each that they may use."""
    cpus = sorted(os.sched_getaffinity(0))
    return set(cpus[place::jobs]) or {cpus[place % len(cpus)]}


class Runs:
    """At most `num_jobs` processes at a time; a kind's tools follow its run without one."""

    def __init__(self, args: argparse.Namespace, tests: list[str], directory: Path) -> None:
        self._args, self._directory = args, directory
        self._waiting = [Job(test, "", self._log(kind_of(test), "plain")) for test in tests]
        self._running: list[Job] = []
        self.failed = not tests

    def go(self, deadline: float, stopped: list[int]) -> None:
        """Run all and print a line for each, until `deadline` or until `stopped` holds a signal."""
        while self._waiting or self._running:
            if time.monotonic() > deadline or stopped:
                self._stop()
                return
            while self._waiting and len(self._running) < self._args.jobs:
                self._start(self._waiting.pop(0))
            for job in [job for job in self._running if job.process is not None and job.process.poll() is not None]:
                self._end(job)
            time.sleep(0.1)

    def _log(self, kind: str, name: str) -> Path:
        return self._directory / f"sanitize-{kind}-{name}.log"

    def _command(self, job: Job) -> list[str]:
        # No limit for a test: under racecheck one takes longer than the tests' own.
        command = [self._args.python, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-o", "timeout=0", job.test]
        if not job.tool:
            return command
        ours = ["--error-exitcode", "9", "--kernel-name", "kns=edgellm", *self._args.option]
        return [self._args.sanitizer, "--tool", job.tool, *ours, *command]

    def _start(self, job: Job) -> None:
        environment = os.environ | {
            "EDGELLM_SHORT_RUN_BUNDLES": str(self._directory / "bundles"),
            "EDGELLM_SHORT_RUN": LEFT_OUT.get(job.tool, ""),
            "OMP_NUM_THREADS": "2",
            "PYTHONUNBUFFERED": "1",
        }
        job.started = time.monotonic()
        job.place = min(set(range(self._args.jobs)) - {other.place for other in self._running})
        cpus = share_of_cpus(job.place, self._args.jobs)
        with job.log.open("wb") as log:
            command = self._command(job)
            job.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, cpus),
            )  # fmt: skip
        self._running.append(job)

    def _end(self, job: Job) -> None:
        assert job.process is not None
        self._running.remove(job)
        self._print(job, job.process.returncode)
        if not job.tool:  # also where the test failed: a finding may say why
            self._waiting += [Job(job.test, tool, self._log(job.kind, tool)) for tool in self._args.tool]
            self._waiting.sort(key=lambda waiting: ["", *self._args.tool].index(waiting.tool))  # the slowest first

    def _print(self, job: Job, code: int | None) -> None:
        text = job.log.read_text(encoding="utf-8", errors="replace")
        clean, words = verdict(job.tool, code, text)
        self.failed |= not clean
        seconds = time.monotonic() - job.started
        print(f"{job.tool or 'no tool':<10} {job.kind:<30} {seconds:5.0f} s  {words}", flush=True)
        if not clean:  # what a tool says, or how a test failed
            marks = ("E ", "=========") if job.tool else ("E ",)
            lines = [line for line in text.splitlines() if line.startswith(marks)]
            print("\n".join(f"    {line}" for line in lines[:_DETAILS]), flush=True)

    def _stop(self) -> None:
        for job in self._running:
            assert job.process is not None
            code = job.process.poll()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
            self._print(job, code)
        waiting = [f"{job.tool or 'no tool'} {job.kind}" for job in self._waiting]
        if waiting:
            print(f"never started: {', '.join(waiting)}", flush=True)
        self.failed = True


def arguments(words: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line; what it does not know is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", nargs="+", default=["racecheck", "memcheck"], choices=sorted(LEFT_OUT))
    parser.add_argument("--limit-s", type=float, default=560.0)
    parser.add_argument("--jobs", type=int, default=max(2, min(10, (os.cpu_count() or 2) * 2 // 3)))
    parser.add_argument("--logs", type=Path, help="where logs and bundles are kept; default: nowhere")
    parser.add_argument("--sanitizer", default=shutil.which("compute-sanitizer") or _SANITIZER)
    parser.add_argument("--option", action="append", default=[], help="compute-sanitizer's own: --option=--NAME=X")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--tests", type=Path, nargs="+", default=TESTS, help=argparse.SUPPRESS)
    return parser.parse_known_args(words)


def main(words: list[str] | None = None) -> int:
    """Returns 1 unless every tool found nothing in every kind."""
    args, others = arguments(words)
    if not shutil.which(args.sanitizer):
        print(f"error: no compute-sanitizer at {args.sanitizer}; it is in the CUDA toolkit", file=sys.stderr)
        return 2
    deadline = time.monotonic() + args.limit_s
    stopped: list[int] = []
    tests = tests_of(args.tests, args.python, others)
    if not tests:
        named = " ".join(map(str, args.tests))
        print(f"error: {named} has no test_every_path_once for {others}", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        directory = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        runs = Runs(args, tests, directory.resolve())
        before = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        try:
            runs.go(deadline, stopped)
        finally:
            signal.signal(signal.SIGTERM, before)
        return int(runs.failed)


if __name__ == "__main__":
    sys.exit(main())
