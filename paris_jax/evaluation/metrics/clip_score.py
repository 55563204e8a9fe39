"""CLIP score: how well a video shows its prompt, as the cosine of CLIP's embeddings (Hessel et al. 2021, 2104.08718).

The score is the raw cosine, averaged over frames, then over clips; it is not scaled by 2.5, and scores of ViT-B/32 and
L/14 do not compare.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from paris_jax.artifacts import manifest
from paris_jax.artifacts.tensors import Tensors
from paris_jax.config import hashing
from paris_jax.encoders import clip, placement
from paris_jax.encoders.tokens import Tokenize, tokenizer
from paris_jax.errors import UserError
from paris_jax.evaluation.networks.frames import scale_and_crop
from paris_jax.weights.reading import Later

FRAMES = 64  # per call of the network


@dataclasses.dataclass(frozen=True)
class ClipEncoder:
    """CLIP with both encoders and its tokenizer.

    Attributes:
      side: pixels per side of its images.
      max_tokens: of a text; a longer one is cut, and its last token kept.
      width: of its embeddings.
      name: such as "ViT-B/32".
      sha256: of its weights.
    """

    config: clip.Clip
    params: Any
    tokenize: Tokenize
    side: int
    max_tokens: int
    width: int
    name: str
    sha256: str

    @classmethod
    def load(cls, folder: epath.PathLike) -> "ClipEncoder":
        """CLIP from a folder as published by Hugging Face.

        Raises:
          UserError: the folder lacks one of the encoders, its projection, or the tokenizer.
        """
        config, later = clip.read(folder)
        for kind in ("text", "vision"):
            if "projection" not in later.get(kind, {}):
                raise UserError(f"{folder} lacks CLIP's {kind} encoder with its projection; download the whole model")
        whole = NamedSharding(placement.mesh(), PartitionSpec())
        params = jax.tree.map(
            lambda x: jax.device_put(x.read(np.float32), whole), later, is_leaf=lambda x: isinstance(x, Later)
        )
        D, _, patch, _ = params["vision"]["patches"]["weight"].shape
        side = round((len(params["vision"]["positions"]) - 1) ** 0.5) * patch
        size = {768: "B", 1024: "L", 1280: "H"}.get(D, f"{D}-")
        files = Tensors(folder).files
        sha256 = hashing.hash_text(" ".join(manifest.hash_file(file) for file in files))
        return cls(
            config, params, tokenizer(folder), side, len(params["text"]["positions"]),
            params["text"]["projection"]["weight"].shape[0], f"ViT-{size}/{patch}", sha256,
        )  # fmt: skip

    def embed_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """Unit embeddings (N, E) float32 of texts, and how many of them were cut."""
        found = [self.tokenize(text) for text in texts]
        is_cut = [len(ids) > self.max_tokens for ids in found]
        ids = np.zeros((len(found), self.max_tokens), np.int32)
        for row, pieces in enumerate(found):
            pieces = [*pieces[: self.max_tokens - 1], pieces[-1]] if is_cut[row] else pieces
            ids[row] = pieces[-1]  # padded by the token that ends a text
            ids[row, : len(pieces)] = pieces
        parts = [ids[i : i + FRAMES] for i in range(0, len(ids), FRAMES)]
        with jax.default_matmul_precision("float32"):
            embedded = [
                np.asarray(clip.encode_text(self.config, self.params, *placement.rows(part))["embedding"])[: len(part)]
                for part in parts
            ]
        return _unit(np.concatenate(embedded)), sum(is_cut)

    def embed_frames(self, videos: np.ndarray) -> np.ndarray:
        """Unit embeddings (N, T, E) float32 of the frames of videos (N, T, H, W, 3) uint8.

        Each frame is scaled by bicubic interpolation, antialiased, so that its shorter side fits, and its middle is
        cut out, as CLIP's own preparation does.
        """
        N, T = videos.shape[:2]
        frames = videos.reshape(N * T, *videos.shape[2:])
        parts = [frames[i : i + FRAMES] for i in range(0, len(frames), FRAMES)]
        with jax.default_matmul_precision("float32"):
            embedded = [self._embed(part) for part in parts]
        return _unit(np.concatenate(embedded)).reshape(N, T, -1)

    def _embed(self, frames: np.ndarray) -> np.ndarray:
        (sharded,) = placement.rows(frames)
        images = scale_and_crop(sharded, self.side)
        return np.asarray(clip.encode_image(self.config, self.params, images)["embedding"])[: len(frames)]


def clip_scores(frames_NTE: np.ndarray, texts_NE: np.ndarray) -> np.ndarray:
    """Cosine of each video's frames with its text, averaged over frames: (N,) float64 in [-1, 1].

    Args:
      frames_NTE, texts_NE: unit embeddings.
    """
    if frames_NTE.ndim != 3 or texts_NE.shape != (len(frames_NTE), frames_NTE.shape[-1]):
        raise ValueError(
            f"embeddings have shapes {frames_NTE.shape} and {texts_NE.shape}: must be (N, T, E) and (N, E)"
        )
    return np.einsum("nte,ne->n", frames_NTE.astype(np.float64), texts_NE.astype(np.float64)) / frames_NTE.shape[1]


def _unit(embedding: np.ndarray) -> np.ndarray:
    return embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)
