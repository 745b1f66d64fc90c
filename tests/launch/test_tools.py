"""What programs of a cloud say went wrong, and what is tried again."""

from pathlib import Path

import pytest

from curia_common.errors import RestartError, UserError
from launch import tools
from tests.launch import fake_cloud
from tests.launch.clouds import make_cloud

VERBS = "compute.tpus.queued-resources.create"
DESCRIBE = ("gcloud", "compute", "tpus", "queued-resources", "describe", "first", "--zone=z")


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (fake_cloud.ABSENT, "absent"),
        (fake_cloud.EXISTS, "exists"),
        (fake_cloud.PERMISSION, "permission"),
        (fake_cloud.QUOTA, "quota"),
        (fake_cloud.LOGGED_OUT, "credentials"),
        (fake_cloud.BUSY, "transient"),
        ("ERROR: (gcloud.x) The following URLs matched no objects or files:\ngs://b/x", "absent"),
        ('Error from server (AlreadyExists): jobsets "first" already exists', "exists"),
        ('Error from server (NotFound): jobsets.jobset.x-k8s.io "first" not found', "absent"),
        ('Error from server (Forbidden): jobsets is forbidden: User "u" cannot create resource', "permission"),
        ("error: You must be logged in to the server (Unauthorized)", "credentials"),
        ("Unable to connect to the server: dial tcp: i/o timeout", "transient"),
        ("ERROR: (gcloud.x) UNAVAILABLE: The service is currently unavailable.", "transient"),
        ("ERROR: (gcloud.x) RESOURCE_EXHAUSTED: try again later", "transient"),
        ("slurm_load_jobs error: Invalid job id specified", "absent"),
        ("ERROR: (gcloud.x) INVALID_ARGUMENT: bad accelerator type", "other"),
    ],
)
def test_refusals_are_told_apart(said: str, problem: str) -> None:
    assert tools.classify(said)[0] == problem


def test_message_is_one_line_with_command_reason_and_remedy(tmp_path: Path, monkeypatch) -> None:
    cloud = make_cloud(tmp_path, monkeypatch)
    cloud.fail("gcloud compute", fake_cloud.QUOTA)
    with pytest.raises(tools.ToolError) as raised:
        tools.run(DESCRIBE)
    assert raised.value.problem == "quota" and raised.value.exit_code == 2
    text = str(raised.value)
    assert text.startswith("gcloud compute tpus queued-resources describe first: ")
    assert "Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZone' has been exceeded" in text
    assert text.endswith("or take a smaller topology, another zone or --spot") and "\n" not in text


def test_busy_cloud_is_asked_again_with_growing_pauses(tmp_path: Path, monkeypatch) -> None:
    cloud, pauses = make_cloud(tmp_path, monkeypatch), []
    cloud.set(resource={"moments": [fake_cloud.moment("ACTIVE")]})
    cloud.fail("gcloud compute", fake_cloud.BUSY, times=3)
    assert "ACTIVE" in tools.run(DESCRIBE, pause=pauses.append)
    assert pauses == [5, 10, 20]


def test_cloud_that_stays_busy_ends_with_the_restart_code(tmp_path: Path, monkeypatch) -> None:
    make_cloud(tmp_path, monkeypatch).fail("gcloud compute", fake_cloud.BUSY, times=99)
    with pytest.raises(RestartError, match="429 Too Many Requests; tried 7 times; run the same command again later"):
        tools.run(DESCRIBE, pause=lambda seconds: None)


def test_program_that_is_missing_is_named_with_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="gcloud is not on the PATH; install the Google Cloud CLI"):
        tools.run(DESCRIBE)
    with pytest.raises(UserError, match="kubectl is not on the PATH"):
        tools.stream(("kubectl", "logs"))
