"""Plans: hours and cost that a launch prints, and launches that a plan refuses."""

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curia_common.errors import DoesNotFitError, UserError
from curia_jax.plan.__main__ import parser as plan_parser
from curia_jax.plan.prices import RunCost
from launch import __main__ as command
from launch import cost
from tests.launch.test_spec import made

WORDS = "pretrain --config=pretrain_vit_b16_224 --workdir=a --config.mesh.fsdp=32 --config.data.shards=s"
SPEC = made(WORDS)
PLAN = {
    "config": "configs/pretrain_vit_b16_224.py", "overrides": ["--config.mesh.fsdp=32"], "topology": "v5e:16x16", "fits": True, "state_bytes": 1_344_000_000,
    "hbm_bytes_per_chip": 12 * 2**30, "hbm_limit_bytes": 63 * 2**28,
    **dataclasses.asdict(RunCost(62_500, 10.5, 2688.0, 1.2, 3225.6, "USD", "2025-08")),
}  # fmt: skip


@pytest.fixture
def plan_file(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(PLAN | changes))
        return str(path)

    return write


def test_plan_of_the_run_has_its_hours_and_cost(plan_file: Callable[..., str]) -> None:
    plan = cost.read(plan_file(), SPEC)
    assert plan.text() == "10.5 h, 2,688 chip-hours, 3,226 USD at the prices of 2025-08 on demand"
    cost.check(plan, SPEC, max_cost=3300, ignore_fit=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "2 x v5e:16x16"}, "its topology is 2 x v5e:16x16, not v5e:16x16; plan this one: python -m curia_jax.plan"),
        ({"config": "pretrain_vit_l16_224"}, "its config is pretrain_vit_l16_224, not pretrain_vit_b16_224"),
        ({"overrides": []}, "its overrides are none, not --config.mesh.fsdp=32"),
    ],
)  # fmt: skip
def test_plan_of_another_run_is_refused(plan_file: Callable[..., str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cost.read(plan_file(**changes), SPEC)


def test_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    for name, reason in (("plan.json", "is not a plan"), ("missing.json", "No such file")):
        with pytest.raises(UserError, match=f"{name}.*{reason}.*; plan this one: python -m curia_jax.plan"):
            cost.read(str(tmp_path / name), SPEC)


def test_run_that_does_not_fit_is_refused_unless_told(plan_file: Callable[..., str]) -> None:
    plan = cost.read(plan_file(fits=False, hbm_bytes_per_chip=20 * 2**30, hours=None, chip_hours=None, cost=None), SPEC)
    with pytest.raises(DoesNotFitError, match=r"v5e:16x16 needs 20.00 GiB per chip but has 15.75, .*--ignore-fit"):
        cost.check(plan, SPEC, max_cost=None, ignore_fit=False)
    cost.check(plan, SPEC, max_cost=None, ignore_fit=True)
    with pytest.raises(UserError, match="the plan has no cost; plan with --prices=FILE"):
        cost.check(plan, SPEC, max_cost=1, ignore_fit=True)


def test_max_cost_refuses_what_is_dearer_or_has_no_plan(plan_file: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="the run costs 3,226 USD at the prices of 2025-08, more than --max-cost=3000"):
        cost.check(cost.read(plan_file(), SPEC), SPEC, max_cost=3000, ignore_fit=False)
    with pytest.raises(UserError, match="--max-cost=3000 needs a plan; make one"):
        cost.check(None, SPEC, max_cost=3000, ignore_fit=False)
    for other in (made(WORDS, topology="gpu:2x8"), made("evaluate --output=a", topology="v5e:2x2")):
        with pytest.raises(
            UserError, match=f"plans for pretrain on TPUs alone, not for {other.command} on {other.topology}"
        ):
            cost.check(None, other, max_cost=3000, ignore_fit=False)


def test_plan_command_is_one_that_the_planner_takes() -> None:
    spec = made(WORDS, slices=2)
    words = shlex.split(cost.plan_command(spec))
    assert words[:3] == ["python", "-m", "curia_jax.plan"]
    found = plan_parser().parse_args(words[3:])
    assert (found.config, found.topology, found.slices, found.json) == (
        "pretrain_vit_b16_224",
        "v5e:16x16",
        2,
        "plan.json",
    )
    assert found.overrides == ["--config.mesh.fsdp=32", "--config.data.shards=s"]


def test_plan_command_leaves_out_shards_in_a_bucket_and_asks_for_their_number() -> None:
    spec = made(
        "pretrain --config=demo --workdir=gs://b/run --config.seed=1 --config.data.shards=gs://b/ct", topology="v5e-16"
    )
    assert cost.plan_command(spec) == (
        "python -m curia_jax.plan --config=demo --topology=v5e:4x4 --config.seed=1 --json=plan.json "
        "(add --examples=N, the number of slices in the bucket)"
    )


def test_dear_launch_is_refused_before_anything_is_created(plan_file, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", "/nowhere")
    words = ["--target=gke", "--topology=v5e-256", f"--plan={plan_file()}", "--max-cost=10", "--", *WORDS.split()]
    assert command.main(words) == 2
    assert "more than --max-cost=10" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "state").exists()
