"""What every module that starts nodes does first: ask for ROS 2, and take a DDS domain that no other test run has."""

from __future__ import annotations

import importlib.util
import os


def missing_ros() -> str:
    """Why nodes cannot run here; empty when they can."""
    if importlib.util.find_spec("rclpy") is None:
        return "rclpy is not installed; `make test` installs it where no ROS 2 is sourced"
    if importlib.util.find_spec("edgellm_ros.action") is None:
        return "the ROS interfaces are not built; `make test` builds them"
    return ""


def use_own_domain() -> None:
    """Set what DDS reads when a node is made, for this process and those that it starts: this machine alone."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")  # two of one run never share a domain
    os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 50 * 2 + int(worker) % 2)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    if os.environ.get("ROS_DISTRO") == "humble":
        os.environ["ROS_LOCALHOST_ONLY"] = "1"
