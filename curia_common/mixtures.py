"""Shard folders with weights, as `config.data.shards` writes them: `ct:0.7,mr:0.3`."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from curia_common.errors import UserError

OPTION = "--config.data.shards"
LONGEST_PERIOD = 100_000  # examples after which the order of the folders repeats
_PART = re.compile(
    r"\s*(?P<folder>.*\S)\s*:\s*(?P<weight>[0-9]+(\.[0-9]*)?|\.[0-9]+)\s*"
)  # the last colon: gs://bucket/ct:0.7


class Part(NamedTuple):
    """A folder, and its weight as it is written; "" for a folder alone."""

    folder: str
    weight: str


def parse(text: str) -> tuple[Part, ...]:
    """The folders of a text. One that has no weights in it is the path of a single folder, colons and commas included.

    Raises:
      UserError: some folders have a weight and others none, a weight is 0, or a folder is named twice.
    """
    pieces = text.split(",")
    found = [_PART.fullmatch(piece) for piece in pieces]
    if len(pieces) == 1 or not any(found):
        return (Part(text, ""),)
    parts = []
    for piece, match in zip(pieces, found, strict=True):
        if match is None:
            raise UserError(f"{OPTION}={text}: {piece!r} has no weight; write FOLDER:WEIGHT,FOLDER:WEIGHT")
        if not Fraction(match["weight"]):
            raise UserError(f"{OPTION}={text}: the weight of {match['folder']} is 0; leave the folder out")
        if match["folder"] in (part.folder for part in parts):
            raise UserError(f"{OPTION}={text} names {match['folder']} twice; add its weights up")
        parts.append(Part(match["folder"], match["weight"]))
    return tuple(parts)


def write(parts: Sequence[Part]) -> str:
    """The text of some folders."""
    return ",".join(f"{part.folder}:{part.weight}" if part.weight else part.folder for part in parts)


def shares(parts: Sequence[Part]) -> tuple[Fraction, ...]:
    """What share of the examples comes from each folder, exactly; they add up to 1.

    Raises:
      UserError: the weights have so many digits that the order of the folders would not repeat within 100,000 examples.
    """
    weights = [Fraction(part.weight or 1) for part in parts]
    found = tuple(weight / sum(weights) for weight in weights)
    if (period := math.lcm(*(share.denominator for share in found))) > LONGEST_PERIOD:
        raise UserError(
            f"the weights {', '.join(part.weight for part in parts)} repeat after {period:,} examples, but may take {LONGEST_PERIOD:,}; "
            "round them to three digits that add up to 1"
        )
    return found
