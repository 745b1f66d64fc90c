"""The time from SIGTERM to SIGKILL against the time that a save takes."""

import json
from pathlib import Path

import pytest

from curia_common.errors import UserError
from launch import cost, grace, spec
from tests.launch.test_cost import PLAN
from tests.launch.test_spec import made


def saves(run: Path, *seconds: float | None) -> spec.LaunchSpec:
    """A launch of a run that took so long to save; None is a save of a version that did not time it."""
    events = [{"event": "saved", "step": n} | ({} if s is None else {"seconds": s}) for n, s in enumerate(seconds)]
    lines = [json.dumps({"event": "started", "seconds": 9999}), *map(json.dumps, events), '{"event": "saved", "sec']
    (run / "events.jsonl").write_text("\n".join(lines))
    return made(f"pretrain --workdir={run}", target="local", grace_seconds=60)


def plan_of(tmp_path: Path, state_bytes: int) -> cost.Plan:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN | {"state_bytes": state_bytes, "overrides": []}))
    return cost.read(str(tmp_path / "plan.json"), made("pretrain --config=pretrain_vit_b16_224 --workdir=a"))


def test_grace_shorter_than_a_save_was_is_refused(tmp_path: Path) -> None:
    launch = saves(tmp_path, None, 12.0, 81.3, 14.0)
    with pytest.raises(UserError, match=r"--grace is 60 s, but a save of this run took 81 s, .* add --grace=130"):
        grace.check(launch, None, contact=False)


def test_slow_save_of_long_ago_does_not_count(tmp_path: Path) -> None:
    grace.check(saves(tmp_path, 81.3, *[14.0] * grace.NEWEST), None, contact=False)


def test_grace_shorter_than_the_estimate_of_a_plan_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # 19.2 GB over the 2 hosts of v5e:2x4 at 100 MB/s
    launch = made(f"pretrain --workdir={tmp_path}", topology="v5e:2x4", grace_seconds=60)
    grace.check(launch, plan_of(tmp_path, 19_200_000_000), contact=False)
    assert "--grace is 60 s, but a save may take 96 s: 19.2 GB over 2 hosts" in caplog.text
    caplog.clear()
    grace.check(launch, plan_of(tmp_path, 1_200_000_000), contact=False)
    assert not caplog.text


def test_measured_save_counts_more_than_an_estimate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grace.check(saves(tmp_path, 14.0), plan_of(tmp_path, 10**13), contact=False)
    assert not caplog.text


def test_command_that_does_not_save_has_no_limit(tmp_path: Path) -> None:
    saves(tmp_path, 81.3)
    grace.check(made(f"build --workdir={tmp_path}", topology="cpu:1x1"), None, contact=False)
