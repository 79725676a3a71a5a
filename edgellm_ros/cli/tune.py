"""`edgellm tune`: find the fastest kernels for a bundle on this machine's GPU, once, and keep the choice beside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_ros.cli.options import add_settings, settings_from, was_given
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import ConfigError

if TYPE_CHECKING:
    from edgellm_ros.benchmark.tuning import Choice
    from edgellm_ros.bundle import Bundle
    from edgellm_ros.executors.cuda import CudaExecutor

HELP = "find the fastest decode kernels for a bundle on the GPU that is here, and keep the choice"
EXAMPLES = """\
examples:
  edgellm tune smollm2                                     as it will be served: 4 slots, exact
  edgellm tune smollm2 --max-slots 1                       for one conversation at a time
  edgellm tune smollm2 --decode-batching fast --batch 1 2 4
  edgellm tune smollm2 --forget                            back to the built-in choices

Every matrix product of decoding has several kernels, whose built-in order was measured on large GPUs. This times them
all in whole decode steps and writes the best to BUNDLE/tiles/GPU.json, which the cuda executor reads at every load.
Give the settings that the node will have: exact and fast batching have choices of their own. Answers stay as good; the
order of some sums changes, so that single tokens can differ from those before. Run it with nothing else on the GPU.
"""
_USED = ("max_slots", "max_context", "kv_cache", "decode_batching")
_ROOM = 64  # tokens that the timed steps write


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that `edgellm export` wrote")
    parser.add_argument(
        "--batch", type=int, nargs="+", metavar="N",
        help="sequences decoded together, with --decode-batching fast (default 1); exact has one choice for all",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, metavar="N",
        help="tokens in the KV cache while timing (default 512, or what a shorter slot holds)",
    )  # fmt: skip
    parser.add_argument("--forget", action="store_true", help="remove the choices for this GPU instead")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    skipped = [name for name in EngineConfig.__dataclass_fields__ if name not in _USED]
    add_settings(parser, EngineConfig, "engine", skip=skipped)


def execute(args: argparse.Namespace) -> int:
    """Time, keep and show the choices."""
    from edgellm_ros import native
    from edgellm_ros.bundle import Bundle
    from edgellm_ros.executors.cuda_tiles import check_writable, tiles_file

    config = settings_from(args, EngineConfig(executor="cuda"))
    batches = _batches(args, config)
    bundle = Bundle.open(args.bundle, verify=False)  # loading verifies it
    if args.forget:
        file = tiles_file(bundle, native.load().device_info())
        existed = file.exists()
        file.unlink(missing_ok=True)
        print(f"removed {file}" if existed else f"there was no {file}")
        return 0
    tokens = _tokens(bundle, config, args.tokens)
    native.load()
    check_writable(bundle)
    found, path = _tune(bundle, config, batches, tokens)
    if args.json:
        print(json.dumps({"file": str(path), "batches": found}, indent=1))
    else:
        _print(found, path)
    return 0


def _batches(args: argparse.Namespace, config: EngineConfig) -> list[int]:
    from edgellm_ros.executors.cuda_tiles import MAX_BATCH

    exact = config.decode_batching == "exact" and config.max_slots > 1
    if exact and args.batch is not None:
        raise ConfigError(
            "--batch goes with --decode-batching fast or --max-slots 1: in exact mode every batch has one choice"
        )
    batches = sorted(set(args.batch or [1]))
    most = MAX_BATCH if not was_given(args, EngineConfig, "max_slots") else min(MAX_BATCH, config.max_slots)
    for batch in batches:
        if not 1 <= batch <= most:
            raise ConfigError(f"--batch {batch}: allowed is 1 to {most}, the sequences that decode together")
    if args.tokens is not None and not 1 <= args.tokens <= 2**20:
        raise ConfigError(f"--tokens {args.tokens}: allowed is 1 to {2**20}")
    return batches


def _tokens(bundle: Bundle, config: EngineConfig, asked: int | None) -> int:
    """How many are in the cache while timing."""
    from edgellm_ros.executors.cuda import DEFAULT_CONTEXT

    model_limit = bundle.manifest.model.max_context
    limit = config.max_context or min(model_limit, DEFAULT_CONTEXT)
    tokens = max(1, min(512, limit - _ROOM)) if asked is None else asked
    if tokens + _ROOM > limit:
        longer = f" or give --max-context, up to {model_limit}" if limit < model_limit else ""
        raise ConfigError(
            f"--tokens {tokens} and {_ROOM} more do not fit the {limit} tokens of a slot; lower it{longer}"
        )
    return tokens


def _tune(bundle: Any, config: EngineConfig, batches: list[int], tokens: int) -> tuple[list[dict[str, Any]], Path]:
    from edgellm_ros.benchmark.tuning import tune
    from edgellm_ros.cli.progress import shown_progress
    from edgellm_ros.executors import cuda_tiles
    from edgellm_ros.executors.cuda import CudaExecutor

    slots = max(config.max_slots, batches[-1])
    executor = CudaExecutor(bundle, dataclasses.replace(config, max_slots=slots))
    try:
        decoder, exact = executor.decoder, executor.batch_invariant
        _fill(executor, batches[-1], tokens)
        info = executor.device_info
        tiles = cuda_tiles.read_tiles(bundle, info) or cuda_tiles.Tiles(
            cuda_tiles.gpu_of(info), cuda_tiles.weights_hash(bundle), info["tiles_version"]
        )
        for batch in batches:  # from the built-in choices, whatever was kept before
            for product in cuda_tiles.PRODUCTS:
                decoder.set_tile(product, batch, -1)
        found = []
        with shown_progress() as progress:
            for batch in batches:
                before = _step_ms(decoder, batch, tokens)
                choices = tune(decoder, batch, tokens, progress)
                after = _step_ms(decoder, batch, tokens)
                found.append(_result(batch, before, after, choices))
                for choice in choices:
                    key = cuda_tiles.ANY_BATCH if exact else batch
                    tiles.set(cuda_tiles.mode_of(exact), choice.product, key, choice.tile, choice.count)
        return found, cuda_tiles.write_tiles(bundle, info, tiles)
    finally:
        executor.close()


def _fill(executor: CudaExecutor, batch: int, tokens: int) -> None:
    import numpy as np

    from edgellm_ros.executors import SequenceStep

    ids = np.random.default_rng(1).integers(0, executor.info.vocab_size, tokens).astype(np.int32)
    for slot in range(batch):
        executor.step([SequenceStep(slot, ids, 0)])


def _step_ms(decoder: Any, batch: int, tokens: int) -> float:
    at = (list(range(batch)), [tokens] * batch, [7] * batch)
    decoder.time_run(*at, 4)
    ms: float = statistics.median(decoder.time_run(*at, 48))
    return ms


def _result(batch: int, before: float, after: float, choices: list[Choice]) -> dict[str, Any]:
    return {
        "batch": batch, "ms_before": before, "ms_after": after, "choices": [dataclasses.asdict(c) for c in choices]
    }  # fmt: skip


def _print(found: list[dict[str, Any]], path: Path) -> None:
    for result in found:
        gain = 1 - result["ms_after"] / result["ms_before"]
        print(
            f"batch {result['batch']}: a step takes {result['ms_after']:.3f} ms instead of "
            f"{result['ms_before']:.3f} ({gain:+.1%})"
        )
        for choice in result["choices"]:
            which = "built-in choice" if choice["tile"] < 0 else f"tile {choice['tile']} of {choice['count']}"
            print(f"  {choice['product']:12} {which}")
    print(f"kept in {path}; every load reads it")
