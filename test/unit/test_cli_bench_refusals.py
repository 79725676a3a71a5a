"""What `edgellm bench` refuses, by name, before it measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgellm_ros import native
from edgellm_ros.benchmark.measure import Benchmark
from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main

NO_GPU = native.unavailable_reason()


@pytest.fixture
def path(tiny_bundle: Callable[[str, str], Bundle], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    return str(tiny_bundle("qwen3", "int4").path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rounds", "0"), "--rounds 0: allowed is 1 to 1000"),
        (("--new-tokens", "1"), "--new-tokens 1: allowed is 2 to 65536"),
        (("--batch", "1", "65"), "--batch 65: allowed is 1 to 64"),
        (("--context", "1"), "--context 1: allowed is 2 to 1048576"),
        (("--prompt-tokens", "-3"), "--prompt-tokens -3: allowed is 2 to 1048576"),
        (("--prompt-tokens", "400", "--context", "20"), "needs 401 tokens"),
        (("--context", "4096"), "but the bundle holds 256; lower them"),
        (("--max-context", "64", "--context", "50", "--new-tokens", "20"), "max_context 64 is too small"),
        (("--new-tokens", "300"), "leave no room for a prompt in 256 tokens"),
        (("--weights", "int8"), "--weights int8 goes with --shape"),
        (("--plot", "speed.pdf"), "the name must end in .svg or .png"),
        (("--plot", "no/such/speed.svg"), "there is no directory no/such"),
        (("--json", "no/such/report.json"), "there is no directory no/such"),
        (("--json", "."), "--json . is a directory; name a file in it"),
        (("--json", ""), "--json is empty; name a file"),
        (("--plot", ""), "--plot is empty; name a file"),
        (("--json", "/proc/report.json"), "--json /proc/report.json cannot be written ("),
        (("--plot", "/proc/version.svg"), "--plot /proc/version.svg cannot be written ("),
        (("--executor", "tensorrt"), "executor is 'tensorrt'"),
        (("--num-threads", "-1"), "num_threads is -1"),
        (("--temperature", "-1"), "temperature is -1"),
    ],
)
def test_a_mistake_is_one_line_with_the_value_and_the_remedy(
    options: tuple[str, ...], words: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--bundle", path, *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shape", "llama-1b"), "which only the cuda executor runs: "),
        (("--shape", "llama-1b"), "use --bundle with an exported model on a CPU"),
        (("--shape", "qwen3-4b", "--weights", "int4", "--executor", "onnxruntime"), "executor is 'onnxruntime': "),
        (("--shape", "llama-8b", "--compare", "onnxruntime", "cuda"), "--shape llama-8b is random weights without an"),
        (("--bundle", "PATH", "--executor", "cuda"), "executor is 'cuda': "),
        (("--bundle", "PATH", "--compare", "onnxruntime", "cuda"), "use onnxruntime or auto"),
    ],
)
def test_what_only_a_gpu_runs_is_refused_by_name_without_one(
    options: tuple[str, ...], words: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *(path if option == "PATH" else option for option in options)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("model", [("--shape", "llama-1b"), ("--bundle", "PATH", "--executor", "cuda")])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--temperature", "-1"), "temperature is -1"),
        (("--batch", "9"), "--batch 9 is more than the cuda executor decodes at once, 8"),
        (("--max-context", "100", "--context", "4096"), "leave no room for a prompt in 100 tokens"),
        (("--max-context", "200", "--context", "4096"), "max_context 200 is too small for what is to be measured"),
        (("--context", "40000"), "needs 40130 tokens"),
    ],
)
def test_a_bad_value_is_told_before_a_gpu_is_looked_for(
    model: tuple[str, ...], options: tuple[str, ...], words: str, path: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(native, "import_module", lambda: (None, "the native module is not built"))
    monkeypatch.setattr(native, "unavailable_reason", lambda: pytest.fail("looked for a GPU"))
    assert main(["bench", *(path if option == "PATH" else option for option in (*model, *options))]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--context", "40000"), "needs 40130 tokens (the longest of"),
        (("--context", "40000"), "but --shape llama-1b holds 32768; lower them"),
        (("--max-context", "40000"), "max_context 40000 exceeds the 32768 of --shape llama-1b; lower it"),
        (("--verify-files",), "--verify-files goes with --bundle; --shape llama-1b is random weights"),
        (("--no-verify-files",), "--no-verify-files goes with --bundle"),
        (("--self-test",), "--self-test goes with --bundle"),
        (("--no-self-test",), "--no-self-test goes with --bundle"),
    ],
)
def test_a_shape_has_a_name_and_neither_files_nor_a_self_test(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: pytest.fail("looked for a GPU"))
    assert main(["bench", "--shape", "llama-1b", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("plot", ["a.svg", "./a.svg", "ABSOLUTE", "link.svg", "hard.svg"])
def test_json_and_plot_into_one_file_are_refused_by_name(
    plot: str, path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Benchmark, "measure", lambda *args: pytest.fail("measured before the refusal"))
    monkeypatch.setattr("edgellm_ros.benchmark.plot.check_plot", lambda path: None)  # matplotlib is an extra
    monkeypatch.chdir(tmp_path)
    if plot == "ABSOLUTE":
        plot = str(tmp_path / "a.svg")
    elif plot == "link.svg":
        Path(plot).symlink_to("a.svg")
    elif plot == "hard.svg":
        Path("a.svg").touch()
        Path(plot).hardlink_to("a.svg")
    assert main(["bench", "--bundle", path, "--json", "a.svg", "--plot", plot]) == 2
    assert capsys.readouterr().err == f"error: --json a.svg and --plot {plot} are one file; name two\n"


@pytest.mark.parametrize("executors", [("--executor", "cuda"), ("--compare", "onnxruntime", "cuda")])
def test_a_bundle_that_the_kernels_cannot_run_is_refused_before_anything_is_measured(
    executors: tuple[str, ...], path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: "")
    monkeypatch.setattr(native, "import_module", lambda: (SimpleNamespace(MAX_BATCH=8), ""))
    reason = "tiny: head_dim is 72; the kernels take 64, 80, 96, 128 and 256"
    monkeypatch.setattr("edgellm_ros.executors.cuda.unsupported_reason", lambda bundle: reason)
    monkeypatch.setattr(Benchmark, "measure", lambda *args: pytest.fail("measured before the refusal"))
    assert main(["bench", "--bundle", path, *executors]) == 2
    assert capsys.readouterr().err == f"error: executor is 'cuda': {reason}; use onnxruntime or auto\n"


@pytest.mark.parametrize("options", [(), ("--bundle", "b", "--shape", "llama-1b"), ("--shape", "gpt-2")])
def test_a_model_is_named_once(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *options])
    assert stop.value.code == 2 and "--shape" in capsys.readouterr().err


def test_auto_that_will_take_a_gpu_refuses_at_once_what_it_cannot_decode(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: "")
    monkeypatch.setattr("edgellm_ros.executors.cuda.unsupported_reason", lambda bundle: "")
    monkeypatch.setattr(native, "import_module", lambda: (SimpleNamespace(MAX_BATCH=8), ""))
    monkeypatch.setattr(Benchmark, "measure", lambda *args: pytest.fail("measured before the refusal"))
    assert main(["bench", "--bundle", path, "--batch", "1", "16"]) == 2
    assert "--batch 16 is more than the cuda executor decodes at once, 8" in capsys.readouterr().err
