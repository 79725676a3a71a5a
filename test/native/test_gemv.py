"""y = W x in every format, tile, number of tokens, prologue and epilogue, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_case import (
    AWKWARD,
    K,
    Weight,
    activate,
    assert_untouched,
    make_weight,
    needs_gpu,
    poisoned,
    random_bf16,
    stream,
    torch,
)

pytestmark = needs_gpu
FORMATS = ["bf16", "fp16", "fp8", "int8", "int4", "int8_offset", "fp8_blocks"]
EPS = 1e-5


def allowed(weight: Weight, x: Any, normed: bool) -> Any:
    """(tokens, rows): rounding relative to the norms of the row and of x.

    A normed x is rounded once more, each element for itself: relative to the root of the products' squares, of which a
    sum of many is a small part. Of 11 million sums of 16 to 14,336 products, simulated with x times its gain rounded to
    bf16, none was off by more than 8.9e-3 of that root; with fp16 / 64 or int4's 15 bits instead, by 1.9e-3."""
    x = x.double()
    if normed:
        return 2.4e-2 * (x.square() @ weight.values.square().T).sqrt() + 1e-9
    return 4e-4 * x.norm(dim=1)[:, None] * weight.values.norm(dim=1)[None] + 1e-9


def reference(weight: Weight, x: Any, gain: Any = None) -> tuple[Any, Any]:
    """(x as it is multiplied, y) in fp64."""
    x = x.double()
    if gain is not None:
        x = x * torch.rsqrt((x * x).mean(1, keepdim=True) + EPS) * gain.double()
    return x, x @ weight.values.T


def num_tiles(weight: Weight, tokens: int) -> int:
    return int(K.gemv_num_tiles(weight.view, tokens))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 16])
@pytest.mark.parametrize(("cols", "group"), [(16, 16), (96, 32), (576, 64), (2048, 128), (9728, 64)])
@pytest.mark.parametrize("normed", [False, True])
def test_every_tile_gives_the_products(form: str, tokens: int, cols: int, group: int, normed: bool) -> None:
    for rows in AWKWARD if cols < 9728 else (99,):
        weight = make_weight(form, rows, cols, group)
        x = random_bf16(tokens, cols, scale=3.0)
        gain = random_bf16(cols) if normed else None
        seen, wanted = reference(weight, x, gain)
        for tile in (-1, *range(num_tiles(weight, tokens))):
            out = poisoned(tokens, rows, dtype=torch.float32)
            K.gemv(weight.view, x, out, gain=gain, norm_eps=EPS, tile=tile, stream=stream())
            error = (out.double() - wanted).abs()
            assert bool((error <= allowed(weight, seen, normed)).all()), (rows, tile, float(error.max()))
            assert_untouched(out)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_bias_and_residual_are_added_and_the_copy_is_the_sum(form: str, tokens: int) -> None:
    for rows in AWKWARD:
        weight = make_weight(form, rows, 576)
        x, bias = random_bf16(tokens, 576), torch.randn(rows, device="cuda")
        residual = torch.randn((tokens, rows), device="cuda")
        seen, product = reference(weight, x)
        wanted = residual.double() + product + bias.double()
        for tile in range(num_tiles(weight, tokens)):
            out, copy = residual.clone(), poisoned(tokens, rows, dtype=torch.bfloat16)
            K.gemv(
                weight.view, x, out, K.Epilogue.residual, bias=bias, out_bf16=copy, tile=tile, stream=stream()
            )  # fmt: skip
            assert bool(((out.double() - wanted).abs() <= allowed(weight, seen, False) + 1e-6).all()), (rows, tile)
            assert torch.equal(copy, out.to(torch.bfloat16))
            assert_untouched(copy)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_swiglu_and_geglu_pair_each_gate_row_with_its_up_row(
    activation: str, form: str, tokens: int, with_bias: bool
) -> None:
    epilogue = K.Epilogue.swiglu if activation == "silu" else K.Epilogue.geglu
    for half in AWKWARD:
        weight = make_weight(form, 2 * half, 576, gate_up=True)
        x, gain = random_bf16(tokens, 576), random_bf16(576)
        bias = torch.randn(2 * half, device="cuda") if with_bias else None
        _, y = reference(weight, x, gain)
        y = y + bias.double() if with_bias else y
        gate, up = y[:, :half], y[:, half:]
        wanted = activate(activation, gate) * up
        for tile in range(num_tiles(weight, tokens)):
            out = poisoned(tokens, half, dtype=torch.bfloat16)
            K.gemv(
                weight.view, x, out, epilogue, gain=gain, norm_eps=EPS, bias=bias, tile=tile, stream=stream()
            )  # fmt: skip
            assert torch.allclose(out.double(), wanted, rtol=4e-2, atol=2e-2), (half, tile)
            assert_untouched(out)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_the_block_maxima_hold_the_largest_logit_and_the_lowest_id_of_ties(form: str, tokens: int) -> None:
    for rows in AWKWARD:
        weight = make_weight(form, rows, 576)
        x = random_bf16(tokens, 576)
        if tokens > 1:
            x[-1] = 0  # all logits equal
        for tile in range(num_tiles(weight, tokens)):
            blocks = K.gemv_num_blocks(weight.view, tokens, tile=tile)
            keys = poisoned(tokens, blocks, dtype=torch.int64)
            out = poisoned(tokens, rows, dtype=torch.float32)
            K.gemv(weight.view, x, out, K.Epilogue.logits, block_max=keys, tile=tile, stream=stream())
            unsigned = keys.cpu().numpy().view("uint64")
            ids = 0xFFFFFFFF - (unsigned.max(axis=1) & 0xFFFFFFFF)
            assert ids.tolist() == out.cpu().numpy().argmax(axis=1).tolist(), (rows, tile)
            assert_untouched(keys)
            assert_untouched(out)


