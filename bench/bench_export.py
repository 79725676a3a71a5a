"""What an export takes: seconds, processor seconds and peak memory, for a random checkpoint of a published shape.

    python3 bench/bench_export.py --shape llama-1b --weights int4 --keep /var/tmp/llama-1b

The checkpoint (bfloat16, one safetensors file) is written first, to a directory that is removed unless --keep names it.
The export then runs as a process of its own. Peak memory is the process's largest resident size; the share of it that
is the mapped checkpoint (pages that the kernel takes back when memory is short) is not told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from edgellm_ros.benchmark.random_bundle import SHAPES, RandomBundle
from edgellm_ros.bundle import TOKENIZER, ModelSpec
from edgellm_ros.toolchain.families import family_of

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def write_checkpoint(shape: str, path: Path) -> int:
    """A Hugging Face directory of `shape`; returns the bytes of its weights."""
    model = SHAPES[shape]
    path.mkdir(parents=True, exist_ok=True)
    config = _config(model)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(RandomBundle(shape, "int4").read_text(TOKENIZER))
    tensors = family_of(model).expected_tensors(model, config)
    header, offset = {}, 0
    for name, dims in tensors.items():
        size = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dims in tensors.values():
            values = 1 + 0.1 * rng.standard_normal(dims, np.float32)
            if len(dims) == 2:
                values = rng.standard_normal(dims, np.float32) * np.float32(dims[1] ** -0.5)
            file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
    return offset


def _config(model: ModelSpec) -> dict[str, object]:
    return {
        "model_type": model.family, "architectures": [ARCHITECTURES[model.family]], "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size, "num_hidden_layers": model.num_layers, "head_dim": model.head_dim,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size, "max_position_embeddings": model.max_context, "rope_theta": model.rope_theta,
        "rms_norm_eps": model.rms_norm_eps, "tie_word_embeddings": model.tied_head, "eos_token_id": 0,
    }  # fmt: skip


def main() -> None:
    """Write, export, print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--weights", choices=("int4", "int8", "fp16", "fp32"), default="int4")
    parser.add_argument("--keep", type=Path, help="directory for the checkpoint, reused when it is there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.keep.parent if args.keep else None) as scratch:
        source = args.keep or Path(scratch) / "checkpoint"
        weights = source / "model.safetensors"
        size = weights.stat().st_size if weights.exists() else write_checkpoint(args.shape, source)
        command = [sys.executable, "-m", "edgellm_ros.cli.main", "export", str(source), "--weights", args.weights]
        started, load = time.monotonic(), os.getloadavg()[0]
        subprocess.run([*command, "-o", f"{scratch}/bundle"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        peak = used.ru_maxrss * 1024
        stored = sum(path.stat().st_size for path in Path(scratch, "bundle").iterdir())
    print(f"{args.shape} {args.weights}: {seconds:.1f} s ({used.ru_utime:.1f} s user + {used.ru_stime:.1f} s system, "
          f"{len(os.sched_getaffinity(0))} cores, load {load:.1f} before), peak {peak / 1e6:.0f} MB, "
          f"{peak / size:.2f} x the checkpoint's {size / 1e6:.0f} MB, bundle {stored / 1e6:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
