"""Tensors own or borrow, reshape in place, and cross to other CUDA libraries without a copy."""

from __future__ import annotations

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
def test_bfloat16_crosses_by_dlpack_and_outlives_its_python_name() -> None:
    torch = pytest.importorskip("torch")
    tensor = NATIVE.Tensor("bfloat16", [4])
    with pytest.raises(AttributeError, match="no bfloat16; use DLPack"):
        tensor.__cuda_array_interface__
    view = torch.from_dlpack(tensor)
    assert view.dtype == torch.bfloat16
    view.fill_(1.5)
    del tensor
    assert view.tolist() == [1.5] * 4


@needs_gpu
def test_a_device_error_names_place_and_call_and_is_not_blamed_on_the_next_one() -> None:
    from edgellm_ros.errors import DeviceError

    with pytest.raises(DeviceError, match=r"memory.cpp:\d+: cudaMalloc.* failed: cudaErrorMemoryAllocation"):
        NATIVE.Tensor("int8", [1 << 50])
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
