"""Compiled programs that are kept between commands."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import jax
from curia_jax import compilations
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
compilations.keep(*{words})
jax.jit(lambda x: x + 1)(1.0)
"""


def run(*words: str, **environment: str) -> None:
    """A program of its own, since the test's own process has a folder already."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    program = PROGRAM.format(words=words)
    subprocess.run([sys.executable, "-c", program], env=kept | {"JAX_PLATFORMS": "cpu"} | environment, check=True)


def test_programs_are_kept_in_the_folder(tmp_path: Path) -> None:
    run(str(tmp_path / "kept"))
    assert list((tmp_path / "kept").iterdir())


def test_folder_of_the_environment_is_used_instead(tmp_path: Path) -> None:
    run(str(tmp_path / "kept"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "other"))
    assert list((tmp_path / "other").iterdir())
    assert not (tmp_path / "kept").exists()


def test_nothing_is_kept_on_several_simulated_devices(tmp_path: Path) -> None:
    run(str(tmp_path / "kept"), JAX_NUM_CPU_DEVICES="2")
    assert not (tmp_path / "kept").exists()


def test_default_folder_is_in_the_home_of_the_user(tmp_path: Path) -> None:
    run(HOME=str(tmp_path))
    assert list((tmp_path / ".cache" / "curia_jax" / "compilations").iterdir())
