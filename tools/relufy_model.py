"""A LLaMA in plain torch for `relufy`: the teacher as it is, the student with thresholded gates.

The gate of the student is JumpReLU, z where z > theta, else 0, with one theta per neuron. A step has no
gradient, so training uses that of a step smoothed by a rectangle of width epsilon (Rajamanoharan et al. 2024,
"Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders", section 3). Unlike there
the smoothed edge also moves z: weights, not only thresholds, shall learn which neurons are worth firing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyinfer_tools.relufy_files import LAYER, Shape


class JumpGate(torch.autograd.Function):
    """(gate z [N, F], up u [N, F], theta [F], width, price) -> h = z * H(z - theta) * u, and the fired count.

    price : gradient of the loss by one more firing neuron of one token (a scalar tensor);  fired : [F]
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, u: Tensor, theta: Tensor, width: Tensor, price: Tensor) -> Any:
        h, fired = kernels.forward(z, u, theta)
        ctx.save_for_backward(z, u, theta, width, price)
        ctx.mark_non_differentiable(fired)
        return h, fired

    @staticmethod
    def backward(ctx: Any, dh: Tensor, _fired: Any = None) -> Any:
        z, u, theta, width, price = ctx.saved_tensors
        return *kernels.backward(dh, z, u, theta, width, price), None, None


