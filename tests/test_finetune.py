"""The command as a user runs it, on small tasks in the published schema: its messages, files and exit codes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from curia_common.exit_codes import ExitCode
from curia_jax import checkpoint, examples, finetune, sharding, trained_model
from curia_jax.convert import __main__ as convert
from curia_jax.evaluate import results
from data_pipeline import build, phantom
from tests.conftest import use_one_device
from tests.evaluate import published
from tests.evaluate.test_command import save_checkpoint, write_exams

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "--config=tests/configs/finetune_tiny.py"
CLOCKS = {"time", "goodput", "images_per_second", "mfu", "data_stall_fraction", "save_stall_fraction"}
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run/, a pretraining run, and data/ with a task of two classes whose regions are brighter in one."""
    folder = tmp_path_factory.mktemp("finetune")
    save_checkpoint(folder / "run")
    published.write(folder / "data/ich", published.task(masked=True))
    return folder


def start(study: Path, workdir: Path, *words: str, start_from: str | None = "run") -> int:
    """The command in this process, in the folder of the project."""
    given = [CONFIG, f"--data={study / 'data'}", f"--workdir={workdir}", "--draws=50"]
    if not any(word.startswith("--task=") for word in words):
        given.append("--task=ich")
    if start_from is not None:
        given.append(f"--from={start_from if start_from == 'none' else study / start_from}")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        return finetune.main([*given, *words])
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def finished(study: Path) -> Path:
    """A run of 12 steps in 4 epochs that was not stopped."""
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        assert start(study, study / "finished") == 0
    return study / "finished"


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(workdir: Path) -> dict[int, dict[str, float]]:
    """Metrics that do not depend on clocks, by step."""
    rows = lines(workdir / "metrics.jsonl")
    return {row["step"]: {k: v for k, v in row.items() if k not in CLOCKS} for row in rows}


def validated(workdir: Path) -> dict[int, float]:
    return {
        row["step"]: row["validation_loss"] for row in lines(workdir / "events.jsonl") if row["event"] == "validated"
    }


def read(workdir: Path) -> list[dict[str, Any]]:
    return json.loads((workdir / "results.json").read_text())


def value(workdir: Path, metric: str, **wanted: Any) -> float:
    wanted = {"against": None} | wanted
    (found,) = [
        row["value"]
        for row in read(workdir)
        if row["metric"] == metric and row["backbone"] != "majority" and all(row[k] == v for k, v in wanted.items())
    ]
    return found


# ---- a run


@pytest.mark.long
def test_run_leaves_a_work_directory_and_results_in_the_form_of_the_suite(study: Path, finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "checkpoints", "metrics.jsonl", "events.jsonl", "tensorboard", "logs", "goodput.jsonl", "cache",
        "results.json", "results.csv", "selected.json", "test-predictions.parquet",
    }  # fmt: skip
    rows = read(finished)
    assert all(tuple(row)[: len(results.COLUMNS)] == results.COLUMNS for row in rows)
    assert {row["backbone"] for row in rows} == {f"{study}/run, full fine-tuning", "majority"}
    assert {row["head"] for row in rows} == {"fine-tuned (full)", "none"}
    row = next(row for row in rows if row["metric"] == "auroc")
    assert (row["task"], row["protocol"], row["n"], row["patients"], row["train_n"]) == ("ich", "ours", 12, 6, 24)
    assert (row["selection"], row["features"]) == ("validation split", "cls")
    assert row["low"] <= row["value"] <= row["high"]
    config = json.loads((finished / "config.json").read_text())
    assert config["head"]["names"] == ["0", "1"] and config["task"]["name"] == "ich"
    # The model is that of the run, not of the config file.
    assert config["model"]["mlp_width"] is None and config["augment"]["hu_window"] == [-1000, 1000]
    step, meta = checkpoint.latest(str(finished)) or pytest.fail("no checkpoint")
    assert (step, meta.examples_seen) == (12, 96)
    assert meta.origin is not None and (meta.origin.place, meta.origin.step) == (f"{study}/run", 7)


