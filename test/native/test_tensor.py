"""Tensors own or borrow, reshape in place, and cross to other CUDA libraries without a copy."""

from __future__ import annotations

import re
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


GOOD = {"shape": (3, 5), "typestr": "<f4", "data": (4096, False), "strides": None, "stream": None}


class OnlyInterface:
    """An array of a library that has __cuda_array_interface__ and no DLPack."""

    def __init__(self, **interface: Any) -> None:
        self.__cuda_array_interface__ = {"version": 3, **interface}


@needs_gpu
@pytest.mark.parametrize("arguments", [{}, {"stream": None}, {"stream": 1}, {"stream": -1}])
@pytest.mark.parametrize("protocol", ["dlpack", "interface"])
def test_a_view_waits_for_what_the_arrays_library_still_computes_unless_told_not_to(
    protocol: str, arguments: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    array = torch.zeros(989, device="cuda")
    array.fill_(7).zero_()  # its kernel is loaded now, not behind the spin
    torch.cuda.synchronize()
    side, filled = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: without an order the copy below comes first
        array.fill_(7)
        filled.record(side)
        producer = array
        if protocol == "interface":
            interface = dict(array.__cuda_array_interface__, stream=side.cuda_stream)
            producer = OnlyInterface(**interface)
        view = NATIVE.Tensor.view(producer, **arguments)
    copy = view.to_numpy()
    if arguments.get("stream") != -1:
        assert np.all(copy == 7)
    elif not filled.query():  # a host that was held up copies afterwards
        assert np.all(copy == 0)
    torch.cuda.synchronize()
    assert np.all(view.to_numpy() == 7)


@needs_gpu
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5), (0,), (3, 0)])
def test_an_empty_tensor_comes_back_as_it_went(shape: tuple[int, ...]) -> None:
    tensor = NATIVE.Tensor("float32", shape)
    interface = OnlyInterface(**tensor.__cuda_array_interface__)
    for view in (NATIVE.Tensor.view(tensor), NATIVE.Tensor.view(interface)):
        assert (view.data, view.dtype, view.shape) == (tensor.data, "float32", shape)
        assert NATIVE.Tensor.view(view).shape == shape
        assert view.to_numpy().shape == shape


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
    view = NATIVE.Tensor.view(OnlyInterface(**GOOD))
    assert (view.data, view.dtype, view.shape, view.owns) == (4096, "float32", (3, 5), False)
    assert NATIVE.Tensor.view(OnlyInterface(**{**GOOD, "strides": (20, 4)})).num_bytes == 60
    with pytest.raises(ValueError, match="not contiguous"):
        NATIVE.Tensor.view(OnlyInterface(**{**GOOD, "strides": (40, 4)}))
    with pytest.raises(ValueError, match="read-only; copy it first"):
        NATIVE.Tensor.view(OnlyInterface(**{**GOOD, "data": (4096, True)}))
    with pytest.raises(ValueError, match="dtype is float64; allowed are"):
        NATIVE.Tensor.view(OnlyInterface(**{**GOOD, "typestr": "<f8"}))


