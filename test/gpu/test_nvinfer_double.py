"""The double of libnvinfer on a GPU, driven through TensorRT's headers: its enqueueV3 computes what the cuda executor does.

Bits: single tokens in bf16, alone and in a batch, plain and out of a graph, of a cuda executor whose norms read 16 bits and
whose cache is bf16. Everything else is compared within the rounding of bf16: the cuda executor reads prompts and drafts
through other kernels, and fp16 embeddings round once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import double_driver
import ml_dtypes
import numpy as np
import pytest
from double_driver import Driver, Rig
from double_plan import plan_bytes, plan_facts

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import BuildOptions
from edgellm_ros.executors import SequenceStep, cuda
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.embedding import EmbeddingTable
from edgellm_ros.executors.lora import read_adapter
from edgellm_ros.executors.lora_layout import fit, pack_matrices

pytestmark = pytest.mark.skipif(bool(double_driver.NO_DOUBLE), reason=double_driver.NO_DOUBLE)
RNG = np.random.default_rng(5)
CAPACITY = 128
KINDS = ("gpu_llama", "gpu_mistral", "gpu_qwen2", "gpu_qwen3", "gpu_smollm3", "gpu_gemma3", "gpu_gemma3_64")
DTYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


class Double:
    """A bundle behind the double, one sequence a row of its batch."""

    def __init__(self, bundle: Bundle, folder: Path, *, activations: str = "bf16", batch: int = 2, **settings: Any) -> None:
        options = BuildOptions(
            max_batch=batch, max_input=48, max_context=CAPACITY, max_verify=4, activations=activations,
            lora=settings.pop("lora", False), dialect=settings.pop("dialect", "standard"),
        ).resolved(bundle)  # fmt: skip
        change = settings.pop("change", None)
        self.facts, tensors = plan_facts(bundle, options, **settings)
        if change is not None:
            change(self.facts)
        folder.mkdir(parents=True)
        (folder / "plan").write_bytes(plan_bytes(self.facts, tensors))
        self.driver = Driver(folder / "plan")
        assert self.driver.engine == "engine made", self.driver.logs
        self.rig = Rig(self.driver, self.facts, folder, batch)
        self.dtype = DTYPES[activations]
        self._table = EmbeddingTable(bundle)
        self._hidden = bundle.manifest.model.hidden_size

    def embeds(self, ids: np.ndarray) -> np.ndarray:
        """(batch, length, hidden) of ids (batch, length)."""
        rows = np.zeros((ids.size, self._hidden), np.float32)
        self._table.lookup(ids.reshape(-1), rows)
        return rows.astype(self.dtype).reshape(*ids.shape, self._hidden)

    def prepare(self, ids: Any, starts: Any, rows: Any = None, positions: Any = None, ranks: Any = None) -> int:
        """Inputs of ids (batch, length) from positions `starts` on; logits of `rows`, all without; their number."""
        ids, starts = np.atleast_2d(np.asarray(ids, np.int32)), np.atleast_1d(np.asarray(starts, np.int64))
        if positions is None:
            positions = starts[:, None] + np.arange(ids.shape[1])
        rows = np.arange(ids.size) if rows is None else np.asarray(rows)
        profile = 0 if ids.shape[1] <= 4 else 1
        if profile != self.rig.profile:
            self.rig.use_profile(profile)
        self.rig.prepare(self.embeds(ids), np.asarray(positions, np.int64), starts, rows.astype(np.int64), ranks)
        return len(rows)

    def step(self, ids: Any, starts: Any, *rest: Any, **settings: Any) -> np.ndarray:
        """Logits of one enqueue."""
        count = self.prepare(ids, starts, *rest, **settings)
        self.rig.yes("enqueue")
        return self.rig.logits(count).copy()


Open = Callable[..., Double]


@pytest.fixture
def open_double(gpu_bundle: Callable[..., Bundle], tmp_path: Path) -> Iterator[Open]:
    opened: list[Double] = []

    def get(kind: str = "gpu_qwen3", weights: str = "fp16", bundle: Bundle | None = None, **settings: Any) -> Double:
        found = bundle or gpu_bundle(kind, weights)
        opened.append(Double(found, tmp_path / f"double{len(opened)}", **settings))
        return opened[-1]

    yield get
    for double in opened:
        double.driver.__exit__()


OpenCuda = Callable[..., CudaExecutor]


@pytest.fixture
def open_cuda(open_cuda: OpenCuda, monkeypatch: pytest.MonkeyPatch) -> OpenCuda:
    """Executors that round as an engine in bf16 does."""
    monkeypatch.setattr(cuda, "_WIDE_NORM_INPUTS", False)
    return lambda *kind, **settings: open_cuda(*kind, **{"kv_cache": "bf16", **settings})


def prompt(length: int) -> np.ndarray:
    return RNG.integers(5, 300, length).astype(np.int32)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected - expected.mean(-1, keepdims=True)))


def one_by_one(executor: CudaExecutor, ids: np.ndarray, slot: int = 1) -> np.ndarray:
    return np.concatenate([executor.step([SequenceStep(slot, ids[i : i + 1], i, 1)]).copy() for i in range(len(ids))])


@pytest.mark.parametrize("weights", ["fp16", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_single_tokens_have_the_bits_of_the_cuda_executor(
    kind: str, weights: str, open_double: Open, open_cuda: OpenCuda
) -> None:
    ids = prompt(40)
    expected = one_by_one(open_cuda(kind, weights, max_context=CAPACITY), ids)
    double = open_double(kind, weights)
    got = np.concatenate([double.step(ids[i : i + 1], i) for i in range(len(ids))])
    # Embeddings in int8 round to bf16 on their way in, which the executor's do not.
    if weights == "fp16":
        assert np.array_equal(got, expected)
    assert relative_error(got, expected) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_drafts_have_its_logits_within_rounding(kind: str, open_double: Open, open_cuda: OpenCuda) -> None:
    ids = prompt(60)
    executor = open_cuda(kind, max_context=CAPACITY)
    expected = [executor.step([SequenceStep(1, ids[:48], 0, 48)]).copy()]
    expected += [executor.step([SequenceStep(1, ids[48:52], 48, 4)]).copy(), one_by_one_from(executor, ids, 52)]
    double = open_double(kind)
    got = []
    for start in range(0, 48, 16):  # the profile's most logits are fewer than a prompt's tokens
        got.append(double.step(ids[:48], 0, np.arange(start, start + 8)))
        got.append(double.step(ids[:48], 0, np.arange(start + 8, start + 16)))
    got.append(double.step(ids[48:52], 48))
    got += [double.step(ids[i : i + 1], i) for i in range(52, 60)]
    assert relative_error(np.concatenate(got), np.concatenate(expected)) < 0.03


def one_by_one_from(executor: CudaExecutor, ids: np.ndarray, start: int) -> np.ndarray:
    steps = [executor.step([SequenceStep(1, ids[i : i + 1], i, 1)]).copy() for i in range(start, len(ids))]
    return np.concatenate(steps)


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_an_engine_in_fp16_has_the_logits_of_a_cache_in_fp16(weights: str, open_double: Open, open_cuda: OpenCuda) -> None:
    ids = prompt(40)
    expected = one_by_one(open_cuda("gpu_qwen3", weights, max_context=CAPACITY, kv_cache="fp16"), ids)
    double = open_double("gpu_qwen3", weights, activations="fp16")
    got = np.concatenate([double.step(ids[i : i + 1], i) for i in range(len(ids))])
    assert relative_error(got, expected) < 0.03


def test_a_cache_of_keys_and_values_together_gives_the_same_bits(open_double: Open) -> None:
    ids = prompt(30)
    logits = []
    for dialect in ("standard", "plugin"):
        double = open_double(dialect=dialect)
        steps = [double.step([ids[:20], ids[5:25]], [0, 0], [19, 39]), double.step([ids[20:23], ids[:3]], [20, 20])]
        steps += [double.step([ids[i : i + 1], ids[i : i + 1]], [i, i]) for i in range(23, 30)]
        logits.append(np.concatenate(steps))
    assert np.isfinite(logits[0]).all() and np.array_equal(logits[0], logits[1])


def test_a_batch_has_the_bits_of_its_sequences_alone(open_double: Open) -> None:
    first, second = prompt(12), prompt(12)
    alone = []
    for ids in (first, second):
        double = open_double()
        alone.append(np.concatenate([double.step(ids[i : i + 1], i) for i in range(12)]))
    double = open_double()
    together = [double.step([first[i : i + 1], second[i : i + 1]], [i, i]) for i in range(12)]
    assert np.array_equal(np.stack(together, 1).reshape(2, 12, -1), np.stack(alone))


def test_a_graph_replays_the_bits_of_an_enqueue_at_other_positions_too(open_double: Open) -> None:
    ids = prompt(20)
    plain = open_double()
    expected = [plain.step(ids[i : i + 1], i) for i in range(20)]
    double = open_double()
    double.step(ids[:1], 0)
    double.rig.yes("capture")
    for i in range(1, 20):
        double.prepare(ids[i : i + 1], i)
        double.rig.yes("replay")
        assert np.array_equal(double.rig.logits(1), expected[i]), i


def test_what_changed_must_be_enqueued_before_it_is_captured(open_double: Open) -> None:
    double = open_double()
    double.prepare(prompt(1), 0)
    assert double.driver.call("capture") == "false" and "call enqueueV3 once without capture first" in double.driver.logs[0]
    double.rig.yes("enqueue")
    double.rig.yes("capture")
    double.prepare(prompt(2), 0)
    assert double.driver.call("capture") == "false"
    double.rig.use_profile(1)
    double.prepare(prompt(6), 0, [5])
    double.rig.yes("enqueue")
    double.rig.yes("capture")


@pytest.mark.alone
def test_enqueueing_takes_no_memory(open_double: Open) -> None:
    double = open_double()

    def enqueue() -> None:
        double.step(prompt(40), 0, [39])
        for i in range(8):
            double.step(prompt(1), 40 + i)
        double.step(prompt(4), 48)

    enqueue()  # CUDA loads a kernel's code when it first runs
    free = int(double.driver.call("free_bytes"))
    enqueue()
    assert int(double.driver.call("free_bytes")) == free


def test_padding_gets_nan_and_the_sequences_beside_it_their_own_logits(open_double: Open) -> None:
    long, short = prompt(20), prompt(8)
    alone = open_double()
    expected = alone.step(long, 0, [19]), alone.step(short, 0, [7])
    double = open_double()
    ids = np.stack([long, np.concatenate([short, np.zeros(12, np.int32)])])
    positions = np.stack([np.arange(20), np.concatenate([np.arange(8), np.zeros(12, np.int64)])])
    logits = double.step(ids, [0, 0], [19, 27, 28], positions)
    assert relative_error(logits[:2], np.concatenate(expected)) < 0.01 and np.isnan(logits[2]).all()
    # What padding left in the cache is overwritten by the tokens that follow, and not seen before.
    following = prompt(1)
    assert relative_error(double.step([long[:1], following], [20, 8], [1]), alone_after(open_double(), short, following)) < 0.01


def alone_after(double: Double, before: np.ndarray, following: np.ndarray) -> np.ndarray:
    double.step(before, 0, [len(before) - 1])
    return double.step(following, len(before))


def test_positions_that_are_not_where_the_cache_is_written_show_in_the_logits(open_double: Open) -> None:
    double = open_double()
    assert np.isfinite(double.step(prompt(4), 0)).all()
    assert np.isnan(double.step(prompt(1), 4, positions=[[5]])).all()
    assert np.isnan(double.step(prompt(1), CAPACITY)).all()
    assert np.isnan(double.step(prompt(1), 4, [7])).all()  # no row 7


def test_the_cache_is_written_in_place_and_nowhere_else(open_double: Open) -> None:
    double = open_double()
    shape = (2, *double.rig.bindings["past_key.1"]["shape"][1:])

    def cache() -> np.ndarray:
        return np.frombuffer(double.rig.download("past_key.1"), np.uint16).reshape(shape).copy()

    double.step(prompt(10), 0, [9])
    before = cache()
    assert before[0, :, :10].any(-1).all() and not before[0, :, 10:].any() and not before[1].any()
    double.step(prompt(3), 10)
    after = cache()
    assert after[0, :, 10:13].any(-1).all() and not after[0, :, 13:].any()
    assert np.array_equal(after[0, :, :10], before[0, :, :10])


def test_an_enqueue_with_anything_missing_or_wrong_is_refused_by_name(open_double: Open) -> None:
    double = open_double()
    rig, driver = double.rig, double.driver

    def refused(match: str) -> None:
        assert driver.call("enqueue") == "false"
        assert match in driver.logs[0], driver.logs

    refused("the shape of inputs_embeds is not set for profile 0")
    double.prepare(prompt(2), 0)
    rig.yes("shape", "position_ids", 1, 3)
    refused("position_ids has length 3, another input 2")
    rig.yes("shape", "position_ids", 1, 2)
    rig.yes("address", "logits", 0)
    refused("the address of logits is not set")
    rig.yes("bind", "logits", "logits", 0)
    rig.yes("bind", "present_key.0", "past_key.1", 0)
    refused("the cache is updated in place, but present_key.0 has another address")
    rig.yes("bind", "past_key.0", "past_key.1", 0)
    refused("present_key.0 overlaps present_key.1")
    rig.yes("bind", "past_key.0", "past_key.0", 0)
    rig.yes("bind", "present_key.0", "past_key.0", 0)
    rig.yes("bind", "logits", "scratch", 512)
    refused("device memory overlaps logits")
    rig.yes("bind", "logits", "logits", 0)
    rig.yes("alloc", "small", 4096)
    rig.yes("memory", "small")
    refused("device memory has 4096 bytes; profile 0 needs")
    rig.yes("memory", "scratch")
    rig.yes("enqueue")
    rig.use_profile(1)
    refused("the shape of inputs_embeds is not set for profile 1")


def test_what_is_kept_in_device_memory_does_not_survive(open_double: Open) -> None:
    double = open_double()
    size = int(next(p for p in double.driver.call("describe").split(" ; ") if p.startswith("memory ")).split()[1])
    double.rig.upload("scratch", np.full(size, 0x11, np.uint8))
    double.step(prompt(1), 0)
    left = np.frombuffer(double.rig.download("scratch"), np.uint8)[:size]
    assert (left == 0x11).mean() < 0.05


def test_faults_in_the_middle_are_an_answer_a_value_or_an_error_of_the_device(open_double: Open) -> None:
    double = open_double(faults={"enqueue": 3})
    for i in range(2):
        double.step(prompt(1), i)
    double.prepare(prompt(1), 2)
    assert double.driver.call("enqueue") == "false" and "told to fail" in double.driver.logs[0]
    assert np.isfinite(double.step(prompt(1), 2)).all()

    double = open_double(faults={"execution_nan": 3})
    assert np.isfinite([double.step(prompt(1), i) for i in range(2)]).all()
    assert np.isnan(double.step(prompt(1), 2)).all()

    double = open_double(faults={"execution_trap": 3})
    double.step(prompt(1), 0)
    double.rig.yes("capture")
    double.rig.yes("replay")
    assert double.driver.call("replay").startswith("error cuda cudaError")


def test_an_adapter_is_an_input(gpu_model: Any, open_double: Open, tmp_path: Path) -> None:
    import torch
    from adapters import ALL, merged, write_adapter

    from edgellm_ros.toolchain.export import export_bundle

    model, checkpoint = gpu_model("gpu_llama")
    bundle = export_bundle(checkpoint, tmp_path / "bundle", weights="fp16", max_lora_rank=8)
    path = write_adapter(tmp_path / "adapter", model, dict.fromkeys(ALL, 8) | {"k_proj": 3}, seed=3)
    double, graph = open_double(bundle=bundle, lora=True), bundle.manifest.graph
    ids = prompt(24)

    def logits(ranks: dict[str, int] | None) -> np.ndarray:
        """Of the last tokens of a prompt, a draft and a single token."""
        steps = [double.step(ids[:20], 0, [18, 19], ranks=ranks), double.step(ids[20:23], 20, ranks=ranks)]
        return np.concatenate([*steps, double.step(ids[23:], 23, ranks=ranks)])

    without = logits(None)
    assert np.array_equal(without[-1], one_after_another(open_double(bundle=bundle), ids))
    ranks = {}
    packed, _ = pack_matrices(fit(read_adapter(path), bundle.manifest.model, 8), bundle.manifest.model)
    for (layer, stem), matrices in packed.items():
        for name, values, axis in zip((graph.lora_a, graph.lora_b), matrices, (1, 0), strict=True):
            name = name.format(layer=layer, stem=stem)
            double.rig.upload(name, values.astype(double.dtype))
            ranks[name] = values.shape[axis]
    got = logits(ranks)
    with torch.no_grad():
        expected = merged(model, path)(torch.tensor(ids[None].astype(np.int64))).logits[0, 18:].numpy()
    assert relative_error(without, expected) > 0.2, "an adapter that changes nothing tests nothing"
    assert relative_error(got, expected) < 0.05
    assert np.array_equal(logits(None), without)


def one_after_another(double: Double, ids: np.ndarray) -> np.ndarray:
    double.step(ids[:20], 0, [19])
    double.step(ids[20:23], 20)
    return double.step(ids[23:], 23)[0]
