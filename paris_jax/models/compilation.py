"""Keeps compiled programs on disk for the next process."""

import logging
import os

import jax

logger = logging.getLogger(__name__)
MIN_SECONDS = 1.0  # of a compilation that is kept


def keep_compiled_programs() -> None:
    """Sets JAX's compilation cache: JAX_COMPILATION_CACHE_DIR, or paris_jax/xla/CORES in the user's cache folder.

    A program for the CPU is divided among the cores that its process may use, which JAX's keys of the cache do not tell
    apart: another number of cores would get a program that rounds otherwise.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        if os.path.isabs(cache):
            jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "paris_jax", "xla", str(cores())))
        else:
            logger.info("HOME is not set, so compiled programs are not kept for the next time")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
