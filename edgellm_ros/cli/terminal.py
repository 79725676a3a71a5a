"""Decides how a conversation runs on a terminal: who writes where, what the slash commands do, what Ctrl-C stops.

Answers go to standard output. Reasoning and statistics are dimmed on a terminal; where standard output is not one,
they go to standard error, so that a pipe carries answers only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from edgellm_ros.core import ChatMessage, FinishReason, Request, SamplingParams, Usage
from edgellm_ros.errors import DeviceError, EdgeLLMError

if TYPE_CHECKING:
    from edgellm_ros.llm import LLM
    from edgellm_ros.runtime.generation import Generation

COMMANDS = "/reset forgets the conversation, /system TEXT changes the system prompt, /exit or Ctrl-D leaves"
_CONTROL = {code: 0xFFFD for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class Terminal:
    """The two streams and the keyboard."""

    def __init__(self, stats: bool = True) -> None:
        """`stats` False leaves out the line after each answer."""
        self.interactive = sys.stdin.isatty()
        self.stats = stats
        self._is_screen = sys.stdout.isatty()
        self._aside = sys.stdout if self._is_screen else sys.stderr
        self._dim = ("\x1b[2m", "\x1b[22m") if self._aside.isatty() and not os.environ.get("NO_COLOR") else ("", "")

    def write(self, text: str, dim: bool = False) -> None:
        """Write a piece of an answer (dim: of reasoning) at once; a screen gets no control characters of the model."""
        if self._is_screen or dim:
            text = text.translate(_CONTROL)
        stream = self._aside if dim else sys.stdout
        stream.write(f"{self._dim[0]}{text}{self._dim[1]}" if dim else text)
        stream.flush()

    def note(self, text: str) -> None:
        """Write a dimmed line that is not part of an answer."""
        self.write(text + "\n", dim=True)

    def fail(self, error: Exception) -> None:
        """Write an error after which the conversation goes on."""
        print(f"error: {error}", file=sys.stderr)

    def lines(self) -> Iterator[str]:
        """What the user enters, until the input ends; Ctrl-C drops the line."""
        if not self.interactive:
            yield from (line.strip() for line in sys.stdin)
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history in input())
        while True:
            try:
                yield input("> ").strip()
            except KeyboardInterrupt:
                self.write("\n")
                self.note(COMMANDS)
            except EOFError:
                self.write("\n")
                return


def talk(
    llm: LLM, terminal: Terminal, sampling: SamplingParams, system: str, think: bool | None, lora: str = ""
) -> None:
    """Answer line after line. Piped, the first error ends it; at the keyboard, only a failed device does."""
    if terminal.interactive:
        terminal.note(f"{llm.info.device}, {llm.info.precision}. {COMMANDS}.")
    history: list[ChatMessage] = []
    for line in terminal.lines():
        if not line:
            continue
        if line.startswith("/"):
            command, _, rest = line.partition(" ")
            if command == "/exit":
                return
            if command == "/reset":
                history.clear()
            elif command == "/system":
                system = rest.strip()
            else:
                terminal.note(f"unknown command {command}; {COMMANDS}")
            continue
        messages = [*([ChatMessage("system", system)] if system else []), *history, ChatMessage("user", line)]
        request = Request(
            messages=tuple(messages), sampling=sampling, enable_thinking=think, session_id="chat", lora=lora
        )
        try:
            answer = _answer(llm, terminal, request)
        except DeviceError:
            raise
        except EdgeLLMError as error:
            if not terminal.interactive:
                raise
            terminal.fail(error)
            continue
        if answer is not None:
            history += [messages[-1], answer]


def _answer(llm: LLM, terminal: Terminal, request: Request) -> ChatMessage | None:
    """Stream one answer and return it; None when it was stopped before it began."""
    generation = llm.submit(request)
    text: list[str] = []
    reasoning: list[str] = []
    with _stopping(generation) if terminal.interactive else contextlib.nullcontext():
        for delta in generation:
            if delta.reasoning:
                reasoning.append(delta.reasoning)
                terminal.write(delta.reasoning, dim=True)
            if delta.text:
                if reasoning and not text:
                    terminal.write("\n\n", dim=True)
                text.append(delta.text)
                terminal.write(delta.text)
            if delta.finish_reason is FinishReason.ERROR:
                terminal.write("\n")
                raise delta.error or DeviceError("the answer ended with an error that has no description")
            if delta.finish_reason is not None:
                terminal.write("\n")
                if terminal.stats and delta.usage is not None:
                    terminal.note(_stats(delta.usage, delta.finish_reason))
    if not text and not reasoning:
        return None
    return ChatMessage("assistant", "".join(text), reasoning="".join(reasoning))


@contextlib.contextmanager
def _stopping(generation: Generation) -> Iterator[None]:
    """Ctrl-C cancels the generation, which then ends by itself; a second one interrupts the program."""
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        generation.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stats(usage: Usage, reason: FinishReason) -> str:
    parts = [f"{usage.completion_tokens} tokens"]
    if usage.completion_tokens > 1 and usage.decode_s > 0:
        parts.append(f"{(usage.completion_tokens - 1) / usage.decode_s:.1f} tokens/s")
    parts.append(f"first after {usage.time_to_first_token_s * 1000:.0f} ms")
    parts.append(f"prompt {usage.prompt_tokens} ({usage.cached_tokens} reused)")
    if reason is not FinishReason.STOP:
        parts.append(reason.value)
    return "[" + ", ".join(parts) + "]"
