"""The image processor of exported folders, loaded as its users load it: pixels, units, DICOM, and what evaluators expect of it."""

import dataclasses
import importlib
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax import augment
from curia_jax import config as configs
from curia_jax.settings import Augment
from data_pipeline.sources import hu as ingest_hu
from data_pipeline.sources import stored_values
from data_pipeline.sources.base import ReadRequest
from data_pipeline.sources.dicom_pixels import open_dicom
from data_pipeline.sources.volumes import open_volume_file
from data_pipeline.stages.statistics import slice_statistics
from tests.data_pipeline.conftest import write_dicom  # noqa: F401 - a fixture

pytestmark = pytest.mark.torch
# The file imports both, as it is copied beside the weights, so it cannot be imported without them.
for package in ("torch", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
code = importlib.import_module("curia_jax.convert.image_processing_curia_jax")
AUGMENT = Augment.of(configs.load("demo").augment)
SIZE = (24, 24)
# Rounding of HU in float32, resized; the demo's window of 500 HU magnifies it four times as much as one of 2,000 HU.
TOLERANCE = 4e-5


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """transformers copies the code of a folder; not into the cache of whoever runs the suite."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture(scope="module")
def load(converted):
    """Settings -> the processor of the layout `dinov2`, with `hu` False unless given."""
    from transformers import AutoImageProcessor

    def make(**settings: Any):
        return AutoImageProcessor.from_pretrained(
            converted("square", "dinov2")[0], trust_remote_code=True, **{"hu": False, **settings}
        )

    return make


def batch_of(pixels: np.ndarray, slope: float, intercept: float, hu: bool) -> augment.Batch:
    """A slice as shards give it."""
    found = slice_statistics(pixels, slope, intercept)
    numbers = {"slope": slope, "intercept": intercept, "low": found.low, "high": found.high}
    return {
        "pixels": jnp.asarray(pixels)[None], "extent": jnp.asarray([pixels.shape], jnp.int32), "hu": jnp.asarray([hu]),
        **{name: jnp.asarray([value], jnp.float32) for name, value in numbers.items()},
    }  # fmt: skip


def trained_view(
    pixels: np.ndarray, slope: float, intercept: float, hu: bool, settings: Augment = AUGMENT
) -> np.ndarray:
    return np.asarray(augment.evaluation_view(batch_of(pixels, slope, intercept, hu), settings, SIZE))[0, :, :, 0]


# ---- one golden image, three programs


def numpy_view(values: np.ndarray, hu: bool, method: str) -> np.ndarray:
    """The recipe as docs/convert.md states it, output pixel by output pixel."""
    low, high = -200.0, 300.0
    if not hu:
        ordered = np.sort(values.ravel())
        low, high = (float(ordered[math.ceil(share * len(ordered)) - 1]) for share in (0.005, 0.995))
    image = np.minimum(np.maximum((values - low) / (high - low), 0), 1)
    for axis, n_out in enumerate(SIZE):
        n_in = image.shape[axis]
        scale = n_in / n_out
        wide = max(scale, 1.0)
        lines = []
        for out in range(n_out):
            centre, weights = (out + 0.5) * scale, []
            for place in range(n_in):
                x = abs(place + 0.5 - centre) / wide
                if method == "bilinear":
                    weights.append(max(0.0, 1 - x))
                elif x < 1:
                    weights.append(1.5 * x**3 - 2.5 * x**2 + 1)
                else:
                    weights.append(-0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0)
            lines.append(np.tensordot(np.array(weights) / sum(weights), image, axes=(0, axis)))
        image = np.stack(lines, axis=axis)
    return (image - 0.3) / 0.25


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("hu", [True, False])
def test_golden_image_is_the_same_in_numpy_jax_and_the_processor(hu: bool, method: str, load) -> None:
    rows, columns = np.mgrid[:61, :17]  # reduced along one axis, enlarged along the other
    real = np.round(900 * np.sin(rows / 5) * np.cos(columns / 3) - 100 + 7 * rows)
    stored = (real + 1024).astype(np.uint16)
    wanted = numpy_view(real, hu, method)
    settings = dataclasses.replace(AUGMENT, resample=method)
    np.testing.assert_allclose(trained_view(stored, 1.0, -1024.0, hu, settings), wanted, rtol=0, atol=TOLERANCE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers 5 on other settings than `hu`
        processor = load(hu=hu, resample=method)
    found = processor(real)["pixel_values"]
    np.testing.assert_allclose(found[0, 0], wanted, rtol=0, atol=TOLERANCE)
    assert wanted.std() > 0.5  # an image, not a constant


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.float32])
@pytest.mark.parametrize("hu", [True, False])
@pytest.mark.filterwarnings("ignore:all values lie in")
def test_every_number_type_gives_the_trained_view(dtype: type, hu: bool, load) -> None:
    """In the type's own arithmetic the differences to the window wrap around, and black becomes white."""
    limits = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else np.iinfo(np.int16)
    low, high = max(limits.min, -1024), min(limits.max, 3071)
    values = np.random.RandomState(0).randint(low, high + 1, size=(40, 32)).astype(dtype)
    if dtype is np.uint8 and hu:
        with pytest.raises(ValueError, match=r"image 0: hu is True, but all values lie in \[0, 255\]"):
            load(hu=True)(values)
        return
    stored = (values.astype(np.int64) + 1024).astype(np.uint16)
    found = load(hu=hu)(values)["pixel_values"][0, 0]
    np.testing.assert_allclose(found, trained_view(stored, 1.0, -1024.0, hu), rtol=0, atol=TOLERANCE)


# ---- the call of CuriaBench's evaluator


def test_slices_become_one_batch_for_the_model(load, converted) -> None:
    import torch
    from transformers import Dinov2Model

    slices = [np.random.RandomState(n).gamma(2, 200, (30 + n, 40)).astype(np.float32) for n in range(3)]
    processor = load()
    batch = processor(slices, return_tensors="pt")
    assert set(batch) == {"pixel_values"} and batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].shape == (3, 1, 24, 24)
    for number, one in enumerate(slices):
        assert torch.equal(processor(one)["pixel_values"][0], batch["pixel_values"][number])
        assert torch.equal(processor(torch.tensor(one))["pixel_values"][0], batch["pixel_values"][number])
    as_numpy = processor(slices, return_tensors="np")["pixel_values"]
    assert isinstance(as_numpy, np.ndarray) and np.array_equal(as_numpy, batch["pixel_values"])
    with torch.no_grad():
        model = Dinov2Model.from_pretrained(converted("square", "dinov2")[0]).eval()
        assert model(**batch).last_hidden_state.shape == (3, 10, 16)


