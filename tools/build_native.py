"""Compiles native/ where nvcc is found: optimised for the GPU here, or (--check) quickly for every architecture.

`make native` calls it plain: edgellm_ros/_native*.so for EDGELLM_CUDA_ARCHS, or for the GPU that is here, or for all.
`make test` calls it with --check: every architecture that nvcc knows, warnings as errors, and without optimisation,
which takes a quarter of the time. That module goes to build/native-check, so that it never replaces the fast one,
and the tests use it where there is no other (test/conftest.py); a fast one that is there is brought up to date. So
does the double of libnvinfer, where NvInfer.h is, which only tests have.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setup_env import ROOT, SetupError, Step, hash_tree, pip, run

CHECK = ROOT / "build" / "native-check"


def main() -> int:
    """Build; with --check unless nothing changed since the last time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="every architecture, quickly, into build/native-check")
    check = parser.parse_args().check
    try:
        nvcc = find_nvcc()
        if nvcc is None:
            if not check:
                raise SetupError("nvcc was not found in PATH, CUDA_HOME or /usr/local/cuda; install the CUDA toolkit")
            print("-- native/ is left out: no nvcc in PATH, CUDA_HOME or /usr/local/cuda")
            return 0
        if importlib.util.find_spec("pybind11") is None:
            pip("pybind11>=2.12")
        if check:
            build(nvcc, check)
        if not check or any((ROOT / "edgellm_ros").glob("_native*.so")):
            build(nvcc, False, always=not check)
    except SetupError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def build(nvcc: Path, check: bool, always: bool = False) -> None:
    """Configure and compile with CMake, for this Python and with its pybind11.

    `always`: CMake decides what there is to do. Only it sees the headers of cuBLAS and TensorRT that came meanwhile.
    """
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    archs = "all" if check else os.environ.get("EDGELLM_CUDA_ARCHS", "")
    output = CHECK if check else ROOT / "edgellm_ros"
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    wheel = importlib.util.find_spec("kernel_lens")
    tensorrt = [os.environ.get("TENSORRT_ROOT", ""), str(wheel.origin) if wheel else ""]  # whose NvInfer.h
    package = (ROOT / "edgellm_ros" / "__init__.py").read_text(encoding="utf-8")  # has the version
    inputs = [version, archs, suffix, *tensorrt, package, hash_tree(ROOT / "native")]
    title = f"native/ for {'every architecture, -Werror' if check else archs or 'the GPU here, or all'}"
    with Step("native-check" if check else "native", title, inputs) as step:
        if step.done and not always and (output / f"_native{suffix}").is_file():
            return
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SetupError("cmake was not found; on Debian or Ubuntu: apt install cmake, or: pip install cmake")
        directory = ROOT / "build" / ("native-check-objects" if check else "native")
        forget_other_tools(directory, [str(nvcc), sys.executable])
        configure: list[str | Path] = [cmake, "-S", ROOT / "native", "-B", directory]
        configure += ["-UEDGELLM_NVINFER_*", "-UEDGELLM_CUBLASLT_INCLUDE_DIR"]  # looked for again, TENSORRT_ROOT first
        configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DPython3_EXECUTABLE={sys.executable}"]
        configure += [f"-DEDGELLM_CUDA_ARCHS={archs}", f"-DEDGELLM_OUTPUT_DIR={output}"]
        flag = "ON" if check else "OFF"
        configure += [f"-DEDGELLM_FAST_COMPILE={flag}", f"-DEDGELLM_WERROR={flag}", "-DEDGELLM_TEST_DRIVERS=ON"]
        configure += [f"-DEDGELLM_NVINFER_DOUBLE={flag}", f"-DEDGELLM_NVINFER_DOUBLE_DIR={CHECK}"]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        run(configure, "native-configure")
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        run([cmake, "--build", directory, "--parallel", jobs], "native-build")
        # A shared library links with symbols missing, and tests skip a module that cannot be loaded.
        environment = {**os.environ, "PYTHONPATH": str(output)}
        run([sys.executable, "-c", "import _native; print(_native.__file__)"], "native-import", environment)


def forget_other_tools(directory: Path, tools: list[str]) -> None:
    """Remove a build of another compiler or Python: CMake keeps what it found out about them."""
    cache = directory / "CMakeCache.txt"
    if cache.is_file():
        text = cache.read_text(encoding="utf-8", errors="replace")
        if not all(f"={tool}\n" in text for tool in tools):
            shutil.rmtree(directory)


def find_nvcc() -> Path | None:
    """Where a toolkit is usually installed; a Jetson has it outside PATH."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes), "/usr/local/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    return Path(found) if found else None


if __name__ == "__main__":
    sys.exit(main())
