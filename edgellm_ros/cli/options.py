"""Turns settings into command-line options and back: a dataclass field is all that a new option needs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from edgellm_ros.fields import Setting, settings_of

T = TypeVar("T")

FORMATTER = argparse.RawDescriptionHelpFormatter


def add_settings(
    parser: argparse.ArgumentParser,
    cls: type,
    title: str,
    skip: Sequence[str] = (),
    defaults: bool = True,
    aliases: Mapping[str, str] | None = None,
    helps: Mapping[str, str] | None = None,
) -> None:
    """Add an option for each setting of the dataclass `cls` under the heading `title`; `defaults` are in its help.

    `aliases` gives settings a second, shorter option: {"max_context": "--context"}. `helps` replaces the help and the
    default of settings that a verb chooses itself where the option is not given; their range is still shown.
    """
    group = parser.add_argument_group(title)
    for item in settings_of(cls):
        if item.name in skip:
            continue
        options: dict[str, Any] = {
            "dest": _dest(cls, item.name),
            "default": argparse.SUPPRESS,
            "help": _help(item, defaults, (helps or {}).get(item.name, "")),
        }
        if item.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = (item.unit or {int: "N", float: "X", tuple: "TEXT"}.get(item.type, "NAME")).upper()
            options["type"] = str if item.type is tuple else item.type
            if item.type is tuple:
                options["action"] = "append"
            if item.choices:
                options["choices"] = item.choices
        short = [aliases[item.name]] if aliases and item.name in aliases else []
        group.add_argument(f"--{item.name.replace('_', '-')}", *short, **options)


def settings_from(args: argparse.Namespace, base: T) -> T:
    """`base` with the options that were given on the command line; out of range raises as the dataclass does."""
    cls = type(base)
    given: dict[str, Any] = {}
    for item in settings_of(cls):
        if hasattr(args, _dest(cls, item.name)):
            value = getattr(args, _dest(cls, item.name))
            given[item.name] = tuple(value) if item.type is tuple else value
    return dataclasses.replace(base, **given)  # type: ignore[type-var]


def was_given(args: argparse.Namespace, cls: type, name: str) -> bool:
    """Whether the option of that setting stands on the command line."""
    return hasattr(args, _dest(cls, name))


def _dest(cls: type, name: str) -> str:
    return f"{cls.__name__}.{name}"


def _help(item: Setting, defaults: bool, instead: str) -> str:
    text, notes = instead or item.help, []
    low, high = (None if bound is None else item.type(bound) for bound in (item.minimum, item.maximum))
    if low is not None and high is not None and high < 2**31 - 1:
        notes.append(f"{low} to {high}")
    elif low is not None:
        notes.append(f"at least {low}")
    if item.type is tuple:
        notes.append("may be repeated")
    elif defaults and not instead and item.default is not None and item.default != "":
        default = {True: "on", False: "off"}[item.default] if item.type is bool else item.default
        notes.append(f"default {default}")
    return (f"{text} ({'; '.join(notes)})" if notes else text).replace("%", "%%")