def test_bf16_output_is_the_rounded_sum() -> None:
    weight, x = make_weight("bf16", 99, 576), random_bf16(1, 576)
    full, short = (poisoned(1, 99, dtype=d) for d in (torch.float32, torch.bfloat16))
    K.gemv(weight.view, x, full, stream=stream())
    K.gemv(weight.view, x, short, K.Epilogue.store_bf16, stream=stream())
    assert torch.equal(short, full.to(torch.bfloat16))


@pytest.mark.parametrize("form", FORMATS)
def test_a_chain_with_dependent_launch_gives_what_one_without_gives(form: str) -> None:
    cols = 2048
    weights = [make_weight(form, cols, cols) for _ in range(6)]
    start = random_bf16(1, cols)
    results = []
    for pdl in (False, True):
        # Two buffers take turns: within one call, blocks that are done write while others still read.
        residual, x, y = start.float(), start.clone(), torch.empty_like(start)
        for _ in range(20):
            for weight in weights:
                K.gemv(weight.view, x, residual, K.Epilogue.residual, out_bf16=y, stream=stream(), pdl=pdl)
                x, y = y, x
            residual *= 2.0**-8  # keeps the numbers in range
            x *= 2.0**-8
        results.append(residual.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("rows", "cols", "group"),
    [(99, 576, 64), (3072, 2048, 128), (99, 96, 32), (35, 14336, 64), (4300, 4096, 64), (203, 2560, 128), (40, 9728, 64)],
)
def test_a_batch_invariant_token_has_the_same_bits_alone_and_among_others(
    form: str, rows: int, cols: int, group: int, normed: bool
) -> None:
    weight, x = make_weight(form, rows, cols, group), random_bf16(16, cols)
    gain = random_bf16(cols) if normed else None
    seen, wanted = reference(weight, x, gain)
    for tile in (-1, *range(int(K.gemv_num_tiles(weight.view, 1, batch_invariant=True)))):
        options: dict[str, Any] = {"gain": gain, "batch_invariant": True, "tile": tile, "stream": stream()}
        alone = poisoned(16, rows, dtype=torch.float32)
        for i in range(16):
            K.gemv(weight.view, x[i : i + 1], alone[i : i + 1], **options)
        assert bool(((alone.double() - wanted).abs() <= allowed(weight, seen, normed)).all()), tile
        for tokens in (2, 3, 4, 5, 8, 9, 16):
            for first in (0, 16 - tokens):
                out = poisoned(tokens, rows, dtype=torch.float32)
                K.gemv(weight.view, x[first : first + tokens], out, **options)
                assert torch.equal(out, alone[first : first + tokens]), (tile, tokens, first)
                assert_untouched(out)


