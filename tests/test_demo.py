"""The demo's stages, with fake commands; the real ones run in the slow test at the end."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from curia_jax import demo
from curia_jax.evaluate import results, scoring
from curia_jax.evaluate.labels import Labelled, Task
from curia_jax.report import findings
from data_pipeline import synthetic_exams
from tests.scores import make_score

# Writes what the real command would write, and logs the call.
FAKE_COMMAND = r"""
import json, os, signal, sys, time
from pathlib import Path

module, words = sys.argv[1], sys.argv[2:]
options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
with Path("calls.txt").open("a") as calls:
    calls.write(module + "\n")
if os.environ.get("FAIL") == module:
    print("error: no usable file in the folder", file=sys.stderr)
    sys.exit(int(os.environ["CODE"]))

def log(name, **fields):
    with (run / name).open("a") as file:
        file.write(json.dumps({**fields, "time": time.time()}) + "\n")

if module == "curia_jax.pretrain":
    run = Path(options["workdir"])
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text('{"batch_size": 8}')
    saved = run / "saved"
    step = start = int(saved.read_text()) if saved.exists() else 0
    skip = int(os.environ.get("SKIP", "0")) if start else 0
    name = "resumed" if start else "started"
    log("events.jsonl", event=name, step=step, examples_seen=8 * (step + skip), total_steps=40)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    while step < 40 and not asked:
        step += 1
        log("metrics.jsonl", step=step, examples_seen=8 * (step + skip))
        time.sleep(0.03)
    saved.write_text(str(step))
    log("events.jsonl", event="finished" if step == 40 else "preempted", step=step, examples_seen=8 * (step + skip))
    sys.exit(0 if step == 40 else 75)
if module == "data_pipeline.build":
    import pyarrow as pa, pyarrow.parquet as pq
    rows = [
        {"split": s, "patient": f"{s}{n}", "series": f"{s}{n}", "modality": "CT", "plane": p, "body_part": "unknown"}
        for s in os.environ.get("SPLITS", "train,validation,test").split(",") for n in range(3) for p in ("axial", "coronal")
    ]
    if os.environ.get("LABELS") != "none":
        rows = [{**row, "label_lesion": row["plane"]} for row in rows]
    else:
        rows = [{**row, "plane": "axial"} for row in rows]
    Path(options["output"]).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), Path(options["output"]) / "index.parquet")
elif module == "curia_jax.evaluate":
    Path(options["output"]).mkdir()
    Path(options["output"], "results.json").write_text(os.environ["ROWS"])
elif module == "curia_jax.report":
    output = Path(options["output"])
    assert json.loads(Path(options["timeline"]).read_text())["next"]
    output.write_text("<html>")
    output.with_name("report_pictures").mkdir(exist_ok=True)
else:
    output = Path(options["output"])
    output.mkdir(parents=True, exist_ok=True)
    if module == "data_pipeline.phantom":
        (output / "labels.csv").write_text("file,patient,situs\\ndicom/a/0.dcm,a,solitus\\n")
"""

# Children are started in other folders and have to find the code under test.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(demo.__file__).parents[1])}
ROWS = json.dumps(results.rows([make_score("lesion", head="knn")]))

PHANTOM_CALLS = [
    "data_pipeline.phantom", "data_pipeline.build", "curia_jax.pretrain", "curia_jax.pretrain",
    *["curia_jax.convert"] * 4, "curia_jax.evaluate", "curia_jax.report",
]  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working directory in which `python -m x …` runs the fake of x."""
    monkeypatch.setenv("ROWS", ROWS)
    script = tmp_path / "fake_command.py"
    script.write_text(FAKE_COMMAND)
    here = types.SimpleNamespace(
        Popen=lambda words, env: subprocess.Popen([sys.executable, str(script), words[2], *words[3:]], env=env)
    )
    monkeypatch.setattr(demo, "subprocess", here)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "demo/run/events.jsonl").read_text().splitlines()]


