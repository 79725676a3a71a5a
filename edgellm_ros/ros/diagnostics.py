"""What /diagnostics says of a node: its state, queue, speed, memory and last error, once a second."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from edgellm_ros.executors.base import ExecutorInfo
from edgellm_ros.runtime.metrics import MetricsSnapshot


def diagnostic_array(
    stamp: Any,
    node_name: str,
    state: str,
    last_error: str,
    last_error_is_fatal: bool,
    model: str = "",
    info: ExecutorInfo | None = None,
    metrics: MetricsSnapshot | None = None,
) -> DiagnosticArray:
    """One message with one status. ERROR: the node cannot serve; WARN: it is not active."""
    values: dict[str, object] = {"state": state}
    if info is not None:
        values |= {"model": model, "executor": info.name, "device": info.device, "precision": info.precision}
        values |= {"planned memory (MB)": f"{info.memory_bytes / 1e6:.0f}"}
    if metrics is not None:
        first = metrics.stages["time_to_first_token"]
        values |= {
            "active requests": metrics.active,
            "waiting requests": metrics.waiting,
            "accepted requests": metrics.submitted,
            "rejected requests (queue full)": metrics.rejected,
            "decode (tokens/s)": f"{metrics.decode_tokens_per_s:.1f}",
            "prefill (tokens/s)": f"{metrics.prefill_tokens_per_s:.1f}",
            "time to first token p50 (ms)": f"{first.p50 * 1e3:.1f}",
            "time to first token p99 (ms)": f"{first.p99 * 1e3:.1f}",
        }
        values |= {f"finished: {reason.value}": count for reason, count in metrics.finished.items()}
    values |= {"resident memory (MB)": f"{resident_bytes() / 1e6:.0f}", "last error": last_error}
    if last_error_is_fatal:
        level, message = DiagnosticStatus.ERROR, last_error
    elif state != "active":
        level, message = DiagnosticStatus.WARN, f"not serving: {state}"
    else:
        level, message = DiagnosticStatus.OK, "serving"
    pairs = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
    status = DiagnosticStatus(
        level=level, name=f"{node_name}: language model", message=message, hardware_id=info.device if info else "",
        values=pairs,
    )  # fmt: skip
    array = DiagnosticArray(status=[status])
    array.header.stamp = stamp
    return array


def resident_bytes() -> int:
    """Resident memory of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
