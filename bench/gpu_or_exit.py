"""How a benchmark ends where it cannot run: in one line with the remedy and status 2, as the `edgellm` command does."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from edgellm_ros import native
from edgellm_ros.errors import EdgeLLMError

__all__ = ["load_module", "one_line", "run_script"]

# What only benchmarks need, and what brings it.
_PACKAGES = {
    "gguf": "pip install 'edgellm_ros[toolchain]'",
    "llama_cpp": "pip install 'llama-cpp-python>=0.3', which compiles it (some minutes, a C++ compiler)",
    "ml_dtypes": "pip install 'edgellm_ros[toolchain]'",
    "onnx": "pip install 'edgellm_ros[toolchain]'",
    "pytest": "pip install pytest",
    "torch": "pip install torch, built for the CUDA version that is here",
}


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and end the process with its status, None being 0, or as `one_line` does."""
    with one_line():
        status = main()
    sys.exit(status)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """For an EdgeLLMError or a missing package end the process with status 2, after the message or what brings it."""
    try:
        yield
        return
    except EdgeLLMError as error:
        said = str(error)
    except ModuleNotFoundError as error:
        remedy = _PACKAGES.get((error.name or "").partition(".")[0])
        if remedy is None:  # a module of our own, say: a bug, which needs its traceback
            raise
        said = f"the Python module {error.name} is missing: {remedy}"
    print(f"error: {said}", file=sys.stderr)
    sys.exit(2)


def load_module() -> Any:
    """`native.load()`; its errors also name what measures without a GPU."""
    try:
        return native.load()
    except EdgeLLMError as error:
        raise type(error)(f"{error}; without a GPU there is `edgellm bench --bundle BUNDLE`") from error
