"""The official protocol on small tasks: which features each head gets, and what the command writes."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from curia_common.errors import UserError
from curia_jax import augment
from curia_jax.evaluate import __main__ as evaluate
from curia_jax.evaluate import backbones, official, official_protocol, task_data, tasks
from curia_jax.evaluate.official_protocol import ATTENTION, LINEAR
from curia_jax.evaluate.picture_store import PictureStore, open_store
from curia_jax.evaluate.pictures import TaskPictures
from curia_jax.evaluate.targets import Classes
from curia_jax.evaluate.tasks import Official, Task
from curia_jax.models import vit
from tests.evaluate import published
from tests.evaluate.test_command import save_checkpoint

IMAGE = Task("ich", "", "", "", "", tasks.CT, tasks.IMAGE, classes=2, official=Official(LINEAR, 8, 0.5, batch=8))
MASKED = dataclasses.replace(IMAGE, form=tasks.MASKED_IMAGE)
VOLUME = dataclasses.replace(IMAGE, form=tasks.VOLUME)
LISTS = dataclasses.replace(
    IMAGE, form=tasks.MASKED_VOLUME, slices=3, official=Official(ATTENTION, 4, 0.5, batch=8, cached=True)
)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder with run/ and data/."""
    folder = tmp_path_factory.mktemp("official")
    save_checkpoint(folder / "run")
    published.write(folder / "data" / "ich", published.task())
    published.write(folder / "data" / "kits", published.task(masked=True, series_id=None))
    published.write(folder / "data" / "luna16-3D", published.task(slices=4, masked=True, seed=2))
    published.write(folder / "data" / "oasis", published.task(slices=4, seed=3))
    return folder


@pytest.fixture(scope="module")
def models(study) -> list[backbones.JaxBackbone]:
    return backbones.open_backbones([str(study / "run")], ["pixels"], readouts=official_protocol.READOUTS)


def opened(study: Path, name: str, task: Task) -> dict[str, PictureStore]:
    files = task_data.find(study / "data", name)
    assert files is not None
    return {split: open_store(TaskPictures(task, files, split), study / "decoded") for split in ("train", "test")}


def encoded(study: Path, images: PictureStore):
    """Tokens before and after the final norm, and the patches inside, of all slices at once; called directly."""
    from curia_jax import trained_model

    model = trained_model.load(study / "run")
    (batch,) = images.batches(images.numbers, len(images.numbers))
    on_device = {name: jnp.asarray(value) for name, value in batch.items() if name != "slice"}
    encoder = vit.bind(model.config.encoder, model.params["encoder"])
    view = augment.evaluation_view(on_device, model.augment, model.config.encoder.image_size)
    after, hidden = encoder.encode(encoder.embed(view), [model.config.encoder.depth - 1])
    inside = np.ones((len(after), 4), bool)
    if "mask" in batch:
        inside = np.asarray(augment.patches_inside(on_device["mask"], on_device["extent"], (2, 2)))
    return np.asarray(hidden[0]), np.asarray(after), inside


@pytest.mark.parametrize(("name", "task", "readout"), [("ich", IMAGE, "cls"), ("kits", MASKED, "mean")])
def test_image_gives_cls_and_masked_image_the_mean_inside(study, models, tmp_path, name, task, readout) -> None:
    images = opened(study, name, task)
    rows, names = official_protocol.feature_rows(task, task.official, images, models, tmp_path, 16)
    _, after, inside = encoded(study, images["test"])
    wanted = after[:, 0]
    if readout == "mean":
        wanted = (after[:, 1:] * inside[:, :, None]).sum(axis=1) / inside.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(rows["test"][str(study / "run")], wanted, atol=2e-5)
    assert names == {str(study / "run"): readout, "pixels": "32x32 px"}


@pytest.mark.parametrize(
    ("batch", "cached", "readout"), [(8, True, "mean@prenorm"), (3, True, "mean"), (3, False, "mean@prenorm")]
)
def test_volume_is_read_after_the_norm_only_where_cached_and_longer_than_a_batch(
    study, models, tmp_path, batch: int, cached: bool, readout: str
) -> None:
    task = dataclasses.replace(VOLUME, official=Official(LINEAR, 1, 0.5, batch=batch, cached=cached))
    images = opened(study, "oasis", task)  # of four slices
    rows, names = official_protocol.feature_rows(task, task.official, images, models, tmp_path, 16)
    before, after, _ = encoded(study, images["train"])
    wanted = (before if readout == "mean@prenorm" else after)[:, 1:].reshape(24, 16, -1).mean(axis=1)
    np.testing.assert_allclose(rows["train"][str(study / "run")], wanted, atol=2e-5)
    assert names[str(study / "run")] == readout


