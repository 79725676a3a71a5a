"""Adds the native module to the wheel where a CUDA toolkit is; everything else is in pyproject.toml.

EDGELLM_NATIVE=0 leaves it out. EDGELLM_CUDA_ARCHS names architectures ("87", "80 90a"), `all` or `native`; without it
the module is compiled for the GPUs that are here, or for all where there is none. CMAKE_ARGS goes to CMake as it is.
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def missing() -> str:
    """What the native module cannot be built without, with the remedy; empty when it can be built."""
    if os.environ.get("EDGELLM_NATIVE", "1").lower() in ("0", "off", "no", "false"):
        return "EDGELLM_NATIVE is 0"
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc in PATH, CUDA_HOME or /usr/local/cuda; install the CUDA toolkit for the GPU executor"
    version = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if version is None or int(version.group(1)) < 12:
        return f"{nvcc} is not of CUDA 12 or newer"
    if not find_cmake():
        return "no cmake that runs was found; apt install cmake"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 was not found; pip install pybind11"
    return ""


def find_nvcc():
    """Where a toolkit is usually installed; a Jetson has it outside PATH."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


@functools.cache
def find_cmake():
    """The first in PATH that runs; "" is none. pip's isolated build hides the package that a cmake of pip's imports."""
    for directory in os.environ.get("PATH", os.defpath).split(os.pathsep):
        found = shutil.which("cmake", path=directory) if directory else None
        package = Path(directory).parent.glob("lib/python*/site-packages/cmake/data/bin/cmake")
        for path in [found, *map(str, package)] if found else []:
            if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
                return path
    return ""


def num_jobs():
    """CMake's own variable, for a robot with little memory, or one for each processor."""
    return os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)


class CMakeBuild(build_ext):
    """Builds native/ with CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Compile into the directory that the wheel (or, in place, the source tree) takes the module from."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        directory = Path(self.build_temp).resolve() / "native"
        configure = [find_cmake(), "-S", ROOT / "native", "-B", directory, f"-DEDGELLM_OUTPUT_DIR={output}"]
        configure += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", f"-DPython3_EXECUTABLE={sys.executable}"]
        configure += [f"-DEDGELLM_CUDA_ARCHS={os.environ.get('EDGELLM_CUDA_ARCHS', '')}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        try:
            subprocess.run(configure, check=True)
            subprocess.run([find_cmake(), "--build", directory, "--parallel", num_jobs()], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"edgellm_ros: native/ does not build (above); EDGELLM_NATIVE=0 installs without it\n{error}")


reason = missing()
if reason:
    print(f"edgellm_ros: without the native CUDA module: {reason}", file=sys.stderr)
    setup()
else:
    setup(ext_modules=[Extension("edgellm_ros._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
