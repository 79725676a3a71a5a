"""EdgeLLMAttention run through TensorRT's plugin interface, against fp64: decode, prompts, trees, padding, CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from kernel_case import needs_gpu, poisoned, stream, torch
from plugin_case import BF16, FP8, HALF, INT8, Plugin, attention_tensors, query_type
from rounding_ties import attended_alike

pytestmark = needs_gpu
CAPACITY, EPS = 300, 1e-6
SHAPES = [(64, 9, 3), (80, 4, 4), (96, 6, 2), (128, 16, 2), (256, 4, 1)]  # head_dim, heads, kv_heads
LEFT_OUT = -1
# Weights are rounded to bf16 there: half a unit, 2^-9, of a sum of values of up to 8.
ATOL = 1.6e-2


def torch_type(kind: int) -> Any:
    return {HALF: torch.float16, BF16: torch.bfloat16}[kind]


class Layer:
    """An attention plugin with its cache, tables and gains; positions of the cache that nobody wrote are NaN."""

    def __init__(
        self, shape: tuple[int, int, int], prefixes: Sequence[int], kind: int = HALF, cache: int | None = None,
        window: int = 0, normed: bool = False, tree: bool = False, attach: bool = False,
    ) -> None:  # fmt: skip
        self.dim, self.heads, self.kv_heads = shape
        self.kind, self.cache_kind, self.window = kind, kind if cache is None else cache, window
        self.settings: dict[str, int | float] = {
            "num_heads": self.heads, "num_kv_heads": self.kv_heads, "head_dim": self.dim, "scale": self.dim**-0.5,
            "window": window, "qk_norm": int(normed), "norm_eps": EPS, "tree": int(tree),
        }  # fmt: skip
        self.plugin = Plugin("EdgeLLMAttention", self.settings)
        if attach:
            self.plugin.reread()
            self.plugin.attach()
        angles = torch.arange(CAPACITY, dtype=torch.float64)[:, None] * 0.03 ** torch.linspace(0, 1, self.dim // 2)
        self.tables = [torch.cos(angles).float().cuda(), torch.sin(angles).float().cuda()]
        self.gains = [(torch.randn(self.dim) + 1).to(torch.bfloat16).float().cuda() for _ in range(2 * normed)]
        self.prefixes = list(prefixes)
        kv = torch.randn((len(prefixes), 2, self.kv_heads, CAPACITY, self.dim), device="cuda")
        for b, prefix in enumerate(prefixes):
            kv[b, :, :, prefix:] = float("nan")
        eight = self.cache_kind in (FP8, INT8)
        self.kv = kv.to(torch.float8_e4m3fn).view(torch.int8) if eight else kv.to(torch_type(kind))

    def bits(self) -> Any:
        """The cache as integers, of which a NaN equals itself."""
        return self.kv if self.kv.dtype == torch.int8 else self.kv.view(torch.int16)

    def plain(self) -> Any:
        """The cache in fp64."""
        return (self.kv.view(torch.float8_e4m3fn).float() if self.kv.dtype == torch.int8 else self.kv).double()

    def prepare(self, tokens: int, ids: Any = None, masks: Any = None) -> None:
        """Inputs, outputs and workspace of a step; nothing is launched."""
        batch, width = len(self.prefixes), (self.heads + 2 * self.kv_heads) * self.dim
        self.qkv = (torch.randn((batch, tokens, width), device="cuda") * 2).to(torch_type(self.kind))
        self.writes = torch.tensor(self.prefixes, device="cuda", dtype=torch.int64)
        self.ids = self.writes[:, None] + torch.arange(tokens, device="cuda")[None] if ids is None else ids
        self.out = poisoned(batch * tokens, self.heads * self.dim, dtype=torch_type(self.kind))
        self.extra = [] if not self.settings["tree"] else [masks if masks is not None else torch.zeros_like(self.ids)]
        self.ins, self.outs = attention_tensors(
            self.settings, batch, tokens, CAPACITY, type=self.kind, cache=self.cache_kind
        )
        size = self.plugin.workspace(self.ins, self.outs)
        self.workspace = torch.full((size + 4096,), 0xFF, dtype=torch.uint8, device="cuda")  # never zeros
        self.workspace_bytes = size
        self.plugin.shape_change(self.ins, self.outs)
        self.before = self.bits().clone()

    def launch(self) -> None:
        tensors = [self.qkv, self.kv, self.ids, self.writes, *self.tables, *self.gains, *self.extra, self.out, self.kv]
        self.plugin.enqueue(
            self.ins, self.outs, [t.data_ptr() for t in tensors], self.workspace.data_ptr(), stream()
        )  # fmt: skip

    def run(self, tokens: int, **given: Any) -> Any:
        """(batch, tokens, heads, head_dim) fp64, after checking that nothing behind output and workspace was written."""
        self.prepare(tokens, **given)
        self.launch()
        return self.result(tokens)

    def result(self, tokens: int) -> Any:
        torch.cuda.synchronize()
        assert bool(torch.isnan(self.out._base[-1]).all())
        assert bool((self.workspace[self.workspace_bytes :] == 0xFF).all())
        self.after = self.plain()
        return self.out.view(len(self.prefixes), tokens, self.heads, self.dim).double()

    def split(self, b: int, s: int) -> Any:
        """Query, key and value heads of a token in fp64, as the engine gives them."""
        heads = self.qkv[b, s].double().view(-1, self.dim)
        return heads.split([self.heads, self.kv_heads, self.kv_heads])

    def rotate(self, x: Any, position: int, gain: Any) -> Any:
        if self.gains:
            x = x * torch.rsqrt((x * x).mean(1, keepdim=True) + EPS) * gain.double()
        c, s = (table[position].double() for table in self.tables)
        low, high = x.chunk(2, dim=1)
        return torch.cat([low * c - high * s, high * c + low * s], dim=1)

    def check_attended(self, out: Any, b: int, s: int, position: int, seen: Sequence[int]) -> None:
        """`out` (heads, head_dim) is the attention of token s, turned by `position`, over the cache's places `seen`."""
        turned = self.rotate(self.split(b, s)[0], position, self.gains[0] if self.gains else None)
        rounded = query_type(self.cache_kind, self.qkv.shape[1], bool(self.settings["tree"]))
        group = self.heads // self.kv_heads
        keys, values = (self.after[b, i][:, list(seen)].repeat_interleave(group, 0) for i in range(2))

        def attend(q: Any) -> Any:
            weights = torch.softmax(torch.einsum("hd,hpd->hp", q, keys) * self.dim**-0.5, dim=1)
            return torch.einsum("hp,hpd->hd", weights, values)

        to = None if rounded is None else torch_type(rounded)
        assert attended_alike(out, turned, to, attend, rtol=2**-6, atol=ATOL), (b, s, list(seen))

    def check_written(self, b: int, s: int, place: int, position: int) -> None:
        _, key, value = self.split(b, s)
        rtol, atol = {FP8: (2**-4, 2**-9), INT8: (2**-4, 2**-9), BF16: (2**-8, 1e-5), HALF: (2**-10, 1e-5)}[self.cache_kind]
        got = self.after[b, :, :, place]
        assert torch.allclose(got[0], self.rotate(key, position, self.gains[1] if self.gains else None), rtol=rtol, atol=atol)
        assert torch.allclose(got[1], value, rtol=rtol, atol=atol)

    def check_left_alone(self, count: Sequence[int]) -> None:
        """All of the cache but the count[b] places behind a sequence's prefix is what it was before the step."""
        now, wanted = self.bits(), self.before.clone()
        for b, prefix in enumerate(self.prefixes):
            places = slice(prefix, prefix + count[b])
            wanted[b, :, :, places] = now[b, :, :, places]
        assert torch.equal(now, wanted)

    def check_causal(self, out: Any, tokens: int, count: Sequence[int] | None = None) -> None:
        """Each token of a decode step or a prompt; count[b] of them are there, the others' outputs are zeros."""
        there = [tokens] * len(self.prefixes) if count is None else list(count)
        self.check_left_alone(there)
        for b, prefix in enumerate(self.prefixes):
            for s in range(tokens):
                if s >= there[b]:
                    assert bool((out[b, s] == 0).all())
                    continue
                at = prefix + s
                self.check_written(b, s, at, at)
                first = max(0, at + 1 - self.window) if self.window else 0
                self.check_attended(out[b, s], b, s, at, range(first, at + 1))


