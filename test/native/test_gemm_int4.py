"""Products of many tokens with int4 weights as they are stored, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_case import (
    AWKWARD,
    NATIVE,
    NO_MODULE,
    K,
    assert_untouched,
    make_weight,
    needs_gpu,
    poisoned,
    random_bf16,
    stream,
    torch,
)

TILES = K.GEMM_INT4_TILES if NATIVE is not None else ()
WHOLE = [i for i, (_, _, split) in enumerate(TILES) if not split]  # all sum in the same order
SPLIT = [i for i, (_, _, split) in enumerate(TILES) if split]
TOKENS = (1, 2, 31, 64, 65, 129, 300)


def product(weight: Any, x: Any, tile: int = -1, gate_up: bool = False, pdl: bool = False) -> Any:
    y = poisoned(len(x), weight.view[3], dtype=torch.bfloat16)
    K.gemm_int4(weight.view, gate_up, x, y, tile, stream=stream(), pdl=pdl)
    assert_untouched(y)
    return y


def assert_product(y: Any, x: Any, weight: Any) -> None:
    """Only the result is rounded to bf16; sums are in fp32."""
    wanted = x.double() @ weight.values.T
    sums = x.double().abs() @ weight.values.abs().T
    assert bool(((y.double() - wanted).abs() <= wanted.abs() * 2**-8 + sums * 2**-18).all())


@needs_gpu
@pytest.mark.parametrize(
    ("cols", "group"),
    [(16, 16), (112, 16), (1072, 16), (96, 32), (320, 32), (1056, 32), (576, 64), (1024, 128)],  # up to 17 stages
)
@pytest.mark.parametrize("rows", [*AWKWARD, 40, 136])
def test_every_tile_multiplies_what_the_weights_stand_for(rows: int, cols: int, group: int) -> None:
    weight = make_weight("int4", rows, cols, group)
    for tokens in TOKENS:
        x = random_bf16(tokens, cols)
        first = product(weight, x, 0)
        assert_product(first, x, weight)
        for tile in WHOLE[1:]:
            assert torch.equal(product(weight, x, tile), first), (tokens, tile)


HOPPER, ADA = 227 * 1024, 99 * 1024  # bytes of shared memory a block


def fits(tile: int, group: int = 64) -> bool:
    """Tiles of 64 tokens need more shared memory than every GPU has."""
    return not TILES[tile][2] or K.has_gemm_int4_split(TILES[tile][1], group)


@needs_gpu
@pytest.mark.parametrize(
    ("cols", "group"),
    [(32, 32), (96, 32), (1056, 32), (64, 64), (576, 64), (4160, 64), (128, 128), (1024, 128), (5504, 128)],
)
@pytest.mark.parametrize("rows", [*AWKWARD, 40, 136])
@pytest.mark.parametrize("tile", SPLIT)
def test_every_split_tile_multiplies_what_the_weights_stand_for(tile: int, rows: int, cols: int, group: int) -> None:
    """From warps without a share to some that have several rounds."""
    if not fits(tile):
        pytest.skip("this GPU has no room for the tile")
    weight, most = make_weight("int4", rows, cols, group), TILES[tile][1]
    for tokens in {1, 9, most - 3, most}:
        x = random_bf16(tokens, cols)
        y = product(weight, x, tile)
        assert_product(y, x, weight)
        assert torch.equal(product(weight, x, tile), y), "not the same bits again"


@needs_gpu
@pytest.mark.parametrize("tile", SPLIT)
def test_a_split_tile_that_is_asked_for_is_what_multiplies(tile: int) -> None:
    """Its sums have another order than the others', so some of many results are rounded otherwise."""
    if not fits(tile):
        pytest.skip("this GPU has no room for the tile")
    weight, x = make_weight("int4", 4096, 4096, 64), random_bf16(TILES[tile][1], 4096)
    assert not torch.equal(product(weight, x, tile), product(weight, x, WHOLE[0]))


