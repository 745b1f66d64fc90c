"""Cox regression against lifelines, scikit-survival and a numerical optimum."""

import numpy as np
import pytest
import scipy.optimize

from curia_jax.evaluate import probes, selection, survival
from curia_jax.evaluate.targets import Times


def a_study(n: int = 120, d: int = 4, seed: int = 0, ties: bool = True):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    time = rng.exponential(np.exp(-x[:, 0] + 0.5 * x[:, 1]))
    censored = rng.exponential(2.0, n)
    event, time = time <= censored, np.minimum(time, censored)
    return x, np.ceil(10 * time) / 10 if ties else time + 1e-6, event


def likelihood_by_loop(log_risk, time, event) -> float:
    """Efron's approximation, written out."""
    total = 0.0
    for moment in np.unique(time[event]):
        tied = np.flatnonzero(event & (time == moment))
        at_risk = np.exp(log_risk[time >= moment]).sum()
        for gone in range(len(tied)):
            total -= np.log(at_risk - gone / len(tied) * np.exp(log_risk[tied]).sum())
        total += log_risk[tied].sum()
    return total


@pytest.mark.parametrize("ties", [False, True])
def test_partial_likelihood_equals_loop(ties: bool) -> None:
    x, time, event = a_study(ties=ties)
    log_risk = x @ [1.0, -0.5, 0.2, 0.0] + 800  # large risks do not overflow
    found = survival.log_partial_likelihood(log_risk, time, event)
    assert found == pytest.approx(likelihood_by_loop(log_risk - 800, time, event), abs=1e-8)


def test_partial_likelihood_without_events_is_zero() -> None:
    assert survival.log_partial_likelihood(np.ones(3), np.ones(3), np.zeros(3, bool)) == 0


@pytest.mark.parametrize("penalty", [0.0, 7.0])
def test_cox_maximises_the_penalised_likelihood(penalty: float) -> None:
    x, time, event = a_study()

    def loss(coefficients):
        return penalty / 2 * coefficients @ coefficients - likelihood_by_loop(x @ coefficients, time, event)

    wanted = scipy.optimize.minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-7}).x
    np.testing.assert_allclose(survival.fit_cox(x, time, event, penalty), wanted, atol=1e-6)
    far = survival.fit_cox(x, time, event, penalty, np.full(4, 3.0))
    np.testing.assert_allclose(far, wanted, atol=1e-6)


def test_cox_with_more_features_than_cases_is_finite() -> None:
    x, time, event = a_study(n=30, d=60)
    assert np.isfinite(survival.fit_cox(x, time, event, 3.0)).all()


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_cox_equals_lifelines(penalty: float) -> None:
    lifelines = pytest.importorskip("lifelines", reason="lifelines is not installed")
    pandas = pytest.importorskip("pandas")
    x, time, event = a_study()
    table = pandas.DataFrame(x, columns=list("abcd")).assign(time=time, event=event)
    fitter = lifelines.CoxPHFitter(penalizer=penalty).fit(table, "time", "event", fit_options={"precision": 1e-12})
    # lifelines divides the likelihood by the cases, and penalises coefficients of features with a sample deviation of 1.
    scale = x.std(axis=0, ddof=1)
    found = survival.fit_cox(x / scale, time, event, penalty * len(x)) / scale
    np.testing.assert_allclose(found, fitter.params_.to_numpy(), atol=1e-6)


@pytest.mark.parametrize("penalty", [0.0, 5.0])
def test_cox_equals_scikit_survival(penalty: float) -> None:
    linear_model = pytest.importorskip(
        "sksurv.linear_model", reason="scikit-survival is not installed (GPL, tests only)"
    )
    x, time, event = a_study()
    outcome = np.array(list(zip(event, time, strict=True)), dtype=[("event", bool), ("time", float)])
    wanted = linear_model.CoxPHSurvivalAnalysis(alpha=penalty, ties="efron", tol=1e-12).fit(x, outcome).coef_
    np.testing.assert_allclose(survival.fit_cox(x, time, event, penalty), wanted, atol=1e-6)


def test_cox_head_ranks_test_cases_and_chooses_on_validation() -> None:
    x, time, event = a_study(n=240, d=20)
    bank = selection.bank(x[:160], Times(time[:160], event[:160]), np.arange(160), np.arange(160) >= 110)
    found = probes.cox(bank, x[160:])
    assert bank.selection == "validation split" and found.chosen["penalty_per_case"] in probes.COX_PENALTIES
    risk = x[160:, 0] - 0.5 * x[160:, 1]
    assert np.corrcoef(found.scores[:, 0], risk)[0, 1] > 0.75
    # The loss is that of the coefficients fitted on the first 110 alone.
    mean, deviation = x[:110].mean(axis=0), x[:110].std(axis=0)
    penalty = 110 * found.chosen["penalty_per_case"]
    coefficients = survival.fit_cox((x[:110] - mean) / deviation, time[:110], event[:110], penalty)
    held = ((x[110:160] - mean) / deviation) @ coefficients
    wanted = -likelihood_by_loop(held, time[110:160], event[110:160]) / 50
    assert found.selection_loss == pytest.approx(wanted, rel=1e-6)


def test_cox_folds_keep_events_where_validation_has_none() -> None:
    x, time, event = a_study(n=60)
    bank = selection.bank(x, Times(time, event), np.arange(60), (np.arange(60) >= 40) & ~event)
    assert bank.selection == "5-fold over patients"
    assert all(event[held].any() for _, held in bank.folds)
