"""A second implementation of the Inception v3 of FID, in PyTorch, in pytorch-fid's names, for tests only."""

import torch
import torch.nn.functional as F
from torch import nn

from paris_jax.evaluation.networks import inception


class Convolution(nn.Module):
    def __init__(self, rows: int, columns: int, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, (rows, columns), bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x, stride=1, pad=None):
        rows, columns = self.conv.kernel_size
        pad = (rows // 2, columns // 2) if pad is None else pad
        return F.relu(self.bn(F.conv2d(x, self.conv.weight, None, stride, pad)))


class Inception(nn.Module):
    """Modules by name; what is connected to what is written out below, as in the published description."""

    def __init__(self):
        super().__init__()
        for name, shape in inception.units().items():
            place = self
            *folders, last = name.split(".")
            for folder in folders:
                if not hasattr(place, folder):
                    place.add_module(folder, nn.Module())
                place = getattr(place, folder)
            place.add_module(last, Convolution(*shape))

    def forward(self, x):
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x, 2, 0), 1, 0)
        x = F.max_pool2d(self.Conv2d_2b_3x3(x), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x), 1, 0), 3, 2)
        for m in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d):
            double = m.branch3x3dbl_3(m.branch3x3dbl_2(m.branch3x3dbl_1(x)))
            pool = m.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
            x = torch.cat([m.branch1x1(x), m.branch5x5_2(m.branch5x5_1(x)), double, pool], 1)
        m = self.Mixed_6a
        double = m.branch3x3dbl_3(m.branch3x3dbl_2(m.branch3x3dbl_1(x)), 2, 0)
        x = torch.cat([m.branch3x3(x, 2, 0), double, F.max_pool2d(x, 3, 2)], 1)
        for m in (self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e):
            seven = m.branch7x7_3(m.branch7x7_2(m.branch7x7_1(x)))
            double = m.branch7x7dbl_3(m.branch7x7dbl_2(m.branch7x7dbl_1(x)))
            double = m.branch7x7dbl_5(m.branch7x7dbl_4(double))
            pool = m.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
            x = torch.cat([m.branch1x1(x), seven, double, pool], 1)
        m = self.Mixed_7a
        seven = m.branch7x7x3_4(m.branch7x7x3_3(m.branch7x7x3_2(m.branch7x7x3_1(x))), 2, 0)
        x = torch.cat([m.branch3x3_2(m.branch3x3_1(x), 2, 0), seven, F.max_pool2d(x, 3, 2)], 1)
        for m, last in ((self.Mixed_7b, False), (self.Mixed_7c, True)):
            three = m.branch3x3_1(x)
            double = m.branch3x3dbl_2(m.branch3x3dbl_1(x))
            pooled = F.max_pool2d(x, 3, 1, 1) if last else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            parts = [m.branch1x1(x), m.branch3x3_2a(three), m.branch3x3_2b(three), m.branch3x3dbl_3a(double)]
            x = torch.cat([*parts, m.branch3x3dbl_3b(double), m.branch_pool(pooled)], 1)
        return x.mean((2, 3))
