"""How a setting is declared once: a dataclass field that carries its help, range and unit.

The command line, the YAML files and the ROS parameters are derived from these fields and never written out again.
What a bundle's files may hold is declared beside the type in the same way, with `Allowed`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, Union

from edgellm_ros.errors import ConfigError, EdgeLLMError


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of one field: enough for a ParameterDescriptor, an argparse option and a check."""

    name: str
    type: type  # bool, int, float, str or tuple (of str)
    default: Any
    help: str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    unit: str
    dynamic: bool  # may change while the node runs
    optional: bool  # None is a value


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What a field of type `Annotated[…, Allowed(…)]` may hold beyond its type; numbers are finite."""

    minimum: float | None = None  # inclusive, as maximum is
    maximum: float | None = None
    above: float | None = None  # exclusive
    choices: tuple[str, ...] = ()
    pattern: str = ""  # of the whole text
    words: str = ""  # what the pattern says, for people

    def demand(self, value: Any) -> str:
        """What `value` would have to be; empty where it is."""
        if self.choices and value not in self.choices:
            return f"allowed are {', '.join(map(repr, self.choices))}"
        if self.pattern and not re.fullmatch(self.pattern, value):
            return f"it must be {self.words}"
        if isinstance(value, float) and not math.isfinite(value):
            return "it must be a finite number"
        if self.above is not None and value <= self.above:
            return f"it must be above {_number(self.above)}"
        if (self.minimum is not None and value < self.minimum) or (self.maximum is not None and value > self.maximum):
            return f"allowed is {_bounds(self.minimum, self.maximum)}"
        return ""


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
    unit: str = "",
    dynamic: bool = False,
) -> Any:
    """Declare a dataclass field with what its users need to know; bounds are inclusive."""
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "choices": tuple(choices),
        "unit": unit,
        "dynamic": dynamic,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(cls: type) -> list[Setting]:
    """The fields of `cls` that were declared with `setting`, in order."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        kind, optional = _plain_type(hints[field.name])
        if field.default is not dataclasses.MISSING:
            default = field.default
        else:
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        found.append(Setting(field.name, kind, default, optional=optional, **field.metadata))
    return found


def check_settings(obj: Any, error: type[EdgeLLMError] = ConfigError) -> None:
    """Raise `error` for the first field of `obj` with a wrong type or a value outside its range, naming both."""
    for item in settings_of(type(obj)):
        value = getattr(obj, item.name)
        if value is None:
            if item.optional:
                continue
            raise error(f"{item.name} must not be None; it is of type {item.type.__name__}")
        if item.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, item.type) or (isinstance(value, bool) and item.type is not bool):
            raise error(f"{item.name} is {value!r}; it must be of type {item.type.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise error(f"{item.name} is {value}; it must be a finite number{_range(item)}")
        if isinstance(value, (int, float)) and not _inside(item, value):
            raise error(f"{item.name} is {value}; allowed is{_range(item)}")
        if item.choices and value not in item.choices:
            raise error(f"{item.name} is {value!r}; allowed are {', '.join(item.choices)}")


def _inside(item: Setting, value: float) -> bool:
    return (item.minimum is None or value >= item.minimum) and (item.maximum is None or value <= item.maximum)


def from_mapping(cls: type, values: typing.Mapping[str, Any], error: type[EdgeLLMError] = ConfigError) -> Any:
    """Build `cls` from a mapping; an unknown key is an `error` that lists the known ones."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise error(f"unknown setting {key!r}; known are {', '.join(known)}")
    return cls(**values)


def _range(item: Setting) -> str:
    unit = f" {item.unit}" if item.unit else ""
    return f" {_bounds(item.minimum, item.maximum)}{unit}"


def _bounds(minimum: float | None, maximum: float | None) -> str:
    low = "-∞" if minimum is None else _number(minimum)
    high = "∞" if maximum is None else _number(maximum)
    return f"{low} to {high}"


def _number(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


def _plain_type(hint: Any) -> tuple[type, bool]:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        args = [a for a in typing.get_args(hint) if a is not type(None)]
        return _plain_type(args[0])[0], True
    return (origin or hint), False
