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
import importlib.abc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from curia_common import logs
from curia_common.errors import UserError, fault_location
from curia_common.exit_codes import MEANINGS, ExitCode

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
    stopped: str = "stopped; rerun the same command to resume", quote_faults: bool = True,
) -> int:  # fmt: skip
    """Parses the arguments, runs the command, and turns what happens into one line and an exit code.

    Args:
      action: gets the parsed arguments; returns an exit code, or None for 0.
      stopped: said when Ctrl-C or SIGTERM ended it.
      quote_faults: False says only type and line of an unforeseen error, because its text may quote header values.
    """
    try:
        args = parser.parse_args(argv)
    except SystemExit as error:  # argparse has printed what is wrong
        return int(error.code or 0)
    ignore_working_directory()
    logs.configure()
    try:
        with _signals():
            check_json(getattr(args, "json", None))
            return int(action(args) or ExitCode.DONE)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return ExitCode.RESTART
    except OSError as error:
        if error.errno is None:
            return _fault(error, quote_faults)
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}; fix that and rerun the same command", file=sys.stderr)
        return ExitCode.RESTART
    except Exception as error:  # noqa: BLE001 - the last handler of the command
        return _fault(error, quote_faults)


def _fault(error: Exception, quote: bool) -> int:
    if quote:
        traceback.print_exception(error)
    print(f"error: unforeseen fault ({fault_location(error)}); please report it", file=sys.stderr)
    return ExitCode.FAULT


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """The first SIGINT or SIGTERM raises KeyboardInterrupt; a second SIGINT ends the process at once with 130."""
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            if number == signal.SIGINT:
                print("interrupted again: stopped at once", file=sys.stderr)
                sys.stderr.flush()
                os._exit(ExitCode.INTERRUPTED)
            return  # a second SIGTERM must not disturb the clean-up of the first
        asked = True
        raise KeyboardInterrupt

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: a test or a notebook; whoever owns the signals keeps them
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def check_json(file: str | None) -> None:
    """Refuses a result file that could not be written, before work is spent on it.

    Raises:
      UserError: its folder does not exist, or it is one.
    """
    if file is None:
        return
    path = Path(file)
    if path.is_dir():
        raise UserError(f"--json={file} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--json={file}: there is no folder {path.parent}; make it first")


def write_json(file: str | None, content: Any) -> None:
    """Writes the result of a command where --json asked for it."""
    if file is not None:
        Path(file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def at_least(option: str, value: int | float, low: int | float) -> None:
    """Raises UserError where the value of an option is below what it has to be."""
    if not value >= low:
        raise UserError(f"{option} is {value:g}; it has to be at least {low:g}")