def test_lists_are_the_patches_inside_with_an_embedding_of_the_slice(study, models, tmp_path) -> None:
    images = opened(study, "luna16-3D", LISTS)
    lists, names = official_protocol.token_lists(LISTS, LISTS.official, images, models, tmp_path, 16)
    before, _, inside = encoded(study, images["test"])
    found = lists["test"][str(study / "run")]
    embedding = official.slice_embedding(3, before.shape[2])
    for case in range(12):
        slices = range(3 * case, 3 * case + 3)
        wanted = np.concatenate([(before[s, 1:] + embedding[n])[inside[s]] for n, s in enumerate(slices)])
        values, _ = found.padded(np.array([case]), len(wanted))
        np.testing.assert_allclose(values[0], wanted, atol=2e-5)
        assert found.lengths[case] == len(wanted)
    assert names == {str(study / "run"): "tokens@prenorm", "pixels": "tokens@prenorm"}
    # What has no patches has one token for each slice.
    assert lists["test"]["pixels"].lengths.tolist() == [3] * 12 and lists["test"]["pixels"].width == 1024


def test_volume_with_masks_and_linear_head_has_no_rule(study, models, tmp_path) -> None:
    task = dataclasses.replace(LISTS, official=IMAGE.official)
    images = opened(study, "luna16-3D", task)
    with pytest.raises(UserError, match="no linear head for volumes with masks"):
        official_protocol.feature_rows(task, task.official, images, models, tmp_path, 16)


def test_every_task_has_settings_or_a_reason() -> None:
    without = {task.name for task in tasks.CURIABENCH if official_protocol.obstacle(task)}
    assert without == {"anatomy-cross-modality", "registration", "tcia-survival"}


@pytest.mark.long
def test_both_protocols_are_rows_and_tables_of_their_own(study, tmp_path) -> None:
    words = ["--suite=curiabench", f"--data={study / 'data'}", f"--backbones={study / 'run'}", f"--output={tmp_path}"]
    assert evaluate.main([*words, "--protocol=both", "--floors=pixels", "--heads=ridge", "--features=mean"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    done = [row for row in rows if row["status"] == "ok"]
    assert {(row["task"], row["protocol"]) for row in done} == {
        (task, protocol) for task in ("ich", "kits", "luna16-3D", "oasis") for protocol in ("ours", "official")
    }
    theirs = [row for row in done if row["protocol"] == "official"]
    assert {(row["task"], row["head"]) for row in theirs if row["backbone"] != "majority"} == {
        ("ich", "linear"), ("kits", "linear"), ("luna16-3D", "attention"), ("oasis", "linear"),
    }  # fmt: skip
    assert {row["metric"] for row in theirs} == {"accuracy", "auroc"} and {row["labels"] for row in theirs} == {"100 %"}
    # The heads learn from the training split alone, and every row counts by itself.
    assert {(row["train_n"], row["n"], row["unit"]) for row in theirs} == {(24, 12, "slice")}
    assert {row["train_n"] for row in done if row["protocol"] == "ours"} == {36}
    # Features that only the official protocol asks for are not offered to heads of the other.
    ours = {row["features"] for row in done if row["protocol"] == "ours" and row["backbone"] == str(study / "run")}
    assert ours == {"mean"}
    reasons = {
        row["task"]: row["reason"] for row in rows if (row["protocol"], row["status"]) == ("official", "not_run")
    }
    assert "not released" in reasons["tcia-survival"] and "dense features" in reasons["registration"]
    latex = (tmp_path / "table.tex").read_text()
    assert latex.count("\\begin{tabular}") == 2 and latex.index("protocol ours") < latex.index("protocol official")
    page = (tmp_path / "report.html").read_text()
    assert "All tasks, protocol ours" in page and "All tasks, protocol official" in page

    # The predictions are those of the head on CLS of the training split.
    task = next(task for task in tasks.CURIABENCH if task.name == "ich")
    images = opened(study, "ich", task)
    (_, train, _), (_, test, _) = (encoded(study, images[split]) for split in ("train", "test"))
    assert task.official is not None
    schedule = official.Schedule(task.official.epochs, task.official.base_rate, task.official.batch)
    wanted = official.linear(train[:, 0], Classes(np.arange(24) // 2 % 2, 2), test[:, 0], schedule, seed=0)
    table = pq.read_table(tmp_path / "ich" / "official-predictions.parquet").to_pylist()
    found = np.array([row["scores"] for row in table if row["backbone"] == str(study / "run")])
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--tasks=shards/a"], "error: --tasks=shards/a has no place in the official protocol; use --protocol=ours"),
        (["--tasks=ich", "--image-sizes=32"], "error: --image-sizes=32 has no place in the official protocol"),
    ],
)
def test_what_the_protocol_does_not_know_is_refused(study, tmp_path, capsys, words: list[str], line: str) -> None:
    paths = [f"--data={study / 'data'}", f"--backbones={study / 'run'}", f"--output={tmp_path}"]
    assert evaluate.main([*paths, *words, "--protocol=official"]) == 2
    assert capsys.readouterr().err.startswith(line)
