"""Every kernel has its launch function in a kernels/*.cu, a binding, a test against a reference and a line of a benchmark.

No GPU and no built module: what is looked at is the source.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native"
# What has no binding of its own, and where it is tested instead.
WITHOUT = {
    "fill_random_bf16": "numbers to try cuBLASLt's algorithms on",
    "fill_random_fp8": "the same",
    "checksum": "whether those algorithms agree: test_products.py",
}


@functools.cache
def text_of(pattern: str, root: Path = ROOT) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(root.glob(pattern))}


HEADERS = text_of("include/edgellm/kernels/*.hpp", NATIVE)
KERNELS = {
    name: header
    for header, text in HEADERS.items()
    for name in re.findall(r"^\w+ (\w+)_async\(", text, re.MULTILINE)
    if name not in WITHOUT
}  # fmt: skip


def test_the_headers_were_read() -> None:
    assert len(KERNELS) >= 20 and {"gemv", "sample", "residual_norm", "rope_kv_write"} <= set(KERNELS)
    everything = "".join(HEADERS.values())
    assert all(f" {name}_async(" in everything for name in WITHOUT), "an exception that is no longer needed"


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_a_kernel_has_a_file_a_binding_a_test_and_a_benchmark(name: str) -> None:
    header = KERNELS[name].removesuffix(".hpp")
    sources = [file for file, text in text_of("kernels/*.cu", NATIVE).items() if f"void {name}_async(" in text]
    assert sources, f"no kernels/*.cu defines {name}_async"
    bindings = [
        file for file, text in text_of("bindings/bind_*.cpp", NATIVE).items() if re.search(rf'def\(\s*"{name}"', text)
    ]
    assert bindings == [f"bind_{header}.cpp"], f"{name} of {header}.hpp is bound in {bindings}"
    called = re.compile(rf"\bK\.{name}\(")
    tests = [file for file, text in text_of("test/native/test_*.py").items() if called.search(text)]
    assert tests, f"no test/native/test_*.py calls K.{name}"
    assert (ROOT / "test" / "native" / f"test_{header}.py").is_file()
    benchmarks = [file for file, text in text_of("bench/bench_*.py").items() if called.search(text)]
    assert benchmarks, f"no bench/bench_*.py calls K.{name}"


def test_every_cuda_call_is_checked_or_says_that_it_is_not() -> None:
    """EDGELLM_CUDA_TRY or EDGELLM_CUDA_WARN around it, or `(void)`, or its code in hand."""
    call = re.compile(r"\bcuda[A-Z]\w+\(")
    found = []
    for path in sorted(NATIVE.glob("*/*.[ch]*")) + sorted(NATIVE.glob("include/edgellm/**/*.hpp")):
        if path.parent.name in ("cmake", "nvinfer_double", "test_driver"):
            continue
        statement = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            statement += code
            allowed = r"EDGELLM_CUDA_(TRY|WARN)|\(void\)cuda|cudaError_t \w+ = cuda|cudaGetError(Name|String)|== cudaSuccess"
            if call.search(code) and not re.search(allowed, statement):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
            if code.rstrip().endswith((";", "{", "}", ":")):
                statement = ""
    assert not found, "\n".join(found)
