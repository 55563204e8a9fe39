"""The clustering report: sizes, separation, words and typical clips of the clusters, as JSON data and as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from paris_jax.clustering.clusters import Clustering
from paris_jax.clustering.heldout import SPLITS, TRAIN
from paris_jax.clustering.words import WordCounts

EXAMPLES = 8


class Report:
    """Describes a partition, block by block of its clips."""

    def __init__(self, partition: Clustering):
        num_clusters = len(partition.centroids)
        self.partition = partition
        self.sizes = np.zeros((len(SPLITS), num_clusters), np.int64)
        self.inertia = self.total = 0.0
        self.margins_K = np.zeros(num_clusters)  # sums
        self.distances_K = np.zeros(num_clusters)
        self.words = WordCounts(num_clusters)
        self.attributes: list[dict[str, Counter[str]]] = [{} for _ in range(num_clusters)]
        self.having: Counter[str] = Counter()  # clips that have an attribute
        # caption -> (distance to the centroid, id), of the nearest clips
        self.nearest: list[dict[str, tuple[float, str]]] = [{} for _ in range(num_clusters)]

    def add(
        self,
        features: np.ndarray,
        clusters: np.ndarray,
        splits: np.ndarray,
        ids: Sequence[str],
        captions: Sequence[str],
        attributes: Sequence[Mapping[str, str]],
    ) -> None:
        """Counts n clips; only those that are trained on count beyond the sizes.

        Args:
          features, clusters, splits: (n, F) raw, (n,), (n,).
          ids, captions, attributes: n each.
        """
        np.add.at(self.sizes, (splits, clusters), 1)
        rows = np.flatnonzero(splits == TRAIN)
        if not len(rows):
            return
        clusters = clusters[rows]
        distances = self.partition.distances(features[rows])
        own = distances[np.arange(len(rows)), clusters]
        self.inertia += float(np.sum(own.astype(np.float64) ** 2))
        self.total += float(np.sum(self.partition.standardise(features[rows]).astype(np.float64) ** 2))
        np.add.at(self.distances_K, clusters, own)
        np.add.at(self.margins_K, clusters, _margins(distances, own, clusters))
        for row, k, distance in zip(rows.tolist(), clusters.tolist(), own.tolist(), strict=True):
            self.words.add(k, captions[row])
            for name, value in attributes[row].items():
                self.having[name] += 1
                self.attributes[k].setdefault(name, Counter())[value] += 1
            found, clip = self.nearest[k].get(captions[row]), (distance, ids[row])
            if found is None or clip < found:
                self.nearest[k][captions[row]] = clip
        for k, nearest in enumerate(self.nearest):
            self.nearest[k] = dict(sorted(nearest.items(), key=lambda item: item[1])[:EXAMPLES])

    def to_json(self) -> dict[str, Any]:
        """Returns the report.

        clips, validation, test: numbers of clips. inertia: sum of squared distances to the cluster's centroid, in
        spreads of a feature. explained: share of the variance that lies between clusters, 0 to 1. margin: mean over
        clips of (b - a) / max(a, b), a and b the distances to the own and the nearest other centroid (1: well apart;
        null for K = 1). balance: smallest and largest size over N / K. centroid_distances: (K, K). purity: for each
        true attribute that every clip has, the share of clips that have their cluster's most frequent value. clusters:
        for each, its clips, validation, test, share, margin, distance (mean, to the centroid), examples (captions
        nearest to the centroid), words (`WordCounts.distinctive`), and how often each attribute value occurs.
        """
        sizes = self.sizes[TRAIN]
        clips, num_clusters = int(sizes.sum()), len(sizes)
        centroids = self.partition.centroids
        apart = np.linalg.norm(centroids[:, None] - centroids[None], axis=-1)
        counts = [_sorted_counts(counted) for counted in self.attributes]
        words = self.words.distinctive()
        return {
            "clips": clips,
            **{name: int(self.sizes[n].sum()) for n, name in enumerate(SPLITS) if n != TRAIN},
            "inertia": rounded(self.inertia),
            "explained": rounded(1 - self.inertia / self.total) if self.total else 0.0,
            "margin": None if num_clusters == 1 else rounded(self.margins_K.sum() / clips),
            "balance": [float(size * num_clusters / clips) for size in (sizes.min(), sizes.max())],
            "centroid_distances": apart.astype(float).round(4).tolist(),
            "purity": purity(counts, [name for name in sorted(self.having) if self.having[name] == clips], clips),
            "clusters": [
                {
                    "cluster": k,
                    "clips": int(sizes[k]),
                    **{name: int(self.sizes[n, k]) for n, name in enumerate(SPLITS) if n != TRAIN},
                    "share": float(sizes[k] / clips),
                    "margin": None if num_clusters == 1 else rounded(self.margins_K[k] / max(sizes[k], 1)),
                    "distance": rounded(self.distances_K[k] / max(sizes[k], 1)),
                    "examples": list(self.nearest[k]),
                    "words": words[k],
                    "attributes": counts[k],
                }
                for k in range(num_clusters)
            ],
        }


def rounded(value: float) -> float:
    """To nine digits, so that the order in which clips are summed does not show."""
    return float(f"{value:.9g}")


def _margins(distances: np.ndarray, own: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """(n,) silhouettes with centroids in the place of clips; zeros for a single cluster."""
    if distances.shape[1] == 1:
        return np.zeros(len(own))
    others = distances.copy()
    others[np.arange(len(clusters)), clusters] = np.inf
    nearest = others.min(axis=1)
    return (nearest - own) / np.maximum(np.maximum(nearest, own), 1e-12)


def _sorted_counts(counted: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """For each attribute its values, the most frequent first."""
    return {name: dict(sorted(values.items(), key=lambda v: (-v[1], v[0]))) for name, values in sorted(counted.items())}


def purity(counts: Sequence[Mapping[str, Mapping[str, int]]], names: Sequence[str], clips: int) -> dict[str, float]:
    """For each attribute, the share of clips with their cluster's most frequent value."""
    return {name: sum(max(c[name].values()) for c in counts if name in c) / clips for name in names}


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
