"""`edgellm tune` on the GPU: any tile keeps exact decoding exact, and a tuned bundle answers as well as before."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kernel_case import K
from test_executor_contract import prompt, step

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors import cuda_tiles
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.cuda_tiles import PRODUCTS

USED = "decode products as `edgellm tune` found them fastest"


def sums_differ(kind: str, weights: str, executor: CudaExecutor) -> bool:
    """Whether the order of a logit's sum differs among the tiles of the head, so that some bits must.

    A row of gpu_wide's head is cut for 8 or 16 warps (fp16), or for one or two (int8, which int4's head is, too); rows
    of 256 features are summed alike by all. Blocks that have no room for 16 warps leave fp16 with one order only.
    """
    small = K.plan_gemv(native.load().WeightFormat.bf16, 320, 1024, batch_invariant=True, max_shared_bytes=99 << 10)
    return kind == "gpu_wide" and (weights != "fp16" or executor.decoder.num_tiles("head", 1) > small["num_tiles"])


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["gpu_qwen2", "gpu_qwen3", "gpu_wide"])
def test_with_any_tile_a_sequence_gets_the_same_bits_alone_and_among_others(
    kind: str, weights: str, open_cuda: Callable[..., CudaExecutor]
) -> None:
    executor = open_cuda(kind, weights, max_slots=8)
    tokens, draft = prompt(8), prompt(5)
    for slot in range(8):
        executor.step([step(slot, prompt(20 + slot), 0)])

    def decode(*slots: int) -> np.ndarray:
        return executor.step([step(slot, tokens[slot : slot + 1], 20 + slot) for slot in slots]).copy()

    first = decode(3)
    seen = set()
    most = max(executor.decoder.num_tiles(product, 1) for product in PRODUCTS)
    for tile in range(most):
        for product in PRODUCTS:
            count = executor.decoder.num_tiles(product, 1)
            assert count == executor.decoder.num_tiles(product, 8)
            executor.decoder.set_tile(product, 1, min(tile, count - 1))
        alone = decode(3)
        seen.add(alone.tobytes())
        assert np.abs(alone - first).max() < 0.05 * np.abs(first).max()
        for others in ([3, 5], [0, 1, 2, 3, 4], list(range(8))):
            assert np.array_equal(decode(*others)[others.index(3)], alone[0]), (tile, others)
        chain = executor.step([step(3, draft, 23, 5)]).copy()
        assert np.array_equal(chain[0], executor.step([step(3, draft[:1], 23)])[0]), tile
    assert len(seen) > 1 or not sums_differ(kind, weights, executor), "every tile computed the same bits"
    for product in PRODUCTS:
        executor.decoder.set_tile(product, 1, -1)
    assert np.array_equal(decode(3), first)


@pytest.mark.parametrize("arguments", [[], ["--max-slots", "1"], ["--decode-batching", "fast", "--batch", "1", "3"]])
def test_a_tuned_bundle_loads_with_its_tiles_and_agrees_with_the_built_in_ones(
    arguments: list[str], gpu_bundle: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, logger=cuda_tiles.__name__)
    shutil.copytree(gpu_bundle("gpu_qwen3", "int4").path, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    fast = "fast" in arguments
    config = EngineConfig(
        executor="cuda", max_slots=1 if "1" in arguments and not fast else 4, max_context=128,
        decode_batching="fast" if fast else "exact",
    )  # fmt: skip
    ids, token = prompt(30), prompt(1)
    before = CudaExecutor(bundle, config).step([step(0, ids, 0)]).copy()
    assert main(["tune", str(bundle.path), "--tokens", "40", "--json", "--max-context", "128", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [result["batch"] for result in found["batches"]] == ([1, 3] if fast else [1])
    choices = [c for result in found["batches"] for c in result["choices"]]
    assert {c["product"] for c in choices} == set(PRODUCTS) and all(c["count"] > 0 for c in choices)
    assert USED not in caplog.text, "there was no file"
    executor = CudaExecutor(bundle, config)
    assert f"{USED} ({found['file']})" in caplog.messages
    after = executor.step([step(0, ids, 0)]).copy()
    if arguments:  # a prompt's products are what was fastest at load
        assert np.abs(after - before).max() < 0.03 * np.abs(before).max()
    else:  # or those of any number of tokens; and the head's exact tiles sum rows as short as these alike
        assert np.array_equal(after, before)
    # Whatever was chosen: another valid tile for a product must be taken over from the file, too.
    path = Path(found["file"])
    changed = json.loads(path.read_text())
    mode, products = next(iter(changed["choices"].items()))
    for batches in products.values():
        for batch, (_, count) in batches.items():
            batches[batch] = [count - 1, count]
    path.write_text(json.dumps(changed))
    caplog.clear()
    other = CudaExecutor(bundle, config)
    assert f"{USED} ({path})" in caplog.messages
    other.step([step(0, ids, 0)])
    executor.step([step(0, ids, 0)])
    one, two = (e.step([step(0, token, 30)]).copy() for e in (executor, other))
    assert np.abs(one - two).max() < 0.03 * np.abs(one).max(), mode
    assert main(["tune", str(bundle.path), "--forget"]) == 0 and not path.exists()


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("max_slots", [4, 1])  # the tiles that keep batches exact, and those of a sequence alone
def test_what_a_file_names_are_the_tiles_that_a_bundle_decodes_with(
    max_slots: int, weights: str, gpu_bundle: Callable[..., Bundle], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=cuda_tiles.__name__)
    bundle = Bundle.open(shutil.copytree(gpu_bundle("gpu_wide", weights).path, tmp_path / "bundle"))
    config = EngineConfig(executor="cuda", max_slots=max_slots, max_context=128)
    ids = prompt(6)

    def decoded(executor: CudaExecutor) -> np.ndarray:
        """One by one from the first on: no prompt, whose products another load may choose differently."""
        return np.concatenate([executor.step([step(0, ids[i : i + 1], i)]).copy() for i in range(len(ids))])

    plain = CudaExecutor(bundle, config)
    assert USED not in caplog.text
    counts = {product: plain.decoder.num_tiles(product, 1) for product in PRODUCTS}
    tiles_of = [{product: min(i, count - 1) for product, count in counts.items()} for i in range(counts["head"])]
    rows = []
    for tiles in tiles_of:
        for product, tile in tiles.items():
            plain.decoder.set_tile(product, 1, tile)
        rows.append(decoded(plain))
    different = [i for i in range(len(rows)) if not np.array_equal(rows[i], rows[0])]
    assert different, "every tile computed the same bits"
    mode = cuda_tiles.mode_of(plain.batch_invariant)
    key = cuda_tiles.ANY_BATCH if plain.batch_invariant else 1
    plain.close()
    info = native.load().device_info()
    for chosen in (0, different[0], different[-1]):
        kept = cuda_tiles.Tiles(cuda_tiles.gpu_of(info), cuda_tiles.weights_hash(bundle), info["tiles_version"])
        for product, tile in tiles_of[chosen].items():
            kept.set(mode, product, key, tile, counts[product])
        path = cuda_tiles.write_tiles(bundle, info, kept)
        caplog.clear()
        loaded = CudaExecutor(bundle, config)
        assert f"{USED} ({path})" in caplog.messages
        assert np.array_equal(decoded(loaded), rows[chosen]), chosen
        loaded.close()
