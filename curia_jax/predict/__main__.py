"""Predicts the classes of exams with a fine-tuned model.

--input is exams as data_pipeline.build takes them (DICOM folders, NIfTI, NRRD, pictures, archives, buckets), read by the same code: the
same order of slices, the same proof of HU, the same reasons to leave a file out; or a shard folder. --output is a Parquet table
with a row for each series and class:

  id           pseudonym of the patient, under the key of --key-file; with --paths the exam's path
  series       pseudonym of the series
  class        name of a class, label or value
  probability  of the class or label; for a model of a value or of times the column is `value`: the value in its units, or the log hazard
  slice        number of the slice, in spatial order from 0, that spoke most: whose own probability is highest, or, with an attentive
               head, to which it attends most; null where no slice stands out

A model that was trained on cases of several slices gets as many of each series, spread evenly. One that was trained on single slices gets
all, and --volumes says what becomes of their probabilities. Files that were not predicted are listed, by number and reason, in
OUTPUT.left_out.csv. A stopped command resumes when it is run again.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import curia_common
from curia_common import cli, logs, progress
from curia_common.errors import DataError, UserError
from curia_common.exit_codes import ExitCode

if TYPE_CHECKING:
    from curia_jax.predict.classifier import Classifier
    from curia_jax.predict.inputs import Input
    from curia_jax.predict.parts import Parts

VOLUMES = ("mean", "max", "each")  # see table.rows
EXAMPLES = """
python -m curia_jax.predict --weights=runs/ich --input=exams --output=predictions.parquet
python -m curia_jax.predict --weights=weights/ich --input=exams --output=predictions.parquet --volumes=max --paths
python -m curia_jax.predict --weights=runs/ich --input=shards --output=predictions.parquet
"""

log = logs.get_logger(__name__)


def parser() -> cli.Parser:
    made = cli.parser("python -m curia_jax.predict", __doc__, examples=EXAMPLES, codes=(ExitCode.DATA,))
    made.add_argument(
        "--weights",
        required=True,
        help="work directory of curia_jax.finetune, folder of a step, or a classifier of curia_jax.convert",
    )
    made.add_argument("--step", type=int, help="step of the work directory (default: the newest)")
    made.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="exams: files, folders, archives, buckets; or a shard folder",
    )
    made.add_argument("--output", required=True, metavar="FILE", help="the table, a Parquet file")
    made.add_argument(
        "--volumes", choices=VOLUMES, default="mean",
        help="of a model of single slices, what a series gets: the mean or the highest of their probabilities, or a row for each "
        "slice (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--paths", action="store_true",
        help="write paths into the table and the list of files that were left out; without it neither has any",
    )  # fmt: skip
    made.add_argument(
        "--key-file",
        metavar="FILE",
        help="key of the pseudonyms (default: the variable CURIA_KEY, or a file beside OUTPUT that is made)",
    )
    made.add_argument(
        "--modality",
        choices=("auto", "CT", "MR"),
        default="auto",
        help="of files that do not say (default: %(default)s)",
    )
    made.add_argument("--batch-size", type=int, default=64, metavar="N", help="slices at a time (default: %(default)s)")
    made.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read (default: %(default)s)")
    made.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds a file may take before it is left out (default: %(default)s)",
    )
    made.add_argument(
        "--memory-gb",
        type=float,
        default=4.0,
        metavar="GB",
        help="memory that a reading process may take (default: %(default)s)",
    )
    cli.add_json(made, "series, rows, left_out (files), weights (digest), classes")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    stopped = "stopped; finished predictions are kept, rerun the same command to resume"
    return cli.run(parser(), predict, argv, stopped=stopped, quote_faults=False)


def predict(args: argparse.Namespace) -> None:
    from curia_jax.evaluate import preparation
    from curia_jax.predict import classifier, inputs, parts
    from data_pipeline.format import shards
    from data_pipeline.stages import exams, pseudonyms

    # ---- what was typed, before any work
    for option, low in (("batch_size", 1), ("workers", 1), ("memory_gb", 1)):
        cli.at_least(f"--{option.replace('_', '-')}", getattr(args, option), low)
    output = Path(args.output)
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}; make it first")
    if output.is_dir():
        raise UserError(f"--output={output} is a folder; name a file in it")
    before = parts.request_of(output)
    of_shards = [path for path in args.input if Path(path, shards.SHARDS).is_file()]
    if of_shards and len(args.input) > 1:
        raise UserError(f"--input: {of_shards[0]} is a shard folder, which has to be the only input")
    model = classifier.load(args.weights, args.step, otherwise=preparation.default_settings())
    log.info(_described(model, args.volumes))

    # ---- which series there are, and which of them are predicted
    request = {
        "version": curia_common.__version__, "weights": model.digest, "step": model.step, "target": model.head.target,
        "slices": model.slices, "volumes": args.volumes if model.slices == 1 else None, "paths": args.paths,
        "modality": args.modality,
    }  # fmt: skip
    secret = b""
    if not of_shards:
        key = pseudonyms.load_key(args.key_file, args.output)
        log.info(key.origin)
        secret, request["key"] = key.secret, pseudonyms.digest(key.secret, "key", "")
    with parts.Parts(output, json.dumps(request)) as made:
        if made.restarted:
            log.info("an unfinished table of other weights or options was there: started anew")
        given: inputs.Input
        if of_shards:
            given = inputs.Shards(of_shards[0])
        else:
            options = exams.Options(
                made.folder, secret, args.modality, args.workers, args.timeout, args.memory_gb,
            )  # fmt: skip
            own = (output, parts.left_out_path(output), pseudonyms.key_beside(args.output), args.key_file)
            given = inputs.Exams(args.input, options, [str(path) for path in own if path])
        request["series"] = hashlib.sha256("\n".join(sorted(given.series)).encode()).hexdigest()
        if before is not None and before != json.dumps(request):
            raise UserError(
                f"--output={output} holds predictions of other weights, inputs or options; name another one, or remove it"
            )
        if before is None:
            _write(args, model, given, made, json.dumps(request))
        else:
            log.info(f"{output} has the predictions of these series already")


def _write(args: argparse.Namespace, model: "Classifier", given: "Input", made: "Parts", request: str) -> None:
    """Predicts the series that are missing, and writes the table.

    Raises:
      DataError: there is no slice at all.
    """
    from curia_jax.predict import parts, table

    output = Path(args.output)
    if done := len(made.done & set(given.series)):
        log.info(f"{done:,} of {len(given.series):,} series are predicted already")
    with progress.Progress("predict", len(given.series), "series", done=done) as counter:
        for part in given.read(made.done):
            names = part.paths if args.paths else {}
            rows = table.rows(
                model,
                part.slices,
                args.volumes,
                batch_size=args.batch_size,
                names=names,
                only=list(part.series.values()),
            )
            made.add(part.series, rows, part.files)
            counter.step(len(part.series))
    fates = {path: one or made.outcomes[path] for path, one in given.files.items()}
    left_out = parts.write_left_out(output, fates, paths=args.paths)
    if left_out:
        quarantined = sum(one.fate == "quarantined" for one in fates.values())
        log.info(
            f"{left_out:,} of {len(fates):,} files were left out, {quarantined:,} of them because they cannot be read: "
            f"{parts.left_out_path(output)}"
        )
    count, predicted = made.count(given.series.keys())
    if not count:
        raise DataError(f"no slice of --input could be predicted; {parts.left_out_path(output)} says why")
    made.write(given.series.keys(), table.schema(model.head).with_metadata({parts.METADATA: request.encode()}))
    nothing = f"; of {len(given.series) - predicted:,} more no slice is left" if predicted < len(given.series) else ""
    log.info(f"{output}: {count:,} rows of {predicted:,} series{nothing}")
    cli.write_json(args.json, {
        "series": predicted, "rows": count, "left_out": left_out, "weights": model.digest, "classes": list(model.head.names),
    })  # fmt: skip


def _described(model: "Classifier", volumes: str) -> str:
    names = ", ".join(model.head.names[:6]) + (" …" if len(model.head.names) > 6 else "")
    each = {
        "mean": "of a series the mean of its slices", "max": "of a series the highest of its slices", "each": "of every slice",
    }[volumes]  # fmt: skip
    if model.slices > 1:
        each = f"of a series from up to {model.slices} slices together"
    return f"step {model.step:,}, {model.head.kind} head for {model.head.target} ({names}); {each}"


if __name__ == "__main__":
    sys.exit(main())
