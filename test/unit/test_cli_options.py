"""Options come from the settings alone, and starting the command loads nothing heavy."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgellm_ros.cli.main import build_parser, main, verbs
from edgellm_ros.cli.options import add_settings, settings_from, was_given
from edgellm_ros.config import EngineConfig, NodeConfig
from edgellm_ros.core import SamplingParams
from edgellm_ros.errors import ConfigError, RequestError
from edgellm_ros.fields import settings_of

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "rclpy", "numpy", "jinja2", "tokenizers", "rich")


def parse(cls: type, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_settings(parser, cls, "settings")
    return parser.parse_args(options)


@pytest.mark.parametrize("cls", [SamplingParams, EngineConfig])
def test_every_setting_is_an_option_with_its_help_and_default(cls: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(cls, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    for item in settings_of(cls):
        assert f"--{item.name.replace('_', '-')}" in shown
        assert " ".join(item.help.split()) in shown
        for choice in item.choices:
            assert choice in shown


@pytest.mark.parametrize(
    ("verb", "option", "does", "does_not"),
    [
        ("run", "max-slots", "Without it as many as batch_size says and there are requests, at most 64. (1 to 64)", "default 4"),
        ("bench", "max-context", "0, the default, is as many as what is measured needs. (0 to 1048576)", "at most 4096"),
    ],
)
def test_help_says_what_the_verb_does_without_the_option(
    verb: str, option: str, does: str, does_not: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = " ".join(capsys.readouterr().out.split()).rpartition(f"--{option} ")[2].partition(" --")[0]
    assert does in shown and does_not not in shown


@pytest.mark.parametrize("cls", [SamplingParams, EngineConfig])
def test_options_that_are_not_given_leave_the_base_as_it_is(cls: type) -> None:
    assert settings_from(parse(cls), cls()) == cls()


def test_options_of_every_kind_arrive_with_their_type() -> None:
    args = parse(
        SamplingParams,
        "--temperature",
        "0",
        "--top-k",
        "5",
        "--seed",
        "7",
        "--stop",
        "a",
        "--stop",
        "b",
        "--ignore-eos",
    )
    expected = SamplingParams(temperature=0.0, top_k=5, seed=7, stop=("a", "b"), ignore_eos=True)
    assert settings_from(args, SamplingParams(max_tokens=3)) == SamplingParams(**{**vars(expected), "max_tokens": 3})
    assert was_given(args, SamplingParams, "seed") and not was_given(args, SamplingParams, "top_p")
    assert settings_from(parse(EngineConfig, "--no-self-test"), EngineConfig()).self_test is False


@pytest.mark.parametrize(
    ("base", "options", "error"),
    [
        (SamplingParams(), ("--temperature", "-1"), RequestError),
        (SamplingParams(), ("--temperature", "nan"), RequestError),
        (SamplingParams(), ("--stop", ""), RequestError),
        (EngineConfig(), ("--max-slots", "0"), ConfigError),
    ],
)
def test_a_value_out_of_range_is_the_settings_own_error(base: object, options: tuple[str, ...], error: type) -> None:
    with pytest.raises(error, match=options[0].removeprefix("--").replace("-", "_")):
        settings_from(parse(type(base), *options), base)


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from edgellm_ros.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("module", verbs(), ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_verb_teaches_with_an_example_that_parses(module: ModuleType) -> None:
    verb = module.__name__.rpartition(".")[2].replace("_", "-")
    lines = [line.strip() for line in module.EXAMPLES.splitlines() if line.strip().startswith(f"edgellm {verb}")]
    assert lines
    for line in lines:
        command = line.split("   ")[0].split(" | ")[0]
        words = [w.strip('"') for w in command.split('"')] if '"' in command else [command]
        arguments = [part for i, w in enumerate(words) for part in ([w] if i % 2 else w.split())]
        args = build_parser().parse_args([a for a in arguments[1:] if a])
        assert args.verb == verb


@pytest.mark.parametrize("loaded", ["argparse", "edgellm_ros.cli.bench", "edgellm_ros.errors"])
def test_ctrl_c_while_the_command_is_still_loaded_is_no_traceback(loaded: str) -> None:
    code = f"""
import sys

class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == {loaded!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
from edgellm_ros.cli.main import main
sys.exit(main(["inspect", "x"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_closed_standard_output_is_said_in_one_line() -> None:
    command = [sys.executable, "-m", "edgellm_ros.cli.main", "--version"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, text=True)
    expected = "error: standard output is closed; send it to a file or to /dev/null\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import edgellm_ros

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"edgellm {edgellm_ros.__version__}\n"


def test_a_mistake_is_one_line_without_a_traceback_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "there-is-no-such-bundle"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there-is-no-such-bundle is not a directory") and error.count("\n") == 1


def test_a_missing_package_is_named_with_the_way_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "edgellm_ros.llm", None)
    assert main(["chat", "x"]) == 1
    error = capsys.readouterr().err
    assert "edgellm_ros.llm is not installed; `edgellm doctor`" in error


def test_an_unexpected_failure_is_exit_code_1_and_debug_shows_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise KeyError("boom")

    monkeypatch.setattr("edgellm_ros.bundle.Bundle.open", fail)
    assert main(["inspect", "x"]) == 1
    assert capsys.readouterr().err == "error: KeyError: 'boom' (--debug shows where)\n"
    for arguments in (["--debug", "inspect", "x"], ["inspect", "x", "--debug"]):
        assert main(arguments) == 1
        assert "Traceback" in capsys.readouterr().err


def test_a_file_that_this_user_may_not_read_is_no_failed_mark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "weights"))

    monkeypatch.setattr("edgellm_ros.bundle.Bundle.open", fail)
    assert main(["verify", "x"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'weights'}: Permission denied; let this user read and write it\n"


def test_a_range_is_written_out_so_that_its_end_can_be_typed() -> None:
    with pytest.raises(ConfigError, match=r"max_context is -5; allowed is 0 to 1048576 tokens"):
        EngineConfig(max_context=-5)
    with pytest.raises(ConfigError, match=r"result_timeout_s is 0\.5; allowed is 1 to 3600 s"):
        NodeConfig(result_timeout_s=0.5)
