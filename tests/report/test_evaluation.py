"""The page of several tasks and backbones."""

import base64
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curia_common import windows
from curia_common.errors import DataError
from curia_jax.evaluate.preparation import Preparation
from curia_jax.evaluate.results import NotScored, Provenance, Row, rows
from curia_jax.report import evaluation, examples
from tests import browser
from tests.report import test_across
from tests.scores import make_score

COMMAND = "python -m curia_jax.evaluate --tasks=shards/lesion --data=<shards>"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """The folder of two tasks, scored with two backbones and two heads."""
    r = np.random.default_rng(0)
    for task in ("shards/lesion", "shards/side"):
        lines = []
        for backbone in ("run", "pixels"):
            for head in ("ridge", "knn"):
                for n in range(60):
                    positive = float(np.clip(0.5 + 0.2 * (n % 2) + r.normal(0, 0.2), 0, 1))
                    lines.append(
                        {
                            "task": task,
                            "backbone": backbone,
                            "head": head,
                            "series": f"series-{n}",
                            "patient": f"patient-{n}",
                            "target": "yes" if n % 2 else "no",
                            "slice": n,
                            "labels": "100 %",
                            "scores": [1 - positive, positive],
                        }
                    )
        (tmp_path / task).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(lines), tmp_path / task / "ours-predictions.parquet")
    return tmp_path


def results() -> list[Row]:
    made = []
    for task in ("shards/lesion", "shards/side"):
        for backbone, value in (("run", 0.81), ("pixels", 0.62)):
            from_weights = Provenance(
                weights_sha256=f"{backbone}-0123456789abcdef",
                preparation=Preparation("window", (-1000, 1000), (96, 96)).to_json(),
            )
            for head in ("ridge", "knn"):
                for metric in ("auroc", "accuracy"):
                    made.append(
                        make_score(
                            task=task, backbone=backbone, head=head, metric=metric, value=value, provenance=from_weights,
                            data_sha256="fedcba98765432100",
                        )
                    )  # fmt: skip
        made.append(make_score(task=task, head="ridge", against="pixels", value=0.19, low=0.05, high=0.3))
        made.append(make_score(task=task, backbone="majority", head="none", value=0.5, low=0.5, high=0.5))
    return rows([*made, NotScored("registration", "ours", "not_run", "dense tasks are <not> scored yet")])


def few_labels_and_groups() -> list[Row]:
    """Of lesion: 10 % and 5 cases of each class, three seeds each; a level of two seeds; and two scanners."""
    made = []
    for backbone, shift in (("run", 0.0), ("pixels", -0.1)):
        for labels, patients, seeds in (("10 %", 4, 3), ("k=5", 10, 3), ("50 %", 20, 2)):
            for seed in range(seeds):
                score = make_score(
                    task="shards/lesion", backbone=backbone, value=0.6 + shift + patients / 100 + seed / 50, labels=labels, seed=seed,
                    train_patients=patients,
                )  # fmt: skip
                made.append(score)
        for name, n, doubt in (("A", 57, None), ("B", 3, "few patients")):
            score = make_score(task="shards/lesion", backbone=backbone, value=0.75 + shift, n=n, doubt=doubt)
            made.append(dataclasses.replace(score, study=dataclasses.replace(score.study, subgroup=f"scanner={name}")))
    return rows(made)


def images(numbers: Sequence[int]) -> list[examples.Image]:
    return [examples.Image(np.full((8, 8), float(n)), windows.Window("all", 30.0, 60.0)) for n in numbers]


def written(output: Path) -> str:
    evaluation.write(output, results(), COMMAND, {"shards/lesion": images, "shards/side": images})
    return (output / "report.html").read_text(encoding="utf-8")


def test_page_has_ranks_reasons_and_where_numbers_come_from(output: Path) -> None:
    text = written(output)
    assert text.count("0.810 <small>[0.600, 0.800] #1</small>") == 2  # of both tasks, in the first table
    assert "dense tasks are &lt;not&gt; scored yet" in text and "not_run" in text
    assert "--data=&lt;shards&gt;" in text
    assert "fedcba9876543210<" in text and "run-0123456789ab<" in text
    assert not re.search(r"(series|patient)-\d", text)


