"""The Jinja environment that chat templates run in: what Hugging Face offers them, and bounds on what they may cost.

A template comes with a model from the internet. Jinja's sandbox keeps it from the interpreter; the bounds here keep
it from running forever or filling the memory: loop passes and calls are counted, and texts have a largest length.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 250_000  # about a second: loop passes and calls of one rendering
MAX_CHARS = 16 * 2**20  # of the output, and of any text on the way to it

_steps_left: contextvars.ContextVar[list[int]] = contextvars.ContextVar("steps_left")


@contextlib.contextmanager
def limited_steps() -> Iterator[None]:
    """Give the rendering inside the `with` its own MAX_STEPS; threads do not share them."""
    token = _steps_left.set([MAX_STEPS])
    try:
        yield
    finally:
        _steps_left.reset(token)


def check_length(length: int) -> None:
    """Raise SecurityError for a text (or list) longer than MAX_CHARS."""
    if length > MAX_CHARS:
        raise SecurityError(f"it makes a text of {length} characters; allowed is {MAX_CHARS}")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that counts steps and bounds texts; same options, filters and globals as Hugging Face's."""

    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    def tick(self) -> None:
        """Called at the head of every loop's body: `call` counts it."""

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Count a step, then call `obj` if the sandbox allows it."""
        left = _steps_left.get()
        left[0] -= 1
        if left[0] < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} loop passes and calls")
        result = super().call(context, obj, *args, **kwargs)
        if isinstance(result, str):
            check_length(len(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Evaluate `left operator right` if the result cannot be enormous."""
        if operator == "**" and not (abs(left) <= 2**16 and abs(right) <= 64):
            raise SecurityError(f"it computes {left!r} ** {right!r}")
        if operator == "*":
            sizes = [len(v) if isinstance(v, str | list | tuple) else v for v in (left, right)]
            if left is not sizes[0] or right is not sizes[1]:
                check_length(sizes[0] * sizes[1])
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list | tuple):
            check_length(len(result))
        return result

    def join_bounded(self, parts: Sequence[Any]) -> str:
        """What `a ~ b` means, up to MAX_CHARS."""
        texts = [str(part) for part in parts]
        check_length(sum(map(len, texts)))
        return "".join(texts)


class _BoundedCode(CodeGenerator):
    """Jinja's compiler with a counted step in each loop pass and bounded `~`."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_bounded((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


ChatEnvironment.code_generator_class = _BoundedCode


class _Generation(Extension):
    """Accepts {% generation %}: it marks what a trainer learns from, and changes nothing in the text."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class TemplateRefusal(jinja2.TemplateError):
    """The template itself called raise_exception."""


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
