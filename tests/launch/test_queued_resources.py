"""Runs by queued resources: one step of the supervisor, whole runs with a cloud that takes machines away, and what is rendered."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest

from curia_common.errors import UserError
from launch import __main__ as command
from launch import queued_resources as qr
from launch import records
from launch.spec import LaunchSpec
from tests.launch import fake_cloud
from tests.launch.clouds import IMAGE, check_scripts, make_cloud, spec_of
from tests.launch.fake_cloud import Cloud, moment

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "launch"
RENDERED = {
    "v4_2x2x2": spec_of("queued-resources", "v4:2x2x2", reserved=True),
    "v5e_4x4_two_slices_spot": spec_of(
        "queued-resources", "v5e:4x4", "--config.data.shards=gs://data/ct", slices=2, spot=True, shards_cache_gib=64
    ),
    "v5p_4x4x4": spec_of("queued-resources", "v5p:4x4x4", service_account="trainer@p.iam.gserviceaccount.com"),
    "v6e_16x16": spec_of("queued-resources", "v6e:16x16"),
}
SPEC = spec_of("queued-resources", "v5e:2x4", spot=True)  # two workers
ALL_DONE = {"outcome_0": "0 0", "outcome_1": "1 0"}
Pauses = list[float]


@pytest.mark.parametrize("name", RENDERED)
def test_rendering_is_that_of_the_golden_file(name: str) -> None:
    rendering = qr.render(RENDERED[name])
    header = rendering.files["startup.sh"].partition("\n\n")[0]  # what is below is worker.sh
    text = f"# ---- startup.sh\n{header}\n# ---- shutdown.sh\n{rendering.files['shutdown.sh']}# ---- commands.sh\n{rendering.script}"
    path = GOLDEN / f"queued_resources_{name}.txt"
    if os.environ.get("CURIA_WRITE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize("name", RENDERED)
def test_scripts_pass_shellcheck(name: str, tmp_path: Path) -> None:
    qr.render(RENDERED[name]).write(tmp_path, RENDERED[name])
    check_scripts(tmp_path / "commands.sh", tmp_path / "shutdown.sh", tmp_path / "startup.sh")


@pytest.mark.parametrize(
    ("topology", "options", "message"),
    [
        ("v7x:4x4x4", {}, "the Cloud TPU API does not serve v7x; --target=gke does"),
        ("gpu:4x8", {}, "has no TPUs, which queued resources are"),
        ("v5e:4x4", {"queue": "ours"}, "--queue means nothing with --target=queued-resources"),
        ("v5e:4x4", {"cluster": "ours"}, "--cluster means nothing"),
    ],
)
def test_spec_that_the_api_does_not_serve_is_refused(topology: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        qr.render(spec_of("queued-resources", topology, **options))


def test_work_directory_outside_a_bucket_is_refused() -> None:
    with pytest.raises(UserError, match="--workdir is runs/first; workers and supervisor meet in a bucket"):
        qr.render(spec_of("queued-resources", "v5e:4x4", "--workdir=runs/first"))


# ---- one step


@pytest.mark.parametrize(
    ("state", "action"),
    [
        (None, "create"),
        ("CREATING", "wait"),
        ("ACCEPTED", "wait"),
        ("WAITING_FOR_RESOURCES", "wait"),
        ("PROVISIONING", "wait"),
        ("ACTIVE", "wait"),
        ("SUSPENDING", "wait"),
        ("SUSPENDED", "delete"),
        ("FAILED", "delete"),
        ("DELETING", "wait"),
        ("A_STATE_OF_NEXT_YEAR", "wait"),
    ],
)
def test_step_of_a_run_that_goes_on(state: str | None, action: str) -> None:
    assert qr.decide(qr.Seen(state), SPEC) == action
    # One worker that is done is not the end: the others may still be about to say so.
    assert qr.decide(qr.Seen(state, outcomes={0: (0, "")}), SPEC) == action


@pytest.mark.parametrize("outcomes", [{0: (0, ""), 1: (0, "")}, {1: (65, "")}, {0: (1, "it failed 5 times in a row")}])
def test_machines_of_a_run_that_has_ended_are_deleted(outcomes: dict[int, tuple[int, str]]) -> None:
    for state in ("ACTIVE", "WAITING_FOR_RESOURCES", "SUSPENDED", "FAILED"):
        assert qr.decide(qr.Seen(state, outcomes=outcomes), SPEC) == "delete"
    assert qr.decide(qr.Seen("DELETING", outcomes=outcomes), SPEC) == "wait"
    assert qr.decide(qr.Seen(None, outcomes=outcomes), SPEC) == "finish"


def test_lost_machine_of_an_active_request_is_replaced() -> None:
    assert qr.decide(qr.Seen("ACTIVE", lost_nodes=("first-1 (PREEMPTED)",)), SPEC) == "delete"


# ---- whole runs


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    made = make_cloud(tmp_path, monkeypatch)
    rendered = qr.render(SPEC)
    rendered.write(records.folder_of("first"), SPEC)
    return made


def supervise(spec: LaunchSpec = SPEC, steps: int = 60) -> qr.End:
    """Without pauses; a supervisor that does not come to an end fails."""
    left = iter(range(steps))

    def pause(seconds: float) -> None:
        next(left)

    return qr.supervise(spec, records.folder_of("first"), pause=pause)


def creations(cloud: Cloud) -> list[dict[str, str]]:
    return [fake_cloud.values_of(call) for call in cloud.calls("gcloud compute tpus queued-resources create")]


QUEUED = [moment("WAITING_FOR_RESOURCES"), moment("PROVISIONING")]


def test_run_is_created_watched_and_deleted_when_done(cloud: Cloud) -> None:
    cloud.set(plans=[[*QUEUED, moment("ACTIVE"), moment("ACTIVE", **ALL_DONE)]])
    assert supervise() == (0, "done")
    [options] = creations(cloud)
    assert (options["accelerator-type"], options["runtime-version"]) == ("v5litepod-8", "v2-alpha-tpuv5-lite")
    assert options["node-id"] == "first" and "spot" in options
    assert cloud.state()["resource"] is None  # nothing is left that costs


def test_suspended_request_is_deleted_before_another_is_made(cloud: Cloud) -> None:
    lost = [*QUEUED, moment("ACTIVE", generation="3"), moment("SUSPENDING"), moment("SUSPENDED")]
    cloud.set(plans=[lost, [*QUEUED, moment("ACTIVE", **ALL_DONE)]])
    assert supervise().code == 0
    # The new machines know which starts there were before, so that none of their workers joins one of those.
    assert [options["metadata"] for options in creations(cloud)] == ["curia-generation=0", "curia-generation=3"]
    steps = [call[4] for call in cloud.calls("gcloud compute tpus queued-resources")]
    first, second = (n for n, step in enumerate(steps) if step == "create")
    between = steps[first + 1 : second]
    assert between.count("delete") == 1 and between[-1] == "describe"  # which found nothing


def test_lost_tpu_slice_of_several_restarts_all_of_them(cloud: Cloud) -> None:
    spec = spec_of("queued-resources", "v5e:2x2", slices=2)
    qr.render(spec).write(records.folder_of("first"), spec)
    cloud.set(
        slices=2,
        plans=[[moment("ACTIVE"), moment("ACTIVE", nodes=["READY", "PREEMPTED"])], [moment("ACTIVE", **ALL_DONE)]],
    )
    assert supervise(spec).code == 0
    [options, _] = creations(cloud)
    assert (options["node-prefix"], options["node-count"]) == ("first", "2")


def test_supervisor_that_was_killed_goes_on_where_the_run_is(cloud: Cloud) -> None:
    """Before, while and after the machines are lost: another one makes no second request, and comes to the same end."""
    plans = [
        [*QUEUED, moment("ACTIVE"), moment("SUSPENDED")],
        [*QUEUED, moment("ACTIVE"), moment("ACTIVE", **ALL_DONE)],
    ]
    for steps in (1, 4, 5, 6, 8):
        for name in cloud.objects():
            (cloud.folder / "objects" / name).unlink()
        (cloud.folder / "calls.jsonl").unlink(missing_ok=True)
        cloud.set(plans=plans, resource=None)
        with pytest.raises(StopIteration):
            supervise(steps=steps - 1)
        assert supervise().code == 0
        assert len(creations(cloud)) == 2 and cloud.state()["plans"] == []


def test_two_supervisors_at_once_make_one_request(cloud: Cloud) -> None:
    cloud.set(plans=[[moment("ACTIVE", **ALL_DONE)]], resource={"moments": [None]})
    cloud.fail("gcloud compute tpus queued-resources create", fake_cloud.EXISTS)  # the other one was faster
    assert supervise().code == 0


@pytest.mark.parametrize(
    ("outcome", "code"), [("1 65", 65), ("0 2", 2), ("1 1 it failed 5 times in a row within 600 s", 1)]
)
def test_final_exit_code_of_a_worker_ends_the_run(cloud: Cloud, outcome: str, code: int) -> None:
    cloud.set(plans=[[moment("ACTIVE"), moment("ACTIVE", **{f"outcome_{outcome[0]}": outcome})]])
    end = supervise()
    assert end.code == code
    assert end.why.startswith(f"worker {outcome[0]} ended with exit code {code}")
    assert ("5 times" in end.why) == ("5 times" in outcome)
    assert len(creations(cloud)) == 1 and cloud.state()["resource"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [(fake_cloud.PERMISSION, "ask the owner of the project"), (fake_cloud.QUOTA, "take a smaller topology")],
)
def test_refused_request_is_not_repeated(cloud: Cloud, text: str, message: str) -> None:
    cloud.fail("gcloud compute tpus queued-resources create", text)
    with pytest.raises(UserError, match=message):
        supervise()
    assert len(creations(cloud)) == 1


def test_requests_that_fail_again_and_again_end_with_the_reason(cloud: Cloud) -> None:
    failed = [moment("FAILED", problem="no capacity of this type in us-east5-b")]
    cloud.set(plans=[failed] * 9)
    with pytest.raises(
        UserError, match="5 requests in a row failed, the last one with: no capacity of this type in us-east5-b"
    ):
        supervise()
    assert len(creations(cloud)) == 5


# ---- the command

WORDS = [
    "--target=queued-resources",
    "--topology=v5e:2x4",
    "--run=first",
    f"--image={IMAGE}",
    "--project=p",
    "--zone=us-east5-b",
]
TRAIN = ["--", "pretrain", "--config=demo", "--workdir=gs://bucket/first"]


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("supervise", "stop"):
        monkeypatch.setattr(qr, name, functools.partial(getattr(qr, name), pause=lambda seconds: None))


def launch() -> int:
    return command.main([*WORDS, "--yes", "--allow-dirty", *TRAIN])


def test_exit_code_of_the_launch_is_that_of_the_run(cloud: Cloud, without_pauses: None, capsys) -> None:
    cloud.set(plans=[[moment("ACTIVE", outcome_1="1 66")]])
    assert launch() == 66
    assert "first ended: worker 1 ended with exit code 66" in capsys.readouterr().err
    assert launch() == 2  # and is not started again by accident
    assert "python -m launch restart first" in capsys.readouterr().err
    assert command.main(["status", "first"]) == 0
    assert "ended: worker 1 ended with exit code 66" in capsys.readouterr().out
    cloud.set(plans=[[moment("ACTIVE", **ALL_DONE)]])
    assert command.main(["restart", "first"]) == 0


def test_stop_saves_before_the_machines_go(cloud: Cloud, without_pauses: None, capsys, monkeypatch) -> None:
    assert launch_and_abandon(cloud, [moment("ACTIVE")], monkeypatch)
    cloud.set(saves=True)
    assert command.main(["stop", "first"]) == 0
    assert "first has ended; its machines are gone, its work directory is as it was" in capsys.readouterr().out
    objects = cloud.objects()
    assert objects["stop"] == "stop" and cloud.state()["resource"] is None
    assert supervise().code == 75  # a supervisor that was still alive ends too, and asks for no machines
    assert len(creations(cloud)) == 1


def test_stop_that_nobody_answers_deletes_the_machines(cloud: Cloud, without_pauses: None, capsys, monkeypatch) -> None:
    assert launch_and_abandon(cloud, [moment("ACTIVE")], monkeypatch)
    assert command.main(["stop", "first"]) == 0
    assert "was stopped without a save; it resumes from its newest checkpoint" in capsys.readouterr().out
    assert cloud.state()["resource"] is None


def test_stop_before_there_are_machines_ends_the_supervisor(cloud: Cloud, without_pauses: None, capsys) -> None:
    cloud.set(resource={"moments": QUEUED})
    records.write(SPEC)
    assert command.main(["stop", "first"]) == 0
    assert "was stopped without a save" in capsys.readouterr().out
    assert supervise().code == 75
    assert creations(cloud) == []


def launch_and_abandon(cloud: Cloud, moments: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Launches a run whose supervisor dies at its first pause."""

    class Killed(BaseException):
        pass

    def die(seconds: float) -> None:
        raise Killed

    cloud.set(plans=[moments])
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(qr, "supervise", functools.partial(qr.supervise.func, pause=die))  # pyright: ignore[reportFunctionMemberAccess]
        launch()
    return cloud.state()["resource"] is not None


def test_logs_are_read_by_the_name_of_the_container(cloud: Cloud, capsys) -> None:
    records.write(SPEC)
    cloud.set(log=[{"timestamp": "t1", "jsonPayload": {"message": "step 1", "instance": {"name": "first-w-0"}}}])
    assert command.main(["logs", "first"]) == 0
    assert capsys.readouterr().out == "[first-w-0] step 1\n"
    [call] = cloud.calls("gcloud logging read")
    assert 'jsonPayload.container.name="/first"' in call[3]
