"""Scaffolding that every command shares: parser, signals, exit codes, one line per error, --json.

A command module imports nothing heavy at its top, so that --help answers at once and `run` can first stop Python from
importing what lies in the working directory:

    def parser() -> argparse.ArgumentParser:
        return cli.parser("python -m data_pipeline.verify", __doc__, examples=…, codes=(ExitCode.DATA, …))

    def main(argv: Sequence[str] | None = None) -> int:
        return cli.run(parser(), verify, argv)

    if __name__ == "__main__":
        sys.exit(main())
"""

import argparse
import contextlib
import faulthandler
import importlib.abc
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from curia_common import logs, signals
from curia_common.errors import UserError, fault_location
from curia_common.exit_codes import MEANINGS, ExitCode

_stop_requested = False  # since `run` began; for `check_stop`
_running = False  # inside `run`
_end = threading.Lock()
_own_process = False  # see `owns_process`
_command = ""
_last_words: list[Callable[[int, str | None], None]] = []  # see `on_end`

LEAVE_SECONDS = 10.0
ALWAYS = (ExitCode.DONE, ExitCode.FAULT, ExitCode.USAGE)
STOPPABLE = (ExitCode.RESTART, ExitCode.INTERRUPTED)


class Parser(argparse.ArgumentParser):
    """Collects `--config.field=value` words, which argparse does not know, in `overrides` where `takes_overrides`."""

    takes_overrides = False

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse, but with the overrides taken out of the words that are left."""
        found, rest = super().parse_known_args(args, namespace)
        if self.takes_overrides:
            found.overrides = [word for word in rest if word.startswith("--config.")]
            rest = [word for word in rest if not word.startswith("--config.")]
        return found, rest


def parser(
    prog: str, description: str | None, *, examples: str, codes: Sequence[ExitCode] = (), overrides: bool = False
) -> Parser:
    """A parser whose help ends with examples and the exit codes.

    Args:
      prog: as the user types it ("python -m curia_jax.plan").
      description: the module's docstring.
      examples: one command a line.
      codes: exit codes beside ALWAYS and STOPPABLE.
      overrides: also takes `--config.field=value`, as a list in `args.overrides`.
    """
    table = "\n".join(f"  {code:<4d}{MEANINGS[code]}" for code in sorted({*ALWAYS, *STOPPABLE, *codes}))
    lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())
    made = Parser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"examples:\n{lines}\n\nexit codes:\n{table}",
    )  # fmt: skip
    made.takes_overrides = overrides
    return made


def add_json(to: argparse.ArgumentParser, what: str) -> None:
    """Adds `--json FILE`; `run` refuses a file whose folder does not exist before any work is done."""
    to.add_argument("--json", metavar="FILE", help=f"write {what} to this file")


def run(
    parser: argparse.ArgumentParser, action: Callable[[Any], int | None], argv: Sequence[str] | None, *,
    stopped: str = "stopped; rerun the same command to resume", quote_faults: bool = True, saves: bool = False,
) -> int:  # fmt: skip
    """Parses the arguments, runs the command, and turns the outcome into one line and an exit code.

    Args:
      action: gets the parsed arguments; returns an exit code, or None for 0.
      argv: the words after the command; None takes the process's own.
      stopped: the last line after Ctrl-C or SIGTERM.
      quote_faults: False says only type and line of an unforeseen error, because its text may quote header values.
      saves: the command saves its work when it is told to stop, and says so to `signals.receiving`. Until it does, a signal
        ends it at once with 75.
    """
    global _command, _last_words, _stop_requested, _running, _own_process
    own_process = argv is None
    _last_words, _stop_requested, _running, _own_process = [], False, True, own_process
    _command = f"{parser.prog} {shlex.join(sys.argv[1:] if argv is None else argv)}"
    with contextlib.ExitStack() as signalled:
        if saves:
            received = signalled.enter_context(signals.receiving(threaded=own_process))
            if own_process:
                faulthandler.register(signal.SIGUSR1)  # which would end the process
                received.on_stop = lambda: leave(ExitCode.RESTART, "stopped before there was anything to save")
        else:
            signalled.enter_context(_interrupting(restore=not own_process))
        if own_process:  # else a program called it, whose streams and search path are its own
            sys.stderr = logs.Unbreakable(sys.stderr)
            ignore_working_directory()
        code, line = _outcome(parser, action, argv, stopped, quote_faults)
        if own_process:
            signals.ignore_stops()  # the exit code is decided; Python's own end would be killed by a signal and lose it
        claim_end()
        if line is not None:
            logs.say(line)
        for finish in reversed(_last_words):
            finish(code, line)
        _running = False
        if own_process and line == stopped:
            # Libraries that a signal interrupted (such as XLA in a compilation) can crash when Python exits, and lose the exit code.
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(code)
        return code


def _outcome(
    parser: argparse.ArgumentParser, action: Callable[[Any], int | None], argv: Sequence[str] | None, stopped: str,
    quote_faults: bool,
) -> tuple[ExitCode | int, str | None]:  # fmt: skip
    """Exit code and last line of a command."""
    try:
        try:
            args = parser.parse_args(argv)
        except SystemExit as error:  # argparse has printed what is wrong
            return int(error.code or 0), None
        logs.configure()
        check_json(getattr(args, "json", None))
        code = action(args) or ExitCode.DONE
        sys.stdout.flush()  # a reader that has gone is noticed here, and not in Python's own end
        return int(code), None
    except UserError as error:
        return error.exit_code, f"error: {error}"
    except KeyboardInterrupt:
        return ExitCode.RESTART, stopped
    except BrokenPipeError:
        # The reader of standard output closed the pipe: `… | head`. As a shell reports SIGPIPE, which Python ignores.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE, None
    except OSError as error:
        if error.errno is None:
            return _fault(error, quote_faults)
        where = f": {error.filename}" if error.filename else ""
        return ExitCode.RESTART, f"error: {error.strerror or error}{where}; fix that and rerun the same command"
    except Exception as error:  # noqa: BLE001 - the last handler of the command
        return _fault(error, quote_faults)


def _fault(error: Exception, quote: bool) -> tuple[ExitCode, str]:
    """The traceback goes to the log file; where the command has none, to standard error."""
    where = ""
    if quote:
        text = "".join(traceback.format_exception(error))
        if logs.LogFile.current is None:
            print(text, end="", file=sys.stderr)
        else:
            logs.LogFile.current.write(text)
            where = f"; its traceback is in {logs.LogFile.current.path}"
    return ExitCode.FAULT, f"error: unforeseen fault ({fault_location(error)}){where}; please report it"


def command() -> str:
    """The command that is running, as one would type it."""
    return _command


def owns_process() -> bool:
    """Whether the running command owns the process, rather than being called by a program."""
    return _own_process


def on_end(finish: Callable[[int, str | None], None]) -> None:
    """Registers `finish(code, line)`, called after the last line of the running command is printed; last registered, first
    called. Also called when `leave` ends the process; it may end it itself."""
    _last_words.append(finish)


def claim_end() -> None:
    """Before the last line of a process: of several threads that have one, the first says it, and the others wait for the end."""
    if _own_process:
        _end.acquire()


def leave(code: int, line: str, first: Callable[[], None] = lambda: None) -> NoReturn:
    """Ends the process from any thread, whatever the main thread is doing, and within LEAVE_SECONDS even where storage is stuck.

    Args:
      first: what to write before the line.
    """
    claim_end()

    def say_goodbye() -> None:
        first()
        logs.say(line)
        for finish in reversed(_last_words):
            finish(code, line)

    thread = threading.Thread(target=say_goodbye, daemon=True)
    thread.start()
    thread.join(LEAVE_SECONDS)
    os._exit(code)


@contextlib.contextmanager
def _interrupting(*, restore: bool) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt; a second SIGINT ends the process at once with 130."""

    def stop(number: int, frame: FrameType | None) -> None:
        global _stop_requested
        if _stop_requested:
            if number == signal.SIGINT:
                logs.say("interrupted again: stopped at once")
                os._exit(ExitCode.INTERRUPTED)
            return  # a second SIGTERM must not disturb the clean-up of the first
        _stop_requested = True
        raise KeyboardInterrupt

    numbers = [n for n in signals.STOPPING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    try:
        before = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # not the main thread: a test or a notebook; whoever owns the signals keeps them
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items() if restore else ():
            signal.signal(number, handler)


def check_stop() -> None:
    """Raises KeyboardInterrupt where a signal has asked to stop, for before a step that must not happen after one.

    The exception of the signal itself can be lost: Python drops it inside callbacks and destructors, and libraries catch it.
    """
    if _stop_requested:
        raise KeyboardInterrupt


def commit() -> None:
    """Comes before the step that publishes a result: where a signal has asked to stop, it does not happen (KeyboardInterrupt);
    a signal that comes later is too late to stop the command, and ignored."""
    if _running:
        with contextlib.suppress(ValueError):  # not the main thread
            signals.ignore_stops()
    check_stop()


def ignore_working_directory() -> None:
    """Takes the working directory off the module search path, where `python -m` puts it first.

    A folder there that is called like an optional module of a library would be imported in its place (python-gdcm asks for
    `dl`, and a folder `dl` breaks it). It stays where this package can be imported from nowhere else.
    """
    own = Path(__file__).resolve()
    rest = [path for path in sys.path if path and Path(path).resolve() != Path.cwd()]
    before, sys.path[:] = list(sys.path), rest
    found = None
    for finder in sys.meta_path:
        if isinstance(finder, importlib.abc.MetaPathFinder) or hasattr(finder, "find_spec"):
            found = finder.find_spec("curia_common", None)
            if found is not None:
                break
    if found is None or not found.origin or Path(found.origin).resolve().parent != own.parent:
        sys.path[:] = before


def check_json(file: str | None, option: str = "--json") -> None:
    """Refuses a result file that could not be written, before work is spent on it.

    Raises:
      UserError: its folder does not exist, or the path is a folder.
    """
    if file is None:
        return
    path = Path(file)
    if path.is_dir():
        raise UserError(f"{option}={file} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option}={file}: there is no folder {path.parent}; make it first")


def write_json(file: str | None, content: Any) -> None:
    """Writes the result of a command where --json asked for it."""
    if file is not None:
        commit()
        Path(file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def at_least(option: str, value: int | float, low: int | float) -> None:
    """Raises UserError where the value of an option is below what it has to be."""
    if not value >= low:
        raise UserError(f"{option} is {value:g}; it has to be at least {low:g}")
