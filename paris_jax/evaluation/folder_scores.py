"""`paris-jax evaluate --generated=DIR --reference=DIR`: scores any videos against any others."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from paris_jax.artifacts import locks, manifest
from paris_jax.artifacts.schemas import EvaluationManifest
from paris_jax.config import hashing
from paris_jax.data.sources import folder
from paris_jax.data.sources.captions import find_tables
from paris_jax.errors import UserError
from paris_jax.evaluation import distances, estimates, features, folders, results
from paris_jax.evaluation.cache import ResultCache
from paris_jax.evaluation.features import FeatureNetwork, TextScores, WeightFiles
from paris_jax.evaluation.folders import ClipRule, VideoFolder
from paris_jax.evaluation.metrics.aesthetic import aesthetic_scores
from paris_jax.evaluation.metrics.clip_score import clip_scores
from paris_jax.evaluation.metrics.motion import motion_and_flicker

logger = logging.getLogger(__name__)
SCHEMA, RESULTS, PARTIAL = "paris_jax/folders/1", "results.json", ".partial"
CHUNK = 32  # videos that are decoded at a time


@dataclasses.dataclass(frozen=True)
class FolderRequest:
    """The sets that are compared.

    Attributes:
      generated, reference: folders of videos; out: folder to write; "" for one beside `generated`.
      num_clips: videos of each folder, drawn by (seed, name); None takes all, which must then be equally many.
      allow_degenerate: count videos of one colour, and videos that are there twice.
    """

    generated: str
    reference: str
    out: str = ""
    num_clips: int | None = None
    rule: ClipRule = ClipRule()
    files: WeightFiles = WeightFiles(i3d=features.INSTALLED)
    allow_degenerate: bool = False

    @property
    def folder(self) -> epath.Path:
        generated = epath.Path(self.generated)
        return epath.Path(self.out) if self.out else generated.parent / f"{generated.name}.evaluation"


def evaluate_folders(request: FolderRequest) -> dict[str, Any]:
    """Scores `generated` against `reference`, writes OUT/results.json and returns its contents.

    Features are cached by chunk, so an interrupted evaluation resumes; a finished one of the same files is not
    repeated.

    Raises:
      UserError: unequal numbers of videos, too few frames, sizes that differ, videos that are constant or there twice,
        missing weights.
    """
    generated, reference, others = chosen(request)
    networks, texts = features.networks(request.files), TextScores.load(request.files)
    for network in networks:
        network.check_frames(request.rule.num_frames)
    key = _key(request, networks, texts, [generated, reference, *([others] if others else [])])
    with locks.only_writer(request.folder):
        path = request.folder / RESULTS
        if manifest.exists(request.folder) and manifest.read(request.folder, EvaluationManifest).evaluation_hash == key:
            logger.info("the evaluation is done already, with the same videos, settings and versions: %s", path)
            return manifest.read_json(path)
        cache = ResultCache(request.folder / PARTIAL, key)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            measured = [
                _Measured.of(videos, request, networks, texts, cache, progress)
                for videos in (generated, reference, others)
                if videos is not None
            ]
        found = _results(request, key, networks, texts, measured)
        manifest.write_json(path, found)
        manifest.write(request.folder, EvaluationManifest, [RESULTS], "", evaluation_hash=key)
        cache.clear()
    logger.info("%s", table(found))
    logger.info("the evaluation is done: %s", path)
    return found


def chosen(request: FolderRequest) -> tuple[VideoFolder, VideoFolder, VideoFolder | None]:
    """The videos to compare, and as many others of the reference for the floor, where there are enough.

    Raises:
      UserError: the folders hold unequally many videos and `num_clips` is not given, or fewer than it.
    """
    generated = VideoFolder.open(request.generated, "generated")
    reference = VideoFolder.open(request.reference, "reference")
    count = request.num_clips
    if count is None:
        count = len(generated.names)
        if count != len(reference.names):
            raise UserError(
                f"--generated holds {count} videos and --reference {len(reference.names)}: a distance is biased by "
                f"their number, so they must be equally many; give --num_clips={min(count, len(reference.names))}"
            )
    if count < 2:
        raise UserError(f"--num_clips={count}: must be at least 2")
    seed = request.rule.seed
    first = reference.choose(count, seed)
    is_enough = len(reference.names) >= 2 * count
    others = reference.choose(count, seed, leave_out=set(first.names)) if is_enough else None
    return generated.choose(count, seed), first, others


def _key(
    request: FolderRequest, networks: Sequence[FeatureNetwork], texts: TextScores | None, sets: Sequence[VideoFolder]
) -> str:
    """Hash of everything that decides the scores."""
    inputs = {
        "rule": dataclasses.asdict(request.rule),
        "files": [videos.fingerprint() for videos in sets],
        "allow_degenerate": request.allow_degenerate,
        "networks": features.describe(networks) | {n.name: n.sha256 for n in networks},
        "texts": texts.describe() if texts else {},
        "versions": {name: manifest.versions()[name] for name in ("paris-jax", "jax")},
        "schema": SCHEMA,
    }
    return hashing.hash_text(hashing.canonical_json(inputs))


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Features of one set by network, and scores of its videos."""

    features: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    shape: tuple[int, ...]
    cut: int

    @classmethod
    def of(
        cls,
        videos: VideoFolder,
        request: FolderRequest,
        networks: Sequence[FeatureNetwork],
        texts: TextScores | None,
        cache: ResultCache,
        progress: Progress,
    ) -> "_Measured":
        captions = _captions(videos) if texts else {}
        task, parts = progress.add_task(f"{videos.flag} videos", total=len(videos.names)), []
        for start in range(0, len(videos.names), CHUNK):
            names = videos.names[start : start + CHUNK]

            def make(names=names) -> dict[str, np.ndarray]:
                clips = videos.read(names, request.rule)
                return _measure(clips, networks, texts, [captions.get(name, "") for name in names])

            set_hash = hashing.hash_text("\n".join(videos.names))[:8]
            parts.append(cache.get(f"{videos.flag}-{set_hash}-{start:06d}", make))
            progress.advance(task, len(names))
        sizes = {tuple(part["shape"]) for part in parts}
        if len(sizes) > 1:
            shown = " and ".join(f"{size[1]} x {size[2]}" for size in sorted(sizes)[:2])
            raise UserError(f"--{videos.flag}={videos.root} has videos of {shown} pixels; give one --size=HEIGHT,WIDTH")
        whole = {
            name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name not in ("shape", "cut")
        }
        if not request.allow_degenerate:
            folders.check_distinct(videos, whole["hash"], whole["constant"])
        by_network = {network.name: whole.pop(f"features {network.name}") for network in networks}
        scores = {name: values for name, values in whole.items() if name not in ("hash", "constant")}
        return cls(by_network, scores, sizes.pop(), sum(int(part["cut"][0]) for part in parts))


