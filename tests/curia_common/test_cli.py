"""The scaffolding of commands, through a small command of its own."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curia_common import cli, errors
from curia_common.exit_codes import ExitCode


def make_parser(**settings: bool) -> argparse.ArgumentParser:
    made = cli.parser(
        "python -m example", "Does things.", examples="python -m example --number=3", codes=(ExitCode.DATA,), **settings
    )
    made.add_argument("--number", type=int, default=1)
    cli.add_json(made, "the number")
    return made


def run(action, *words: str, quote_faults: bool = True) -> int:
    return cli.run(make_parser(), action, words, quote_faults=quote_faults)


def test_help_shows_examples_and_the_exit_codes_of_the_command(capsys) -> None:
    assert run(lambda args: None, "--help") == 0
    text = capsys.readouterr().out
    assert "python -m example --number=3" in text
    for code in (0, 1, 2, 65, 75, 130):
        assert f"\n  {code:<4d}" in text
    assert "\n  64 " not in text


def test_unknown_option_is_exit_2(capsys) -> None:
    assert run(lambda args: None, "--nubmer=3") == 2
    assert "--nubmer=3" in capsys.readouterr().err


def test_overrides_are_collected_only_where_the_command_takes_them(capsys) -> None:
    seen = []
    words = ("--number=2", "--config.model.size=B")
    assert cli.run(make_parser(overrides=True), lambda args: seen.append(args), words) == 0
    assert seen[0].overrides == ["--config.model.size=B"] and seen[0].number == 2
    assert run(lambda args: None, *words) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [(errors.UserError, 2), (errors.DivergedError, 64), (errors.DataError, 65), (errors.DoesNotFitError, 66)],
)
def test_an_error_the_user_can_fix_is_one_line_and_its_code(error, code: int, capsys) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise error("the shard is damaged; copy it again")

    assert run(fail) == code
    assert capsys.readouterr().err == "error: the shard is damaged; copy it again\n"


def test_full_disk_is_one_line_that_names_the_file_and_asks_to_rerun(capsys) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise OSError(28, "No space left on device", "shards/a")

    assert run(fail) == 75
    assert capsys.readouterr().err == "error: No space left on device: shards/a; fix that and rerun the same command\n"


@pytest.mark.parametrize("quote", [True, False])
def test_unforeseen_fault_is_exit_1_and_quotes_its_text_only_where_allowed(quote: bool, capsys) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise KeyError("Doe^Jane")

    assert run(fail, quote_faults=quote) == 1
    text = capsys.readouterr().err
    assert text.splitlines()[-1].startswith("error: unforeseen fault (KeyError at test_cli.py:")
    assert ("Doe^Jane" in text) == quote


@pytest.mark.parametrize("name", ["missing/result.json", "."])
def test_json_file_that_cannot_be_written_is_refused_before_work_starts(tmp_path: Path, name: str, capsys) -> None:
    assert run(lambda args: pytest.fail("it started"), f"--json={tmp_path / name}") == 2
    assert "--json=" in capsys.readouterr().err


def test_write_json_writes_only_where_asked(tmp_path: Path) -> None:
    cli.write_json(None, {})
    cli.write_json(str(tmp_path / "a.json"), {"n": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 1}


def test_at_least_names_option_value_and_limit() -> None:
    cli.at_least("--workers", 1, 1)
    with pytest.raises(errors.UserError, match="--workers is 0; it has to be at least 1"):
        cli.at_least("--workers", 0, 1)
    with pytest.raises(errors.UserError):
        cli.at_least("--timeout", float("nan"), 0)


SLOW = """
import sys, time
from curia_common import cli
def action(args):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep({clean_up})
sys.exit(cli.run(cli.parser("slow", "", examples="slow"), action, []))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_cleans_up_and_exits_75(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(clean_up=0)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (75, "cleaning\n", "stopped; rerun the same command to resume\n")


def test_library_that_crashes_after_a_stop_does_not_replace_the_exit_code() -> None:
    program = """
import atexit, os, signal, sys
from curia_common import cli

def action(args):
    atexit.register(os.abort)
    print("result")
    os.kill(os.getpid(), signal.SIGINT)

sys.exit(cli.run(cli.parser("crashes", "", examples="crashes"), action, None))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (75, "result\n")
    assert found.stderr == "stopped; rerun the same command to resume\n"


LEAVES = """
import sys, threading, time
from curia_common import cli
cli.LEAVE_SECONDS = 0.5

def action(args):
    cli.on_end(lambda code, line: print("told", code, line, flush=True))
    threading.Thread(target=cli.leave, args=(75, "error: stuck", lambda: time.sleep({stuck}))).start()
    threading.Event().wait()

sys.exit(cli.run(cli.parser("leaves", "", examples="leaves"), action, None))
"""


@pytest.mark.parametrize("stuck", [0, 1000])
def test_leave_ends_the_process_even_where_storage_hangs(stuck: int) -> None:
    program = [sys.executable, "-c", LEAVES.format(stuck=stuck)]
    found = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert found.returncode == 75
    assert (found.stdout, found.stderr) == (("", "") if stuck else ("told 75 error: stuck\n", "error: stuck\n"))


@pytest.mark.parametrize("published", [False, True])
def test_commit_publishes_all_or_nothing_however_the_stop_was_swallowed(published: bool, tmp_path: Path) -> None:
    """A callback or destructor swallows KeyboardInterrupt; a signal after the commit is too late."""
    program = f"""
import os, signal, sys
from curia_common import cli

class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def action(args):
    if {not published}:
        Swallows()
    cli.commit()
    os.kill(os.getpid(), signal.SIGINT)
    open({str(tmp_path / "result")!r}, "w").close()

sys.exit(cli.run(cli.parser("publisher", "", examples="publisher"), action, None, stopped="stopped; nothing was written"))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.returncode, (tmp_path / "result").exists()) == ((0, True) if published else (75, False)), found.stderr
    assert found.stderr.endswith("" if published else "stopped; nothing was written\n")


def test_second_ctrl_c_exits_130_at_once_but_a_second_sigterm_waits() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(clean_up=60)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


@pytest.mark.parametrize("lines", [3, 100_000])
def test_reader_that_closes_the_pipe_is_no_error(lines: int) -> None:
    program = (
        "import sys, time\nfrom curia_common import cli\n"
        f"def action(args):\n    time.sleep(0.5)\n    for n in range({lines}): print('line', n)\n"
        "sys.exit(cli.run(cli.parser('list', 'Lists.', examples=''), action, None))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(30) == 128 + signal.SIGPIPE


def test_commands_do_not_import_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "dl").mkdir()
    program = (
        "import sys\nfrom curia_common import cli\ncli.ignore_working_directory()\n"
        "try:\n    import dl\nexcept ImportError:\n    print('not found')\nimport data_pipeline.stages"
    )
    (tmp_path / "command.py").write_text(program)
    found = subprocess.run([sys.executable, "-m", "command"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "not found\n"


def test_curia_common_imports_neither_jax_nor_dicom_nor_numpy() -> None:
    program = (
        "import sys, curia_common.cli, curia_common.progress, curia_common.errors\n"
        "print([name for name in ('jax', 'pydicom', 'numpy', 'rich', 'curia_jax', 'data_pipeline') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert found.stdout == "[]\n"
