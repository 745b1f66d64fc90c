"""What the pictures show: classes that pixels tell better than chance, and brightness alone hardly."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import ndimage, stats
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from data_pipeline.synthetic_tasks import findings, tasks
from data_pipeline.synthetic_tasks.pictures import Picture

TASKS = {task.config: task for task in tasks.TASKS}


def patients(config: str, split: str, count: int, size: int = 32) -> list[Picture]:
    """The first picture of each of `count` patients."""
    every = tasks.draw(TASKS[config], split, count, seed=0, size=size)
    return [pictures[0] for pictures in itertools.islice(every, count)]


def targets(pictures: list[Picture]) -> np.ndarray:
    return np.array([p.target for p in pictures], float)


def masked(p: Picture) -> np.ndarray:
    assert p.mask is not None
    return p.mask == 1


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's."""
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def pixels(pictures: list[Picture]) -> np.ndarray:
    """The image in 16 x 16 px; of a volume, its middle slice."""
    images = [p.image if p.image.ndim == 2 else p.image[..., p.image.shape[2] // 2] for p in pictures]
    return np.array([image.reshape(16, 2, 16, 2).mean(axis=(1, 3)).ravel() for image in images])


def auroc(config: str, *, shuffled: bool) -> float:
    """Of a ridge classifier on pixels: 120 patients to learn from, 60 to test; one against the rest."""
    train, test = patients(config, "train", 120), patients(config, "test", 60)
    known, truth = targets(train), targets(test)
    if shuffled:
        np.random.default_rng(0).shuffle(known)
    scale = StandardScaler().fit(pixels(train))
    model = RidgeClassifier(alpha=300).fit(scale.transform(pixels(train)), known)
    scores = model.decision_function(scale.transform(pixels(test)))
    if scores.ndim == 1:
        return float(roc_auc_score(truth, scores))
    return float(np.mean([roc_auc_score(truth == c, scores[:, c]) for c in range(scores.shape[1])]))


@pytest.mark.parametrize("config", ["oasis", "covidx-ct", "emidec-classification-mask"])
def test_pixels_tell_classes_better_than_chance(config: str) -> None:
    assert auroc(config, shuffled=False) > 0.68
    # 60 patients: the standard error of an AUROC of 0.5 is 0.075 for two classes of 30.
    assert 0.3 < auroc(config, shuffled=True) < 0.7


def test_kidney_lesions_overlap_in_hu() -> None:
    lesions = patients("kits", "train", 60)
    brightness = [p.image[masked(p)].mean() for p in lesions]
    assert 0.25 < roc_auc_score(targets(lesions), brightness) < 0.75


def test_malignant_nodules_have_less_compact_outlines() -> None:
    nodules = patients("luna16", "train", 40, size=64)
    # Share of a nodule, brighter than its halo and darker than vessels, that an opening leaves: high for balls, low for spikes.
    bright = [(p.image > -80) & (p.image < 100) & masked(p) for p in nodules]
    compact = [ndimage.binary_opening(where, iterations=4).sum() / where.sum() for where in bright]
    assert roc_auc_score(targets(nodules), -np.array(compact)) > 0.8


@pytest.mark.parametrize("config", ["luna16", "luna16-3D", "kneeMRI"])
def test_amounts_of_bright_and_dark_tissue_hardly_tell_classes(config: str) -> None:
    pictures = patients(config, "train", 90, size=64)
    positive = targets(pictures) > 0
    # The darkest tissue of the mask is ligament, or lung; the brightest fluid, or nodule and vessels.
    dark, bright = (-600, -50) if config.startswith("luna16") else (200, 700)
    for tissue in (lambda image: image < dark, lambda image: image > bright):
        shares = [tissue(p.image)[masked(p)].mean() for p in pictures]
        # 90 patients: the standard error of an AUROC of 0.5 is 0.06.
        assert 0.3 < roc_auc_score(positive, shares) < 0.7


def test_brain_shrinks_with_age() -> None:
    heads = patients("ixi", "train", 40)
    # Dark inside of the head: ventricles and the fluid around the brain.
    fluid = []
    for p in heads:
        inside = np.zeros(p.image.shape, bool)
        ndimage.binary_fill_holes(p.image > 120, output=inside)
        fluid.append((p.image[inside] < 300).mean())
    assert correlation(fluid, targets(heads).tolist()) > 0.5


def test_large_tumours_shorten_survival() -> None:
    cases = patients("tcia-survival", "train", 80)
    assert 0.4 < sum(p.columns["event"] == 1 for p in cases) / len(cases) < 0.95
    dead = [p for p in cases if p.columns["event"]]
    assert correlation([float(masked(p).sum()) for p in dead], targets(dead).tolist()) < -0.2


def test_lesion_lies_in_the_named_site() -> None:
    for p in patients("deep-lesion-site", "train", 48, size=64):
        surroundings = p.image[ndimage.binary_dilation(masked(p), iterations=2) & ~masked(p)]
        if findings.SITES[int(targets([p])[0])] == "lung":
            assert np.median(surroundings) < -500
        elif findings.SITES[int(targets([p])[0])] == "liver":
            assert 40 < np.median(surroundings) < 200
