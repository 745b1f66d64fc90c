"""The closing lines of a build: what the dataset holds, what was left out and why, and what deserves a look."""

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from data_pipeline.format import shards
from data_pipeline.sources.object_stores import is_address
from data_pipeline.stages import advice, assignment, card, inventory, pseudonyms
from data_pipeline.stages.card_page import MODALITIES, UNITS, refused_units, without_patient

REASONS_SHOWN = 5
FEW_PATIENTS = 5  # of a split, under which its scores say little
# Reasons that the user asked for: what is left out by them is not unusable.
WANTED = frozenset({
    assignment.HELD_OUT, inventory.A_FACE, inventory.MAY_BE_A_FACE, inventory.LOSSY, *inventory.OWN_FILES,
})  # fmt: skip
NOT_ON_MEDIUM = "cannot be read: No such file"  # a file that a listing names


def lines(made: card.Card, output: Path, seconds: float) -> list[str]:
    """What to say at the end of a build, one screen."""
    counts = made["files"]
    found = [
        f"{_count(made['slices'], 'slice')} of {made['series']:,} series of {_count(made['patients'], 'patient')} in "
        f"{_count(len(made['shards']), 'shard')}, "
        f"{made['bytes'] / 1e6:,.1f} MB, in {seconds:.0f} s"
    ]  # fmt: skip
    found += [f"  {_kind(kind)}" for kind in made["kinds"]]
    found.append(f"  units: {_evidence(made)}")
    splits = made["slices_by"]["split"]
    in_splits = [
        f"{split} {_count(splits[split], 'slice')} of {_count(made['patients_by_split'][split], 'patient')}"
        for split in pseudonyms.SPLITS
        if splits.get(split)
    ]
    found.append(f"  splits: {', '.join(in_splits)}")
    found.append(
        f"files: {', '.join(f'{counts[fate]:,} {fate}' for fate in card.FATES if counts[fate])}; each with its reason in {output / shards.MANIFEST}"
    )
    common = advice.commonest(made["reasons"], REASONS_SHOWN + 1)
    for one in common[:REASONS_SHOWN]:
        found.append(f"  {one.files:6,} x {one.fate}: {one.reason}" + (f" -> {one.what}" if one.what else ""))
    if len(common) > REASONS_SHOWN:
        found.append(f"  and rarer reasons, see {output / shards.CARD}")
    notes = list(_notes(made))
    found += ["please look at:"] * bool(notes) + [f"  {note}" for note in notes]
    found.append(f"examples, labels and counts: {output / shards.PAGE}")
    return found


def _count(number: int, what: str) -> str:
    """ "1 slice", "1,295 slices"."""
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _kind(kind: card.Json) -> str:
    modality = f"{MODALITIES[kind['modality']]}," if kind["modality"] in MODALITIES else kind["modality"]
    units = UNITS.get(kind["units"], kind["units"])
    guessed = kind["modality_inferred"]
    return f"{modality} in {units}: {_count(kind['slices'], 'slice')} of {kind['series']:,} series" + (
        f", modality guessed from the values of {_count(guessed, 'slice')}" if guessed else ""
    )


def _evidence(made: card.Card) -> str:
    total: collections.Counter[str] = collections.Counter()
    for kind in made["kinds"]:
        total.update(kind["series_by_units_evidence"])
    words = {"proved": "by the pixels", "declared": "by the header alone", "guessed": "from the values"}
    found = ", ".join(f"{name} {words[name]} for {total[name]:,} series" for name in card.EVIDENCE if total[name])
    return found + (f"; refused for {refused}" if (refused := refused_units(made)) else "")


def _notes(made: card.Card) -> Iterator[str]:
    """What a user should know before training on the dataset."""
    settings, patients = made["settings"], made["patients_by_split"]
    if said := without_patient(made):
        yield f"{said}, so that one patient can be in two splits: name the patients with --labels and --patient-column"
    for split in ("validation", "test"):
        share, slices = settings[split], made["slices_by"]["split"].get(split, 0)
        if not slices and share:
            yield f"{split} is empty: none of {made['patients']:,} patients fell into its share of {share:g}; build anew with a larger --{split}"
        elif slices and patients[split] < FEW_PATIENTS:
            yield f"{split} has {_count(slices, 'slice')} of {_count(patients[split], 'patient')}, too few for a score; build anew with a larger --{split}, or with --split-column"
    if not made["slices_by"]["split"].get("train"):
        yield "train is empty: build anew with smaller --validation and --test, or train on another split"
    if alike := made["near_duplicates"]["in another split"]:
        yield f"{alike:,} series look like one in another split; column near_duplicate_of of {shards.INDEX} names both"
    if missing := sum(n for reason, n in made["reasons"]["quarantined"].items() if reason.startswith(NOT_ON_MEDIUM)):
        yield f"{missing:,} files that a DICOMDIR or a link names are not there; copy the medium again, or name its folder"
    if settings["planes"] and not made["reformatted"]:
        yield f"--planes {settings['planes']} made nothing: no series is regular, has at least 5 slices and lies in another plane; the reasons of kept files say why"


class Unusable(NamedTuple):
    """An input of which nothing is in the dataset: its name as it was given, its files, and the commonest reasons."""

    name: str
    files: int
    reasons: str


def unusable_inputs(inputs: Sequence[str], output: Path) -> list[Unusable]:
    """The inputs of which nothing is in the dataset, though nobody asked to leave it out."""
    places: dict[str, list[str]] = collections.defaultdict(list)
    for name in inputs:
        top = os.path.dirname(os.path.abspath(name)) if inventory.is_dicomdir(name) else name
        places[_shown(inventory.absolute(top))].append(name)
    reasons: dict[str, dict[str, collections.Counter[str]]] = {
        name: collections.defaultdict(collections.Counter) for name in inputs
    }
    usable: set[str] = set()
    with pq.ParquetFile(output / shards.MANIFEST) as file:
        for batch in file.iter_batches(columns=["path", "fate", "reason"]):
            for row in batch.to_pylist():
                good = row["fate"] in ("kept", "duplicate") or row["reason"] in WANTED
                for place in inventory.containing(inventory.absolute(row["path"])):
                    for name in places.get(place, ()):
                        if good:
                            usable.add(name)
                        reasons[name][row["fate"]][row["reason"]] += 1
    found = []
    for name in dict.fromkeys(inputs):
        files = sum(counts.total() for counts in reasons[name].values())
        if name not in usable and (files or not is_address(name) and _is_empty(name)):
            found.append(Unusable(name, files, advice.in_words(advice.commonest(reasons[name], 2)) or "no file"))
    return found


def _shown(path: str) -> str:
    """A path as the manifest shows it."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_empty(name: str) -> bool:
    """Whether a folder holds no file. One that does and is in no row was reached under another name."""
    return not any(files for _, _, files in os.walk(name, followlinks=True))
