"""A second implementation of I3D, in PyTorch, written from the architecture of arXiv 1705.07750, for tests only.

Modules are named as in two ports that publish weights, so that their files can be made: "short" for pytorch-i3d,
"lower" for kinetics_i3d_pytorch.
"""

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}


def same(x: torch.Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], value: float) -> torch.Tensor:
    """Pads (B, C, T, H, W) as TensorFlow's "SAME": the odd one at the end."""
    pads = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


class Unit(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, norm: str):
        super().__init__()
        self.kernel, self.stride, self.norm = (kernel,) * 3, (stride,) * 3, norm
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.add_module(norm, nn.BatchNorm3d(outputs, eps=1e-3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv3d(same(x, self.kernel, self.stride, 0.0))
        return F.relu(getattr(self, self.norm)(x))


class Logits(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv3d = nn.Conv3d(1024, 400, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3d(F.avg_pool3d(x, (2, 7, 7), 1))[:, :, :, 0, 0].transpose(1, 2)


class ShortMixed(nn.Module):
    def __init__(self, inputs: int, channels: tuple[int, ...]):
        super().__init__()
        a, b, c, d, e, f = channels
        self.b0 = Unit(inputs, a, 1, 1, "bn")
        self.b1a, self.b1b = Unit(inputs, b, 1, 1, "bn"), Unit(b, c, 3, 1, "bn")
        self.b2a, self.b2b = Unit(inputs, d, 1, 1, "bn"), Unit(d, e, 3, 1, "bn")
        self.b3b = Unit(inputs, f, 1, 1, "bn")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.max_pool3d(same(x, (3, 3, 3), (1, 1, 1), -torch.inf), 3, 1)
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class LowerMixed(nn.Module):
    def __init__(self, inputs: int, channels: tuple[int, ...]):
        super().__init__()
        a, b, c, d, e, f = channels
        self.branch_0 = Unit(inputs, a, 1, 1, "batch3d")
        self.branch_1 = nn.Sequential(Unit(inputs, b, 1, 1, "batch3d"), Unit(b, c, 3, 1, "batch3d"))
        self.branch_2 = nn.Sequential(Unit(inputs, d, 1, 1, "batch3d"), Unit(d, e, 3, 1, "batch3d"))
        self.branch_3 = nn.Sequential(nn.Identity(), Unit(inputs, f, 1, 1, "batch3d"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.max_pool3d(same(x, (3, 3, 3), (1, 1, 1), -torch.inf), 3, 1)
        return torch.cat([self.branch_0(x), self.branch_1(x), self.branch_2(x), self.branch_3(pooled)], 1)


class I3D(nn.Module):
    """Layers by the names of the original network; `naming` decides the names of the parameters."""

    def __init__(self, naming: str = "short"):
        super().__init__()
        norm, mixed, self.lower = ("bn", ShortMixed, False) if naming == "short" else ("batch3d", LowerMixed, True)
        units = {"Conv3d_1a_7x7": (3, 64, 7, 2), "Conv3d_2b_1x1": (64, 64, 1, 1), "Conv3d_2c_3x3": (64, 192, 3, 1)}
        for name, sizes in units.items():
            self.add_module(self.own(name), Unit(*sizes, norm))
        width = 192
        for name, channels in CHANNELS.items():
            self.add_module(self.own(f"Mixed_{name}"), mixed(width, channels))
            width = channels[0] + channels[2] + channels[4] + channels[5]
        self.add_module("conv3d_0c_1x1" if self.lower else "logits", Logits())

    def own(self, name: str) -> str:
        return name.lower() if self.lower else name

    def layers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs (B, C, T, H, W) of all layers, of videos (B, 3, T, 224, 224)."""
        found = {}
        pools = {"2a_3x3": ((1, 3, 3), (1, 2, 2)), "3a_3x3": ((1, 3, 3), (1, 2, 2)),
                 "4a_3x3": ((3, 3, 3), (2, 2, 2)), "5a_2x2": ((2, 2, 2), (2, 2, 2))}  # fmt: skip
        order = ["Conv3d_1a_7x7", "2a_3x3", "Conv3d_2b_1x1", "Conv3d_2c_3x3", "3a_3x3", "Mixed_3b", "Mixed_3c",
                 "4a_3x3", *(f"Mixed_4{c}" for c in "bcdef"), "5a_2x2", "Mixed_5b", "Mixed_5c"]  # fmt: skip
        for name in order:
            if name in pools:
                window, stride = pools[name]
                x = F.max_pool3d(same(x, window, stride, -torch.inf), window, stride)
                found[f"MaxPool3d_{name}"] = x
            else:
                x = found[name] = getattr(self, self.own(name))(x)
        found["Logits/Conv3d_0c_1x1"] = getattr(self, "conv3d_0c_1x1" if self.lower else "logits")(x)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)["Logits/Conv3d_0c_1x1"].mean(1)


def randomised(naming: str, seed: int) -> I3D:
    """A network whose frozen normalisations have random means and variances, too."""
    torch.manual_seed(seed)
    network = I3D(naming).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.bias, 0, 0.1)
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
    return network
