"""`edgellm run`: the answers are those of the engine, in the file's order and format, and failures stay apart."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_bundle import serve_with_fakes, write_bundle
from doubles import BYTE_VOCAB, reference_greedy

from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.errors import DeviceError
from edgellm_ros.runtime.kv_cache import ROW_ALIGN


def ask(*texts: str, **fields: Any) -> dict[str, Any]:
    requests = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    return {"temperature": 0, "max_generate_length": 5, "requests": requests, **fields}


def expected(prompt: str, count: int = 5) -> str:
    specials = {"<user>": 257, "<eos>": 256, "<assistant>": 258, "<system>": 259}
    ids: list[int] = []
    while prompt:
        token = next((t for t in specials if prompt.startswith(t)), None)
        ids += [specials[token]] if token else list(prompt[:1].encode())
        prompt = prompt[len(token) if token else 1 :]
    return bytes(reference_greedy(ids, count, BYTE_VOCAB, allowed=128)).decode()


class Run:
    """One call of `edgellm run` with files in a directory of the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bundle = write_bundle(root / "bundle")

    def __call__(self, data: Any, *options: str) -> int:
        (self.root / "in.json").write_text(json.dumps(data))
        files = ["--input-file", str(self.root / "in.json"), "--output-file", str(self.root / "out.json")]
        return main(["run", "--bundle", str(self.bundle), *files, *options])

    @property
    def responses(self) -> list[dict[str, Any]]:
        output = json.loads((self.root / "out.json").read_text())
        assert output["input_file"] == str(self.root / "in.json")
        answers: list[dict[str, Any]] = output["responses"]
        return answers


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_answers_are_the_models_and_in_the_files_order(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with_fakes(monkeypatch)
    texts = [f"question {i}" for i in range(7)]
    assert run(ask(*texts, batch_size=3)) == 0
    for index, (text, response) in enumerate(zip(texts, run.responses, strict=True)):
        prompt = f"<user>{text}<eos><assistant>"
        assert response["output_text"] == expected(prompt)
        assert (response["request_idx"], response["batch_idx"]) == (index, index % 3)
        assert response["finish_reason"] == "length" and len(response["output_ids"]) == 5
        assert response["formatted_complete_request"] == prompt
        assert response["messages"] == [{"role": "user", "content": [{"type": "text", "text": text}]}]
        assert response["usage"]["prompt_tokens"] == len(text) + 3


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batch_size_is_how_many_run_at_once(run: Run, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    made = serve_with_fakes(monkeypatch)
    assert run(ask(*"abcdefgh", batch_size=batch_size, max_generate_length=20)) == 0
    assert max(len(call) for call in made[0].calls) == batch_size
    assert made[0].info.num_slots == batch_size and made[0].closed


def test_more_in_flight_than_slots_and_queue_is_never_tried(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with_fakes(monkeypatch)
    assert run(ask(*"abcdefgh", batch_size=8), "--max-slots", "1", "--max-queue", "2") == 0
    assert [r["finish_reason"] for r in run.responses] == ["length"] * 8


def test_a_request_that_fails_is_reported_and_the_others_are_answered(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_with_fakes(monkeypatch, capacity=64)
    assert run(ask("a", "much too long " * 10, "c", batch_size=2)) == 2
    first, second, third = run.responses
    assert first["output_text"] == expected("<user>a<eos><assistant>")
    assert third["output_text"] == expected("<user>c<eos><assistant>")
    assert (second["finish_reason"], second["output_text"], second["error_code"]) == ("error", "", 101)
    assert "error: requests[1]:" in capsys.readouterr().err


def test_a_wrong_file_is_refused_before_anything_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = serve_with_fakes(monkeypatch)
    assert run({"requests": [{"messages": [{"role": "user", "content": "a"}]}], "typo": 1}) == 2
    assert not made and not (run.root / "out.json").exists()


def test_an_output_that_cannot_be_written_is_noticed_before_the_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = serve_with_fakes(monkeypatch)
    assert run(ask("a"), "--profile-output-file", str(run.root / "nowhere" / "p.json")) == 2
    assert not made


def test_half_of_a_utf16_pair_is_refused_before_anything_is_loaded_or_written(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = serve_with_fakes(monkeypatch)
    (run.root / "out.json").write_text("precious")
    assert run(ask("good", "\ud800 hi")) == 2
    assert capsys.readouterr().err.startswith("error: requests[1].messages[0].content has \\ud800, half of a UTF-16 pair;")
    assert not made and (run.root / "out.json").read_text() == "precious"


@pytest.mark.parametrize("option", ["--output-file", "--profile-output-file"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "{path} is a directory; name a file in it"),
        ("in.json", "{path} is the --input-file too; name another file"),
        ("link.json", "{path} is the --input-file too; name another file"),
        ("in.json/out.json", "{path}: {path.parent} is not a directory; make it first"),
        ("dangling.json", "{path} cannot be written (No such file or directory); name another file"),
    ],
)
def test_an_output_that_could_not_be_written_or_replaces_the_requests_is_refused_before_loading(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, name: str, message: str
) -> None:
    made = serve_with_fakes(monkeypatch)
    source, path = run.root / "in.json", run.root / name
    source.write_text(json.dumps(ask("a")))
    (run.root / "link.json").symlink_to(source)
    (run.root / "dangling.json").symlink_to(run.root / "nowhere" / "out.json")
    assert main(["run", "--bundle", str(run.bundle), "--input-file", str(source), option, str(path)]) == 2
    assert capsys.readouterr().err == f"error: {option} {message.format(path=path)}\n"
    assert not made and source.read_text() == json.dumps(ask("a"))


def test_answers_and_profile_in_one_file_are_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, path = serve_with_fakes(monkeypatch), run.root / "out.json"
    assert run(ask("a"), "--profile-output-file", str(path)) == 2
    assert f"--profile-output-file {path} is the --output-file too" in capsys.readouterr().err
    assert not made and not path.exists()


def test_an_output_that_fails_is_named_and_leaves_the_file_as_it_was(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_with_fakes(monkeypatch)
    out = run.root / "out.json"
    assert run(ask("a"), "--output-file", "/dev/full") == 2
    message = "cannot write /dev/full: No space left on device; make room there, or name another file"
    assert capsys.readouterr().err == f"error: {message}\n"
    out.write_text("precious")

    def full(path: Path, content: bytes) -> int:
        with open(path, "wb") as file:
            file.write(content[:5])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert run(ask("a")) == 2
    assert f"cannot write {out}: No space left on device" in capsys.readouterr().err
    assert out.read_text() == "precious" and {p.name for p in run.root.iterdir()} == {"bundle", "in.json", "out.json"}


def test_a_file_that_nothing_can_take_the_place_of_is_written_in_place(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is mounted alone into a container."""
    serve_with_fakes(monkeypatch)
    out = run.root / "out.json"
    out.write_text("old, and longer than nothing")

    def busy(path: Path, target: Path) -> Path:
        raise OSError(errno.EBUSY, "Device or resource busy", str(target))

    monkeypatch.setattr(Path, "replace", busy)
    assert run(ask("a")) == 0
    assert json.loads(out.read_text())["responses"]
    assert {p.name for p in run.root.iterdir()} == {"bundle", "in.json", "out.json"}


def test_the_file_behind_a_link_is_replaced_and_keeps_its_mode(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with_fakes(monkeypatch)
    target = run.root / "target.json"
    target.touch(0o640)
    (run.root / "out.json").symlink_to(target)
    assert run(ask("a")) == 0
    assert (run.root / "out.json").is_symlink() and json.loads(target.read_text())["responses"]
    assert target.stat().st_mode & 0o777 == 0o640


def test_an_input_file_whose_name_is_no_utf8_is_answered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with_fakes(monkeypatch)
    source, out = run.root / os.fsdecode(b"in\xff.json"), run.root / "out.json"
    source.write_text(json.dumps(ask("a")))
    assert main(["run", "--bundle", str(run.bundle), "--input-file", str(source), "--output-file", str(out)]) == 0
    assert json.loads(out.read_text())["input_file"] == str(source)


def test_a_failed_device_ends_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(batch: Any) -> None:
        raise DeviceError("the device is gone")

    serve_with_fakes(monkeypatch, before_step=fail)
    assert run(ask("a", "b")) == 2
    assert capsys.readouterr().err == "error: the device is gone\n"


def test_stop_logprobs_and_overrides_reach_the_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with_fakes(monkeypatch)
    whole = expected("<user>a<eos><assistant>", 3)
    data = ask("a", num_logprobs=2)
    assert run(data, "--max-generate-length", "3") == 0
    (response,) = run.responses
    assert response["output_text"] == whole
    assert [step[0]["token"] for step in response["logprobs"]] == list(whole)
    assert all(len(step) == 2 and step[0]["logprob"] >= step[1]["logprob"] for step in response["logprobs"])
    data["requests"][0]["stop"] = [whole[1]]
    assert run(data) == 0
    assert run.responses[0]["output_text"] == whole[: whole.index(whole[1])]
    assert run.responses[0]["finish_reason"] == "stop"


def test_a_saved_system_prompt_is_reused_and_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with_fakes(monkeypatch)
    system = {"role": "system", "content": "You are a robot with two arms."}
    items = [
        {"messages": [system, {"role": "user", "content": text}], "save_system_prompt_kv_cache": True} for text in "xy"
    ]
    profile = run.root / "profile.json"
    assert (
        run({"temperature": 0, "requests": items, "max_generate_length": 2}, "--profile-output-file", str(profile)) == 0
    )
    prefix = "<system>You are a robot with two arms.<eos><user>"
    assert [r["formatted_system_prompt"] for r in run.responses] == [prefix] * 2
    num_tokens = (len("You are a robot with two arms.") + 3) // ROW_ALIGN * ROW_ALIGN
    assert run.responses[1]["usage"]["cached_tokens"] == num_tokens
    assert json.loads(profile.read_text())["prefill"]["reused_tokens"] == num_tokens


def test_the_profile_counts_what_was_done(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_with_fakes(monkeypatch)
    path = run.root / "profile.json"
    assert run(ask("abc", "de"), "--dump-profile", "--profile-output-file", str(path)) == 0
    profile = json.loads(path.read_text())
    assert profile["prefill"]["computed_tokens"] + profile["prefill"]["reused_tokens"] == 3 + 3 + 2 + 3
    assert profile["generation"]["generated_tokens"] == 10
    stages = {stage["stage_id"]: stage for stage in profile["stages"]}
    assert stages["decode_step"]["total_runs"] == 8 and stages["total"]["total_runs"] == 2
    for stage in stages.values():
        times = stage["time_stats"]
        assert 0 <= times["p50_ms"] <= times["p95_ms"] <= times["p99_ms"]
    assert 2**20 < profile["peak_cpu_memory_bytes"] < 2**40
    shown = capsys.readouterr()
    assert "decode_step" in shown.err and "10 tokens" in shown.err and shown.out == ""


def test_without_an_output_file_the_answers_are_the_only_thing_on_standard_output(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_with_fakes(monkeypatch)
    (run.root / "in.json").write_text(json.dumps(ask("a")))
    assert main(["run", "--bundle", str(run.bundle), "--input-file", str(run.root / "in.json"), "--dump-profile"]) == 0
    assert json.loads(capsys.readouterr().out)["responses"][0]["output_text"] == expected("<user>a<eos><assistant>")


@pytest.mark.parametrize("options", [["-v", "run"], ["run", "--verbose"], ["run"]])
def test_verbose_says_which_executor_was_chosen_and_why(
    options: list[str], tiny_bundle: Callable[[str, str], Bundle], tmp_path: Path
) -> None:
    """In a process of its own: logging is the process's."""
    (tmp_path / "in.json").write_text(json.dumps(ask("a")))
    files = ["--bundle", str(tiny_bundle("qwen3", "int4").path), "--input-file", str(tmp_path / "in.json")]
    command = [sys.executable, "-m", "edgellm_ros.cli.main", *options, *files, "--executor", "onnxruntime"]
    stderr = subprocess.run(command, capture_output=True, text=True).stderr
    assert ("executor: onnxruntime on " in stderr and "(asked for)" in stderr) is (len(options) == 2), stderr
