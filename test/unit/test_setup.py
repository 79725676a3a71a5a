"""The wheel, and `make test`, have the native module where it can be built, and go without it, saying why, where not."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--quiet", "--name"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def fake_nvcc(directory: Path, release: str) -> str:
    """PATH with an nvcc of that release in front."""
    nvcc = directory / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.0'\n")
    nvcc.chmod(0o755)
    return f"{directory}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(("wheels", "sourced"), [("", True), ("1", False)])
def test_the_wheels_of_another_clones_env_sh_are_not_taken_for_an_installed_ros(wheels: str, sourced: bool) -> None:
    environment = {"ROS_DISTRO": "jazzy", "AMENT_PREFIX_PATH": "/opt/ros/jazzy", "EDGELLM_ROS_WHEELS": wheels}
    command = [sys.executable, "-c", "import setup_env; print(setup_env.ros_is_sourced())"]
    result = subprocess.run(
        command, cwd=ROOT / "tools", env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(sourced)


def test_the_native_module_can_be_left_out_and_the_build_says_so() -> None:
    result = setup(EDGELLM_NATIVE="0")
    assert result.returncode == 0 and "edgellm_ros" in result.stdout
    assert "without the native CUDA module: EDGELLM_NATIVE is 0" in result.stderr


def test_a_toolkit_that_is_too_old_makes_a_pure_wheel(tmp_path: Path) -> None:
    result = setup(PATH=fake_nvcc(tmp_path, "11.4"))
    assert result.returncode == 0 and "is not of CUDA 12 or newer" in result.stderr


def test_pybind11_that_is_missing_makes_a_pure_wheel(tmp_path: Path) -> None:
    (tmp_path / "pybind11.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = setup(PATH=fake_nvcc(tmp_path, "13.0"), PYTHONPATH=path)
    assert result.returncode == 0 and "pip install pybind11" in result.stderr


def test_a_cmake_that_pips_isolated_build_breaks_is_passed_over(tmp_path: Path) -> None:
    """pip's cmake is a script that imports a package, which the isolated build hides; the program is in that package."""
    broken, program = tmp_path / "bin" / "cmake", tmp_path / "lib/python3/site-packages/cmake/data/bin/cmake"
    for path, text in ((broken, "exit 1"), (program, f"echo ran >> {tmp_path}/said")):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    fake_nvcc(tmp_path / "bin", "13.0")
    (tmp_path / "pybind11.py").write_text("")
    python_path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PATH": str(tmp_path / "bin"), "PYTHONPATH": python_path}
    assert "without the native CUDA module" not in setup(**environment).stderr
    assert (tmp_path / "said").read_text() == "ran\n"
    program.unlink()
    assert "no cmake that runs was found; apt install cmake" in setup(**environment).stderr


def test_make_test_leaves_native_out_where_there_is_no_nvcc_and_make_native_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    build_native = importlib.import_module("build_native")
    monkeypatch.setattr(build_native, "find_nvcc", lambda: None)
    monkeypatch.setattr(sys, "argv", ["build_native.py", "--check"])
    assert build_native.main() == 0
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["build_native.py"])
    assert build_native.main() == 1
    assert "install the CUDA toolkit" in capsys.readouterr().err


