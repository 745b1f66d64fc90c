"""launch/worker.sh, executed: what a TPU VM does at its boot, with a docker, a metadata server and a bucket that are not there."""

import re
import subprocess
import time
from pathlib import Path

import pytest

from launch import queued_resources as qr
from tests.launch import fake_cloud
from tests.launch.clouds import make_cloud, spec_of
from tests.launch.fake_cloud import Cloud

SPEC = spec_of("queued-resources", "v5e:4x4", slices=2)  # workers 0 to 7
PROGRAMS = {
    # Each start takes the next line of `codes` as its exit code, and runs for as many looks as `running` has lines.
    "docker": """
echo "$*" >>docker.calls
case $1 in
run) head -n 1 codes >code; sed -i 1d codes; [ "$(cat code)" = 125 ] && exit 125; echo id ;;
inspect) if [ -s running ]; then sed -i 1d running; echo true; else echo false; fi ;;
wait) cat code ;;
esac""",
    "curl": """
case $* in
*/agent-worker-number) echo "$WORKER" ;;
*/tpu-env) printf "ZONE: 'z'\\nMEGASCALE_NUM_SLICES: '2'\\nMEGASCALE_SLICE_ID: '%s'\\n" "$SLICE" ;;
*/curia-generation) echo "$BEFORE" ;;
*) exit 22 ;;
esac""",
    "systemctl": "echo ${SYSTEM:-running}",
    "fuser": "cat holder 2>/dev/null",
    "mountpoint": "exit 1",
    "gcsfuse": 'echo "$*" >>gcsfuse.calls',
}
SETTINGS = {"PAUSE": "0.05", "LINGER": "0"}


