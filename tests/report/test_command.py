"""The report of a small run: well formed, self-contained, with every score and without identifying names."""

import base64
import dataclasses
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import jax
import nibabel
import numpy as np
import pytest

from curia_jax import config
from curia_jax.evaluate import results
from curia_jax.evaluate.results import Score
from curia_jax.models import mae
from curia_jax.report import __main__ as report
from curia_jax.report import timeline
from data_pipeline import build
from tests import browser, checkpoints
from tests.scores import make_score

MODEL = {"size": "Ti", "image_size": [16, 16], "patch_size": [8, 8], "width": 16, "depth": 1, "heads": 2,
         "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.75, "norm_pix": True,
         "norm_pix_eps": 1e-6, "dtype": "float32"}  # fmt: skip
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags close in order and gathers images, links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert tag not in ("script", "iframe", "link"), "the page loads or runs something"
        assert "href" not in attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            assert attributes["alt"]
            self.images.append(attributes["src"] or "")
        if tag == "tbody":
            self.tables.append([])
        if tag == "tr" and "tbody" in self.open:
            self.tables[-1].append([])
        if tag == "td":
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open:
            self.tables[-1][-1][-1] += data


def scores(task: str) -> list[Score]:
    """Scores of four backbones and their differences, no two alike."""
    values = (0.51 + 0.0137 * n for n in itertools.count(1))

    def both_ends(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.08}

    heads_and_metrics = list(itertools.product(("knn", "ridge"), ("auroc", "accuracy", "balanced_accuracy")))
    found = [
        make_score(task, backbone, head, metric=metric, **both_ends(next(values)))
        for backbone in ("run", "random", "pixels", "histogram")
        for head, metric in heads_and_metrics
    ]
    return found + [
        make_score(task, head=head, metric=metric, against="random", **both_ends(next(values) - 0.7))
        for head, metric in heads_and_metrics
    ]


