"""What `edgellm run` measured: the profile file and its summary on the terminal."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from edgellm_ros.llm import LLM


def build_profile(llm: LLM, wall_s: float) -> dict[str, Any]:
    """The profile of everything that `llm` did; `wall_s` is from the first submission to the last answer.

    Times are host times. The names are those of TensorRT-Edge-LLM where it has the same quantity.
    """
    metrics = llm.metrics()
    computed = metrics.prompt_tokens - metrics.cached_tokens
    runs = sum(metrics.finished.values())
    peak = peak_memory_bytes()
    return {
        "executor": {"name": llm.info.name, "device": llm.info.device, "precision": llm.info.precision},
        "load_time_ms": _ms(llm.load_s),
        "wall_time_ms": _ms(wall_s),
        "prefill": {
            "total_runs": runs,
            "reused_tokens": metrics.cached_tokens,
            "computed_tokens": computed,
            "average_tokens_per_run": _ratio(computed, runs),
            "average_time_per_run_ms": _ms(_ratio(metrics.prefill_s, runs)),
            "tokens_per_second": round(metrics.prefill_tokens_per_s, 2),
            "average_time_per_token_ms": _ms(_ratio(metrics.prefill_s, computed)),
        },
        "generation": {
            "total_runs": runs,
            "generated_tokens": metrics.completion_tokens,
            "average_tokens_per_run": _ratio(metrics.completion_tokens, runs),
            "tokens_per_second": round(metrics.decode_tokens_per_s, 2),
            "overall_tokens_per_second": round(_ratio(metrics.completion_tokens, wall_s), 2),
            "average_time_per_token_ms": _ms(_ratio(metrics.decode_s, metrics.completion_tokens)),
        },
        "stages": [
            {
                "stage_id": name,
                "total_runs": stage.count,
                "time_stats": {"p50_ms": _ms(stage.p50), "p95_ms": _ms(stage.p95), "p99_ms": _ms(stage.p99)},
            }
            for name, stage in metrics.stages.items()
            if stage.count
        ],
        "peak_cpu_memory_bytes": peak,
        "peak_cpu_memory_mb": round(peak / 2**20, 2),
    }


def profile_table(profile: dict[str, Any]) -> Table:
    """The profile for people."""
    from rich.table import Table

    prefill, generation = profile["prefill"], profile["generation"]
    table = Table(title=f"profile on {profile['executor']['device']}", title_justify="left")
    for column in ("stage", "runs", "p50 ms", "p95 ms", "p99 ms"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in profile["stages"]:
        times = stage["time_stats"]
        table.add_row(
            stage["stage_id"], str(stage["total_runs"]), *(f"{times[k]:.2f}" for k in ("p50_ms", "p95_ms", "p99_ms"))
        )
    table.caption = (
        f"prefill: {prefill['computed_tokens']} tokens, {prefill['reused_tokens']} reused, "
        f"{prefill['tokens_per_second']:.1f} tokens/s\n"
        f"decode: {generation['generated_tokens']} tokens, {generation['tokens_per_second']:.1f} tokens/s\n"
        f"peak memory {profile['peak_cpu_memory_mb']:.0f} MiB, loaded in {profile['load_time_ms']:.0f} ms"
    )
    return table


def peak_memory_bytes() -> int:
    """Largest resident memory of this process (getrusage counts KiB on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _ratio(value: float, count: float) -> float:
    return value / count if count else 0.0
