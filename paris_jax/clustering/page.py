"""Writes RUN/partition/report.html: the clusters to look at, on one page that needs no network.

Captions, ids and attributes are strangers' text: everything is escaped, and the page's policy forbids every request.
"""

import html
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import DataManifest
from paris_jax.clustering import sheets
from paris_jax.clustering.clips import Clips
from paris_jax.clustering.clusters import Clustering
from paris_jax.clustering.sheets import Map, Shown
from paris_jax.data import pages, previews

DROPPED = "dropped.jsonl"
LISTED = 50  # dropped clips
WIDTH, HEIGHT, MARGIN = 1000, 640, 40  # of the map
THUMBNAIL = 40
THUMBNAILS = 6  # of each cluster on the map
SHOWN_ATTRIBUTES = 8  # values of an attribute


class Dropped(msgspec.Struct, frozen=True):
    """A line of the list of dropped clips."""

    id: str
    stage: str = ""
    reason: str = ""
    detail: str = ""


def make(
    name: str,
    described: Mapping[str, Any],
    partition: Clustering,
    clips: Clips,
    labels: np.ndarray,
    folder: epath.Path,
    data: DataManifest,
) -> str:
    """The page of a partition.

    Args:
      name: of the experiment.
      described: `Report.to_json`.
      partition, clips, labels: the clustering; labels (N,) by number of the clip.
      folder, data: of the prepared clips, and its manifest.
    """
    projection = sheets.make_map(partition, clips, labels)
    shown = sheets.clips_with_previews(partition, clips, labels, projection, folder)
    return render(name, described, shown, projection, read_dropped(folder, data), data.fps)


def render(
    name: str,
    described: Mapping[str, Any],
    shown: Sequence[Sequence[Shown]],
    projection: Map,
    dropped: Sequence[Dropped],
    fps: float,
) -> str:
    """Returns the page as HTML text."""
    clusters = described["clusters"]
    headline = f"{described['clips']:,} clips in {len(clusters)} cluster{'s' * (len(clusters) > 1)}"
    if described["margin"] is not None:
        headline += f", {_apart(described['margin'])}"
    page = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return page.substitute(
        policy=pages.POLICY,
        style=pages.style(),
        script=pages.script(),
        experiment=html.escape(name),
        headline=html.escape(headline),
        lead="One expert is trained on each cluster, alone. Clips of the validation and test splits are of other "
        "videos than those that are trained on.",
        tiles="".join(_tile(*tile) for tile in _tiles(described, dropped)),
        sheet_text=f"up to {sheets.NEAREST} clips nearest to the centroid, then up to {sheets.OTHERS} others, among "
        f"those of which prepare kept a preview ({previews.PER_SHARD} of each shard).",
        cards="".join(_card(cluster, shown[k], described, fps) for k, cluster in enumerate(clusters)),
        legend=_legend(len(clusters)),
        map=_map(projection, shown),
        points=f"{len(projection.labels):,}",
        explained=f"{projection.explained:.0%}",
        distances=_distances(described),
        attributes=_attributes(described),
        dropped=_dropped(dropped),
        footer="The same figures are in report.json, the cluster of each clip is in assignment.jsonl.",
    )


def read_dropped(folder: epath.Path, data: DataManifest) -> list[Dropped]:
    """The clips that prepare dropped, with stage and reason."""
    if DROPPED not in data.files:
        return []
    lines = (folder / DROPPED).read_bytes().split(b"\n")
    return [manifest.decode(line, folder / DROPPED, Dropped, manifest.REMEDY) for line in lines if line.strip()]


def _apart(margin: float) -> str:
    return "well apart" if margin > 0.5 else "apart" if margin > 0.25 else "close to each other"


def _tiles(described: Mapping[str, Any], dropped: Sequence[Dropped]) -> list[tuple[str, str, str]]:
    low, high = described["balance"]
    held = described["validation"] + described["test"]
    tiles = [
        ("Sizes", f"{low:.2f} to {high:.2f}", "smallest and largest cluster, in units of clips / K"),
        ("Variance", f"{described['explained']:.0%}", "of the features lies between clusters"),
        (
            "Held out",
            f"{held:,}",
            f"{described['validation']:,} clips for validation, {described['test']:,} for the test",
        ),
        ("Dropped", f"{len(dropped):,}", "clips and files that could not be used"),
    ]
    if described["margin"] is not None:
        about = "mean of (b - a) / max(a, b), the distances to the nearest other and to the own centroid; at most 1"
        tiles.insert(2, ("Margin", f"{described['margin']:.2f}", about))
    return tiles


def _tile(title: str, value: str, about: str) -> str:
    return (
        f'<section class="tile"><h3>{html.escape(title)}</h3><dl><dt></dt><dd>{html.escape(value)}</dd></dl>'
        f'<span class="note">{html.escape(about)}</span></section>'
    )


def _part(k: int) -> str:
    return f"part{k % 8}"


def _card(cluster: Mapping[str, Any], shown: Sequence[Shown], described: Mapping[str, Any], fps: float) -> str:
    k = cluster["cluster"]
    figures = [f"{cluster['clips']:,} clips ({cluster['share']:.1%})", f"validation {cluster['validation']:,}"]
    figures.append(f"test {cluster['test']:,}")
    if cluster["margin"] is not None:
        figures.append(f"margin {cluster['margin']:.2f}")
    sheet = '<p class="note">No clip of this cluster has a preview.</p>'
    if shown:
        address = pages.video_address(sheets.contact_sheet(list(shown)), min(fps, 8.0), scale=1)
        sheet = (
            f'<video muted loop playsinline preload="auto" aria-label="clips of cluster {k}" src="{address}"></video>'
            f'<ol class="captions">{"".join(f"<li>{html.escape(clip.caption)}</li>" for clip in shown)}</ol>'
        )
    words = "".join(
        f"<li>{html.escape(w['word'])} <small>{w['share']:.0%}, others {w['others']:.0%}</small></li>"
        for w in cluster["words"]
    )
    return (
        f'<article class="card {_part(k)}"><h3>Cluster {k}</h3><p class="note">{", ".join(figures)}</p>'
        f'<div class="use"><i style="width:{100 * cluster["share"]:.1f}%"></i></div>{sheet}'
        f'<ul class="words">{words or "<li>No word stands out.</li>"}</ul></article>'
    )


