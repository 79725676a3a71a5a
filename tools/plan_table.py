"""Renews the table of docs/jetson.md: what `edgellm plan` says of the common models on the Jetsons.

`python tools/plan_table.py` rewrites the lines between the page's two marks; a test compares them with this output.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from edgellm_ros.benchmark.budget import CONTEXT_GB, SYSTEM_GB
from edgellm_ros.cli.main import main as edgellm

PAGE = Path(__file__).resolve().parent.parent / "docs" / "jetson.md"
BEGIN, END = "<!-- tools/plan_table.py begins -->\n", "<!-- tools/plan_table.py ends -->\n"
MODELS = ("qwen3-0.6b", "llama-1b", "qwen3-1.7b", "llama-3b", "qwen3-4b", "llama-8b", "qwen3-8b",
          "qwen3-14b", "qwen3-32b")  # fmt: skip
DEVICES = ("orin-nano", "orin-nx", "agx-orin", "thor")
OPTIONS = ("--weights", "int4", "--context", "4096", "--max-slots", "1")


def command(model: str) -> list[str]:
    """The command of one row, after `edgellm`."""
    return ["plan", "--model", model, *OPTIONS, "--device", *DEVICES]


def budgets_of(model: str) -> list[dict[str, Any]]:
    """What that command says, one dictionary a device."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        edgellm([*command(model), "--formula", "--json"])
    budgets: list[dict[str, Any]] = json.loads(out.getvalue())
    return budgets


def row(model: str, budgets: list[dict[str, Any]]) -> str:
    """One line of the table; memory in MB, speed as tokens/s at a context of 512 and the bandwidth's bound."""
    parts = budgets[0]["parts"]
    others = sum(parts.values()) - parts["weights"] - parts["kv_cache"] + int((CONTEXT_GB + SYSTEM_GB) * 1e9)
    cells = [model, *(f"{count / 1e6:,.0f}" for count in (parts["weights"], parts["kv_cache"], others))]
    cells.append(f"{budgets[0]['needed_bytes'] / 1e6:,.0f}")
    for budget in budgets:
        speed, bound = budget["tokens_per_s"]["512"], budget["bound_tokens_per_s"]["512"]
        tight = ", tight" if budget["tight"] else ""
        cells.append(f"{speed:.0f} ({bound:.0f}){tight}" if budget["fits"] else "does not fit")
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    """The whole table in Markdown."""
    rows = {model: budgets_of(model) for model in MODELS}
    there = [f"{budget['memory_bytes'] / 1e6:,.0f}" for budget in rows[MODELS[0]]]
    head = ["model", "weights", "KV cache", "all else", "needed"]
    head += [f"{name} ({memory})" for name, memory in zip(DEVICES, there, strict=True)]
    lines = [f"| {' | '.join(head)} |\n", f"|---{'|---' * (len(head) - 1)}|\n"]
    return "".join(lines + [row(model, budgets) for model, budgets in rows.items()])


def main() -> None:
    """Rewrite the page's table."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
