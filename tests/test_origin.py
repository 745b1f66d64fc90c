"""Runs that start from the weights of another one: `pretrain --from`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curia_common.errors import DataError, UserError
from curia_jax import checkpoint, origin, sharding, trained_model
from curia_jax.convert import __main__ as convert
from tests.conftest import use_one_device
from tests.runs import losses, prepare, train

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def earlier(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        assert train(folder, tiny_shards).finished
    return folder


def leaves(params: Any) -> dict[str, np.ndarray]:
    return sharding.paths(params)


@pytest.mark.long
def test_new_run_starts_from_the_weights_with_a_new_optimizer(tiny_shards: Path, earlier: Path, tmp_path: Path) -> None:
    # A learning rate of almost zero leaves the weights where they started.
    still = ["--config.optimizer.base_learning_rate=1e-30", "--config.seed=5"]
    assert train(tmp_path / "run", tiny_shards, *still, start_from=str(earlier)).step == 6
    theirs, ours = (leaves(checkpoint.load(place).params) for place in (earlier, tmp_path / "run"))
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(leaf, ours[name]) for name, leaf in theirs.items())
    step, meta = checkpoint.latest(str(tmp_path / "run")) or pytest.fail("no checkpoint")
    digest = trained_model.digest(checkpoint.load(earlier).params)
    assert meta.origin == (str(earlier), 6, 96, digest) and (step, meta.examples_seen) == (6, 96)
    (started,) = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()][:1]
    assert (started["event"], started["origin"]["weights"]) == ("started", digest)

    words = [f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'weights'}", "--layout=vit"]
    assert convert.main(words) == 0
    assert f"from the weights `{digest}` of another run, at its step 6" in (tmp_path / "weights/README.md").read_text()


@pytest.mark.long
def test_run_from_weights_resumes_exactly_with_and_without_the_option(
    tiny_shards: Path, earlier: Path, tmp_path: Path
) -> None:
    assert train(tmp_path / "whole", tiny_shards, start_from=str(earlier)).finished
    assert train(tmp_path / "run", tiny_shards, start_from=str(earlier), stop_at=3).exit_code == 75
    shutil.copytree(tmp_path / "run", tmp_path / "without")
    shutil.copytree(earlier, tmp_path / "moved")
    assert train(tmp_path / "run", tiny_shards, start_from=str(tmp_path / "moved")).finished
    assert train(tmp_path / "without", tiny_shards).finished
    assert losses(tmp_path / "whole") == losses(tmp_path / "run") == losses(tmp_path / "without")
    assert losses(tmp_path / "whole") != losses(earlier)


@pytest.mark.long
def test_export_of_a_run_gives_its_encoder_and_a_new_decoder(
    tiny_shards: Path, earlier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"--checkpoint={earlier}", f"--output={tmp_path / 'weights'}", "--layout=dinov2"]
    assert convert.main(words) == 0
    still = ["--config.optimizer.base_learning_rate=1e-30", "--config.seed=5"]
    assert train(tmp_path / "run", tiny_shards, *still, start_from=str(tmp_path / "weights")).finished
    theirs, ours = (checkpoint.load(place).params for place in (earlier, tmp_path / "run"))
    encoder = leaves(ours["encoder"])
    for name, leaf in leaves(theirs["encoder"]).items():
        np.testing.assert_allclose(encoder[name], leaf, rtol=0, atol=1e-7, err_msg=name)
    assert not np.array_equal(ours["decoder"]["mask_token"], theirs["decoder"]["mask_token"])
    assert "decoder: new" in caplog.text
    _, meta = checkpoint.latest(str(tmp_path / "run")) or pytest.fail("no checkpoint")
    assert meta.origin is not None and (meta.origin.step, meta.origin.examples_seen) == (6, 96)
    assert train(tmp_path / "run", tiny_shards, *still, start_from=str(tmp_path / "weights")).finished  # nothing to do


def test_other_weights_than_those_of_the_resumed_run_are_refused(
    tiny_shards: Path, earlier: Path, tmp_path: Path
) -> None:
    this = prepare(tmp_path / "run", tiny_shards)
    random, started = this.meta(32), checkpoint.Origin("elsewhere", 3, 48, "0" * 16)
    with pytest.raises(UserError, match="started from random weights; leave --from out to resume it"):
        origin.find(str(earlier), this.config, resumed=random)
    resumed = checkpoint.Meta(this.config, 32, origin=started)
    with pytest.raises(UserError, match="started from elsewhere, step 3; leave --from out"):
        origin.find(str(earlier), this.config, resumed=resumed)
    assert (
        origin.find(None, this.config, resumed=resumed)
        == origin.find("elsewhere", this.config, resumed=resumed)
        == started
    )


def test_weights_of_another_model_are_refused_with_the_tensor(tiny_shards: Path, earlier: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"params/\S+ is \(.*\) in the checkpoint, \(.*\) in the config.*Use the --config.model"
    ):
        train(tmp_path / "run", tiny_shards, "--config.model.width=48", start_from=str(earlier))
    assert not (tmp_path / "run/checkpoints").exists()


def test_weights_that_changed_since_the_run_started_are_refused(earlier: Path) -> None:
    params = checkpoint.load(earlier).params
    with pytest.raises(DataError, match="has the weights .* but 0{16} when this run started"):
        origin.weights(checkpoint.Origin(str(earlier), 6, 96, "0" * 16), params)


def test_other_preprocessing_than_that_of_the_weights_is_named(
    tiny_shards: Path, earlier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    this = prepare(tmp_path / "run", tiny_shards, "--config.augment.image_mean=0.5", "--config.seed=3")
    origin.find(str(earlier), this.config, resumed=None)
    assert caplog.text.count("whose weights this run starts from") == 1
    assert "augment.image_mean is 0.5, but 0.3 in" in caplog.text


def test_missing_run_to_start_from_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    this = prepare(tmp_path / "run", tiny_shards)
    with pytest.raises(UserError, match="no checkpoint at nowhere: there is no such folder"):
        origin.find("nowhere", this.config, resumed=None)