@pytest.mark.long
def test_weights_with_the_smallest_validation_loss_are_chosen(finished: Path) -> None:
    losses = validated(finished)
    assert list(losses) == [3, 6, 9, 12]  # after every epoch
    selected = json.loads((finished / "selected.json").read_text())
    best = min(losses, key=lambda step: losses[step])
    assert (selected["step"], selected["validation_loss"]) == (best, losses[best])
    (row, *_) = [row for row in read(finished) if row["backbone"] != "majority"]
    assert row["step"] == best and row["selection_loss"] == pytest.approx(losses[best])
    assert trained_model.load(finished).step == best
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == sorted({best, 12})


@pytest.mark.long
def test_stopped_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    study: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_devices, pulled = examples.to_devices, []

    def stopping(batch: Any, wanted: Any) -> Any:
        pulled.extend([None] * ("target" in wanted))
        if len(pulled) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return to_devices(batch, wanted)

    monkeypatch.setattr(examples, "to_devices", stopping)
    assert start(study, tmp_path / "run") == ExitCode.RESTART
    assert not (tmp_path / "run/selected.json").exists() and not (tmp_path / "run/results.json").exists()
    assert checkpoint.latest(str(tmp_path / "run"))[0] == 5  # type: ignore[index]
    assert start(study, tmp_path / "run", start_from=None) == 0
    assert metrics(tmp_path / "run") == metrics(finished) and validated(tmp_path / "run") == validated(finished)
    ours, theirs = (checkpoint.load(place, 12) for place in (tmp_path / "run", finished))
    for part in ("params", "average"):
        found, wanted = (sharding.paths(getattr(loaded, part)) for loaded in (ours, theirs))
        assert found.keys() == wanted.keys() and len(wanted) > 5
        for path, leaf in wanted.items():
            assert found[path].tobytes() == leaf.tobytes(), path
    for name in ("results.json", "selected.json"):
        assert (tmp_path / "run" / name).read_text() == (finished / name).read_text()


@pytest.mark.long
def test_finished_run_is_left_alone(
    study: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert start(study, tmp_path / "run", f"--json={tmp_path}/outcome.json") == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert "scored before; results are in" in capsys.readouterr().err
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["finished"], outcome["step"]) == (True, 12) and outcome["selected_step"] in validated(finished)


