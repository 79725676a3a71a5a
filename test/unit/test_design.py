"""docs/design.md names what is there: every module outside families of one kind, and import-linter's layers."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
OF_A_KIND = ("cli", "families", "quantized", "graph")  # directories that the tree names as a whole


def test_the_tree_names_every_module_and_no_other() -> None:
    tree = PAGE.split("\nedgellm_ros/\n")[1].split("\nnative/\n")[0]
    paths = [p for p in (ROOT / "edgellm_ros").rglob("*.py") if p.name != "__init__.py"]
    there = {p.name for p in paths if p.parent.name not in OF_A_KIND}
    assert set(re.findall(r"\w+\.py", tree)) == there


def test_the_layers_are_those_that_the_linter_holds() -> None:
    contract = re.search(r"^layers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    listed = re.search(r"siblings never each other: (.*?);", PAGE, re.DOTALL)
    assert contract is not None and listed is not None
    layers = re.findall(r"`(.*?)`", listed[1])
    assert len(layers) > 5 and layers == re.findall(r'"(.*?)"', contract[1])
