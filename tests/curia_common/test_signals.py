"""A command that saves its work when it is told to stop, whenever that is."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curia_common import signals

PROGRAM = """
import os, signal, sys, time
from curia_common import cli, logs, signals

def action(args):
    print("started", flush=True)
    {starting}
    with signals.receiving() as received:
        asked = []
        received.on_stop = lambda: asked.append(True)
        received.on_request = lambda: print("requested", flush=True)
        print("working", flush=True)
        while not asked:
            time.sleep(0.01)
    print("saving", flush=True)
    time.sleep({saving})
    print("saved", flush=True)
    return 75

sys.exit(cli.run(cli.parser("saver", "", examples="saver"), action, None, saves=True))
"""
# The main thread in a library that returns minutes later, as a compiler does; Python runs no handler meanwhile.
IN_C = "import ctypes; ctypes.CDLL(None).pause.restype; [ctypes.CDLL(None).sleep(60) for _ in range(100)]"


def start(starting: str = "pass", saving: float = 0.0, before: str = "") -> subprocess.Popen[str]:
    program = before + PROGRAM.format(starting=starting, saving=saving)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    while (found := process.stdout.readline()) != f"{line}\n":
        assert found, process.communicate()


@pytest.mark.parametrize("number", signals.STOPPING)
def test_stop_while_starting_ends_at_once_with_75(number: signal.Signals) -> None:
    process = start(starting="import threading; threading.Event().wait()")
    wait_for(process, "started")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (75, "", "stopped before there was anything to save\n")


def test_stop_while_the_main_thread_is_in_c_ends_at_once(tmp_path: Path) -> None:
    process = start(starting=IN_C)
    wait_for(process, "started")
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=50)  # the first sleep would take 60 s
    assert (process.returncode, err) == (75, "stopped before there was anything to save\n")


@pytest.mark.parametrize("number", signals.STOPPING)
def test_stop_while_working_saves_and_exits_75(number: signal.Signals) -> None:
    process = start()
    wait_for(process, "working")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (75, "saving\nsaved\n", "")


def test_twenty_sigterms_while_saving_keep_the_exit_code() -> None:
    process = start(saving=0.5)
    wait_for(process, "working")
    for _ in range(20):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.splitlines()[-1], err) == (75, "saved", "")


def test_second_ctrl_c_while_saving_exits_130() -> None:
    process = start(saving=100)
    wait_for(process, "working")
    process.send_signal(signal.SIGINT)
    wait_for(process, "saving")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted again: stopped at once; the same command resumes from what is saved\n"


def test_sigusr2_asks_for_something_and_ends_nothing() -> None:
    process = start()
    wait_for(process, "working")
    process.send_signal(signal.SIGUSR2)
    wait_for(process, "requested")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_sigusr1_shows_the_stacks_and_ends_nothing() -> None:
    process = start()
    wait_for(process, "working")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "most recent call first" in err and " in action" in err


def test_nohup_keeps_a_hang_up_ignored() -> None:
    process = start(before="import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    wait_for(process, "working")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "saving\nsaved\n")


def test_closed_standard_error_ends_nothing() -> None:
    process = start(starting="logs.get_logger('x').info('a'); logs.say('b'); print('c', file=sys.stderr)")
    assert process.stderr is not None
    process.stderr.close()
    wait_for(process, "working")
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert process.returncode == 75


def test_handlers_are_restored_where_a_program_called_the_command() -> None:
    before = [signal.getsignal(number) for number in signals.STOPPING]
    with signals.receiving():
        with signals.receiving() as inner:
            assert not inner.stop_requested
            signal.raise_signal(signal.SIGTERM)
            assert inner.stop_requested
        assert [signal.getsignal(number) for number in signals.STOPPING] != before
    assert [signal.getsignal(number) for number in signals.STOPPING] == before
