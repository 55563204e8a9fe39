"""Results and videos as an evaluation would write them, made up from a seed: what the report's tests show."""

import numpy as np

from paris_jax.data.sources.shapes import ShapesSource
from paris_jax.evaluation import compute, estimates, results


def make(shown: int = 6, attributes: bool = True) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns results (see results.py) and the shown videos by model."""
    rng = np.random.default_rng(0)
    edges = [b / 8 for b in range(9)]

    def estimate(value: float, stderr: float = 0.01, n: int = 96) -> estimates.Estimate:
        return {"value": float(value), "stderr": float(stderr), "n": n}

    curve = 0.55 + 1.2 * (np.arange(8) / 8 - 0.45) ** 2
    gap = np.linspace(-0.03, 0.012, 8)
    source = ShapesSource(seed=5, num_clips=shown, frames=8, height=20, width=20, fps=8.0)
    real = np.stack([clip.video for clip in source])
    videos = {"real": real, "ensemble": _worse(real, rng, 20), "monolith": _worse(real, rng, 45)}
    clips = [_shown(clip, i, attributes) for i, clip in enumerate(source)]
    jobs = [compute.TrainingCost(f"expert {k}", 1000, 32, 123_456_789) for k in range(3)]
    comparisons = [
        results.compare(
            "frechet",
            "Frechet distance (shapes classifier)",
            "lower",
            {"ensemble": estimate(3.1, 0.22), "monolith": estimate(4.4, 0.3)},
            estimate(-1.3, 0.25),
            reference=estimate(0.9, 0.1),
            reference_label="floor: real against real",
        ),
        results.compare(
            "loss",
            "Held-out flow loss",
            "lower",
            {"ensemble": estimate(0.6123, 0.004, 192), "monolith": estimate(0.609, 0.004, 192)},
            estimate(0.003, 0.0021, 192),
        ),
        results.compare(
            "motion",
            "Motion",
            None,
            {"ensemble": estimate(0.21), "monolith": estimate(0.19)},
            estimate(0.02),
            unit="px/frame",
            reference=estimate(0.24),
            reference_label="held-out clips",
        ),
    ]
    attribute_accuracy = None
    if attributes:
        row = results.compare(
            "attribute_accuracy",
            "Attribute accuracy",
            "higher",
            {"ensemble": estimate(0.719, 0.046), "monolith": estimate(0.594, 0.05)},
            estimate(0.125, 0.05),
            unit="share",
            reference=estimate(0.96, 0.02),
            reference_label="ceiling: held-out clips",
            note="every attribute right",
        )
        comparisons.insert(0, row)
        attribute_accuracy = {
            name: {"ensemble": estimate(e, 0.03), "monolith": estimate(m, 0.03), "reference": estimate(0.99, 0.01)}
            for name, e, m in zip(
                ("world", "object", "colour", "size", "direction", "speed", "ground", "all"),
                (1, 0.8, 0.97, 0.95, 0.86, 0.9, 0.99, 0.719),
                (0.99, 0.7, 0.95, 0.96, 0.75, 0.86, 0.98, 0.594),
                strict=True,
            )
        }
    bins = {"confidence": [0.7, 0.95], "accuracy": [0.6, 0.97], "count": [20, 172]}
    calibration = {"error": 0.028, "log_loss": 0.11, **bins}
    use = np.array([[0.4, 0.3, 0.3]] * 20) + 0.2 * np.sin(np.arange(20) / 4)[:, None] * [1, -0.5, -0.5]
    return {
        "schema": results.SCHEMA,
        "experiment": "shapes-tiny",
        "config_hash": "0123456789abcdef" * 4,
        "evaluation_hash": "fedcba9876543210" * 4,
        "left_out": [] if attributes else ["Attribute accuracy is left out: the clips carry no attributes."],
        "protocol": {
            "prompts": 96,
            "solver": "euler, 20 steps",
            "guidance": 3.0,
            "routing": "top_k, 1",
            "versions": {"jax": "0.10.2", "flax": "0.12.8"},
        },
        "notes": ["Of the 96 videos of monolith, 1 are of one colour and 0 are repeated."],
        "comparisons": comparisons,
        "companions": [
            results.compare(
                "shapes_kernel",
                "Kernel distance (shapes classifier)",
                "lower",
                {"ensemble": estimate(1.2, 0.3), "monolith": estimate(1.9, 0.3)},
                estimate(-0.7, 0.2),
                reference=estimate(0.0, 0.1),
                reference_label="floor: real against real",
            )
        ],
        "loss_by_time": {
            "edges": edges,
            "ensemble": [estimate(v, 0.012, 192) for v in curve + gap],
            "monolith": [estimate(v, 0.012, 192) for v in curve],
            "difference": [estimate(v, 0.004, 192) for v in gap],
        },
        "error_by_time": {
            "edges": edges,
            "ensemble": [estimate(v, 0.01, 192) for v in curve**0.5 + gap],
            "monolith": [estimate(v, 0.01, 192) for v in curve**0.5],
            "difference": [estimate(v, 0.004, 192) for v in gap],
        },
        "loss_by_cluster": {
            "clusters": [0, 1, 2],
            "ensemble": [estimate(v, 0.01, 64) for v in (0.5, 0.71, 0.62)],
            "monolith": [estimate(v, 0.01, 64) for v in (0.52, 0.7, 0.66)],
            "difference": [estimate(v, 0.01, 64) for v in (-0.02, 0.01, -0.04)],
        },
        "attribute_accuracy": attribute_accuracy,
        "router": {
            "edges": edges,
            "accuracy": [estimate(v, 0.02, 192) for v in (0.99, 0.99, 0.98, 0.97, 0.96, 0.97, 0.95, 0.94)],
            "chance": 0.36,
            "confusion": [[[60, 4, 0], [1, 63, 0], [0, 0, 64]]] * 8,
            "calibration": [calibration] * 8,
            "calibration_all": calibration,
        },
        "experts": {
            "experts": [0, 1, 2],
            "clusters": [0, 1, 2],
            "loss": [[estimate(0.5 if i == j else 0.9) for j in range(3)] for i in range(3)],
            "oracle": estimate(0.61, 0.004, 192),
            "routed": estimate(0.612, 0.004, 192),
            "routed_minus_oracle": estimate(0.002, 0.001, 192),
            "disagreement": [estimate(v) for v in np.linspace(0.02, 0.4, 8)],
        },
        "sweep": {
            "systems": [
                {
                    "ensemble": "runs/x/ensemble",
                    "overrides": {"top_k": k},
                    "experts_per_step": k,
                    "seconds_per_video": 0.1 * k,
                    "scores": {"correct": estimate(0.6 + 0.05 * k, 0.04), "shapes_frechet": estimate(30 - k, 2)},
                }
                for k in (1, 2, 3)
            ],
            "labels": {"correct": "Attribute accuracy", "shapes_frechet": "Frechet distance (shapes classifier)"},
            "protocol": {"prompts": 96},
        },
        "expert_use": {
            "clusters": [0, 1, 2],
            "by_step": use.tolist(),
            "by_cluster": {"0": [0.97, 0.02, 0.01], "1": [0.05, 0.93, 0.02], "2": [0.02, 0.01, 0.97]},
        },
        "compute": compute.identity(
            jobs,
            compute.TrainingCost("monolith", 3000, 32, 123_456_789),
            compute.TrainingCost("router", 600, 32, 20_000_000),
        ),
        "shown": clips,
    }, videos


def _worse(videos: np.ndarray, rng: np.random.Generator, spread: float) -> np.ndarray:
    return np.clip(videos + rng.normal(0, spread, videos.shape), 0, 255).astype(np.uint8)


def _shown(clip, index: int, attributes: bool) -> dict:
    asked = clip.attributes if attributes else {}
    wrong = asked | ({"speed": "slow", "colour": "cyan"} if attributes else {})
    longest = asked | ({"direction": "counterclockwise"} if attributes else {})
    read = {"real": asked, "ensemble": longest, "monolith": wrong} if attributes else {}
    use = [0.94, 0.06, 0.0]
    return {"id": clip.id, "caption": clip.caption, "cluster": index % 3, "asked": asked, "read": read, "use": use}
