"""Two hosts on loopback: processes that add up a number step by step, and what can happen to one of them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# A command of many hosts as curia_jax.run makes one, with a fault in step 5 on host WHO. Without one it ends after 10 steps.
PROGRAM = """
import contextlib, os, pathlib, signal, sys, time
from curia_common import cli, logs
from curia_common.errors import DataError

folder, fault, who, watchdog_seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])

def action(args):
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P
    from curia_jax import hosts, preflight, settings, watchdog
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    hosts.connect(settings.Devices("cpu", 1, True, "", heartbeat_seconds=10))
    me = hosts.number()
    hosts.check_attempt("2" if fault == "attempt" and me == who else "1", 60)
    mesh = jax.make_mesh((2,), ("hosts",), axis_types=(jax.sharding.AxisType.Auto,))
    with contextlib.ExitStack() as closing, hosts.leaving_at_once(closing, 10):
        workdir = pathlib.Path(folder, "elsewhere" if fault == "elsewhere" and me == who else "work")
        workdir.mkdir(exist_ok=True)
        with preflight.probing(str(workdir)):
            hosts.check_agreement({"config": "A" if fault != "skew" or me != who else "B"}, 60)
            preflight.check_shared(str(workdir))
            hosts.barrier("probe", 60)
        if fault == "late" and me == who:
            time.sleep(1000)
        hosts.barrier("work directory", 5 if fault == "late" else 60)
        log = logs.LogFile(folder, me, take_descriptor=True)
        numbers = jax.device_put(jnp.arange(2.0), NamedSharding(mesh, P("hosts")))
        total = jax.jit(lambda x: x + x.sum(), out_shardings=NamedSharding(mesh, P("hosts")))
        jax.block_until_ready(total(numbers))
        dog = closing.enter_context(watchdog.Watchdog(watchdog_seconds, log))
        if fault == "flip":
            from curia_jax import corruption
            everywhere = NamedSharding(mesh, P())
            bits = jax.device_put(jnp.uint32(1 + (2 if me == who else 0)), jax.local_devices()[0])
            state = {"params": jax.make_array_from_single_device_arrays((), everywhere, [bits])}
            abstract = {"params": jax.ShapeDtypeStruct((), jnp.uint32, sharding=everywhere)}
            step = jax.jit(lambda state, batch: (state, {}), donate_argnums=0)
            corruption.Check(step, abstract, mesh, start_step=0, every=1)(state, None)
        if fault in ("SIGUSR2", "request"):
            from jax.experimental import multihost_utils
            from curia_common import signals
            from curia_jax import profiling, training
            received = closing.enter_context(signals.receiving())
            profiler = closing.enter_context(profiling.Profiler(folder, received))
            if me == who:
                os.kill(os.getpid(), signal.SIGUSR2) if fault == "SIGUSR2" else pathlib.Path(folder, profiling.REQUEST).write_text("2")
            step, traced = 0, False
            while not multihost_utils.process_allgather(jnp.array(traced)).all():
                step, numbers = step + 1, jax.block_until_ready(total(numbers))
                dog.beat(f"taking step {step}")
                profiler.follow(training.Report(step, {}, 0.0, 0.0))
                traced = bool(list(pathlib.Path(folder, profiling.FOLDER).glob(f"*/host-{me}/**/*.xplane.pb")))
        for step in range(10):
            dog.beat(f"taking step {step}")
            if step == 5 and me == who and fault:
                pathlib.Path(folder, "happened").touch()
                if fault == "data":
                    raise DataError("shard 3 is damaged; copy it again")
                if fault == "bug":
                    raise ZeroDivisionError("a bug")
                if fault == "stuck":
                    time.sleep(1000)
                if fault.startswith("SIG") and fault != "SIGUSR2":
                    os.kill(os.getpid(), getattr(signal, fault))
            numbers = jax.block_until_ready(total(numbers))
        hosts.meet_at_the_end(60)

sys.exit(cli.run(cli.parser("hosts", "", examples="hosts"), lambda args: action(args), None, saves=True))
"""


class Ended(NamedTuple):
    """How a host ended.

    Attributes:
      code: exit code; None where SIGSTOP held it until the end.
      err: standard error.
      log: its log file.
      seconds: from the fault to its end.
    """

    code: int | None
    err: str
    log: str
    seconds: float


def run(folder: Path, fault: str, who: int = 1, watchdog_seconds: float = 60) -> list[Ended]:
    """Runs both hosts until they end; one that SIGSTOP stopped is killed when the other has ended."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "PYTHONPATH": str(ROOT)}
    # cli.run reads the words of its process; this program has its own.
    program = PROGRAM.replace("cli.run(", "(sys.argv.__delitem__(slice(1, None)), cli.run)[1](")
    command = [sys.executable, "-c", program, str(folder), fault, str(who), str(watchdog_seconds)]
    files = [(folder / f"err{host}").open("w+") for host in (0, 1)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env={**environment, "JAX_PROCESS_ID": str(host)}, stderr=files[host], stdout=files[host]
        )
        for host in (0, 1)
    ]
    ends = _wait(processes, 1 - who if fault in ("SIGSTOP", "late") else None)
    happened = folder / "happened"
    since = happened.stat().st_mtime if happened.exists() else float("inf")
    found = []
    for host, (code, end) in enumerate(ends):
        log = folder / f"logs/host-{host}.log"
        files[host].seek(0)
        found.append(Ended(code, files[host].read(), log.read_text() if log.exists() else "", end - since))
        files[host].close()
    return found


def _wait(processes: Sequence[subprocess.Popen[bytes]], enough: int | None) -> list[tuple[int | None, float]]:
    """Exit code and time of the end of each process."""
    ends: dict[int, float] = {}
    try:
        deadline = time.monotonic() + 280
        while len(ends) < len(processes) and enough not in ends and time.monotonic() < deadline:
            for number, process in enumerate(processes):
                if process.poll() is not None:
                    ends.setdefault(number, time.time())
            time.sleep(0.02)
        return [(process.poll(), ends.get(number, float("inf"))) for number, process in enumerate(processes)]
    finally:
        for process in processes:
            process.kill()
            process.wait()
