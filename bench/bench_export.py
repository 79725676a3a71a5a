"""What an export takes: seconds, processor seconds and peak memory, for a random checkpoint of a published shape.

    python3 bench/bench_export.py --shape llama-1b --forms bf16 awq gguf-q4_0 --keep /var/tmp/checkpoints

The checkpoint of each form (bench/random_checkpoints.py) is written first, to a directory that is removed unless --keep
names it. The export then runs as a process of its own. Peak memory is the process's largest resident size.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_or_exit import one_line, run_script

from edgellm_ros.benchmark.random_bundle import SHAPES
from edgellm_ros.errors import ToolchainError

with one_line():
    from random_checkpoints import ALL_FORMS, ARCHITECTURES

_WRITE = f"""
import sys; from pathlib import Path
sys.path[:0] = {sys.path[0]!r}, {str(Path(__file__).parent)!r}
from random_checkpoints import write_checkpoint; from edgellm_ros.benchmark.random_bundle import SHAPES
write_checkpoint(SHAPES[sys.argv[1]], sys.argv[2], Path(sys.argv[3]))
"""


def measure(shape: str, form: str, options: list[str], keep: Path | None) -> None:
    """Write, export, print a line."""
    with tempfile.TemporaryDirectory(dir=keep) as scratch:
        source = (keep or Path(scratch)) / f"{shape}-{form}{'.gguf' if form.startswith('gguf-') else ''}"
        if not source.exists():
            # In a process of its own: a program started from here inherits this one's peak as its own.
            subprocess.run([sys.executable, "-c", _WRITE, shape, form, str(source)], check=True)
        weights = source / "model.safetensors" if source.is_dir() else source
        size = weights.stat().st_size
        command = [sys.executable, "-m", "edgellm_ros.cli.main", "export", str(source), *options]
        started, load = time.monotonic(), os.getloadavg()[0]
        process = subprocess.Popen([*command, "-o", f"{scratch}/bundle"], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise ToolchainError(f"{form}: the export failed, and said why above")
        seconds = time.monotonic() - started
        peak = used.ru_maxrss * 1024
        stored = sum(path.stat().st_size for path in Path(scratch, "bundle").iterdir())
    what = " ".join([shape, form, *options])
    print(f"{what}: {seconds:.1f} s ({used.ru_utime:.1f} s user + {used.ru_stime:.1f} s system, "
          f"{len(os.sched_getaffinity(0))} cores, load {load:.1f} before), peak {peak / 1e6:.0f} MB, "
          f"{peak / size:.2f} x the checkpoint's {size / 1e6:.0f} MB, bundle {stored / 1e6:.0f} MB")  # fmt: skip
    sys.stdout.flush()


def main() -> None:
    """Measure each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    written = sorted(name for name, model in SHAPES.items() if model.family in ARCHITECTURES)
    parser.add_argument("--shape", choices=written, default="llama-1b")
    parser.add_argument("--forms", choices=ALL_FORMS, nargs="+", default=["bf16"], metavar="FORM",
                        help=", ".join(ALL_FORMS))  # fmt: skip
    parser.add_argument("--weights", help="as edgellm export's: int4, int8, fp16, fp32 or keep")
    parser.add_argument("--lm-head", help="as edgellm export's: fp16 or int8, for forms that are kept")
    parser.add_argument("--keep", type=Path, help="directory for the checkpoints, reused when they are there")
    args = parser.parse_args()
    options = ["--weights", args.weights] if args.weights else []
    options += ["--lm-head", args.lm_head] if args.lm_head else []
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    for form in args.forms:
        measure(args.shape, form, options, args.keep)


if __name__ == "__main__":
    run_script(main)
