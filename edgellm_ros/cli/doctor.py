"""`edgellm doctor`: says what is here, what is missing, and how to get it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgellm_ros.cli.check import Check

HELP = "say what this machine has, what is missing, and how to get it"
EXAMPLES = """\
examples:
  edgellm doctor
  edgellm doctor --bundle smollm2      also: is the bundle whole, and does it fit in memory?

exit code: 0 when the base works (and the bundle, if given), else 1; what is only "missing" can be done without.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("--bundle", type=Path, metavar="BUNDLE", help="check this bundle as well")


def execute(args: argparse.Namespace) -> int:
    """Print the table (plain lines where rich itself is missing)."""
    from edgellm_ros.cli.check import State
    from edgellm_ros.cli.checks import all_checks

    checks = list(all_checks(args.bundle))
    try:
        _print_table(checks)
    except ImportError:
        for check in checks:
            print(f"{check.state.value:8} {check.group}: {check.name}: {check.found}  {check.remedy}".rstrip())
    failed = [check for check in checks if check.state is State.FAILED]
    print("the base works" if not failed else f"failed: {', '.join(check.name for check in failed)}")
    return 1 if failed else 0


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colors = {"ok": "green", "missing": "yellow", "failed": "bold red"}
    table = Table()
    for column in ("", "", "what was found"):
        table.add_column(column, overflow="fold")
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            table.add_section()
        color = colors[check.state.value]
        found = escape(check.found) + (f"\n[dim]→ {escape(check.remedy)}[/dim]" if check.remedy else "")
        table.add_row(f"[{color}]{check.state.value}[/{color}]", check.name, found)
    Console(highlight=False).print(table)