@pytest.mark.parametrize(("shape", "strides"), [((2, 0, 3), (12, 12, 4)), ((2, 0, 3), (0, 12, 4)), ((3, 0), (4, 4)), ((0,), (28,))])
def test_the_strides_of_an_empty_interface_mean_nothing(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    view = NATIVE.Tensor.view(OnlyInterface(**{**GOOD, "shape": shape, "strides": strides, "data": (0, False)}))
    assert (view.shape, view.num_bytes) == (shape, 0)


def test_a_byte_order_counts_only_where_there_are_several_bytes() -> None:
    native_order, other = ("<", ">") if sys.byteorder == "little" else (">", "<")
    for code, dtype in (("f4", "float32"), ("f2", "float16"), ("i4", "int32"), ("i8", "int64")):
        assert NATIVE.Tensor.view(OnlyInterface(**{**GOOD, "typestr": native_order + code})).dtype == dtype
        message = rf"typestr is {other}{code}; allowed is this machine's byte order, {native_order}{code}"
        with pytest.raises(ValueError, match=message):
            NATIVE.Tensor.view(OnlyInterface(**{**GOOD, "typestr": other + code}))
    for order in "|<>":
        assert NATIVE.Tensor.view(OnlyInterface(**{**GOOD, "typestr": f"{order}i1"})).dtype == "int8"
        assert NATIVE.Tensor.view(OnlyInterface(**{**GOOD, "typestr": f"{order}u1"})).dtype == "uint8"


def test_a_mask_is_refused_and_none_is_no_mask() -> None:
    assert NATIVE.Tensor.view(OnlyInterface(**GOOD, mask=None)).shape == (3, 5)
    mask = OnlyInterface(**{**GOOD, "typestr": "|u1"})
    with pytest.raises(ValueError, match=r"mask is a .*OnlyInterface; allowed is None"):
        NATIVE.Tensor.view(OnlyInterface(**GOOD, mask=mask))


@pytest.mark.parametrize("strides", [(), (4,), (60, 20, 4)])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5)])
def test_strides_must_be_as_many_as_the_dimensions(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    message = re.escape(f"strides are {strides} for shape {shape}; allowed are None or one for each dimension")
    with pytest.raises(ValueError, match=message):
        NATIVE.Tensor.view(OnlyInterface(**{**GOOD, "shape": shape, "strides": strides}))


@pytest.mark.parametrize("name", ["shape", "typestr", "data"])
def test_a_field_that_every_interface_has_is_missed_by_name(name: str) -> None:
    fields = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(ValueError, match=f"__cuda_array_interface__ has no {name}; it must be "):
        NATIVE.Tensor.view(OnlyInterface(**fields))


def test_strides_and_stream_may_be_missing() -> None:
    fields = {name: GOOD[name] for name in ("shape", "typestr", "data")}
    assert NATIVE.Tensor.view(OnlyInterface(**fields)).shape == (3, 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("shape", 15), ("shape", (3.0, 5)), ("typestr", None), ("data", 4096), ("data", None), ("strides", 4), ("stream", "1"), ("stream", -1)],
)
def test_a_field_of_another_type_is_refused_with_its_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"__cuda_array_interface__ has {name} {re.escape(repr(value))}; it must be "):
        NATIVE.Tensor.view(OnlyInterface(**{**GOOD, name: value}))


@pytest.mark.parametrize("arguments", [{}, {"stream": None}, {"stream": -1}])
def test_an_arrays_stream_0_is_refused_even_by_who_does_not_wait(arguments: dict[str, Any]) -> None:
    message = "the array's stream 0 is ambiguous; 1 is the legacy default stream, 2 the per-thread default one"
    with pytest.raises(ValueError, match=message):
        NATIVE.Tensor.view(OnlyInterface(**{**GOOD, "stream": 0}), **arguments)


def test_streams_of_a_view_of_an_interface_are_the_protocols() -> None:
    for stream in (None, -1, 1, 2, 1 << 46):  # the array says that nothing is to be waited for
        assert NATIVE.Tensor.view(OnlyInterface(**GOOD), stream=stream).shape == (3, 5)
    with pytest.raises(ValueError, match="stream 0 is ambiguous"):
        NATIVE.Tensor.view(OnlyInterface(**GOOD), stream=0)
    with pytest.raises(ValueError, match="stream is -2; allowed are None, -1"):
        NATIVE.Tensor.view(OnlyInterface(**GOOD), stream=-2)


def test_minus_one_never_touches_the_arrays_stream() -> None:
    nowhere = OnlyInterface(**{**GOOD, "stream": 1 << 46})  # an event on it would fail, or worse
    assert NATIVE.Tensor.view(nowhere, stream=-1).shape == (3, 5)


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