def test_slices_of_a_volume_are_processed_as_slices_alone(load) -> None:
    import torch

    volumes = [np.random.RandomState(n).gamma(2, 200, (20, 28, 5)).astype(np.float32) for n in range(2)]
    for one in volumes:
        one[:, :, 3] *= 7  # percentiles are of a slice, not of the volume
    pixels = load()(volumes, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 5, 1, 24, 24)
    for volume, found in zip(volumes, pixels, strict=True):
        alone = load()([volume[:, :, number] for number in range(5)])["pixel_values"]
        assert torch.equal(found, alone)


def test_whole_slice_is_resized_so_that_masks_resized_alone_fit(load) -> None:
    """The evaluator resizes masks to a square by itself: a crop or a border would move what they mark."""
    image = np.zeros((40, 80), np.float32)
    image[10:20, 60:70] = 1000.0
    found = load()(image)["pixel_values"][0, 0].numpy()
    rows, columns = np.nonzero(found > found.mean() + found.std())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 11, 18, 20)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        ([np.zeros((1, 1))], "image 0: an image of 1 x 1, which stands for a missing file"),
        ([np.eye(9) * 999, np.zeros((1, 1, 5))], "image 1: an image of 1 x 1 x 5"),
        ([np.ones((1, 24, 24))], r"an array of 1 x 24 x 24; slices come last: np.moveaxis\(image, 0, -1\)"),
        ([np.ones((3, 64, 64))], "an array of 3 x 64 x 64; slices come last"),
        ([np.ones((2, 3, 4, 5))], "an array of 2 x 3 x 4 x 5; wanted rows x columns, or"),
        ([np.ones((24, 24, 3), np.uint8)], "an array of 24 x 24 x 3 bytes, a colour picture"),
        ([np.eye(9) * 999, np.ones((9, 9, 2))], "image 1 is a volume of 2 slices, image 0 a slice; give images of one kind"),
        ([np.ones((9, 9, 3)), np.ones((9, 9, 2))], "image 1 is a volume of 2 slices, image 0 a volume of 3 slices"),
        ([np.full((9, 9), np.nan)], "values that are not finite"),
        ([np.ones((9, 9), bool)], "values of type bool"),
        ([[[1.0, 2.0], [3.0, 4.0]]], r"nested lists; make an array of each image"),
        (["{folder}"], "this is a folder; give the DICOM files in it"),
        (["{folder}/notes.txt"], "not a DICOM file"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused_with_its_number(images: list, message: str, load, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=message):
        load()([one.format(folder=tmp_path) if isinstance(one, str) else one for one in images])


def test_arguments_that_would_change_the_recipe_are_refused(load) -> None:
    for name in ("do_normalize", "do_resize", "size", "modality"):
        with pytest.raises(TypeError, match=name):
            load()(np.eye(9) * 999, **{name: False})


def test_large_values_and_fractions_are_not_cut_to_16_bits(load) -> None:
    image = np.random.RandomState(0).gamma(2, 1, (30, 30))
    wanted = load()(image * 100)["pixel_values"]
    np.testing.assert_allclose(load()(image * 1e6)["pixel_values"], wanted, rtol=0, atol=1e-5)


# ---- loading


def test_processor_is_not_replaced_where_its_code_is_not_trusted(converted) -> None:
    from transformers import AutoImageProcessor

    for layout in ("vit", "vit_mae", "dinov2"):
        with pytest.raises(ValueError, match="trust_remote_code=True|Unrecognized image processor"):
            AutoImageProcessor.from_pretrained(converted("square", layout)[0], trust_remote_code=False)


def test_saved_processor_loads_again_with_its_settings(load, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    image = np.random.RandomState(0).gamma(2, 200, (30, 30))
    load(hu=True).save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.hu is True and again.size == {"height": 24, "width": 24}
    np.testing.assert_array_equal(again(image)["pixel_values"], load(hu=True)(image)["pixel_values"])


def test_channels_get_the_same_slice(converted) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(
        converted("three_channels", "vit")[0], trust_remote_code=True, hu=False
    )
    found = processor(np.random.RandomState(0).gamma(2, 200, (30, 30)))["pixel_values"]
    assert found.shape[:2] == (1, 3) and (found == found[:, :1]).all()


@pytest.mark.long
def test_arrays_need_no_pydicom(converted, tmp_path: Path) -> None:
    """In a process of its own, where neither pydicom nor this project can be imported."""
    folder, _ = converted("square", "vit")
    program = f"""
import sys
for name in ("pydicom", "curia_jax", "curia_common", "data_pipeline"):
    sys.modules[name] = None
import numpy as np
from transformers import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True, hu=False)
print(tuple(processor(np.eye(9) * 999)["pixel_values"].shape))
try:
    processor("slice.dcm")
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path)}
    )
    assert done.stdout.splitlines() == [
        "(1, 1, 24, 24)", "image 0: reading DICOM files needs pydicom: pip install pydicom",
    ], done.stderr[-2000:]  # fmt: skip


# ---- units


def ct_slice() -> np.ndarray:
    """Air, fat, soft tissue and bone, with noise; HU."""
    values = np.full((64, 64), -1000.0)
    values[10:54, 10:54] = -100
    values[14:50, 14:50] = 50
    values[30:34, 30:34] = 700
    return values + np.random.RandomState(0).normal(0, 12, values.shape)


def test_auto_takes_ct_in_hu_and_reports_it(load) -> None:
    with pytest.warns(UserWarning, match="hu is auto: taken for CT in HU"):
        found = load(hu="auto")(ct_slice())["pixel_values"]
    np.testing.assert_array_equal(found, load(hu=True)(ct_slice())["pixel_values"])


def test_auto_takes_values_without_negatives_for_other_units(load) -> None:
    image = np.random.RandomState(0).gamma(2, 200, (64, 64))
    with pytest.warns(UserWarning, match="hu is auto: taken for MR or another unit than HU"):
        found = load(hu="auto")(image)["pixel_values"]
    np.testing.assert_array_equal(found, load(hu=False)(image)["pixel_values"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ct_slice() + 1024,
            "whether its values, -20.* to 174.*, are HU cannot be told; set hu to True",
        ),  # stored values without their rescale
        (ct_slice()[14:50, 14:50], "cannot be told"),  # cropped to soft tissue
        (np.random.RandomState(0).uniform(-4096, 4096, (64, 64)), "values, -409.* cannot be told"),  # phase
        (np.full((9, 9), 700.0), "cannot be told"),
        ((ct_slice() + 1100) / 2000, r"lie in \[0, 1\], as if scaled already, and do not tell their unit"),
        ((ct_slice() + 1100) / 1000 - 0.9, r"lie in \[-1, 1\]"),
        (np.clip(ct_slice() / 10 + 110, 0, 255).astype(np.uint8), r"lie in \[0, 255\]"),
    ],
)
def test_auto_refuses_what_it_cannot_tell(values: np.ndarray, message: str, load) -> None:
    if "-1, 1" in message:
        values = np.clip(values, -1, 1)
    with pytest.raises(ValueError, match=f"image 0: .*{message}"):
        load(hu="auto")(values)


def test_pixels_that_are_scaled_already_are_said_so(load) -> None:
    unit = np.clip((ct_slice() + 200) / 500, 0, 1)
    with pytest.raises(
        ValueError, match=r"hu is True, but all values lie in \[0, 1\], scaled already; give HU as they are"
    ):
        load(hu=True)(unit)
    with pytest.warns(
        UserWarning, match=r"all values lie in \[0, 1\], as if scaled already \(fine if nothing was clipped\)"
    ):
        load(hu=False)(unit)
    with pytest.warns(
        UserWarning, match=r"all values lie in \[0, 255\], as if scaled already \(HU of a slice with air"
    ):
        load(hu=True)(unit * 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(hu=True)(ct_slice())
        load(hu=False)(np.random.RandomState(0).gamma(2, 200, (64, 64)))


def test_unknown_setting_of_units_is_refused(load) -> None:
    with pytest.raises(ValueError, match="hu is 'CT'; set hu to True"):
        load(hu="CT")(ct_slice())


def is_hu_by_ingest(values: np.ndarray) -> bool:
    return ingest_hu.is_ct(*np.unique(values, return_counts=True))


@pytest.mark.parametrize("seed", range(40))
def test_units_are_judged_as_by_the_ingest(seed: int) -> None:
    """Values with random peaks around those of HU, some moved or padded."""
    random = np.random.RandomState(seed)
    parts = [
        random.normal(place, random.uniform(3, 120), random.randint(1, 900)) for place in (-1000, -100, 40, 500, -700)
    ]
    values = np.round(np.concatenate([part for part in parts if random.rand() < 0.7] or parts))
    values += random.choice([0, 0, 0, 1024, -1024, 1000])
    if random.rand() < 0.3:
        values = np.concatenate([values, np.full(random.randint(1, 500), -2000.0)])
    assert (code.looks_like_hu(values[:, None]) is True) == is_hu_by_ingest(values)


def test_real_volumes_are_judged_as_by_the_ingest(real_data: Path) -> None:
    judged = {}
    for path in sorted(real_data.glob("nifti/*/*.nii.gz"))[:40]:
        with open_volume_file(ReadRequest(str(path), "auto", str(path.parent))) as volume:
            if not volume.excluded:
                values = np.stack([one.pixels * one.slope + one.intercept for one in volume.slices()], axis=-1)
                judged[path.parent.name] = code.looks_like_hu(values)
                assert (judged[path.parent.name] is True) == is_hu_by_ingest(values), path.parent.name
    assert {verdict for name, verdict in judged.items() if name.startswith("mr")} <= {False, None}
    assert True in judged.values() and False in judged.values()


# ---- DICOM


def ingest_view(path: Path, modality: str, frame: int = 0, settings: Augment = AUGMENT) -> np.ndarray:
    """What training sees of a file, by way of the ingest."""
    with open_dicom(ReadRequest(str(path), modality, str(path.parent), frames=((frame, 0.0),))) as file:
        (one,) = file.slices()
    return trained_view(one.pixels, one.slope, one.intercept, modality == "CT", settings)


def rings(low: int, high: int) -> np.ndarray:
    rows, columns = np.mgrid[:40, :44]
    return np.round(low + (high - low) * (0.5 + 0.5 * np.sin(np.hypot(rows - 15, columns - 20) / 3))).astype(np.int64)


def padded(value: int, low: int = 100, high: int = 1500) -> np.ndarray:
    """Padding around the image, and the same value once inside."""
    image = rings(low, high)
    image[:6], image[:, 38:], image[20, 20] = value, value, value
    return image


FILES: dict[str, dict[str, Any]] = {
    "ct": {"pixels": rings(0, 2400)},
    "ct_signed": {"pixels": rings(-1000, 900)},
    "ct_slope": {"pixels": rings(0, 2400), "RescaleSlope": 0.5, "RescaleIntercept": -1000},
    "ct_monochrome1": {"pixels": rings(0, 2400), "PhotometricInterpretation": "MONOCHROME1"},
    "ct_padded_low": {"pixels": padded(-2000, -1000, 900), "PixelPaddingValue": -2000},
    "ct_padded_high": {"pixels": padded(63536, 0, 2400), "PixelPaddingValue": 63536},
    "ct_padded_inside": {"pixels": padded(1024, 0, 2400), "PixelPaddingValue": 1024},
    "ct_padded_range": {
        "pixels": padded(1026, 0, 2400), "PixelPaddingValue": 1020, "PixelPaddingRangeLimit": 1030
    },
    "mr": {"Modality": "MR", "pixels": rings(0, 1500)},
    "mr_rescaled": {"Modality": "MR", "pixels": rings(0, 1500), "RescaleSlope": 2.5, "RescaleIntercept": -100},
    "mr_negative_slope": {"Modality": "MR", "pixels": rings(0, 1500), "RescaleSlope": -1, "RescaleIntercept": 0},
    "mr_monochrome1": {
        "Modality": "MR", "pixels": rings(0, 1500), "PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11
    },
    "mr_monochrome1_padded": {
        "Modality": "MR", "pixels": padded(4000), "PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": 4000,
        "BitsStored": 12, "HighBit": 11,
    },
    "mr_padded": {"Modality": "MR", "pixels": padded(40), "PixelPaddingValue": 40},
    "mr_padded_inside": {"Modality": "MR", "pixels": padded(800), "PixelPaddingValue": 800},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_dicom_file_gives_what_training_sees(name: str, load, write_dicom, tmp_path: Path) -> None:  # noqa: F811
    import pydicom

    path = write_dicom(tmp_path / "slice.dcm", **FILES[name])
    wanted = ingest_view(path, name[:2].upper())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a header is no guess
        found = load(hu="auto")([path, str(path), pydicom.dcmread(path)])["pixel_values"]
    for one in found:
        np.testing.assert_allclose(one[0], wanted, rtol=0, atol=TOLERANCE)


def test_hu_below_air_are_air_also_in_a_wider_window(load, write_dicom, tmp_path: Path) -> None:  # noqa: F811
    path = write_dicom(tmp_path / "slice.dcm", rings(-2000, 900))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = load(hu=True, hu_window=[-1500, 500])
    wanted = ingest_view(path, "CT", settings=dataclasses.replace(AUGMENT, hu_window=(-1500, 500)))
    np.testing.assert_allclose(processor(path)["pixel_values"][0, 0], wanted, rtol=0, atol=TOLERANCE)
    assert code.AIR_HU == stored_values.AIR_HU and code.HIGHEST_HU == stored_values.HIGHEST_HU
    assert code.CLOSE == stored_values.CLOSE


@pytest.mark.parametrize(
    ("hu", "fields", "message"),
    [
        ("auto", {"RescaleSlope": None, "RescaleIntercept": None}, "a CT whose header gives no rescale to HU"),
        ("auto", {"RescaleType": "MGML"}, "a CT whose header gives no rescale to HU"),
        ("auto", {"Modality": None}, "a header without Modality; set hu"),
        (True, {"Modality": "MR"}, "an MR, whose values are not HU, but hu is True"),
        ("auto", {"RescaleSlope": 0}, "a RescaleSlope of 0"),
        ("auto", {"PhotometricInterpretation": "PALETTE COLOR"}, "a PhotometricInterpretation of PALETTE COLOR"),
    ],
)
def test_dicom_of_unknown_units_is_refused(hu, fields: dict, message: str, load, write_dicom, tmp_path: Path) -> None:  # noqa: F811
    path = write_dicom(tmp_path / "slice.dcm", rings(0, 2400), **fields)
    with pytest.raises(ValueError, match=f"image 0: {message}"):
        load(hu=hu)(path)


def test_ct_without_rescale_is_hu_where_the_values_prove_it(load, write_dicom, tmp_path: Path) -> None:  # noqa: F811
    pixels = np.round(ct_slice()).astype(np.int64)
    path = write_dicom(tmp_path / "slice.dcm", pixels, RescaleSlope=None, RescaleIntercept=None)
    np.testing.assert_array_equal(load(hu="auto")(path)["pixel_values"], load(hu=True)(pixels)["pixel_values"])


@pytest.mark.long
def test_real_dicom_files_give_what_training_sees(load, real_data: Path) -> None:
    """Files of several vendors, and frames of multi-frame objects, each with its own rescale."""
    import pydicom

    places = ("ct_philips_phantom_brain5mm", "mr_ge_wrist", "mr_prostatex_0000", "mr_vendors", "enhanced_multiframe")
    paths = [
        path for place in places for path in sorted((real_data / "dicom" / place).rglob("*"))[::5] if path.is_file()
    ]
    compared = frames = 0
    for path in paths:
        dataset = pydicom.dcmread(path, force=True)
        if dataset.get("Modality") not in ("CT", "MR") or int(dataset.get("NumberOfFrames", 1)) > 12:
            continue
        found = load(hu="auto")(dataset)["pixel_values"][0]
        volume = found if found.ndim == 4 else found[None]
        for number in {0, len(volume) - 1}:
            wanted = ingest_view(path, dataset.Modality, number)
            np.testing.assert_allclose(volume[number, 0], wanted, rtol=0, atol=TOLERANCE)
        compared, frames = compared + 1, frames + (len(volume) > 1)
    assert compared > 10 and frames
