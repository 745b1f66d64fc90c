"""Maps of the classes that tasks share."""

from pathlib import Path

import pytest

from curia_common.errors import UserError
from curia_jax.evaluate.class_map import ClassMap

TASKS = ("anatomy-ct", "anatomy-mri")
HEAD = "class,anatomy-ct,anatomy-mri\n"


def read(tmp_path: Path, text: str) -> ClassMap:
    (tmp_path / "map.csv").write_text(text)
    return ClassMap.read(str(tmp_path / "map.csv"), TASKS)


def test_shipped_map_merges_what_mr_does_not_tell_apart() -> None:
    shipped = ClassMap.read(None, TASKS)
    found = shipped.shared(
        {
            "anatomy-ct": [
                "liver",
                "lung_upper_lobe_right",
                "lung_middle_lobe_right",
                "vertebrae_L1",
                "vertebrae_T12",
                "sternum",
            ],
            "anatomy-mri": ["liver", "lung_right", "vertebrae", "intervertebral_discs"],
        }
    )
    assert found == {
        "anatomy-ct": {
            "liver": "liver", "lung_upper_lobe_right": "lung_right", "lung_middle_lobe_right": "lung_right",
            "vertebrae_L1": "vertebrae", "vertebrae_T12": "vertebrae",
        },
        "anatomy-mri": {"liver": "liver", "lung_right": "lung_right", "vertebrae": "vertebrae"},
    }  # fmt: skip
    # Left stays left, and no side is shared with the other.
    for row in shipped.rows:
        for side in ("left", "right"):
            names = [name for names in row.of_task.values() for name in names]
            assert all(name.endswith(side) == row.name.endswith(side) for name in names)


def test_own_map_by_numbers_matches_numbers_in_any_writing(tmp_path: Path) -> None:
    found = read(tmp_path, HEAD + "liver,7,3\nlung,8; 09,4\n").shared(
        {"anatomy-ct": ["007", "008", "009"], "anatomy-mri": ["3", "4"]}
    )
    assert found == {
        "anatomy-ct": {"007": "liver", "008": "lung", "009": "lung"},
        "anatomy-mri": {"3": "liver", "4": "lung"},
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("lever,lever,liver", r"map.csv line 3 \(lever\): anatomy-ct has no class 'lever'; it has: liver, spleen"),
        ("liver,liver,5", r"line 3 \(liver\): anatomy-mri has no class '5'; it has: liver, spleen"),
    ],
)
def test_own_map_that_the_data_contradicts_is_refused_by_row(tmp_path: Path, row: str, message: str) -> None:
    names = ["liver", "spleen"]
    with pytest.raises(UserError, match=message):
        read(tmp_path, HEAD + f"spleen,spleen,spleen\n{row}\n").shared({"anatomy-ct": names, "anatomy-mri": names})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "organ,anatomy-ct,anatomy-mri\n",
            "has no column 'class'; found: organ, anatomy-ct, anatomy-mri; wanted: class,",
        ),
        ("class,anatomy-ct\n", "has no column 'anatomy-mri'"),
        ("", "has no column 'class'; found: none"),
        (HEAD + "liver,1,\n", "line 2 has an empty anatomy-mri"),
        (HEAD + "liver,1,1\nspleen,1,2\n", "line 3: anatomy-ct '1' is in line 2 too"),
        (HEAD + "liver,1,1\nliver,2,2\n", "line 3: class 'liver' is in line 2 too"),
    ],
)
def test_malformed_map_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_data_that_shares_one_class_is_refused() -> None:
    with pytest.raises(
        UserError, match="finds 1 classes that anatomy-ct and anatomy-mri share: anatomy-ct has liver, x; anatomy-mri"
    ):
        ClassMap.read(None, TASKS).shared({"anatomy-ct": ["liver", "x"], "anatomy-mri": ["liver", "y"]})
