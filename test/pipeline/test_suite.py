"""A model goes the whole way, from the checkpoint to an answer, with the commands that a user would type."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from suite import RECIPES, Case, parse_case, read_suite

from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.quality import Quality
from edgellm_ros.toolchain.families import FAMILIES
from edgellm_ros.toolchain.quantize.recipe import recipe_names
from edgellm_ros.toolchain.verify.passages import read_text

QUESTIONS = ("What is the capital of France?", "Count from one to five.", "Name a colour.")
ANSWER_TOKENS = 12


def run(*arguments: Any) -> float:
    """Run `edgellm ARGUMENTS`, which must succeed; returns the seconds it took."""
    started = time.monotonic()
    assert main([str(argument) for argument in arguments]) == 0
    return time.monotonic() - started


def answers(bundle: Path, case: Case, batch: int, folder: Path) -> tuple[list[str], float]:
    """The answers to QUESTIONS by `edgellm run`, and how many tokens/s were decoded."""
    requests = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
    content = {"batch_size": batch, "temperature": 0, "max_generate_length": ANSWER_TOKENS, "requests": requests}
    (folder / "in.json").write_text(json.dumps(content))
    run("run", "--bundle", bundle, "--input-file", folder / "in.json", "--output-file", folder / "out.json",
        "--profile-output-file", folder / "profile.json", "--max-context", case.context, "--max-slots", batch)  # fmt: skip
    responses = json.loads((folder / "out.json").read_text())["responses"]
    assert all(response["finish_reason"] in ("stop", "length") for response in responses), responses
    speed = json.loads((folder / "profile.json").read_text())["generation"]["tokens_per_second"]
    return [response["output_text"] for response in responses], speed


def text_of(case: Case, folder: Path) -> Path | None:
    words = 300 if case.is_tiny else case.text_words
    if not words:
        return None
    path = folder / "text.txt"
    path.write_text(" ".join(read_text(None).content.split()[:words]), encoding="utf-8")
    return path


def judge(quality: Quality, case: Case, known: tuple[str, ...]) -> None:
    failed = {mark.name for mark in quality.failed}
    if case.is_tiny:
        assert quality.marks and not (failed and case.scheme in ("fp16", "fp32")), quality.summary()
    elif known:
        assert failed >= set(known), f"known to fail {', '.join(known)}; {quality.summary()}"
    else:
        assert not failed, quality.summary()


def build_engines(bundle: Path, case: Case) -> str:
    """Build an engine for each target of the case; returns the seconds that all took."""

    def words(place: int) -> list[str]:
        profile = "single" if place else case.profile  # one with both profiles is enough; a single one takes half the time
        given = ("build", bundle, "--target", case.targets[place], "--max-context", case.context, "--max-batch", case.batch,
                 "--max-input", min(case.context, 512), "--profile", profile)  # fmt: skip
        return [str(word) for word in given]

    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        # A builder takes one core and keeps Python's lock, so that the others are built in processes of their own.
        others = [
            stack.enter_context(subprocess.Popen(
                [sys.executable, "-m", "edgellm_ros.cli.main", *words(place)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            ))
            for place in range(1, len(case.targets))
        ]  # fmt: skip
        run(*words(0))
        for process in others:
            said, _ = process.communicate()
            assert process.returncode == 0, said
    return f"{' '.join(case.targets)} {time.monotonic() - started:.0f} s"


def verify(what: Path, source: Path, text: Path | None, readings: Path, *options: str) -> int:
    """The exit code of `edgellm verify`."""
    given = ["--text", str(text)] if text else []
    return main(["verify", str(what), "--against", str(source), "--cache", str(readings), *given, *options])


def refused(
    quantised: Path, source: Path, text: Path | None, readings: Path, case: Case, capsys: pytest.CaptureFixture[str]
) -> str:
    """What the row says of a checkpoint whose activations do it in: `edgellm verify` refuses it, but not with --force."""
    capsys.readouterr()
    assert verify(quantised, source, text, readings) == 1
    said = capsys.readouterr().out
    assert "FAIL" in said, said
    figures = dict(re.findall(r"(?:: |; )([a-z0-9 ]+) ([\d.]+), allowed is", said.splitlines()[-1]))
    missed = {mark.partition("_")[2].replace("_", " ") for mark in case.checkpoint_fails}
    assert missed <= set(figures), f"known to fail {', '.join(sorted(missed))}; {said}"
    assert verify(quantised, source, text, readings, "--force") == 0
    return f"W8A8 {figures['perplexity ratio']} refused; bundle "


@pytest.mark.pipeline
@pytest.mark.timeout(3600)  # of a case of l1 on a busy machine
def test_pipeline(
    case: Case,
    checkpoint_of: Callable[[Case], Path],
    readings: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = request.node.pipeline_row = {"case": case.name}
    original, text = checkpoint_of(case), text_of(case, tmp_path)
    source = original
    if case.scheme in RECIPES:
        if importlib.util.find_spec("modelopt") is None:
            pytest.skip("the recipe needs nvidia-modelopt, which is not installed; `make test` installs it")
        numbers = {"--samples": case.samples, "--sequence-length": case.sequence_length}
        if case.is_tiny:
            numbers = {"--samples": 4, "--sequence-length": 32}
        options = [part for option, value in numbers.items() if value for part in (option, value)]
        row["quantise"] = f"{run('quantize', source, '-o', tmp_path / 'q', '--recipe', case.scheme, *options):.0f} s"
        if case.checkpoint_fails:
            row["verdict"] = refused(tmp_path / "q", original, text, readings, case, capsys)
        source, options = tmp_path / "q", []
    else:
        options = ["--weights", case.scheme]
    bundle = tmp_path / "bundle"
    row["export"] = f"{run('export', source, '-o', bundle, '--max-context', case.context, *options):.0f} s"
    has_builder = importlib.util.find_spec("tensorrt_rtx") is not None
    if case.targets and not has_builder:
        assert platform.machine() != "x86_64", "tensorrt-rtx is not installed; `make test` installs it"
        row["engines"] = "no tensorrt-rtx here"
    elif case.targets:
        row["engines"] = build_engines(bundle, case)
    code = verify(bundle, original, text, readings)
    quality = Bundle.open(bundle).manifest.quality
    assert code == (1 if quality.failed else 0) and quality.marks, quality.summary()
    row |= {
        "ratio": f"{quality.perplexity / quality.original_perplexity:.3f}",
        "KL": f"{quality.kl_divergence:.2g}",
        "same": f"{quality.top1_agreement:.1%}",
        "tasks": f"{quality.tasks_passed}/{quality.original_tasks_passed}",
        "verdict": row.get("verdict", "") + ("not judged" if case.is_tiny else "failed" if quality.failed else "passed"),
    }
    together, speed = answers(bundle, case, case.batch, tmp_path)
    row["tok/s"] = f"{speed:.0f}"
    if case.batch > 1:
        assert answers(bundle, case, 1, tmp_path)[0] == together
    if not case.is_tiny:
        assert all(answer.strip() for answer in together), together
    judge(quality, case, case.fails)


def test_ci_carries_every_shipped_recipe_out_on_the_real_model_and_on_a_tiny_one_of_each_family() -> None:
    cases = read_suite("l0")
    assert set(RECIPES) == set(recipe_names()) <= {case.scheme for case in cases if not case.is_tiny}
    families = {family.name for family in FAMILIES}
    assert families <= {case.model.removeprefix("tiny_") for case in cases if case.is_tiny}
    engines = {(case.scheme, target) for case in cases if not case.is_tiny for target in case.targets}
    recipes = ("fp8", "int4_awq", "int8_sq", "w4a8_awq")
    wanted = {(recipe, target) for recipe in recipes for target in ("sm89", "sm120")}
    # sm86 has no fp8; int4_gptq's graph is the one that int4_awq and w4a8_awq have
    assert wanted | {("nvfp4", "sm120"), ("int4_gptq", "sm86"), ("int8_sq", "sm86")} <= engines
    assert all(case.targets for case in cases)


@pytest.mark.parametrize("name", ["l0", "l1"])
def test_a_list_is_well_formed_and_l1_has_all_of_l0s_schemes(name: str) -> None:
    cases = read_suite(name)
    assert {case.scheme for case in cases} <= {case.scheme for case in read_suite("l1")}
    for case in cases:
        assert case.is_tiny or case.model == "SmolLM2-135M"


def test_a_name_says_model_scheme_context_and_batch() -> None:
    case = parse_case({"SmolLM2-135M-int4_awq-ctx1024-bs2": {"targets": ["sm89"]}}, {"text_words": 7})
    expected = Case("SmolLM2-135M-int4_awq-ctx1024-bs2", "SmolLM2-135M", "int4_awq", 1024, 2, 7, ("sm89",), "split")
    assert case == expected and not case.is_tiny
    for bad in ("SmolLM2-135M-int3-ctx1024-bs1", "SmolLM2-135M-int4-bs1", 4, {"tiny_llama-int4-ctx64-bs1": {"x": 1}}):
        with pytest.raises(ValueError, match="is not MODEL-SCHEME|unknown x; known are"):
            parse_case(bad, {})
    assert dataclasses.replace(case, model="tiny_llama").is_tiny


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no cases"), ("mine:", "has no cases"), ("mine: {cases: []}", "has no cases"), ("l0: {}", "has no cases"),
        ("mine: {case: [x]}", "has no cases"),
        ("mine: {cases: [tiny_llama-int4-ctx64-bs1], fail: {}}", "unknown fail; known are cases"),
        ("mine: {cases: [tiny_llama-int4-ctx64-bs1], fails: {tiny_lama-int4: [x]}}", "fails names tiny_lama-int4, which no"),
        (None, "there is no suite 'mine'; there are "),
    ],
)  # fmt: skip
def test_a_list_that_would_run_nothing_is_an_error(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("suite.LISTS", tmp_path)
    if content is not None:
        (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_suite("mine")


def test_what_a_case_measured_is_in_the_table_whichever_process_ran_it() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", "--suite", "l0", "-k", "tiny_mistral"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240, check=False)
    [row] = [line for line in done.stdout.partition("= pipeline =")[2].splitlines() if line.startswith("tiny_mistral")]
    assert row.endswith("passed"), done.stdout[-2000:]