KINDS = [(HALF, None), (BF16, None), (HALF, FP8), (BF16, FP8), (HALF, INT8)]


@pytest.mark.parametrize(("kind", "cache"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normed", [False, True])
def test_decode(shape: tuple[int, int, int], kind: int, cache: int | None, normed: bool) -> None:
    layer = Layer(shape, [0, 1, 19, 99, 299], kind, cache, normed=normed, attach=True)
    layer.check_causal(layer.run(1), 1)


def test_decode_of_more_sequences_than_the_kernel_takes_at_once() -> None:
    layer = Layer((64, 4, 2), [7 * i for i in range(19)])
    layer.check_causal(layer.run(1), 1)


@pytest.mark.parametrize(("kind", "cache"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [2, 19, 99])
def test_prompts(shape: tuple[int, int, int], kind: int, cache: int | None, tokens: int) -> None:
    layer = Layer(shape, [0, 101], kind, cache, normed=shape[0] == 128)
    layer.check_causal(layer.run(tokens), tokens)


@pytest.mark.parametrize("window", [1, 16, 50])
@pytest.mark.parametrize("tokens", [1, 33])
def test_a_window_hides_what_lies_before_it(window: int, tokens: int) -> None:
    layer = Layer((64, 9, 3), [0, 40, 200], window=window)
    layer.check_causal(layer.run(tokens), tokens)


def test_steps_follow_each_other_in_one_cache() -> None:
    layer = Layer((64, 9, 3), [0, 5], normed=True)
    for tokens in (17, 1, 1, 8, 1):
        layer.check_causal(layer.run(tokens), tokens)
        layer.prefixes = [prefix + tokens for prefix in layer.prefixes]


@pytest.mark.parametrize("kind", [HALF, BF16])
@pytest.mark.parametrize("tokens", [1, 9])
def test_negative_ids_end_a_sequence_and_full_caches_take_no_more(kind: int, tokens: int) -> None:
    layer = Layer((64, 9, 3), [30, CAPACITY - 4, CAPACITY, 11], kind)
    ids = torch.tensor(layer.prefixes, device="cuda")[:, None] + torch.arange(tokens, device="cuda")[None]
    ids[0, tokens // 2 :] = LEFT_OUT
    ids[3, 0] = LEFT_OUT
    layer.check_causal(layer.run(tokens, ids=ids), tokens, [tokens // 2, min(4, tokens), 0, 0])


def tree_of(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [-1] + [int(torch.randint(0, i, (1,), generator=generator)) for i in range(1, count)]


@pytest.mark.parametrize(("kind", "cache"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 19, 64])
def test_trees_see_the_prefix_and_their_ancestors(
    shape: tuple[int, int, int], kind: int, cache: int | None, count: int
) -> None:
    check_tree(Layer(shape, [0, 77], kind, cache, tree=True, normed=shape[0] == 80), count)


@pytest.mark.parametrize("window", [1, 3, 50])
def test_a_window_hides_what_lies_before_it_along_a_trees_path(window: int) -> None:
    check_tree(Layer((64, 9, 3), [0, 77], window=window, tree=True), 19)


def check_tree(layer: Layer, count: int) -> None:
    parents = tree_of(count, count)
    paths: list[list[int]] = []
    for i, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), i])
    depths = torch.tensor([len(path) - 1 for path in paths], device="cuda")
    words = [sum(1 << j for j in path) for path in paths]
    words = [word - (1 << 64) if word >> 63 else word for word in words]
    ids = torch.tensor(layer.prefixes, device="cuda")[:, None] + depths[None]
    out = layer.run(count, ids=ids, masks=torch.tensor([words, words], device="cuda"))
    layer.check_left_alone([count, count])
    for b, prefix in enumerate(layer.prefixes):
        for i, path in enumerate(paths):
            position = prefix + len(path) - 1
            layer.check_written(b, i, prefix + i, position)
            oldest = max(0, position - layer.window + 1) if layer.window else 0
            seen = [*range(oldest, prefix), *(prefix + j for depth, j in enumerate(path) if prefix + depth >= oldest)]
            layer.check_attended(out[b, i], b, i, position, seen)


@pytest.mark.parametrize("tokens", [1, 65])
def test_with_tree_single_tokens_and_long_prompts_are_causal(tokens: int) -> None:
    layer = Layer((64, 9, 3), [0, 77], tree=True)
    layer.check_causal(layer.run(tokens), tokens)


@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize("tree", [False, True])
def test_a_captured_graph_reads_its_inputs_anew_each_time(tokens: int, tree: bool) -> None:
    layer = Layer((128, 8, 2), [13, 60], tree=tree)
    chain = torch.tensor([(1 << (i + 1)) - 1 for i in range(tokens)], device="cuda")
    layer.prepare(tokens, masks=chain[None].repeat(2, 1))
    fresh = layer.kv.clone()
    layer.launch()  # what is done once, such as asking for shared memory, is done before capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.launch()
    for prefixes in ([13, 60], [60, 13]):
        layer.kv.copy_(fresh)
        for b, prefix in enumerate(prefixes):
            layer.kv[b, :, :, :prefix] = torch.randn_like(layer.kv[b, :, :, :prefix].float()).to(layer.kv.dtype)
            layer.kv[b, :, :, prefix:] = float("nan")
        layer.prefixes = prefixes
        layer.writes.copy_(torch.tensor(prefixes))
        layer.ids.copy_(layer.writes[:, None] + torch.arange(tokens, device="cuda")[None])
        layer.qkv.copy_(torch.randn_like(layer.qkv))
        layer.out.fill_(float("nan"))
        layer.before = layer.bits().clone()
        graph.replay()
        layer.check_causal(layer.result(tokens), tokens)


@pytest.mark.alone
def test_enqueue_takes_no_device_memory() -> None:
    layer = Layer((64, 9, 3), [30])
    for tokens in (1, 64):
        layer.prepare(tokens)
        layer.launch()
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        for _ in range(50):
            layer.launch()
        torch.cuda.synchronize()
        assert torch.cuda.mem_get_info()[0] == free