@pytest.mark.long
def test_run_that_was_killed_before_its_test_is_scored_the_next_time(
    study: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for name in ("results.json", "results.csv", "selected.json", "test-predictions.parquet"):
        (tmp_path / "run" / name).unlink()
    assert start(study, tmp_path / "run") == 0
    assert (tmp_path / "run/results.json").read_text() == (finished / "results.json").read_text()


@pytest.mark.long
def test_from_scratch_and_the_difference_to_it(study: Path, tmp_path: Path) -> None:
    assert start(study, tmp_path / "scratch", start_from="none") == 0
    assert checkpoint.load(tmp_path / "scratch").origin is None
    # An export starts a fine-tuning as its run does.
    words = [f"--checkpoint={study / 'run'}", f"--output={tmp_path / 'weights'}", "--layout=vit"]
    assert convert.main(words) == 0
    shutil.move(tmp_path / "weights", study / "weights")
    assert start(study, tmp_path / "run", f"--against={tmp_path / 'scratch'}", start_from="weights") == 0
    scratch = "from scratch, full fine-tuning"
    difference = value(tmp_path / "run", "accuracy", against=scratch)
    ours, theirs = value(tmp_path / "run", "accuracy"), value(tmp_path / "scratch", "accuracy")
    assert difference == pytest.approx(ours - theirs, abs=1e-12)
    assert {row["backbone"] for row in read(tmp_path / "scratch")} == {scratch, "majority"}


@pytest.mark.long
def test_fine_tuned_run_starts_another_from_the_weights_that_it_chose(
    study: Path, finished: Path, tmp_path: Path
) -> None:
    assert start(study, tmp_path / "run", "--config.duration=1 epoch", start_from="finished") == 0
    origin = checkpoint.load(tmp_path / "run").origin
    assert origin is not None and origin.step == json.loads((finished / "selected.json").read_text())["step"]
    assert origin.weights == trained_model.digest(trained_model.load(finished).params)


@pytest.mark.long
def test_longer_run_learns_what_the_image_shows(study: Path, tmp_path: Path) -> None:
    words = [
        "--config.duration=30 epochs",
        "--config.optimizer.base_learning_rate=0.3",
        "--config.finetune.average=0.5",
    ]
    words += ["--config.finetune.drop_path=0", "--config.finetune.pooling=mean", "--config.augment.crop_scale=(1,1)"]
    assert start(study, tmp_path / "run", *words) == 0
    assert value(tmp_path / "run", "auroc") == 1 and value(tmp_path / "run", "accuracy") > 0.9


# ---- every kind of target and of image

KINDS = {
    "kits": (["--config.finetune.pooling=mean"], "auroc"),
    "oasis": (["--config.finetune.head=attentive", "--config.finetune.slices=3"], "auroc"),
    "luna16-3D": (["--config.finetune.head=attentive"], "auroc"),
    "ixi": (["--config.finetune.train=lora"], "rmse"),
    "tcia-survival": (["--config.finetune.pooling=mean"], "c_index"),
    "covidx-ct": (["--config.finetune.train=head", "--config.finetune.sampling=balanced"], "auroc"),
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those tasks of the phantom of CuriaBench, of six test patients each."""
    folder = tmp_path_factory.mktemp("suite") / "data"
    words = ["--suite=curiabench", f"--tasks={','.join(KINDS)}", "--size=32", "--patients=6", f"--output={folder}"]
    assert phantom.main(words) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", KINDS)
def test_every_kind_of_task_is_learned_and_scored(study: Path, suite: Path, tmp_path: Path, task: str) -> None:
    words, metric = KINDS[task]
    words = [f"--data={suite}", f"--task={task}", "--config.duration=2 epochs", *words]
    assert start(study, tmp_path / "run", *words) == 0
    assert np.isfinite(value(tmp_path / "run", metric)) and len(validated(tmp_path / "run")) >= 2
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["task"]["slices"] == {"oasis": 3, "luna16-3D": 3}.get(task, 1)
    assert config["task"]["masked"] == (task in ("kits", "luna16-3D", "tcia-survival"))
    row = next(row for row in read(tmp_path / "run") if row["backbone"] != "majority")
    assert row["features"] == {"oasis": "tokens", "luna16-3D": "tokens", "kits": "mean", "tcia-survival": "mean"}.get(
        task, "cls"
    )
    assert row["patients"] >= 6 and row["n"] >= row["patients"]


@pytest.mark.slow
def test_several_labels_of_shards_are_learned_together(study: Path, tmp_path: Path) -> None:
    write_exams(tmp_path / "exams")
    table = tmp_path / "exams/labels.csv"
    rows = table.read_text().splitlines()
    kinds = ["kind", *(row[:2].lower() for row in rows[1:])]
    table.write_text("\n".join(f"{row},{kind}" for row, kind in zip(rows, kinds, strict=True)))
    words = ["--input", f"{tmp_path}/exams", "--output", f"{tmp_path}/shards", "--workers", "1", "--labels", f"{table}"]
    words += ["--label-columns", "shape", "kind", "--split-column", "split", "--patient-column", "patient"]
    assert build.main(words) == 0
    words = [f"--data={tmp_path}/shards", "--task=shards/shape+kind", "--cases=series", "--config.duration=2 epochs"]
    assert start(study, tmp_path / "run", *words, "--config.finetune.head=attentive") == 0
    found = {row["task"]: row for row in read(tmp_path / "run") if row["metric"] == "auroc" and row["against"] is None}
    assert found.keys() == {"shards/shape", "shards/kind"}
    for task, row in found.items():
        assert (row["unit"], row["n"], row["patients"]) == ("series", 12, 6), task
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["head"]["names"] == ["shape", "kind"] and config["task"]["slices"] == 3


# ---- several runs, several hosts


@pytest.mark.slow
def test_several_tasks_and_seeds_are_runs_of_their_own(study: Path, tmp_path: Path) -> None:
    rows = published.task()
    del rows["val"]
    published.write(study / "data/covidx-ct", rows)
    words = ["--task=ich,covidx-ct", "--seeds=0,1", "--config.duration=1 epoch", "--config.devices.platform=cpu"]
    words += ["--config.devices.cpu_count=1", f"--json={tmp_path}/rows.json"]
    assert start(study, tmp_path / "runs", *words) == ExitCode.DATA
    found = read(tmp_path / "runs")
    assert json.loads((tmp_path / "rows.json").read_text()) == found
    assert {row["seed"] for row in found if row["task"] == "ich"} == {0, 1}
    failed = [row for row in found if row["status"] == "failed"]
    assert {row["task"] for row in failed} == {"covidx-ct"} and "exit code 2 of" in failed[0]["reason"]
    losses = [lines(tmp_path / f"runs/ich/seed-{seed}/metrics.jsonl")[-1]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    assert not (tmp_path / "runs/covidx-ct").exists()
    assert {path.name.split("-")[0] for path in (tmp_path / "runs/cache").iterdir()} == {"ich"}


@pytest.mark.slow
def test_two_hosts_learn_and_score_like_one(study: Path, tmp_path: Path) -> None:
    words = [CONFIG, f"--data={study / 'data'}", "--task=ich", f"--from={study / 'run'}", "--draws=50"]
    words += ["--config.devices.platform=cpu", "--config.mesh.data=2", "--config.duration=2 epochs"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {
        "PYTHONPATH": str(ROOT)
    }

    def run(*more: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "curia_jax.finetune", *words, *more], cwd=ROOT, text=True, stderr=subprocess.PIPE,
            stdout=subprocess.PIPE, env=environment | variables,
        )  # fmt: skip

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    together = ["--config.devices.multihost=true", "--config.devices.cpu_count=1", f"--workdir={tmp_path}/hosts"]
    found = [
        run(*together, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(number)) for number in (0, 1)
    ]  # fmt: skip
    found.append(run("--config.devices.cpu_count=2", f"--workdir={tmp_path}/one"))
    for process in found:
        try:
            _, err = process.communicate(timeout=500)
        finally:
            process.kill()
        assert process.returncode == 0, err
    for step, wanted in metrics(tmp_path / "one").items():
        for name, one in wanted.items():
            assert metrics(tmp_path / "hosts")[step][name] == pytest.approx(one, rel=1e-5, abs=1e-7), (step, name)
    assert validated(tmp_path / "hosts") == pytest.approx(validated(tmp_path / "one"), rel=1e-5)
    for metric in ("auroc", "accuracy"):
        assert value(tmp_path / "hosts", metric) == pytest.approx(value(tmp_path / "one", metric), abs=1e-6)


# ---- wrong usage, wrong data


@pytest.mark.parametrize(
    ("words", "start_from", "code", "message"),
    [
        (["--task=ihc"], "run", 2, "error: no task 'ihc'; --list shows those of CuriaBench"),
        (["--task=oasis"], "run", 2, "has no data of oasis; get it from: Hugging Face"),
        ([], None, 2, "error: the following arguments are required: --from; a run, checkpoint or export, or none"),
        ([], "data", 2, "error: no finished checkpoint in "),
        (["--seeds=one"], "run", 2, "error: --seeds=one: write whole numbers of at least 0 with commas"),
        (
            ["--config.finetune.pooling=max"],
            "run",
            2,
            "error: finetune.pooling is 'max'; it has to be cls, mean or cls_mean",
        ),
        (["--config.batch_size=0"], "run", 2, "error: batch_size is 0; it has to be a whole number of at least 1"),
        (["--against=nowhere"], "run", 2, "error: nowhere has no results.json and test-predictions.parquet"),
    ],
)
def test_wrong_usage_is_one_line_and_creates_nothing(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], start_from: str | None, code: int, message: str
) -> None:  # fmt: skip
    assert start(study, tmp_path / "run", *words, start_from=start_from) == code
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and not (tmp_path / "run").exists()


def test_only_published_tasks_need_a_cache_beside_a_bucket(
    study: Path, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([f"--workdir={bucket}"], [f"--workdir={bucket}", "--seeds=0,1"]):
        assert start(study, tmp_path / "run", *words) == ExitCode.USAGE, words
        assert (
            "is a bucket; name a folder on this machine for the decoded images of ich in --cache"
            in capsys.readouterr().err
        )
    write_exams(tmp_path / "exams")
    words = ["--input", f"{tmp_path}/exams", "--output", f"{tmp_path}/shards", "--workers", "1"]
    words += ["--labels", f"{tmp_path}/exams/labels.csv", "--label-columns", "shape", "--split-column", "split"]
    assert build.main([*words, "--patient-column", "patient"]) == 0
    words = [f"--data={tmp_path}/shards", "--task=shards/shape", f"--workdir={bucket}"]
    assert start(study, tmp_path / "run", *words, start_from="no-run") == ExitCode.USAGE  # the next thing that is wrong
    assert "no-run" in capsys.readouterr().err


def test_batch_that_does_not_divide_is_refused_before_anything_is_made(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from curia_jax import sharding as module

    monkeypatch.setattr(module, "make_mesh", lambda **sizes: jax.make_mesh((1, 8, 1), module.AXES))
    assert start(study, tmp_path / "run", "--config.batch_size=12") == 2
    assert "batch_size 12 does not divide over 8 devices" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def masks_missing(rows: dict[str, list[dict[str, Any]]]) -> None:
    rows["train"][3]["mask"] = None


def empty_bag(rows: dict[str, list[dict[str, Any]]]) -> None:
    rows["test"][2]["image"] = np.zeros((24, 24, 0), np.float32)


def no_validation(rows: dict[str, list[dict[str, Any]]]) -> None:
    del rows["val"]


def one_class(rows: dict[str, list[dict[str, Any]]]) -> None:
    for own in rows.values():
        for row in own:
            row["target"] = 0


@pytest.mark.parametrize(
    ("task", "changes", "change", "code", "message"),
    [
        (
            "kits",
            {"masked": True},
            masks_missing,
            65,
            "kits: row 3 of train has no mask, and the task is about what is inside",
        ),
        ("oasis", {"slices": 2}, empty_bag, 65, "oasis: row 2 of test has a volume without a slice"),
        ("ich", {}, no_validation, 2, "ich has no validation split, on which the weights are chosen"),
        ("ich", {}, one_class, 2, "ich cannot be scored: every labelled slice of the test split is of class '0'"),
    ],
)
def test_data_that_cannot_be_learned_is_one_line_before_training(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, changes: dict[str, Any],
    change: Callable[[Any], None], code: int, message: str,
) -> None:  # fmt: skip
    rows = published.task(**changes)
    change(rows)
    published.write(tmp_path / "data" / task, rows)
    words = [f"--data={tmp_path / 'data'}", f"--task={task}", "--config.finetune.pooling=mean"]
    assert start(study, tmp_path / "run", *words) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "run/checkpoints").exists()
    # Whole decoded splits may stay for the next try, of the one with the fault nothing.
    folders = {path.parent.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert all(name.startswith((f"{task}-train-", f"{task}-validation-")) for name in folders)


@pytest.mark.long
def test_resume_with_another_head_or_other_classes_is_refused(
    study: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    assert start(study, tmp_path / "run", "--config.finetune.pooling=cls_mean") == 2
    assert "finetune.pooling is cls_mean, but the head of the checkpoint is cls" in capsys.readouterr().err
    rows = published.task(masked=True)
    for own in rows.values():
        for number, row in enumerate(own):
            row["target"] = number % 3
            row["patient"] = f"{id(own)} {number}"
    published.write(tmp_path / "data/ich", rows)
    assert start(study, tmp_path / "run", f"--data={tmp_path / 'data'}") == 65
    assert "ich has the outputs 0, 1, 2, but the checkpoint was trained for 0, 1" in capsys.readouterr().err
    published.write(tmp_path / "data/ich", published.task(masked=True, seed=9))
    assert start(study, tmp_path / "run", f"--data={tmp_path / 'data'}") == 65
    assert "is not the dataset that the checkpoint of example 96 was trained on" in capsys.readouterr().err


def test_help_names_options_files_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("--from", "--task", "--seeds", "--against", "selected.json", "results.json", "65  ", "examples:"):
        assert word in text


def test_fields_have_the_group_finetune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert finetune.main([CONFIG, "--fields"]) == 0
    assert "finetune.train = 'full'" in capsys.readouterr().out.splitlines()
    assert finetune.main(["--config=tests/configs/tiny.py", "--task=ich", "--data=x", "--workdir=y"]) == 2
    assert "has no group finetune; start from configs/finetune_vit.py" in capsys.readouterr().err
