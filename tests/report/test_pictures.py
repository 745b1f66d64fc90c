"""Figures of reports, and the slices and windows they show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from etils import epath

from curia_common import windows
from curia_jax import augment, config, data
from curia_jax.models import mae
from curia_jax.report import pictures
from curia_jax.settings import Augment
from curia_jax.trained_model import TrainedModel
from data_pipeline.format.records import DecodedSlice, SliceFacts
from tests.scores import make_score
from tests.slices import FakeSlices, decoded

SETTINGS = Augment.of(config.load("base").augment)
MODEL = {"size": "Ti", "image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2,
         "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "dtype": "float32"}  # fmt: skip


class Slices(FakeSlices):
    """Slices without files: a disc of 40 HU in air (CT), of 300 on 0 (MR)."""

    def __init__(self, rows: list[dict]) -> None:
        self.split, self.largest = "test", (24, 24)
        self._rows = pa.Table.from_pylist([{"height": 24, "width": 24, **row} for row in rows])

    @property
    def index(self) -> pa.Table:
        return self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> DecodedSlice:
        row = self._rows.slice(number, 1).to_pylist()[0]
        y, x = np.mgrid[:24, :24] - 11.5
        disc = np.hypot(y, x) < 8
        noise = np.random.default_rng(number).integers(0, 20, (24, 24))
        inside, outside, intercept = (1064, 24, -1024.0) if row["modality"] == "CT" else (300, 0, 0.0)
        pixels = np.where(disc, inside, outside) + noise
        facts = SliceFacts(1.0, intercept, 5.0, 310.0, hu=row["modality"] == "CT")
        return decoded(pixels.astype(np.uint16), facts, row["modality"], row["plane"])


def rows(modality: str, plane: str, patient: str, slices: int = 5) -> list[dict]:
    series = f"{patient}-{modality}-{plane}"
    common = {"modality": modality, "plane": plane, "patient": patient, "series": series}
    return [{**common, "index": i} for i in range(slices)]


SOURCE = Slices(
    rows("CT", "axial", "a") + rows("CT", "axial", "b") + rows("CT", "coronal", "b", 3) + rows("MR", "sagittal", "a")
)


def trained(**changes) -> TrainedModel:
    model = mae.config(**MODEL, **changes)
    params = mae.init(model, jax.random.key(0))
    return TrainedModel(model, params, SETTINGS, seed=0, step=1, examples_seen=8, path=epath.Path("1"))


def test_middle_slices_of_different_planes_and_patients_are_chosen() -> None:
    assert pictures.choose_slices(SOURCE, "CT", 2).tolist() in ([2, 11], [7, 11])
    assert sorted(pictures.choose_slices(SOURCE, "CT", 9).tolist()) == [2, 7, 11]
    assert pictures.choose_slices(SOURCE, "MR", 3).tolist() == [15]
    assert pictures.choose_slices(SOURCE, "OT", 3).tolist() == []


def test_real_view_is_inverted_by_offset_and_scale() -> None:
    batch = next(data.evaluation_batches(SOURCE, np.array([2, 15]), batch_size=2, canvas=(24, 24)))
    on_device = {name: jnp.asarray(batch[name]) for name in data.DEVICE_FIELDS}
    view, offset, scale = (np.asarray(x) for x in pictures.real_view(on_device, SETTINGS, (24, 24)))
    np.testing.assert_array_equal(view, augment.evaluation_view(on_device, SETTINGS, (24, 24)))
    real = view[..., 0] * scale[:, None, None] + offset[:, None, None]
    stored = batch["pixels"].astype(np.float32)
    # Without resizing the view is the clipped slice; float32 over a range of 2000 HU.
    np.testing.assert_allclose(real[0], np.clip(stored[0] - 1024, -1000, 1000), atol=0.01)
    np.testing.assert_allclose(real[1], np.clip(stored[1], 5, 310), atol=0.01)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_perfect_prediction_equals_original(norm_pix: bool, monkeypatch) -> None:
    model, bind = trained(norm_pix=norm_pix), mae.bind

    def perfect(model_config, params):
        def call(images, noise):
            output = bind(model_config, params)(images, noise)
            return output._replace(prediction=output.target)

        return call

    monkeypatch.setattr(mae, "bind", perfect)
    for example in pictures.reconstruct(SOURCE, np.array([2, 15]), model):
        # float32 over a range of 2000 HU.
        np.testing.assert_allclose(example.prediction, example.original, atol=0.05)


def test_reconstructions_are_real_values_in_reading_window() -> None:
    found = pictures.reconstruct(SOURCE, np.array([2, 15]), trained())
    ct, mr = found
    assert ct.title == "CT, axial, soft tissue 40/400 HU" and (ct.window.low, ct.window.high) == (-160, 240)
    assert mr.title == "MR, sagittal, 0.5 to 99.5 percentile" and (mr.window.low, mr.window.high) == (5, 310)
    assert ct.original[8, 8] == pytest.approx(50, abs=15) and ct.original[0, 0] == pytest.approx(-990, abs=15)
    # A quarter of the four patches is visible, in both slices.
    assert [example.visible.mean() for example in found] == [0.25, 0.25]
    assert np.isfinite(ct.prediction).all() and ct.prediction.shape == (16, 16)


def test_ct_windows_are_those_of_the_shared_table() -> None:
    lung, air = np.full((8, 8), -800.0), np.full((8, 8), -1000.0)
    one = SOURCE[0]
    assert pictures.display_window(one, lung) == windows.LUNG
    assert pictures.display_window(one, air) == windows.SOFT_TISSUE
    assert pictures.display_window(dataclasses.replace(one, body_part="head"), air) == windows.BRAIN


def test_forest_draws_scores_without_value_or_interval(tmp_path) -> None:
    score = make_score(head="knn", low=None, high=None)
    figure = pictures.forest([score, dataclasses.replace(score, head="ridge", value=None)], "auroc")
    figure.savefig(tmp_path / "forest.png")
    assert "undefined" in [text.get_text() for axes in figure.axes for text in axes.texts]


def pictures_of(figure) -> list[np.ma.MaskedArray]:
    return [axes.images[0].get_array() for axes in figure.axes]


def test_reconstruction_keeps_visible_patches(tmp_path) -> None:
    (example,) = pictures.reconstruct(SOURCE, np.array([2]), trained())
    original, visible, reconstructed = pictures_of(pictures.reconstructions([example]))
    np.testing.assert_array_equal(original, example.original)
    np.testing.assert_array_equal(np.ma.getmaskarray(visible), ~example.visible)
    np.testing.assert_array_equal(reconstructed[example.visible], example.original[example.visible])
    np.testing.assert_array_equal(reconstructed[~example.visible], example.prediction[~example.visible])


def test_raw_output_is_a_further_column_on_request() -> None:
    examples = pictures.reconstruct(SOURCE, np.array([2, 15]), trained())
    shown = pictures_of(pictures.reconstructions(examples, raw=True))
    assert len(shown) == 8
    for row, example in zip((shown[:4], shown[4:]), examples, strict=True):
        np.testing.assert_array_equal(row[3], example.prediction)
