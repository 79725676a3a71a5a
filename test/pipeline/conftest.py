"""Cases of the suite become tests, and what they measured a part of their reports."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from suite import Case, read_suite


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        try:
            names = metafunc.config.getoption("--suite") or ["l0"]
            if len(names) > 1:
                raise ValueError(f"--suite is given more than once ({', '.join(names)}); run one list at a time")
            cases = read_suite(names[0])
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """What a case measured goes with its report, from a process of pytest-xdist too, to the table of test/conftest.py."""
    report = (yield).get_result()
    row = getattr(item, "pipeline_row", None)
    if report.when == "call" and row is not None:
        report.user_properties.append(("pipeline_row", row | {"result": report.outcome}))


@pytest.fixture(scope="session")
def checkpoint_of(smollm2_gguf: Path, tiny_checkpoint: Callable[[str], Path]) -> Callable[[Case], Path]:
    """The original checkpoint of a case."""

    def get(case: Case) -> Path:
        if case.is_tiny:
            return tiny_checkpoint(case.model.removeprefix("tiny_"))
        assert case.model == "SmolLM2-135M", f"{case.name}: the models are SmolLM2-135M and tiny_KIND"
        return smollm2_gguf

    return get


@pytest.fixture(scope="session")
def readings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `edgellm verify --cache` keeps what originals gave, for all cases; processes of pytest-xdist share it."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "readings"
