"""Published encoders as the rest of the project uses them: T5 and CLIP for text, DINOv2 for what is clustered.

Their weights lie in folders that the user names, as Hugging Face publishes them. Descriptions hold the weights' hashes,
not the folders: what was encoded with them may be used on another machine, whose own folder is checked.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from paris_jax.artifacts import manifest
from paris_jax.artifacts.tensors import Tensors
from paris_jax.config import hashing
from paris_jax.encoders import clip, dinov2, hunyuan, placement, t5
from paris_jax.encoders.tokens import tokenizer
from paris_jax.encoders.words import TextEncoding, check_length, rounded
from paris_jax.errors import UserError
from paris_jax.weights.reading import described

TEXT_LENGTHS = 32  # texts are padded to multiples of this, so that few lengths are compiled
BATCH_SIZES = 16  # texts
READERS = {"t5": t5.read, "clip": clip.read, "dinov2": dinov2.read, "hunyuan": hunyuan.read}
FRAMES, SIDE = 4, 224  # frames of a clip that DINOv2 looks at, and their pixels a side: our choice
_loaded: dict[tuple[str, str], tuple[Any, Any]] = {}


def loaded(kind: str, folder: str) -> tuple[Any, Any]:
    """An encoder and its weights on this machine's devices (`placing`), read once until they are dropped."""
    if (kind, folder) not in _loaded:
        config, params = READERS[kind](folder)
        if kind == "clip":  # its other half looks at images
            params = {name: params[name] for name in params if name == "text"}
        _loaded[kind, folder] = config, placement.put(params)
    return _loaded[kind, folder]


def drop(*kinds: str) -> None:
    """Forgets the weights of these encoders, by default of all, so that their memory is free for the experts."""
    for key in [key for key in _loaded if not kinds or key[0] in kinds]:
        del _loaded[key]


@functools.cache
def _hash(folder: str) -> str:
    """Of all files of the weights."""
    return hashing.hash_text(" ".join(manifest.hash_file(file) for file in Tensors(folder).files))


def check_folder(field: str, folder: str, promised: str) -> str:
    """The hash of a folder's weights; refuses one that is not named, or not the promised one."""
    if not folder:
        name = {"codec.weights": "vae", "text.t5": "t5", "text.clip": "clip"}.get(field)
        sampling = f"; to sample, --{name}=DIR, encoders={{'{name}': ...}} or PARIS_JAX_{name.upper()}" if name else ""
        raise UserError(f"{field} is empty; name the folder that its weights were downloaded to{sampling}")
    found = _hash(folder)
    if promised and found != promised:
        raise UserError(
            f"{field}={folder}: its weights have the hash {found[:12]}..., these data were made with "
            f"{promised[:12]}...; name the folder of those weights"
        )
    return found


def widths(t5_folder: str, clip_folder: str) -> tuple[int, int]:
    """(token width, pooled width) of T5 and CLIP, from the configs in their folders."""
    found = described(clip_folder)
    return described(t5_folder, "d_model")["d_model"], found.get("text_config", found)["hidden_size"]


