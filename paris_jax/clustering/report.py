"""The clustering report: sizes, separation and typical clips of the clusters, as JSON data and as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from paris_jax.clustering.clusters import Clustering

EXAMPLES = 5


def report(
    partition: Clustering,
    features: np.ndarray,
    clusters: np.ndarray,
    captions: Sequence[str],
    attributes: Sequence[Mapping[str, str]],
    heldout: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Describes a partition, as JSON data.

    Args:
      partition: what `clusters.fit` found.
      features, clusters, captions, attributes: of the N clustered clips: (N, F), (N,), and N each.
      heldout: (M,) the clusters of the clips that were set apart, for validation and for the test.

    Returns:
      clips, validation, test: numbers of clips. inertia: sum of squared distances to the cluster's centroid, in spreads
      of a feature. explained: share of the variance that lies between clusters, 0 to 1. margin: mean over clips of
      (b - a) / max(a, b), a and b the distances to the own and the nearest other centroid (1: well apart; null for
      K = 1). centroid_distances: (K, K). purity: for each true attribute, the share of clips that have their cluster's
      most frequent value. clusters: for each, its clips, validation, test, share, margin, examples (captions nearest to
      the centroid), and how often each attribute value occurs.
    """
    num_clusters = len(partition.centroids)
    distances = partition.distances(features)
    own = distances[np.arange(len(clusters)), clusters]
    inertia = float(np.sum(own.astype(np.float64) ** 2))
    total = float(np.sum(partition.standardise(features).astype(np.float64) ** 2))
    margins = _margins(distances, own, clusters)
    apart = np.linalg.norm(partition.centroids[:, None] - partition.centroids[None], axis=-1)
    counts = [_attribute_counts(attributes, np.flatnonzero(clusters == k)) for k in range(num_clusters)]
    return {
        "clips": len(clusters),
        **{name: len(found) for name, found in heldout.items()},
        "inertia": inertia,
        "explained": 1 - inertia / total if total else 0.0,
        "margin": None if margins is None else float(margins.mean()),
        "centroid_distances": apart.astype(float).round(4).tolist(),
        "purity": _purity(attributes, counts),
        "clusters": [
            {
                "cluster": k,
                "clips": int(np.sum(clusters == k)),
                **{name: int(np.sum(found == k)) for name, found in heldout.items()},
                "share": float(np.mean(clusters == k)),
                "margin": None if margins is None else float(margins[clusters == k].mean()),
                "examples": _examples(captions, own, np.flatnonzero(clusters == k)),
                "attributes": counts[k],
            }
            for k in range(num_clusters)
        ],
    }


def _margins(distances: np.ndarray, own: np.ndarray, clusters: np.ndarray) -> np.ndarray | None:
    """(N,) silhouettes with centroids in the place of clips; None for a single cluster."""
    if distances.shape[1] == 1:
        return None
    others = distances.copy()
    others[np.arange(len(clusters)), clusters] = np.inf
    nearest = others.min(axis=1)
    return (nearest - own) / np.maximum(np.maximum(nearest, own), 1e-12)


def _attribute_counts(attributes: Sequence[Mapping[str, str]], rows: np.ndarray) -> dict[str, dict[str, int]]:
    """For each attribute its values among `rows`, the most frequent first."""
    counted: dict[str, Counter[str]] = {}
    for row in rows:
        for name, value in attributes[int(row)].items():
            counted.setdefault(name, Counter())[value] += 1
    return {name: dict(sorted(values.items(), key=lambda v: (-v[1], v[0]))) for name, values in sorted(counted.items())}


def _purity(attributes: Sequence[Mapping[str, str]], counts: Sequence[dict[str, dict[str, int]]]) -> dict[str, float]:
    """For each attribute that every clip has, the share of clips with their cluster's most frequent value."""
    shared = set.intersection(*(set(a) for a in attributes)) if attributes else set()
    return {name: sum(max(c[name].values()) for c in counts if name in c) / len(attributes) for name in sorted(shared)}


def _examples(captions: Sequence[str], own: np.ndarray, rows: np.ndarray) -> list[str]:
    """Different captions of the clips nearest to their centroid."""
    found: dict[str, None] = {}
    for row in rows[np.argsort(own[rows], kind="stable")]:
        found[captions[int(row)]] = None
        if len(found) == EXAMPLES:
            break
    return list(found)


def print_report(described: dict[str, Any], console: Console) -> None:
    """Prints a report as a table."""
    worlds = "world" in described["purity"]
    table = Table(title=f"{described['clips']} clips in {len(described['clusters'])} clusters")
    for heading in ("cluster", "clips", "validation", "test", "margin"):
        table.add_column(heading, justify="right")
    if worlds:
        table.add_column("world")
    table.add_column("for example", overflow="fold")
    for cluster in described["clusters"]:
        cells = [str(cluster["cluster"]), f"{cluster['clips']} ({cluster['share']:.0%})"]
        cells += [str(cluster["validation"]), str(cluster["test"])]
        cells.append("-" if cluster["margin"] is None else f"{cluster['margin']:.2f}")
        if worlds:
            found = cluster["attributes"].get("world", {})
            cells.append(", ".join(f"{name} {count / cluster['clips']:.0%}" for name, count in found.items()))
        table.add_row(*cells, cluster["examples"][0])
    console.print(table)
    apart = np.asarray(described["centroid_distances"])
    between = [f"{i}-{j} {apart[i, j]:.1f}" for i in range(len(apart)) for j in range(i)]
    lines = [f"variance between clusters {described['explained']:.0%}"]
    if between:
        lines.append(f"distances of centroids {', '.join(between[:10])}{', ...' if len(between) > 10 else ''}")
    if worlds:
        lines.append(f"purity against world {described['purity']['world']:.1%}")
    console.print("; ".join(lines), highlight=False)
