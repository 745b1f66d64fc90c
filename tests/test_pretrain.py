"""The command as a user runs it, on phantom shards: its messages, files and exit codes, on one host and on two."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from curia_common.exit_codes import ExitCode
from curia_jax import checkpoint, data, pretrain, saving, sharding
from curia_jax import config as configs
from curia_jax.objectives import mae
from data_pipeline.format.shards import SliceSource

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "--config=tests/configs/tiny.py"
ONE_DEVICE = ["--config.devices.cpu_count=1", "--config.mesh.data=1", "--config.mesh.fsdp=1"]
CLOCK_METRICS = {"time", "goodput", "images_per_second", "mfu", "data_stall_fraction", "save_stall_fraction"}

# The command itself, which also writes the slice numbers of each batch of this host to RECORD, and gets SIGTERM while batch
# number STOP_AT (from 1) is pulled.
RECORDED = """
import json, os, signal, sys
from curia_jax import data, pretrain

to_devices, record = data.to_devices, open(os.environ["RECORD"], "w")
stop_at = int(os.environ.get("STOP_AT", 0))

def recorded(batch, sharding, pulled=[]):
    pulled.append(None)
    print(json.dumps(batch["slice"].tolist()), file=record, flush=True)
    if len(pulled) == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
    return to_devices(batch, sharding)

data.to_devices = recorded
sys.exit(pretrain.main())
"""


def start(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    """Starts the command with the home folder <folder>/home; with the variable RECORD, starts RECORDED."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    program = ["-c", RECORDED] if "RECORD" in variables else ["-m", "curia_jax.pretrain"]
    return subprocess.Popen(
        [sys.executable, *program, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**environment, "HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), **variables},
    )  # fmt: skip


def ended(process: subprocess.Popen[str], timeout: float = 500) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return {"code": process.returncode, "out": out, "err": err}


def run(folder: Path, *words: str, **variables: str) -> dict[str, Any]:
    return ended(start(folder, *words, **variables))


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(workdir: Path) -> dict[int, dict[str, float]]:
    """Metrics that do not depend on clocks, by step; no step is logged twice."""
    rows = lines(workdir / "metrics.jsonl")
    found = {row["step"]: {k: v for k, v in row.items() if k not in CLOCK_METRICS} for row in rows}
    assert len(found) == len(rows)
    return found


def events(workdir: Path) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in lines(workdir / "events.jsonl")]


def compiled(folder: Path) -> set[str]:
    return {p.name for p in (folder / "home/.cache/curia_jax/compilations").glob("*-cache")}


@pytest.fixture(scope="session")
def alone(once: Callable[[str, Callable[[Path], None]], Path], tiny_shards: Path) -> Path:
    """Runs of 12 steps on one device: `straight` without a stop; `broken` stopped in step 6 and started again."""

    def build(folder: Path) -> None:
        words = [CONFIG, f"--config.data.shards={tiny_shards}", *ONE_DEVICE]
        results = {"straight": run(folder, *words, f"--workdir={folder}/straight", f"--json={folder}/straight.json")}
        results["straight"]["compiled"] = sorted(compiled(folder))
        words += [f"--workdir={folder}/broken", f"--json={folder}/broken.json"]
        results["stopped"] = run(folder, *words, RECORD=f"{folder}/stopped.txt", STOP_AT="6")
        results["stopped"]["outcome"] = json.loads((folder / "broken.json").read_text())
        results["again"] = run(folder, *words, RECORD=f"{folder}/again.txt")
        results["again"]["compiled"] = sorted(compiled(folder))
        (folder / "results.json").write_text(json.dumps(results))

    return once("pretrain_alone", build)


@pytest.fixture(scope="session")
def together(once: Callable[[str, Callable[[Path], None]], Path], alone: Path, tiny_shards: Path) -> Path:
    """Step 4 of `straight` resumed on four devices: of one process, and of two hosts on loopback. Each gets SIGTERM."""

    def build(folder: Path) -> None:
        words = [
            CONFIG,
            f"--config.data.shards={tiny_shards}",
            "--config.duration=4000 steps",
            "--config.save_every=50 %",
        ]
        for name in ("process", "hosts"):
            shutil.copytree(alone / "straight/checkpoints/4", folder / name / "checkpoints/4")
        results = {
            "process": run(folder, *words, f"--workdir={folder}/process", RECORD=f"{folder}/process.txt", STOP_AT="20")
        }
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        words += [f"--workdir={folder}/hosts", "--config.devices.multihost=true", "--config.devices.cpu_count=2"]
        hosts = [
            start(
                folder, *words, RECORD=f"{folder}/host{n}.txt", STOP_AT="10" if n == 1 else "0",
                JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(n),
            )
            for n in (0, 1)
        ]  # fmt: skip
        results |= {f"host{n}": ended(host) for n, host in enumerate(hosts)}
        (folder / "results.json").write_text(json.dumps(results))

    return once("pretrain_together", build)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())


