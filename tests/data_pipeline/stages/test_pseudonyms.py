import os
import stat
from pathlib import Path

import pytest

from curia_common.errors import UserError
from data_pipeline.stages import pseudonyms

KEY = b"0123456789abcdef"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pseudonyms.KEY_VARIABLE, raising=False)


def test_key_file_precedes_variable_precedes_default_file(tmp_path, monkeypatch) -> None:
    output = tmp_path / "out"
    made, origin, file = pseudonyms.load_key(None, str(output))
    assert file is not None and file.read_bytes().strip() == made
    assert "new key in" in origin and str(tmp_path / "out.key") in origin
    assert len(made) == 64
    assert stat.S_IMODE((tmp_path / "out.key").stat().st_mode) == 0o600
    again, origin, file = pseudonyms.load_key(None, f"{output}/")
    assert file is None
    assert again == made and "new" not in origin
    monkeypatch.setenv(pseudonyms.KEY_VARIABLE, "of the variable, long enough")
    assert pseudonyms.load_key(None, str(output))[0] == b"of the variable, long enough"
    (tmp_path / "key").write_text("of the file, long enough\n")
    assert pseudonyms.load_key(str(tmp_path / "key"), str(output))[0] == b"of the file, long enough"


def test_new_keys_differ(tmp_path: Path) -> None:
    assert pseudonyms.load_key(None, str(tmp_path / "a"))[0] != pseudonyms.load_key(None, str(tmp_path / "b"))[0]


def test_output_given_as_dot_has_its_key_beside_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    pseudonyms.load_key(None, ".")
    assert os.listdir(tmp_path / "out") == []
    assert (tmp_path / "out.key").is_file()


def test_missing_short_or_inside_keys_are_rejected(tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(UserError, match="no key file .*openssl rand"):
        pseudonyms.load_key(str(tmp_path / "none"), str(output))
    (tmp_path / "short").write_text("   abc \n")
    with pytest.raises(UserError, match="3 bytes.*at least 16"):
        pseudonyms.load_key(str(tmp_path / "short"), str(output))
    (output / "key").write_text("x" * 32)
    with pytest.raises(UserError, match="inside the dataset"):
        pseudonyms.load_key(str(output / "key"), str(output))
    (tmp_path / "out.key").write_text("")
    with pytest.raises(UserError, match="0 bytes"):
        pseudonyms.load_key(None, str(output))
    monkeypatch.setenv(pseudonyms.KEY_VARIABLE, "")
    with pytest.raises(UserError, match="CURIA_KEY has 0 bytes"):
        pseudonyms.load_key(None, str(output))


def test_digest_depends_on_key_kind_and_value_alone() -> None:
    one = pseudonyms.digest(KEY, "patient", "Doe")
    assert one == pseudonyms.digest(KEY, "patient", "Doe")
    others = [(b"another key", "patient", "Doe"), (KEY, "series", "Doe"), (KEY, "patient", "doe")]
    assert len({one, *(pseudonyms.digest(*words) for words in others)}) == 4
    assert len(one) == 16 and set(one) <= set("0123456789abcdef")
    assert pseudonyms.digest(KEY, "patient", os.fsdecode(b"M\xfcller"))  # a file name in Latin-1


def test_digests_equal_those_of_earlier_versions() -> None:
    # With the same key a patient keeps pseudonym and split in every build and version: HMAC-SHA256 of "kind:value".
    assert pseudonyms.digest(KEY, "patient", "P1") == "ecc1201c946e5390"


def test_splits_have_their_shares() -> None:
    patients = [pseudonyms.digest(KEY, "patient", str(n)) for n in range(4000)]
    small = [pseudonyms.split_of(KEY, patient, 0.1, 0.1) for patient in patients]
    # 4,000 draws: three standard deviations of a share of 0.1 are 0.014.
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert small.count(split) / 4000 == pytest.approx(share, abs=0.02)
    # A larger validation set takes from train alone: the test set is never trained on.
    large = [pseudonyms.split_of(KEY, patient, 0.3, 0.1) for patient in patients]
    moved = {(a, b) for a, b in zip(small, large, strict=True) if a != b}
    assert moved == {("train", "validation")}
    assert {pseudonyms.split_of(KEY, patient, 0.0, 0.0) for patient in patients} == {"train"}
