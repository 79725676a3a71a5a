"""`edgellm chat`: what is typed or piped is answered, Ctrl-C stops an answer and not the program."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_bundle import serve_with_fakes, write_bundle
from test_cli_run import expected

from edgellm_ros.cli.main import main
from edgellm_ros.cli.terminal import Terminal
from edgellm_ros.errors import DeviceError

GREEDY = ("--temperature", "0", "--max-tokens", "4")


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    return str(write_bundle(tmp_path / "bundle"))


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


class Keyboard(io.StringIO):
    """A terminal at which the given lines are typed; a line that is an exception is raised instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
        super().__init__()
        self._lines = list(lines)
        monkeypatch.setattr(sys, "stdin", self)
        monkeypatch.setattr("builtins.input", self._input)

    def isatty(self) -> bool:
        return True

    def _input(self, prompt: str = "") -> str:
        line = self._lines.pop(0) if self._lines else EOFError
        if isinstance(line, str):
            return line
        raise line


def test_each_piped_line_is_a_turn_that_sees_the_earlier_ones(
    bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_with_fakes(monkeypatch)
    pipe(monkeypatch, "one\n\ntwo\n")
    assert main(["chat", bundle, *GREEDY]) == 0
    first = expected("<user>one<eos><assistant>", 4)
    second = expected(f"<user>one<eos><assistant>{first}<eos><user>two<eos><assistant>", 4)
    output = capsys.readouterr()
    assert output.out == f"{first}\n{second}\n"
    assert output.err.count("tokens/s") == 2 and "[4 tokens" in output.err


def test_commands_change_the_conversation(
    bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_with_fakes(monkeypatch)
    pipe(monkeypatch, "one\n/reset\n/system Be kind.\ntwo\n/what\n/exit\nthree\n")
    assert main(["chat", bundle, "--system", "Be brief.", "--no-stats", *GREEDY]) == 0
    first = expected("<system>Be brief.<eos><user>one<eos><assistant>", 4)
    second = expected("<system>Be kind.<eos><user>two<eos><assistant>", 4)
    output = capsys.readouterr()
    assert output.out == f"{first}\n{second}\n"
    assert "unknown command /what" in output.err and "tokens/s" not in output.err


def test_thinking_is_the_templates_choice_unless_told(
    bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_with_fakes(monkeypatch)
    for options, prompt in (((), "<user>a<eos><assistant>"), (("--think",), "<user>a<eos><assistant>[think]")):
        pipe(monkeypatch, "a\n")
        assert main(["chat", bundle, *GREEDY, *options]) == 0
        assert capsys.readouterr().out == expected(prompt, 4) + "\n"


def test_piped_reasoning_stays_out_of_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The model's own answer begins at the tag in the prompt, and its second character is made the end tag.
    plain = expected("<user>a<eos><assistant>[think]", 4)
    serve_with_fakes(monkeypatch)
    pipe(monkeypatch, "a\n")
    bundle = write_bundle(tmp_path / "reasoning", think_start="[think]", think_end=plain[1])
    assert main(["chat", str(bundle), *GREEDY, "--think"]) == 0
    output = capsys.readouterr()
    assert output.out == plain[2:].lstrip("\n") + "\n"
    assert output.err.startswith(plain[0] + "\n\n")


def test_a_piped_conversation_ends_at_the_first_error(
    bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = serve_with_fakes(monkeypatch, capacity=64)
    pipe(monkeypatch, "too long " * 20 + "\nhello\n")
    assert main(["chat", bundle, *GREEDY]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and made[0].closed


def test_at_the_keyboard_an_error_is_shown_and_the_conversation_goes_on(
    bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_with_fakes(monkeypatch, capacity=64)
    Keyboard(monkeypatch, "too long " * 20, KeyboardInterrupt, "a")
    assert main(["chat", bundle, *GREEDY]) == 0
    output = capsys.readouterr()
    assert "error: " in output.err and expected("<user>a<eos><assistant>", 4) in output.out


def interrupt_at(num_steps: int, times: int = 1) -> Callable[[Any], None]:
    """Press Ctrl-C while the executor computes its step number `num_steps`."""
    seen = 0

    def press(batch: Any) -> None:
        nonlocal seen
        seen += 1
        if num_steps <= seen < num_steps + times:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # a real step leaves the main thread time, too

    return press


def test_control_c_stops_the_answer_and_not_the_program(
    bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = serve_with_fakes(monkeypatch, before_step=interrupt_at(4))
    Keyboard(monkeypatch, "one", "/reset", "two")
    before = signal.getsignal(signal.SIGINT)
    assert main(["chat", bundle, "--temperature", "0", "--max-tokens", "150", "--ignore-eos"]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    output = capsys.readouterr()
    whole = expected("<user>two<eos><assistant>", 150)
    assert whole in output.out
    assert "cancelled" in output.out + output.err
    assert len(made[0].calls) < 200


def test_a_failed_device_ends_the_conversation(
    bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(batch: Any) -> None:
        raise DeviceError("the device is gone")

    serve_with_fakes(monkeypatch, before_step=fail)
    Keyboard(monkeypatch, "one", "two")
    assert main(["chat", bundle]) == 2
    assert capsys.readouterr().err.count("error: the device is gone") == 1


def test_a_wrong_setting_is_refused_before_loading(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = serve_with_fakes(monkeypatch)
    assert main(["chat", bundle, "--top-p", "7"]) == 2
    assert not made


def test_control_characters_and_markup_of_a_model_are_harmless_on_a_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    Terminal().write("\x1b[2J[bold]x[/bold]\x9b1m\r\n\ttab :smile:")
    assert capsys.readouterr().out == "\ufffd[2J[bold]x[/bold]\ufffd1m\ufffd\n\ttab :smile:"


def test_on_a_screen_reasoning_and_statistics_are_dimmed_beside_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = expected("<user>a<eos><assistant>[think]", 4)
    serve_with_fakes(monkeypatch)
    pipe(monkeypatch, "a\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    bundle = write_bundle(tmp_path / "reasoning", think_start="[think]", think_end=plain[1])
    assert main(["chat", str(bundle), *GREEDY, "--think"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"\x1b[2m{plain[0]}\x1b[22m")
    assert "\x1b[2m[4 tokens" in output.out and output.err == ""
