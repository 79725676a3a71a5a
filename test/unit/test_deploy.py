"""What a robot is set up with: the systemd unit, the container's packages, and the tables of docs/jetson.md and verified.md."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edgellm_ros.cli.main import main

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "config" / "edgellm.service"
ENVIRONMENT = dict(
    line.split("=", 1)
    for line in (ROOT / "config" / "edgellm.env").read_text().splitlines()
    if line and not line.startswith("#")
)


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    return parser


def verify(path: Path) -> str:
    """What `systemd-analyze verify` complains of; empty when it does not."""
    result = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True)
    return (result.stdout + result.stderr).strip() or ("" if result.returncode == 0 else f"exit {result.returncode}")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    assert verify(UNIT) == ""
    wrong = tmp_path / "edgellm.service"
    wrong.write_text(UNIT.read_text().replace("Restart=always", "Restart=mostly"))
    assert "Restart" in verify(wrong) or "restart" in verify(wrong)


def test_the_unit_restarts_after_boot_and_failure_as_a_user_of_its_own() -> None:
    service = unit()["Service"]
    assert service["User"] == service["Group"] == "edgellm"
    assert service["Restart"] == "always" and int(service["RestartSec"]) > 0
    assert service["KillSignal"] == "SIGINT"
    assert unit()["Install"]["WantedBy"] == "multi-user.target"
    # five starts must fit into the interval, or the limit would never be reached
    limits = unit()["Unit"]
    assert int(limits["StartLimitBurst"]) * int(service["RestartSec"]) < int(limits["StartLimitIntervalSec"])


def test_the_units_command_launches_what_the_launch_file_declares(tmp_path: Path) -> None:
    """The command runs for real, with a ros2 that only says how it was called."""
    command = re.fullmatch(r"/bin/bash -c '(.*)'", unit()["Service"]["ExecStart"])
    assert command is not None
    assert set(re.findall(r"\$\{(\w+)\}", command[1])) <= set(ENVIRONMENT)
    for name, place in {"ros.bash": "a", "venv/bin/activate": "b", "ws/install/setup.bash": "c"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"export SEEN=${{SEEN}}{place}\n")
    ros2 = tmp_path / "ros2"
    ros2.write_text('#!/bin/sh\nprintf "%s\\n" "$SEEN" "$@"\n')
    ros2.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "ROS_SETUP": f"{tmp_path}/ros.bash", "VENV": f"{tmp_path}/venv",
        "WORKSPACE": f"{tmp_path}/ws", "BUNDLE": "/with a space/bundle", "PARAMS_FILE": "llm.yaml",
    }
    result = subprocess.run(["/bin/bash", "-c", command[1]], env=environment, capture_output=True, text=True, check=True)
    seen, *words = result.stdout.splitlines()
    assert seen == "abc" and words[:2] == ["launch", "edgellm_ros"]
    launch = ROOT / "launch" / words[2]
    calls = [node for node in ast.walk(ast.parse(launch.read_text())) if isinstance(node, ast.Call)]
    declared = {ast.literal_eval(c.args[0]) for c in calls if ast.unparse(c.func) == "DeclareLaunchArgument"}
    given = dict(word.split(":=") for word in words[3:])
    assert given == {"bundle": "/with a space/bundle", "params_file": "llm.yaml"} and set(given) <= declared


def test_the_directories_that_the_steps_write_into_are_made_for_their_users() -> None:
    """`install -d` gives only the directories that it is told to whom -o names: those above them stay root's."""
    page = (ROOT / "docs" / "jetson.md").read_text()
    made = {path: user for user, paths in re.findall(r"sudo install -d -o (\S+) ([^&\n]*) &&", page) for path in paths.split()}
    assert made[ENVIRONMENT["WORKSPACE"]] == made[ENVIRONMENT["WORKSPACE"] + "/src"] == "$USER"
    assert Path(ENVIRONMENT["VENV"]).parent == Path(ENVIRONMENT["WORKSPACE"])  # where the steps make it
    assert made[str(Path(ENVIRONMENT["BUNDLE"]).parent)] == unit()["Service"]["User"]
    assert f"sudo cp -r bundle {Path(ENVIRONMENT['BUNDLE']).parent}/" in page


@pytest.mark.parametrize("page", ["docker/Dockerfile.l4t", "docs/jetson.md"])
def test_robots_get_the_packages_that_the_project_declares(page: str) -> None:
    """The project's own, with NumPy kept below 2 for apt's ROS messages, pybind11 for the native module, and what builds
    an engine: in the container beforehand, on the page in a step of its own."""
    declared = (ROOT / "pyproject.toml").read_text()
    project = re.search(r"^dependencies = \[(.*?)^\]", declared, re.DOTALL | re.MULTILINE)
    toolchain = re.search(r"^toolchain = \[(.*?)\]", declared, re.MULTILINE)
    assert toolchain is not None
    builds = {name for name in re.findall(r'"([^"]+)"', toolchain[1]) if name.startswith(("onnx", "ml_dtypes"))}
    assert project is not None
    needed = set(re.findall(r'^ +"([^"]+)"', project[1], re.MULTILINE)) | {"pybind11>=2.12"}
    needed = {f"{name},<2" if name.startswith("numpy") else name for name in needed}
    text = (ROOT / page).read_text()
    install = re.search(r"pip install(.*?)(?:\n\n|\n *```)", text, re.DOTALL)
    assert len(builds) == 2 and all(f'"{name}"' in text for name in builds)
    assert install is not None and set(re.findall(r'"([^"]+)"', install[1])) - builds == needed


def test_the_table_of_models_is_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("plan_table", ROOT / "tools" / "plan_table.py")
    assert spec is not None and spec.loader is not None
    plan_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plan_table)
    page = (ROOT / "docs" / "jetson.md").read_text()
    shown = page.split(plan_table.BEGIN)[1].split(plan_table.END)[0]
    assert shown == plan_table.table(), "renew it: python tools/plan_table.py"
    # the command that the page names, as a person runs it, prints the same figures
    words = re.search(r"`edgellm (plan --model MODEL [^`]*)`", page)
    assert words is not None
    capsys.readouterr()
    main(words[1].replace("MODEL", "qwen3-14b").split())
    printed = " ".join(capsys.readouterr().out.split())
    cells = next(line for line in shown.splitlines() if line.startswith("| qwen3-14b ")).split(" | ")[1:]
    assert cells[1] in printed and cells[3] in printed and printed.count("does not fit") == 1
    assert re.sub(r" \((\d+)\).*", r" (bound \1)", cells[5]) in printed


def test_every_test_that_verified_md_names_is_there_and_every_row_has_a_state() -> None:
    text = (ROOT / "docs" / "verified.md").read_text()
    for path in re.findall(r"(?:test|bench|tools|config|docker)/[\w/]+\.(?:py|sh|service|l4t)", text):
        assert (ROOT / path).is_file(), path
    tables = re.findall(r"^\|[^|\n]*\| state \|.*\n\|[-|]*\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [line.split(" | ") for table in tables for line in table.splitlines()]
    words = r"executed|compiled|built|stand-in|not tried|not written|not finished|checked|linted|arithmetic|shapes"
    assert len(rows) > 40 and all(len(row) == 3 and re.search(words, row[1]) for row in rows)