def write_run(folder: Path) -> None:
    plain = {"model": MODEL, "augment": json.loads(config.load("base").augment.to_json()), "seed": 0}
    checkpoints.save(folder, {6: {"params": mae.init(mae.config(**MODEL), jax.random.key(0))}}, config=plain)
    lines = [
        {"step": n, "examples_seen": 8 * n, "loss": 1.2 - 0.1 * n, "baseline_loss": 0.95, "learning_rate": 1e-3,
         "images_per_second": 1234.0, "mfu": 0.42, "time": 1.8e9 + n}
        for n in range(1, 7)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    started = {
        "event": "started", "step": 0, "examples_seen": 0, "total_steps": 6, "parameters": 12345678, "device": "cpu",
        "mesh": {"replica": 1, "data": 2, "fsdp": 2}, "peak_flops": 1e11, "peak_source": "measured", "time": 1.8e9,
    }  # fmt: skip
    events = [
        started,
        {"event": "preempted", "step": 3, "examples_seen": 24, "time": 1.8e9 + 3},
        {**started, "event": "resumed", "step": 3, "examples_seen": 24, "time": 1.8e9 + 10},
        {"event": "finished", "step": 6, "examples_seen": 48, "time": 1.8e9 + 13},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder with shards/, run/, weights/, results.json and demo.json."""
    folder = tmp_path_factory.mktemp("study")
    exams = folder / "exams of Jane Roe"
    exams.mkdir()
    rng = np.random.default_rng(0)
    for name, air in {"CT one": -1000, "CT two": -1000, "MR one": 0}.items():
        tissue = 40 if air else 300
        volume = np.where(np.hypot(*(np.mgrid[:40, :40] - 19.5)) < 14, tissue, air)[:, :, None] + rng.normal(
            0, 20, (40, 40, 3)
        )
        clipped = np.maximum(volume, air).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(clipped, np.diag([2.0, 2.0, 5.0, 1.0])), exams / f"{name}.nii")
    (exams / "notes.txt").write_text("not an image")
    words = [
        "--input",
        str(exams),
        "--output",
        str(folder / "shards"),
        "--workers",
        "1",
        "--validation",
        "0",
        "--test",
        "0",
    ]
    assert build.main(words) == 0
    write_run(folder / "run")
    (folder / "weights" / "timm").mkdir(parents=True)
    (folder / "weights" / "timm" / "model.safetensors").write_bytes(b"x" * 2500)
    (folder / "results.json").write_text(json.dumps(results.rows(scores("lesion") + scores("region"))))
    command = f"python -m data_pipeline.build --input '{exams}' --output=shards"
    timeline.Timeline(
        data=str(exams), cores=2, peak_bytes=1_234_000_000,
        stages={"build": timeline.Stage("", True, 61.0, "exams to slice shards", (command,))},
        not_probed={"plane": "every slice is of class 'axial'"},
        next=(("watch the curves", ("tensorboard", "--logdir=run/tensorboard")),),
    ).write(folder / "demo.json")  # fmt: skip
    return folder


def words(study: Path, output: Path | str, **changes: Path | str) -> list[str]:
    given = {
        "run": study / "run", "shards": study / "shards", "results": study / "results.json", "output": output,
        "weights": study / "weights", "timeline": study / "demo.json", **changes,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.fixture(scope="module")
def made(study) -> tuple[Path, str]:
    output = study / "report.html"
    assert report.main(words(study, output)) == 0
    return output, output.read_text(encoding="utf-8")


def test_page_is_well_formed_and_loads_nothing(made) -> None:
    output, text = made
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and '<meta name="viewport"' in text
    assert not re.search(r"(https?:)?//[a-z]|url\(|@import", text.split("</style>")[0] + page.text)
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', text)


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 420)])
def test_page_opens_without_problems(made, scheme, width) -> None:
    assert browser.problems(made[0], scheme, width) == []


def test_every_picture_is_embedded_and_saved_beside_page(made) -> None:
    output, text = made
    embedded = {base64.b64decode(source.split(",", 1)[1]) for source in Page(text).images}
    beside = {path.name: path.read_bytes() for path in (output.parent / "report_pictures").iterdir()}
    assert set(beside) == {"loss.png", "throughput.png", "ct.png", "mr.png", "scores.png"}
    assert set(beside.values()) == embedded
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in embedded)


def test_every_score_is_in_a_table(made, study) -> None:
    page = Page(made[1])
    found = {(line[0], line[1], cell) for table in page.tables for line in table for cell in line[2:] if len(line) > 2}
    names = {"run": "run", "random": "random encoder", "pixels": "pixels", "histogram": "histogram of the pixels"}
    for score in results.read(study / "results.json"):
        if score.against:
            name, form = f"run − {names[score.against]}", "{:+.3f} [{:+.3f}, {:+.3f}]"
        else:
            name, form = names[score.backbone], "{:.3f} [{:.3f}, {:.3f}]"
        assert (name, score.head, form.format(score.value, score.low, score.high)) in found
    assert "Up to 3 of 2,000 draws held a single class" in page.text


def test_page_describes_run_and_interruption(made) -> None:
    text = " ".join(Page(made[1]).text.split())
    for sentence in (
        "interrupted the run at step 3; its state was saved with 24 examples seen",
        "took example number 24 next (numbered from 0): the very next example.",
        "ends at 0.600, 37% below the 0.950 of predicting each patch's mean",
        "1,234 images per second (median) on 4 simulated CPU devices",
        "ViT/8 (width 16, depth 1, heads 2), 12.3 M parameters",
        "Judge edges and texture; the grey level of a patch is not predicted.",
        "Not probed: plane, because every slice is of class 'axial'.",
        "tensorboard --logdir=run/tensorboard",
        "On 2 CPU cores; the largest process took 1.2 GB of memory.",
        "not a medical image",
        "2.5 kB",
    ):
        assert sentence in text, sentence


def test_page_leads_with_the_first_finding(made) -> None:
    text = made[1]
    tiles = re.findall("<li><b>(.*?)</b><span>(.*?)</span></li>", text)
    # The score of kNN, which has the smallest log loss on the held-out cases, and its difference to the random encoder.
    assert tiles[0] == ("0.524", "AUROC [0.424, 0.604] for lesion, 12 test patients")
    assert tiles[1][1].endswith("against the same encoder untrained")
    assert text.index("What pretraining brought") < text.index("What the model fills in") < text.index("<h2>Loss</h2>")
    assert (
        "a knn probe on the frozen features tells lesion (no, yes) with an AUROC of 0.524 [0.424, 0.604]"
        in Page(text).text
    )


def test_controls_are_a_sentence_and_no_findings(study, tmp_path) -> None:
    output = tmp_path / "r.html"
    assert report.main([*words(study, output), "--control=lesion", "--about=Lesions & <regions>."]) == 0
    text = output.read_text(encoding="utf-8")
    # One shuffle alone says nothing of chance, so there is no sentence; with two there is.
    assert "Control:" not in text
    assert report.main([*words(study, output), "--control=lesion,region"]) == 0
    assert "Control: with the labels shuffled among the patients, the same probes" in output.read_text(encoding="utf-8")
    assert "<p>Lesions &amp; &lt;regions&gt;.</p>" in text
    assert "tells region" in text and "tells lesion" not in text and "for region, 12 test patients" in text


def test_page_shows_no_identifying_names(made, study) -> None:
    import pyarrow.parquet as pq

    text = made[1]
    assert "Jane" not in Page(text).tables.__repr__() + Page(text).text.replace(str(study), "")
    assert "--input FOLDER" in text
    index = pq.read_table(study / "shards/index.parquet")
    for column in ("patient", "series", "source"):
        assert not any(value in text for value in set(index[column].to_pylist()))


def test_page_without_scores_and_timeline_is_complete(study, tmp_path) -> None:
    (tmp_path / "none.json").write_text("[]")
    output = tmp_path / "plain.html"
    given = [f"--run={study / 'run'}", f"--shards={study / 'shards'}", f"--results={tmp_path / 'none.json'}"]
    assert report.main([*given, f"--output={output}"]) == 0
    page = Page(output.read_text(encoding="utf-8"))
    assert "No label of these shards could be probed." in page.text and len(page.images) == 4


def test_undefined_values_are_words(study, tmp_path) -> None:
    (score, *_) = scores("lesion")
    undefined = dataclasses.replace(score, head="ridge", value=None, low=None, high=None)
    (tmp_path / "rows.json").write_text(json.dumps(results.rows([score, undefined])))
    assert report.main(words(study, tmp_path / "r.html", results=tmp_path / "rows.json")) == 0
    cells = [cell for table in Page((tmp_path / "r.html").read_text()).tables for line in table for cell in line]
    assert "undefined [no interval]" in cells


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"weights": "nowhere"}, "error: --weights=nowhere is not a folder"),
        ({"timeline": "nowhere.json"}, "error: no file nowhere.json"),
        ({"output": "."}, "error: --output=. is a folder; name a file in it"),
        (
            {"run": "nowhere"},
            "error: no metrics.jsonl in nowhere; --run takes the work directory of curia_jax.pretrain",
        ),
        ({"results": "nowhere.json"}, "error: no file nowhere.json"),
        ({"shards": "nowhere"}, "error: no index.parquet in nowhere"),
    ],
)
def test_missing_input_is_one_line_and_exits_2(study, tmp_path, capsys, change: dict, line: str) -> None:
    assert report.main(words(study, **{"output": tmp_path / "r.html", **change})) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(line) and shown.count("\n") == 1


@pytest.mark.parametrize(("option", "text"), [("results", "[{"), ("results", "[{}]"), ("timeline", "[]")])
def test_damaged_input_is_named_and_exits_65(study, tmp_path, capsys, option: str, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    assert report.main(words(study, tmp_path / "r.html", **{option: tmp_path / "bad.json"})) == 65
    assert re.fullmatch("error: .*bad.json .*\n", capsys.readouterr().err)


def test_damaged_log_is_named_and_exits_65(study, tmp_path, capsys) -> None:
    shutil.copytree(study / "run", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert report.main(words(study, tmp_path / "r.html", run=tmp_path / "run")) == 65
    assert re.fullmatch("error: .*metrics.jsonl is damaged: none of its 1 lines .*\n", capsys.readouterr().err)
