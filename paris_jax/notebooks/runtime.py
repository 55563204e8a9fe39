"""Describes the device that a notebook runs on: its memory, the dtype it computes in, and slow operations."""

import dataclasses
import html
import logging
import os
import sys

import jax

from paris_jax.errors import UserError
from paris_jax.local_jobs.devices import find_devices
from paris_jax.models import attention, precision
from paris_jax.models.compilation import keep_compiled_programs

NAMES = {"cpu": "CPU", "gpu": "GPU", "cuda": "GPU", "rocm": "GPU", "tpu": "TPU"}
HEAD_WIDTH, KEYS = 64, 4096  # of the attention that a runtime is asked about: a video of 16 x 256 x 256 pixels, say
GIB = 2**30
SLOW = {
    "CPU": "Everything but the embedded shapes. Samples of bundled:shapes take seconds and training the tiny job takes "
    "minutes; published networks and larger videos need a GPU or TPU.",
    "old GPU": "bfloat16, which this GPU lacks: networks trained in it compute in float32. "
    "compute_dtype='float16' is faster and takes half the memory; it may overflow, an error that names the expert. "
    "Long videos, too: without flash attention, memory grows with the square of the tokens.",
    "GPU": "The first call of each shape, which compiles. Networks that do not fit are fetched layer by layer "
    "(offload=True) or kept in 8 bits (weights_dtype='int8').",
}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The devices of this process.

    Attributes:
      kind: "CPU", "GPU" or "TPU".
      devices: such as "2 cores" or "1 Tesla T4".
      memory: of one device, in bytes; 0 where it is unknown.
      dtype: that "auto" computes in.
      attention: "flash attention", or why there is none.
      slow: operations that take long on it.
      versions: of Python and JAX.
    """

    kind: str
    devices: str
    memory: int
    dtype: str
    attention: str
    slow: str
    versions: str

    def rows(self) -> list[tuple[str, str]]:
        memory = f", {self.memory / GIB:.1f} GiB of memory" if self.memory else ""
        rows = [("device", f"{self.devices}{memory}"), ("computes in", self.dtype), ("attention", self.attention)]
        return [*rows, ("slow here", self.slow), ("versions", self.versions)]

    def __repr__(self) -> str:
        return "\n".join([f"{self.kind} runtime", *(f"  {name:<12}{value}" for name, value in self.rows())])

    def _repr_html_(self) -> str:
        style = 'style="text-align:left;vertical-align:top;padding:3px 16px 3px 0;max-width:640px"'
        rows = "".join(
            f"<tr><th {style}>{name}</th><td {style}>{html.escape(value)}</td></tr>" for name, value in self.rows()
        )
        return f"<h4>{self.kind} runtime</h4><table>{rows}</table>"


def start() -> Runtime:
    """Shows this package's log lines in the notebook, keeps compiled programs, and describes the runtime.

    Raises:
      UserError: an accelerator is attached, and JAX cannot use it.
    """
    logger = logging.getLogger("paris_jax")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO)
    keep_compiled_programs()
    return describe()


def describe() -> Runtime:
    """The runtime of this process; refuses one that leaves an accelerator idle."""
    platform, capability = precision.current_device()
    kind = NAMES.get(platform, platform.upper())
    attached = find_devices("auto").kind
    if kind == "CPU" and attached != "cpu":
        raise UserError(
            f"This machine has a {attached.upper()}, and JAX {jax.__version__} does not see it: its plugin is missing "
            "or of another version; run the install cell again, restart the session, or set JAX_PLATFORMS=cpu to go on "
            "without it"
        )
    device = jax.local_devices()[0]
    if kind == "CPU":
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices, memory = f"{count} core{'s' * (count > 1)}", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        devices = f"{jax.local_device_count()} {device.device_kind}"
        memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    dtype = "bfloat16" if precision.has_bfloat16(platform, capability) else "float32"
    kernel, why = attention.choose(platform, capability, "float16" if kind == "GPU" else dtype, HEAD_WIDTH, KEYS)
    old = kind == "GPU" and dtype == "float32"
    slow = SLOW["old GPU"] if old else SLOW["CPU" if kind == "CPU" else "GPU"]
    python = ".".join(map(str, sys.version_info[:3]))
    attend = why if kernel != "xla" else f"in plain matrix products: {why}"
    return Runtime(kind, devices, memory, dtype, attend, slow, f"Python {python}, JAX {jax.__version__}")