def test_every_command_runs_and_training_is_interrupted(workplace, capfd) -> None:
    assert demo.main([]) == 0
    assert calls(workplace) == PHANTOM_CALLS
    _, preempted, resumed, finished = events(workplace)
    assert preempted["event"] == "preempted" and 20 <= preempted["step"] < 40
    assert resumed["examples_seen"] == preempted["examples_seen"] and finished["step"] == 40
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "[1/7] synthetic exams" in shown.err and "[7/7] report" in shown.err
    assert "$ python -m curia_jax.pretrain --config=" in shown.err
    assert f"interrupted after {preempted['examples_seen']:,} examples, resumed with the very next one" in shown.err
    assert "report: demo/report.html" in shown.err
    assert shown.err.rstrip().splitlines()[-2].strip() == "tensorboard --logdir=demo/run/tensorboard"
    assert {path.name for path in (workplace / "demo").iterdir()} == {
        "phantom", "labels.csv", "shards.key", "shards", "run", "weights", "results", "report.html",
        "report_pictures", "demo.json",
    }  # fmt: skip


def test_finished_demo_runs_nothing_again(workplace, capfd) -> None:
    demo.main([])
    calls(workplace)
    assert demo.main([]) == 0
    assert calls(workplace) == []
    assert "[2/7] exams to slice shards: done before" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("lost", "again"),
    [
        ("results", ["curia_jax.evaluate", "curia_jax.report"]),
        ("report.html", ["curia_jax.report"]),
        ("weights", PHANTOM_CALLS[4:]),
    ],
)
def test_removed_output_reruns_its_stage_and_later_ones(workplace, lost: str, again: list[str]) -> None:
    demo.main([])
    calls(workplace)
    path = workplace / "demo" / lost
    path.rename(workplace / "elsewhere")
    assert demo.main([]) == 0
    assert calls(workplace) == again
    assert path.exists()


def test_changed_inputs_rerun_affected_stages(workplace) -> None:
    demo.main([])
    calls(workplace)
    assert demo.main(["--config.batch_size=16"]) == 0
    assert calls(workplace) == PHANTOM_CALLS[2:]
    exams = workplace / "exams"
    exams.mkdir()
    (exams / "a.dcm").write_bytes(b"first")
    assert demo.main(["--data=exams"]) == 0
    assert calls(workplace) == PHANTOM_CALLS[1:]
    (exams / "b.dcm").write_bytes(b"second")
    assert demo.main(["--data=exams"]) == 0
    assert calls(workplace) == PHANTOM_CALLS[1:]


def test_fresh_reruns_every_stage(workplace) -> None:
    demo.main([])
    calls(workplace)
    assert demo.main(["--fresh"]) == 0
    assert calls(workplace) == PHANTOM_CALLS
    assert [event["event"] for event in events(workplace)] == ["started", "preempted", "resumed", "finished"]


@pytest.mark.parametrize("code", [1, 65, 75])
def test_failed_stage_gives_exit_code_and_is_resumed(workplace, monkeypatch, capfd, code: int) -> None:
    monkeypatch.setenv("FAIL", "curia_jax.convert")
    monkeypatch.setenv("CODE", str(code))
    assert demo.main([]) == code
    assert f"exit code {code} from: python -m curia_jax.convert" in capfd.readouterr().err
    calls(workplace)
    monkeypatch.delenv("FAIL")
    assert demo.main([]) == 0
    assert calls(workplace) == PHANTOM_CALLS[4:]


