"""bench/: the lines of kernels hand the bindings what they take, looked at up to the launch, which needs a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edgellm_ros import native
from edgellm_ros.benchmark.random_bundle import SHAPES
from edgellm_ros.errors import DeviceError

torch = pytest.importorskip("torch")
NATIVE, NO_MODULE = native.import_module()
NO_GPU = NO_MODULE or native.unavailable_reason()
# The addresses are made up: nothing here may run where a kernel would.
pytestmark = pytest.mark.skipif(
    bool(NO_MODULE) or not NO_GPU, reason=NO_MODULE or "a GPU is here, and runs the scripts themselves"
)
HEAD_DIMS = {64, 80, 96, 128, 256}  # that decoder_config.cpp takes


class Kernels:
    """The bindings; a launch fails for want of a GPU, and any other error is raised. `launched` counts the former."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(NATIVE.kernels, name)
        return self._call(name, found) if callable(found) and not isinstance(found, type) else found

    def _call(self, name: str, binding: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return binding(*map(on_device, args), **{key: on_device(value) for key, value in kwargs.items()})
            except DeviceError:
                self.launched.append(name)

        return call


def on_device(value: Any) -> Any:
    """What the bindings see of tensors: type, shape, and an address on a device."""
    if isinstance(value, tuple):
        return tuple(map(on_device, value))
    if not isinstance(value, torch.Tensor):
        return value
    from test_dlpack_import import Producer

    assert value.is_contiguous(), tuple(value.shape)
    code = 4 if value.dtype == torch.bfloat16 else 2 if value.dtype.is_floating_point else 0
    producer = Producer(tuple(value.shape), dtype=(code, 8 * value.dtype.itemsize, 1))
    producer.managed.tensor.byte_offset = 0  # aligned, as an allocation is
    return producer


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Stands in every script for the bindings; tensors for the device are made on the CPU, and nothing is timed."""
    import bench_attention_decode
    import bench_attention_prefill
    import bench_attention_tree
    import bench_gemv
    import bench_prefill
    import bench_small_kernels
    from torch.overrides import TorchFunctionMode

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.cuda:
                return args[0]
            return function(*args, **{k: "cpu" if k == "device" else v for k, v in (kwargs or {}).items()})

    def launch_each(launches: list[Callable[[int], Any]], repeats: int = 7) -> float:
        for launch in launches[:2]:
            launch(0)
        return 1.0

    found = Kernels()
    for module in (
        bench_attention_decode, bench_attention_prefill, bench_attention_tree, bench_gemv, bench_prefill,
        bench_small_kernels,
    ):  # fmt: skip
        monkeypatch.setattr(module, "K", found)
        monkeypatch.setattr(module, "measure_us", launch_each)
        monkeypatch.setattr(module, "print_machine", lambda: 1000.0, raising=False)
    monkeypatch.setattr(bench_attention_decode, "FEWEST_BYTES", 1)
    monkeypatch.setattr(bench_attention_decode, "NUM_CALLS", 2)
    monkeypatch.setattr(bench_attention_tree, "NUM_CALLS", 2)
    monkeypatch.setattr(bench_attention_prefill, "TOKENS", (19,))
    monkeypatch.setattr(bench_small_kernels, "SHAPES", {"tiny": (256, 512, 1024)})
    monkeypatch.setattr(bench_small_kernels, "DISTINCT_BYTES", 1)
    with OnCpu():
        yield found


@pytest.mark.parametrize("tokens", [1, 19, 99])
def test_every_small_kernel_is_called_as_its_binding_takes_it(tokens: int, kernels: Kernels) -> None:
    import bench_small_kernels

    lines = bench_small_kernels.kernels("tiny", tokens)
    for name, (num_bytes, make) in lines.items():
        before = len(kernels.launched)
        make()(0)
        assert num_bytes > 0 and len(kernels.launched) == before + 1, name
    for wanted in ("embedding, int8", "RoPE, fp16 KV", "RoPE, FP8 KV", "RoPE, heads of 80", "FP8 to bf16",
                   "int8, offset to bf16"):  # fmt: skip
        assert wanted in lines


def test_attention_is_timed_with_heads_of_every_size(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_attention_decode
    import bench_attention_prefill
    import bench_attention_tree

    assert {head_dim for _, _, head_dim in bench_attention_decode.SHAPES.values()} == HEAD_DIMS
    assert bench_attention_tree.SHAPES is bench_attention_decode.SHAPES
    assert {head_dim for _, _, head_dim in bench_attention_prefill.HEADS.values()} == HEAD_DIMS
    for shape in bench_attention_decode.SHAPES.values():
        for form in bench_attention_decode.DTYPES.values():
            bench_attention_decode.time_us(*shape, 99, 2, form, 8, 0)
        for tokens in (4, 64):
            bench_attention_tree.time_us(*shape, 99, tokens)
    monkeypatch.setattr(sys, "argv", ["bench_attention_prefill.py"])
    bench_attention_prefill.main()
    count = len(bench_attention_decode.SHAPES)
    assert kernels.launched.count("decode_attention") == 3 * 2 * count
    assert kernels.launched.count("tree_attention") == 2 * 2 * count
    assert kernels.launched.count("prefill_attention") == 2 * len(bench_attention_prefill.HEADS)


@pytest.mark.parametrize("weights", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize(("shape", "head_dim"), [("danube2-1.8b", 80), ("danube3-500m", 96)])
def test_prefills_groups_are_timed_with_heads_of_80_and_96(
    shape: str, head_dim: int, weights: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_prefill

    monkeypatch.setattr(bench_prefill, "time_product_us", lambda *args: 1.0)  # makes its cuBLASLt first
    assert SHAPES[shape].head_dim == head_dim
    bench_prefill.time_groups(SHAPES[shape], weights, 19)
    assert {"rope_kv_write", "prefill_attention", "residual_norm", "swiglu"} <= set(kernels.launched)
    assert kernels.launched.count("dequantize") == (8 if weights == "int4" else 0)
