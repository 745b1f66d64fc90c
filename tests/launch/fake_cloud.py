"""gcloud, kubectl and Slurm's commands as a state machine, on the PATH of tests. It is a program (`python fake_cloud.py FOLDER NAME …`), and
the class with which tests set it up and look into it.

Every flag has to be in cloud_flags.json, which lists those of the real programs. What a queued resource goes through is a list of
moments; each `describe` moves on by one, and the last one stays.
"""

import dataclasses
import fnmatch
import json
import os
import sys
from pathlib import Path
from typing import Any

FLAGS = json.loads(Path(__file__).with_name("cloud_flags.json").read_text(encoding="utf-8"))
PROGRAMS = ("gcloud", "kubectl", "sbatch", "squeue", "scancel")
ABSENT = "ERROR: (gcloud.{verbs}) NOT_FOUND: Resource 'projects/p/first' was not found."
EXISTS = "ERROR: (gcloud.{verbs}) ALREADY_EXISTS: Resource 'projects/p/first' already exists"
PERMISSION = "ERROR: (gcloud.{verbs}) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'projects/p'"
QUOTA = "ERROR: (gcloud.{verbs}) RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZone' has been exceeded."
BUSY = "ERROR: gcloud crashed (HttpError): 429 Too Many Requests"
LOGGED_OUT = "ERROR: (gcloud.{verbs}) You do not currently have an active account selected.\nPlease run:\n\n  $ gcloud auth login"


def moment(state: str, *, problem: str = "", nodes: list[str] | None = None, **objects: str) -> dict[str, Any]:
    """What a `describe` sees.

    Args:
      nodes: states of the TPU VMs; None for READY ones.
      objects: what workers write to the bucket at that moment; outcome_0 is outcome-0.
    """
    return {"state": state, "problem": problem, "nodes": nodes, "objects": objects}


@dataclasses.dataclass(frozen=True)
class Cloud:
    """The folder of a fake cloud, as a test sees it."""

    folder: Path
    bucket: str

    @classmethod
    def make(cls, folder: Path, bucket: str) -> "Cloud":
        """Puts the programs into folder/bin; the test puts that on the PATH.

        Args:
          bucket: address of the folder that workers and launcher share.
        """
        (folder / "bin").mkdir(parents=True)
        (folder / "objects").mkdir()
        for name in PROGRAMS:
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" "{folder}" {name} "$@"\n')
            program.chmod(0o755)
        made = cls(folder, bucket)
        made.set(plans=[], resource=None, errors=[], jobset=None, pods=[], queue=None, log=[], slices=1, saves=False)
        return made

    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "state.json").read_text())

    def set(self, **values: Any) -> None:
        path = self.folder / "state.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | values))

    def fail(self, verbs: str, text: str, times: int = 1) -> None:
        """The next calls of a command fail."""
        self.set(errors=[*self.state()["errors"], [verbs, text, times]])

    def calls(self, verbs: str = "") -> list[list[str]]:
        """Argument lists of the calls of a command so far."""
        path = self.folder / "calls.jsonl"
        every = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in every if " ".join(call).startswith(verbs)]

    def objects(self) -> dict[str, str]:
        """Name -> text of the records in the bucket."""
        return {path.name: path.read_text().strip() for path in (self.folder / "objects").iterdir()}

    def write(self, name: str, text: str) -> None:
        (self.folder / "objects" / name).write_text(text + "\n")


class Refused(Exception):
    pass


def verbs_of(words: list[str]) -> list[str]:
    found = []
    for word in words:
        if word.startswith("-"):
            break
        found.append(word)
    return found


def check_flags(name: str, words: list[str]) -> None:
    """Refuses a flag that the real program does not have."""
    if name in FLAGS["slurm"]:
        known = FLAGS["slurm"][name]
    else:
        line = " ".join([name, *verbs_of(words)])
        command = max((c for c in FLAGS if c != "source" and (line + " ").startswith(c + " ")), key=len)
        if command == name:
            raise Refused(f"ERROR: ({name}) Invalid choice: '{line}'")
        known = FLAGS[command] + FLAGS[name]
    for word in words:
        flag = word.partition("=")[0]
        if word.startswith("--") and flag not in known and flag.replace("--no-", "--") not in known:
            raise Refused(f"ERROR: ({name}) unrecognized arguments: {word}")


def values_of(words: list[str]) -> dict[str, str]:
    return {
        flag.lstrip("-"): value for flag, _, value in (word.partition("=") for word in words if word.startswith("--"))
    }


def queued_resources(cloud: Cloud, verb: str, words: list[str]) -> str:
    state, given = cloud.state(), values_of(words)
    resource = state["resource"]
    if verb == "create":
        if resource is not None:
            raise Refused(EXISTS)
        for file in given["metadata-from-file"].split(","):
            Path(file.partition("=")[2]).read_text()  # as gcloud does, relative to where it runs
        [number] = [word.partition("=")[2] for word in given["metadata"].split(",") if "generation" in word]
        cloud.set(resource={"moments": state["plans"][0], "generation": int(number)}, plans=state["plans"][1:])
        return ""
    if resource is None:
        raise Refused(ABSENT)
    if verb == "delete":
        cloud.set(resource=resource | {"moments": [moment("DELETING"), None]})
        return ""
    now, *later = resource["moments"]
    if now is None:
        cloud.set(resource=None)
        raise Refused(ABSENT)
    cloud.set(resource=resource | {"moments": later or [now], "nodes": now["nodes"]})
    for name, text in now["objects"].items():
        cloud.write(name.replace("_", "-"), text)
    failed = {"failedData": {"error": {"message": now["problem"]}}} if now["problem"] else {}
    return json.dumps({"name": "first", "state": {"state": now["state"], **failed}})


