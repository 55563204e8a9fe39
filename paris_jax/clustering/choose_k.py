"""`paris-jax cluster --choose_k=2,3,4`: how well several numbers of clusters fit the clips."""

import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from paris_jax.artifacts import locks, manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.clustering import build, clusters, kmeans, report
from paris_jax.clustering import clips as clips_
from paris_jax.clustering.clips import Clips
from paris_jax.clustering.clusters import Clustering
from paris_jax.clustering.heldout import TRAIN
from paris_jax.clustering.rows import Rows
from paris_jax.config.experiment import Experiment
from paris_jax.errors import UserError

logger = logging.getLogger(__name__)
RESULTS = "results.json"
SEEDS = 4  # whose clusterings are compared
SAMPLE = 2000  # clips of the silhouette


def choose_k(experiment: Experiment, run: RunFolder, candidates: Sequence[int]) -> list[dict[str, Any]]:
    """Clusters the training clips of RUN/data with several K and seeds; writes RUN/sweeps/num_clusters/results.json.

    Returns:
      For each K: num_clusters; inertia of the best seed, in spreads of a feature; silhouette, its mean over a sample of
      clips; stability, the mean adjusted Rand index of the clusterings of different seeds (1: always the same);
      smallest and largest size over N / K; purity by attribute, where every clip has it.

    Raises:
      UserError: the clips are not prepared, or are fewer than a number of clusters.
    """
    folder = run.path / "sweeps" / "num_clusters"
    with locks.only_writer(folder):
        data = build.read_data(experiment, run)
        with build.progress_bars() as bar, build.features_on_disk(experiment, run) as scratch:
            clips = clips_.read(experiment, run.data, dict(data.files), scratch, bar("reading clips", data.clips))
            rows = Rows.of(clips.features, clips.of_split(TRAIN))
            for num_clusters in candidates:
                if not 2 <= num_clusters <= len(rows):
                    raise UserError(f"--choose_k={num_clusters}: must be from 2 to {len(rows)}, the number of clips")
            rounds = [dataclasses.replace(build.method_of(experiment), num_clusters=k).rounds for k in candidates]
            done = bar("k-means", sum(rounds) * SEEDS)
            found = [_measure(experiment, clips, rows, k, done) for k in candidates]
        manifest.write_json(folder / RESULTS, found)
    _print(found)
    logger.info("numbers of clusters are compared: %s", folder / RESULTS)
    return found


def _measure(
    experiment: Experiment, clips: Clips, rows: Rows, num_clusters: int, done: Callable[[], None]
) -> dict[str, Any]:
    method = dataclasses.replace(build.method_of(experiment), num_clusters=num_clusters)
    if method.fine_clusters and method.fine_clusters < num_clusters:
        raise UserError(
            f"--choose_k={num_clusters}: must be at most config.clustering.fine_clusters={method.fine_clusters}"
        )
    seeds = [dataclasses.replace(method, seed=(method.seed + n) % 2**32) for n in range(SEEDS)]
    fits = [clusters.fit_rows(rows, one, done) for one in seeds]
    inertias = [_inertia(rows, partition, labels) for partition, labels in fits]
    best = int(np.argmin(inertias))
    labels = fits[best][1]
    sizes = np.bincount(labels, minlength=num_clusters)
    return {
        "num_clusters": num_clusters,
        "inertia": inertias[best],
        "silhouette": silhouette(rows[:SAMPLE], labels[:SAMPLE]),
        "stability": float(np.mean([rand_index(a[1], b[1]) for a, b in itertools.combinations(fits, 2)])),
        "balance": [float(size * num_clusters / len(rows)) for size in (sizes.min(), sizes.max())],
        "purity": _purity(clips, labels, num_clusters),
    }


def _inertia(rows: Rows, partition: Clustering, labels: np.ndarray) -> float:
    """The sum of squared distances to the centroid of the cluster."""
    return sum(
        float(np.sum((block - partition.centroids[labels[part]]).astype(np.float64) ** 2))
        for part, block in rows.blocks()
    )


def _purity(clips: Clips, labels: np.ndarray, num_clusters: int) -> dict[str, float]:
    """For each attribute that every clip has, the share of clips with their cluster's most frequent value."""
    by_number = np.full(len(clips.order), -1, np.int32)
    by_number[clips.of_split(TRAIN)] = labels
    counts: list[dict[str, Counter[str]]] = [{} for _ in range(num_clusters)]
    having: Counter[str] = Counter()
    for block in clips.index.blocks():
        for number, entry in enumerate(block.entries(), block.start):
            if by_number[number] >= 0:
                having.update(entry.attributes.keys())
                for name, value in entry.attributes.items():
                    counts[by_number[number]].setdefault(name, Counter())[value] += 1
    shared = [name for name in sorted(having) if having[name] == len(labels)]
    return report.purity(counts, shared, len(labels))


def silhouette(rows: np.ndarray, labels: np.ndarray) -> float:
    """The mean silhouette of rows (N, F) (Rousseeuw 1987).

    That of a row is (b - a) / max(a, b), a and b its mean distances to the rows of its own and of the nearest other
    cluster, or 0 where it is alone in its cluster.
    """
    names, own = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        return 0.0
    member_NK = np.eye(len(names))[own]
    sizes_K = member_NK.sum(axis=0)
    sums_NK = kmeans.distances(rows, rows).astype(np.float64) @ member_NK
    size_N = sizes_K[own]
    inside_N = sums_NK[np.arange(len(rows)), own] / np.maximum(size_N - 1, 1)
    means_NK = np.where(member_NK > 0, np.inf, sums_NK / sizes_K)
    outside_N = means_NK.min(axis=1)
    values = (outside_N - inside_N) / np.maximum(np.maximum(inside_N, outside_N), 1e-12)
    return float(np.where(size_N > 1, values, 0.0).mean())


def rand_index(first: np.ndarray, second: np.ndarray) -> float:
    """The adjusted Rand index of two clusterings (N,): 1 for the same, around 0 for unrelated ones.

    Hubert & Arabie, "Comparing partitions" (1985).
    """
    table = np.zeros((int(first.max()) + 1, int(second.max()) + 1))
    np.add.at(table, (first, second), 1)

    def pairs(counts: np.ndarray) -> float:
        return float(np.sum(counts * (counts - 1) / 2))

    both, one, other = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected = one * other / max(pairs(np.array([float(len(first))])), 1.0)
    largest = (one + other) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


def _print(found: Sequence[Mapping[str, Any]]) -> None:
    console = Console()
    table = Table(title="numbers of clusters")
    for heading in ("K", "inertia", "silhouette", "stability", "sizes over N / K"):
        table.add_column(heading, justify="right")
    for row in found:
        low, high = row["balance"]
        cells = [str(row["num_clusters"]), f"{row['inertia']:.4g}", f"{row['silhouette']:.3f}"]
        table.add_row(*cells, f"{row['stability']:.3f}", f"{low:.2f} to {high:.2f}")
    console.print(table)
    if found[0]["purity"]:
        table = Table("purity", *(f"K = {row['num_clusters']}" for row in found))
        for name in found[0]["purity"]:
            table.add_row(name, *(f"{row['purity'][name]:.1%}" for row in found))
        console.print(table)
    console.print(
        "silhouette: clusters are apart (1) or not (0). stability: agreement of clusterings from other seeds (1: the "
        "same). Inertia falls with K in any data.",
        highlight=False,
    )
