"""A DLPack capsule of any producer is taken, checked and released exactly once: producers made by hand, no GPU needed."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest

from edgellm_ros import native

NATIVE, NO_MODULE = native.import_module()
pytestmark = pytest.mark.skipif(bool(NO_MODULE), reason=NO_MODULE)

CUDA, BF16, READ_ONLY = 2, (4, 16, 1), 1
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Plain(ctypes.Structure):
    """DLManagedTensor: before version 1."""

    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", DELETER)]


class Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


class Producer:
    """Exports address 4096 as a bf16 array; `releases` counts the calls of its deleter."""

    def __init__(
        self,
        shape: tuple[int, ...] = (3, 5),
        strides: tuple[int, ...] | None = None,
        dtype: tuple[int, int, int] = BF16,
        versioned: bool = True,
        version: tuple[int, int] = (1, 1),
        flags: int = 0,
        device: int = CUDA,
    ) -> None:
        self.releases, self.streams, self.versioned = 0, [], versioned
        self.managed: Any = Versioned(*version, flags=flags) if versioned else Plain()
        self.managed.deleter = self._deleter = DELETER(self._release)
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = (ctypes.c_int64 * len(shape))(*strides) if strides else None
        self.managed.tensor = DLTensor(4096, device, 0, len(shape), *dtype, self._shape, self._strides, 32)

    def _release(self, _: int) -> None:
        self.releases += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, **arguments: Any) -> object:
        if not self.versioned and "max_version" in arguments:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.streams.append(arguments["stream"])
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        return new_capsule(ctypes.addressof(self.managed), name, None)


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("strides", [None, (5, 1)])
def test_a_dense_array_is_viewed_where_it_is_and_released_once(
    versioned: bool, strides: tuple[int, ...] | None
) -> None:
    producer = Producer(versioned=versioned, strides=strides)
    view = NATIVE.Tensor.view(producer, stream=2)
    assert (view.data, view.dtype, view.shape, view.owns) == (4096 + 32, "bfloat16", (3, 5), False)
    assert producer.streams == [2]
    view.reshape([15])
    gc.collect()
    assert producer.releases == 0
    del view
    gc.collect()
    assert producer.releases == 1


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [({}, 1), ({"stream": None}, 1), ({"stream": 1}, 1), ({"stream": 2}, 2), ({"stream": 1 << 46}, 1 << 46), ({"stream": -1}, -1)],
)
def test_the_legacy_default_stream_waits_unless_another_or_none_is_named(arguments: dict[str, Any], asked: int) -> None:
    producer = Producer()
    NATIVE.Tensor.view(producer, **arguments)
    assert producer.streams == [asked]


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (0, "stream 0 is ambiguous; 1 is the legacy default stream, 2 the per-thread default one"),
        (-2, "stream is -2; allowed are None, -1 .no synchronisation., 1, 2 and a stream's address"),
    ],
)
def test_a_stream_that_the_protocol_does_not_have_is_refused_before_the_producer_is_asked(stream: int, message: str) -> None:
    producer = Producer()
    with pytest.raises(ValueError, match=message):
        NATIVE.Tensor.view(producer, stream=stream)
    assert producer.streams == []
    with pytest.raises(TypeError, match="incompatible function arguments"):
        NATIVE.Tensor.view(producer, stream="1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flags": READ_ONLY}, "read-only; copy it first"),
        ({"strides": (1, 3)}, "not contiguous"),
        ({"dtype": (2, 64, 1)}, "DLPack type .2, 64 bits."),
        ({"dtype": (2, 32, 4)}, "vector type"),
        ({"device": 1}, "not in device memory"),
        ({"shape": (1,) * 7}, "rank 7 exceeds 6"),
    ],
)
def test_what_a_tensor_cannot_be_is_refused_and_released(options: dict[str, Any], message: str) -> None:
    producer = Producer(**options)
    with pytest.raises(ValueError, match=message):
        NATIVE.Tensor.view(producer)
    gc.collect()
    assert producer.releases == 1


def test_a_later_major_version_is_refused_untouched() -> None:
    producer = Producer(version=(2, 0))
    with pytest.raises(ValueError, match="DLPack version 2; 0 and 1 are understood"):
        NATIVE.Tensor.view(producer)
    assert producer.releases == 0  # its layout is unknown: its deleter cannot be called


def test_a_stride_of_a_dimension_of_one_means_nothing() -> None:
    assert NATIVE.Tensor.view(Producer(shape=(1, 5), strides=(77, 1))).shape == (1, 5)


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize(
    ("shape", "strides"),
    # first what a Tensor's own export says, then products of the extents, then other orders
    [((2, 0, 3), (3, 3, 1)), ((2, 0, 3), (0, 3, 1)), ((0, 5), (5, 1)), ((3, 0), (1, 1)), ((3, 0), (1, 3)), ((0,), (7,))],
)
def test_the_strides_of_an_empty_array_mean_nothing(
    shape: tuple[int, ...], strides: tuple[int, ...], versioned: bool
) -> None:
    producer = Producer(shape=shape, strides=strides, versioned=versioned)
    view = NATIVE.Tensor.view(producer)
    assert (view.shape, view.num_bytes) == (shape, 0)
    del view
    gc.collect()
    assert producer.releases == 1


def test_a_producers_own_error_passes_through() -> None:
    class Refusing(Producer):
        def __dlpack__(self, **arguments: Any) -> object:
            raise BufferError("it requires a gradient")

    with pytest.raises(BufferError, match="it requires a gradient"):
        NATIVE.Tensor.view(Refusing())
