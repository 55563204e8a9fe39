"""LAION's aesthetic predictors: a score from about 1 to 10 for how much people like a picture.

Both versions map CLIP's unit embedding of ViT-L/14 to a number. Version 1 is one affine map; version 2
("sac+logos+ava1") was trained as five linear layers without activations, which together are one affine map, too.
"""

import dataclasses
import re
from typing import Literal

import numpy as np
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.errors import UserError
from paris_jax.weights.pickled import read_arrays

WIDTH = 768  # of the embeddings of ViT-L/14, for which the published heads were trained
REMEDY = "name the file of LAION's aesthetic predictor, version 1 or 2, as published"


@dataclasses.dataclass(frozen=True)
class AestheticHead:
    """score = embedding . weight + bias.

    Attributes:
      weight: (E,) float64; bias: float.
      version: "v1" or "v2"; scores of the two do not compare.
      sha256: of the file.
    """

    weight: np.ndarray
    bias: float
    version: Literal["v1", "v2"]
    sha256: str

    @classmethod
    def load(cls, path: epath.PathLike) -> "AestheticHead":
        """A head from its published PyTorch file, or the same tensors as safetensors.

        Raises:
          UserError: the tensors are not those of a head.
        """
        arrays = {name: values.astype(np.float64) for name, values in read_arrays(path).items()}
        names = [name for name in arrays if name.endswith("weight")]
        layers = sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
        weight, bias = np.zeros((0, 0)), np.zeros(0)
        for name in layers:
            matrix, offset = arrays[name], arrays.get(name.removesuffix("weight") + "bias")
            if matrix.ndim != 2 or offset is None or offset.shape != matrix.shape[:1]:
                raise UserError(f"{path}: {name} is no linear layer with a bias; {REMEDY}")
            if not weight.size:
                weight, bias = matrix, offset
            elif matrix.shape[1] != len(weight):
                raise UserError(f"{path}: {name} does not follow the layer before it; {REMEDY}")
            else:
                weight, bias = matrix @ weight, matrix @ bias + offset
        if len(weight) != 1 or not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise UserError(f"{path} holds no affine map to one finite number; {REMEDY}")
        return cls(weight[0], float(bias[0]), "v1" if len(layers) == 1 else "v2", manifest.hash_file(path))


def aesthetic_scores(head: AestheticHead, frames_NTE: np.ndarray) -> np.ndarray:
    """Aesthetic score of videos, averaged over their frames: (N,) float64.

    Args:
      frames_NTE: CLIP's unit embeddings of the frames.
    """
    if frames_NTE.ndim != 3 or frames_NTE.shape[-1] != len(head.weight):
        raise UserError(
            f"the aesthetic predictor expects embeddings of {len(head.weight)} numbers, this CLIP has "
            f"{frames_NTE.shape[-1]}; name the CLIP it was trained with (ViT-L/14)"
        )
    return (frames_NTE.astype(np.float64) @ head.weight).mean(1) + head.bias
