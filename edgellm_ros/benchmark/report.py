"""The report of a benchmark: one dictionary with everything that a figure needs to mean something, and its tables."""

from __future__ import annotations

import dataclasses
import datetime
from typing import TYPE_CHECKING, Any

from edgellm_ros.benchmark.costs import num_parameters
from edgellm_ros.benchmark.figures import SCHEMA, SCHEMA_VERSION
from edgellm_ros.benchmark.machine import describe_machine, describe_versions

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from edgellm_ros.benchmark.measure import Plan
    from edgellm_ros.bundle import Bundle

_BAR_WIDTH = 16
_WIDE = 90  # columns from which on bars fit beside the numbers


def begin_report(command: str, bundle: Bundle, plan: Plan) -> dict[str, Any]:
    """The report before anything is measured: `runs` is empty and `complete` is false.

    The names and units of all fields are those of `figures.py`.
    """
    model, quant = bundle.manifest.model, bundle.manifest.quantization
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "complete": False,
        "stopped_by": "",  # where it is not complete: Ctrl-C, or an error's text
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(gpu=any(name != "onnxruntime" for name in plan.executors)),
        "versions": describe_versions(),
        "model": {
            "name": model.name,
            "family": model.family,
            "bundle": bundle.path.name,
            "num_parameters": num_parameters(model),
            **dataclasses.asdict(quant),
        },
        "settings": {
            "executors": list(plan.executors),
            "prompt_tokens": list(plan.prompt_tokens),
            "contexts": list(plan.contexts),
            "batches": list(plan.batches),
            "new_tokens": plan.new_tokens,
            "rounds": plan.rounds,
            "engine": {
                name: value
                for name, value in dataclasses.asdict(plan.config).items()
                if name not in ("executor", "max_slots", "max_queue", "max_context")  # each run's own say that
            },
            "sampling": {"temperature": plan.sampling.temperature, "top_k": plan.sampling.top_k,
                         "top_p": plan.sampling.top_p, "min_p": plan.sampling.min_p},
        },
        "runs": [],
    }  # fmt: skip


def machine_line(report: dict[str, Any]) -> str:
    """Which machine, in one line."""
    machine = report["machine"]
    cores = machine["physical_cores"]
    parts = [f"{machine['cpu']}, {cores} core{'s' if cores != 1 else ''}"]
    if gpu := machine["gpu"]:
        driver = gpu["driver"] or f"for CUDA {gpu['driver_cuda_version']}"
        parts.insert(0, f"{gpu['name']}, compute capability {gpu['compute_capability']}, driver {driver}")
    return "; ".join(parts)


def model_line(report: dict[str, Any]) -> str:
    """Which model and weights, in one line."""
    model = report["model"]
    groups = f" in groups of {model['group_size']}" if model["group_size"] else ""
    head = f", head {model['lm_head']}" if model["lm_head"] not in ("", model["weights"]) else ""
    return f"{model['name']}, {model['num_parameters'] / 1e6:,.0f} M weights, {model['weights']}{groups}{head}"


def busy_line(report: dict[str, Any]) -> str:
    """A warning when other programs were running; empty on a quiet machine."""
    machine = report["machine"]
    if machine["load_average"] < 0.25 * machine["logical_cores"]:
        return ""
    return (
        f"the machine was busy when this began (load average {machine['load_average']} on "
        f"{machine['logical_cores']} logical cores): figures may be too low; repeat this when it is quiet"
    )


