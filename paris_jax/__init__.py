"""Decentralized diffusion for video in JAX: isolated experts, a router, and the ensemble they make.

`from paris_jax import Ensemble` loads the sampler; nothing heavy is imported before it is asked for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paris_jax.ensemble.pipeline import Ensemble

__version__ = "0.1.0"

__all__ = ["Ensemble", "__version__"]


def __getattr__(name: str):
    if name == "Ensemble":
        from paris_jax.ensemble.pipeline import Ensemble

        return Ensemble
    raise AttributeError(f"module 'paris_jax' has no attribute {name!r}")