@needs_gpu
@pytest.mark.parametrize("tokens", [9, 16, 17, 33, 64, 65])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_few_tokens_are_split_where_bits_may_depend_on_their_number(group: int, tokens: int) -> None:
    weight, x = make_weight("int4", 4096, 4096, group), random_bf16(tokens, 4096)
    kept, free = (poisoned(tokens, 4096, dtype=torch.bfloat16) for _ in range(2))
    K.gemm_int4(weight.view, False, x, kept, stream=stream())
    K.gemm_int4(weight.view, False, x, free, stream=stream(), row_invariant=False)
    assert torch.equal(kept, product(weight, x, 0))
    assert_product(free, x, weight)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    many = tokens > 32 and num_sms <= 64  # rows enough for other tiles
    assert torch.equal(free, kept) == (many or not K.has_gemm_int4_split(tokens, group))


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 16, 31, 64])
@pytest.mark.parametrize(("rows", "cols", "group"), [(1, 64, 64), (989, 576, 32), (4099, 1024, 128)])
def test_a_result_in_fp32_is_rounded_nowhere(rows: int, cols: int, group: int, tokens: int) -> None:
    if not K.has_gemm_int4_split(tokens, group):
        pytest.skip("this GPU has no room for the tile")
    weight, x = make_weight("int4", rows, cols, group), random_bf16(tokens, cols)
    y = poisoned(tokens, rows, dtype=torch.float32)
    K.gemm_int4(weight.view, False, x, y, stream=stream())
    assert_untouched(y)
    sums = x.double().abs() @ weight.values.abs().T
    assert bool(((y.double() - x.double() @ weight.values.T).abs() <= sums * 2**-18).all())


@needs_gpu
@pytest.mark.parametrize("half", [1, 19, 96, 1000])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_gate_and_up_rows_come_out_in_their_own_order(half: int, group: int) -> None:
    weight = make_weight("int4", 2 * half, 192, group, gate_up=True)
    for tokens in (3, 40, 200):
        x = random_bf16(tokens, 192)
        few = [tile for tile in SPLIT if tokens <= TILES[tile][1] and fits(tile, group)]
        for tile in (-1, *WHOLE, *few):
            assert_product(product(weight, x, tile, gate_up=True), x, weight)


@needs_gpu
@pytest.mark.parametrize("tile", [-1, *WHOLE])
def test_a_tokens_bits_do_not_depend_on_the_others(tile: int) -> None:
    weight = make_weight("int4", 400, 4160, 64)
    x = random_bf16(257, 4160)
    together = product(weight, x, tile)
    for first, last in ((0, 1), (5, 7), (100, 133), (0, 128), (200, 257)):
        assert torch.equal(product(weight, x[first:last].contiguous(), tile), together[first:last])


@needs_gpu
@pytest.mark.parametrize("tile", range(len(TILES)))
def test_a_product_waits_for_the_kernel_that_makes_its_input(tile: int) -> None:
    """With programmatic dependent launch: both start at once."""
    if not fits(tile):
        pytest.skip("this GPU has no room for the tile")
    weights = [make_weight("int4", 4096, 4096, 64) for _ in range(2)]
    num_tokens = TILES[tile][1] if TILES[tile][2] else 90
    x = random_bf16(num_tokens, 4096)
    between = product(weights[0], x, tile)
    wanted = product(weights[1], between, tile)
    for _ in range(5):
        y, z = (poisoned(num_tokens, 4096, dtype=torch.bfloat16) for _ in range(2))
        torch.cuda.synchronize()
        K.gemm_int4(weights[0].view, False, x, y, tile, stream=stream(), pdl=True)
        K.gemm_int4(weights[1].view, False, y, z, tile, stream=stream(), pdl=True)
        assert torch.equal(y, between) and torch.equal(z, wanted)


@needs_gpu
@pytest.mark.parametrize("row_invariant", [True, False])
def test_one_large_number_and_what_is_not_finite_stay_in_their_token(row_invariant: bool) -> None:
    weight = make_weight("int4", 128, 256, 32)
    x = random_bf16(64, 256)
    x[3, 7], x[20, 250], x[41, 0] = 1e30, float("inf"), float("nan")
    others = [i for i in range(64) if i not in (20, 41)]
    y = poisoned(64, 128, dtype=torch.bfloat16)
    K.gemm_int4(weight.view, False, x, y, stream=stream(), row_invariant=row_invariant)
    assert_product(y[others], x[others], weight)
    assert not bool(torch.isfinite(y[41]).any())
    assert not bool(torch.isfinite(y[20][weight.values[:, 250] != 0]).any())