@dataclasses.dataclass(frozen=True)
class T5Clip:
    """The text encoder `t5+clip`: T5-v1.1's last layer as tokens, at their true number, and CLIP's pooled vector.

    As FLUX.1, Open-Sora 2.0 and Paris 2.0 have it, with XXL and ViT-L/14; of any size here. A text longer than CLIP's
    77 tokens is cut for CLIP alone. FLUX.1 and Open-Sora 2.0 were trained `padded`, with an empty text for none; at its
    true length, a text takes a tenth of the room, and none is nothing.
    """

    t5: str = ""  # folders of weights and tokenizers
    clip: str = ""
    max_tokens: int = 512
    padded: bool = False  # every text is filled up to max_tokens, as T5 fills it, and all of it is attended to
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)  # hashes; {}: those found

    stored: ClassVar[Any] = np.dtype(ml_dtypes.bfloat16)  # as the experts compute

    def __post_init__(self):
        found = {n: check_folder(f"text.{n}", getattr(self, n), self.weights.get(n, "")) for n in ("t5", "clip")}
        object.__setattr__(self, "weights", found)
        for name in found:
            tokenizer(getattr(self, name))

    @property
    def width(self) -> int:
        return widths(self.t5, self.clip)[0]

    @property
    def pooled_width(self) -> int:
        return widths(self.t5, self.clip)[1]

    def encode(self, texts: Sequence[str]) -> list[TextEncoding]:
        """Encodes texts; refuses an empty one, and one of more than `max_tokens` of T5's tokens."""
        pieces = [tokenizer(self.t5)(text) if text.strip() else [] for text in texts]
        for text, found in zip(texts, pieces, strict=True):
            check_length(text, len(found), self.max_tokens, "tokens")
        cuts = range(0, len(texts), BATCH_SIZES)
        return [one for i in cuts for one in self._encode(texts[i : i + BATCH_SIZES], pieces[i : i + BATCH_SIZES])]

    def _encode(self, texts: Sequence[str], pieces: Sequence[Sequence[int]]) -> list[TextEncoding]:
        (config, params), (clips, of_clip) = loaded("t5", self.t5), loaded("clip", self.clip)
        if clips.text is None:
            raise UserError(
                f"text.clip={self.clip} holds CLIP's vision encoder alone; name the folder of its text encoder"
            )
        ids, length = _padded(pieces, self.max_tokens if self.padded else TEXT_LENGTHS)
        length = np.full_like(length, self.max_tokens) if self.padded else length
        tokens = np.asarray(t5.encode(config, params, *placement.rows(ids, length), placement.dtype()))
        ends, places = [tokenizer(self.clip)(text) for text in texts], len(of_clip["text"]["places"])
        cut = [found if len(found) <= places else [*found[: places - 1], found[-1]] for found in ends]
        ids, _ = _padded(cut, min(TEXT_LENGTHS, places), fill=[found[-1] for found in cut])
        found = clip.encode_text(clips, of_clip, *placement.rows(ids[:, :places]), placement.dtype())
        made = zip(tokens[: len(texts)], length, np.asarray(found["pooled"])[: len(texts)], strict=True)
        return [TextEncoding(rounded(t[:n], self.stored), rounded(p, self.stored)) for t, n, p in made]

    def null(self) -> TextEncoding:
        """No text, for dropout and guidance: one token of zeros and pooled zeros; if padded, the encoding of ""."""
        if self.padded:
            return self._encode([""], [tokenizer(self.t5)("")])[0]
        return TextEncoding(np.zeros((1, self.width), np.float32), np.zeros(self.pooled_width, np.float32))

    def unknown_words(self, text: str) -> list[str]:
        """Every word is made of known pieces."""
        del text
        return []

    def describe(self) -> dict[str, Any]:
        sizes = {"width": self.width, "pooled_width": self.pooled_width}
        padded = {"padded": True} if self.padded else {}
        return {"name": "t5+clip", "max_tokens": self.max_tokens, **padded, **sizes, "weights": dict(self.weights)}


def _padded(pieces: Sequence[Sequence[int]], multiple: int, fill: Sequence[int] | None = None) -> Any:
    """Ids (B, L) int32, padded at the end (by zeros, or each with its own), and their true lengths (B,)."""
    length = np.asarray([len(found) for found in pieces], np.int32)
    ids = np.zeros((len(pieces), -(-int(length.max()) // multiple) * multiple), np.int32)
    for row, found in enumerate(pieces):
        ids[row] = fill[row] if fill else 0
        ids[row, : len(found)] = found
    return ids, length


@dataclasses.dataclass(frozen=True)
class Dinov2:
    """The features `dinov2`: the image token of frames spread evenly over a clip, averaged, of unit length."""

    weights: str = ""  # folder
    sha256: str = ""  # of the weights; "": those found

    def __post_init__(self):
        object.__setattr__(self, "sha256", check_folder("features.weights", self.weights, self.sha256))

    def __call__(self, videos: np.ndarray) -> np.ndarray:
        """(B, T, H, W, 3) uint8 to (B, D) float32."""
        config, params = loaded("dinov2", self.weights)
        (B, T), patch = videos.shape[:2], params["patches"]["weight"].shape[-1]
        chosen = np.linspace(0, T - 1, min(FRAMES, T)).round().astype(int)
        images = videos[:, chosen].reshape(-1, *videos.shape[2:])
        (middles,) = placement.rows(_middle(images))
        tokens = dinov2.encode(config, params, _scaled(middles, SIDE // patch * patch), placement.dtype())
        feature = np.asarray(tokens[: len(images), 0]).reshape(B, len(chosen), -1).mean(1)
        return (feature / np.linalg.norm(feature, axis=-1, keepdims=True)).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return {"name": "dinov2", "sha256": self.sha256}


def _middle(images: np.ndarray) -> np.ndarray:
    """The middle square of each image, (N, H, W, 3)."""
    _, H, W, _ = images.shape
    short = min(H, W)
    top, left = (H - short) // 2, (W - short) // 2
    return images[:, top : top + short, left : left + short]


@functools.partial(jax.jit, static_argnames="side")
def _scaled(images: jax.Array, side: int) -> jax.Array:
    """Images (N, S, S, 3) uint8 to (N, side, side, 3) in [0, 1]."""
    pixels = images.astype(jnp.float32) / 255
    return jnp.clip(jax.image.resize(pixels, (len(images), side, side, 3), "cubic", antialias=True), 0, 1)