def _legend(count: int) -> str:
    marks = (f'<span class="{_part(k)}"><i class="swatch"></i>cluster {k}</span>' for k in range(count))
    return f'<div class="legend">{"".join(marks)}</div>'


def _map(projection: Map, shown: Sequence[Sequence[Shown]]) -> str:
    """Points of a sample, and thumbnails of some clips of each cluster at their positions."""
    positions = np.concatenate([projection.positions, *([clip.position[None] for clips in shown for clip in clips])])
    low, high = positions.min(axis=0), positions.max(axis=0)
    size = np.array([WIDTH, HEIGHT]) - 2 * MARGIN

    def at(position: np.ndarray) -> tuple[float, float]:
        x, y = (position - low) / np.maximum(high - low, 1e-9) * size + MARGIN
        return float(x), HEIGHT - float(y)

    parts = []
    for position, label in zip(projection.positions, projection.labels.tolist(), strict=True):
        x, y = at(position)
        parts.append(f'<circle class="{_part(label)}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    for k, clips in enumerate(shown):
        for clip in clips[-THUMBNAILS:]:
            x, y = at(clip.position)
            scale = THUMBNAIL / max(clip.video.shape[1:3])
            height, width = (scale * side for side in clip.video.shape[1:3])
            box = f'x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}"'
            title = f"<title>{html.escape(f'cluster {k}: {clip.caption}')}</title>"
            parts.append(f'<image href="{pages.image_address(clip.video[0])}" {box}>{title}</image>')
            parts.append(f'<rect class="frame {_part(k)}" {box}/>')
    return (
        f'<svg class="plot map" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Map of the clips">'
        f"{''.join(parts)}</svg>"
    )


def _distances(described: Mapping[str, Any]) -> str:
    apart, clusters = described["centroid_distances"], described["clusters"]
    head = "".join(f'<th class="number">{c["cluster"]}</th>' for c in clusters)
    rows = [f"<tr><th>cluster</th>{head}</tr>"]
    for i, row in enumerate(apart):
        cells = "".join(
            f'<td class="number{" own" if i == j else ""}">{clusters[i]["distance"] if i == j else value:.2f}</td>'
            for j, value in enumerate(row)
        )
        rows.append(f"<tr><th>{i}</th>{cells}</tr>")
    return "".join(rows)


def _attributes(described: Mapping[str, Any]) -> str:
    """Known attributes by cluster; "" where clips have none."""
    names = sorted({name for cluster in described["clusters"] for name in cluster["attributes"]})
    if not names:
        return ""
    rows = ["<tr><th>cluster</th>" + "".join(f"<th>{html.escape(name)}</th>" for name in names) + "</tr>"]
    for cluster in described["clusters"]:
        cells = "".join(f"<td>{_values(cluster, name)}</td>" for name in names)
        rows.append(f"<tr><td>{cluster['cluster']}</td>{cells}</tr>")
    purity = "".join(
        f"<td>{described['purity'][name]:.1%}</td>" if name in described["purity"] else "<td>-</td>" for name in names
    )
    rows.append(f'<tr class="sum"><td>purity</td>{purity}</tr>')
    about = "Known values of the clips. Purity is the share of clips with the most frequent value of their cluster."
    return (
        f'<section id="attributes"><h2>Attributes</h2><p class="about">{about}</p>'
        f'<div class="scroll"><table class="dense">{"".join(rows)}</table></div></section>'
    )


def _values(cluster: Mapping[str, Any], name: str) -> str:
    values = list(cluster["attributes"].get(name, {}).items())
    shown = [f"{html.escape(value)} {count / cluster['clips']:.0%}" for value, count in values[:SHOWN_ATTRIBUTES]]
    return ", ".join(shown) + (f" and {len(values) - len(shown)} more" if len(values) > len(shown) else "")


def _dropped(dropped: Sequence[Dropped]) -> str:
    if not dropped:
        return '<p class="about">Every clip and file of the source was used.</p>'
    counts = Counter((item.stage, item.reason) for item in dropped)
    rows = [
        f'<tr><td>{html.escape(stage)}</td><td>{html.escape(reason)}</td><td class="number">{count:,}</td></tr>'
        for (stage, reason), count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
    listed = [
        f"<tr><td>{html.escape(item.id)}</td><td>{html.escape(item.reason)}"
        f"<small>{html.escape(item.detail)}</small></td></tr>"
        for item in dropped[:LISTED]
    ]
    more = f"The first {LISTED} of them; all are in RUN/data/{DROPPED}." if len(dropped) > LISTED else "All of them:"
    return (
        '<div class="scroll"><table class="dense"><tr><th>stage</th><th>reason</th><th class="number">clips</th></tr>'
        f'{"".join(rows)}</table></div><p class="about">{more}</p>'
        f'<div class="scroll"><table class="dense"><tr><th>clip or file</th><th>reason</th></tr>{"".join(listed)}'
        "</table></div>"
    )
