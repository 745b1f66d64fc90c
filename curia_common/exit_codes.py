"""Exit codes of every command. A launcher decides by them whether to restart a job, so each has one meaning.

The numbers follow sysexits.h where it has one (64-78), and leave 126 and above to shells and signals.
"""

import enum


class ExitCode(enum.IntEnum):
    """Why a command ended."""

    DONE = 0
    FAULT = 1  # unforeseen: a bug
    USAGE = 2  # what was typed or configured is wrong; nothing was changed
    DIVERGED = 64  # a loss or norm is not finite, or far too large for long
    DATA = 65  # the input data, the dataset or the checkpoint is damaged, incomplete or not the one expected
    DOES_NOT_FIT = 66  # preflight: the run does not fit the accelerators
    RESTART = (
        75  # stopped by a signal, failing storage, a lost or stuck host; what is finished is saved: rerun the command
    )
    INTERRUPTED = 130  # a second Ctrl-C: stopped at once, nothing saved for it


MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.FAULT: "unforeseen fault of the program; please report it",
    ExitCode.USAGE: "wrong usage or configuration; nothing was changed",
    ExitCode.DIVERGED: "training diverged: a loss or norm is not finite",
    ExitCode.DATA: "input data, dataset or checkpoint is damaged, incomplete or not the expected one",
    ExitCode.DOES_NOT_FIT: "the run does not fit the accelerators, or a host is not as launched",
    ExitCode.RESTART: "stopped by a signal, failing storage or a lost host, finished work is saved; rerun the command to resume",
    ExitCode.INTERRUPTED: "second Ctrl-C: stopped at once",
}

# After these a restart would fail in the same way.
FINAL = (ExitCode.USAGE, ExitCode.DIVERGED, ExitCode.DATA, ExitCode.DOES_NOT_FIT)
