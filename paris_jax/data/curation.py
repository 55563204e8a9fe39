"""Curation: which decoded clips are kept, their mirror images, and near duplicates."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from paris_jax.config.sections import CurationSettings
from paris_jax.data import video
from paris_jax.data.sources.clip import Clip, Dropped, Video
from paris_jax.errors import UserError

SIDES = re.compile(r"\b(left|right|(counter|anti)?-?clockwise)(\w*)\b", re.IGNORECASE)
FLIPPED = "#flipped"
COSINES = np.cos(np.pi / 64 * (2 * np.arange(32) + 1) * np.arange(8)[:, None]).astype(np.float32) / 4  # (8, 32), DCT-II
COSINES[0] /= np.sqrt(2)
WEAK = 6.0  # of a frequency, for levels of 255
HASH_BYTES = 24
BANDS = HASH_BYTES // 2  # of two bytes; two hashes that differ in fewer bits than there are bands agree in one


def clips(source: Video, first: int, settings: CurationSettings) -> Iterator[tuple[int, Clip | Dropped]]:
    """The clips of a video that are kept, from number `first` on, and those that are left out with their reasons."""
    for number, item in source.clips(first, settings):
        reason = fault(item, settings) if isinstance(item, Clip) else None
        if reason is not None:
            yield number, Dropped(item.id, "curate", *reason)
            continue
        yield number, item
        if isinstance(item, Clip) and settings.horizontal_flip != "off":
            yield number, flip(item)


def fault(clip: Clip, settings: CurationSettings) -> tuple[str, str] | None:
    """Why a clip is not kept, as reason and detail; None if it is."""
    words = len(clip.caption.split())
    if words < settings.min_caption_words:
        return "has a caption that is too short", f"{words} words of {settings.min_caption_words}"
    if settings.max_caption_words and words > settings.max_caption_words:
        return "has a caption that is too long", f"{words} words of {settings.max_caption_words}"
    if settings.min_brightness > 0 or settings.max_brightness < 255:
        level = float(clip.video.mean())
        if level < settings.min_brightness:
            return "is too dark", f"{level:.1f} of {settings.min_brightness:g}"
        if level > settings.max_brightness:
            return "is too bright", f"{level:.1f} of {settings.max_brightness:g}"
    if settings.min_motion > 0:
        level = motion(clip.video)
        if level < settings.min_motion:
            return "moves too little", f"{level:.2f} of {settings.min_motion:g}"
    return None


def motion(frames: np.ndarray) -> float:
    """Mean change of a pixel of (T, H, W, 3) uint8 from frame to frame, in levels; 0 for a single frame."""
    if len(frames) < 2:
        return 0.0
    # Frame by frame: the whole clip in wider numbers would take twice its memory.
    return float(np.mean([np.abs(b.astype(np.int16) - a).mean() for a, b in itertools.pairwise(frames)]))


def flip(clip: Clip) -> Clip:
    """The mirror image of a clip; it belongs to the same video."""
    mirrored = np.ascontiguousarray(clip.video[:, :, ::-1])
    return Clip(clip.id + FLIPPED, mirrored, clip.fps, clip.caption, clip.attributes)


def check_flip(clip: Clip, settings: CurationSettings) -> None:
    """Raises UserError for a caption that names left or right, which would be wrong for the mirror image."""
    if settings.horizontal_flip == "on" and names_a_side(clip.caption):
        raise UserError(
            f"curation.horizontal_flip=on: the caption of clip {clip.id} names a side ({clip.caption[:100]!r}), and "
            "would be wrong for its mirror image; leave it off, or set it to forced"
        )


def names_a_side(caption: str) -> bool:
    """Whether a caption would be wrong for the mirror image."""
    return bool(SIDES.search(caption))


def perceptual_hash(frames: np.ndarray) -> bytes:
    """Returns 192 bits of (T, H, W, 3) uint8: in three frames, which of the 64 lowest frequencies are above the median.

    Scaling, compression and small changes of brightness leave most bits as they are. Frequencies weaker than what
    compression adds do not count, so that all plain frames are alike.
    """
    chosen = frames[[0, len(frames) // 2, len(frames) - 1]]
    gray_3HW = np.stack([video.resize(frame, 32, 32) for frame in chosen]).astype(np.float32).mean(-1)
    low_3x64 = np.einsum("ai,nij,bj->nab", COSINES, gray_3HW, COSINES).reshape(3, 64)
    low_3x64[:, 0] = 0  # brightness
    bits = (low_3x64 > np.median(low_3x64, axis=1, keepdims=True) + WEAK).reshape(-1)
    # Neighbours go to different bands: simple pictures have long runs of zeros.
    return np.packbits(bits[np.arange(len(bits)) * 67 % len(bits)]).tobytes()


def near_duplicates(hashes: Iterable[bytes], most_bits: int) -> list[int]:
    """Returns the positions of hashes that differ in at most `most_bits` bits from an earlier one that stays.

    `most_bits` must be below BANDS: of two hashes that differ in fewer bits than there are bands, one band agrees.
    """
    if most_bits >= BANDS:
        raise ValueError(f"most_bits={most_bits}: must be below {BANDS}")
    kept: list[dict[bytes, list[bytes]]] = [defaultdict(list) for _ in range(BANDS)]
    repeated = []
    for position, found in enumerate(hashes):
        bands = [found[2 * band : 2 * band + 2] for band in range(BANDS)]
        number = int.from_bytes(found, "big")
        near = (other for each, known in zip(bands, kept, strict=True) for other in known.get(each, ()))
        if any((number ^ int.from_bytes(other, "big")).bit_count() <= most_bits for other in near):
            repeated.append(position)
            continue
        for each, known in zip(bands, kept, strict=True):
            known[each].append(found)
    return repeated
