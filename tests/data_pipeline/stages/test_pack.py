"""Encoded slices in a spool, what they add up to, and the records made of them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curia_common.errors import StorageError
from data_pipeline.format import codec, records
from data_pipeline.stages import card, pack, statistics
from data_pipeline.stages.pack import EncodedSlice, SeriesIdentity, Spool, Tally

HU, STEEP = (1.0, -1024.0), (2.0, -50.0)
IDENTITY = SeriesIdentity("5e", "9a", "CT", "HU", "axial", "chest", "ge", 2.5, "proved")


def pixels(number: int, shape: tuple[int, int] = (4, 5)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 90, shape).astype(np.uint16)


def encoded(spool: Spool, number: int, **changes: Any) -> EncodedSlice:
    """Slice `number` of a series in HU; `changes` are fields of EncodedSlice."""
    values = pixels(number, changes.get("shape", (4, 5)))
    fields: dict[str, Any] = {
        "place": spool.add(codec.encode(values)), "shape": values.shape, "index": number, "position": 2.5 * number, "scale": HU,
        "flags": 0, "source": f"{number:016x}", "spacing": (0.5, 0.75), "labels": {}, "path": f"/in/{number}.dcm",
        "statistics": statistics.slice_statistics(values, *changes.get("scale", HU)),
    }  # fmt: skip
    return EncodedSlice(**fields | changes)


# ---- spool


@pytest.mark.parametrize("in_memory", [0, 10**6])
def test_spool_gives_back_every_slice_in_any_order(tmp_path: Path, monkeypatch, in_memory: int) -> None:
    monkeypatch.setattr(pack, "SPOOL_BYTES", in_memory)
    with Spool(tmp_path) as spool:
        places = [spool.add(data) for data in (b"first", b"", b"third")]
        assert spool.read(places[2]) == b"third"
        places.append(spool.add(b"fourth"))  # reading does not move the end
        assert [spool.read(place) for place in reversed(places)] == [b"fourth", b"third", b"", b"first"]
        one = encoded(spool, 1)
        np.testing.assert_array_equal(spool.pixels(one), pixels(1))
    assert list(tmp_path.iterdir()) == []


def test_full_scratch_disk_is_a_storage_error(tmp_path: Path, monkeypatch) -> None:
    def full(*unused: object) -> None:
        raise OSError(28, "No space left on device")

    with Spool(tmp_path) as spool:
        place = spool.add(b"first")
        monkeypatch.setattr(pack.tempfile.SpooledTemporaryFile, "seek", full)
        for call in (lambda: spool.add(b"second"), lambda: spool.read(place)):
            with pytest.raises(StorageError, match=r"scratch disk is full \(No space left on device\)"):
                call()


# ---- tally


def test_tally_adds_pixels_by_scale_and_takes_them_out_again() -> None:
    tally = Tally()
    short, long = np.array([1, 2]), np.array([0, 5, 0, 7])
    for scale, histogram in ((HU, short), (HU, long), (STEEP, short)):
        tally.count(scale, histogram)
    assert tally.histograms[HU].tolist() == [1, 7, 0, 7]
    tally.discount(HU, long)
    assert tally.histograms[HU].tolist() == [1, 2]  # as long as the highest value needs
    tally.discount(STEEP, short)
    assert set(tally.histograms) == {HU}
    assert (short.tolist(), long.tolist()) == ([1, 2], [0, 5, 0, 7])


def test_tallies_of_files_add_up_to_that_of_their_series() -> None:
    whole, one = Tally(), Tally()
    whole.count(HU, np.array([1, 1]))
    whole.sources, one.sources = {"a"}, {"a", "b"}
    whole.left_out["constant"] = 1
    one.left_out.update({"constant": 2, "all air": 1})
    one.count(HU, np.array([0, 3]))
    one.count(STEEP, np.array([4]))
    whole.add(one)
    assert {scale: histogram.tolist() for scale, histogram in whole.histograms.items()} == {HU: [1, 4], STEEP: [4]}
    assert whole.sources == {"a", "b"} and whole.left_out == {"constant": 3, "all air": 1}
    whole.count(STEEP, np.array([4]))
    assert one.histograms[STEEP].tolist() == [4]


# ---- records


def packed(
    slices: list[EncodedSlice], per_record: int, spool: Spool
) -> list[tuple[records.Record, list[pack.IndexRow]]]:
    tally = Tally()
    for one in slices:
        tally.count(one.scale, np.bincount(spool.pixels(one).ravel()))
    made = list(pack.pack(IDENTITY, slices, tally.histograms, per_record, spool))
    return [(records.parse(one.data), one.rows) for one in made]


def test_neighbours_that_differ_share_no_record(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        changes: list[dict[str, Any]] = [
            {}, {}, {}, {"shape": (3, 5)}, {"scale": STEEP}, {"spacing": (1.0, 1.0)}, {"plane": "coronal", "step": 0.5},
            {"plane": "coronal", "step": 0.5}, {},
        ]  # fmt: skip
        slices = [encoded(spool, number, **change) for number, change in enumerate(changes)]
        found = packed(slices, 2, spool)
    assert [[entry.index for entry in record.entries] for record, _ in found] == [
        [0, 1],
        [2],
        [3],
        [4],
        [5],
        [6, 7],
        [8],
    ]
    assert [row["slot"] for _, rows in found for row in rows] == [0, 1, 0, 0, 0, 0, 0, 1, 0]
    for record, _ in found:
        for data, entry in zip(record.slices, record.entries, strict=True):
            shape = slices[entry.index].shape
            np.testing.assert_array_equal(codec.decode(data), pixels(entry.index, shape))
    headers = [record.header for record, _ in found]
    assert [header.plane for header in headers] == ["axial"] * 5 + ["coronal", "axial"]
    assert [header.spacing[2] for header in headers] == [2.5] * 5 + [0.5, 2.5]
    assert [(header.slope, header.intercept) for header in headers[2:4]] == [HU, STEEP]


def test_series_statistics_are_those_of_the_real_values_of_all_slices(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        scales = [HU, HU, STEEP]
        found = packed([encoded(spool, number, scale=scale) for number, scale in enumerate(scales)], 1, spool)
    real = [pixels(number).astype(np.float64) * slope + intercept for number, (slope, intercept) in enumerate(scales)]
    for record, _ in found:
        assert record.header.series_mean == pytest.approx(np.mean(real), rel=1e-6)
        assert record.header.series_std == pytest.approx(np.std(real), rel=1e-6)


def test_labels_and_path_are_in_the_row_and_not_in_the_record(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        one = encoded(spool, 0, labels={"lesion": 1, "grade": None}, path="/in/M\udcfcller.dcm")
        ((_, (row,)),) = packed([one], 1, spool)
        (made,) = pack.pack(IDENTITY, [one], {HU: np.bincount(pixels(0).ravel())}, 1, spool)
    assert (row["label_lesion"], row["label_grade"], row["units_evidence"]) == (1, None, "proved")
    assert row[pack.PATH] == os.fsencode("/in/M\udcfcller.dcm")  # a name that is no UTF-8
    assert b"ller.dcm" not in made.data and b"lesion" not in made.data
    assert (row["series"], row["height"], row["width"], row["position"]) == ("5e", 4, 5, 0.0)


# ---- scales


def test_slices_that_differ_by_whole_steps_get_one_scale(tmp_path: Path) -> None:
    lower, higher = (2.0, -50.0), (2.0, -44.0)
    with Spool(tmp_path) as spool:
        slices = [encoded(spool, 0, scale=higher), encoded(spool, 1, scale=lower)]
        histograms = {one.scale: np.bincount(spool.pixels(one).ravel()) for one in slices}
        moved, joined = pack.align(slices, histograms, spool)
        assert [one.scale for one in moved] == [lower, lower]
        np.testing.assert_array_equal(spool.pixels(moved[0]), pixels(0) + 3)
        np.testing.assert_array_equal(spool.pixels(moved[1]), pixels(1))
    both = np.concatenate([pixels(0).ravel() + 3, pixels(1).ravel()])
    assert {scale: histogram.tolist() for scale, histogram in joined.items()} == {lower: np.bincount(both).tolist()}


@pytest.mark.parametrize(
    "other", [(1.0, -44.0), (2.0, -45.0), (2.0, 200_000.0)], ids=["slope", "half a step", "too far"]
)
def test_slices_keep_scales_that_do_not_meet(tmp_path: Path, other: tuple[float, float]) -> None:
    with Spool(tmp_path) as spool:
        slices = [encoded(spool, 0, scale=(2.0, -50.0)), encoded(spool, 1, scale=other)]
        histograms = {one.scale: np.bincount(spool.pixels(one).ravel()) for one in slices}
        moved, kept = pack.align(slices, histograms, spool)
    assert moved == slices and kept.keys() == histograms.keys()


def test_intensities_of_a_series_are_in_hu_or_relative_to_its_percentiles() -> None:
    histogram = np.zeros(2049, np.int64)
    histogram[[1024, 1074]] = (3, 5)  # 0 and 50 HU
    kind, bins = pack.intensities("HU", {HU: histogram, (1.0, -1074.0): histogram})
    assert kind == "HU" and bins.sum() == 16
    kind, bins = pack.intensities("arbitrary", {HU: histogram})
    assert kind == "relative" and bins.sum() == 8
    found = {round(float(card.EDGES["relative"][n]), 3): int(bins[n]) for n in np.flatnonzero(bins)}
    assert found == {0.0: 3, 1.0: 5}