def print_report(report: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    from rich.markup import escape

    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    for line in (model_line(report), machine_line(report), versions, f"{report['date']}  $ {report['command']}"):
        console.print(escape(line), style="dim" if line == versions else None, soft_wrap=True)
    if busy := busy_line(report):
        console.print(escape(busy), style="yellow", soft_wrap=True)
    for run in report["runs"]:
        _print_run(run, report, console)
    if not report["complete"]:
        by = "interrupted" if report["stopped_by"] == "Ctrl-C" else "stopped by an error"
        console.print(f"{by}: this is what was measured so far", style="yellow")


def _print_run(run: dict[str, Any], report: dict[str, Any], console: Console) -> None:
    read, memory = run["read_bandwidth"], run["memory"]
    first = report["runs"][0]
    compared = first["executor"] if run["executor"] != first["executor"] else ""
    ratios = f"; ratios are tokens/s to {compared}'s" if compared else ""
    console.print(
        f"\n[bold]{run['executor']}[/bold] on {run['device']}; {run['precision']}; batch {run['batch']}{ratios}",
        soft_wrap=True,
    )
    parts = [f"loaded in {run['load_s']:.2f} s", f"planned {memory['planned_bytes'] / 1e6:,.0f} MB"]
    if memory["resident_bytes"]:
        parts.append(f"resident {memory['resident_bytes'] / 1e6:,.0f} MB")
    if memory["device_bytes"] is not None:
        parts.append(f"taken on the GPU {memory['device_bytes'] / 1e6:,.0f} MB")
    console.print(", ".join(parts))
    if planned := memory["planned_parts"]:
        sizes = (f"{name.replace('_', ' ')} {size / 1e6:,.0f} MB" for name, size in planned.items())
        console.print(f"planned for {', '.join(sizes)}", soft_wrap=True)
    if read:
        console.print(f"reads {read['gb_per_s']:.1f} GB/s ({read['method']})")
    if any(row["executor"] or row["engine"] for row in run["prefill"]):
        console.print(_prefill_table(run, compared, report["runs"], console.width >= _WIDE))
    if any(row["executor"] or row["engine"] for row in run["decode"]):
        console.print(_decode_table(run, compared, report["runs"], console.width >= _WIDE))
    if run["ratios"]:
        console.print(ratios_line(run["ratios"]), soft_wrap=True)


def ratios_line(ratios: dict[str, Any]) -> str:
    """What graphs and drawing on the device save, in one line."""
    graph, device = (ratios[name]["median"] for name in ("graph_ms", "drawn_on_device_ms"))
    return (
        f"after {ratios['context']} tokens: plain launches take {ratios['plain_launches_over_graph']:.2f} x a graph's "
        f"{graph:.3f} ms a step; drawing tokens on the host takes {ratios['host_over_device']:.2f} x the "
        f"{device:.3f} ms of drawing them on the device"
    )


def _prefill_table(run: dict[str, Any], compared: str, runs: list[dict[str, Any]], bars: bool) -> Table:
    table = _table("prefill", ("tokens", "", "tokens/s", "ms/token", "ms (range)", "TFLOP/s"), compared, bars)
    fastest = max(p["tokens_per_s"] for row in run["prefill"] for p in (row["executor"], row["engine"]) if p)
    for row in run["prefill"]:
        for path, ms in (("executor", "ms"), ("engine", "time_to_first_token_ms")):
            found = row[path]
            if found is None:
                continue
            peer = _peer(runs, compared, "prefill", path, {"prompt_tokens": row["prompt_tokens"]})
            table.add_row(
                str(row["prompt_tokens"]),
                "executor" if path == "executor" else "first token",
                f"{found['tokens_per_s']:,.1f}",
                f"{found[ms]['median'] / row['prompt_tokens']:.3f}",
                _range(found[ms]),
                f"{found['tflop_per_s']:.2f}" if path == "executor" else "",
                *_ratio(found, peer, compared),
                *_bar(found["tokens_per_s"], fastest, bars),
            )
        table.add_section()
    return table


def _decode_table(run: dict[str, Any], compared: str, runs: list[dict[str, Any]], bars: bool) -> Table:
    table = _table("decode", ("context", "", "tokens/s", "ms/token (range)", "GB/s", "of read"), compared, bars)
    fastest = max(p["tokens_per_s"] for row in run["decode"] for p in (row["executor"], row["engine"]) if p)
    for row in run["decode"]:
        for path in ("executor", "engine"):
            found = row[path]
            if found is None:
                continue
            peer = _peer(runs, compared, "decode", path, {"batch": row["batch"], "context": row["context"]})
            share = found["read_share"]
            table.add_row(
                str(row["context"]),
                path,
                f"{found['tokens_per_s']:,.1f}",
                _range(found["ms_per_token"]),
                f"{found['gb_per_s']:,.1f}",
                "" if share is None else f"{share:.0%}",
                *_ratio(found, peer, compared),
                *_bar(found["tokens_per_s"], fastest, bars),
            )
        table.add_section()
    costs = [f"{r['engine_over_executor']:.2f}" for r in run["decode"] if r["engine_over_executor"] is not None]
    if costs:
        table.caption = f"engine's ms/token (sampling, text, streaming) over the executor's: {', '.join(costs)}"
    return table


def _table(title: str, columns: tuple[str, ...], compared: str, bars: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (*columns, *(("ratio",) if compared else ())):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    if bars:
        table.add_column("", no_wrap=True)
    return table


def _peer(runs: list[dict[str, Any]], executor: str, kind: str, path: str, key: dict[str, int]) -> dict[str, Any]:
    """The same figure of the executor that is compared with; empty where there is none."""
    for run in runs:
        for row in run[kind] if run["executor"] == executor else ():
            if row[path] and all(row[name] == value for name, value in key.items()):
                found: dict[str, Any] = row[path]
                return found
    return {}


def _ratio(found: dict[str, Any], peer: dict[str, Any], compared: str) -> tuple[str, ...]:
    if not compared:
        return ()
    return (f"{found['tokens_per_s'] / peer['tokens_per_s']:.2f}" if peer else "",)


def _range(spread: dict[str, Any]) -> str:
    digits = sum(spread["median"] < limit for limit in (1000, 100, 10))
    median, low, high = (f"{spread[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low}–{high})"


def _bar(value: float, most: float, bars: bool) -> tuple[Any, ...]:
    from rich.bar import Bar

    return (Bar(size=most, begin=0, end=value, width=_BAR_WIDTH, color="cyan"),) if bars else ()
