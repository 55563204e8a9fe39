"""The shapes classifier: a small network that predicts the attributes of a clip, with features for a Frechet distance.

It was trained on the embedded shapes alone (train_attribute_classifier.py), so its distance is called "Frechet
distance (shapes classifier)": it is not FVD, is not comparable to published numbers, and means little on other videos.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

WEIGHTS = Path(__file__).with_name("shapes_classifier.safetensors")
CARD = Path(__file__).with_name("shapes_classifier.json")
FRAMES, HEIGHT, WIDTH = 8, 20, 20  # size of the network's input; other sizes are resampled
FEATURES = 64  # width of the layer whose outputs are the features of the Frechet distance
Parameters = dict[str, jax.Array]
# Convolutions as (name, kernel (time, rows, columns), strides, output channels). One branch extracts motion from all
# frames at a lower resolution, the other the object from a few frames at full resolution.
_MOTION = (
    ("motion0", (3, 3, 3), (1, 2, 2), 24),
    ("motion1", (3, 3, 3), (2, 2, 2), 48),
    ("motion2", (1, 3, 3), (1, 1, 1), 48),
    ("motion3", (3, 1, 1), (1, 1, 1), 48),
    ("motion4", (3, 3, 3), (2, 2, 2), 64),
)
_OBJECT = (
    ("object0", (1, 3, 3), (1, 1, 1), 24),
    ("object1", (1, 3, 3), (1, 2, 2), 48),
    ("object2", (1, 3, 3), (1, 1, 1), 64),
    ("object3", (1, 3, 3), (1, 1, 1), 96),
)
_OBJECT_FRAMES = slice(1, None, 3)  # 1, 4 and 7 of 0 to 7


def initialise(key: jax.Array, attributes: dict[str, tuple[str, ...]]) -> Parameters:
    """Returns random float32 parameters with one head per attribute."""
    shapes = {}
    for branch in (_MOTION, _OBJECT):
        channels = 3
        for name, kernel, _, out in branch:
            shapes[name] = (*kernel, channels, out)
            channels = out
    shapes["features"] = (2 * (_MOTION[-1][-1] + _OBJECT[-1][-1]), FEATURES)
    shapes |= {f"head.{name}": (FEATURES, len(values)) for name, values in attributes.items()}
    parameters = {}
    for index, (name, shape) in enumerate(shapes.items()):
        fan_in = int(np.prod(shape[:-1]))
        draw = jax.random.normal(jax.random.fold_in(key, index), shape)
        parameters[f"{name}.weight"] = draw * np.sqrt((1 if name.startswith("head") else 2) / fan_in)
        parameters[f"{name}.bias"] = jnp.zeros(shape[-1])
    return parameters


def apply(parameters: Parameters, x_BTHWC: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the network.

    Args:
      x_BTHWC: (B, 8, 20, 20, 3) float32 in [-1, 1].
    Returns:
      features (B, 64) and, for each attribute, the logits of its values (B, V).
    """
    pooled = []
    for branch, x in ((_MOTION, x_BTHWC), (_OBJECT, x_BTHWC[:, _OBJECT_FRAMES])):
        for name, _, strides, _ in branch:
            x = _convolve(parameters, name, x, strides)
        # The maximum within each frame is averaged over frames, so that a single bad frame does not dominate.
        pooled += [x.mean((1, 2, 3)), x.max((2, 3)).mean(1)]
    features = _affine(parameters, "features", jnp.concatenate(pooled, axis=-1))
    hidden = jax.nn.relu(features)
    heads = [name.removesuffix(".weight") for name in parameters if name.startswith("head.") and ".weight" in name]
    return features, {name.removeprefix("head."): _affine(parameters, name, hidden) for name in heads}


def _affine(parameters: Parameters, name: str, x: jax.Array) -> jax.Array:
    return x @ parameters[f"{name}.weight"] + parameters[f"{name}.bias"]


def _convolve(parameters: Parameters, name: str, x: jax.Array, strides: tuple[int, int, int]) -> jax.Array:
    """Convolution padded by half a kernel, layer norm over channels without parameters, ReLU."""
    weight = parameters[f"{name}.weight"]
    y = (_convolve_frames if weight.shape[0] == 1 else _convolve_clips)(weight, x, strides)
    y = y + parameters[f"{name}.bias"]
    y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-5)
    return jax.nn.relu(y)