@pytest.mark.parametrize(("rows", "cols"), [(99, 16), (203, 96), (3072, 2048), (35, 14336), (4300, 4096), (99, 9728)])
def test_an_x_in_fp32_is_multiplied_with_16_bits_alone_and_among_others(rows: int, cols: int) -> None:
    weight, gain = make_weight("bf16", rows, cols), random_bf16(cols)
    x_f32 = 3 * torch.randn((16, cols), device="cuda")
    x = x_f32.to(torch.bfloat16)
    seen, wanted = reference(weight, x_f32, gain)
    most = 2e-5 * seen.norm(dim=1)[:, None] * weight.values.norm(dim=1)[None] + 1e-9
    options: dict[str, Any] = {"gain": gain, "norm_eps": EPS, "stream": stream()}

    def run(tokens: slice, x_f32: Any = x_f32, **more: Any) -> Any:
        out = poisoned(len(x[tokens]), rows, dtype=torch.float32)
        K.gemv(weight.view, x[tokens], out, x_f32=None if x_f32 is None else x_f32[tokens], **options, **more)
        assert_untouched(out)
        return out

    narrow = float((run(slice(0, 16), None, batch_invariant=True).double() - wanted).square().mean())
    for invariant in (True, False):
        for tile in (-1, *range(int(K.gemv_num_tiles(weight.view, 1, batch_invariant=invariant)))):
            alone = torch.cat([run(slice(i, i + 1), batch_invariant=invariant, tile=tile) for i in range(16)])
            error = (alone.double() - wanted).abs()
            assert bool((error <= most).all()), (invariant, tile, float((error / most).max()))
            assert cols < 96 or float(error.square().mean()) < 0.01 * narrow
            for tokens in (2, 3, 5, 8, 9, 16) if invariant else ():
                assert torch.equal(run(slice(0, tokens), batch_invariant=True, tile=tile), alone[:tokens]), (tile, tokens)
    for tile in (-1, *range(int(K.gemv_num_tiles(weight.view, 8)))):
        assert bool(((run(slice(0, 8), tile=tile).double() - wanted[:8]).abs() <= most[:8]).all()), tile