# ---- a run


def test_run_finishes_and_leaves_its_files(alone: Path, tiny_shards: Path) -> None:
    result, workdir = results(alone)["straight"], alone / "straight"
    assert result["code"] == 0, result["err"]
    assert result["out"] == ""  # standard output is for programs
    assert "48 slices, canvas 32x32; 0.02 M parameters; 1 x cpu as" in result["err"]
    assert re.search(r"compiled in [\d.]+ s; per device 0 MiB arguments, \d+ MiB temporaries", result["err"])
    assert re.search(r"training: 12 steps in [\d.]+ s, ", result["err"])
    assert f"finished at step 12 after 192 examples; checkpoints are in {workdir}/checkpoints" in result["err"]
    assert {p.name for p in workdir.iterdir()} == {
        "config.json", "checkpoints", "metrics.jsonl", "events.jsonl", "tensorboard", "logs",
        "goodput.jsonl",
    }  # fmt: skip
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [4, 8, 12]
    assert json.loads((workdir / "config.json").read_text())["data"]["shards"] == str(tiny_shards)
    assert list(metrics(workdir)) == list(range(1, 13))
    assert events(workdir) == [("started", 0), ("saved", 4), ("saved", 8), ("saved", 12), ("finished", 12)]
    first = lines(workdir / "events.jsonl")[0]
    assert (first["slices"], first["hosts"], first["mesh"]) == (48, 1, {"replica": 1, "data": 1, "fsdp": 1})


def test_the_json_has_the_outcome(alone: Path) -> None:
    outcome = json.loads((alone / "straight.json").read_text())
    last = metrics(alone / "straight")[12]
    assert (outcome["finished"], outcome["step"], outcome["examples_seen"]) == (True, 12, 192)
    assert (outcome["loss"], outcome["baseline_loss"]) == (last["loss"], last["baseline_loss"])
    assert outcome["workdir"] == f"{alone}/straight"
    assert outcome["images_per_second"] > 0 and 0 < outcome["mfu"] < 1
    assert 0 <= outcome["data_stall_fraction"] <= 1 and 0 < outcome["save_stall_fraction"] <= 1
    stopped = results(alone)["stopped"]["outcome"]
    assert (stopped["finished"], stopped["step"], stopped["examples_seen"]) == (False, 6, 96)


def test_programs_are_compiled_once_and_cached(alone: Path, together: Path) -> None:
    kept = results(alone)["straight"]["compiled"]
    assert any("jit_step" in name for name in kept)
    assert (
        results(alone)["again"]["compiled"] == kept
    )  # two more starts of the same run compiled nothing that took a second
    # Programs of several simulated devices are not cached: read from the cache they can deadlock.
    assert compiled(together) == set()


# ---- stop and resume


