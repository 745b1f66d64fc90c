import os
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline.format import codec, records

RANDOM = np.random.default_rng(0)


def record(count: int) -> tuple[list[np.ndarray], dict, dict]:
    pixels = [RANDOM.integers(0, 3000, (33, 47)).astype(np.uint16) for _ in range(count)]
    whole = {name: f"{name} {count}" for name in records.TEXT} | {"units": "HU", "modality": "CT"}
    whole |= {"slope": 1.0, "intercept": -1024.0, "series_mean": 1.5, "series_std": 2.5}
    whole |= {"spacing": (0.5, 0.75, 3.0), "series_percentiles": (-1000.0, 0.0, 900.0)}
    each = {name: [n + 0.25 * i for i in range(count)] for n, name in enumerate(records.SLICE_NUMBERS)}
    each |= {"index": list(range(count)), "flags": [1] * count, "source": [f"s{i}" for i in range(count)]}
    each[records.SLICE_BOX] = [(i, 1, 20 + i, 30) for i in range(count)]
    return pixels, whole, each


@pytest.mark.parametrize("count", [1, 3])
def test_what_goes_in_comes_out(count: int) -> None:
    pixels, whole, each = record(count)
    data = records.serialize([codec.encode(p) for p in pixels], whole, each)
    for slot in range(count):
        found = records.parse_slice(data, slot)
        np.testing.assert_array_equal(found["pixels"], pixels[slot])
        assert (found["slope"], found["intercept"], found["hu"], found["modality"]) == (1.0, -1024.0, True, "CT")
        assert [found[name] for name in ("low", "high", "mean", "std")] == [
            each[n][slot] for n in ("low", "high", "mean", "std")
        ]
        assert found["body_box"].tolist() == list(each[records.SLICE_BOX][slot])
        assert found["spacing"].tolist() == [0.5, 0.75, 3.0]
        assert (found["series"], found["patient"]) == (whole["series"], whole["patient"])


@pytest.mark.parametrize("sizes", [[1], [0, 127, 128], [5] * 40, [16_383, 16_384, 2_100_000]])
def test_a_record_has_the_bytes_of_protobufs_deterministic_form(sizes: list[int]) -> None:
    _, whole, each = record(len(sizes))
    slices = [RANDOM.bytes(size) for size in sizes]
    data = records.serialize(slices, whole, each)
    example = records.proto.Example.FromString(data)
    assert list(example.features.feature["slices"].bytes_list.value) == slices
    assert example.SerializeToString(deterministic=True) == data
    assert {*example.features.feature} == {
        "slices", *records.TEXT, *records.NUMBERS, *records.VECTORS, *records.SLICE_NUMBERS, *records.SLICE_INTEGERS,
        *records.SLICE_TEXT, records.SLICE_BOX,
    }  # fmt: skip


def test_every_process_gives_the_same_bytes() -> None:
    # A protobuf map has another order in every process unless it is asked not to.
    code = (
        "import hashlib, numpy as np\nfrom data_pipeline import codec, records\n"
        "r = {name: 1 for name in (*records.TEXT, *records.NUMBERS)} | {n: [0] * k for n, k in records.VECTORS.items()}\n"
        "s = {name: [1] for name in (*records.SLICE_NUMBERS, *records.SLICE_INTEGERS, *records.SLICE_TEXT)}\n"
        "s[records.SLICE_BOX] = [(0, 0, 1, 1)]\n"
        "print(hashlib.sha256(records.serialize([codec.encode(np.zeros((4, 4), np.uint16))], r, s)).hexdigest())"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONHASHSEED": str(n)}
        )
        for n in range(4)
    ]
    assert len({one.communicate()[0] for one in running}) == 1
    assert all(one.returncode == 0 for one in running)


def test_lists_of_another_length_are_refused() -> None:
    pixels, whole, each = record(2)
    data = [codec.encode(p) for p in pixels]
    with pytest.raises(ValueError, match="spacing has 2 values, wanted 3"):
        records.serialize(data, whole | {"spacing": (1.0, 2.0)}, each)
    with pytest.raises(ValueError, match="flags has 1 entries for 2 slices"):
        records.serialize(data, whole, each | {"flags": [0]})


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, -1024.0), (0.37, 5.0)])
def test_statistics_are_those_of_the_real_values(slope: float, intercept: float) -> None:
    stored = RANDOM.gamma(2.0, 300.0, (90, 110)).astype(np.uint16)
    real = stored * slope + intercept
    one = records.slice_statistics(stored, slope, intercept)
    whole = records.series_statistics(np.bincount(stored.ravel(), minlength=1 << 16), slope, intercept)
    # A percentile is the value of a pixel: within a step of numpy's, which lies between two pixels.
    low, middle, high = np.percentile(real, [0.5, 50, 99.5], method="inverted_cdf")
    assert (one["low"], one["high"]) == (pytest.approx(low), pytest.approx(high))
    assert whole["series_percentiles"] == [pytest.approx(low), pytest.approx(middle), pytest.approx(high)]
    for found in ((one["mean"], one["std"]), (whole["series_mean"], whole["series_std"])):
        assert found == (pytest.approx(real.mean()), pytest.approx(real.std()))


def test_the_box_holds_the_body() -> None:
    stored = np.full((60, 80), 24, np.uint16)
    stored[10:41, 20:66] = 1100
    assert records.slice_statistics(stored, 1.0, -1024.0)["body_box"] == (10, 20, 41, 66)
