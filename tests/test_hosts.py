"""Two hosts, one of which fails: both end, with the right exit codes, one line each, and their stacks."""

import re
from pathlib import Path

import pytest

from tests import two_hosts

HEARTBEAT = 10  # seconds, in two_hosts.PROGRAM
# JAX's own time-out is 300 s. Below that, and far above what a loaded machine needs.
BOUND = 120


def last_line(end: two_hosts.Ended) -> str:
    """The one line of a host that starts with "error"; it is the last."""
    lines = [line for line in end.err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and end.err.splitlines()[-1] == lines[0], end.err
    return lines[0]


def test_hosts_without_a_fault_end_with_0(tmp_path: Path) -> None:
    assert [end.code for end in two_hosts.run(tmp_path, "")] == [0, 0]


@pytest.mark.parametrize(("who", "fault", "code", "other"), [(1, "data", 65, 65), (0, "bug", 1, 75)])
def test_host_that_fails_ends_with_its_code_and_tells_the_others(
    who: int, fault: str, code: int, other: int, tmp_path: Path
) -> None:
    ends = two_hosts.run(tmp_path, fault, who)
    assert (ends[who].code, ends[1 - who].code) == (code, other)
    assert max(end.seconds for end in ends) < BOUND
    line = last_line(ends[who])
    assert last_line(ends[1 - who]) == (
        f"error: host {1 - who} of 2 ends because host {who} ended with exit code {code}: {line.removeprefix('error: ')}"
    )
    # A traceback only for a bug, and only in the log.
    assert ("ZeroDivisionError: a bug" in ends[who].log) == (fault == "bug")


@pytest.mark.long
def test_stuck_host_ends_all_with_75_and_every_hosts_stacks(tmp_path: Path) -> None:
    ends = two_hosts.run(tmp_path, "stuck", watchdog_seconds=15)
    assert [end.code for end in ends] == [75, 75]
    for end in ends:
        assert re.search(
            r"made no progress for 15 s while taking step 5; the stacks of its threads are in ", last_line(end)
        )
        assert re.search(r'File "<string>", line \d+ in action', end.log), end.log  # where the main thread is


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_lost_host_ends_the_other_with_75_and_its_stacks(fault: str, who: int, tmp_path: Path) -> None:
    """Host 0 is also JAX's coordinator."""
    end = two_hosts.run(tmp_path, fault, who)[1 - who]
    assert end.code == 75 and end.seconds < BOUND
    # JAX ends the process when the heartbeats stop, unless the collective that failed has waited longer than that.
    how = rf": no answer for {HEARTBEAT} s, or its coordinator ended| \(.*Gloo.*\)"
    assert re.fullmatch(rf"error: host {1 - who} of 2 lost another host({how}); rerun the same command", last_line(end))
    assert re.search(r'File "<string>", line \d+ in action', end.log), end.log


def test_barrier_names_itself_and_the_host_that_is_missing(tmp_path: Path) -> None:
    ends = two_hosts.run(tmp_path, "late")
    assert ends[0].code == 75
    assert last_line(ends[0]) == (
        "error: host 0 of 2 waited 5 s at 'work directory' for host 1; its log says what it does; rerun the same command"
    )


def test_hosts_with_different_configs_are_refused(tmp_path: Path) -> None:
    ends = two_hosts.run(tmp_path, "skew")
    assert [end.code for end in ends] == [66, 66]
    assert all(
        "hosts differ in config: A on host 0, B on host 1; start the same version" in last_line(end) for end in ends
    )


def test_process_of_an_earlier_attempt_ends_both_with_75(tmp_path: Path) -> None:
    ends = two_hosts.run(tmp_path, "attempt")
    assert [end.code for end in ends] == [75, 75]
    assert last_line(ends[1]).startswith(
        "error: host 1 of 2 is of attempt 2, but host 0 of attempt 1: a process of an earlier start"
    )
    assert "host 0 of 2 ends because host 1 ended with exit code 75" in last_line(ends[0])
