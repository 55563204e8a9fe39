"""Clips to records: the encoders of an experiment, batch by batch, and clips that cannot be encoded."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paris_jax.artifacts.schemas import CodecDescription, TextDescription
from paris_jax.config.experiment import Experiment
from paris_jax.data.records import Record
from paris_jax.data.sources.clip import Clip, Dropped
from paris_jax.encoders import codecs, features, text
from paris_jax.encoders.published import EncoderStore
from paris_jax.encoders.words import TextEncoding, words_of
from paris_jax.errors import UserError

BATCH = 16  # clips per encoder batch; another batch size may round differently
UNIT = {"mean": [0.0], "spread": [1.0]}  # statistics of latents that already have the scale of their published networks


def describe_encoders(
    experiment: Experiment, vocabulary: Iterable[str], store: EncoderStore | None = None
) -> dict[str, Any]:
    """Returns the manifest entries of codec, text encoder and features; raises UserError if one cannot run here."""
    return {
        "codec": codecs.codec(**dataclasses.asdict(experiment.codec), store=store).describe(),
        "text": text_encoder(experiment, vocabulary, store).describe(),
        "features": features.features(**dataclasses.asdict(experiment.features), store=store).describe(),
    }


def weights_of(codec: CodecDescription, text: TextDescription, features: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the hashes of the encoders' weights from their manifest entries; None for an encoder without weights."""
    hashes = getattr(codec, "sha256", None), getattr(text, "weights", None), features.get("sha256")
    return dict(zip(("codec", "text", "features"), hashes, strict=True))


def _refuse(item: Dropped) -> None:
    raise UserError(f"Clip {item} cannot be used; mend or remove it")


def encode(
    experiment: Experiment,
    clips: Iterable[Clip],
    store: EncoderStore | None = None,
    drop: Callable[[Dropped], None] = _refuse,
) -> Iterator[Record]:
    """Encodes clips to records, in order and in batches of BATCH clips.

    Args:
      experiment: config of the encoders.
      clips: of one size.
      store: encoders that are loaded already.
      drop: called with each clip that cannot be encoded; by default raises UserError.
    """
    store = store or EncoderStore()
    codec = codecs.codec(**dataclasses.asdict(experiment.codec), store=store)
    extract_features = features.features(**dataclasses.asdict(experiment.features), store=store)
    source = captioned(experiment, clips, store, drop)
    while batch := list(itertools.islice(source, BATCH)):
        videos = np.stack([clip.video for clip, _ in batch])
        images: Any = [None] * len(batch)
        if experiment.data.cond_images:
            ends = codecs.encode_images(codec, videos[:, [0, -1]].reshape(-1, *videos.shape[2:]))
            images = ends.reshape(len(batch), 2, *ends.shape[1:]).astype(np.float16)
        encoded = zip(batch, codec.encode(videos), extract_features(videos), images, strict=True)
        for (clip, (tokens, pooled)), latent, feature, ends in encoded:
            latent = latent.astype(np.float16)
            if not (np.isfinite(latent).all() and np.isfinite(feature).all()):
                drop(Dropped(clip.id, "encode", "has a latent or feature that is not finite"))
                continue
            yield Record(clip.id, latent, tokens, pooled, feature, clip.caption, clip.attributes, cond_images=ends)


def captioned(
    experiment: Experiment, clips: Iterable[Clip], store: EncoderStore, drop: Callable[[Dropped], None]
) -> Iterator[tuple[Clip, tuple[np.ndarray, np.ndarray]]]:
    """The clips whose captions can be encoded, with tokens and pooled embedding; BATCH captions are encoded at once."""
    embeddings: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of the last captions, which often repeat
    clips = iter(clips)
    while batch := list(itertools.islice(clips, BATCH)):
        new = [clip for clip in batch if clip.caption not in embeddings]
        embeddings |= _encode_captions(experiment, new, store, drop)
        embeddings = {clip.caption: embeddings[clip.caption] for clip in batch if clip.caption in embeddings}
        yield from ((clip, embeddings[clip.caption]) for clip in batch if clip.caption in embeddings)


def _encode_captions(
    experiment: Experiment, clips: Sequence[Clip], store: EncoderStore, drop: Callable[[Dropped], None]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Encodes each distinct caption to tokens and pooled embedding, in the dtype they are stored in.

    Clips whose captions cannot be encoded are dropped.
    """
    captions = list(dict.fromkeys(clip.caption for clip in clips))
    if not captions:
        return {}
    encoder = text_encoder(experiment, words_of(captions), store)
    try:
        encodings = encoder.encode(captions)
    except UserError:
        for clip in clips:
            try:
                encoder.encode([clip.caption])
            except UserError as error:
                drop(Dropped(clip.id, "caption", "has a caption that cannot be encoded", str(error)[:500]))
                captions = [caption for caption in captions if caption != clip.caption]
        encodings = encoder.encode(captions) if captions else []
    pairs = zip(captions, encodings, strict=True)
    return {caption: stored(encoding, encoder.stored) for caption, encoding in pairs}


def stored(encoding: TextEncoding, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and pooled embedding in the dtype they are stored in."""
    return encoding.tokens.astype(dtype), encoding.pooled.astype(dtype)


def text_encoder(experiment: Experiment, vocabulary: Iterable[str], store: EncoderStore | None = None) -> Any:
    """Returns the experiment's text encoder; only the encoder `words` uses `vocabulary`."""
    settings = experiment.text
    options: dict[str, Any] = {}
    if settings.name == "words":
        options = {"vocabulary": vocabulary, "width": settings.width}
    elif settings.name == "t5+clip":
        options = {name: getattr(settings, name) for name in ("t5", "clip", "pad_to_max_tokens", "suffix")}
    if store is not None and settings.name == "t5+clip":
        options["store"] = store
    return text.text_encoder(settings.name, max_tokens=settings.max_tokens, **options)
