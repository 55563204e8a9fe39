"""The dtype that a device computes in: bfloat16 where it has it, float32 elsewhere."""

import jax

BFLOAT16_CAPABILITY = 8.0  # NVIDIA's A100; a T4 has 7.5, a V100 7.0 and a P100 6.0
GPU_PLATFORMS = ("gpu", "cuda")


def current_device() -> tuple[str, str]:
    """Platform and compute capability of the devices of this process.

    The compute capability is "7.5" for an NVIDIA T4, "gfx90a" for an AMD GPU, and "" where it is unknown.
    """
    return jax.default_backend(), str(getattr(jax.local_devices()[0], "compute_capability", ""))


def has_bfloat16(platform: str, capability: str = "") -> bool:
    """Whether a device multiplies bfloat16 numbers; XLA computes in float32 and converts where it does not.

    A GPU of unknown compute capability has it.
    """
    if platform == "cpu":
        return False
    nvidia = platform in GPU_PLATFORMS and capability and not capability.startswith("gfx")
    return not nvidia or float(capability) >= BFLOAT16_CAPABILITY
