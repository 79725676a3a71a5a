"""Draws a report: tokens/s against context, a line for each executor, batch size and path."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from edgellm_ros.benchmark.report import busy_line, machine_line, model_line
from edgellm_ros.errors import ConfigError

SUFFIXES = (".svg", ".png")
_COLORS = ("#0b6e99", "#c8553d", "#4f772d", "#7b4b94", "#b8860b", "#444444")  # told apart in grey as well
_PATHS = {"executor": ("-", "o", "executor alone"), "engine": ("--", "s", "through the engine, sampled and streamed")}


def check_plot(path: Path) -> None:
    """Raise ConfigError for what would fail after minutes of measuring: the kind of file, the library."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path}: the name must end in {' or '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed; pip install 'edgellm_ros[bench]'")


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Write an SVG or PNG, by the name's end. Error bars span the rounds."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    style = {
        "font.family": "sans-serif", "font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "edgellm",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
        "axes.labelcolor": "#222222", "xtick.color": "#444444", "ytick.color": "#444444",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.0, 4.8), facecolor="white", layout="constrained")
        axes = figure.add_subplot(facecolor="white")
        contexts = sorted({row["context"] for run in report["runs"] for row in run["decode"]})
        names = {run["executor"] for run in report["runs"]}
        for index, run in enumerate(report["runs"]):
            color = _COLORS[index % len(_COLORS)]
            of = "" if len(names) == 1 else f"{run['executor']}, "
            batch = "" if len(report["runs"]) == len(names) and run["batch"] == 1 else f"batch {run['batch']}, "
            for path_name, (line, marker, words) in _PATHS.items():
                rows = [row for row in run["decode"] if row[path_name]]
                if not rows:
                    continue
                x = [row["context"] for row in rows]
                y = [row[path_name]["tokens_per_s"] for row in rows]
                bars = axes.errorbar(
                    x, y, yerr=_error_bars(rows, path_name), color=color, linestyle=line, marker=marker, markersize=5,
                    linewidth=1.8, elinewidth=1.0, capsize=2.5, label=f"{of}{batch}{words}",
                    markerfacecolor=color if path_name == "executor" else "white",
                )  # fmt: skip
                bars.lines[0].set_gid(f"line-{run['executor']}-{run['batch']}-{path_name}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, labels=[f"{context:,}" for context in contexts])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("context (tokens in the KV cache before decoding)")
        axes.set_ylabel("decode speed (tokens/s, median)")
        axes.set_title(f"{model_line(report)}\n", loc="left", fontsize=11, fontweight="bold", color="#222222")
        axes.text(0.0, 1.025, machine_line(report), transform=axes.transAxes, fontsize=9, color="#555555")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="lower left", fontsize=9)
        settings = report["settings"]
        note = (
            f"{report['date'][:10]}, edgellm_ros {report['versions']['edgellm_ros']}; {settings['new_tokens']} tokens, "
            f"median and range of {settings['rounds']} rounds"
        )
        if busy_line(report):
            note += f"; on a busy machine (load average {report['machine']['load_average']})"
        figure.supxlabel(note, fontsize=8, color="#777777", x=0.01, ha="left")
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)


def _error_bars(rows: list[dict[str, Any]], path: str) -> tuple[list[float], list[float]]:
    """Below and above the median, in tokens/s: the longest time is the slowest round."""
    below, above = [], []
    for row in rows:
        speed, times = row[path]["tokens_per_s"], row[path]["ms_per_token"]
        below.append(speed - speed * times["median"] / times["max"])
        above.append(speed * times["median"] / times["min"] - speed)
    return below, above