def _measure(
    clips: np.ndarray, networks: Sequence[FeatureNetwork], texts: TextScores | None, captions: list[str]
) -> dict[str, np.ndarray]:
    """Everything that is kept of a chunk of clips (N, T, H, W, 3) uint8."""
    pixels = clips.astype(np.float32) / 127.5 - 1
    flat = clips.reshape(len(clips), -1)
    found = {f"features {network.name}": network(clips) for network in networks}
    found |= dict(zip(("motion", "flicker"), motion_and_flicker(pixels), strict=True))
    found |= {"hash": folders.content_hashes(clips), "constant": flat.max(1) == flat.min(1)}
    found |= {"shape": np.array(clips.shape[1:4]), "cut": np.zeros(1, int)}
    if texts:
        frames = texts.encoder.embed_frames(clips)
        if any(captions):
            embedded, cut = texts.encoder.embed_texts(captions)
            found |= {"clip": clip_scores(frames, embedded), "cut": np.array([cut])}
        if texts.head:
            found["aesthetic"] = aesthetic_scores(texts.head, frames)
    return found


def _captions(videos: VideoFolder) -> dict[str, str]:
    """Captions of the generated videos, which a CLIP score needs; the reference has none where no file gives them."""
    has_some = bool(find_tables(Path(videos.root), "")) or any(videos.root.glob("**/*.txt"))
    return {} if videos.flag == "reference" and not has_some else folder.read_captions(videos.root)


LABELS = {
    "motion": ("Motion, px/frame", None),
    "flicker": ("Temporal flicker, gray levels", None),
    "clip": ("CLIP score", "higher"),
    "aesthetic": ("Aesthetic score", "higher"),
}


def _results(
    request: FolderRequest,
    key: str,
    networks: Sequence[FeatureNetwork],
    texts: TextScores | None,
    measured: Sequence[_Measured],
) -> dict[str, Any]:
    generated, reference = measured[:2]
    if generated.shape != reference.shape:
        raise UserError(
            f"--generated has videos of {generated.shape[1]} x {generated.shape[2]} pixels and --reference of "
            f"{reference.shape[1]} x {reference.shape[2]}: sharpness alone would separate them; give one "
            "--size=HEIGHT,WIDTH"
        )
    others = measured[2].features if len(measured) > 2 else None
    rows, left_out = distances.rows(networks, generated.features, reference.features, others)
    for name, (label, better) in LABELS.items():
        if name in generated.scores:
            real = reference.scores.get(name)
            rows.append(
                {
                    "id": name,
                    "label": label,
                    "better": better,
                    "score": estimates.mean(generated.scores[name]),
                    "floor": None if real is None else estimates.mean(real),
                    "floor_clips": 0 if real is None else len(real),
                }
            )
    return {
        "schema": SCHEMA,
        "evaluation_hash": key,
        "protocol": _protocol(request, networks, texts, generated, others is not None),
        "left_out": left_out,
        "scores": rows,
    }


def _protocol(
    request: FolderRequest,
    networks: Sequence[FeatureNetwork],
    texts: TextScores | None,
    generated: _Measured,
    has_others: bool,
) -> dict[str, Any]:
    frames, height, width = generated.shape
    count = len(generated.scores["motion"])
    floor = (
        f"{count} other reference videos" if has_others else f"two halves of the reference, {count // 2} videos each"
    )
    found = {
        "generated": request.generated,
        "reference": request.reference,
        "videos": f"{count} of each, drawn by (seed {request.rule.seed}, name)",
        **request.rule.describe(),
        "pixels": f"{frames} x {height} x {width} (frames x height x width), 8 bits",
        **features.describe(networks),
        **(texts.describe() if texts else {}),
        "floor": floor,
        "intervals": "standard errors; of distances, jackknife over 16 groups of clips (8 for limits)",
        "videos of one colour or there twice": "counted" if request.allow_degenerate else "none",
        "device": jax.devices()[0].device_kind,
        "versions": manifest.versions(),
    }
    return found | ({"texts cut at CLIP's length": generated.cut} if texts else {})


def table(found: dict[str, Any]) -> str:
    """The scores as aligned lines: label, score, floor or real value."""
    lines = []
    for row in found["scores"]:
        at = f" at {row['floor_clips']} clips" if row["id"].endswith(("frechet", "kernel", "limit")) else ""
        name = "floor" if at else "reference"
        real = f"   {name} {results.format_estimate(row['floor'])}{at}" if row["floor"] else ""
        lines.append(f"{row['label']:<60} {results.format_estimate(row['score'])}{real}")
    return "\n".join([*lines, *found["left_out"]])
