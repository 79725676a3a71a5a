"""Tensors own or borrow, reshape in place, and cross to other CUDA libraries without a copy."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from edgellm_ros import native

NATIVE, NO_MODULE = native.import_module()
NO_GPU = NO_MODULE or native.unavailable_reason()
needs_gpu = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
pytestmark = pytest.mark.skipif(bool(NO_MODULE), reason=NO_MODULE)


def test_a_borrowed_tensor_reshapes_in_place_and_never_past_its_end() -> None:
    tensor = NATIVE.Tensor.borrow(4096, "bfloat16", [6, 4])
    assert not tensor.owns and tensor.shape == (6, 4) and tensor.num_bytes == 48
    tensor.reshape([3, 2])
    tensor.reshape([2, 12])
    assert tensor.shape == (2, 12) and tensor.data == 4096
    with pytest.raises(ValueError, match=r"shape \[5, 5\] needs 50 bytes; the tensor has 48"):
        tensor.reshape([5, 5])
    assert tensor.shape == (2, 12)


def test_what_cannot_be_a_tensor_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="dtype is float64; allowed are float32, float16, bfloat16"):
        NATIVE.Tensor.borrow(4096, "float64", [1])
    with pytest.raises(ValueError, match=r"shape \[2, -1\] has a negative size"):
        NATIVE.Tensor.borrow(4096, "int8", [2, -1])
    for dims in ([1 << 32, 1 << 32], [1 << 62], [0, 1 << 62], [(1 << 59) + 1]):  # bytes beyond an int64
        with pytest.raises(ValueError, match=rf"shape \[.*{dims[-1]}\] has more than {1 << 59} elements"):
            NATIVE.Tensor.borrow(4096, "float32", dims)
        with pytest.raises(ValueError, match="has more than"):
            NATIVE.Tensor.borrow(4096, "int8", [4]).reshape(dims)
    with pytest.raises(ValueError, match=rf"needs {1 << 62} bytes; the tensor has 8"):
        NATIVE.Tensor.borrow(4096, "int64", [1]).reshape([1 << 59])
    with pytest.raises(ValueError, match="rank 7 exceeds 6"):
        NATIVE.Tensor.borrow(4096, "int8", [1] * 7)


def test_counting_devices_never_fails() -> None:
    count, reason = NATIVE.count_devices()
    assert (count > 0) == (reason == "")


@needs_gpu
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "int32", "int64"])
def test_data_survives_the_way_to_the_device_and_back(dtype: str, pinned: bool) -> None:
    values = np.random.default_rng(0).integers(0, 100, (19, 99)).astype(dtype)
    tensor = NATIVE.Tensor(dtype, values.shape, pinned)
    assert tensor.owns
    tensor.copy_from(values)
    assert np.array_equal(tensor.to_numpy(), values)
    with pytest.raises(ValueError, match="dtype or size"):
        tensor.copy_from(values[:-1])


@needs_gpu
def test_torch_sees_the_same_memory_through_both_protocols() -> None:
    torch = pytest.importorskip("torch")
    tensor = NATIVE.Tensor("float32", [3, 5])
    tensor.copy_from(np.arange(15, dtype=np.float32))
    for view in (torch.from_dlpack(tensor), torch.as_tensor(tensor, device="cuda")):
        assert view.data_ptr() == tensor.data and view.shape == (3, 5)
        view[1, 2] += 1
    torch.cuda.synchronize()
    assert tensor.to_numpy()[1, 2] == 9


@needs_gpu
@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", np.uint16(0x3FC0)), ("float8_e4m3fn", np.uint8(0x3C))])
def test_types_that_numpy_lacks_cross_by_dlpack_and_outlive_their_python_name(dtype: str, bits: Any) -> None:
    torch = pytest.importorskip("torch")
    tensor = NATIVE.Tensor(dtype, [4])
    with pytest.raises(AttributeError, match=f"no {dtype}; use DLPack"):
        tensor.__cuda_array_interface__
    tensor.copy_from(np.full(4, bits))
    view = torch.from_dlpack(tensor)
    assert view.dtype == getattr(torch, dtype) and view.data_ptr() == tensor.data
    del tensor
    assert view.float().tolist() == [1.5] * 4


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint8", "int32", "int64"])
def test_a_view_of_a_torch_tensor_is_its_memory_and_keeps_it(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    source = torch.arange(3 * 99, device="cuda").remainder(7).view(3, 99).to(getattr(torch, dtype))
    expected = source.float().cpu()
    view = NATIVE.Tensor.view(source)
    assert not view.owns and view.data == source.data_ptr() and (view.dtype, view.shape) == (dtype, (3, 99))
    before = torch.cuda.memory_allocated()
    del source
    assert torch.cuda.memory_allocated() == before
    back = torch.from_dlpack(view)
    del view
    assert torch.equal(back.float().cpu(), expected)
    del back
    assert torch.cuda.memory_allocated() < before


class OnlyInterface:
    """An array of a library that has __cuda_array_interface__ and no DLPack."""

    def __init__(self, **interface: Any) -> None:
        self.__cuda_array_interface__ = {"version": 3, **interface}


@needs_gpu
@pytest.mark.parametrize("protocol", ["dlpack", "interface"])
def test_a_view_waits_for_what_the_arrays_library_still_computes(protocol: str) -> None:
    torch = pytest.importorskip("torch")
    array = torch.zeros(989, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: without an order the copy below comes first
        array.fill_(7)
        producer = array
        if protocol == "interface":
            interface = dict(array.__cuda_array_interface__, stream=side.cuda_stream)
            producer = OnlyInterface(**interface)
        view = NATIVE.Tensor.view(producer)
    assert np.all(view.to_numpy() == 7)


@needs_gpu
def test_what_would_need_a_copy_or_is_ambiguous_is_refused() -> None:
    tensor = NATIVE.Tensor("int32", [2])
    device = tensor.__dlpack_device__()
    assert device == (2, 0)
    for arguments in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError):
            tensor.__dlpack__(**arguments)
    with pytest.raises(ValueError, match="stream 0 is ambiguous"):
        tensor.__dlpack__(stream=0)
    tensor.__dlpack__(stream=1, copy=False, dl_device=device, max_version=(1, 3))


@needs_gpu
def test_a_consumer_gets_the_version_that_it_understands_and_an_unused_capsule_lets_go() -> None:
    tensor = NATIVE.Tensor("int32", [2])
    references = sys.getrefcount(tensor)
    for arguments, name in (({}, '"dltensor"'), ({"max_version": (0, 8)}, '"dltensor"'), ({"max_version": (1, 0)}, '"dltensor_versioned"')):
        capsule = tensor.__dlpack__(**arguments)
        assert name in repr(capsule)
        assert sys.getrefcount(tensor) == references + 1
        del capsule
        assert sys.getrefcount(tensor) == references


@needs_gpu
def test_numpy_shares_pinned_memory() -> None:
    tensor = NATIVE.Tensor("float32", [19], True)
    array = np.from_dlpack(tensor)
    assert array.ctypes.data == tensor.data
    tensor.copy_from(np.arange(19, dtype=np.float32))
    assert np.array_equal(array, np.arange(19))


def test_an_interface_is_viewed_only_when_dense_and_writable() -> None:
    good = {"shape": (3, 5), "typestr": "<f4", "data": (4096, False), "strides": None, "stream": None}
    view = NATIVE.Tensor.view(OnlyInterface(**good))
    assert (view.data, view.dtype, view.shape, view.owns) == (4096, "float32", (3, 5), False)
    assert NATIVE.Tensor.view(OnlyInterface(**{**good, "strides": (20, 4)})).num_bytes == 60
    with pytest.raises(ValueError, match="not contiguous"):
        NATIVE.Tensor.view(OnlyInterface(**{**good, "strides": (40, 4)}))
    with pytest.raises(ValueError, match="read-only; copy it first"):
        NATIVE.Tensor.view(OnlyInterface(**{**good, "data": (4096, True)}))
    with pytest.raises(ValueError, match="dtype is float64; allowed are"):
        NATIVE.Tensor.view(OnlyInterface(**{**good, "typestr": "<f8"}))


def test_what_is_no_device_array_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="not in device memory"):
        NATIVE.Tensor.view(np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="neither __dlpack__ nor __cuda_array_interface__"):
        NATIVE.Tensor.view([1, 2])


@needs_gpu
def test_a_device_error_names_place_and_call_and_is_not_blamed_on_the_next_one() -> None:
    from edgellm_ros.errors import DeviceError

    with pytest.raises(DeviceError, match=r"memory.cpp:\d+: cudaMalloc.* failed: cudaErrorMemoryAllocation"):
        NATIVE.Tensor("int8", [1 << 50])
    NATIVE.Tensor("int8", [16]).to_numpy()


@needs_gpu
def test_a_launch_that_fails_names_its_kernel() -> None:
    from edgellm_ros.errors import DeviceError

    x, gain, out = NATIVE.Tensor("float32", [0, 16]), NATIVE.Tensor("bfloat16", [16]), NATIVE.Tensor("bfloat16", [0, 16])
    with pytest.raises(DeviceError, match=r"launch.hpp:\d+: the launch of .*rms_norm_kernel.* failed: cudaErrorInvalid"):
        NATIVE.kernels.rms_norm(x, gain, 1e-5, out)  # a grid of no blocks
    NATIVE.Tensor("int8", [16]).to_numpy()


@needs_gpu
def test_every_allocation_is_counted() -> None:
    device, pinned = NATIVE.allocation_count()
    tensors = [NATIVE.Tensor("int8", [16]), NATIVE.Tensor("int8", [16], True)]
    assert NATIVE.allocation_count() == (device + 1, pinned + 1)
    del tensors


@needs_gpu
def test_reading_is_measured_in_a_plausible_range() -> None:
    assert 20 < NATIVE.measure_read_bandwidth(1 << 28) < 20_000