class Machine:
    """A TPU VM.

    Args:
      codes: exit codes of the container, start by start.
    """

    def __init__(
        self, folder: Path, cloud: Cloud, codes: list[int], *, worker: int = 0, tpu_slice: int = 0, before: int = 0
    ) -> None:
        self.folder, self.cloud = folder, cloud
        for name, text in PROGRAMS.items():
            (cloud.folder / "bin" / name).write_text(f"#!/bin/sh\ncd {folder} || exit\n{text}\n")
            (cloud.folder / "bin" / name).chmod(0o755)
        (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        self.variables = {"WORKER": str(worker), "SLICE": str(tpu_slice), "BEFORE": str(before)}

    def start(self, spec=SPEC, **settings: str) -> subprocess.Popen[str]:
        text = qr.render(spec).files["startup.sh"]
        places = {"STATE": f"{self.folder}/state", "DEVICES": f"{self.folder}/dev", "TEMPORARY": str(self.folder),
                  "HUGE_PAGES": f"{self.folder}/huge", "MOUNT": f"{self.folder}/mnt", "CACHE": f"{self.folder}/cache"}  # fmt: skip
        for name, value in {**places, **SETTINGS, **settings}.items():
            text, found = re.subn(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
            assert found == 1, name
        script = self.folder / "startup.sh"
        script.write_text(text)
        environment = {
            "PATH": f"{self.cloud.folder / 'bin'}:/usr/bin:/bin",
            "FAKE_BUCKET": self.cloud.bucket,
            **self.variables,
        }
        return subprocess.Popen(
            ["bash", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, **settings: str) -> str:
        """From boot to end; returns what it printed."""
        return self.start(**settings).communicate(timeout=120)[0]

    def calls(self, name: str = "docker") -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def attempts(self) -> list[str]:
        """Numbers of the starts of the container."""
        return [re.findall(r"CURIA_LAUNCH_ATTEMPT=(\S+)", call)[0] for call in self.calls() if call.startswith("run ")]


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    return make_cloud(tmp_path, monkeypatch)


def test_finished_run_is_recorded_and_its_machines_are_given_back(cloud: Cloud, tmp_path: Path) -> None:
    machine = Machine(tmp_path, cloud, [0])
    machine.run()
    assert cloud.objects() == {"generation": "1", "outcome-0": "0 0"}
    [run] = [call for call in machine.calls() if call.startswith("run ")]
    assert "--privileged --net=host" in run and "--stop-timeout 60" in run and "CURIA_LAUNCH_DEVICES=32" in run
    assert run.endswith(f"{SPEC.image} {SPEC.command_line}")
    assert (tmp_path / "huge").read_text() == "always\n"
    [delete] = cloud.calls("gcloud compute tpus queued-resources delete")
    assert "first" in delete and "--force" in delete


def test_failures_start_all_workers_again_under_a_new_number(cloud: Cloud, tmp_path: Path) -> None:
    machine = Machine(tmp_path, cloud, [75, 134, 0])
    machine.run()
    assert machine.attempts() == ["1", "2", "3"]
    assert cloud.objects() == {"generation": "3", "outcome-0": "0 0"}


@pytest.mark.parametrize("code", [2, 64, 65, 66])
def test_final_exit_code_is_not_tried_again(cloud: Cloud, tmp_path: Path, code: int) -> None:
    machine = Machine(tmp_path, cloud, [code, 0])
    machine.run()
    assert machine.attempts() == ["1"] and cloud.objects()["outcome-0"] == f"0 {code}"


def test_fast_failures_that_are_alike_give_up(cloud: Cloud, tmp_path: Path) -> None:
    machine = Machine(tmp_path, cloud, [75, 1, 1, 1, 1, 1, 0])
    machine.run()
    assert cloud.objects()["outcome-0"] == "0 1 it failed 5 times in a row within 600 s"
    assert len(machine.attempts()) == 6


def test_slow_failures_that_are_alike_go_on_until_the_budget_is_spent(cloud: Cloud, tmp_path: Path) -> None:
    machine = Machine(tmp_path, cloud, [1] * 9)
    machine.run(FAST="0", MAX_RESTARTS="6")
    assert cloud.objects()["outcome-0"] == "0 1 it failed more than 6 times"
    assert len(machine.attempts()) == 7


def test_image_that_cannot_be_pulled_gives_up(cloud: Cloud, tmp_path: Path) -> None:
    Machine(tmp_path, cloud, [125] * 9).run()
    assert cloud.objects()["outcome-0"].startswith("0 125 it failed 5 times")


def test_other_worker_joins_the_start_of_the_first_and_none_before(cloud: Cloud, tmp_path: Path) -> None:
    """A new machine of slice 1 has the number of the newest start before it was asked for."""
    cloud.write("generation", "4")
    machine = Machine(tmp_path, cloud, [75, 0], worker=3, tpu_slice=1, before=4)
    process = machine.start()
    time.sleep(1)
    assert machine.attempts() == [] and process.poll() is None
    cloud.write("generation", "5")
    while machine.attempts() != ["5"]:
        time.sleep(0.05)
    cloud.write("generation", "6")
    process.communicate(timeout=60)
    assert machine.attempts() == ["5", "6"]
    assert cloud.objects()["outcome-7"] == "7 0"
    assert cloud.calls("gcloud compute") == []  # the first worker's matter


def test_silent_bucket_does_not_set_the_number_of_starts_back(cloud: Cloud, tmp_path: Path) -> None:
    cloud.write("generation", "7")
    cloud.fail("gcloud storage cat", fake_cloud.BUSY, times=2)  # looks for an outcome, and for the number
    machine = Machine(tmp_path, cloud, [0], before=7)
    machine.run()
    assert machine.attempts() == ["8"] and cloud.objects()["generation"] == "8"


def test_rebooted_worker_does_not_run_a_start_twice(cloud: Cloud, tmp_path: Path) -> None:
    cloud.write("generation", "5")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ran").write_text("5\n")
    machine = Machine(tmp_path, cloud, [0], worker=1, before=4)
    process = machine.start()
    time.sleep(1)
    assert machine.attempts() == []
    cloud.write("generation", "6")
    process.communicate(timeout=60)
    assert machine.attempts() == ["6"]


def test_stop_ends_the_container_and_is_recorded(cloud: Cloud, tmp_path: Path) -> None:
    machine = Machine(tmp_path, cloud, [75, 0])
    (tmp_path / "running").write_text("1\n2\n")
    cloud.write("stop", "stop")
    machine.run()
    assert "stop --time 60 first" in machine.calls()
    assert machine.attempts() == ["1"] and cloud.objects()["outcome-0"] == "0 75 stopped"


def test_machine_that_is_taken_away_records_no_end(cloud: Cloud, tmp_path: Path) -> None:
    machine = Machine(tmp_path, cloud, [75, 0])
    machine.variables["SYSTEM"] = "stopping"
    machine.run()
    assert machine.attempts() == ["1"] and "outcome-0" not in cloud.objects()
    assert cloud.calls("gcloud compute") == []


def test_boot_after_the_end_starts_nothing(cloud: Cloud, tmp_path: Path) -> None:
    cloud.write("outcome-0", "0 0")
    machine = Machine(tmp_path, cloud, [0])
    machine.run()
    assert machine.attempts() == []


def test_stale_processes_and_lock_files_are_cleared_before_a_start(cloud: Cloud, tmp_path: Path) -> None:
    holder = subprocess.Popen(["sleep", "600"])
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "accel0").touch()
    (tmp_path / "holder").write_text(f"{holder.pid}\n")
    (tmp_path / "libtpu_lockfile").touch()
    said = Machine(tmp_path, cloud, [0]).run()
    assert holder.wait(timeout=10) == -9
    assert f"ends process {holder.pid}, which holds {tmp_path}/dev/accel0" in said
    assert not (tmp_path / "libtpu_lockfile").exists()


def test_shards_of_a_bucket_are_mounted(cloud: Cloud, tmp_path: Path) -> None:
    spec = spec_of("queued-resources", "v5e:4x4", "--config.data.shards=gs://data/ct", shards_cache_gib=2)
    machine = Machine(tmp_path, cloud, [0])
    machine.start(spec=spec).communicate(timeout=60)
    [call] = machine.calls("gcsfuse")
    assert call == f"--config-file={tmp_path}/state/gcsfuse.yaml -o ro -o allow_other data {tmp_path}/mnt"
    config = (tmp_path / "state" / "gcsfuse.yaml").read_text()
    assert "only-dir: ct" in config and "max-size-mb: 2048" in config and "cache-dir: /dev/shm/curia-shards" in config
    [run] = [call for call in machine.calls() if call.startswith("run ")]
    assert "--volume /mnt/curia-shards:/mnt/curia-shards:ro" in run
    assert run.endswith("--config.data.shards=/mnt/curia-shards")