def _convolve_frames(weight: jax.Array, x: jax.Array, strides: tuple[int, int, int]) -> jax.Array:
    """Convolves each frame separately with a kernel (1, rows, columns, in, out)."""
    frames = x.reshape(-1, *x.shape[2:])
    padding = [(k // 2, k // 2) for k in weight.shape[1:3]]
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(frames, weight[0], strides[1:], padding, dimension_numbers=layout)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _convolve_clips(weight: jax.Array, x: jax.Array, strides: tuple[int, int, int]) -> jax.Array:
    """Convolves in time and space, by one matrix product of shifted slices: on CPU, XLA's gradient is twice as slow."""
    padded = jnp.pad(x, [(0, 0), *((k // 2, k // 2) for k in weight.shape[:3]), (0, 0)])
    out = [-(-size // stride) for size, stride in zip(x.shape[1:4], strides, strict=True)]
    taps = []
    for offset in np.ndindex(*weight.shape[:3]):
        window = [slice(o, o + (n - 1) * s + 1, s) for o, n, s in zip(offset, out, strides, strict=True)]
        taps.append(padded[:, window[0], window[1], window[2]])
    return jnp.concatenate(taps, axis=-1) @ weight.reshape(-1, weight.shape[-1])


class AttributeClassifier:
    """A trained classifier.

    Attributes:
      attributes: possible values of each attribute.
    """

    def __init__(self, parameters: Parameters, attributes: dict[str, tuple[str, ...]]):
        self.attributes = attributes
        self._parameters = parameters
        self._apply = jax.jit(apply)

    @classmethod
    def load(cls) -> "AttributeClassifier":
        """Loads the classifier that ships with the package."""
        stored = safetensors.numpy.load_file(WEIGHTS)
        attributes = {name: tuple(values) for name, values in read_card()["attributes"].items()}
        return cls({name: jnp.asarray(value, jnp.float32) for name, value in stored.items()}, attributes)

    def predict(self, videos: np.ndarray, batch: int = 32) -> tuple[np.ndarray, list[dict[str, str]]]:
        """Computes features and predicted attributes of videos.

        Args:
          videos: (N, T, H, W, 3) float in [-1, 1], of any T, H, W.
          batch: number of videos per call of the network.

        Returns:
          Features (N, 64) float64 and N dicts from attribute to its most likely value.

        Raises:
          ValueError: `videos` has another shape, or no video.
        """
        if videos.ndim != 5 or videos.shape[-1] != 3 or not len(videos):
            raise ValueError(f"videos has shape {videos.shape}: must be (N, T, H, W, 3) with N >= 1")
        features, predictions = [], {name: [] for name in self.attributes}
        for start in range(0, len(videos), batch):
            part = resample(videos[start : start + batch])
            # The last batch is padded with zeros, so that the network compiles for one shape only.
            padded = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), np.float32)])
            f, logits = self._apply(self._parameters, padded)
            features.append(np.asarray(f, np.float64)[: len(part)])
            for name, value in logits.items():
                predictions[name].append(np.asarray(value).argmax(-1)[: len(part)])
        indices = {name: np.concatenate(parts) for name, parts in predictions.items()}
        values = [{name: self.attributes[name][indices[name][i]] for name in indices} for i in range(len(videos))]
        return np.concatenate(features), values


def resample(videos: np.ndarray) -> np.ndarray:
    """Resamples videos (N, T, H, W, 3) to (N, 8, 20, 20, 3) float32, values clipped to [-1, 1].

    Rows and columns use a triangle filter that widens when shrinking (anti-aliased); frames are interpolated linearly
    from the first to the last, because blurring over time would hide motion. Videos of the input size are unchanged.
    """
    videos = np.clip(np.asarray(videos, np.float32), -1, 1)
    _, frames, height, width, _ = videos.shape
    time, rows, columns = _frame_weights(frames), _pixel_weights(height, HEIGHT), _pixel_weights(width, WIDTH)
    return np.einsum("st,gh,vw,nthwc->nsgvc", time, rows, columns, videos, optimize=True)


@functools.cache
def _frame_weights(size: int) -> np.ndarray:
    position = np.linspace(0, size - 1, FRAMES)[:, None]
    return np.maximum(1 - np.abs(position - np.arange(size)), 0).astype(np.float32)


@functools.cache
def _pixel_weights(size: int, target: int) -> np.ndarray:
    position = (np.arange(target)[:, None] + 0.5) * size / target - 0.5
    weights = np.maximum(1 - np.abs(position - np.arange(size)) / max(size / target, 1.0), 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def read_card() -> dict[str, Any]:
    """Reads the shipped classifier's card: its training command, attributes and accuracy."""
    return json.loads(CARD.read_text())


def generator_hash() -> str:
    """Hash of the generator's output: a classifier is valid only for the generator that it was trained on.

    Hashes rendered clips, not source text, so that a changed comment needs no new classifier.
    """
    from paris_jax.data.sources import shapes

    digest = hashlib.sha256(json.dumps(shapes.ATTRIBUTES).encode())
    for clip in shapes.ShapesSource(seed=0, num_clips=24, frames=FRAMES, height=HEIGHT, width=WIDTH, fps=8.0):
        # Coarse levels, so that a different last bit of sin or exp on another machine does not change the hash.
        digest.update((clip.video // 16).tobytes() + json.dumps(clip.attributes).encode())
    return digest.hexdigest()
