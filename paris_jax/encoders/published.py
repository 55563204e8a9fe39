"""Published encoders: T5 and CLIP for text, DINOv2 for features.

Weights are read from folders that the user names, in Hugging Face's format. Descriptions hold the hashes of the
weights, not the folders: encoded data can move to another machine, whose own folder is checked.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import T5ClipDescription
from paris_jax.artifacts.tensors import Tensors
from paris_jax.config import hashing
from paris_jax.encoders import clip, dinov2, hunyuan, placement, t5
from paris_jax.encoders.tokens import Tokenize, tokenizer
from paris_jax.encoders.words import TextEncoding, check_length, rounded
from paris_jax.errors import UserError
from paris_jax.weights.reading import read_config

TEXT_LENGTHS = 32  # texts are padded to multiples of this, so that few lengths are compiled
BATCH_SIZE = 16  # texts
READERS = {"t5": t5.read, "clip": clip.read, "dinov2": dinov2.read, "hunyuan": hunyuan.read}
FRAMES, SIDE = 4, 224  # frames per clip for DINOv2, and their pixels per side: our choice


class EncoderStore:
    """Weights of published encoders on this machine's devices, and their tokenizers, each read once.

    Each ensemble and each data job owns a store; dropping encoders from one leaves the others. Files that change under
    the same path are read and checked again.
    """

    def __init__(self):
        self._weights: dict[tuple[str, str], tuple[Any, tuple[Any, Any]]] = {}
        self._hashes: dict[str, tuple[Any, str]] = {}
        self._tokenizers: dict[str, Tokenize] = {}

    def load(self, kind: str, folder: str, sha256: str = "") -> tuple[Any, Any]:
        """Config and weights of an encoder, placed on devices (`encoders.placement`).

        Raises:
          UserError: the files of the folder do not match `sha256`, or no longer.
        """
        now = _fingerprint(folder)
        known = self._weights.get((kind, folder))
        if known is None or known[0] != now:
            self.check(f"{kind} weights", folder, sha256)
            self._weights.pop((kind, folder), None)  # frees the memory before the new weights need it
            config, params = READERS[kind](folder)
            if kind == "clip":  # the vision tower is not used
                params = {name: params[name] for name in params if name == "text"}
            self._weights[kind, folder] = now, (config, placement.put(params))
        return self._weights[kind, folder][1]

    def drop(self, *kinds: str) -> None:
        """Frees the weights of these encoders, by default of all."""
        for key in [key for key in self._weights if not kinds or key[0] in kinds]:
            del self._weights[key]

    @property
    def kinds(self) -> list[str]:
        """The encoders whose weights are held."""
        return [kind for kind, _ in self._weights]

    def tokenizer(self, folder: str) -> Tokenize:
        if folder not in self._tokenizers:
            self._tokenizers[folder] = tokenizer(folder)
        return self._tokenizers[folder]

    def sha256(self, folder: str) -> str:
        """Hash of all weights in a folder; computed again when a file changes."""
        now = _fingerprint(folder)
        if folder not in self._hashes or self._hashes[folder][0] != now:
            files = Tensors(folder).files
            self._hashes[folder] = now, hashing.hash_text(" ".join(manifest.hash_file(file) for file in files))
        return self._hashes[folder][1]

    def check(self, field: str, folder: str, sha256: str) -> str:
        """The hash of a folder's weights; raises UserError for an empty name or weights that do not match `sha256`."""
        if not folder:
            name = {"codec.weights": "vae", "text.t5": "t5", "text.clip": "clip"}.get(field)
            sampling = (
                f"; to sample, --{name}=DIR, encoders={{'{name}': ...}} or PARIS_JAX_{name.upper()}" if name else ""
            )
            raise UserError(f"{field} is empty; name the folder with its downloaded weights{sampling}")
        actual = self.sha256(folder)
        if sha256 and actual != sha256:
            raise UserError(
                f"{field}={folder}: its weights have the hash {actual[:12]}..., this data was made with "
                f"{sha256[:12]}...; name the folder of those weights"
            )
        return actual


