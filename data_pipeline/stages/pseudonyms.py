"""Keyed pseudonyms, and what follows from them: splits and shard order.

HMAC-SHA256 with a key that the site keeps. Without the key nobody can test whether a known patient is in a dataset; with
the same key the same patient has the same pseudonym and split in every build.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import NamedTuple

from curia_common.errors import UserError

KEY_VARIABLE = "CURIA_KEY"
SPLITS = ("train", "validation", "test")
MINIMUM_KEY_BYTES = 16
_MAKE_A_KEY = "make one with: openssl rand -hex 32"


class Key(NamedTuple):
    """The secret, a sentence on where it came from, and the file that was made for it just now, if one was."""

    secret: bytes
    origin: str
    made: Path | None = None


def load_key(key_file: str | None, output: str) -> Key:
    """The key.

    In this order: `key_file`; the variable CURIA_KEY; the file `<output>.key` beside the dataset folder, which is made with
    a random key where it does not exist. The key is never written into the dataset.

    Raises:
      UserError: the file does not exist, lies inside the dataset folder, or a key is too short to be a secret.
    """
    if key_file is not None:
        path = Path(key_file)
        if not path.is_file():
            raise UserError(f"no key file {key_file}; {_MAKE_A_KEY} > {key_file}")
        if Path(output).resolve() in path.resolve().parents:
            raise UserError(
                f"the key {key_file} lies inside the dataset {output}; keep it elsewhere, it must not travel with the data"
            )
        return Key(_sound(path.read_bytes(), key_file), f"key from {key_file}")
    if KEY_VARIABLE in os.environ:
        name = f"the variable {KEY_VARIABLE}"
        return Key(_sound(os.environ[KEY_VARIABLE].encode(), name), f"key from {name}")
    path = key_beside(output)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        return Key(
            _sound(path.read_bytes(), str(path)),
            f"new key in {path}: keep it, pseudonyms and splits depend on it, and keep it apart from the data",
            path,
        )
    return Key(_sound(path.read_bytes(), str(path)), f"key from {path}")


def key_beside(output: str) -> Path:
    """The key file beside a dataset folder, which is used where no other key is named."""
    path = Path(output).resolve()
    return path.with_name(f"{path.name}.key")


def _sound(key: bytes, where: str) -> bytes:
    key = key.strip()
    if len(key) < MINIMUM_KEY_BYTES:
        raise UserError(
            f"the key in {where} has {len(key)} bytes, wanted are at least {MINIMUM_KEY_BYTES}: short ones can be guessed; {_MAKE_A_KEY}"
        )
    return key


def digest(key: bytes, kind: str, value: str) -> str:
    """Pseudonym of a value: 16 hex digits (64 bits) of HMAC-SHA256. `kind` keeps patients, series and splits apart.

    File names that are no UTF-8 are taken byte for byte, as Python hands them over (PEP 383).
    """
    return hmac.new(key, f"{kind}:{value}".encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[:16]


def split_of(key: bytes, patient: str, validation: float, test: float) -> str:
    """The split of a patient: a fixed point in [0, 1) per patient and key, so that adding exams moves nobody.

    Args:
      patient: pseudonym.
      validation, test: shares of the patients.
    """
    point = int(digest(key, "split", patient), 16) / 2**64
    return "test" if point < test else "validation" if point < test + validation else "train"
