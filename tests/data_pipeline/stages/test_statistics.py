import numpy as np
import pytest

from data_pipeline.stages import statistics

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, -1024.0), (0.37, 5.0)])
def test_statistics_are_those_of_real_values(slope: float, intercept: float) -> None:
    stored = RANDOM.gamma(2.0, 300.0, (90, 110)).astype(np.uint16)
    real = stored * slope + intercept
    one = statistics.slice_statistics(stored, slope, intercept)
    whole = statistics.series_statistics({(slope, intercept): np.bincount(stored.ravel(), minlength=1 << 16)})
    # A percentile is the value of a pixel: within a step of numpy's, which lies between two pixels.
    low, middle, high = np.percentile(real, [0.5, 50, 99.5], method="inverted_cdf")
    assert (one.low, one.high) == (pytest.approx(low), pytest.approx(high))
    assert whole.percentiles == (pytest.approx(low), pytest.approx(middle), pytest.approx(high))
    for found in (one, whole):
        assert (found.mean, found.std) == (pytest.approx(real.mean()), pytest.approx(real.std()))


def test_body_box_bounds_the_body() -> None:
    stored = np.full((60, 80), 24, np.uint16)
    stored[10:41, 20:66] = 1100
    assert statistics.slice_statistics(stored, 1.0, -1024.0).body_box == (10, 20, 41, 66)


def test_series_statistics_join_slices_of_several_scales() -> None:
    scales = [(1.0, 0.0), (0.5, -40.0), (2.25, 10.0)]
    slices = [RANDOM.gamma(2.0, 300.0, (50, 60)).astype(np.uint16) for _ in scales]
    whole = statistics.series_statistics(
        {scale: np.bincount(one.ravel()) for scale, one in zip(scales, slices, strict=True)}
    )
    real = np.concatenate([(one * scale[0] + scale[1]).ravel() for scale, one in zip(scales, slices, strict=True)])
    assert whole.percentiles == pytest.approx(np.percentile(real, [0.5, 50, 99.5], method="inverted_cdf"))
    assert (whole.mean, whole.std) == (pytest.approx(real.mean()), pytest.approx(real.std()))
