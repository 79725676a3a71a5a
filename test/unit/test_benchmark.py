"""What benchmark figures rest on: bytes and operations counted right, random bundles shaped as real ones are."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cli_bundle import write_bundle
from doubles import FakeExecutor

from edgellm_ros.benchmark import costs, machine, measure
from edgellm_ros.benchmark.figures import Decode, Prefill, spread
from edgellm_ros.benchmark.random_bundle import SCHEMES, SHAPES, RandomBundle
from edgellm_ros.benchmark.read_bandwidth import ReadBandwidth
from edgellm_ros.bundle import TOKENIZER, Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import SamplingParams
from edgellm_ros.errors import ConfigError
from edgellm_ros.executors import ExecutorInfo, SequenceStep
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor
from edgellm_ros.manifest import ModelSpec
from edgellm_ros.tokenizer import Tokenizer

# Published sizes, in millions of parameters (Hugging Face model cards; norms included, so a little more than matrices).
PUBLISHED_M = {
    "llama-1b": 1236, "qwen3-4b": 4022, "llama-8b": 8030, "qwen3-0.6b": 596, "qwen3-1.7b": 1721,
    "llama-3b": 3213, "qwen3-8b": 8191, "qwen3-14b": 14768, "qwen3-32b": 32762, "gemma3-1b": 999.9,
    "danube3-500m": 514, "danube2-1.8b": 1831,
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(shape: str) -> None:
    assert costs.num_parameters(SHAPES[shape]) / 1e6 == pytest.approx(PUBLISHED_M[shape], rel=1e-3)


@pytest.mark.parametrize("weights", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_bytes_are_the_tensors_that_a_step_reads(shape: str, weights: str) -> None:
    bundle = RandomBundle(shape, weights)
    tensors = bundle.weights()
    head = bundle.manifest.quantization.head_tensor(bundle.manifest.model)
    read = 0
    for name in tensors.names():
        matrix = re.fullmatch(r"layers\.\d+\.(?:attn\.(?:qkv|o)|mlp\.(?:gate_up|down))\.(?:weight|scale)", name)
        if matrix or name.startswith(f"{head}."):
            kind, dims = tensors._tensors[name]
            stored = {"int8": 1, "int4": 1, "fp16": 2, "fp8": 1}.get(kind, 2)  # fp8 as the GPU holds it; scales fp16
            read += int(np.prod(dims)) * stored
    assert costs.decode_bytes(bundle.manifest.model, bundle.manifest.quantization) == read


@pytest.mark.parametrize("weights", SCHEMES)
def test_every_random_tensor_has_the_shape_and_type_that_it_is_listed_with(weights: str) -> None:
    bundle = RandomBundle("llama-1b", weights)
    model, tensors = bundle.manifest.model, bundle.weights()
    rows = {"attn.qkv": 48 * 64, "attn.o": 2048, "mlp.gate_up": 2 * 8192, "mlp.down": 2048}
    cols = {"attn.qkv": 2048, "attn.o": 32 * 64, "mlp.gate_up": 2048, "mlp.down": 8192}
    packed = 2 if weights.startswith("int4") else 1
    for stem in rows:
        assert tensors[f"layers.15.{stem}.weight"].shape == (rows[stem], cols[stem] // packed)
    assert tensors["embed.weight"].shape == (128256, 2048)
    assert tensors["rope.cos"].shape == (model.max_context, 32)
    assert tensors["final_norm.weight"].dtype == np.float32
    listed = set(tensors.names())
    for name in listed:
        if name.endswith(".scale"):
            weight = name.replace(".scale", ".weight")
            group = bundle.manifest.quantization.group_size
            per_byte = 2 if tensors[weight].dtype == np.uint8 else 1
            assert tensors[name].shape == (tensors[weight].shape[0], tensors[weight].shape[1] * per_byte // group)
    assert "layers.16.attn.qkv.weight" not in tensors


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2"])
@pytest.mark.parametrize("weights", ["int4", "int8", "fp16"])
def test_random_weights_are_listed_and_stored_as_export_stores_them(
    kind: str, weights: str, tiny_bundle: Callable[[str, str], Bundle]
) -> None:
    from edgellm_ros.benchmark.random_bundle import RandomWeights

    bundle = tiny_bundle(kind, weights)
    stored = bundle.weights()
    random = RandomWeights(bundle.manifest.model, bundle.manifest.quantization)
    assert set(random.names()) == {name for name in stored.names() if not name.endswith(".bias")}
    for name in random.names():
        made, real = random[name], stored[name]
        assert (made.shape, made.dtype) == (real.shape, real.dtype), name


def test_decode_bytes_of_an_exported_bundle_are_its_files_bytes(tiny_bundle: Callable[[str, str], Bundle]) -> None:
    """fp32 is stored as ONNX Runtime holds it; in int8 its scales are twice as wide as the stored fp16."""
    for weights, widening in (("fp32", 0), ("int8", 1)):
        bundle = tiny_bundle("llama", weights)
        tensors = bundle.weights()
        read = sum(
            tensors[name].nbytes * (1 + widening if name.endswith(".scale") else 1)
            for name in tensors.names()
            if tensors[name].ndim == 2 and not name.startswith(("embed", "rope"))
        )
        assert costs.decode_bytes(bundle.manifest.model, bundle.manifest.quantization, "onnxruntime") == read


def test_an_engine_is_taken_to_read_what_is_stored(tiny_bundle: Callable[[str, str], Bundle]) -> None:
    for weights in ("fp16", "int8", "int4"):
        bundle = tiny_bundle("llama", weights)
        tensors = bundle.weights()
        names = [name for name in tensors.names() if tensors[name].ndim == 2 and not name.startswith(("embed", "rope"))]
        read = sum(tensors[name].nbytes for name in names)
        assert costs.decode_bytes(bundle.manifest.model, bundle.manifest.quantization, "tensorrt") == read


def test_cache_bytes_end_at_a_layers_window() -> None:
    model = dataclasses.replace(SHAPES["llama-1b"], num_layers=2, sliding_windows=(16, 0))
    assert costs.kv_bytes(model, 8, 10) == 80
    assert costs.kv_bytes(model, 8, 100) == 4 * 16 + 4 * 100


def test_prompt_operations_are_those_of_a_loop_over_the_tokens() -> None:
    def slow(model: ModelSpec, num_tokens: int) -> float:
        total = 2.0 * model.hidden_size * model.vocab_size
        for window in model.sliding_windows or (0,) * model.num_layers:
            for position in range(num_tokens):
                seen = min(position + 1, window or num_tokens)
                total += 2.0 * costs.layer_weights(model) + 4.0 * model.num_heads * model.head_dim * seen
        return total

    model = dataclasses.replace(SHAPES["qwen3-4b"], num_layers=3, sliding_windows=(7, 0, 1000))
    for num_tokens in (1, 6, 7, 8, 99):
        assert costs.prefill_flops(model, num_tokens) == pytest.approx(slow(model, num_tokens))
    assert costs.prefill_flops(SHAPES["llama-1b"], 19) == pytest.approx(slow(SHAPES["llama-1b"], 19))


def test_a_random_bundles_tokenizer_has_text_for_every_id() -> None:
    bundle = RandomBundle("qwen3-4b", "int4")
    tokenizer = Tokenizer(bundle.read_text(TOKENIZER))
    assert tokenizer.vocab_size == bundle.manifest.model.vocab_size and tokenizer.byte_level
    for token in (0, 1, 989, 151935):
        text = tokenizer.token_bytes(token).decode()
        assert text.startswith(" ") and len(text) == 5
    assert tokenizer.decode([0, 1, 27]) == " aaaa aaab aabb"


def test_figures_agree_with_each_other() -> None:
    decode = Decode(batch=4, context=100, new_tokens=8, bytes_per_step=2e9, executor_ms=[11.0, 10.0, 30.0])
    found = decode.to_dict(ReadBandwidth(250.0, ""))
    assert found["engine"] is None and found["engine_over_executor"] is None
    executor = found["executor"]
    assert executor["ms_per_token"] == {"median": 11.0, "min": 10.0, "max": 30.0, "rounds": [11.0, 10.0, 30.0]}
    assert executor["tokens_per_s"] == pytest.approx(4 / 11e-3)
    assert executor["gb_per_s"] == pytest.approx(2 / 11e-3) and executor["read_share"] == pytest.approx(2 / 11e-3 / 250)
    assert decode.to_dict(None)["executor"]["read_share"] is None
    decode.engine_ms = [22.0]
    assert decode.to_dict(None)["engine_over_executor"] == pytest.approx(2.0)
    prefill = Prefill(prompt_tokens=50, flops=1e12, executor_ms=[100.0], first_token_ms=[200.0]).to_dict()
    assert prefill["executor"]["tokens_per_s"] == pytest.approx(500) and prefill["engine"]["tokens_per_s"] == 250
    assert prefill["executor"]["tflop_per_s"] == pytest.approx(10) and prefill["executor"]["ms_per_token"] == 2
    assert spread([3.0, 1.0])["median"] == 2.0


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 9B14\nflags\t: avx2\n", "AMD EPYC 9B14"),
        ("processor\t: 0\nBogoMIPS\t: 62.50\nHardware\t: Tegra\n", "Tegra"),
    ],
)
def test_the_processor_is_named(cpuinfo: str, name: str) -> None:
    assert machine.cpu_name(cpuinfo) == name


def test_resident_memory_counts_what_is_touched() -> None:
    # In a process of its own: this one's other memory may be reclaimed meanwhile.
    code = """
