"""Whether the object of a video stays the same object."""

import numpy as np

from paris_jax.evaluation.metrics.attribute_classifier import AttributeClassifier

LASTING = ("object", "colour", "size")  # attributes of the shapes that a clip keeps from its first frame to its last


def identity_kept(classifier: AttributeClassifier, videos: np.ndarray) -> np.ndarray:
    """Whether the first and the last half of each video show the same object, colour and size: (N,) bool.

    Args:
      videos: (N, T, H, W, 3) float in [-1, 1] of the embedded shapes, T >= 2.
    """
    half = (videos.shape[1] + 1) // 2
    _, first = classifier.predict(videos[:, :half])
    _, last = classifier.predict(videos[:, -half:])
    return np.array([all(a[name] == b[name] for name in LASTING) for a, b in zip(first, last, strict=True)])


def subject_consistency(frames_NTE: np.ndarray) -> np.ndarray:
    """Mean cosine of each frame's embedding with those of the first frame and of the one before it: (N,) float64.

    With DINO's embeddings this is VBench's "subject consistency", with CLIP's its "background consistency" (Huang et
    al. 2024, arXiv 2311.17982).

    Args:
      frames_NTE: unit embeddings, T >= 2.
    """
    if frames_NTE.ndim != 3 or frames_NTE.shape[1] < 2:
        raise ValueError(f"embeddings have shape {frames_NTE.shape}: must be (N, T, E) with T >= 2")
    x = frames_NTE.astype(np.float64)
    to_first = np.einsum("nte,ne->nt", x[:, 1:], x[:, 0])
    to_previous = np.einsum("nte,nte->nt", x[:, 1:], x[:, :-1])
    return ((np.maximum(to_first, 0) + np.maximum(to_previous, 0)) / 2).mean(1)
