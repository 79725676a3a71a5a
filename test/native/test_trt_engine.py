"""The engine runner against TensorRT's real lean runtime: linking, its version, and what is refused, by name.

Without a GPU the library is never asked to make anything; with one it refuses a plan itself. No engine runs here.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from edgellm_ros import native
from edgellm_ros.errors import UnsupportedError

NATIVE, NO_MODULE = native.import_module()


def wheel(package: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    found = list(Path(next(iter(spec.submodule_search_locations))).rglob(file)) if spec else []
    return found[0] if found else None


LEAN, HEADER = wheel("tensorrt_lean_libs", "libnvinfer_lean.so.10"), wheel("kernel_lens", "NvInfer.h")
needs_module = pytest.mark.skipif(bool(NO_MODULE), reason=NO_MODULE)
needs_lean = pytest.mark.skipif(LEAN is None, reason="tensorrt-lean-cu13-libs is not installed (`make test` does)")
HAS_GPU = bool(not NO_MODULE and NATIVE.count_devices()[0])


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trt_link.cpp, compiled with warnings as errors and linked with the real library."""
    nvcc = shutil.which("nvcc")
    if LEAN is None or HEADER is None or nvcc is None:
        pytest.skip("NvInfer.h, the lean library and nvcc are needed")
    output = tmp_path_factory.mktemp("link") / "trt_link"
    command = [nvcc, "-std=c++20", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-cudart=static"]
    command += [f"-isystem={HEADER.parent}", Path(__file__).parent / "trt_link.cpp", "-o", output]
    command += ["-Xlinker", f"-l:{LEAN.name}", "-Xlinker", f"-L{LEAN.parent}", "-Xlinker", f"-rpath={LEAN.parent}"]
    subprocess.run(command, check=True, timeout=300)
    return output


def test_the_real_library_links_and_is_not_used_without_a_driver(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert "version: 101501" in done.stdout
    if done.returncode == 2:
        assert "no device: " in done.stdout and "no error" not in done.stdout
    else:
        assert done.returncode == 0 and "engine: refused" in done.stdout and "error: " in done.stdout


@needs_module
@needs_lean
def test_the_lean_library_is_found_with_its_version_and_without_a_gpu() -> None:
    if not NATIVE.TENSORRT_HEADERS:
        pytest.skip("the module was compiled without NvInfer.h")
    assert NATIVE.find_tensorrt([str(LEAN)]) == (str(LEAN), (10, 15, 1, 29), "")
    path, version, reason = NATIVE.find_tensorrt(["/nowhere/libnvinfer.so.10", str(LEAN)])
    assert (path, version[0], reason) == (str(LEAN), 10, "")


@needs_module
def test_what_is_no_tensorrt_is_refused_by_name() -> None:
    if not NATIVE.TENSORRT_HEADERS:
        assert "without NvInfer.h" in NATIVE.find_tensorrt(["libc.so.6"])[2]
        return
    assert NATIVE.find_tensorrt(["libc.so.6"])[2] == "libc.so.6 is not TensorRT's runtime: it has no getInferLibVersion"
    path, version, reason = NATIVE.find_tensorrt(["/nowhere/libnvinfer.so.10"])
    assert not path and not version and "/nowhere/libnvinfer.so.10" in reason
    with pytest.raises(UnsupportedError, match="no TensorRT: .*/nowhere"):
        NATIVE.TrtEngine(__file__, ["/nowhere/libnvinfer.so.10"])


@needs_module
@needs_lean
@pytest.mark.skipif(HAS_GPU, reason="here is a GPU")
def test_without_a_driver_the_engine_is_refused_before_tensorrt_is_asked(tmp_path: Path) -> None:
    if not NATIVE.TENSORRT_HEADERS:
        pytest.skip("the module was compiled without NvInfer.h")
    with pytest.raises(UnsupportedError, match="TensorRT needs an NVIDIA GPU and its driver: .+"):
        NATIVE.TrtEngine(str(tmp_path / "never read"), [str(LEAN)])


@needs_module
@needs_lean
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_the_real_library_refuses_a_plan_that_is_none_in_its_own_words(tmp_path: Path) -> None:
    if not NATIVE.TENSORRT_HEADERS:
        pytest.skip("the module was compiled without NvInfer.h")
    plan = tmp_path / "decoder.engine"
    with pytest.raises(UnsupportedError, match="cannot be opened: No such file"):
        NATIVE.TrtEngine(str(plan), [str(LEAN)])
    plan.write_bytes(b"")
    with pytest.raises(UnsupportedError, match="is empty"):
        NATIVE.TrtEngine(str(plan), [str(LEAN)])
    plan.write_bytes(bytes(range(256)) * 64)
    with pytest.raises(UnsupportedError, match="TensorRT refuses .*decoder.engine: .+edgellm build --force") as error:
        NATIVE.TrtEngine(str(plan), [str(LEAN)])
    assert "gave no reason" not in str(error.value)
