"""The spatiotemporal DiT and its training step in PyTorch, for comparison in benchmarks.

Mathematics, sizes and names of parameters follow `models/dit.py`; `load` copies its parameters, after which both
networks must agree. Attention is `scaled_dot_product_attention`, which uses a flash kernel where one is available.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paris_jax.models.dit import PATCH, DiTConfig
from paris_jax.models.functional import to_names
from paris_jax.models.positions import rotary_table, video_positions


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs of features of x (B, N, H, D) by (N, D / 2) angles."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Modulation(nn.Module):
    def __init__(self, hidden: int, count: int):
        super().__init__()
        self.out, self.count = nn.Linear(hidden, count * hidden), count

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.out(F.silu(condition)).chunk(self.count, -1)


class HeadNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query, self.key = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(q.float()).to(q.dtype), self.key(k.float()).to(k.dtype)


class Stream(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        D, M = config.hidden, config.mlp_ratio * config.hidden
        self.heads, self.width = config.heads, D // config.heads
        self.modulation, self.head_norm = Modulation(D, 6), HeadNorm(self.width)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp_in, self.mlp_out = nn.Linear(D, M), nn.Linear(M, D)

    def heads_of(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(modulate(x, shift, scale)).unflatten(-1, (self.heads, -1)).chunk(3, -1)
        return *self.head_norm(q, k), v

    def update(self, x: Tensor, attended: Tensor, gates: Any) -> Tensor:
        gate, shift, scale, gate_mlp = gates
        x = x + gate[:, None] * self.out(attended.flatten(-2))
        hidden = F.gelu(self.mlp_in(modulate(x, shift, scale)), approximate="tanh")
        return x + gate_mlp[:, None] * self.mlp_out(hidden)


class DoubleBlock(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.video, self.text = Stream(config), Stream(config)

    def forward(
        self, video: Tensor, text: Tensor, condition: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        shift_v, scale_v, *gates_v = self.video.modulation(condition)
        shift_t, scale_t, *gates_t = self.text.modulation(condition)
        parts = zip(
            self.video.heads_of(video, shift_v, scale_v), self.text.heads_of(text, shift_t, scale_t), strict=True
        )
        q, k, v = (torch.cat(pair, 1) for pair in parts)
        attended = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        attended_v, attended_t = attended.split([video.shape[1], text.shape[1]], 1)
        return self.video.update(video, attended_v, gates_v), self.text.update(text, attended_t, gates_t)


class SingleBlock(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        D, M = config.hidden, config.mlp_ratio * config.hidden
        self.heads, self.width = config.heads, D // config.heads
        self.modulation, self.head_norm = Modulation(D, 3), HeadNorm(self.width)
        self.qkv_mlp, self.out = nn.Linear(D, 3 * D + M), nn.Linear(D + M, D)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition)
        fused = self.qkv_mlp(modulate(x, shift, scale)).unflatten(-1, (self.heads, -1))
        q, k, v, hidden = fused.split([self.width] * 3 + [fused.shape[-1] - 3 * self.width], -1)
        q, k = self.head_norm(q, k)
        attended = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        mixed = self.out(torch.cat([attended, F.gelu(hidden, approximate="tanh")], -1).flatten(-2))
        return x + gate[:, None] * mixed


class Embedder(nn.Module):
    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(x)))


class Twin(nn.Module):
    """Velocity v(x_t, t, text) of latents (B, T, H, W, C), for unpadded texts."""

    def __init__(self, config: DiTConfig, shape: tuple[int, ...], text_tokens: int):
        super().__init__()
        T, H, W, C = shape
        D, patch = config.hidden, C * PATCH * PATCH
        self.video_in, self.text_in = nn.Linear(patch, D), nn.Linear(config.text_width, D)
        self.conditioning = nn.ModuleDict({"time": Embedder(256, D), "pooled": Embedder(config.pooled_width, D)})
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_blocks))
        self.final_modulation, self.velocity_out = Modulation(D, 2), nn.Linear(D, patch)
        ids = np.concatenate([video_positions(T, H // PATCH, W // PATCH), np.zeros((text_tokens, 3), np.float32)])
        cos, sin = rotary_table(ids, config.rope_axes, config.theta)
        self.register_buffer("cos", torch.from_numpy(cos), persistent=False)
        self.register_buffer("sin", torch.from_numpy(sin), persistent=False)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        B, T, H, W, C = x.shape
        packed = x.view(B, T, H // PATCH, PATCH, W // PATCH, PATCH, C).permute(0, 1, 2, 4, 6, 3, 5)
        video, text = self.video_in(packed.reshape(B, -1, C * PATCH * PATCH)), self.text_in(tokens)
        frequencies = torch.exp(-math.log(1e4) * torch.arange(128, device=x.device) / 128)
        angles = 1000 * t[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], -1)
        condition = self.conditioning["time"](features) + self.conditioning["pooled"](pooled)
        for block in self.double_blocks:
            video, text = block(video, text, condition, self.cos, self.sin)
        joint, N = torch.cat([video, text], 1), video.shape[1]
        for block in self.single_blocks:
            joint = block(joint, condition, self.cos, self.sin)
        shift, scale = self.final_modulation(condition)
        out = self.velocity_out(modulate(joint[:, :N], shift, scale))
        out = out.view(B, T, H // PATCH, W // PATCH, C, PATCH, PATCH).permute(0, 1, 2, 5, 3, 6, 4)
        return out.reshape(B, T, H, W, C).float()


def load(twin: Twin, params: Any) -> None:
    """Copies the parameters of `models/dit.py`: transposes kernels and unstacks the blocks."""
    targets = dict(twin.named_parameters())
    suffixes = {"kernel": "weight", "bias": "bias", "scale": "weight"}
    for name, value in to_names(params).items():
        *path, suffix = name.split(".")
        value, stacked = np.asarray(value), path[0] in ("double_blocks", "single_blocks")
        for layer, layer_value in enumerate(value if stacked else [value]):
            target = [path[0], str(layer), *path[1:]] if stacked else path
            with torch.no_grad():
                targets.pop(".".join([*target, suffixes[suffix]])).copy_(
                    torch.tensor(layer_value.T if suffix == "kernel" else layer_value)
                )
    assert not targets, targets.keys()


class Step:
    """One training step as in `training/step.py`: noise and timesteps, loss, gradient clipping, AdamW, EMA."""

    def __init__(self, twin: Twin, compiled: bool, dtype: torch.dtype, learning_rate: float, shift: float):
        self.twin, self.dtype, self.shift = twin, dtype, shift
        self.device = next(twin.parameters()).device
        self.loss = torch.compile(self._loss) if compiled else self._loss
        self.params = list(twin.parameters())
        self.average = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.params, learning_rate, (0.9, 0.99), 1e-8, 0.0, fused=True)

    def _loss(self, x_0: Tensor, noise: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        t_ = t[:, None, None, None, None]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            predicted = self.twin((1 - t_) * x_0 + t_ * noise, t, tokens, pooled)
        return (predicted.float() - (noise - x_0)).square().mean()

    def draw(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.sigmoid(torch.randn(len(x_0), device=self.device))
        return torch.randn_like(x_0), self.shift * t / (1 + (self.shift - 1) * t)

    def gradient(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x_0, tokens, pooled = batch
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(x_0, *self.draw(x_0), tokens, pooled)
        loss.backward()
        return loss

    def __call__(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        loss = self.gradient(batch)
        nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, self.params, 0.001)
        return loss
