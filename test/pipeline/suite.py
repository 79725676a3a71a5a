"""Reads test/lists/*.yaml: which models go through the pipeline, how, and what is known to fail."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

LISTS = Path(__file__).resolve().parents[1] / "lists"
RECIPES = ("fp8", "int4_awq", "int4_gptq", "int8_sq", "nvfp4", "w4a8_awq")
SCHEMES = ("keep", "fp32", "fp16", "int8", "int4", *RECIPES)
_KEYS = ("cases", "matrix", "fails", "text_words", "profile")  # of a list
_NAME = re.compile(rf"(?P<model>.+)-(?P<scheme>{'|'.join(sorted(SCHEMES, key=len, reverse=True))})-ctx(?P<context>\d+)-bs(?P<batch>\d+)")


@dataclass(frozen=True)
class Case:
    """One line of a list. What has a default stands after the name, as a mapping."""

    name: str
    model: str  # SmolLM2-135M, or tiny_KIND for a kind of test/toolchain/tiny.py
    scheme: str
    context: int
    batch: int
    text_words: int = 0  # of verify's text; 0 is all
    targets: tuple[str, ...] = ()  # engines that are built
    profile: str = "split"  # of the first engine; the others have a single one
    samples: int = 0  # of calibration; 0 is the recipe's
    sequence_length: int = 0
    fails: tuple[str, ...] = ()  # marks that the bundle is known to fail; with none it has to pass
    checkpoint_fails: tuple[str, ...] = ()  # the same of the quantised checkpoint with its activations rounded

    @property
    def is_tiny(self) -> bool:
        """Random weights: figures are measured and not judged."""
        return self.model.startswith("tiny_")


def parse_case(entry: Any, defaults: dict[str, Any]) -> Case:
    """A line of a list; ValueError says what is wrong with it."""
    name, options = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"{name!r} is not MODEL-SCHEME-ctxN-bsN with one of the schemes {', '.join(SCHEMES)}")
    known = set(Case.__dataclass_fields__) - {"name", "model", "scheme", "context", "batch"}
    if unknown := set(options) - known:
        raise ValueError(f"{name}: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in {**defaults, **options}.items()}
    return Case(name, found["model"], found["scheme"], int(found["context"]), int(found["batch"]), **values)


def read_suite(name: str) -> list[Case]:
    """The cases of test/lists/NAME.yaml. A `matrix` stands for all of its combinations; `fails` is by MODEL-SCHEME."""
    path = LISTS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no suite {name!r}; there are {', '.join(sorted(p.stem for p in LISTS.glob('*.yaml')))}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    raw = content.get(name) if isinstance(content, dict) else None
    if not isinstance(raw, dict) or not any(raw.get(key) for key in ("cases", "matrix")):
        raise ValueError(f"{path} has no cases: it must be a mapping {name} with cases, a matrix or both")
    if unknown := set(raw) - set(_KEYS):
        raise ValueError(f"{path}: unknown {', '.join(sorted(unknown))}; known are {', '.join(_KEYS)}")
    defaults = {key: raw[key] for key in ("text_words", "profile") if key in raw}
    entries = list(raw.get("cases", []))
    for matrix in raw.get("matrix", []):
        options = {key: value for key, value in matrix.items() if key not in ("models", "schemes", "contexts", "batches")}
        entries += [
            {f"{model}-{scheme}-ctx{context}-bs{batch}": options}
            for model in matrix["models"] for scheme in matrix["schemes"]
            for context in matrix["contexts"] for batch in matrix["batches"]
        ]  # fmt: skip
    cases = [parse_case(entry, defaults) for entry in entries]
    known = {key: tuple(marks) for key, marks in raw.get("fails", {}).items()}
    if strange := set(known) - {f"{case.model}-{case.scheme}" for case in cases}:
        raise ValueError(f"{path}: fails names {', '.join(sorted(strange))}, which no case is")
    cases = [replace(case, fails=known.get(f"{case.model}-{case.scheme}", case.fails)) for case in cases]
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"{path} names a case twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
    return cases
