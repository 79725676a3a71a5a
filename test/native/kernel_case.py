"""What the kernel tests share: the module or why they skip, weights in every format with what they stand for, poison."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from edgellm_ros import native

NATIVE, NO_MODULE = native.import_module()
NO_GPU = NO_MODULE or native.unavailable_reason()
needs_gpu = pytest.mark.skipif(bool(NO_GPU), reason=str(NO_GPU))
torch: Any = None
if not NO_GPU:
    try:
        import torch  # type: ignore[no-redef]
    except ImportError:
        needs_gpu = pytest.mark.skip(reason="torch is not installed")
K: Any = getattr(NATIVE, "kernels", None)

AWKWARD = (1, 19, 99, 989)
POISON = 77  # of integers


class Weight(NamedTuple):
    """`view` is what the bindings take; `values` (rows, cols) fp64 is what it stands for."""

    view: tuple[Any, ...]
    values: Any


def stream() -> int:
    """The stream that torch's work of this thread is on."""
    return int(torch.cuda.current_stream().cuda_stream)


def poisoned(*shape: int, dtype: Any) -> Any:
    """A tensor of NaN (or POISON) with one more row behind it, which `assert_untouched` looks at."""
    full = torch.empty((shape[0] + 1, *shape[1:]), dtype=dtype, device="cuda")
    full.fill_(float("nan") if dtype.is_floating_point else POISON)
    return full[: shape[0]]


def assert_untouched(tensor: Any) -> None:
    """The row behind a poisoned tensor still holds its poison."""
    last = tensor._base[-1]
    assert bool(torch.isnan(last).all() if last.dtype.is_floating_point else (last == POISON).all())


def random_bf16(*shape: int, scale: float = 1.0) -> Any:
    return (torch.randn(shape, device="cuda") * scale).to(torch.bfloat16)


def activate(name: str, gate: Any) -> Any:
    """What edgellm's Activation of this name makes of an MLP's gate."""
    functional = torch.nn.functional
    return functional.silu(gate) if name == "silu" else functional.gelu(gate, approximate="tanh")


def fp8_values(data: Any, scales: Any) -> Any:
    return data.view(torch.float8_e4m3fn).double() * scales.double()[:, None]


def assert_fp8(data: Any, scales: Any, wanted: Any) -> None:
    """Three bits of mantissa, each row's largest number at 448."""
    largest = wanted.abs().amax(1)
    assert torch.allclose(scales.double(), largest / 448, rtol=2**-7)
    slack = wanted.abs() / 14 + scales.double()[:, None] * 2**-9
    assert bool(((fp8_values(data, scales) - wanted).abs() <= slack).all())


def product_scales(tokens: int, width: int) -> tuple[Any, Any]:
    return torch.rand(tokens, device="cuda") + 0.5, torch.rand(width, device="cuda") + 0.1


def make_weight(form: str, rows: int, cols: int, group: int = 64, gate_up: bool = False) -> Weight:
    """A random weight of `form`, repacked for the kernels where that is needed."""
    fmt = getattr(NATIVE.WeightFormat, form)
    dense = torch.randn((rows, cols), device="cuda") / cols**0.5
    if form in ("bf16", "fp16"):
        data = dense.to(torch.bfloat16 if form == "bf16" else torch.float16)
        return Weight((fmt, data, None, rows, cols, 0), data.double())
    if form == "fp8":
        scales = dense.abs().amax(1) / 448
        data = (dense / scales[:, None]).to(torch.float8_e4m3fn)
        return Weight(
            (fmt, data.view(torch.uint8), scales, rows, cols, 0), data.float().double() * scales.double()[:, None]
        )
    if form == "fp8_blocks":  # a row's part of a block
        if group < 64 or cols % group:
            pytest.skip("blocks have 64 or 128 columns")
        scales = dense.view(rows, -1, group).abs().amax(2) / 448
        wide = scales.repeat_interleave(group, 1)
        data = (dense / wide).to(torch.float8_e4m3fn)
        return Weight(
            (fmt, data.view(torch.uint8), scales, rows, cols, group), data.float().double() * wide.double()
        )  # fmt: skip
    if form == "int8_offset":  # 4 bits and their minimum, as GGUF has them, in int8
        grouped = dense.view(rows, cols // group, group)
        low, high = grouped.amin(2), grouped.amax(2)
        pair = torch.stack([(high - low) / 15, low + 8 * (high - low) / 15], 2).to(torch.float16)
        ints = ((grouped - pair[..., 1:].float()) / pair[..., :1].float().clamp_min(1e-7)).round().clamp(-8, 7)
        values = (ints.double() * pair[..., :1].double() + pair[..., 1:].double()).view(rows, cols)
        return Weight((fmt, ints.to(torch.int8).view(rows, cols), pair, rows, cols, group), values)
    limit = 127 if form == "int8" else 7
    grouped = dense.view(rows, cols // group, group)
    scales = (grouped.abs().amax(2) / limit).to(torch.float16)
    ints = (grouped / scales.float()[:, :, None]).round().clamp(-limit - 1, limit).to(torch.int8)
    values = (ints.double() * scales.double()[:, :, None]).view(rows, cols)
    ints = ints.view(rows, cols)
    if form == "int8":
        return Weight((fmt, ints, scales, rows, cols, group), values)
    nibbles = (ints[:, 0::2].to(torch.uint8) & 15) | ((ints[:, 1::2].to(torch.uint8) & 15) << 4)
    data = torch.full((K.int4_packed_data_bytes(rows, cols),), 0xAB, dtype=torch.uint8, device="cuda")
    packed = torch.full((K.int4_packed_scales_bytes(rows, cols, group),), 0xAB, dtype=torch.uint8, device="cuda")
    K.repack_int4(nibbles.contiguous(), scales, group, gate_up, data, packed, stream=stream())
    return Weight((fmt, data, packed, rows, cols, group), values)
