"""Turns exams into slice shards: DICOM, NIfTI, MGH, NRRD, MetaImage, PNG, JPEG and TIFF files to a folder for training.

stages:
  inventory  every file and what it is; reads headers only
  plan       which series goes to which shard, fixed before a pixel is read
  convert    decode, check, encode; each shard is written under a temporary name, verified, then published
  commit     index, manifest, dataset card (index.html, card.json) and TFDS metadata

The same command resumes a build that was stopped: finished shards stay as they are. Bad files never stop it; every input
file is in manifest.parquet with its fate (kept, excluded, duplicate, quarantined) and the reason.

To add exams, build into the same output again, with the new inputs alone or together with the old ones: they become further
shards, and existing shards stay as they are, byte for byte. Patients keep their split, files of the dataset are not taken
twice, and until the addition is finished readers see the dataset as it was.

Patients never share a split. DICOM names them, or else the study stands for one; volumes and pictures are told apart by their
BIDS subject (sub-01) or, where there is none, file by file: if several files show one patient, say so with --labels and
--patient-column.

An input of which nothing can be used is exit code 65, after everything else is in the dataset.

What leaves the inputs: pixels, a fixed list of technical facts and the labels you name. Identities become pseudonyms under
a secret key that you keep; only manifest.parquet (paths, readable by you alone) leads back, so do not give it away.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from curia_common import cli
from curia_common.errors import DataError
from curia_common.exit_codes import ExitCode
from data_pipeline.stages.pseudonyms import KEY_VARIABLE

EXAMPLES = r"""
python -m data_pipeline.build --input exams/ --output shards/
python -m data_pipeline.build --input a/ b/ --output shards/ --key-file ~/curia.key --size 512 --workers 8
python -m data_pipeline.build --input pictures/ --labels pictures/labels.csv --label-columns covid --split-column split \
    --patient-column patient --modality CT --output labelled/
