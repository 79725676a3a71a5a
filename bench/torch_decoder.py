"""The peer of the decode benchmark: the same shapes as a torch.compile decoder with a static cache, greedy, in bf16."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgellm_ros.errors import UnsupportedError
from edgellm_ros.manifest import ModelSpec


def _rms(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * gain


class _Layer(nn.Module):
    def __init__(self, model: ModelSpec, capacity: int) -> None:
        super().__init__()
        self.model = model
        hidden, width = model.hidden_size, model.intermediate_size
        q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.qkv = nn.Linear(hidden, q_width + 2 * kv_width, bias=False)
        self.o = nn.Linear(q_width, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)
        for name, size in (("n1", hidden), ("n2", hidden), ("nq", model.head_dim), ("nk", model.head_dim)):
            self.register_buffer(name, torch.ones(size))
        for name in ("k", "v"):
            self.register_buffer(name, torch.randn(1, model.num_kv_heads, capacity, model.head_dim))

    def forward(self, x: torch.Tensor, pos: torch.Tensor, cos: Any, sin: Any, mask: Any) -> torch.Tensor:
        m = self.model
        half = m.head_dim // 2
        heads = self.qkv(_rms(x, self.n1, m.rms_norm_eps)).view(1, 1, -1, m.head_dim).transpose(1, 2)
        q, k, v = heads.split([m.num_heads, m.num_kv_heads, m.num_kv_heads], 1)
        if m.qk_norm:
            q, k = _rms(q, self.nq, m.rms_norm_eps), _rms(k, self.nk, m.rms_norm_eps)
        q, k = (t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin for t in (q, k))
        self.k[:, :, pos] = k
        self.v[:, :, pos] = v
        group = m.num_heads // m.num_kv_heads
        keys, values = self.k.repeat_interleave(group, 1), self.v.repeat_interleave(group, 1)
        attended = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + self.o(attended.transpose(1, 2).reshape(1, 1, -1))
        gate, up = self.gate_up(_rms(x, self.n2, m.rms_norm_eps)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class _Decoder(nn.Module):
    def __init__(self, model: ModelSpec, capacity: int) -> None:
        super().__init__()
        self.model = model
        self.layers = nn.ModuleList([_Layer(model, capacity) for _ in range(model.num_layers)])
        self.embed = nn.Embedding(model.vocab_size, model.hidden_size)
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        if model.tied_head:
            self.head.weight = self.embed.weight
        self.register_buffer("norm", torch.ones(model.hidden_size))
        steps = torch.arange(0, model.head_dim, 2).float() / model.head_dim
        angles = torch.outer(torch.arange(capacity).float(), 1 / model.rope_theta**steps).repeat(1, 2)
        self.register_buffer("cos", angles.cos().to(torch.bfloat16))  # or q would become fp32
        self.register_buffer("sin", angles.sin().to(torch.bfloat16))
        self.register_buffer("mask", torch.zeros(capacity, capacity).masked_fill(
            torch.ones(capacity, capacity).triu(1).bool(), float("-inf")))

    def forward(self, token: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        x = self.embed(token)
        for layer in self.layers:
            x = layer(x, pos, self.cos[pos], self.sin[pos], self.mask[None, None, pos])
        return self.head(_rms(x, self.norm, self.model.rms_norm_eps)).argmax(-1)


@torch.no_grad()
def time_torch_decode(model: ModelSpec, context: int, num_tokens: int) -> float:
    """Median milliseconds a token of the compiled decoder, from position `context` on.

    Raises UnsupportedError for a model with what this decoder does not compute.
    """
    if model.activation != "silu" or model.output_norms or model.sliding_windows:
        raise UnsupportedError(f"the torch.compile decoder has no {model.family}; leave --torch out")
    import torch._dynamo as dynamo
    import torch._inductor.config as inductor
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dynamo.reset()
    inductor.coordinate_descent_tuning = True
    capacity = context + num_tokens + 16
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            decoder = _Decoder(model, capacity).eval()
            position = torch.tensor([context])
            token = torch.zeros(1, 1, dtype=torch.long)
    finally:
        torch.set_default_dtype(default)
    compiled = torch.compile(decoder, mode="reduce-overhead", fullgraph=True)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_tokens + 1)]
    with sdpa_kernel(SDPBackend.MATH):  # one query: the plain product compiles into the graph, and is the fastest here
        for measured in (False, True):
            position.fill_(context)
            count = num_tokens if measured else 8
            events[0].record()
            for i in range(count):
                token = compiled(token, position).clone()
                position.add_(1)
                events[i + 1].record()
            torch.cuda.synchronize()
    times = [events[i].elapsed_time(events[i + 1]) for i in range(num_tokens)]
    del compiled, decoder
    dynamo.reset()
    torch.cuda.empty_cache()
    return statistics.median(times)
