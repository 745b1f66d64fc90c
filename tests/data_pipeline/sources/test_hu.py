"""HU are told from other values by where air and tissue lie. The values here are made without the code under test."""

import numpy as np
import pytest

from data_pipeline.sources import hu


def body(seed: int = 0) -> np.ndarray:
    """HU of a chest in air: 40 % air, 15 % lung, 15 % fat, 25 % soft tissue, 5 % bone, each with noise."""
    r = np.random.default_rng(seed)
    parts = [(-1000, 12, 4000), (-850, 40, 1500), (-100, 15, 1500), (45, 20, 2500), (600, 250, 500)]
    return np.rint(np.concatenate([r.normal(mean, spread, n) for mean, spread, n in parts]))


def profile(values: np.ndarray, **options: bool) -> hu.Profile:
    return hu.profile(*np.unique(values, return_counts=True), **options)


R = np.random.default_rng(1)
MR = np.abs(np.rint(np.concatenate([R.normal(20, 8, 4000), R.normal(600, 150, 6000)])))
PHASE = R.integers(-4096, 4095, 10_000)
LOSSY_PADDING = np.concatenate([np.clip(body(), -1024, None), R.normal(-3024, 40, 2700)])
VERTEBRA = np.rint(np.concatenate([R.normal(-90, 20, 2000), R.normal(50, 20, 6000), R.normal(350, 200, 2000)]))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (body(), "proved"),
        (np.clip(body(), -1024, 3071), "proved"),
        (np.append(body(), [-3024.0] * 2700), "proved"),  # padding outside the circle of reconstruction
        (np.append(body(), [-32768.0] * 2700), "proved"),
        (body()[body() > -300], "open"),  # a part of the body without air around
        (VERTEBRA, "open"),
        (body() + 1024, "refuted"),  # no rescale
        (np.clip(body() + 1024, 0, None), "refuted"),
        (np.append(np.clip(body() + 1024, 1, None), [-2000.0] * 2700), "refuted"),  # no rescale, and padded
        (body() - 1024, "refuted"),  # the intercept applied twice
        (np.clip(body(), -1024, None) - 1024, "refuted"),
        (PHASE, "refuted"),
        (MR, "refuted"),
        (R.integers(0, 255, 1000) - 1024, "refuted"),  # 8 bit with the intercept of a CT
    ],
)
def test_verdict_follows_where_air_and_tissue_lie(values: np.ndarray, verdict: str) -> None:
    assert hu.judge(profile(values)) == verdict


def test_lossy_padding_is_left_out_only_where_said() -> None:
    assert hu.judge(profile(LOSSY_PADDING)) == "refuted"
    assert hu.judge(profile(LOSSY_PADDING, lossy=True)) == "proved"


def test_profiles_add_up_to_that_of_all_pixels() -> None:
    parts = [body(1), np.append(body(2), [-2048.0] * 900), VERTEBRA]
    total = sum(map(profile, parts), hu.EMPTY)
    everything = np.concatenate([parts[0], body(2), VERTEBRA])
    assert total.padding == 900
    assert (total.low, total.high) == (everything.min(), everything.max())
    for low, high in ((-1050, -950), (-130, 90), (850, 9000), (-9000, -150)):
        expected = np.mean((everything >= low) & (everything < high))
        assert total.share(low, high) == pytest.approx(expected, abs=1e-12)


def test_profile_of_padding_alone_is_empty() -> None:
    one = profile(np.full(50, -3024.0))
    assert (one.padding, one.share(-5000, 5000)) == (50, 0.0)
    assert hu.judge(hu.EMPTY) == "refuted"


@pytest.mark.parametrize(
    ("values", "ct"),
    [
        (body(), True),
        (np.append(body(), [-10_000.0] * 2700), True),
        (np.append(VERTEBRA, [-1010.0, -600.0]), True),
        (PHASE, False),
        (MR, False),
        (R.normal(0, 250, 10_000).clip(-950, 950), False),  # a field map, Hz
        (R.normal(0, 30, 10_000).clip(-60, 60), False),
    ],
)
def test_volume_without_modality_is_ct_only_where_values_say_so(values: np.ndarray, ct: bool) -> None:
    assert hu.is_ct(*np.unique(values, return_counts=True)) is ct


def test_slice_of_bone_or_air_alone_contradicts_nothing() -> None:
    bone = R.normal(700, 200, 4000)
    assert not hu.contradicts(profile(bone))
    assert not hu.contradicts(profile(R.normal(-1000, 20, 4000)))
    assert not hu.contradicts(profile(VERTEBRA))
    assert hu.contradicts(profile(body() - 1024))
    assert hu.contradicts(profile(body() + 1024))
