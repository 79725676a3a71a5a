"""What this machine has: memory that can still be taken, and physical cores."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_CGROUP = Path("/sys/fs/cgroup")


def meminfo(text: str) -> dict[str, int]:
    """Bytes by name, of /proc/meminfo's text: MemTotal, MemAvailable, SwapFree and others."""
    return {name: int(count) * 1024 for name, count in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def available_memory() -> int:
    """Bytes that can be taken without swapping: the kernel's estimate, and no more than a container's own limit."""
    available = meminfo(Path("/proc/meminfo").read_text()).get("MemAvailable", 0)
    limit, used = _read_int(_CGROUP / "memory.max"), _read_int(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        available = min(available, max(limit - used + _droppable(), 0))
    return available


def free_device_memory(info: dict[str, Any]) -> int:
    """Bytes that a GPU can still give, of `_native.device_info()`.

    Where it has one memory with the CPU, as on a Jetson, CUDA counts as taken the files that Linux keeps in memory and
    drops when it is needed, a bundle that was just checked among them, and knows no container's limit. There it is what
    Linux calls available, as NVIDIA's "CUDA for Tegra" says (Estimating Total Allocatable Device Memory on an
    Integrated GPU Device).
    """
    return available_memory() if info["integrated"] else int(info["free_bytes"])


def physical_cores() -> int:
    """Physical cores that this process may run on: hyper-threads of one core share the units that a product needs."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            cores.add((str(cpu), ""))
    return max(len(cores), 1)


def _droppable() -> int:
    """Bytes of files that count as a container's own and can be dropped."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return None