def test_page_shows_a_picture_for_each_task(output: Path) -> None:
    text = written(output)
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', text)
    assert [alt for _, alt in pictures] == [
        f"{what} of {name}"
        for name in ("lesion", "side")
        for what in ("ROC, reliability and confusion", "right and wrong cases")
    ]
    files = [f"shards-{name}-ours{which}.png" for name in ("lesion", "side") for which in ("", "-examples")]
    for (source, _), name in zip(pictures, files, strict=True):
        assert (output / "report_pictures" / name).read_bytes() == base64.b64decode(source)


def test_latex_table_lies_beside_the_page(output: Path) -> None:
    written(output)
    assert r"lesion & auroc & \textbf{0.810}" in (output / "table.tex").read_text(encoding="utf-8")


def test_nothing_scored_gives_a_page_with_the_reasons(tmp_path: Path) -> None:
    evaluation.write(tmp_path, rows([NotScored("shards/x", "ours", "failed", "one class")]), COMMAND, {})
    assert "one class" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_missing_predictions_are_named_with_the_remedy(output: Path) -> None:
    (output / "shards/side/ours-predictions.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="ours-predictions.parquet cannot be read; delete the folder of the task"):
        written(output)


def test_page_shows_few_labels_with_their_spread_and_subgroups_with_their_n(output: Path) -> None:
    evaluation.write(output, [*results(), *few_labels_and_groups()], COMMAND, {})
    text = (output / "report.html").read_text(encoding="utf-8")
    # The table of the picture follows it, before the subgroups.
    assert (
        text.index("few labels of lesion") < text.index("mean over the seeds [smallest") < text.index("in subgroups of")
    )
    assert (output / "report_pictures/shards-lesion-ours-few-labels.png").is_file() and "few labels of lesion" in text
    # Mean and ends over three seeds of run, then of pixels; 50 % has two seeds alone.
    line = re.search(r"<tr><td>10 %</td>.*?</tr>", text)
    assert line and re.findall(r">([^<>]+)<", line[0]) == [
        "10 %", "4", "3", "0.660 ", "[0.640, 0.680]", "0.560 ", "[0.540, 0.580]"
    ]  # fmt: skip
    assert "<td>k=5</td>" in text and "<td>50 %</td>" not in text
    groups = [re.findall(r">([^<>]+)<", row) for row in re.findall(r"<tr[^>]*><td>scanner</td>.*?</tr>", text)]
    assert [(row[1], row[2]) for row in groups] == [("A", "57"), ("B", "3")]
    assert "[0.600, 0.800]?" in groups[1] and "[0.600, 0.800]" in groups[0]
    # The tables of heads are those with all labels.
    assert text.count("0.810 <small>[0.600, 0.800] #1</small>") == 2


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_reads_well_in_a_browser(output: Path, scheme, width: int) -> None:
    evaluation.write(output, [*results(), *few_labels_and_groups()], COMMAND, {"shards/lesion": images})
    assert browser.problems(output / "report.html", scheme, width) == []


def test_page_shows_what_is_lost_across_before_the_directions(tmp_path: Path) -> None:
    made = [
        dataclasses.replace(s, study=dataclasses.replace(s.study, classes=()))
        for s in test_across.scores("shards/organ")
    ]
    evaluation.write(tmp_path, rows(made), COMMAND, {})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'alt="losses across, shards/organ"' in text and "The directions of a task count as one." in text
    titles = re.findall(r"<h2>([^<]*)</h2>", text)
    lost = titles.index("organ, protocol ours: what is lost across modality")
    directions = [f"organ, {a} to {b}, protocol ours" for a in ("CT", "MR") for b in ("CT", "MR")]
    assert sorted(titles[lost + 1 : lost + 5]) == directions
    # Of run in both directions: within, across, and the loss with its interval.
    assert text.count("-0.300 <small>[-0.400, -0.200]") == 8
    assert "trained on MR" not in text  # a difference of one backbone is no line of the table of heads