def test_sigterm_saves_and_returns_75(alone: Path) -> None:
    result = results(alone)["stopped"]
    assert result["code"] == ExitCode.RESTART == 75, result["err"]
    assert result["out"] == ""
    assert "stopped and saved at step 6 of 12 after 96 examples; rerun the same command to resume" in result["err"]


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(alone: Path, tiny_shards: Path) -> None:
    result = results(alone)["again"]
    assert result["code"] == 0, result["err"]
    assert "resuming from step 6 at example 96" in result["err"] and "changed since" not in result["err"]
    assert events(alone / "broken") == [
        ("started", 0), ("saved", 4), ("saved", 6), ("preempted", 6),
        ("resumed", 6), ("saved", 8), ("saved", 12), ("finished", 12),
    ]  # fmt: skip
    assert metrics(alone / "broken") == metrics(alone / "straight")

    config = configs.load("tests/configs/tiny.py")
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    objective = mae.make(config, mesh, canvas=(32, 32), warmup_steps=1, total_steps=12)
    states = []
    for name in ("straight", "broken"):
        checkpointer = saving.Checkpointer(str(alone / name))
        state = checkpointer.restore(objective.abstract_state)
        checkpointer.close()
        step, meta = checkpoint.latest(str(alone / name)) or pytest.fail("no checkpoint")
        assert int(state["step"]) == step == 12 and meta.examples_seen == 192
        source = SliceSource(tiny_shards, "train")
        assert meta.dataset == (source.fingerprint, 0, 48, "train") and meta.dataset_start == 0
        states.append(sharding.paths(state))
    assert any("/mu/" in path for path in states[0]) and any("/nu/" in path for path in states[0])
    for path, leaf in states[0].items():
        assert np.asarray(leaf).tobytes() == np.asarray(states[1][path]).tobytes(), path
        if path.startswith("params") and path.endswith("kernel"):
            assert np.asarray(leaf).std() > 0


def test_no_example_is_skipped_or_repeated_on_resume(alone: Path, tiny_shards: Path) -> None:
    source = SliceSource(tiny_shards, "train")
    stream = data.training_batches(source, batch_size=16, canvas=(32, 32), seed=0)
    wanted = [next(stream)["slice"].tolist() for _ in range(12)]
    assert lines(alone / "stopped.txt") + lines(alone / "again.txt") == wanted