def _fingerprint(folder: str) -> tuple[Any, ...]:
    """Name, size, modification time and inode of each file of weights: cheap to read, and changed by a swapped file."""
    found = []
    for file in map(str, Tensors(folder).files):
        if "://" in file:
            remote = epath.Path(file).stat()
            found.append((file, remote.length, remote.mtime, 0))
        else:
            local = os.stat(file)
            found.append((file, local.st_size, local.st_mtime_ns, local.st_ino))
    return tuple(found)


def store_field() -> Any:
    """The dataclass field for an encoder's store of weights; comparisons ignore it."""
    return dataclasses.field(default_factory=EncoderStore, compare=False, repr=False)


def widths(t5_folder: str, clip_folder: str) -> tuple[int, int]:
    """(token width, pooled width) of T5 and CLIP, from the configs in their folders."""
    described = read_config(clip_folder, clip.ClipSizes)
    width = (described.text_config or described).hidden_size
    if width is None:
        raise UserError(f"{clip_folder}: its config.json lacks hidden_size; download it again")
    return read_config(t5_folder, t5.T5Sizes).d_model, width


@dataclasses.dataclass(frozen=True)
class T5Clip:
    """The text encoder `t5+clip`: T5-v1.1's last layer as tokens, without padding, and CLIP's pooled vector.

    FLUX.1, Open-Sora 2.0 and Paris 2.0 use T5-XXL and CLIP ViT-L/14; here they may have any size. Texts longer than
    CLIP's 77 tokens are cut for CLIP alone. FLUX.1 and Open-Sora 2.0 were trained with `pad_to_max_tokens`, and with
    the encoding of an empty text as null embedding; without padding, texts take a tenth of the space, and the null
    embedding is zeros.
    """

    t5: str = ""  # folders of weights and tokenizers
    clip: str = ""
    max_tokens: int = 512
    pad_to_max_tokens: bool = False  # pad every text to max_tokens with T5's padding, and attend to all of it
    suffix: str = ""  # words after every text; Open-Sora 2.0: "24 FPS. 4 motion score."
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)  # hashes; {}: any
    store: EncoderStore = store_field()

    stored: ClassVar[Any] = np.dtype(ml_dtypes.bfloat16)  # the compute dtype of the experts

    def __post_init__(self):
        found = {n: self.store.check(f"text.{n}", getattr(self, n), self.weights.get(n, "")) for n in ("t5", "clip")}
        object.__setattr__(self, "weights", found)
        for name in found:
            self.store.tokenizer(getattr(self, name))

    @property
    def width(self) -> int:
        return widths(self.t5, self.clip)[0]

    @property
    def pooled_width(self) -> int:
        return widths(self.t5, self.clip)[1]

    def encode(self, texts: Sequence[str]) -> list[TextEncoding]:
        """Encodes texts; raises UserError for an empty one, or for more than `max_tokens` of T5's tokens."""
        texts = [self._with_suffix(text) for text in texts]
        tokenize = self.store.tokenizer(self.t5)
        pieces = [tokenize(text) if text.strip() else [] for text in texts]
        for text, found in zip(texts, pieces, strict=True):
            check_length(text, len(found), self.max_tokens, "tokens")
        cuts = range(0, len(texts), BATCH_SIZE)
        return [one for i in cuts for one in self._encode(texts[i : i + BATCH_SIZE], pieces[i : i + BATCH_SIZE])]

    def _encode(self, texts: Sequence[str], pieces: Sequence[Sequence[int]]) -> list[TextEncoding]:
        config, params = self.store.load("t5", self.t5, self.weights["t5"])
        clips, of_clip = self.store.load("clip", self.clip, self.weights["clip"])
        if clips.text is None:
            raise UserError(
                f"text.clip={self.clip} holds CLIP's vision encoder alone; name the folder of its text encoder"
            )
        ids, length = _padded(pieces, self.max_tokens if self.pad_to_max_tokens else TEXT_LENGTHS)
        length = np.full_like(length, self.max_tokens) if self.pad_to_max_tokens else length
        tokens = np.asarray(t5.encode(config, params, *placement.rows(ids, length), placement.dtype()))
        ends, positions = [self.store.tokenizer(self.clip)(text) for text in texts], len(of_clip["text"]["positions"])
        cut = [found if len(found) <= positions else [*found[: positions - 1], found[-1]] for found in ends]
        ids, _ = _padded(cut, min(TEXT_LENGTHS, positions), fill=[found[-1] for found in cut])
        found = clip.encode_text(clips, of_clip, *placement.rows(ids[:, :positions]), placement.dtype())
        made = zip(tokens[: len(texts)], length, np.asarray(found["pooled"])[: len(texts)], strict=True)
        return [TextEncoding(rounded(t[:n], self.stored), rounded(p, self.stored)) for t, n, p in made]

    def _with_suffix(self, text: str) -> str:
        """Appends the suffix to a text as a sentence of its own; an empty text stays empty."""
        if not self.suffix or not text.strip():
            return text
        text = text.strip()
        return f"{text}{'' if text.endswith('.') else '.'} {self.suffix}"

    def null(self) -> TextEncoding:
        """The null embedding: one token of zeros and pooled zeros, or with padding the encoding of ""."""
        if self.pad_to_max_tokens:
            return self._encode([""], [self.store.tokenizer(self.t5)("")])[0]
        return TextEncoding(np.zeros((1, self.width), np.float32), np.zeros(self.pooled_width, np.float32))

    def unknown_words(self, text: str) -> dict[str, str]:
        """Empty: word pieces cover every word."""
        del text
        return {}

    def unload(self) -> None:
        """Frees the weights; the next text reads them again."""
        self.store.drop("t5", "clip")

    def describe(self) -> T5ClipDescription:
        return T5ClipDescription(
            self.max_tokens, self.width, self.pooled_width, dict(self.weights), self.pad_to_max_tokens, self.suffix
        )


