"""A process of its own whose executor gets requests of many kinds, each for the first time.

Prompts, steps, runs, drafts and prefixes, and all but the last with an adapter too; not asked for are logits of more than 16 of a
prompt's tokens, for which the host takes memory.

Its arguments: a bundle's directory or a random model's shape, its weights' format, EngineConfig's settings as JSON, how many
tokens the longest prompt has, and what to tell, as JSON. "memory": by how many bytes the GPU's free memory fell during each
kind of request and at most altogether, what was planned, and whether the module allocated anything after loading.
"kernels": by torch's profiler, which kernels ran that had not run while loading.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros import native
from edgellm_ros.benchmark.random_bundle import RandomBundle
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import SamplingParams
from edgellm_ros.executors import RunSequence, SequenceStep
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.lora import LoraTensors, make_adapter

RNG = np.random.default_rng(1)
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "everything": {
        "temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2,
        "logit_bias": {5: 2.0}, "logprobs": 5,
    },
}  # fmt: skip


def tokens(length: int) -> npt.NDArray[np.int32]:
    return RNG.integers(5, 300, length).astype(np.int32)


def run(executor: CudaExecutor, batch: int, params: dict[str, Any], adapter: int = 0) -> None:
    masked = "logprobs" in params
    one = SamplingParams(seed=3, **params)
    assert executor.run is not None
    executor.run.start([RunSequence(slot, 10, [7], tokens(10), one, 3, masked, adapter) for slot in range(batch)])
    if masked:  # a mask depends on the token before, so each step is read before the next
        for i in range(4):
            executor.run.set_mask(batch - 1, np.arange(executor.info.vocab_size) % 2 == i % 2)
            executor.run.launch()
            executor.run.read()
        return
    for i in range(5):  # as the engine does: one step behind
        if i < 4:
            executor.run.launch()
        if i > 0:
            executor.run.read()


def verify(executor: CudaExecutor, adapter: int = 0) -> None:
    for count in range(2, executor.max_tree_nodes + 1):
        executor.step([SequenceStep(0, tokens(count), 20, count, adapter)])
        executor.verify_tree(0, 20, tokens(count), np.array([-1] + [0] * (count - 1), np.int32), adapter)
        executor.accept_path(0, 20, [0, count - 1])


def move_prefixes(executor: CudaExecutor) -> None:
    last, length = executor.info.num_slots - 1, executor.info.capacity - 1
    executor.copy_prefix(0, last, length)
    executor.load_prefix(last, executor.save_prefix(0, length), length)


def load_adapter(executor: CudaExecutor, bundle: Bundle) -> int:
    model = bundle.manifest.model
    hidden, heads, kv = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes = {
        "q_proj": (heads, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, heads),
        "gate_proj": (model.intermediate_size, hidden), "up_proj": (model.intermediate_size, hidden),
        "down_proj": (hidden, model.intermediate_size),
    }  # fmt: skip
    parts = tuple(
        LoraTensors(layer, target, *(RNG.standard_normal(size, np.float32) for size in ((8, cols), (rows, 8))), 0.01)
        for layer in range(model.num_layers)
        for target, (rows, cols) in shapes.items()
    )
    return executor.load_adapter("one", make_adapter(parts)).index


def request_everything(executor: CudaExecutor, bundle: Bundle, longest: int, max_loras: int) -> Iterator[str]:
    """Makes requests of one kind after another, and then names what they were."""
    slots = executor.info.num_slots
    lengths = [*range(2, 35), 64, 127, 128, 129, 200, longest]
    for length in lengths:
        executor.step([SequenceStep(0, tokens(length), 0)])
    yield "prompts"
    for length in (*range(3, 17), 60):
        for rows in range(2, min(length, 17)):
            executor.step([SequenceStep(0, tokens(length), 0, rows)])
    yield "rows of logits"
    for batch in range(1, slots + 1):
        executor.step([SequenceStep(slot, tokens(1), 60) for slot in range(batch)])
    yield "single steps"
    executor.step([SequenceStep(slot, tokens(1 + 9 * slot), 0) for slot in range(slots)])
    yield "steps of every length"
    for name, params in SAMPLING.items():
        for batch in range(1, slots + 1):
            run(executor, batch, params)
        yield name
    verify(executor)
    yield "drafts"
    move_prefixes(executor)
    yield "prefixes"
    if not max_loras:
        return
    adapter = load_adapter(executor, bundle)
    yield "loading an adapter"
    for length in lengths:
        executor.step([SequenceStep(0, tokens(length), 0, 1, adapter)])
    executor.step([SequenceStep(slot, tokens(1), 60, 1, slot % 2 * adapter) for slot in range(slots)])
    for params in SAMPLING.values():
        run(executor, slots, params, adapter)
    verify(executor, adapter)
    yield "an adapter"
    executor.unload_adapter("one")
    run(executor, slots, SAMPLING["greedy"])
    yield "no adapter again"


def measure_memory(executor: CudaExecutor, before: int, requests: Iterator[str]) -> dict[str, Any]:
    """before: bytes that were free when nothing was loaded."""
    module = native.load()
    allocations, free, fell = module.allocation_count(), module.device_info()["free_bytes"], {}
    loaded = least = free
    for name in requests:
        now = module.device_info()["free_bytes"]
        fell[name], free = free - now, now
        least = min(least, now)
    return {
        "allocated": module.allocation_count() != allocations,
        "fell": fell,
        "loading took": before - loaded,
        "taken": before - least,
        "planned": executor.memory_plan["total"],
        "planned for graphs": executor.memory_plan["graphs"],
    }


def kernels_of(profiler: Any) -> set[str]:
    names = {event.name for event in profiler.events() if event.device_type.name == "CUDA"}
    return {name for name in names if not name.startswith(("Memcpy", "Memset"))}


def main(source: str, weights: str, settings: dict[str, Any], longest: int, what: str) -> None:
    bundle = Bundle.open(source) if Path(source).is_dir() else RandomBundle(source, weights)
    config = EngineConfig(executor="cuda", **settings)
    if what == "memory":
        before = native.load().device_info()["free_bytes"]
        executor = CudaExecutor(bundle, config)
        told = measure_memory(executor, before, request_everything(executor, bundle, longest, config.max_loras))
    else:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as loading:
            executor = CudaExecutor(bundle, config)
        with profile(activities=[ProfilerActivity.CUDA]) as running:
            names = list(request_everything(executor, bundle, longest, config.max_loras))
        before, now = kernels_of(loading), kernels_of(running)
        told = {"kinds": names, "at load": len(before), "run": len(now), "new": sorted(now - before)}
    print(json.dumps(told))
    executor.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