def storage(cloud: Cloud, verb: str, words: list[str]) -> str:
    folder = cloud.folder / "objects"

    def matching(address: str) -> list[Path]:
        if not address.startswith(f"{cloud.bucket}/"):
            raise Refused(f"ERROR: (gcloud.storage.{verb}) PERMISSION_DENIED: 403 on {address}")
        pattern = address.removeprefix(f"{cloud.bucket}/")
        found = sorted(path for path in folder.iterdir() if fnmatch.fnmatch(path.name, pattern))
        if not found:
            raise Refused(f"ERROR: (gcloud.storage.{verb}) The following URLs matched no objects or files:\n{address}")
        return found

    if verb == "cp":
        source, target = words[-2:]
        text = sys.stdin.read() if source == "-" else Path(source).read_text()
        cloud.write(target.rpartition("/")[2], text.strip())
        if target.endswith("/stop") and cloud.state()["saves"]:
            cloud.write("outcome-0", "0 75 stopped")
        return ""
    found = matching(words[-1])
    if verb == "cat":
        return "".join(path.read_text() for path in found)
    for path in found:
        path.unlink()
    return ""


def kubectl(cloud: Cloud, verb: str, words: list[str]) -> str:
    state = cloud.state()
    if verb == "create":
        if state["jobset"] is not None:
            raise Refused(
                'Error from server (AlreadyExists): error when creating "jobset.yaml": jobsets "first" already exists'
            )
        [file] = [word.partition("=")[2] for word in words if word.startswith("--filename=")]
        cloud.set(jobset={"manifest": Path(file).read_text(), "status": {}})
        return "jobset.jobset.x-k8s.io/first created"
    if verb == "get" and "pods" in words:
        return json.dumps({"items": [{"status": {"phase": phase}} for phase in state["pods"]]})
    if state["jobset"] is None:
        raise Refused('Error from server (NotFound): jobsets.jobset.x-k8s.io "first" not found')
    if verb == "delete":
        cloud.set(jobset=None, pods=[])
        return 'jobset.jobset.x-k8s.io "first" deleted'
    if verb == "logs":
        return "[pod/first-slice-0-0-abcde/worker] step 1\n"
    return json.dumps(state["jobset"])


def slurm(cloud: Cloud, name: str, words: list[str]) -> str:
    state = cloud.state()
    if name == "sbatch":
        Path(words[-1]).read_text()
        cloud.set(queue=["PENDING", "RUNNING"])
        return "4711;cluster\n"
    if name == "scancel":
        if not any(word.startswith("--signal") for word in words):
            cloud.set(queue=None)
        return ""
    now, *later = state["queue"] or [None]
    if now is None:
        raise Refused("slurm_load_jobs error: Invalid job id specified")
    cloud.set(queue=later or [now])
    return now + "\n"


def run(cloud: Cloud, name: str, words: list[str]) -> str:
    verbs = verbs_of(words)
    line = " ".join([name, *verbs])
    errors = cloud.state()["errors"]
    for index, (failing, text, times) in enumerate(errors):
        if line.startswith(failing) and times > 0:
            errors[index][2] -= 1
            cloud.set(errors=errors)
            raise Refused(text)
    if name == "kubectl":
        return kubectl(cloud, words[0], words)
    if name != "gcloud":
        return slurm(cloud, name, words)
    if verbs[:3] == ["compute", "tpus", "queued-resources"]:
        return queued_resources(cloud, verbs[3], words)
    if verbs[0] == "storage":
        return storage(cloud, verbs[1], words)
    if verbs[:3] == ["compute", "tpus", "tpu-vm"]:
        state = cloud.state()
        states = (state["resource"] or {}).get("nodes") or ["READY"] * state["slices"]
        return json.dumps([{"name": f"projects/p/first-{n}", "state": node} for n, node in enumerate(states)])
    if verbs[0] == "logging":
        return json.dumps(cloud.state()["log"])
    if verbs[-2:-1] == ["describe"]:  # of node pools and policies
        raise Refused(ABSENT)
    return ""


def main() -> int:
    folder, name, *words = sys.argv[1:]
    cloud = Cloud(Path(folder), os.environ.get("FAKE_BUCKET", ""))
    with (cloud.folder / "calls.jsonl").open("a") as stream:
        stream.write(json.dumps([name, *words]) + "\n")
    try:
        check_flags(name, words)
        sys.stdout.write(run(cloud, name, words))
    except Refused as error:
        print(str(error).replace("{verbs}", ".".join(verbs_of(words))), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