def test_bad_input_is_one_line_and_exits_2(workplace, monkeypatch, capfd) -> None:
    assert demo.main(["--data=missing"]) == 2
    assert capfd.readouterr().err == "error: --data=missing does not exist; name a folder of DICOM or NIfTI files\n"
    (workplace / "file").write_text("")
    assert demo.main(["--data=file"]) == 2
    assert "--data=file is a file" in capfd.readouterr().err
    # The build names the fault; the demo adds no error of its own.
    monkeypatch.setenv("FAIL", "data_pipeline.build")
    monkeypatch.setenv("CODE", "2")
    (workplace / "empty").mkdir()
    assert demo.main(["--data=empty"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "rror" in line]
    assert errors == ["error: no usable file in the folder"]


def test_foreign_output_folder_is_refused(workplace, capfd) -> None:
    (workplace / "mine" / "shards").mkdir(parents=True)
    assert demo.main(["--output=mine", "--fresh"]) == 2
    assert "mine/shards exists, but was not made by this command" in capfd.readouterr().err
    assert (workplace / "mine" / "shards").exists()


def test_demo_continues_where_nothing_can_be_probed(workplace, monkeypatch, capfd) -> None:
    monkeypatch.setenv("LABELS", "none")
    (workplace / "exams").mkdir()
    assert demo.main(["--data=exams"]) == 0
    assert "curia_jax.evaluate" not in calls(workplace)
    assert json.loads((workplace / "demo/results/results.json").read_text()) == []
    record = json.loads((workplace / "demo/demo.json").read_text())
    assert "of class 'CT'" in record["not_probed"]["modality"]
    assert "not probed: plane: every labelled slice of the test split is of class 'axial'" in capfd.readouterr().err


def test_patients_without_train_split_are_all_trained_on(workplace, monkeypatch, capfd) -> None:
    (workplace / "exams").mkdir()
    monkeypatch.setenv("SPLITS", "test,validation")
    assert demo.main(["--data=exams"]) == 0
    assert "--config.data.split=test+validation" in capfd.readouterr().err


def test_examples_skipped_on_resume_are_an_error(workplace, monkeypatch, capfd) -> None:
    monkeypatch.setenv("SKIP", "1")
    assert demo.main([]) == 1
    assert "error: the run's log says" in capfd.readouterr().err


def test_check_resumed_compares_log_with_expected_order() -> None:
    stop = demo.LogLine(3, 12, 1.0, "preempted")
    resume = demo.LogLine(3, 12, 2.0, "resumed")
    lines = [demo.LogLine(n, 4 * n) for n in (1, 3, 4, 6)]
    assert "resumed with the very next one (step 4 ends at 16)" in demo.check_resumed([stop, resume], lines, 4)
    assert demo.check_resumed([], lines, 4) == "the run was never interrupted"
    with pytest.raises(demo.ResumeError, match="stopped after 12 examples, but resumed after 16"):
        demo.check_resumed([stop, demo.LogLine(3, 16, 2.0, "resumed")], lines, 4)
    with pytest.raises(demo.ResumeError, match="no step after that"):
        demo.check_resumed([stop, resume], lines[:2], 4)
    with pytest.raises(demo.ResumeError, match="says 16 examples at step 4, but 5 a step make 20"):
        demo.check_resumed([stop, resume], [demo.LogLine(4, 16)], 5)


def test_sigterm_is_passed_on_and_demo_resumes(workplace) -> None:
    """The demo runs in a process of its own and is stopped in its second training stage."""
    script = str(workplace.parent / "fake_command.py")
    program = (
        "import subprocess, sys; from curia_jax import demo; real = subprocess.Popen; "
        f"subprocess.Popen = lambda words, env: real([sys.executable, {script!r}, words[2], *words[3:]], env=env); "
        "sys.exit(demo.main([]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    log = workplace / "demo/run/events.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and "resumed" in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err.rstrip().endswith("rerun the same command to resume")
    assert events(workplace)[-1]["event"] == "preempted"
    calls(workplace)
    assert demo.main([]) == 0
    assert calls(workplace) == PHANTOM_CALLS[3:]
    assert events(workplace)[-1]["step"] == 40


def test_help_has_examples(capsys) -> None:
    assert demo.main(["--help"]) == 0
    assert "python -m curia_jax.demo --data=/path/to/exams --output=mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--dta=x", "unrecognized arguments: --dta=x"),
        ("--patients=0", "error: --patients is 0; it has to be at least 1"),
        ("--workers=0", "error: --workers is 0; it has to be at least 1"),
        ("--config.model.widht=64", "error: no config field 'model.widht'"),
        ("--output=file", "error: --output=file is a file; name a folder"),
    ],
)
def test_wrong_option_exits_2_before_anything_runs(workplace, capfd, word: str, message: str) -> None:
    (workplace / "file").write_text("")
    assert demo.main([word]) == 2
    assert message in capfd.readouterr().err
    assert [path.name for path in workplace.iterdir()] == ["file"]


# ---- the task of the phantom


