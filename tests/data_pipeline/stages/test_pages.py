import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data_pipeline import synthetic_exams
from data_pipeline.stages import pages
from tests.data_pipeline.text_pages import page_of_text


def is_page(pixels: np.ndarray) -> bool:
    pixels = pixels.astype(np.uint16)
    return pages.is_page(pixels, *np.unique(pixels, return_counts=True))


def jpeg(page: np.ndarray) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(page).save(data, "JPEG", quality=80)
    return np.asarray(Image.open(data))


def smaller(page: np.ndarray) -> np.ndarray:
    size = (len(page) * 3 // 4,) * 2
    return np.rint(Image.fromarray(page.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)).clip(0, 255)


@pytest.mark.parametrize(
    "change",
    [lambda p: p * np.uint16(16), lambda p: 255 - p, jpeg, smaller, lambda p: p.astype(np.uint16) + 900],
    ids=["bright", "black on white", "jpeg", "resampled", "on grey"],
)
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(("side", "size"), [(128, 12), (512, 12), (512, 24), (1024, 16)])
def test_pages_of_text_are_recognised(side: int, size: int, table: bool, change) -> None:
    assert is_page(change(page_of_text(side, size, table=table)))


def test_faint_text_under_a_bright_heading_is_recognised() -> None:
    page = page_of_text(512, 14, level=150).copy()
    page[:60] = 0
    page[10:40, 10:300] = page_of_text(512, 26)[4:34, 6:296]
    assert is_page(page)


@pytest.mark.parametrize(("region", "contrast"), [(region, contrast) for region, contrast, _ in synthetic_exams.SERIES])
def test_anatomy_on_a_constant_background_is_no_page(region: str, contrast: str) -> None:
    volume = synthetic_exams.make(0, 1, region, contrast, size=96, slices=8)
    values = volume.values - volume.values.min()
    for one, labels in zip(values, volume.labels, strict=True):
        assert not is_page(np.where(labels > 0, one + 1, 0))  # a mask took the air away
        assert not is_page(np.maximum(one - np.percentile(one, 60), 0))


def test_specks_bars_and_masks_are_no_pages() -> None:
    rng = np.random.default_rng(0)
    noise = rng.rayleigh(20, (256, 256))
    assert not is_page(np.where(noise > 60, noise, 0))  # what thresholding left of it
    ramps = np.zeros((128, 128))
    ramps[10:120:20] = 100
    assert not is_page(ramps)  # rules without letters
    mask = ndimage.gaussian_filter(rng.normal(size=(256, 256)), 12) > 0.02
    assert not is_page(mask * 100)
    assert not is_page(np.eye(64) * 50) and not is_page(np.full((40, 40), 7))
