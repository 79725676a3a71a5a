"""Which marks a bundle has to reach: read from YAML by scheme, and applied to what was measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from edgellm_ros.errors import ToolchainError
from edgellm_ros.manifest import QuantSpec
from edgellm_ros.quality import Quality, QualityMark

# Mark -> the figure of a Quality that it bounds; None where it was not measured.
FIGURES = {
    "max_perplexity_ratio": lambda q: q.perplexity / q.original_perplexity if q.original_perplexity else None,
    "max_kl_divergence": lambda q: q.kl_divergence,
    "min_top1_agreement": lambda q: q.top1_agreement,
    "min_cosine": lambda q: q.cosine,
    "min_task_share": lambda q: _task_share(q),
}


# ModelOpt's quant_algo -> the recipe that makes it.
_RECIPES = {
    "FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8", "FP8_PB_WO": "fp8", "INT8_SQ": "int8_sq",
    "W8A8_SQ_PER_CHANNEL": "int8_sq", "W4A16_AWQ": "int4_awq", "INT4_AWQ": "int4_awq", "W4A8_AWQ": "w4a8_awq",
    "NVFP4": "nvfp4", "NVFP4_AWQ": "nvfp4", "W4A16_NVFP4": "nvfp4",
}  # fmt: skip
_SCHEMES = ("int4", "int8", "fp8", "nvfp4")


def read_marks(path: Path | None = None) -> dict[str, dict[str, float]]:
    """Scheme -> mark -> limit, built-in or from a YAML file of that form; raises ToolchainError that names a fault."""
    where = "marks.yaml" if path is None else str(path)
    try:
        content = (files("edgellm_ros.quality").joinpath("marks.yaml") if path is None else path).read_text("utf-8")
        raw = yaml.safe_load(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ToolchainError(f"marks {where} cannot be read: {error}") from error
    if not isinstance(raw, Mapping) or not all(isinstance(limits, Mapping) for limits in raw.values()):
        raise ToolchainError(f"marks {where} must have a mapping of marks for each scheme")
    return {str(scheme): {name: _limit(f"{where}: {scheme}", name, value) for name, value in limits.items()}
            for scheme, limits in raw.items()}  # fmt: skip


def limits_for(scheme: str, path: Path | None = None) -> dict[str, float]:
    """The marks of one scheme; raises ToolchainError that lists the known ones."""
    marks = read_marks(path)
    if scheme not in marks:
        raise ToolchainError(f"there are no marks for scheme {scheme!r}; known are {', '.join(marks)}; name one with "
                             "--scheme, or a file with --marks")  # fmt: skip
    if not marks[scheme]:
        raise ToolchainError(f"marks {path} has none for scheme {scheme!r}; give it some of {', '.join(FIGURES)}")
    return marks[scheme]


def scheme_of(quant: QuantSpec | None, kept: str = "") -> str:
    """Whose marks count: the recipe's where a checkpoint's integers were kept, else the weights' scheme."""
    kept = quant.kept if quant is not None else kept
    words = kept.replace(",", " ").split()
    found = next((_RECIPES[word] for word in words if word in _RECIPES), "")
    return found or (quant.weights if quant is not None else next((w for w in words if w in _SCHEMES), kept))


def judge(quality: Quality, limits: Mapping[str, float]) -> Quality:
    """`quality` with every mark whose figure was measured."""
    values = {name: FIGURES[name](quality) for name in limits}
    marks = tuple(QualityMark(name, value, limits[name]) for name, value in values.items() if value is not None)
    return dataclasses.replace(quality, marks=marks)


def _task_share(quality: Quality) -> float | None:
    """Tasks passed, of those that the original passes; 1 where it passes none."""
    original = quality.original_tasks_passed
    if original is None:
        return None
    return quality.tasks_passed / original if original else 1.0


def _limit(where: str, name: Any, value: Any) -> float:
    if name not in FIGURES:
        raise ToolchainError(f"{where} has an unknown mark {name!r}; known are {', '.join(FIGURES)}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ToolchainError(f"{where}: {name} is {value!r}; it must be a finite number")
    return float(value)