"""


def parser() -> argparse.ArgumentParser:
    p = cli.parser("python -m data_pipeline.build", __doc__, examples=EXAMPLES, codes=(ExitCode.DATA,))
    p.add_argument(
        "--input", nargs="+", required=True, metavar="PATH",
        help="folders, files, .zip and .tar archives, a DICOMDIR, s3://bucket/folder, gs://bucket/folder; folders are searched recursively",
    )  # fmt: skip
    p.add_argument(
        "--output", required=True, metavar="FOLDER",
        help="dataset folder; an unfinished build in it is resumed, a finished one added to",
    )  # fmt: skip
    p.add_argument("--name", default="slices", help="dataset name, the start of the shard names (default: %(default)s)")
    p.add_argument(
        "--key-file",
        metavar="FILE",
        help=f"secret for pseudonyms and splits; else the variable {KEY_VARIABLE}, else OUTPUT.key, which is made if it does not exist",
    )
    p.add_argument(
        "--modality", choices=("auto", "CT", "MR"), default="auto",
        help="of files that do not name theirs (NIfTI, NRRD, MetaImage, pictures); auto takes volumes for CT where air and tissue lie at their HU",
    )  # fmt: skip
    p.add_argument(
        "--size", type=int, metavar="PX", help="reduce slices whose longer side is larger (default: native size)"
    )
    p.add_argument(
        "--planes", type=lambda text: tuple(text.split(",")), default=(), metavar="PLANE,…",
        help="reformat regular series into axial, coronal, sagittal too, at isotropic spacing (default: slices as acquired)",
    )  # fmt: skip
    p.add_argument(
        "--slices-per-record", type=int, default=1, metavar="N",
        help="neighbouring slices of a series stored together; 16 to 32 save requests to object storage (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--shard-mb", type=int, default=256, metavar="MB", help="input megabytes per shard (default: %(default)s)"
    )
    p.add_argument(
        "--validation", type=float, default=0.05, metavar="SHARE",
        help="share of the patients for validation (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--test", type=float, default=0.05, metavar="SHARE",
        help="share of the patients for testing (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--labels", nargs="+", default=(), metavar="CSV",
        help="tables whose rows name files or folders (relative to the table) in a column 'file' or 'folder', or DICOM ids in 'series', 'study' or 'patient'; what they do not name has no labels",
    )  # fmt: skip
    p.add_argument(
        "--label-columns", nargs="+", default=(), metavar="NAME",
        help="columns of --labels that become labels (default: none); one that looks like an id, a date or a name is refused",
    )  # fmt: skip
    p.add_argument(
        "--force-label-columns", nargs="+", default=(), metavar="NAME",
        help="columns that become labels though they look like an id, a date or a name; their text is stored as it is",
    )  # fmt: skip
    p.add_argument(
        "--split-column", metavar="NAME", help="column of --labels that holds train, validation (or val) and test"
    )
    p.add_argument("--patient-column", metavar="NAME", help="column of --labels that tells patients apart")
    p.add_argument(
        "--modality-column",
        metavar="NAME",
        help="column of --labels that holds CT or MR, for files that do not name theirs; where it is empty --modality decides",
    )
    p.add_argument(
        "--holdout",
        metavar="FILE",
        help="patients to keep out, one per line: a patient ID, or a folder, archive or file of the patient (also exams.zip!/folder)",
    )
    p.add_argument(
        "--examples", type=int, default=24, metavar="N",
        help="slices to show on the dataset card, of exams none that shows a face, of pictures any unless --drop-faces; 0 for none (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--drop-faces",
        action="store_true",
        help="leave out series of body parts with a face, and those whose body part is unknown",
    )
    p.add_argument("--drop-lossy", action="store_true", help="leave out slices with lossy compression")
    p.add_argument(
        "--keep-maps",
        action="store_true",
        help="keep DICOM maps of a quantity (ADC, perfusion, iodine, phase, …) too, in arbitrary units (default: left out)",
    )
    p.add_argument(
        "--runner", choices=("local", "beam"), default="local",
        help="engine of the conversion: processes of this machine, or Apache Beam (see docs/ingest_scale.md; default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--beam-options",
        metavar="OPTIONS",
        help="Beam's own options in one argument: --beam-options='--runner=FlinkRunner --flink_master=…' (default: processes of this machine)",
    )
    p.add_argument(
        "--scratch",
        metavar="FOLDER",
        help="folder on a local disk of every machine that converts, for temporary files; needed where OUTPUT is a mounted bucket (default: OUTPUT)",
    )
    p.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)"
    )
    p.add_argument(
        "--timeout", type=float, default=60.0, metavar="S",
        help="seconds a file may take before it is quarantined (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--memory-gb", type=float, default=4.0, metavar="GB",
        help="memory a worker may take; a file that needs more is quarantined (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--unpack-gb", type=int, default=100, metavar="GB",
        help="space for uncompressed copies of compressed tar archives, in OUTPUT until the build is finished (default: %(default)s)",
    )  # fmt: skip
    cli.add_json(p, "the dataset card")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    stopped = "stopped; finished shards are kept, rerun the same command to resume"
    return cli.run(parser(), _build, argv, stopped=stopped, quote_faults=False)


def _build(args: argparse.Namespace) -> None:
    from data_pipeline.stages import pipeline

    given = {name: value for name, value in vars(args).items() if name != "json"}
    result = pipeline.run(pipeline.Options(**given))
    cli.write_json(args.json, result.card)
    if result.unusable:
        inputs = [f"{one.name} ({one.files:,} files: {one.reasons})" for one in result.unusable]
        more = f" and {len(inputs) - 3:,} more inputs" if len(inputs) > 3 else ""
        raise DataError(
            f"nothing usable came of {', '.join(inputs[:3])}{more}; the dataset in {args.output} is complete without it"
        )


if __name__ == "__main__":
    sys.exit(main())