def _jump_forward(z: Tensor, u: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    mask = (z > theta).to(z.dtype)  # times a mask: torch's `where` is five times slower on a CPU
    return z * u * mask, mask.sum(0, dtype=torch.float32)


def _jump_backward(
    dh: Tensor, z: Tensor, u: Tensor, theta: Tensor, width: Tensor, price: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    past = z - theta
    mask = (past > 0).to(z.dtype)
    dy = dh * u
    edge = (dy * theta + price) * ((past.abs() < 0.5 * width).to(z.dtype) / width)
    return dy * mask + edge, dh * z * mask, -edge.sum(0, dtype=torch.float32)


def _divergence(teacher: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) of logits p [N, V] and q = p + change, summed over rows, and q - p as probabilities."""
    first = teacher.float()
    p = torch.log_softmax(first, 1)
    q = torch.log_softmax(first + change.float(), 1)
    return (p.exp() * (p - q)).sum(), (q.exp() - p.exp()).to(teacher.dtype)


class Kernels:
    """The passes over all gates and all logits, in torch's own operations until `fuse` has compiled them."""

    def __init__(self) -> None:
        self.forward, self.backward, self.divergence = _jump_forward, _jump_backward, _divergence

    def fuse(self, device: torch.device) -> bool:
        """Fuse them with torch.compile; False, and as before, where that does not work (no C++ compiler)."""
        forward, backward = torch.compile(_jump_forward), torch.compile(_jump_backward)
        divergence = torch.compile(_divergence)
        z = torch.randn(64, 32, dtype=torch.bfloat16, device=device)
        one = torch.ones(32, dtype=torch.bfloat16, device=device)
        try:
            forward(z, z, one)
            backward(z, z, z, one, one, one[0])
            divergence(z, z)
        except Exception:  # whatever torch, the compiler or the system may raise
            return False
        self.forward, self.backward, self.divergence = forward, backward, divergence
        return True


kernels = Kernels()


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of [B, heads, T, width] in bfloat16 by matrix products.

    In training on a CPU a third of the time of torch's fused attention, whose backward pass is slow.
    mask : [T, T], -inf above the diagonal
    """
    b, heads, t, width = q.shape
    groups = heads // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    q, k, v = (x.reshape(b * heads, t, width) for x in (q, k, v))
    scores = torch.baddbmm(mask.expand(b * heads, t, t), q, k.transpose(1, 2), alpha=width**-0.5)
    return (scores.softmax(-1) @ v).view(b, heads, t, width)


class Layer(nn.Module):
    """One decoder layer; q, k, v and gate, up lie in one matrix each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        rows = (shape.heads + 2 * shape.kv_heads) * shape.head_width
        self.shape = shape
        self.attention_norm = nn.Parameter(torch.ones(shape.width))
        self.qkv = nn.Parameter(torch.zeros(rows, shape.width))
        self.out = nn.Parameter(torch.zeros(shape.width, shape.heads * shape.head_width))
        self.ffn_norm = nn.Parameter(torch.ones(shape.width))
        self.gate_up = nn.Parameter(torch.zeros(2 * shape.neurons, shape.width))
        self.down = nn.Parameter(torch.zeros(shape.width, shape.neurons))

    def attend(self, x: Tensor, rotation: Tensor, cache: Tensor | None, start: int) -> Tensor:
        """Attention of x [B, T, D] at positions start ..; cache [2, B, kv_heads, context, head_width]."""
        s = self.shape
        b, t, _ = x.shape
        normed = rms_norm(x, self.attention_norm, s.epsilon).to(self.qkv.dtype)
        qkv = F.linear(normed, self.qkv).view(b, t, -1, s.head_width)
        turned = rotate(qkv[:, :, : s.heads + s.kv_heads], rotation[:, start : start + t]).transpose(1, 2)
        q, k = turned[:, : s.heads], turned[:, s.heads :]
        v = qkv[:, :, s.heads + s.kv_heads :].transpose(1, 2)
        if cache is not None:
            cache[0, :, :, start : start + t] = k
            cache[1, :, :, start : start + t] = v
            q, k, v = q.to(cache.dtype), cache[0, :, :, : start + t], cache[1, :, :, : start + t]
        if torch.is_grad_enabled() and x.device.type == "cpu":
            mask = torch.full((t, t), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
            y = causal_attention(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=t > 1, **({"enable_gqa": True} if s.kv_heads != s.heads else {})
            )
        return x + F.linear(y.transpose(1, 2).reshape(b, t, -1).to(self.out.dtype), self.out)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up projections [N, F] of x [B, T, D]."""
        normed = rms_norm(x, self.ffn_norm, self.shape.epsilon).to(self.gate_up.dtype)
        z, u = F.linear(normed.flatten(0, 1), self.gate_up).split(self.shape.neurons, dim=1)
        return z, u


class Llama(nn.Module):
    """Embedding, layers, final norm, head. With thresholds [layers, F] a student, without them SwiGLU."""

    def __init__(self, shape: Shape, sparse: bool) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.zeros(shape.vocabulary, shape.width))
        self.head = None if shape.tied else nn.Parameter(torch.zeros(shape.vocabulary, shape.width))
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.theta = nn.Parameter(torch.zeros(shape.layers, shape.neurons)) if sparse else None
        self.register_buffer("rotation", rotation_table(shape), persistent=False)

    @property
    def head_matrix(self) -> Tensor:
        """[V, D], the embedding where the two are tied."""
        return self.embedding if self.head is None else self.head

    def forward(
        self,
        tokens: Tensor,
        cache: Tensor | None = None,
        start: int = 0,
        edges: Tensor | None = None,
        price: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] -> final normed state float32 [B, T, D] and how often each neuron fired [layers, F].

        edges : width of the smoothed step per layer and neuron [layers, F];  price : see JumpGate
        """
        x = self.embedding[tokens].float()
        fired = []
        for index, layer in enumerate(self.layers):
            x = layer.attend(x, self.rotation, None if cache is None else cache[index], start)
            z, u = layer.gates(x)
            if self.theta is None:
                h = F.silu(z) * u
            else:
                width = z.new_ones(z.shape[1]) if edges is None else edges[index].to(z.dtype)
                cost = z.new_zeros(()) if price is None else price.to(z.dtype)
                h, count = JumpGate.apply(z, u, self.theta[index].to(z.dtype), width, cost)
                fired.append(count)
            x = x + F.linear(h, layer.down).view_as(x)
        state = rms_norm(x, self.norm, self.shape.epsilon)
        return state, torch.stack(fired) if fired else torch.zeros(0)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm over the last axis, computed in float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.float()


def rotation_table(shape: Shape) -> Tensor:
    """cos and sin [2, context, 1, head_width / 2] of rotary embedding (halves, as checkpoints order them)."""
    half = shape.head_width // 2
    frequency = shape.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(shape.context, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()]).float()[:, :, None, :]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, heads, head_width]; result in the type of x."""
    cos, sin = rotation[0], rotation[1]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


_FUSED = {
    "attention_norm": ("input_layernorm.weight",),
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "out": ("self_attn.o_proj.weight",),
    "ffn_norm": ("post_attention_layernorm.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
}


def _parts(model: Llama) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """Every parameter but the thresholds, with the names its rows have in a checkpoint, in order."""
    yield model.embedding, ("model.embed_tokens.weight",)
    if model.head is not None:
        yield model.head, ("lm_head.weight",)
    yield model.norm, ("model.norm.weight",)
    for index, layer in enumerate(model.layers):
        for own, names in _FUSED.items():
            yield getattr(layer, own), tuple(LAYER.format(index) + name for name in names)


def load_weights(model: Llama, tensors: Mapping[str, np.ndarray]) -> None:
    """Fill the model from checkpoint tensors by their Hugging Face names; KeyError where one is missing."""
    with torch.no_grad():
        for parameter, names in _parts(model):
            parameter.copy_(torch.cat([torch.from_numpy(tensors[n].astype(np.float32)) for n in names]))


def save_weights(model: Llama) -> dict[str, np.ndarray]:
    """The inverse of load_weights, float32; thresholds are not in it."""
    shape = model.shape
    q, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    sizes = {"qkv": [q, kv, kv], "gate_up": [shape.neurons] * 2}
    tensors: dict[str, np.ndarray] = {}
    for parameter, names in _parts(model):
        value = parameter.detach().float().cpu()
        own = next((k for k, v in _FUSED.items() if names[0].endswith(v[0])), "")
        for name, part in zip(names, value.split(sizes.get(own, [len(value)]))):
            tensors[name] = part.numpy().copy()
    return tensors
