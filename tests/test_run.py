"""Preparation of runs: which dataset and checkpoint a run continues, and which work directories it refuses."""

import shutil
import signal
from pathlib import Path

import pytest

from curia_common.errors import DataError, UserError
from curia_jax import checkpoint, run, trainer, training
from curia_jax.mixture import Mixture
from data_pipeline.format.shards import SliceSource
from tests.runs import expected_slices, first_slices, losses, prepare, save_meta, train

pytestmark = pytest.mark.usefixtures("one_device")


# ---- the dataset of a checkpoint


def test_new_run_saves_the_identity_of_its_dataset(tiny_shards: Path, tmp_path: Path) -> None:
    meta = prepare(tmp_path / "run", tiny_shards).meta(32)
    assert meta.dataset == (SliceSource(tiny_shards, "train").fingerprint, 0, 48, "train")
    assert (meta.examples_seen, meta.dataset_start) == (32, 0)


def test_resume_on_the_same_dataset_continues_its_epoch(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_meta(tmp_path / "run", prepare(tmp_path / "run", tiny_shards).meta(32))
    this = prepare(tmp_path / "run", shutil.copytree(tiny_shards, tmp_path / "moved"))  # elsewhere, but the same
    assert this.schedule == training.Schedule(2, 6, batch_size=16, examples_seen=32)
    assert list(this.changes) == ["data.shards"]
    assert first_slices(this, monkeypatch) == expected_slices(this.examples.source, 32)


def test_resume_rejects_grown_dataset_and_names_both_choices(tiny_shards: Path, grown: Path, tmp_path: Path) -> None:
    save_meta(tmp_path / "run", prepare(tmp_path / "run", tiny_shards).meta(32))
    with pytest.raises(DataError) as error:
        prepare(tmp_path / "run", grown)
    assert error.value.exit_code == 65
    assert str(error.value) == (
        f"{grown} is not the dataset that the checkpoint of example 32 was trained on: slices 48 -> 96, additions 0 -> 1; "
        "--config.data.additions=0 trains on the same slices as before; --config.data.on_change=new_epoch starts a new epoch on "
        "the dataset as it is now"
    )


def test_resume_with_additions_trains_on_the_slices_of_then(
    tiny_shards: Path, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_meta(tmp_path / "run", prepare(tmp_path / "run", tiny_shards).meta(32))
    this = prepare(tmp_path / "run", grown, "--config.data.additions=0")
    assert len(this.examples.source) == 48 and this.examples.start == 0
    assert first_slices(this, monkeypatch) == expected_slices(SliceSource(tiny_shards, "train"), 32)


def test_resume_with_new_epoch_counts_from_there(
    tiny_shards: Path, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_meta(tmp_path / "run", prepare(tmp_path / "run", tiny_shards).meta(32))
    this = prepare(tmp_path / "run", grown, "--config.data.on_change=new_epoch")
    assert (len(this.examples.source), this.schedule.examples_seen, this.examples.start) == (96, 32, 32)
    save_meta(tmp_path / "run", this.meta(48), step=3)
    for words in ([], ["--config.data.on_change=new_epoch"]):  # the dataset is no longer a changed one
        again = prepare(tmp_path / "run", grown, *words)
        assert (again.schedule.start_step, again.examples.start) == (3, 32)
    assert first_slices(this, monkeypatch) == expected_slices(SliceSource(grown, "train"), 0)
    assert first_slices(again, monkeypatch) == expected_slices(SliceSource(grown, "train"), 16)


# ---- mixtures


def test_resumed_mixture_continues_its_examples(mixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    this = prepare(tmp_path / "run", mixed("0.25", "0.75"))
    source = this.examples.source
    assert isinstance(source, Mixture) and len(this.examples) == len(source) == 144
    whole = source.slice_numbers(0, 48, seed=0)
    assert [int((part < 48).sum()) for part in whole.reshape(3, 16)] == [4, 4, 4]
    save_meta(tmp_path / "run", this.meta(32))
    again = prepare(tmp_path / "run", mixed("1", "3"))  # the same shares
    assert first_slices(again, monkeypatch) == whole[32:].tolist()


def test_resume_rejects_other_weights_unless_a_new_epoch_is_wanted(mixed, tmp_path: Path) -> None:
    save_meta(tmp_path / "run", prepare(tmp_path / "run", mixed("0.25", "0.75")).meta(32))
    with pytest.raises(
        DataError, match=r"of example 32 was trained on: weights of the folders 0\.25:0\.75 -> 0\.5:0\.5; "
    ):
        prepare(tmp_path / "run", mixed("0.5", "0.5"))
    this = prepare(tmp_path / "run", mixed("0.5", "0.5"), "--config.data.on_change=new_epoch")
    assert this.examples.start == 32


def test_resume_rejects_a_mixture_in_place_of_a_folder(tiny_shards: Path, mixed, tmp_path: Path) -> None:
    save_meta(tmp_path / "run", prepare(tmp_path / "run", tiny_shards).meta(32))
    with pytest.raises(DataError, match=r"slices 48 -> 144, additions 0 -> 1, weights of the folders 1 -> 0\.5:0\.5; "):
        prepare(tmp_path / "run", mixed("1", "1"))


def test_mixture_of_a_grown_folder_trains_on_the_slices_of_then(tiny_shards: Path, grown: Path, tmp_path: Path) -> None:
    before = shutil.copytree(tiny_shards, tmp_path / "before")
    save_meta(tmp_path / "run", prepare(tmp_path / "run", f"{tiny_shards}:1,{before}:1").meta(32))
    with pytest.raises(DataError, match="--config.data.additions=0 trains on the same slices as before"):
        prepare(tmp_path / "run", f"{tiny_shards}:1,{grown}:1")
    assert prepare(tmp_path / "run", f"{tiny_shards}:1,{grown}:1", "--config.data.additions=0").examples.start == 0


def test_resume_rejects_replaced_slices(tiny_shards: Path, tmp_path: Path) -> None:
    this = prepare(tmp_path / "run", tiny_shards)
    other = this.examples.dataset._replace(fingerprint="of other shards")
    save_meta(tmp_path / "run", checkpoint.Meta(this.config, 32, other))
    message = "was trained on: the same number of slices with other contents; the slices that it was trained on are no longer there"
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "run", tiny_shards)


def test_resume_of_an_old_checkpoint_says_that_its_dataset_is_not_checked(
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.logs.configure()
    save_meta(tmp_path / "run", checkpoint.Meta({"seed": 0}, 32, version=None))
    this = prepare(tmp_path / "run", grown)
    assert capsys.readouterr().err.splitlines()[-1] == "this checkpoint does not name its dataset; not checked"
    assert this.meta(48).dataset == this.examples.dataset and this.examples.start == 0


# ---- work directories without a checkpoint


def test_run_that_lost_its_checkpoints_does_not_start_again(tiny_shards: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", tiny_shards)
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(DataError, match="of a run that saved step 6, but has no checkpoint: is its storage mounted"):
        prepare(tmp_path / "run", tiny_shards)
    assert losses(tmp_path / "run").keys() == {1, 2, 3, 4, 5, 6}


def test_run_killed_before_its_first_save_starts_again(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(trainer.Interrupted):
        train(tmp_path / "run", tiny_shards, stop_at=2, signals=(signal.SIGINT, signal.SIGINT))
    assert prepare(tmp_path / "run", tiny_shards).schedule.start_step == 0


def test_profile_can_be_requested_before_the_first_start(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "profile.request").touch()
    (tmp_path / "profiles").mkdir()
    assert prepare(tmp_path, tiny_shards).schedule.start_step == 0


def test_folder_with_other_files_is_no_work_directory(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="is not empty and not the work directory of a run; choose another folder"):
        prepare(tmp_path, tiny_shards)


@pytest.mark.long
def test_damaged_newest_checkpoint_resumes_from_the_one_before(
    tiny_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "whole", tiny_shards)
    train(tmp_path / "run", tiny_shards, "--config.duration=5 steps")
    for path in (tmp_path / "run/checkpoints/5/state/d").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    this = prepare(tmp_path / "run", tiny_shards)
    assert (this.schedule.start_step, this.schedule.examples_seen) == (4, 64)
    assert "skipped a damaged checkpoint" in caplog.text and "checkpoints/5: state/d/" in caplog.text
