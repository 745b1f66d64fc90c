"""What every host checks before anything is compiled, so that a run that cannot work ends immediately, with one line and exit code 66.

Missing chips, and code, settings or storage that differ between hosts, would otherwise show hours later or never.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

import curia_common
from curia_common.errors import DoesNotFitError
from curia_common.launching import Contract
from curia_jax import hosts, storage
from curia_jax.mixture import Mixture
from data_pipeline.format.shards import SliceSource

PROBE = ".preflight"
CODE = ("curia_common", "curia_jax", "data_pipeline")
# Of these, another version computes other numbers or cannot talk to the rest.
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_TOKEN = "curia/probe"


def expected() -> Contract | None:
    """What a launcher said that this process has to find; None where none started it. To be called before JAX connects.

    Raises:
      DoesNotFitError: the environment has variables of another start.
    """
    contract = Contract.of(os.environ)
    if contract is not None:
        contract.check_environment(os.environ)
    return contract


def check_devices(contract: Contract) -> None:
    """Compares backend, processes and devices with what was launched. JAX takes the CPU where it finds no accelerator.

    Raises:
      DoesNotFitError: they differ.
    """
    where = f"attempt {contract.attempt} of run {contract.run}"
    found = jax.default_backend()
    if found != contract.platform:
        raise DoesNotFitError(
            f"JAX runs on {found}, but {where} is for {contract.platform}: it found no such device, or another process holds it; "
            "end that process, or launch on other machines"
        )
    for what, there, wanted in (
        ("processes", jax.process_count(), contract.processes),
        ("devices", jax.device_count(), contract.devices),
    ):
        if there != wanted:
            raise DoesNotFitError(
                f"JAX found {there} {what}, but {where} has {wanted}; launch with the topology of the machines, and without "
                "--config.devices.cpu_count"
            )


def build() -> dict[str, str]:
    """What has to be equal on all hosts for them to compute the same, for hosts.check_agreement."""
    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    return {
        "version": f"{curia_common.__version__} with jax {jax.__version__}",
        "code": _code(),
        "packages": ", ".join(versions),
        "compiler flags": " ".join(os.environ.get(name, "") for name in FLAGS).strip() or "none",
    }


@contextlib.contextmanager
def probing(workdir: str) -> Iterator[None]:
    """Writes a file to the work directory and reads it back; deletes it after the block, in which the hosts meet.

    Once they have met, `check_shared` finds out whether they see the same folder. Where the block raises, the file stays: another
    host may be about to look for it.

    Raises:
      DoesNotFitError: this host cannot do that.
    """
    path, token = _probe(workdir, hosts.number()), secrets.token_hex(8)
    if hosts.is_first():
        hosts.tell(_TOKEN, token)
    try:
        path.write_text(token)
        found = path.read_text()
    except Exception as error:  # noqa: BLE001 - every store has its own
        raise _unusable(workdir, error) from error
    if found != token:
        raise DoesNotFitError(
            f"{hosts.name()} wrote a file in {workdir} and read another text; choose another --workdir"
        )
    yield
    try:
        path.unlink(missing_ok=True)
    except Exception as error:  # noqa: BLE001 - every store has its own
        raise _unusable(workdir, error) from error


def check_shared(workdir: str) -> None:
    """Checks that the first host and this one see the same work directory.

    Raises:
      DoesNotFitError: they do not.
    """
    if hosts.is_first():
        return
    path = _probe(workdir, 0)
    if not path.exists() or path.read_text() != hosts.told(_TOKEN):
        raise DoesNotFitError(
            f"{hosts.name()} does not see what host 0 wrote in {workdir}: it is another folder there; choose a --workdir that all hosts "
            "share"
        )


def check_dataset(source: SliceSource | Mixture) -> None:
    """Reads a record of the first and of the last shard, of every folder.

    Raises:
      DoesNotFitError: this host cannot.
    """
    try:
        source.check_access()
    except OSError as error:
        raise DoesNotFitError(
            f"{hosts.name()} cannot read {error.filename}: {error.strerror}; mount the dataset there, and give every host access"
        ) from error


def _probe(workdir: str, host: int) -> epath.Path:
    return storage.root(workdir) / f"{PROBE}-{host}"


def _unusable(workdir: str, error: Exception) -> DoesNotFitError:
    reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
    return DoesNotFitError(
        f"{hosts.name()} cannot write, read and delete files in {workdir}: {reason}; give every host access, or choose another --workdir"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _code() -> str:
    """Digest of all source files of this project that a host runs."""
    root, digest = Path(curia_common.__file__).parents[1], hashlib.sha256()
    for path in sorted(path for package in CODE for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
