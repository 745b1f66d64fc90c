import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from curia_common import logs


def test_log_line_is_the_message_alone_on_standard_error(capsys) -> None:
    logs.configure()
    logs.configure()  # a second call adds no second handler
    logs.get_logger("data_pipeline.stages.commit").info("%d shards in %s", 3, "[folder]")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "3 shards in [folder]\n")


def test_other_hosts_log_warnings_alone(capsys) -> None:
    logs.configure(logging.WARNING)
    logger = logs.get_logger("curia_jax.training")
    logger.info("step 1")
    logger.warning("slow input")
    logs.configure()
    assert capsys.readouterr().err == "slow input\n"


PROGRAM = """
import logging, os, sys, threading
from curia_common import cli, logs

def action(args):
    logs.LogFile(sys.argv.pop(), 3, take_descriptor=True)
    os.write(2, b"from a C library\\n")
    logging.getLogger("orbax").warning("from a Python library")
    logs.get_logger("x").info("for people")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    raise KeyError("a bug")

folder = sys.argv[1]
run = cli.parser("logs", "", examples="logs")
run.add_argument("folder")
sys.exit(cli.run(run, action, None))
"""


def test_log_file_has_tracebacks_that_standard_error_lacks(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/host-3.log").write_text("of an earlier start\n")
    found = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 1
    people, error = found.stderr.splitlines()
    assert people == "for people"
    log = tmp_path / "logs/host-3.log"
    assert re.fullmatch(
        rf"error: unforeseen fault \(KeyError at .*\); its traceback is in {log}; please report it", error
    )
    text = log.read_text()
    for line in (
        "of an earlier start",
        "from a C library",
        "WARNING orbax: from a Python library",
        "for people",
        error,
    ):
        assert line in text
    assert "KeyError: 'a bug'" in text and "ZeroDivisionError" in text


def test_stream_whose_reader_is_gone_loses_what_is_written() -> None:
    reader, writer = os.pipe()
    stream = logs.Unbreakable(os.fdopen(writer, "w", buffering=1))
    os.close(reader)
    assert stream.write("lost\n") == 5
    stream.flush()
    assert not stream.isatty() and stream.fileno() == writer
