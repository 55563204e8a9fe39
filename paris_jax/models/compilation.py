"""Keeps compiled programs on disk for the next process."""

import logging
import os

import jax

logger = logging.getLogger(__name__)
MIN_SECONDS = 1.0  # of a compilation that is kept


def keep_compiled_programs() -> None:
    """Sets JAX's compilation cache: JAX_COMPILATION_CACHE_DIR, or paris_jax/xla in the user's cache folder."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        if os.path.isabs(cache):
            jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "paris_jax", "xla"))
        else:
            logger.info("HOME is not set, so compiled programs are not kept for the next time")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
