import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from curia_jax import augment, config, data
from curia_jax.models import mae
from curia_jax.report import pictures
from tests.slices import FakeSlices

SETTINGS = config.load("configs/demo.py").augment
MODEL = {"size": "Ti", "image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2,
         "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "dtype": "float32"}  # fmt: skip


class Slices(FakeSlices):
    """Slices without files: a disc of 40 HU in air (CT), of 300 in nothing (MR)."""

    def __init__(self, rows: list[dict]) -> None:
        self.split, self.largest = "test", (24, 24)
        self._index = pa.Table.from_pylist([{"height": 24, "width": 24, **row} for row in rows])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> dict[str, object]:
        row = self._index.slice(number, 1).to_pylist()[0]
        y, x = np.mgrid[:24, :24] - 11.5
        disc = np.hypot(y, x) < 8
        noise = np.random.default_rng(number).integers(0, 20, (24, 24))
        inside, outside, intercept = (1064, 24, -1024.0) if row["modality"] == "CT" else (300, 0, 0.0)
        pixels = np.where(disc, inside, outside) + noise
        hu = row["modality"] == "CT"
        return {
            "pixels": pixels.astype(np.uint16), "slope": 1.0, "intercept": intercept, "low": 5.0, "high": 310.0,
            "hu": hu, "modality": row["modality"], "plane": row["plane"],
        }  # fmt: skip


def rows(modality: str, plane: str, patient: str, slices: int = 5) -> list[dict]:
    series = f"{patient}-{modality}-{plane}"
    common = {"modality": modality, "plane": plane, "patient": patient, "series": series}
    return [{**common, "index": i} for i in range(slices)]


SOURCE = Slices(
    rows("CT", "axial", "a") + rows("CT", "axial", "b") + rows("CT", "coronal", "b", 3) + rows("MR", "sagittal", "a")
)


def test_middle_slices_of_different_planes_and_patients_are_chosen() -> None:
    assert pictures.choose_slices(SOURCE, "CT", 2).tolist() in ([2, 11], [7, 11])
    assert sorted(pictures.choose_slices(SOURCE, "CT", 9).tolist()) == [2, 7, 11]
    assert pictures.choose_slices(SOURCE, "MR", 3).tolist() == [15]
    assert pictures.choose_slices(SOURCE, "OT", 3).tolist() == []


def test_the_way_back_from_the_view_leads_to_real_values() -> None:
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
def test_a_perfect_prediction_gives_the_slice_back(norm_pix: bool, monkeypatch) -> None:
    model = mae.config(**MODEL, norm_pix=norm_pix)
    params, bind = mae.init(model, jax.random.key(0)), mae.bind

    def perfect(model_config, params):
        def call(images, noise):
            output = bind(model_config, params)(images, noise)
            return output._replace(prediction=output.target)

        return call

    monkeypatch.setattr(mae, "bind", perfect)
    for example in pictures.reconstruct(SOURCE, np.array([2, 15]), model, params, SETTINGS):
        # float32 over a range of 2000 HU.
        np.testing.assert_allclose(example.prediction, example.original, atol=0.05)


def test_reconstructions_are_in_real_values_with_a_fitting_window() -> None:
    model = mae.config(**MODEL)
    params = mae.init(model, jax.random.key(0))
    found = pictures.reconstruct(SOURCE, np.array([2, 15]), model, params, SETTINGS)
    ct, mr = found
    assert ct.title == "CT, axial, soft-tissue window 40/400 HU" and (ct.window.low, ct.window.high) == (-160, 240)
    assert mr.title == "MR, sagittal, 0.5 to 99.5 percentile" and (mr.window.low, mr.window.high) == (5, 310)
    assert ct.original[8, 8] == pytest.approx(50, abs=15) and ct.original[0, 0] == pytest.approx(-990, abs=15)
    # A quarter of the four patches is visible, in both slices.
    assert [example.visible.mean() for example in found] == [0.25, 0.25]
    assert np.isfinite(ct.prediction).all() and ct.prediction.shape == (16, 16)


def test_aerated_lung_gets_the_lung_window() -> None:
    example = {"hu": True}
    lung = np.full((8, 8), -800.0)
    assert pictures._window(example, lung).name.startswith("lung window -600/1500")
    assert pictures._window(example, np.full((8, 8), -1000.0)).name.startswith("soft-tissue window")


def test_scores_without_value_or_interval_are_drawn_all_the_same(tmp_path) -> None:
    row = {
        "task": "t",
        "backbone": "checkpoint",
        "head": "knn",
        "metric": "auroc",
        "value": 0.7,
        "low": None,
        "high": None,
    }
    figure = pictures.forest([row, {**row, "head": "ridge", "value": None}], "auroc")
    figure.savefig(tmp_path / "forest.png")
    assert "undefined" in [text.get_text() for axes in figure.axes for text in axes.texts]
