"""The exported folder: what is in it, and how it takes its place in one step."""

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

from curia_common.errors import UserError

WEIGHTS, CONFIG, PREPROCESSOR, CARD = "model.safetensors", "config.json", "preprocessor_config.json", "README.md"
FILES = (WEIGHTS, CONFIG, PREPROCESSOR, CARD)
# Our own key in config.json and preprocessor_config.json, and the prefix of our own keys in the safetensors header.
OWN = "curia_jax"


def write(
    folder: Path,
    *,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None,
    card: str,
) -> None:
    """Writes the files of a layout into an empty folder.

    Args:
      tensors: C-contiguous; safetensors writes others in the order of their memory, without an error.
      metadata: own keys of the safetensors header.
      preprocessor: content of preprocessor_config.json; None for none.
    """
    for name, values in tensors.items():
        if not values.flags.c_contiguous:
            raise ValueError(f"{name} is not C-contiguous")
    header = {"format": "pt", **{f"{OWN}.{key}": value for key, value in metadata.items()}}
    safetensors.numpy.save_file(dict(tensors), folder / WEIGHTS, metadata=header)
    # safetensors makes a file that only its owner can read; the folder says who may.
    (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)
    _write_json(folder / CONFIG, config)
    if preprocessor is not None:
        _write_json(folder / PREPROCESSOR, preprocessor)
    (folder / CARD).write_text(card, encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_replaceable(output: Path) -> None:
    """Raises UserError unless nothing is there, or an empty folder, or a folder that `write` made and nobody added to."""
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
            "command did not write, and it replaces the whole folder; name another --output"
        )
    try:
        ours = OWN in json.loads((output / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(
            f"{output} holds a model that this command did not write (its {CONFIG} has no key {OWN}); "
            "name another --output"
        )


@contextlib.contextmanager
def publish(output: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `output` at the end of the block.

    Until then `output` is as it was; when the block raises, it stays so and nothing is left beside it.

    Raises:
      UserError: see `check_replaceable`; or the disk refuses.
    """
    output = Path(os.path.realpath(output))
    check_replaceable(output)
    # On the same file system, so that a rename will do; in a folder that exists, so that nothing stays if this fails.
    nearby = next(parent for parent in output.parents if parent.is_dir())
    try:
        workplace = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".unfinished", dir=nearby))
    except OSError as error:
        raise UserError(f"cannot write beside {output}: {error.strerror}") from error
    try:
        new, old = workplace / "new", workplace / "old"
        new.mkdir()
        yield new
        check_replaceable(output)  # somebody else may have been there meanwhile
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rename(old)
        try:
            new.rename(output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