@needs_gpu
def test_what_the_binding_refuses() -> None:
    weight = make_weight("int4", 32, 64, 32)
    x, y = random_bf16(2, 64), random_bf16(2, 32)
    with pytest.raises(ValueError, match=f"tile is {len(TILES)}"):
        K.gemm_int4(weight.view, False, x, y, len(TILES))
    with pytest.raises(ValueError, match="more than the tile's 16 tokens"):
        K.gemm_int4(weight.view, False, random_bf16(17, 64), random_bf16(17, 32), SPLIT[0])
    with pytest.raises(ValueError, match="not for groups of 16"):
        K.gemm_int4(make_weight("int4", 32, 64, 16).view, False, x, y, SPLIT[0])
    with pytest.raises(ValueError, match="not bf16, as this product's must be"):
        K.gemm_int4(weight.view, False, random_bf16(65, 64), torch.empty(65, 32, device="cuda"))
    with pytest.raises(ValueError, match="not int4"):
        K.gemm_int4(make_weight("int8", 32, 64, 32).view, False, x, y)
    with pytest.raises(ValueError, match="odd number of rows"):
        K.gemm_int4(make_weight("int4", 33, 64, 32).view, True, x, random_bf16(2, 33))
    with pytest.raises(ValueError, match="y"):
        K.gemm_int4(weight.view, False, x, random_bf16(2, 31))


# What was fastest on an H200 (132 multiprocessors), by bench_gemm_int4.py, of an 8B model's products.
FASTEST = [
    (6144, 32, (64, 32)), (6144, 64, (64, 64)), (6144, 128, (128, 64)), (6144, 256, (128, 128)), (6144, 512, (128, 64)),
    (4096, 32, (64, 32)), (4096, 64, (64, 32)), (4096, 128, (64, 64)), (4096, 256, (128, 64)), (4096, 512, (128, 128)),
    (28672, 32, (64, 32)), (28672, 64, (128, 64)), (28672, 128, (128, 128)), (28672, 256, (128, 64)),
    (28672, 512, (128, 128)), (28672, 2048, (128, 128)),
]  # fmt: skip


@pytest.mark.skipif(NATIVE is None, reason=str(NO_MODULE))
@pytest.mark.parametrize(("rows", "tokens", "tile"), FASTEST)
def test_the_tile_that_was_fastest_is_chosen(rows: int, tokens: int, tile: tuple[int, int]) -> None:
    assert TILES[K.choose_gemm_int4_tile(tokens, rows, 132, True)] == (*tile, False)


@pytest.mark.skipif(NATIVE is None, reason=str(NO_MODULE))
@pytest.mark.parametrize("rows", [2048, 6144, 28672])
def test_a_split_tile_has_all_tokens_and_is_left_where_others_are_faster(rows: int) -> None:
    for tokens in (1, 9, 16, 17, 32, 33, 64):
        chosen = K.choose_gemm_int4_split(tokens, rows, 64, 132, HOPPER)
        if tokens > 32 and rows == 28672:
            assert chosen == -1
        else:
            assert TILES[chosen][2] and tokens <= TILES[chosen][1] < max(17, 2 * tokens)
    assert K.choose_gemm_int4_split(65, rows, 64, 132, HOPPER) == -1


@pytest.mark.skipif(NATIVE is None, reason=str(NO_MODULE))
def test_split_tiles_are_for_groups_and_gpus_that_have_them() -> None:
    for tokens in (9, 32):
        assert K.choose_gemm_int4_split(tokens, 4096, 16, 132, HOPPER) == -1, "groups of 16"
        for group in (32, 64, 128):
            for num_sms, shared_bytes in ((132, HOPPER), (128, ADA), (16, 163 * 1024)):  # H100, RTX 4090, Orin
                assert TILES[K.choose_gemm_int4_split(tokens, 4096, group, num_sms, shared_bytes)][2]
    assert TILES[K.choose_gemm_int4_split(64, 4096, 64, 132, HOPPER)] == (32, 64, True)
    assert K.choose_gemm_int4_split(64, 4096, 64, 128, ADA) == -1, "no room"
    assert K.choose_gemm_int4_split(33, 4096, 64, 16, 163 * 1024) == -1, "enough rows for Orin's 16 multiprocessors"


@pytest.mark.skipif(NATIVE is None, reason=str(NO_MODULE))
@pytest.mark.parametrize(("num_sms", "two_fit"), [(8, True), (16, True), (20, True), (128, False)])
def test_other_gpus_get_large_tiles_for_long_prompts_and_small_ones_for_few_tokens(num_sms: int, two_fit: bool) -> None:
    for rows in (2048, 4096, 6144, 28672):
        assert TILES[K.choose_gemm_int4_tile(2048, rows, num_sms, two_fit)] == (128, 128, False)
        assert TILES[K.choose_gemm_int4_tile(17, rows, num_sms, two_fit)][1] <= 64