@pytest.mark.parametrize("epilogue", ["swiglu", "logits"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_an_x_in_fp32_comes_before_any_epilogue(epilogue: str, tokens: int) -> None:
    rows = 2 * 99
    weight, gain = make_weight("bf16", rows, 576, gate_up=epilogue == "swiglu"), random_bf16(576)
    x_f32 = 3 * torch.randn((tokens, 576), device="cuda")
    _, y = reference(weight, x_f32, gain)
    for tile in range(int(K.gemv_num_tiles(weight.view, 1, batch_invariant=True))):
        options: dict[str, Any] = {"gain": gain, "norm_eps": EPS, "x_f32": x_f32, "tile": tile, "batch_invariant": True}
        if epilogue == "swiglu":
            out = poisoned(tokens, rows // 2, dtype=torch.bfloat16)
            K.gemv(weight.view, x_f32.to(torch.bfloat16), out, K.Epilogue.swiglu, stream=stream(), **options)
            wanted = activate("silu", y[:, : rows // 2]) * y[:, rows // 2 :]
            assert torch.allclose(out.double(), wanted, rtol=5e-3, atol=1e-3), tile  # the rounding of bf16
        else:
            blocks = K.gemv_num_blocks(weight.view, tokens, tile=tile, batch_invariant=True, normed=True)
            keys = poisoned(tokens, blocks, dtype=torch.int64)
            out = poisoned(tokens, rows, dtype=torch.float32)
            K.gemv(weight.view, x_f32.to(torch.bfloat16), out, K.Epilogue.logits, block_max=keys, stream=stream(), **options)
            largest = 0xFFFFFFFF - (keys.cpu().numpy().view("uint64").max(axis=1) & 0xFFFFFFFF)
            assert largest.tolist() == y.argmax(1).tolist() == out.argmax(1).tolist(), tile
            assert_untouched(keys)
        assert_untouched(out)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("epilogue", ["residual", "swiglu", "logits"])
def test_a_batch_invariant_token_has_the_same_epilogue_alone_and_among_others(form: str, epilogue: str) -> None:
    rows = 2 * 99
    weight, x, gain = make_weight(form, rows, 576, gate_up=epilogue == "swiglu"), random_bf16(16, 576), random_bf16(576)
    bias, residual = torch.randn(rows, device="cuda"), torch.randn((16, rows), device="cuda")
    for tile in range(int(K.gemv_num_tiles(weight.view, 1, batch_invariant=True))):
        options: dict[str, Any] = {"bias": bias, "batch_invariant": True, "tile": tile, "stream": stream()}

        def run(tokens: slice, options: dict[str, Any] = options) -> list[Any]:
            """The product's outputs, and of logits the largest token of each."""
            own = x[tokens].contiguous()
            count = len(own)
            if epilogue == "swiglu":
                out = poisoned(count, rows // 2, dtype=torch.bfloat16)
                K.gemv(weight.view, own, out, K.Epilogue.swiglu, gain=gain, norm_eps=EPS, **options)
                return [out]
            if epilogue == "residual":
                out, copy = residual[tokens].clone(), poisoned(count, rows, dtype=torch.bfloat16)
                K.gemv(weight.view, own, out, K.Epilogue.residual, out_bf16=copy, **options)
                return [out, copy]
            out = poisoned(count, rows, dtype=torch.float32)
            blocks = K.gemv_num_blocks(weight.view, count, tile=options["tile"], batch_invariant=True, normed=True)
            keys = poisoned(count, blocks, dtype=torch.int64)
            K.gemv(weight.view, own, out, K.Epilogue.logits, gain=gain, norm_eps=EPS, block_max=keys, **options)
            unsigned = keys.cpu().numpy().view("uint64")
            largest = 0xFFFFFFFF - (unsigned.max(axis=1) & 0xFFFFFFFF)
            assert largest.tolist() == out.cpu().numpy().argmax(axis=1).tolist()
            return [out]

        alone = [torch.cat(parts) for parts in zip(*(run(slice(i, i + 1)) for i in range(16)), strict=True)]
        for tokens in (slice(0, 2), slice(3, 8), slice(8, 16), slice(0, 16)):
            for mine, other in zip(run(tokens), alone, strict=True):
                assert torch.equal(mine, other[tokens]), (tile, tokens)


@pytest.mark.parametrize("form", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("epilogue", ["store_f32", "residual", "swiglu", "logits"])
@pytest.mark.parametrize("cols", [576, 2064])
def test_x_that_stays_for_several_tiles_of_rows_gives_the_bits_that_it_gives_alone(
    form: str, epilogue: str, cols: int
) -> None:
    """Of rows enough for three tiles a multiprocessor, and a part of one."""
    rows = 96 * torch.cuda.get_device_properties(0).multi_processor_count + 302
    weight, x, gain = make_weight(form, rows, cols, gate_up=epilogue == "swiglu"), random_bf16(16, cols), random_bf16(cols)
    bias, residual = torch.randn(rows, device="cuda"), torch.randn((16, rows), device="cuda")
    x_f32 = x.float() + 1e-3 * torch.randn((16, cols), device="cuda") if form == "bf16" else None
    gpu = torch.cuda.get_device_properties(0)
    planned = {"num_sms": gpu.multi_processor_count, "max_shared_bytes": gpu.shared_memory_per_block_optin}
    planned |= {"wide": form == "bf16", "normed": True, "batch_invariant": True, "num_tokens": 8}
    if K.plan_gemv(weight.view[0], rows, cols, **planned)["family"] != "resident":
        pytest.skip("a block of this GPU has no room for the x of eight tokens")

    def run(first: int, count: int, **options: Any) -> list[Any]:
        """The product's outputs, and of logits the largest token of each."""
        own = x[first : first + count].contiguous()
        options |= {"bias": bias, "gain": gain, "norm_eps": EPS, "stream": stream()}
        if x_f32 is not None:
            options["x_f32"] = x_f32[first : first + count].contiguous()
        if epilogue == "swiglu":
            out = poisoned(count, rows // 2, dtype=torch.bfloat16)
            K.gemv(weight.view, own, out, K.Epilogue.swiglu, **options)
            return [out]
        if epilogue == "residual":
            out, copy = residual[first : first + count].clone(), poisoned(count, rows, dtype=torch.bfloat16)
            K.gemv(weight.view, own, out, K.Epilogue.residual, out_bf16=copy, **options)
            return [out, copy]
        out, kind = poisoned(count, rows, dtype=torch.float32), getattr(K.Epilogue, epilogue)
        if epilogue == "store_f32":
            K.gemv(weight.view, own, out, kind, **options)
            return [out]
        shape = {name: options[name] for name in ("tile", "batch_invariant") if name in options}
        keys = poisoned(count, K.gemv_num_blocks(weight.view, count, kind, normed=True, **shape), dtype=torch.int64)
        K.gemv(weight.view, own, out, kind, block_max=keys, **options)
        largest = 0xFFFFFFFF - (keys.cpu().numpy().view("uint64").max(axis=1) & 0xFFFFFFFF)
        assert largest.tolist() == out.cpu().numpy().argmax(axis=1).tolist()
        assert_untouched(keys)
        return [out]

    for tile in (-1, *range(int(K.gemv_num_tiles(weight.view, 1, batch_invariant=True)))):
        each = [run(i, 1, tile=tile, batch_invariant=True) for i in range(16)]
        alone = [torch.cat(parts) for parts in zip(*each, strict=True)]
        for count in (2, 7, 8, 9, 16):
            among = run(0, count, tile=tile, batch_invariant=True)
            assert all(torch.equal(part, one[:count]) for part, one in zip(among, alone, strict=True)), (tile, count)
    seen, y = reference(weight, (x if x_f32 is None else x_f32)[:8], gain)
    if epilogue == "store_f32":
        for tile in range(num_tiles(weight, 8)):
            error = (run(0, 8, tile=tile)[0].double() - y - bias.double()).abs()
            assert bool((error <= allowed(weight, seen, True) + 1e-6).all()), (tile, float(error.max()))


@pytest.mark.parametrize("form", ["fp16", "fp8", "fp8_blocks", "int8", "int8_offset"])
@pytest.mark.parametrize("normed", [False, True])
def test_activations_in_fp16_have_the_range_and_the_precision_that_are_documented(normed: bool, form: str) -> None:
    """docs/cuda.md: scaled by 1/64, which leaves 65,504 x 64 = 4.19 million, and steps of 2^-24 x 64 = 3.8e-6.

    Simulated in fp64, the errors' norm is at most 1.44e-3 of the results' for numbers near 0.001 (where bf16 rounds by as
    much) and 1.1 to 1.45 % near 0.0001; with 1/128 at least 2.5e-3 and 2.2 %."""
    rows, cols = 989, 576
    weight, gain = make_weight(form, rows, cols), (1 - torch.rand(cols, device="cuda") / 8).to(torch.bfloat16)
    gain[77] = 1
    calls = [(2, False), (8, False), (16, False)]
    if form in ("fp16", "fp8"):  # the others are multiplied in fp32 there
        calls += [(1, True), (2, True), (8, True), (16, True)]
    for tokens, invariant in calls:
        tiles = K.gemv_num_tiles(weight.view, 1 if invariant else tokens, batch_invariant=invariant)
        for size, most in ((1e-3, 2.0**-9), (1e-4, 2e-2), (4e6, 2.0**-9), (5e6, None)):
            x = size * (1 - torch.rand((tokens, cols), device="cuda") / 4)
            x *= 2 * torch.randint(0, 2, (tokens, cols), device="cuda") - 1
            x[:, 77] = size
            x = x.to(torch.bfloat16)
            _, wanted = reference(weight, x, gain if normed else None)
            for tile in (-1, *range(int(tiles))):
                out = poisoned(tokens, rows, dtype=torch.float32)
                K.gemv(
                    weight.view, x, out, gain=gain if normed else None, norm_eps=EPS, tile=tile,
                    batch_invariant=invariant, stream=stream(),
                )  # fmt: skip
                assert_untouched(out)
                if most is None:
                    assert not bool(torch.isfinite(out).any()), (tokens, invariant, tile)
                    continue
                error = float((out.double() - wanted).norm() / wanted.norm())
                assert error <= most, (size, tokens, invariant, tile, error)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("normed", [False, True])
def test_what_is_not_finite_shows_in_the_result(form: str, bad: float, normed: bool) -> None:
    weight, x = make_weight(form, 99, 576), random_bf16(3, 576)
    x[1, 77] = bad
    for tokens in (slice(1, 2), slice(0, 3)):
        out = poisoned(len(x[tokens]), 99, dtype=torch.float32)
        gain = torch.ones(576, dtype=torch.bfloat16, device="cuda") if normed else None
        K.gemv(weight.view, x[tokens].contiguous(), out, gain=gain, stream=stream())
        finite = torch.isfinite(out).all(dim=1).tolist()
        assert finite == ([False] if len(finite) == 1 else [True, False, True])


def test_arrays_that_do_not_fit_are_refused_by_name() -> None:
    weight, x, out = make_weight("bf16", 19, 64), random_bf16(1, 64), torch.empty((1, 19), device="cuda")
    with pytest.raises(ValueError, match=r"x has shape \[1, 48\], not \[any, 64\]"):
        K.gemv(weight.view, x[:, :48].contiguous(), out)
    with pytest.raises(ValueError, match="x has DLPack type .*, not bfloat16"):
        K.gemv(weight.view, x.float(), out)
    with pytest.raises(ValueError, match="out is not in device memory"):
        K.gemv(weight.view, x, out.cpu())
    with pytest.raises(ValueError, match="x is not contiguous"):
        K.gemv(weight.view, random_bf16(2, 128)[:, ::2], torch.empty((2, 19), device="cuda"))
    with pytest.raises(ValueError, match="x_f32 is given, which only products of a norm with weights in bf16 take"):
        K.gemv(weight.view, x, out, x_f32=x.float())
    with pytest.raises(ValueError, match=r"x_f32 has shape \[2, 64\], not \[1, 64\]"):
        K.gemv(weight.view, x, out, x_f32=torch.zeros((2, 64), device="cuda"))
    with pytest.raises(ValueError, match="x has 17 tokens; 1 to 16"):
        K.gemv(weight.view, random_bf16(17, 64), torch.empty((17, 19), device="cuda"))
