"""EdgeLLMInt4Gemm and EdgeLLMInt8Gemm run through TensorRT's plugin interface, against fp64, at awkward sizes."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_case import AWKWARD, K, make_weight, needs_gpu, poisoned, stream, torch
from plugin_case import BF16, HALF, Plugin, gemm_tensors

pytestmark = needs_gpu
TOKENS = (1, 2, 16, 17, 99)
MOST_DECODED = 64  # tokens; more are a prompt, whose weights are rounded to bf16 and multiplied by cuBLASLt


class Product:
    """A plugin with a random weight, ready to be launched."""

    def __init__(
        self, bits: int, rows: int, cols: int, group: int, lead: tuple[int, ...], kind: int, bias: bool = False,
        float_output: bool = False,
    ) -> None:  # fmt: skip
        settings = {"rows": rows, "cols": cols, "group": group, "bias": int(bias), "float_output": int(float_output)}
        self.plugin = Plugin(f"EdgeLLMInt{bits}Gemm", settings)
        self.plugin.reread()
        self.ins, self.outs = gemm_tensors(bits, settings, lead, kind)
        self.plugin.shape_change(self.ins, self.outs)
        self.weight = make_weight(f"int{bits}", rows, cols, group)
        dtype = torch.float16 if kind == HALF else torch.bfloat16
        count = torch.Size(lead).numel()
        self.x = torch.randn((count, cols), device="cuda").to(dtype)
        self.bias = torch.randn(rows, device="cuda") if bias else None
        self.out = poisoned(count, rows, dtype=torch.float32 if float_output else dtype)
        size = self.plugin.workspace(self.ins, self.outs)
        self.workspace = torch.full((size + 4096,), 0xFF, dtype=torch.uint8, device="cuda")
        self.workspace_bytes = size

    def launch(self) -> None:
        tensors = [self.x, self.weight.view[1], self.weight.view[2], self.bias, self.out]
        addresses = [t.data_ptr() for t in tensors if t is not None]
        self.plugin.enqueue(self.ins, self.outs, addresses, self.workspace.data_ptr(), stream())

    def check(self) -> None:
        torch.cuda.synchronize()
        x = self.x.to(torch.bfloat16).double()  # the kernels multiply bf16
        wanted = x @ self.weight.values.T + (0 if self.bias is None else self.bias.double())
        # Sums of integers and their scales, then the output's own rounding.
        rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[self.out.dtype]
        scale = x.norm(dim=1)[:, None] * self.weight.values.norm(dim=1)[None]
        allowed = scale * 4e-4 + wanted.abs() * rounding + 1e-6
        if len(x) > MOST_DECODED:  # half a unit of 8 bits a weight, at random: six standard deviations of the sum
            allowed += (x.square() @ self.weight.values.square().T).sqrt() * 2**-9 * 6 / 3**0.5
        error = (self.out.double() - wanted).abs()
        assert bool((error <= allowed).all()), float((error - allowed).max())
        assert bool(torch.isnan(self.out._base[-1]).all())
        assert bool((self.workspace[self.workspace_bytes :] == 0xFF).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [HALF, BF16])
@pytest.mark.parametrize(("cols", "group"), [(96, 32), (576, 64), (2048, 128), (48, 16)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_products(bits: int, kind: int, cols: int, group: int, tokens: int) -> None:
    for rows in AWKWARD:
        product = Product(bits, rows, cols, group, (tokens,), kind)
        product.launch()
        product.check()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [HALF, BF16])
@pytest.mark.parametrize("float_output", [False, True])
@pytest.mark.parametrize("lead", [(3,), (2, 19), (1, 1), (2, 70)])
def test_bias_and_output_in_fp32(bits: int, kind: int, float_output: bool, lead: tuple[int, ...]) -> None:
    product = Product(bits, 99, 576, 64, lead, kind, bias=True, float_output=float_output)
    product.launch()
    product.check()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 40, 99])
def test_a_captured_graph_reads_its_inputs_anew_each_time(bits: int, tokens: int) -> None:
    product = Product(bits, 989, 576, 64, (tokens,), HALF)
    product.launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product.launch()
    for _ in range(2):
        product.x.copy_(torch.randn_like(product.x))
        product.out.fill_(float("nan"))
        graph.replay()
        product.check()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [HALF, BF16])
def test_long_prompts_are_cut_and_so_are_large_weights(bits: int, kind: int) -> None:
    """1,024 tokens and 8 MB of bf16 at a time: both have a rest."""
    product = Product(bits, 4500, 2048, 128, (1100,), kind, bias=True)
    product.launch()
    product.check()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_prompt_is_not_read_16_tokens_at_a_time(bits: int) -> None:
    """The last bits tell: in a prompt they are those of other sums, where cuBLASLt is found."""
    from edgellm_ros import native

    if reason := native.load().products_reason():
        pytest.skip(reason)
    few, many = (Product(bits, 989, 576, 64, (tokens,), BF16) for tokens in (64, 65))
    few.weight = many.weight
    few.x.copy_(many.x[:64])
    for product in (few, many):
        product.launch()
        product.check()
    assert not bool((few.out == many.out[:64]).all())


def test_weights_packed_by_build_are_those_that_the_kernels_pack() -> None:
    packing: Any = pytest.importorskip("edgellm_ros.toolchain.build.packing")
    for rows, cols, group in ((99, 96, 32), (576, 1536, 64), (17, 48, 16), (64, 256, 128), (1, 32, 32)):
        stored = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand((rows, cols // group), device="cuda").half()
        data = torch.full((K.int4_packed_data_bytes(rows, cols),), 0xAB, dtype=torch.uint8, device="cuda")
        packed = torch.full((K.int4_packed_scales_bytes(rows, cols, group),), 0xAB, dtype=torch.uint8, device="cuda")
        K.repack_int4(stored, scales, group, False, data, packed, stream=stream())
        torch.cuda.synchronize()
        assert packing.pack_int4(stored.cpu().numpy()).tobytes() == data.cpu().numpy().tobytes()
        assert packing.pack_scales(scales.cpu().numpy(), group).tobytes() == packed.cpu().numpy().tobytes()
