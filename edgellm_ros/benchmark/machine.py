"""Which machine and which versions a figure belongs to: without them it means nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from edgellm_ros import __version__, native
from edgellm_ros.memory import free_device_memory, meminfo, physical_cores

_PACKAGES = ("numpy", "onnxruntime", "tokenizers")


def describe_machine(gpu: bool = True) -> dict[str, Any]:
    """CPU, cores, memory, load and, with `gpu` and where the native module sees one, the GPU and its driver."""
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": cpu_name(_read("/proc/cpuinfo")),
        "physical_cores": physical_cores(),
        "logical_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": meminfo(_read("/proc/meminfo")).get("MemTotal", 0),
        "load_average": round(os.getloadavg()[0], 2),  # programs that wanted to run, last minute; before measuring
        "gpu": _gpu() if gpu else None,
    }


def cpu_name(cpuinfo: str) -> str:
    """The processor's name in the text of /proc/cpuinfo; boards without one there name themselves elsewhere."""
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    board = _read("/proc/device-tree/model").strip("\0\n ")
    return name.group(1).strip() if name else board or platform.processor() or platform.machine()


def driver_version(text: str) -> str:
    """The NVIDIA driver's version in the text of /proc/driver/nvidia/version; empty where there is none.

    The open kernel modules, which a Jetson has, name the architecture before it: "Kernel Module for x86_64  565.57.01".
    """
    match = re.search(r"Kernel Module(?:\s+for\s+\S+)?\s+(\d[\d.]*)", text)
    return match.group(1) if match else ""


def describe_versions() -> dict[str, str]:
    """Versions of the package, of Python and of the libraries that compute."""
    found = {"edgellm_ros": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a system package, or built from source without metadata
            continue
    return found


def resident_bytes() -> tuple[int, int]:
    """(resident now, most ever) of this process."""
    status = dict(line.split(":", 1) for line in _read("/proc/self/status").splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024


def free_device_bytes() -> int | None:
    """Free memory of the current GPU; None where there is none that can be used."""
    return None if native.unavailable_reason() else free_device_memory(native.load().device_info())


def _gpu() -> dict[str, Any] | None:
    if native.unavailable_reason():
        return None
    info = native.load().device_info()
    return {
        "name": info["name"],
        "compute_capability": ".".join(map(str, info["compute_capability"])),
        "num_sms": info["num_sms"],
        "memory_bytes": info["total_bytes"],
        "driver": driver_version(_read("/proc/driver/nvidia/version")),
        "driver_cuda_version": info["driver_cuda_version"],
        "runtime_cuda_version": info["runtime_cuda_version"],
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
