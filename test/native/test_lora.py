"""LoRA: A x, and B (A x) added by every GEMV kernel and epilogue, with another adapter or none a token, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_case import K, activate, assert_untouched, make_weight, needs_gpu, poisoned, random_bf16, stream, torch
from test_gemv import EPS, FORMATS, allowed, num_tiles, reference

pytestmark = needs_gpu
# Ranks of three targets, one list an adapter; a kernel sees ranks that are padded to multiples of 8.
RANKS = [[8, 0, 64], [64, 64, 64], [0, 16, 0], [0, 0, 0], [40, 8, 16]]
TOKENS = {1: [2], 2: [0, 1], 5: [1, 1, 3, 0, 5], 8: [5, 2, 0, 4, 1, 3, 2, 0], 16: [1, 0, 2, 3] * 4}
TARGETS = {1: (1,), 19: (11, 5, 3), 99: (60, 38, 1), 989: (500, 489)}  # rows that a layer's targets have


class Adapters:
    """Random adapters of one layer with `rows` of each target, and the table of them on the device."""

    def __init__(self, rows: tuple[int, ...], cols: int) -> None:
        self.rows = rows
        self.stride = 64 * len(rows)
        self.parts: list[list[tuple[Any, Any]]] = []
        self._kept: list[Any] = []
        self.entries: list[bytes] = []
        for ranks in RANKS:
            ranks = ranks[: len(rows)]
            part = [
                (random_bf16(rank, cols, scale=cols**-0.5), random_bf16(count, rank, scale=0.5))
                for rank, count in zip(ranks, rows, strict=True)
            ]
            a = torch.cat([a for a, _ in part])
            b = torch.cat([b.flatten() for _, b in part])
            self.parts.append(part)
            self._kept += [a, b]
            self.entries.append(K.lora_linear(a, b, list(rows), ranks))
        self.table = torch.frombuffer(bytearray(b"".join(self.entries)), dtype=torch.uint8).view(len(RANKS), -1).cuda()

    def view(self, adapters: list[int]) -> tuple[Any, Any, Any]:
        """What the bindings take; h is poisoned, so that reading what was not computed shows."""
        ids = torch.tensor(adapters, dtype=torch.int32, device="cuda")
        return self.table, ids, poisoned(len(adapters), self.stride, dtype=torch.float32)

    def h(self, x: Any, adapter: int) -> Any:
        """(sum of ranks) fp64 A x of one token."""
        return torch.cat([a.double() @ x for a, _ in self.parts[adapter - 1]])

    def delta(self, x: Any, adapters: list[int]) -> Any:
        """(num_tokens, rows) fp64 of x (num_tokens, cols)."""
        out = torch.zeros((len(adapters), sum(self.rows)), dtype=torch.float64, device="cuda")
        for token, adapter in enumerate(adapters):
            if adapter:
                parts = self.parts[adapter - 1]
                out[token] = torch.cat([b.double() @ (a.double() @ x[token]) for a, b in parts])
        return out


@pytest.mark.parametrize("tokens", list(TOKENS))
@pytest.mark.parametrize("cols", [16, 96, 576, 2048, 9728, 16400])
@pytest.mark.parametrize("normed", [False, True])
def test_each_token_meets_its_own_adapters_a(tokens: int, cols: int, normed: bool) -> None:
    adapters, ids = Adapters((11, 5, 3), cols), TOKENS[tokens]
    x, gain = random_bf16(tokens, cols, scale=3.0), random_bf16(cols) if normed else None
    view = adapters.view(ids)
    K.lora_down(view, x, gain=gain, norm_eps=EPS, stream=stream())
    seen = x.double()
    if gain is not None:
        seen = seen * torch.rsqrt((seen * seen).mean(1, keepdim=True) + EPS) * gain.double()
    for token, adapter in enumerate(ids):
        width = sum(RANKS[adapter - 1]) if adapter else 0
        got = view[2][token]
        assert bool(torch.isnan(got[width:]).all()), "what no adapter has is left as it was"
        if width:
            error = (got[:width].double() - adapters.h(seen[token], adapter)).abs().max()
            assert float(error) <= 1e-5 * float(seen[token].norm()) + 1e-6, (token, float(error))
    assert_untouched(view[2])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", list(TOKENS))
@pytest.mark.parametrize(("cols", "group"), [(96, 32), (576, 64), (2048, 128)])
@pytest.mark.parametrize("normed", [False, True])
def test_every_tile_adds_each_tokens_adapter(form: str, tokens: int, cols: int, group: int, normed: bool) -> None:
    ids = TOKENS[tokens]
    for rows, targets in TARGETS.items():
        adapters, weight = Adapters(targets, cols), make_weight(form, rows, cols, group)
        x, gain = random_bf16(tokens, cols), random_bf16(cols) if normed else None
        seen, product = reference(weight, x, gain)
        delta = adapters.delta(seen, ids)
        assert float(delta.abs().max()) > 0.1 or rows == 1, "an adapter that adds nothing tests nothing"
        view = adapters.view(ids)
        K.lora_down(view, x, gain=gain, norm_eps=EPS, stream=stream())
        limit = allowed(weight, seen, normed) + 1e-5 * seen.norm(dim=1)[:, None] + 1e-5
        for tile in (-1, *range(num_tiles(weight, tokens))):
            out = poisoned(tokens, rows, dtype=torch.float32)
            K.gemv(weight.view, x, out, gain=gain, norm_eps=EPS, tile=tile, stream=stream(), lora=view)
            error = (out.double() - product - delta).abs()
            assert bool((error <= limit).all()), (rows, tile, float(error.max()))
            assert_untouched(out)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [((2000, 1300, 1000), 576), ((60, 38, 1), 9728)])
def test_a_batch_invariant_token_with_an_adapter_has_the_same_bits_alone_and_among_others(
    form: str, rows: tuple[int, ...], cols: int
) -> None:
    """Many rows, too: their blocks have more of them for several tokens, whose lanes share the ranks another way."""
    adapters, weight = Adapters(rows, cols), make_weight(form, sum(rows), cols)
    ids = [1, 2, 5, 3, 5, 2, 1, 0]
    x = random_bf16(len(ids), cols)
    seen, product = reference(weight, x)
    limit = allowed(weight, seen, False) + 1e-5 * seen.norm(dim=1)[:, None] + 1e-5
    for tile in (-1, *range(int(K.gemv_num_tiles(weight.view, 1, batch_invariant=True)))):

        def run(tokens: slice, tile: int = tile) -> Any:
            """(tokens, rows)"""
            view, own = adapters.view(ids[tokens]), x[tokens].contiguous()
            out = poisoned(len(own), sum(rows), dtype=torch.float32)
            K.lora_down(view, own, stream=stream())
            K.gemv(weight.view, own, out, tile=tile, batch_invariant=True, stream=stream(), lora=view)
            return out

        alone = torch.cat([run(slice(i, i + 1)) for i in range(len(ids))])
        assert bool(((alone.double() - product - adapters.delta(seen, ids)).abs() <= limit).all()), tile
        for tokens in (slice(0, 2), slice(1, 6), slice(0, 8)):
            assert torch.equal(run(tokens), alone[tokens]), (tile, tokens)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 8])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_swiglu_adds_to_gate_and_up_rows_of_an_interleaved_weight(activation: str, form: str, tokens: int) -> None:
    epilogue = K.Epilogue.swiglu if activation == "silu" else K.Epilogue.geglu
    ids = TOKENS[tokens]
    for half in (1, 19, 99, 989):
        adapters, weight = Adapters((half, half), 576), make_weight(form, 2 * half, 576, gate_up=True)
        x, gain, bias = random_bf16(tokens, 576), random_bf16(576), torch.randn(2 * half, device="cuda")
        seen, y = reference(weight, x, gain)
        y = y + bias.double() + adapters.delta(seen, ids)
        gate, up = y[:, :half], y[:, half:]
        wanted = activate(activation, gate) * up
        limit = 2e-2 * (gate.abs() + up.abs() + 1) + 1e-2 * wanted.abs()  # of 1 to 2e-2 in gate and up
        view = adapters.view(ids)
        K.lora_down(view, x, gain=gain, norm_eps=EPS, stream=stream())
        for tile in range(num_tiles(weight, tokens)):
            out = poisoned(tokens, half, dtype=torch.bfloat16)
            K.gemv(
                weight.view, x, out, epilogue, gain=gain, norm_eps=EPS, bias=bias, tile=tile, stream=stream(), lora=view,
            )  # fmt: skip
            assert bool(((out.double() - wanted).abs() <= limit).all()), (half, tile)
            assert_untouched(out)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_the_residual_the_bf16_store_and_the_logits_hold_the_sum(form: str, tokens: int) -> None:
    ids = TOKENS[tokens]
    for rows, targets in TARGETS.items():
        adapters, weight = Adapters(targets, 576), make_weight(form, rows, 576)
        x, bias = random_bf16(tokens, 576), torch.randn(rows, device="cuda")
        residual = torch.randn((tokens, rows), device="cuda")
        seen, product = reference(weight, x)
        wanted = product + bias.double() + adapters.delta(seen, ids)
        limit = allowed(weight, seen, False) + 1e-5 * seen.norm(dim=1)[:, None] + 1e-5
        view = adapters.view(ids)
        K.lora_down(view, x, stream=stream())
        for tile in range(num_tiles(weight, tokens)):
            more = {"bias": bias, "tile": tile, "stream": stream(), "lora": view}
            out, copy = residual.clone(), poisoned(tokens, rows, dtype=torch.bfloat16)
            K.gemv(weight.view, x, out, K.Epilogue.residual, out_bf16=copy, **more)
            assert bool(((out.double() - wanted - residual.double()).abs() <= limit).all()), (rows, tile)
            assert torch.equal(copy, out.to(torch.bfloat16))
            full, short = (poisoned(tokens, rows, dtype=d) for d in (torch.float32, torch.bfloat16))
            keys = poisoned(tokens, K.gemv_num_blocks(weight.view, tokens, tile=tile), dtype=torch.int64)
            K.gemv(weight.view, x, full, K.Epilogue.logits, block_max=keys, **more)
            K.gemv(weight.view, x, short, K.Epilogue.store_bf16, **more)
            assert bool(((full.double() - wanted).abs() <= limit).all()), (rows, tile)
            assert torch.equal(short, full.to(torch.bfloat16))
            ids_of_maxima = 0xFFFFFFFF - (keys.cpu().numpy().view("uint64").max(axis=1) & 0xFFFFFFFF)
            assert ids_of_maxima.tolist() == full.cpu().numpy().argmax(axis=1).tolist(), (rows, tile)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 8])
def test_tokens_without_an_adapter_get_the_bits_that_they_get_alone(form: str, tokens: int) -> None:
    adapters, weight, x = Adapters((60, 38, 1), 576), make_weight(form, 99, 576), random_bf16(tokens, 576)
    ids = [0] * tokens if tokens == 1 else TOKENS[8]
    view = adapters.view(ids)
    K.lora_down(view, x, stream=stream())
    for tile in range(num_tiles(weight, tokens)):
        plain, mixed = (poisoned(tokens, 99, dtype=torch.float32) for _ in range(2))
        K.gemv(weight.view, x, plain, tile=tile, stream=stream())
        K.gemv(weight.view, x, mixed, tile=tile, stream=stream(), lora=view)
        for token, adapter in enumerate(ids):
            same = torch.equal(plain[token], mixed[token])
            assert same == (adapter == 0 or not sum(RANKS[adapter - 1])), (tile, token)


@pytest.mark.parametrize("form", FORMATS)
def test_a_chain_with_dependent_launch_gives_what_one_without_gives(form: str) -> None:
    cols = 2048
    weights = [make_weight(form, cols, cols) for _ in range(4)]
    layers = [Adapters((1000, 1040, 8), cols) for _ in range(4)]
    views = [layer.view([2]) for layer in layers]
    views = [(table, ids, views[0][2]) for table, ids, _ in views]  # one h for all layers, as in a decoder
    start = random_bf16(1, cols)
    results = []
    for pdl in (False, True):
        residual, x, y = start.float(), start.clone(), torch.empty_like(start)
        for _ in range(20):
            for i, (weight, view) in enumerate(zip(weights, views, strict=True)):
                K.lora_down(view, x, stream=stream(), pdl=pdl and i > 0)
                K.gemv(weight.view, x, residual, K.Epilogue.residual, out_bf16=y, stream=stream(), pdl=pdl, lora=view)
                x, y = y, x
            residual *= 2.0**-8  # keeps the numbers in range
            x *= 2.0**-8
        results.append(residual.clone())
    assert bool(torch.isfinite(results[0]).all()) and torch.equal(*results)


@pytest.mark.parametrize("tokens", [2, 17, 64, 99, 513])
@pytest.mark.parametrize("cols", [16, 80, 576, 9728])
@pytest.mark.parametrize("rows", [(8,), (64, 24, 16), (1000, 1000), (4096,)])
def test_a_prompt_adds_its_adapter_to_every_targets_rows(tokens: int, cols: int, rows: tuple[int, ...]) -> None:
    adapters, x = Adapters(rows, cols), random_bf16(tokens, cols)
    before = random_bf16(tokens, sum(rows))
    for adapter, entry in enumerate(adapters.entries, 1):
        width = sum(RANKS[adapter - 1][: len(rows)])
        if not width:
            continue
        y = poisoned(tokens, sum(rows), dtype=torch.bfloat16)
        y.copy_(before)
        h = poisoned(tokens, width, dtype=torch.bfloat16)
        K.lora_prefill(entry, list(rows), x, h, y, stream=stream())
        parts = adapters.parts[adapter - 1]
        delta = torch.cat([(x.double() @ a.double().T) @ b.double().T for a, b in parts], 1)
        wanted = before.double() + delta
        # h is rounded to 2^-9 of itself, its errors add up as independent ones do; then y is rounded.
        squares = [((x.double() @ a.double().T) ** 2) @ (b.double() ** 2).T for a, b in parts]
        spread = torch.cat(squares, 1).sqrt() * 2.0**-9 * 6
        limit = spread + wanted.abs() * 2.0**-8 + 1e-3
        assert bool(((y.double() - wanted).abs() <= limit).all()), (adapter, float((y.double() - wanted).abs().max()))
        assert_untouched(y)
        assert_untouched(h)
        untouched = [i for i, rank in enumerate(RANKS[adapter - 1][: len(rows)]) if not rank]
        for i in untouched:
            start = sum(rows[:i])
            assert torch.equal(y[:, start : start + rows[i]], before[:, start : start + rows[i]])


def test_a_prompts_tokens_get_the_same_bits_however_it_is_cut() -> None:
    rows = (320, 128, 64)
    adapters, x, before = Adapters(rows, 576), random_bf16(200, 576), random_bf16(200, 512)
    whole, cut = before.clone(), before.clone()
    for y, cuts in ((whole, [(0, 200)]), (cut, [(0, 64), (64, 67), (67, 200)])):
        for start, end in cuts:
            h = poisoned(end - start, 192, dtype=torch.bfloat16)
            K.lora_prefill(adapters.entries[1], list(rows), x[start:end], h, y[start:end], stream=stream())
    assert torch.equal(whole, cut) and not torch.equal(whole, before)


def test_arrays_that_do_not_fit_are_refused_by_name() -> None:
    table, ids, h = Adapters((19,), 64).view([1])
    x = random_bf16(1, 64)
    with pytest.raises(ValueError, match=r"adapters has shape \[1\], not \[2\]"):
        K.lora_down((table, ids, h), random_bf16(2, 64))
    with pytest.raises(ValueError, match=r"linears has shape \[5, 40\], not \[any, 48\]"):
        K.lora_down((table[:, :40].contiguous(), ids, h), x)
    with pytest.raises(ValueError, match="h must have a multiple of 4 columns"):
        K.lora_down((table, ids, h[:, :62].contiguous()), x)
    with pytest.raises(ValueError, match="multiples of 8 up to 64"):
        K.lora_linear(random_bf16(5, 64), random_bf16(5 * 19).flatten(), [19], [5])
