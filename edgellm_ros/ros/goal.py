"""How keyword options become a Chat goal, and what of a message is refused before it is sent.

rclpy looks at a field's value, if at all, on the thread that sends it. There it wraps an integer, cuts a text at a NUL,
or raises: so every value is checked here, on the caller's thread.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from builtin_interfaces.msg import Duration

from edgellm_ros.action import Chat
from edgellm_ros.errors import RequestError
from edgellm_ros.msg import ChatMessage, Sampling, Tool

_SAMPLING = tuple(Sampling.get_fields_and_field_types())
_BITS = (8, 16, 32, 64)
_RANGES = {f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in _BITS} | {
    f"uint{bits}": (0, 2**bits - 1) for bits in _BITS
}
_PYTHON_TYPES: dict[str, Any] = dict.fromkeys(_RANGES, int) | {"boolean": bool, "double": float, "string": str}
_UNSENDABLE = re.compile(r"[\x00\ud800-\udfff]")  # rosidl's strings end at a NUL; UTF-8 has no lone surrogates
_MAX_DEADLINE_S = _RANGES["int32"][1]
_SHOWN = 80  # characters of a value in an error


def make_goal(prompt: str | Sequence[Any] = "", **options: Any) -> Any:
    """A Chat goal of keyword options; see `LLMClient.chat`. Raises RequestError for what cannot be sent as it is."""
    goal = Chat.Goal()
    if isinstance(prompt, str):
        set_field(goal, "prompt", prompt)
    else:
        set_field(goal, "messages", list(_messages(prompt)))
    fields = Chat.Goal.get_fields_and_field_types()
    for name, value in options.items():
        if name == "deadline" and isinstance(value, (int, float)):
            goal.deadline = _deadline(value)
        elif name == "tools":
            set_field(goal, name, list(_tools(value)))
        elif name in _SAMPLING:
            listed = [value] if name == "stop" and isinstance(value, str) else value
            set_field(goal.sampling, name, listed, convert=True)
        elif name in fields:
            set_field(goal, name, value)
        else:
            known = ", ".join(sorted({*fields, *_SAMPLING}))
            raise RequestError(f"unknown option {name!r}; known are {known}")
    return goal


def make_message(kind: Any, where: str = "", /, **fields: Any) -> Any:
    """A message of class `kind`; `where` stands before a field's name in a RequestError."""
    message = kind()
    known = kind.get_fields_and_field_types()
    for name, value in fields.items():
        if name not in known:
            raise RequestError(f"unknown field {where}{name}; known are {', '.join(known)}")
        set_field(message, name, value, where)
    return message


def set_field(message: Any, name: str, value: Any, where: str = "", convert: bool = False) -> None:
    """Set a field, or raise RequestError for a value that would not arrive as it is.

    With `convert`, what Python's own type of the field can be made of is taken, but for numbers that it would cut.
    """
    kind = type(message).get_fields_and_field_types()[name]
    if convert and kind in _RANGES and isinstance(value, float) and value % 1 != 0:
        raise _wrong_type(value, kind, where + name)
    try:
        sent = type(getattr(message, name))(value) if convert else value
        _check(sent, kind, where + name)
        setattr(message, name, sent)
    except (AssertionError, TypeError, ValueError, OverflowError) as error:
        raise _wrong_type(value, kind, where + name) from error


def _check(value: Any, kind: str, where: str) -> None:
    """Raise RequestError unless `value` and all that is in it fit the ROS type `kind`."""
    if kind.startswith("sequence<"):
        if isinstance(value, array) and value.typecode == "B":
            return  # an image's bytes
        if not isinstance(value, (Sequence, array)) or isinstance(value, (str, bytes)):
            raise _wrong_type(value, kind, where)
        for index, item in enumerate(value):
            _check(item, kind[len("sequence<") : -1], f"{where}[{index}]")
    elif "/" in kind:
        package, _, name = kind.partition("/")
        if not isinstance(value, getattr(import_module(f"{package}.msg"), name)):
            raise _wrong_type(value, kind, where)
        for name, inner in value.get_fields_and_field_types().items():
            _check(getattr(value, name), inner, f"{where}.{name}")
    elif not isinstance(value, _PYTHON_TYPES[kind]):
        raise _wrong_type(value, kind, where)
    elif kind == "string":
        if found := _UNSENDABLE.search(value):
            raise RequestError(
                f"{where} has {found[0]!r} at character {found.start()}, which a ROS string cannot hold; "
                "allowed is text without NUL and lone surrogates: remove or replace them"
            )
    elif kind in _RANGES:
        low, high = _RANGES[kind]
        if not low <= value <= high:
            raise RequestError(f"{where} is {_show(value)}; its ROS type is {kind}: give {low} to {high}")


def _wrong_type(value: Any, kind: str, where: str) -> RequestError:
    return RequestError(f"{where} is {_show(value)}; its ROS type is {kind}")


def _show(value: Any) -> str:
    """A value's repr for an error, short."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than 4300 digits
        text = f"of type {type(value).__name__} and too large to be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _messages(prompt: Any) -> Iterator[Any]:
    def message(item: Any, where: str) -> Any:
        if isinstance(item, ChatMessage):
            return item
        if isinstance(item, (tuple, list)) and len(item) == 2:
            return make_message(ChatMessage, where, role=item[0], content=item[1])
        return None

    return _each(prompt, "prompt", "messages", "a text, or ChatMessage messages and (role, content) pairs", message)


def _tools(values: Any) -> Iterator[Any]:
    def tool(item: Any, where: str) -> Any:
        if isinstance(item, Tool):
            return item
        if isinstance(item, Mapping) and all(isinstance(name, str) for name in item):
            return make_message(Tool, where, **item)
        return None

    return _each(values, "tools", "tools", "a list of Tool messages or of dicts with a Tool's fields", tool)


def _each(values: Any, option: str, field: str, allowed: str, make: Callable[[Any, str], Any]) -> Iterator[Any]:
    """The message that `make` makes of every item and of its place; None is for what is not `allowed`."""
    if not isinstance(values, Iterable):
        raise RequestError(f"{option} is {_show(values)}; allowed is {allowed}")
    for index, item in enumerate(values):
        made = make(item, f"{field}[{index}].")
        if made is None:
            raise RequestError(f"{field}[{index}] is {_show(item)}; allowed is {allowed}")
        yield made


def _deadline(seconds: float) -> Duration:
    if not 0.0 <= seconds <= _MAX_DEADLINE_S:  # NaN neither
        raise RequestError(f"deadline is {_show(seconds)} s; allowed is 0 (none) to {_MAX_DEADLINE_S} s")
    nanoseconds = max(round(seconds * 1e9), int(seconds > 0.0))
    return Duration(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
