"""Profiles that are asked for while a run continues."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from curia_common import signals
from curia_jax import profiling, training
from tests import two_hosts


@pytest.mark.parametrize("asked_by", ["file", "signal"])
def test_request_traces_the_next_steps_and_the_run_continues(asked_by: str, tmp_path: Path) -> None:
    received = signals.Received(threaded=False)
    with profiling.Profiler(str(tmp_path), received) as profiler:
        if asked_by == "file":
            (tmp_path / profiling.REQUEST).write_text("2")
        else:
            received.on_request()
        step, deadline = 0, time.monotonic() + 60
        while not list(tmp_path.rglob("*.xplane.pb")) and time.monotonic() < deadline:
            step += 1
            jax.block_until_ready(jnp.arange(3) + 1)
            profiler.follow(training.Report(step, {}, 0.0, 0.0))
            time.sleep(0.01)
    assert not (tmp_path / profiling.REQUEST).exists()
    (trace,) = tmp_path.rglob("*.xplane.pb")
    first = step - (2 if asked_by == "file" else profiling.STEPS) + 1
    assert trace.is_relative_to(tmp_path / f"profiles/step-{first}/host-0")


def test_profile_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / profiling.FOLDER).write_text("a file where the folder should be")
    received = signals.Received(threaded=False)
    with profiling.Profiler(str(tmp_path), received) as profiler:
        received.on_request()
        deadline = time.monotonic() + 60
        while (tmp_path / profiling.REQUEST).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        for step in range(1, 20):
            profiler.follow(training.Report(step, {}, 0.0, 0.0))


@pytest.mark.long
@pytest.mark.parametrize(("asked_by", "steps"), [("SIGUSR2", profiling.STEPS), ("request", 2)])
def test_request_on_one_host_traces_every_host(asked_by: str, steps: int, tmp_path: Path) -> None:
    ends = two_hosts.run(tmp_path, asked_by, who=1)
    assert [end.code for end in ends] == [0, 0], [end.err for end in ends]
    for host, end in enumerate(ends):
        assert len(list((tmp_path / profiling.FOLDER).glob(f"step-*/host-{host}/**/*.xplane.pb"))) == 1
        assert f"profiling {steps} steps from step " in end.log
