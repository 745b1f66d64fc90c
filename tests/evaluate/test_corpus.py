"""Images of a task that are in a pretraining corpus."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from curia_common.errors import UserError
from curia_jax.evaluate import __main__ as evaluate
from curia_jax.evaluate.corpus import Corpus
from data_pipeline.format.shards import SliceSource
from tests.evaluate import published
from tests.evaluate.test_command import save_checkpoint


def test_slice_of_the_corpus_is_found_and_its_changes_are_not(tiny_shards) -> None:
    corpus, source = Corpus.open(str(tiny_shards)), SliceSource(tiny_shards, "train")
    for number in range(len(source)):
        values = source[number].real.astype(np.float32)
        assert corpus.has(values)
        changed = values.copy()
        changed[3, 4] += 1
        assert not corpus.has(changed) and not corpus.has(values[:, :-1])
        if not np.allclose(values, values[::-1]):
            assert not corpus.has(values[::-1])  # same mean and deviation


def test_folder_that_is_no_corpus_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no shards in"):
        Corpus.open(str(tmp_path))


@pytest.mark.long
def test_planted_images_are_counted_and_named(tiny_shards, tmp_path, capsys) -> None:
    source = SliceSource(tiny_shards, "train")
    ct = [n for n in range(len(source)) if source[n].facts.hu]
    splits = published.task(per_patient=1)
    planted = {"test": (2, 7), "train": (5,)}
    for (split, row), number in zip([(s, r) for s, rows in planted.items() for r in rows], ct, strict=False):
        splits[split][row]["image"] = source[number].real.astype(np.float32)
    published.write(tmp_path / "data/ich", splits)
    save_checkpoint(tmp_path / "run")
    words = [*published.words(tmp_path), "--tasks=ich"]
    words += ["--floors=", "--heads=ridge", "--features=mean", "--draws=50"]
    assert evaluate.main([*words, f"--corpus={tiny_shards}"]) == 0
    told = "2 test images (test 2, test 7) and 1 to learn from are in the pretraining corpus"
    assert told in capsys.readouterr().err
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert {(row["in_corpus"], tuple(row["in_corpus_first"])) for row in rows} == {(2, ("test 2", "test 7"))}
    cases = pq.read_table(tmp_path / "out/ich/ours-predictions.parquet").to_pylist()
    assert {case["slice"] for case in cases if case["in_corpus"]} == {2, 7}
    assert "2 test images in the pretraining corpus: test 2, test 7." in (tmp_path / "out/report.html").read_text()
