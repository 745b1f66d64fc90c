"""What the processes of a pod on this machine get."""

import pytest

from launch import gang, spec


def test_environment_of_a_worker_is_the_contract_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another launcher left is gone, and --env is there."""
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "elsewhere:1")
    assert not {"MEGASCALE_NUM_SLICES", "JAX_COORDINATOR_ADDRESS"} & gang.clean_environment().keys()
    there = spec.topologies.parse("tpu7x:2x2x2")
    made = spec.LaunchSpec("local", "run", "pretrain", (), there, None, environment=(("XLA_FLAGS", "--a"),))
    first, second = gang.environments_of(made, "4", "127.0.0.1:5")
    assert first | {"JAX_PROCESS_ID": "1"} == second
    wanted = {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "CURIA_LAUNCH_PLATFORM": "cpu", "CURIA_LAUNCH_DEVICES": "16",
        "CURIA_LAUNCH_ATTEMPT": "4", "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": "--a",
    }  # fmt: skip
    assert first.items() >= wanted.items()
