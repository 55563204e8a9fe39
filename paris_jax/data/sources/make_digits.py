"""Writes digits.npy, the handwritten digits of the `digits` world; needs scikit-learn.

    python -m paris_jax.data.sources.make_digits

Origin: "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak), UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49, CC BY 4.0, as shipped by scikit-learn (test part, 1797 digits). See DIGITS.md.
"""

from pathlib import Path

import numpy as np


def main() -> None:
    """Writes (1797, 65) uint8: the label, then the 8 x 8 image row by row, ink from 0 to 16."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    table = np.concatenate([np.asarray(labels)[:, None], np.asarray(images)], axis=1).astype(np.uint8)
    np.save(Path(__file__).with_name("digits.npy"), table, allow_pickle=False)


if __name__ == "__main__":
    main()
