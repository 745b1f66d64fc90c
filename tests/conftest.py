"""Settings of the whole suite: simulated devices, a shared compilation cache, shapes checked at run time."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook

# jaxtyping annotations of every public function are checked at each call, so that the documented shapes stay true.
install_import_hook(["curia_jax", "data_pipeline"], "beartype.beartype")

jax.config.update("jax_num_cpu_devices", 8)
# Compiling dominates the suite's time: workers and repeated runs share what was compiled.
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / "curia_jax_test_compilations"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CT and MR files: the variable CURIA_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("CURIA_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set CURIA_DATA to a folder that has it")
    return folder