def _padded(pieces: Sequence[Sequence[int]], multiple: int, fill: Sequence[int] | None = None) -> Any:
    """Ids (B, L) int32, padded at the end with zeros or with `fill`, and their true lengths (B,)."""
    length = np.asarray([len(found) for found in pieces], np.int32)
    ids = np.zeros((len(pieces), -(-int(length.max()) // multiple) * multiple), np.int32)
    for row, found in enumerate(pieces):
        ids[row] = fill[row] if fill else 0
        ids[row, : len(found)] = found
    return ids, length


@dataclasses.dataclass(frozen=True)
class Dinov2:
    """The features `dinov2`: class tokens of evenly spaced frames, averaged and normalised to unit length."""

    weights: str = ""  # folder
    sha256: str = ""  # of the weights; "": those found
    store: EncoderStore = store_field()

    def __post_init__(self):
        object.__setattr__(self, "sha256", self.store.check("features.weights", self.weights, self.sha256))

    def __call__(self, videos: np.ndarray) -> np.ndarray:
        """(B, T, H, W, 3) uint8 to (B, D) float32."""
        config, params = self.store.load("dinov2", self.weights, self.sha256)
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
    """Crops each image (N, H, W, 3) to its middle square."""
    _, H, W, _ = images.shape
    short = min(H, W)
    top, left = (H - short) // 2, (W - short) // 2
    return images[:, top : top + short, left : left + short]


@functools.partial(jax.jit, static_argnames="side")
def _scaled(images: jax.Array, side: int) -> jax.Array:
    """Resizes images (N, S, S, 3) uint8 to (N, side, side, 3) in [0, 1]."""
    pixels = images.astype(jnp.float32) / 255
    return jnp.clip(jax.image.resize(pixels, (len(images), side, side, 3), "cubic", antialias=True), 0, 1)