def test_divide_shuffles_labels_within_each_split() -> None:
    labels = {f"p{n}": "inversus" if n % 3 else "solitus" for n in range(240)}
    divided = demo.divide(labels)
    assert list(divided) == list(labels)
    for split, count in (("test", 72), ("train", 48)):
        part = {name: one for name, one in divided.items() if one.split == split and one.label}
        assert len(part) == count
        assert all(one.label == labels[name] for name, one in part.items())
        true = [one.label for one in part.values()]
        shuffles = list(zip(*(one.shuffled for one in part.values()), strict=True))
        assert len(set(shuffles)) == len(demo.CONTROLS)
        assert all(Counter(true) == Counter(shuffled) and true != list(shuffled) for shuffled in shuffles)
    rest = [one for one in divided.values() if not one.label]
    assert rest == [demo.Divided("train", "", ("",) * len(demo.CONTROLS))] * 120


@functools.cache
def patients() -> list[synthetic_exams.Volume]:
    return [synthetic_exams.make(0, n, "abdomen", "CT", size=32, slices=4, varied=True) for n in range(240)]


def scored_on_pixels(shuffle: int | None = None) -> dict[str, results.Score]:
    """AUROC on the pixels of 240 small phantom patients in the demo's task, or in one of its shuffles."""
    made = patients()
    divided = list(demo.divide({str(n): volume.situs for n, volume in enumerate(made)}).values())
    splits, features = {}, {}
    for split in ("train", "validation", "test"):
        chosen = [n for n, one in enumerate(divided) if one.split == split and one.label]
        slices = [(n, values) for n in chosen for values in made[n].values]
        names = [divided[n].label if shuffle is None else divided[n].shuffled[shuffle] for n, _ in slices]
        who = np.array([str(n) for n, _ in slices], np.str_)
        splits[split] = Labelled(np.arange(len(slices)), np.array(names, np.str_), who, who)
        if slices:
            pixels = np.stack([values.clip(-200, 300).ravel() for _, values in slices])
            features[split] = {"pixels": {"all": pixels}, "histogram": {"all": np.sort(pixels, axis=1)}}
    task = Task("situs", ("inversus", "solitus"), (), splits)
    scores = scoring.score(task, features, heads=("ridge",), draws=500 if shuffle is None else 10)[0]
    return {score.backbone: score for score in scores if score.metric == "auroc"}


def interval(score: results.Score) -> tuple[float, float]:
    assert score.low is not None and score.high is not None
    return score.low, score.high


def test_pixels_but_not_brightness_tell_the_situs() -> None:
    auroc = scored_on_pixels()
    assert auroc["pixels"].study.patients == 72
    low, _ = interval(auroc["pixels"])
    assert low > 0.5
    # The same pixels without their places.
    low, high = interval(auroc["histogram"])
    assert low < 0.5 < high


def test_pixels_score_shuffled_situs_at_chance() -> None:
    values = [scored_on_pixels(n)["pixels"].value for n in range(len(demo.CONTROLS))]
    # 48 labelled patients: one shuffle scatters by about 0.08, the mean of eight by 0.03.
    assert 0.4 < np.mean(values) < 0.6


class Images(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.sources.append(dict(attrs)["src"] or "")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_whole_demo(tmp_path) -> None:
    words = [sys.executable, "-m", "curia_jax.demo", f"--output={tmp_path / 'demo'}"]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "demo"
    for layout in demo.LAYOUTS:
        assert (folder / "weights" / layout / "model.safetensors").is_file()
    assert "resumed with the very next one" in done.stderr
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.3 * lines[-1]["baseline_loss"]

    scores = [score for score in results.read(folder / "results/results.json") if score.metric == "auroc"]
    assert {score.backbone for score in scores} == {str(folder / "run"), "random", "pixels", "histogram", "majority"}
    situs = [score for score in scores if score.study.title == demo.TASK and score.backbone != "majority"]
    assert situs[0].study.patients >= 40
    # The probe that the training patients choose is better than without pretraining, and than pixels, which beat chance.
    finding = findings.find(scores)[results.SHARDS + demo.TASK]
    assert {score.against for score in finding.differences} == {"random", "pixels", "histogram"}
    assert all(interval(score)[0] > 0 for score in finding.differences)
    assert all(interval(score)[0] > 0.6 for score in situs if score.against is None and score.backbone == "pixels")

    page = (folder / "report.html").read_text()
    assert "better than the same encoder untrained" in page
    assert "over 8 shuffles; the intervals of these means (95 % for all together) contain 0.5, chance" in page
    parser = Images()
    parser.feed(page)
    assert len(parser.sources) >= 5 and all(source.startswith("data:image/png;base64,") for source in parser.sources)
