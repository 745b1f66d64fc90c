"""The contract between a launcher and its processes: what is set is read back, and what another start left is refused."""

import pytest

from curia_common.errors import DoesNotFitError
from curia_common.launching import Contract

ONE = Contract("run", "3", "tpu", 4, 16, coordinator="10.0.0.1:8476")
TWO_SLICES = Contract("run", "3", "tpu", 8, 32, slices=2)


@pytest.mark.parametrize("contract", [ONE, TWO_SLICES])
def test_contract_survives_the_environment(contract: Contract) -> None:
    environment = contract.environment()
    assert Contract.of({"HOME": "/", **environment}) == contract
    contract.check_environment(environment)


def test_process_without_a_launcher_has_no_contract() -> None:
    assert Contract.of({"JAX_PROCESS_ID": "1"}) is None


@pytest.mark.parametrize(
    ("contract", "changed", "message"),
    [
        (ONE, {"JAX_COORDINATOR_ADDRESS": "10.0.0.9:1"}, "is 10.0.0.9:1, but 10.0.0.1:8476 for attempt 3 of run run; it is left"),
        (ONE, {"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is 2, but 4 for attempt 3"),
        (ONE, {"MEGASCALE_COORDINATOR_ADDRESS": "x"}, "MEGASCALE_COORDINATOR_ADDRESS is set, but .* one TPU slice"),
        (TWO_SLICES, {"MEGASCALE_NUM_SLICES": "4"}, "MEGASCALE_NUM_SLICES is 4, but .* 2 TPU slices"),
    ],
)  # fmt: skip
def test_environment_of_another_start_is_refused(contract: Contract, changed: dict[str, str], message: str) -> None:
    with pytest.raises(DoesNotFitError, match=message):
        contract.check_environment({**contract.environment(), **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"CURIA_LAUNCH_DEVICES": "many"}, "CURIA_LAUNCH_DEVICES is 'many'"), ({}, "CURIA_LAUNCH_ATTEMPT is not set")],
)
def test_unreadable_contract_names_the_variable(changed: dict[str, str], message: str) -> None:
    environment = {**ONE.environment(), **changed}
    if not changed:
        del environment["CURIA_LAUNCH_ATTEMPT"]
    with pytest.raises(DoesNotFitError, match=message):
        Contract.of(environment)
