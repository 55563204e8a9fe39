"""Inception v3 as the Frechet Inception Distance uses it: 2,048 features of single images.

Sources: Szegedy et al. 2016 (arXiv 1512.00567) for the network, Heusel et al. 2017 (arXiv 1706.08500) for the distance.
The weights of 2015 differ from later ones in three points: average poolings leave out the padding, and the last module
pools by the maximum. Weights are read in pytorch-fid's names.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import lax

from paris_jax.errors import UserError
from paris_jax.weights.pickled import read_arrays

SIDE, FEATURES, EPSILON = 299, 2048, 1e-3
Params = dict[str, dict[str, jax.Array]]
Shape = tuple[int, int, int, int]  # kernel rows, columns, inputs, outputs
# The first layers: name, kernel (rows, columns, inputs, outputs), stride, padding; None stands for a pooling.
_STEM = (
    ("Conv2d_1a_3x3", (3, 3, 3, 32), 2, 0),
    ("Conv2d_2a_3x3", (3, 3, 32, 32), 1, 0),
    ("Conv2d_2b_3x3", (3, 3, 32, 64), 1, 1),
    None,
    ("Conv2d_3b_1x1", (1, 1, 64, 80), 1, 0),
    ("Conv2d_4a_3x3", (3, 3, 80, 192), 1, 0),
    None,
)


def _a(name: str, inputs: int, pooled: int) -> dict[str, Shape]:
    return {
        f"{name}.branch1x1": (1, 1, inputs, 64),
        f"{name}.branch5x5_1": (1, 1, inputs, 48),
        f"{name}.branch5x5_2": (5, 5, 48, 64),
        f"{name}.branch3x3dbl_1": (1, 1, inputs, 64),
        f"{name}.branch3x3dbl_2": (3, 3, 64, 96),
        f"{name}.branch3x3dbl_3": (3, 3, 96, 96),
        f"{name}.branch_pool": (1, 1, inputs, pooled),
    }


def _b(name: str) -> dict[str, Shape]:
    return {
        f"{name}.branch3x3": (3, 3, 288, 384),
        f"{name}.branch3x3dbl_1": (1, 1, 288, 64),
        f"{name}.branch3x3dbl_2": (3, 3, 64, 96),
        f"{name}.branch3x3dbl_3": (3, 3, 96, 96),
    }


def _c(name: str, width: int) -> dict[str, Shape]:
    return {
        f"{name}.branch1x1": (1, 1, 768, 192),
        f"{name}.branch7x7_1": (1, 1, 768, width),
        f"{name}.branch7x7_2": (1, 7, width, width),
        f"{name}.branch7x7_3": (7, 1, width, 192),
        f"{name}.branch7x7dbl_1": (1, 1, 768, width),
        f"{name}.branch7x7dbl_2": (7, 1, width, width),
        f"{name}.branch7x7dbl_3": (1, 7, width, width),
        f"{name}.branch7x7dbl_4": (7, 1, width, width),
        f"{name}.branch7x7dbl_5": (1, 7, width, 192),
        f"{name}.branch_pool": (1, 1, 768, 192),
    }


def _d(name: str) -> dict[str, Shape]:
    return {
        f"{name}.branch3x3_1": (1, 1, 768, 192),
        f"{name}.branch3x3_2": (3, 3, 192, 320),
        f"{name}.branch7x7x3_1": (1, 1, 768, 192),
        f"{name}.branch7x7x3_2": (1, 7, 192, 192),
        f"{name}.branch7x7x3_3": (7, 1, 192, 192),
        f"{name}.branch7x7x3_4": (3, 3, 192, 192),
    }


def _e(name: str, inputs: int) -> dict[str, Shape]:
    return {
        f"{name}.branch1x1": (1, 1, inputs, 320),
        f"{name}.branch3x3_1": (1, 1, inputs, 384),
        f"{name}.branch3x3_2a": (1, 3, 384, 384),
        f"{name}.branch3x3_2b": (3, 1, 384, 384),
        f"{name}.branch3x3dbl_1": (1, 1, inputs, 448),
        f"{name}.branch3x3dbl_2": (3, 3, 448, 384),
        f"{name}.branch3x3dbl_3a": (1, 3, 384, 384),
        f"{name}.branch3x3dbl_3b": (3, 1, 384, 384),
        f"{name}.branch_pool": (1, 1, inputs, 192),
    }


def units() -> dict[str, Shape]:
    """All convolutions by their name in pytorch-fid, with the shapes of their kernels."""
    found = {layer[0]: layer[1] for layer in _STEM if layer is not None}
    found |= _a("Mixed_5b", 192, 32) | _a("Mixed_5c", 256, 64) | _a("Mixed_5d", 288, 64) | _b("Mixed_6a")
    for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        found |= _c(name, width)
    return found | _d("Mixed_7a") | _e("Mixed_7b", 1280) | _e("Mixed_7c", 2048)


def read(path: epath.PathLike) -> Params:
    """Kernels and biases with the frozen batch normalisation folded in, from a file in pytorch-fid's names.

    Raises:
      UserError: a file that cannot be read, or whose tensors are not those of this network.
    """
    arrays, params, problems = read_arrays(path), {}, []
    for name, (rows, columns, inputs, outputs) in units().items():
        kernel = arrays.get(f"{name}.conv.weight")
        parts = [arrays.get(f"{name}.bn.{part}") for part in ("weight", "bias", "running_mean", "running_var")]
        if kernel is None or kernel.shape != (outputs, inputs, rows, columns):
            problems.append(f"{name}.conv.weight")
        elif any(part is None or part.shape != (outputs,) or not np.isfinite(part).all() for part in parts):
            problems.append(f"{name}.bn")
        else:
            weight, bias, mean, var = (np.asarray(part, np.float32) for part in parts)
            scale = weight / np.sqrt(var + np.float32(EPSILON))
            folded = np.asarray(kernel, np.float32).transpose(2, 3, 1, 0) * scale
            params[name] = {"kernel": jnp.asarray(folded), "bias": jnp.asarray(bias - mean * scale)}
    if problems:
        shown = ", ".join(problems[:3])
        raise UserError(
            f"{path} cannot be loaded: {len(problems)} tensors of Inception v3 are missing or do not fit "
            f"({shown}, ...); name the weights of pytorch-fid (pt_inception-2015-12-05), saved as safetensors or by "
            "PyTorch 1.6 or later"
        )
    return params


@jax.jit
def features(params: Params, image_BHW3: jax.Array) -> jax.Array:
    """Features (B, 2048) float32 of images (B, 299, 299, 3) in [-1, 1]."""
    x = image_BHW3
    for layer in _STEM:
        if layer is None:
            x = _max_pool(x)
        else:
            name, _, stride, pad = layer
            x = _convolve(params[name], x, stride, (pad, pad))
    conv = functools.partial(_module, params)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = conv(name, x, [["branch1x1"], ["branch5x5_1", "branch5x5_2"], _chain("branch3x3dbl_", 3)], "mean")
    x = conv("Mixed_6a", x, [["branch3x3"], _chain("branch3x3dbl_", 3)], "reduce")
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = conv(name, x, [["branch1x1"], _chain("branch7x7_", 3), _chain("branch7x7dbl_", 5)], "mean")
    x = conv("Mixed_7a", x, [_chain("branch3x3_", 2), _chain("branch7x7x3_", 4)], "reduce")
    branches = [["branch1x1"], ["branch3x3_1", "branch3x3_2*"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3*"]]
    x = conv("Mixed_7b", x, branches, "mean")
    return conv("Mixed_7c", x, branches, "max").mean((1, 2))


def _chain(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{i + 1}" for i in range(count)]


def _module(params: Params, name: str, x: jax.Array, branches: Sequence[Sequence[str]], pooling: str) -> jax.Array:
    """Branches of convolutions side by side, and one of pooling; "*" stands for the pair a, b of a fork.

    Args:
      pooling: "mean" and "max" are followed by a convolution; "reduce" halves rows and columns, as do the last
        convolutions of the branches.
    """
    outputs = []
    for branch in branches:
        y = x
        for i, unit in enumerate(branch):
            stride = 2 if pooling == "reduce" and i == len(branch) - 1 else 1
            if unit.endswith("*"):
                pair = (_convolve(params[f"{name}.{unit[:-1]}{side}"], y) for side in "ab")
                y = jnp.concatenate(list(pair), axis=-1)
            else:
                padding = (0, 0) if stride == 2 else None
                y = _convolve(params[f"{name}.{unit}"], y, stride, padding)
        outputs.append(y)
    if pooling == "reduce":
        outputs.append(_max_pool(x))
    else:
        pooled = _mean_pool(x) if pooling == "mean" else _max_pool(x, 1, "SAME")
        outputs.append(_convolve(params[f"{name}.branch_pool"], pooled))
    return jnp.concatenate(outputs, axis=-1)


def _convolve(
    unit: dict[str, jax.Array], x: jax.Array, stride: int = 1, padding: tuple[int, int] | None = None
) -> jax.Array:
    """Convolution with bias and ReLU; padded by half a kernel unless given."""
    rows, columns = unit["kernel"].shape[:2]
    vertical, horizontal = (rows // 2, columns // 2) if padding is None else padding
    pads = [(vertical, vertical), (horizontal, horizontal)]
    layout = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x, unit["kernel"], (stride, stride), pads, dimension_numbers=layout, precision="highest"
    )
    return jax.nn.relu(y + unit["bias"])


def _max_pool(x: jax.Array, stride: int = 2, padding: str = "VALID") -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _mean_pool(x: jax.Array) -> jax.Array:
    """Mean over 3 x 3 pixels, without those outside the image."""
    window, strides = (1, 3, 3, 1), (1, 1, 1, 1)
    total = lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME")
    count = lax.reduce_window(jnp.ones((1, *x.shape[1:3], 1)), 0.0, lax.add, window, strides, "SAME")
    return total / count
