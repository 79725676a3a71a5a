"""tools/export_smollm2.py: the bundle is exported under its own name, which the export shows, and once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_TOOL = Path(__file__).parents[2] / "tools" / "export_smollm2.py"


def test_the_export_gets_the_name_that_the_bundle_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("export_smollm2", _TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    bundle, seen = tmp_path / "smollm2-135m-int4", []

    def run(command: list[str], **options: Any) -> None:
        seen.append(command[command.index("-o") + 1])
        Path(seen[-1]).mkdir()

    monkeypatch.setattr(tool, "CACHE", tmp_path)
    monkeypatch.setattr(tool.subprocess, "run", run)
    bundle.mkdir()  # what an old version left half done
    assert tool.export(Path("model.gguf"), "int4") == bundle and seen == [str(bundle)]
    assert tool.export(Path("model.gguf"), "int4") == bundle and len(seen) == 1
