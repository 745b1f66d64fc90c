"""The exported folder: its files, and how it is published in one step."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from curia_common import cli
from curia_common.errors import StorageError, UserError
from curia_jax import json_records

WEIGHTS, CONFIG, PREPROCESSOR, CARD = "model.safetensors", "config.json", "preprocessor_config.json", "README.md"
# The code of the image processor, copied from beside this module.
PROCESSOR_CODE = "image_processing_curia_jax.py"
# Of an adapter in the form of peft, in place of WEIGHTS.
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILES = (WEIGHTS, CONFIG, PREPROCESSOR, PROCESSOR_CODE, CARD, ADAPTER_WEIGHTS, ADAPTER_CONFIG)
# Our own key in config.json, and the prefix of our own keys in the safetensors header.
OWN = "curia_jax"

Json = dict[str, Any]  # content of a JSON file


def write(
    folder: Path,
    *,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    config: Json,
    preprocessor: Json | None,
    card: str,
    adapter: Json | None = None,
) -> None:
    """Writes the files of a layout into an empty folder.

    Args:
      tensors: C-contiguous; safetensors writes others in memory order, without an error.
      metadata: own keys of the safetensors header.
      preprocessor: content of preprocessor_config.json, which the image processor's code comes with; None for neither.
      adapter: content of adapter_config.json, where the tensors are those of an adapter.
    """
    for name, values in tensors.items():
        if not values.flags.c_contiguous:
            raise ValueError(f"{name} is not C-contiguous")
    header = {"format": "pt", **{f"{OWN}.{key}": value for key, value in metadata.items()}}
    weights = folder / (WEIGHTS if adapter is None else ADAPTER_WEIGHTS)
    safetensors.numpy.save_file(dict(tensors), weights, metadata=header)
    # safetensors makes a file that only its owner can read; take the permissions of the folder instead.
    weights.chmod(folder.stat().st_mode & 0o666)
    if adapter is not None:
        _write_json(folder / ADAPTER_CONFIG, adapter)
    _write_json(folder / CONFIG, config)
    if preprocessor is not None:
        _write_json(folder / PREPROCESSOR, preprocessor)
        (folder / PROCESSOR_CODE).write_bytes(Path(__file__).with_name(PROCESSOR_CODE).read_bytes())
    (folder / CARD).write_text(card, encoding="utf-8")


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_replaceable(output: Path) -> None:
    """Raises UserError unless `output` is missing, empty, or holds files that `write` made and nothing else."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file; name a folder with --output")
    if there != output:
        return
    found = sorted(path.name for path in output.iterdir())
    if not found:
        return
    foreign = [name for name in found if name not in FILES]
    if foreign:
        raise UserError(
            f"{output} holds {foreign[0]}{f' and {len(foreign) - 1} more' if len(foreign) > 1 else ''}, which this "
            "command did not write and would delete; name another --output"
        )
    try:
        content = json_records.loads((output / CONFIG).read_bytes())
        ours = isinstance(content, dict) and OWN in content
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(
            f"{output} holds a model that this command did not write (its {CONFIG} has no key {OWN}); "
            "name another --output"
        )


@contextlib.contextmanager
def publish(output: Path) -> Iterator[Path]:
    """An empty temporary folder to fill, renamed to `output` at the end of the block.

    `output` is unchanged until then. Where the block raises, or a signal asked to stop while it ran, it stays unchanged and
    no temporary file is left.

    Raises:
      UserError: `output` cannot be replaced (see `check_replaceable`) or its parent is not writable.
      StorageError: the disk is full or failed.
      KeyboardInterrupt: a signal asked to stop.
    """
    output = Path(os.path.realpath(output))
    check_replaceable(output)
    # On the same file system, so that a rename is enough; in a folder that exists, so that none has to be removed again.
    nearby = next(parent for parent in output.parents if parent.is_dir())
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".unfinished", dir=nearby))
    except OSError as error:
        raise UserError(f"cannot write to {nearby}: {error.strerror}; name another --output") from error
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        check_replaceable(output)  # it may have been written to meanwhile
        cli.commit()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            if output.exists():
                output.rename(old)
            new.rename(output)
        except BaseException:
            if old.exists() and not output.exists():
                old.rename(output)
            raise
    except OSError as error:
        raise StorageError(
            f"cannot write {output}: {error.strerror or error}; fix that and rerun the same command"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
