"""Sections of the page in the cases that the report of a small run does not show."""

import dataclasses
import html
import re
from pathlib import Path

import pyarrow as pa
import pytest

from curia_jax.models import mae
from curia_jax.report import findings, sections
from curia_jax.report.run_log import Event, Metrics, RunLog, Setup
from curia_jax.report.timeline import Stage, Timeline
from tests.scores import make_score

MODEL = mae.config("Ti", image_size=(16, 24), patch_size=8, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1,
                   decoder_heads=2, mask_ratio=0.5)  # fmt: skip
LOG = RunLog(
    metrics=(Metrics(6, 48, loss=0.6, baseline_loss=0.9, time=106.0, images_per_second=1234.0, mfu=0.42),),
    events=(Event("started", 0, 0, 100.0),),
    setup=Setup(6, 12_345_678, "cpu", {"replica": 1, "data": 2, "fsdp": 2}, 1e12, "measured"),
)
IMAGE = "data:image/png;base64,"


def plain(made: str) -> str:
    """The text of HTML with single spaces."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", made)).split())


def index(*rows: tuple[str, str, str, str]) -> pa.Table:
    return pa.Table.from_pylist(
        [dict(zip(("split", "modality", "patient", "series"), row, strict=True)) for row in rows]
    )


# ---- figures at the top


def test_first_finding_and_its_comparisons_lead() -> None:
    scores = [
        make_score("situs"), make_score("situs", against="random", value=0.2, low=0.1, high=0.3),
        make_score("situs", against="pixels", value=0.1, low=-0.1, high=0.2), make_score("region", value=0.9),
    ]  # fmt: skip
    text = plain(sections.key_figures(LOG, findings.find(scores), index(("train", "CT", "p", "s")), None))
    assert text.startswith(
        "0.700 AUROC [0.600, 0.800] for situs, 12 test patients +0.200 [+0.100, +0.300] against the same encoder untrained "
        "+0.100 [-0.100, +0.200] against the raw pixels 0.600 loss"
    )
    assert text.count("AUROC") == 1


def test_unknown_patients_are_not_called_patients() -> None:
    unknown = index(("train", "CT", "p1", "s1"), ("test", "CT", "p2", "s2")).append_column(
        "patient_from", pa.array(["file"] * 2)
    )
    assert "2 slices of 2 files (patients unknown)" in plain(sections.key_figures(LOG, {}, unknown, None))
    manifest = pa.table({"fate": ["kept"], "reason": [""]})
    text = plain(sections.dataset(unknown, manifest))
    assert "Split by files (patients unknown)." in text and "slices by modality files series slices" in text
    score = make_score(groups="files (patients unknown)", patients=80)
    text = plain(sections.scores(None, [score], {}, {}))
    assert "bootstrap over files (patients unknown)" in text and "slices of 80 files (patients unknown)." in text


def test_figures_are_those_of_the_last_line_and_the_index() -> None:
    rows = [("train", "CT", "p1", "s1"), ("train", "CT", "p1", "s2"), ("test", "MR", "p2", "s3")]
    story = Timeline(None, 4, stages={"build": Stage("", True, 7000.0, "build")})
    text = plain(sections.key_figures(LOG, {}, index(*rows), story))
    assert text == (
        "0.600 loss; predicting each patch's mean gives 0.900 48 examples trained on in 6 steps 3 slices of 2 patients "
        "1,234/s images trained on, 4 simulated CPU devices 1.9 h for everything on this page, on 4 CPU cores"
    )


# ---- pictures


def test_reconstructions_say_whether_training_has_seen_the_slices() -> None:
    unseen = plain(sections.reconstructions({"CT": IMAGE}, MODEL, "test"))
    assert "Shown are slices of test patients, whom no training has seen." in unseen
    assert "The encoder sees 50% of the patches" in unseen and "MR" not in unseen
    assert "Shown are slices it was trained on." in plain(sections.reconstructions({"MR": IMAGE}, MODEL, "train"))
    assert sections.reconstructions({}, MODEL, "test") == ""


def test_note_on_grey_levels_is_for_norm_pix_alone() -> None:
    assert "the grey level of a patch is not predicted" in sections.reconstructions({"CT": IMAGE}, MODEL, "test")
    pixels = dataclasses.replace(MODEL, norm_pix=False)
    assert "grey level" not in sections.reconstructions({"CT": IMAGE}, pixels, "test")


@pytest.mark.parametrize(("loss", "words"), [(0.6, "33% below the 0.900"), (0.95, "no better than the 0.900")])
def test_loss_is_compared_with_predicting_the_mean(loss: float, words: str) -> None:
    log = dataclasses.replace(LOG, metrics=(dataclasses.replace(LOG.metrics[0], loss=loss),))
    assert f"ends at {loss:.3f}, {words} of predicting each patch's mean." in plain(sections.loss(IMAGE, log, MODEL))


# ---- scores


def test_caption_lists_classes_up_to_twelve_and_those_not_learned() -> None:
    classes = tuple(f"c{n:02d}" for n in range(14))
    score = make_score(classes=classes, classes_not_learned=("rare",), unit="series", patients=1)
    text = plain(sections.scores(None, [score], {}, {}))
    assert "lesion: 14 classes (c00, c01, " in text and "c11, …)" in text and "c12" not in text
    assert "tested on 60 series of 1 patient." in text
    assert "Only in the test, counted as wrong: rare." in text


def test_tasks_have_tables_of_their_own() -> None:
    made = sections.scores(IMAGE, [make_score("lesion"), make_score("region")], {}, {})
    assert made.count("<table>") == 2 and made.count("<img") == 1


# ---- data


def test_dataset_counts_patients_series_and_slices_of_each_split() -> None:
    rows = [
        ("test", "CT", "p2", "s3"), ("train", "CT", "p1", "s1"), ("train", "MR", "p1", "s2"), ("train", "MR", "p1", "s2"),
        ("fold 2", "CT", "p3", "s4"),
    ]  # fmt: skip
    manifest = pa.table({"fate": ["excluded", "kept", "kept"], "reason": ["constant", "", ""]})
    text = plain(sections.dataset(index(*rows), manifest))
    assert "train CT 1, MR 2 1 2 3 test CT 1 1 1 1 fold 2 CT 1 1 1 1" in text
    assert "What became of each of the 3 input files. fate why files kept 2 excluded constant 1" in text


def test_rare_fates_are_added_up() -> None:
    reasons = [f"reason {n:02d}" for n in range(25)]
    manifest = pa.table({"fate": ["excluded"] * 25 + ["kept"] * 2, "reason": [*reasons, "", ""]})
    text = plain(sections.dataset(index(("train", "CT", "p", "s")), manifest))
    # Twenty lines: the kept files and nineteen reasons; six files are left.
    assert "kept 2 excluded reason 00 1" in text and "reason 18 1 other see manifest.parquet 6" in text


# ---- the run


def interrupted(resumed_at: int) -> RunLog:
    events = (Event("preempted", 3, 24, 103.0), Event("resumed", 3, resumed_at, 223.0))
    return dataclasses.replace(LOG, events=(*LOG.events, *events))


def test_resume_at_another_example_is_reported_as_such() -> None:
    right, wrong = (plain(sections.run(IMAGE, interrupted(at))) for at in (24, 32))
    assert "2.0 min later, it restored that step and took example number 24 next" in right
    assert right.split("(numbered from 0): ")[1].startswith("the very next example.")
    assert wrong.split("(numbered from 0): ")[1].startswith("not the next one, 24.")


def test_throughput_names_the_accelerator_and_is_left_out_unmeasured() -> None:
    log = dataclasses.replace(LOG, setup=dataclasses.replace(LOG.setup, device="TPU v5e"))
    text = plain(sections.run(IMAGE, log))
    assert (
        "1,234 images per second (median) on 4 × TPU v5e, mesh replica 1 × data 2 × fsdp 2: 42% model FLOPs utilisation "
        "of 1.00 TFLOP/s (measured)."
    ) in text
    line = dataclasses.replace(LOG.metrics[0], images_per_second=None, mfu=None)
    assert plain(sections.run(IMAGE, dataclasses.replace(LOG, metrics=(line,)))) == "The run"


# ---- stages and files


def test_stages_hide_the_folder_of_exams_and_time_of_unfinished_ones() -> None:
    stages = {
        "build": Stage(
            "", True, 61.0, "exams to shards", ("python -m data_pipeline.build --input '/x/Jane Roe' --output=s",)
        ),
        "pretrain": Stage("", False, 30.0, "pretraining", ("python -m curia_jax.pretrain",)),
    }
    text = plain(sections.stages(Timeline("/x/Jane Roe", 2, 1_500_000_000, stages)))
    assert "exams to shards python -m data_pipeline.build --input FOLDER --output=s 61 s" in text
    assert text.endswith("pretraining python -m curia_jax.pretrain") and "Jane" not in text
    assert sections.stages(None) == sections.next_commands(None) == sections.next_commands(Timeline(None, 1)) == ""


def test_next_commands_are_quoted_for_a_shell() -> None:
    story = Timeline(None, 1, next=(("watch the curves", ("tensorboard", "--logdir=my run")),))
    assert plain(sections.next_commands(story)) == "What to type next Watch the curves. tensorboard '--logdir=my run'"


def test_artefacts_have_paths_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(b"x" * 2500)
    text = plain(sections.artefacts([(tmp_path / "results.json", "scores"), (tmp_path / "none", "shards")]))
    assert text.endswith(f"{tmp_path / 'results.json'} scores 2.5 kB {tmp_path / 'none'} shards")