import numpy as np
from edgellm_ros.benchmark import machine
before, _ = machine.resident_bytes()
block = np.ones(64 << 20, np.uint8)
after, peak = machine.resident_bytes()
print(after - before, peak - after, block[-1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, above, last = map(int, done.stdout.split())
    assert grown > 48 << 20 and above >= 0 and last == 1


def plan(**changes: Any) -> measure.Plan:
    settings: dict[str, Any] = {
        "executors": ("onnxruntime",), "prompt_tokens": (16,), "contexts": (16, 32), "batches": (1,), "new_tokens": 4,
        "rounds": 2, "config": EngineConfig(), "sampling": SamplingParams(ignore_eos=True, seed=0),
    }  # fmt: skip
    return measure.Plan(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contexts": (16, 252)}, "needs 258 tokens .* the bundle holds 256"),
        ({"prompt_tokens": (256,)}, "needs 257 tokens .* the bundle holds 256"),
        ({"config": EngineConfig(max_context=32)}, "max_context 32 is too small .* needs 38 tokens; raise it"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], words: str, tiny_bundle: Callable[[str, str], Bundle]
) -> None:
    bundle = tiny_bundle("llama", "int4")
    with pytest.raises(ConfigError, match=words):
        measure.Benchmark(bundle, bundle.path, plan(**changes))


@pytest.mark.parametrize("fits", [True, False])
def test_every_figure_has_its_rounds_and_progress_is_told_as_often_as_planned(
    fits: bool, tiny_bundle: Callable[[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "fits_twice", lambda info: fits)
    slept: list[float] = []
    monkeypatch.setattr(measure, "time", SimpleNamespace(sleep=slept.append))
    bundle = tiny_bundle("mistral", "int8")
    wanted = plan(batches=(1, 3), prompt_tokens=(5, 40), new_tokens=64)
    benchmark = measure.Benchmark(bundle, bundle.path, wanted)
    told: list[str] = []
    benchmark.measure(told.append)
    assert len(told) == wanted.num_units
    kinds = [words.rpartition(" ")[2] for words in told if "decoding 1 x 64 tokens after 32" in words]
    assert kinds == (["engine", "executor"] * 3 if fits else ["engine"] * 3 + ["executor"] * 3)
    assert [(run.batch, len(run.prefill), len(run.decode)) for run in benchmark.runs] == [(1, 2, 2), (3, 0, 2)]
    # Before each of 6 figures' 3 rounds of both, for the other copy's threads; alone there are none.
    assert slept == [measure._SPIN_S if fits else 0.0] * 36
    for run in benchmark.runs:
        assert run.interleaved is fits
        assert run.read is benchmark.runs[0].read and run.read is not None
        for decode in run.decode:
            assert len(decode.executor_ms) == len(decode.engine_ms) == 2
        for prefill in run.prefill:
            assert len(prefill.executor_ms) == len(prefill.first_token_ms) == 2
    # A window of 16 tokens in all layers: a longer context reads no more cache.
    assert benchmark.runs[0].decode[0].bytes_per_step == benchmark.runs[0].decode[1].bytes_per_step


def test_a_second_copy_is_loaded_only_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def info(name: str) -> ExecutorInfo:
        return ExecutorInfo(name, "", "", 1, 1, 1, 1, memory_bytes=1000)

    monkeypatch.setattr(measure, "available_memory", lambda: 2000)
    monkeypatch.setattr(measure, "free_device_bytes", lambda: 1100)
    assert measure.fits_twice(info("onnxruntime")) and not measure.fits_twice(info("cuda"))
    assert not measure.fits_twice(info("tensorrt"))
    monkeypatch.setattr(measure, "available_memory", lambda: 1200)
    monkeypatch.setattr(measure, "free_device_bytes", lambda: 1300)
    assert measure.fits_twice(info("cuda")) and not measure.fits_twice(info("onnxruntime"))


def test_a_batch_that_the_gpu_cannot_decode_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        MAX_BATCH = 8

    monkeypatch.setattr("edgellm_ros.native.import_module", lambda: (Module, ""))
    measure.check_batches((1, 8), "cuda")
    measure.check_batches((1, 9), "onnxruntime")
    for executor in ("cuda", "tensorrt"):
        with pytest.raises(ConfigError, match=f"--batch 9 is more than the {executor} executor decodes at once, 8"):
            measure.check_batches((1, 9), executor)
    monkeypatch.setattr("edgellm_ros.native.import_module", lambda: (None, "it is not built"))
    measure.check_batches((1, 9), "onnxruntime")
    with pytest.raises(ConfigError, match="--batch 9 is more than the cuda executor decodes at once, 8"):
        measure.check_batches((1, 9), "cuda")


@pytest.mark.parametrize(("batching", "agree", "together"), [("exact", True, 1), ("exact", False, 0), ("fast", False, 1)])
def test_weights_that_a_step_reads_for_each_sequence_count_for_each(
    batching: str, agree: bool, together: bool, tiny_bundle: Callable[[str, str], Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where a machine's single rows round apart, exact computes one sequence after the other."""
    monkeypatch.setattr(OnnxRuntimeExecutor, "_rows_agree", lambda self: agree)
    runs = Counter[int]()
    run_group = OnnxRuntimeExecutor._run

    def counted(self: OnnxRuntimeExecutor, members: list[SequenceStep], out: Any) -> Any:
        runs[len(members)] += len(members[0].token_ids) == 1
        return run_group(self, members, out)

    monkeypatch.setattr(OnnxRuntimeExecutor, "_run", counted)
    bundle = tiny_bundle("qwen3", "int4")
    benchmark = measure.Benchmark(
        bundle, bundle.path, plan(batches=(1, 3), contexts=(16,), config=EngineConfig(decode_batching=batching))
    )
    benchmark.measure(lambda words: None)
    assert bool(runs[3]) == together
    one, three = (run.decode[0].bytes_per_step for run in benchmark.runs)
    weights = costs.decode_bytes(bundle.manifest.model, bundle.manifest.quantization, "onnxruntime")
    assert three - 3 * one == pytest.approx(-2 * weights if together else 0)


def measure_fakes(wanted: measure.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[measure.Benchmark, list[FakeExecutor]]:
    """Measured with stand-ins for ONNX Runtime: in turns the one that the engine has, and the one alone."""
    made: list[FakeExecutor] = []

    def create(bundle: Bundle, config: EngineConfig) -> FakeExecutor:
        made.append(FakeExecutor(config.max_slots, config.max_context, allowed=128))
        made[-1].info = dataclasses.replace(made[-1].info, name="onnxruntime")
        return made[-1]

    monkeypatch.setattr("edgellm_ros.executors.create_executor", create)
    monkeypatch.setattr(measure, "measure_read_bandwidth", lambda name, threads: ReadBandwidth(1.0, "none"))
    monkeypatch.setattr(measure, "time", SimpleNamespace(sleep=lambda seconds: None))
    path = write_bundle(tmp_path / "bundle")
    benchmark = measure.Benchmark(Bundle.open(path), path, wanted)
    benchmark.measure(lambda words: None)
    return benchmark, made


def test_every_round_has_a_prompt_of_its_own_which_nothing_is_cached_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (engines, alone) = measure_fakes(plan(prompt_tokens=(24, 40), rounds=3), tmp_path, monkeypatch)
    for length in (24, 40):
        of_both = [
            [tuple(s.token_ids) for call in made.calls for s in call if (s.position, len(s.token_ids)) == (0, length)]
            for made in (engines, alone)
        ]
        assert len(set(of_both[1])) == len(of_both[1]) == 4, "a round that is not counted, then three"
        assert of_both[0] == of_both[1], "the engine computes the same prompts, each as a whole"


def test_a_steps_bytes_are_all_weights_and_the_cache_when_half_of_the_new_tokens_are_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(contexts=(16, 32), batches=(1, 3), new_tokens=8)
    benchmark, made = measure_fakes(wanted, tmp_path, monkeypatch)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    weights = costs.decode_bytes(manifest.model, manifest.quantization, "onnxruntime")
    per_token = made[0].info.kv_bytes_per_token
    found = {(d.batch, d.context): d.bytes_per_step for run in benchmark.runs for d in run.decode}
    assert found == {(b, c): weights + b * (c + 4) * per_token for b in (1, 3) for c in (16, 32)}