def test_finished_run_is_left_alone(alone: Path, tmp_path: Path, here: Callable[..., Any], tiny_shards: Path) -> None:
    shutil.copytree(alone / "straight", tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    words = [f"--config.data.shards={tiny_shards}", f"--workdir={tmp_path}/run", f"--json={tmp_path}/outcome.json"]
    result = here(*words)
    assert result["code"] == 0 and result["out"] == ""
    assert (
        f"nothing to do: {tmp_path}/run has reached step 12 of 12; a longer --config.duration continues from there"
        in result["err"]
    )
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["finished"], outcome["step"], outcome["examples_seen"]) == (True, 12, 192)
    assert outcome["loss"] == metrics(alone / "straight")[12]["loss"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


# ---- other meshes and hosts


def test_another_mesh_resumes_the_same_state_at_the_next_example(
    together: Path, alone: Path, tiny_shards: Path
) -> None:
    result = results(together)["process"]
    assert result["code"] == 75, result["err"]
    assert "4 x cpu as {'replica': 1, 'data': 2, 'fsdp': 2}" in result["err"]
    assert "resuming from step 4 at example 64" in result["err"]
    for change in ("duration '12 steps' -> '4000 steps'", "mesh.data 1 -> 2", "mesh.fsdp 1 -> 2"):
        assert change in result["err"]
    source = SliceSource(tiny_shards, "train")
    stream = data.training_batches(source, batch_size=16, canvas=(32, 32), seed=0, examples_seen=64)
    assert lines(together / "process.txt") == [next(stream)["slice"].tolist() for _ in range(20)]
    # The fifth loss is of the state of step 4 and batch 4; afterwards the longer duration has another learning rate.
    found, wanted = metrics(together / "process")[5], metrics(alone / "straight")[5]
    for quantity in ("loss", "baseline_loss", "gradient_norm", "examples_seen"):
        assert found[quantity] == pytest.approx(wanted[quantity], rel=2e-6), quantity


def test_two_hosts_train_like_one_and_read_disjoint_parts(together: Path) -> None:
    process, hosts = lines(together / "process.txt"), [lines(together / f"host{n}.txt") for n in (0, 1)]
    assert len(hosts[0]) == len(hosts[1])
    for whole, *parts in zip(process, *hosts, strict=False):
        assert [len(part) for part in parts] == [8, 8]
        assert parts[0] + parts[1] == whole
    assert not set(hosts[0][0]) & set(hosts[1][0])
    wanted, found = metrics(together / "process"), metrics(together / "hosts")
    assert list(wanted) == list(range(5, 25)) and len(found) > 5
    for step in sorted(wanted.keys() & found.keys()):
        for quantity, value in wanted[step].items():
            # Over 20 steps the order of float32 sums adds up.
            assert found[step][quantity] == pytest.approx(value, rel=1e-5), (step, quantity)


def test_sigterm_on_one_host_stops_both_at_the_same_step(together: Path) -> None:
    ends = [results(together)[f"host{n}"] for n in (0, 1)]
    assert [end["code"] for end in ends] == [75, 75], [end["err"] for end in ends]
    # Gloo, the collectives of CPU hosts, prints its peers from several threads.
    gloo = set("Gloo Rank is connected to peer ranks Expected number of".split())
    assert all(set(re.findall(r"[^\W\d]+", end["out"])) <= gloo for end in ends)
    name, step = events(together / "hosts")[-1]
    assert name == "preempted" and 14 <= step < 4000
    assert checkpoint.load(str(together / "hosts")).examples_seen == 64 + 16 * (step - 4)
    assert len(lines(together / "host0.txt")) == step - 4
    assert f"stopped and saved at step {step:,} of 4,000" in ends[0]["err"]
    assert "stopped and saved" not in ends[1]["err"]  # only the first host logs


# ---- wrong settings


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., dict[str, Any]]]:
    """The command in this process, which has 8 devices: (words) -> code, out and err."""

    def call(*words: str) -> dict[str, Any]:
        capsys.readouterr()
        devices = ["--config.devices.platform=auto", "--config.devices.cpu_count=0", "--config.mesh.data=4"]
        code = pretrain.main([CONFIG, *devices, *words])
        return {"code": code, **capsys.readouterr()._asdict()}

    settings = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        yield call
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.batch_size=20"], "batch_size 20 does not divide over 8 devices (replica=1, data=4, fsdp=2); "
         "set --config.batch_size=16 or 24"),
        (["--config.model.image_size=18"], "config.model: image size (18, 18) is not a multiple of the patch size (4, 4); "
         "nearest that is: (16, 16)"),
        (["--config.data.shards="], "no shards given; name the folder that data_pipeline.build wrote with "
         "--config.data.shards=FOLDER"),
        (["--config.data.shards=no/such/folder"], "no shards in no/such/folder: it has no shards.parquet; "
         "data_pipeline.build writes one when it has finished"),
        (["--config.data.split=dev"], "no split 'dev' in {shards}; there are: train"),
        (["--config.mesh.data=16"], "mesh replica=1, data=16, fsdp=2 does not fit 8 devices; "
         "set --config.mesh.replica=1 --config.mesh.data=4 --config.mesh.fsdp=2"),
        (["--config.mesh.fsdp=5", "--config.mesh.data=-1"], "mesh replica=1, data=-1, fsdp=5 does not fit 8 devices; "
         "set --config.mesh.replica=1 --config.mesh.data=8 --config.mesh.fsdp=1"),
        (["--config.duration=5 hours"], "cannot read the duration '5 hours': write '500 steps', '94000 examples' or '800 epochs'"),
        (["--config.duration=3 examples"], "duration '3 examples' is less than one step of 16 examples"),
        (["--config.batch_size=0"], "batch_size is 0; it has to be a whole number of at least 1; set --config.batch_size"),
        (["--config.model.channels=3"], "config.model: channels is 3, but CT and MR slices have 1; "
         "set --config.model.channels=1"),
        (["--config.optimizer.clip_norm=-1.0"], "optimizer.clip_norm is -1.0; it has to be a number above 0, or None; "
         "set --config.optimizer.clip_norm"),
        (["--config.data.canvas=(16,16)"], "slices of up to 32x32 px do not fit the canvas 16x16; "
         "set --config.data.canvas=(32,32) or build the shards with --size=16"),
        (["--workdir=s3://bucket/run"], "s3://bucket/run is an address that runs cannot use: they take folders and gs://bucket/run; "
         "mount the bucket and name the folder"),
        (["--workdir=/proc/run"], "cannot write to the work directory /proc/run ([Errno 2] No such file or directory: '/proc/run'); "
         "choose another --workdir"),
        (["--json=no/such/outcome.json"], "--json=no/such/outcome.json: there is no folder no/such; make it first"),
    ],
)  # fmt: skip
def test_wrong_setting_is_one_line_and_exit_code_2(
    words: list[str], message: str, here: Callable[..., Any], tiny_shards: Path, tmp_path: Path
) -> None:
    result = here(f"--config.data.shards={tiny_shards}", f"--workdir={tmp_path}/run", *words)
    assert (result["code"], result["out"]) == (2, "")
    assert result["err"] == f"error: {message.replace('{shards}', str(tiny_shards))}\n"
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize(
    "word", ["model.mask_ration=0.5", "devices.multihost=maybe", "optimizer.clip_norm=abc", "data.threads=many"]
)
def test_override_that_cannot_be_read_is_one_line_and_exit_code_2(
    word: str, here: Callable[..., Any], tmp_path: Path
) -> None:
    result = here(f"--workdir={tmp_path}/run", f"--config.{word}", f"--config.data.shards={tmp_path}")
    assert (result["code"], result["out"]) == (2, "")
    assert result["err"].startswith("error: ") and result["err"].count("\n") == 1
    assert word.split("=")[0] in result["err"]


