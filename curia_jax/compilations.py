"""Compiled programs that are kept between commands."""

import os

import jax

FOLDER = "~/.cache/curia_jax/compilations"


def keep(folder: str = FOLDER) -> None:
    """Programs that take JAX a second or more to compile are read from a folder, and written to it.

    On several simulated devices nothing is kept. Starts the devices.

    Args:
      folder: where JAX has none yet (JAX_COMPILATION_CACHE_DIR); "" gives it none.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # XLA loses the order of a CPU program's collectives when it reads the program from the cache (jaxlib 0.10.2), and
        # simulated devices then deadlock.
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder and jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue] - set at run time
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