def test_a_build_of_another_python_or_compiler_is_not_continued(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    build_native = importlib.import_module("build_native")
    directory = tmp_path / "objects"
    directory.mkdir()
    (directory / "CMakeCache.txt").write_text("CMAKE_CUDA_COMPILER:UNINITIALIZED=/a/nvcc\nPython3_EXECUTABLE:FILEPATH=/b/python\n")
    build_native.forget_other_tools(directory, ["/a/nvcc", "/b/python"])
    assert directory.is_dir()
    build_native.forget_other_tools(directory, ["/a/nvcc", "/b/python3"])
    assert not directory.exists()
    build_native.forget_other_tools(directory, ["/a/nvcc", "/b/python3"])


@pytest.mark.parametrize("always", [True, False])
def test_checking_builds_once_and_make_native_lets_cmake_decide(
    always: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only CMake sees that headers came meanwhile; nothing else that is asked twice may look different."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    setup_env, build_native = (importlib.import_module(name) for name in ("setup_env", "build_native"))
    wheel = tmp_path / "kernel_lens.py"
    wheel.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 13.0\n")
    nvcc.chmod(0o755)
    stamps = tmp_path / "stamps"
    stamps.mkdir()
    output = tmp_path / "output"
    output.mkdir()
    commands: list[list[str]] = []

    def run(command: list[Any], name: str, environment: object = None) -> None:
        commands.append([str(part) for part in command])
        (output / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").touch()

    monkeypatch.setattr(setup_env, "STAMPS", stamps)
    monkeypatch.setattr(build_native, "CHECK", output)
    monkeypatch.setattr(build_native, "forget_other_tools", lambda *args: None)
    monkeypatch.setattr(build_native, "run", run)
    for _ in range(2):
        importlib.invalidate_caches()
        build_native.build(nvcc, check=True, always=always)
    configured = [command for command in commands if "-S" in command]
    assert len(configured) == (2 if always else 1)
    unset = configured[0].index("-UEDGELLM_NVINFER_*")
    assert unset < configured[0].index("-DEDGELLM_NVINFER_DOUBLE=ON")  # or it would be unset, too


_CMAKE = """#!/bin/sh
case "$1" in
  -S) for option in "$@"; do case "$option" in -DEDGELLM_OUTPUT_DIR=*) echo "${option#*=}" > "$CMAKE_SAID" ;; esac; done ;;
  --build) echo "$@" > "$CMAKE_SAID.build"; output=$(cat "$CMAKE_SAID"); mkdir -p "$output"; echo compiled > "$output/_native$EXT_SUFFIX" ;;
esac
"""


def test_the_wheel_carries_the_module_that_cmake_compiles(tmp_path: Path) -> None:
    """cmake is a stand-in that writes one file where it is told to; the wheel is for this platform, not for any."""
    cmake = tmp_path / "cmake"
    cmake.write_text(_CMAKE)
    cmake.chmod(0o755)
    (tmp_path / "pybind11.py").write_text("")
    environment = {
        "PATH": fake_nvcc(tmp_path, "13.0"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "EXT_SUFFIX": str(sysconfig.get_config_var("EXT_SUFFIX")),
        "CMAKE_SAID": str(tmp_path / "output_dir"),
        "CMAKE_BUILD_PARALLEL_LEVEL": "3",
    }
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build", "--build-base", tmp_path / "b"]
    command += ["bdist_wheel", "--dist-dir", tmp_path, "--bdist-dir", tmp_path / "w"]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "output_dir.build").read_text().endswith(" --parallel 3\n")
    (wheel,) = tmp_path.glob("*.whl")
    assert not wheel.name.endswith("-none-any.whl")
    with zipfile.ZipFile(wheel) as files:
        assert files.read(f"edgellm_ros/_native{environment['EXT_SUFFIX']}") == b"compiled\n"
        assert "edgellm_ros/llm.py" in files.namelist()


_PACKAGE = """cmake_minimum_required(VERSION 3.18)
project(edgellm_ros LANGUAGES C CXX)
set(PYTHON_INSTALL_DIR lib/python)
add_subdirectory({native} native)
"""


@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
def test_colcon_installs_the_module_beside_the_python_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the package's own CMakeLists.txt includes native/; configured, not compiled."""
    pytest.importorskip("pybind11")
    monkeypatch.syspath_prepend(ROOT / "tools")
    nvcc = importlib.import_module("build_native").find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    assert "add_subdirectory(native)" in (ROOT / "CMakeLists.txt").read_text()
    (tmp_path / "CMakeLists.txt").write_text(_PACKAGE.format(native=ROOT / "native"))
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    command += [f"-DPython3_EXECUTABLE={sys.executable}", "-DEDGELLM_CUDA_ARCHS=80"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    script = (tmp_path / "build" / "native" / "cmake_install.cmake").read_text()
    assert re.search(r"/lib/python/edgellm_ros\" TYPE MODULE FILES \"[^\"]*/_native\.[^\"]*\.so\"", script), script


_CHECK = """cmake_minimum_required(VERSION 3.18)
project(edgellm_ros LANGUAGES NONE)
include({native}/cmake/check_nvcc.cmake)
message(STATUS "compiler=${CMAKE_CUDA_COMPILER}")
"""


@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
def test_a_part_of_the_toolkit_makes_colcon_go_without_native_and_say_why(tmp_path: Path) -> None:
    """nvcc that says its version and compiles nothing, as without the runtime's headers."""
    assert "include(native/cmake/check_nvcc.cmake)" in (ROOT / "CMakeLists.txt").read_text()
    (tmp_path / "CMakeLists.txt").write_text(_CHECK.replace("{native}", str(ROOT / "native")))
    path = fake_nvcc(tmp_path, "12.6")
    (tmp_path / "nvcc").write_text((tmp_path / "nvcc").read_text() + 'case "$*" in *--version*) ;; *) exit 1 ;; esac\n')
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH")}
    for _ in range(2):  # the second time with what the first one left in the cache
        result = subprocess.run(
            ["cmake", "-S", tmp_path, "-B", tmp_path / "build"],
            env={**environment, "PATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        said = " ".join(result.stderr.split())
        assert result.returncode == 0 and "compiler=/" not in result.stdout, result.stderr
        assert "building without native/" in said and "install the whole CUDA toolkit" in said