def test_work_directory_of_another_model_is_left_alone(
    alone: Path, here: Callable[..., Any], tiny_shards: Path
) -> None:
    workdir = alone / "straight"
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    result = here(f"--config.data.shards={tiny_shards}", f"--workdir={workdir}", "--config.model.width=64")
    assert (result["code"], result["out"]) == (2, "")
    assert result["err"].splitlines()[1:] == [
        f"error: checkpoint {workdir}/checkpoints/12 does not fit this config's model (tensors that differ: 51): "
        "params/decoder/embed/kernel is (32, 16) in the checkpoint, (64, 16) in the config; "
        "params/encoder/blocks/attn/proj/bias is (2, 32) in the checkpoint, (2, 64) in the config; "
        "params/encoder/blocks/attn/proj/kernel is (2, 32, 32) in the checkpoint, (2, 64, 64) in the config; …. "
        "Use the config it was trained with, or another --workdir"
    ]
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before


def test_host_without_multihost_is_refused(
    here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    result = here(f"--workdir={tmp_path}")
    assert (result["code"], result["out"]) == (2, "")
    assert result["err"] == (
        "error: JAX_NUM_PROCESSES is 2 but devices.multihost is False, so that each host would train alone in the same work "
        "directory; set --config.devices.multihost=true\n"
    )


@pytest.mark.long
def test_divergence_is_exit_code_64_and_saves_nothing(tiny_shards: Path, alone: Path, tmp_path: Path) -> None:
    words = [CONFIG, f"--config.data.shards={tiny_shards}", *ONE_DEVICE, f"--workdir={tmp_path}/run"]
    result = run(alone, *words, "--config.optimizer.base_learning_rate=1e30")
    assert (result["code"], result["out"]) == (64, "")
    assert result["err"].splitlines()[-1] == (
        "error: parameter_norm is inf at step 2; there is no checkpoint yet, and the run went back 3 times. Try a lower "
        "--config.optimizer.base_learning_rate or --config.optimizer.clip_norm=1.0"
    )
    assert "Traceback" not in result["err"]
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert events(tmp_path / "run") == [("started", 0), *[("rolled-back", 2)] * 3]


def test_wrong_setting_ends_the_process_with_2(tmp_path: Path) -> None:
    result = run(tmp_path, CONFIG, f"--workdir={tmp_path}/run", "--config.batchsize=3")
    assert (result["code"], result["out"]) == (2, "")
    assert result["err"] == "error: no config field 'batchsize'; did you mean --config.batch_size?\n"


# ---- help


def test_help_has_options_exit_codes_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "--config",
        "--workdir",
        "--fields",
        "--json FILE",
        "exit codes:",
        "64  training diverged",
        "75  stopped",
        "examples:",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workdir=run"], "the following arguments are required: --config"),
        ([CONFIG], "the following arguments are required: --workdir"),
        ([CONFIG, "--workdir=run", "--batch_size=3"], "unrecognized arguments: --batch_size=3"),
    ],
)
def test_wrong_usage_names_the_argument(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.endswith(f"error: {message}\n")


def test_fields_are_listed_with_their_values_and_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main([CONFIG, "--fields", "--config.batch_size=24"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    listed: Mapping[str, str] = dict(line.split(" = ", 1) for line in shown.out.splitlines())
    assert listed["batch_size"] == "24" and listed["model.image_size"] == "(16, 16)"
    assert listed.keys() == configs.flatten(configs.load("tests/configs/tiny.py")).keys()
    assert listed["devices.compilation_cache"] == "'~/.cache/curia_jax/compilations'"  # on unless turned off
