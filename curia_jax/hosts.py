"""The hosts of a run: how they find each other, wait for each other, and end together.

JAX's own health check ends a process with SIGABRT, and only after the failing one has been silent for the heartbeat. Here a
host that fails says so to the others, with its exit code, and every end is one line and an exit code.
"""

import contextlib
import ctypes
import faulthandler
import functools
import hashlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax._src import distributed  # the client of JAX's coordination service has no public name

from curia_common import cli, logs
from curia_common.errors import DoesNotFitError, RestartError, UserError
from curia_common.exit_codes import FINAL, ExitCode
from curia_common.launching import ADDRESS, COUNT, NUMBER
from curia_jax import storage
from curia_jax.settings import Devices

POLL_SECONDS = 0.5
FAREWELL_SECONDS = 3.0  # that a failing host takes at most to tell the others
# In errors of collectives on CPU (Gloo), GPU (NCCL) and TPU (megascale) whose peer is gone.
_LOST = re.compile(r"gloo|nccl|megascale|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED", re.IGNORECASE)
_ENDED, _SEEN, _FACTS, _ATTEMPT = "curia/ended", "curia/seen", "curia/facts", "curia/attempt"
_ending_together = False  # the hosts have met at the end of the run
_stop_handler: Any = None
_watcher: threading.Thread | None = None
_abandoned: list[contextlib.ExitStack] = []


class End(NamedTuple):
    """How another host ended.

    Attributes:
      code: its exit code.
      text: its last line.
    """

    host: int
    code: int
    text: str


def connect(devices: Devices) -> None:
    """Connects to the other hosts. Cloud TPUs find them by themselves; elsewhere the variables ADDRESS, COUNT and NUMBER do.

    Raises:
      UserError: they cannot be found.
    """
    global _stop_handler, _watcher
    _end_on_abort(devices.heartbeat_seconds)
    before = _handler_of(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            coordinator_address=os.environ.get(ADDRESS),
            num_processes=int(os.environ[COUNT]) if COUNT in os.environ else None,
            process_id=int(os.environ[NUMBER]) if NUMBER in os.environ else None,
            heartbeat_timeout_seconds=devices.heartbeat_seconds,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"devices.multihost: {error}; set {ADDRESS}, {COUNT}, {NUMBER} on every host, or --config.devices.multihost=false"
        ) from error
    # JAX's preemption service replaces the handler of SIGTERM by one that starts the agreement on a last step. It is called by
    # `request_stop`; the signal itself stays with whoever had it.
    found = _handler_of(signal.SIGTERM)
    if found is None or found == before:
        raise UserError(
            "JAX's preemption service is off, so hosts cannot stop together; unset JAX_ENABLE_PREEMPTION_SERVICE"
        )
    _stop_handler = ctypes.cast(found, _Handler)
    handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
    cli.on_end(_leave)
    _watcher = threading.Thread(target=_watch, name="hosts", daemon=True)
    _watcher.start()


def count() -> int:
    """Number of hosts."""
    return jax.process_count()


def number() -> int:
    """Number of this host, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this host is the one that writes logs and results."""
    return jax.process_index() == 0


def name() -> str:
    """This host, as messages call it."""
    return f"host {number()} of {count()}"


def request_stop() -> None:
    """Starts the agreement on a last step among all hosts; `jax.experimental.multihost_utils` says when it is reached."""
    _stop_handler(signal.SIGTERM)


def barrier(what: str, seconds: int | float) -> None:
    """Waits until every host is at this point, which each run passes once.

    Raises:
      RestartError: some hosts are not there in time; names them.
    """
    if count() == 1:
        return
    try:
        _client().wait_at_barrier(f"curia/{what}", int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        names = str(error).partition("timed out task names:")[2]
        missing = ", ".join(re.findall(r"^(?:.*task:)?(\d+)$", names, re.MULTILINE))
        who = f"host {missing}" if missing else "another host"
        raise RestartError(
            f"{name()} waited {seconds:g} s at {what!r} for {who}; its log says what it does; rerun the same command"
        ) from error


def check_agreement(facts: Mapping[str, str], seconds: int | float) -> None:
    """Checks that all hosts run the same thing.

    Args:
      facts: name -> value; equal on every host.
      seconds: how long to wait for the others.

    Raises:
      DoesNotFitError: they differ; names the fact and the hosts.
      RestartError: another host is not there.
    """
    if count() == 1:
        return
    _client().key_value_set(f"{_FACTS}/{number()}", json.dumps(dict(facts)))
    barrier("start", seconds)
    values = _client().key_value_dir_get(f"{_FACTS}/")
    found = {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in values}
    for fact in facts:
        other = next((host for host in sorted(found) if found[host].get(fact) != found[0].get(fact)), None)
        if other is not None:
            raise DoesNotFitError(
                f"hosts differ in {fact}: {found[0].get(fact)} on host 0, {found[other].get(fact)} on host {other}; start the same version "
                "with the same config and work directory on every host"
            )


def check_attempt(attempt: str, seconds: int | float) -> None:
    """Checks that this process and the first one were started together.

    Args:
      attempt: of this process; "" where no launcher started it.
      seconds: how long to wait for the first host.

    Raises:
      RestartError: they were not; the other hosts end when this one does.
    """
    if count() == 1:
        return
    if is_first():
        tell(_ATTEMPT, attempt)
    try:
        first = _client().blocking_key_value_get(_ATTEMPT, int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise RestartError(
            f"{name()} waited {seconds:g} s for host 0; its log says what it does; rerun the same command"
        ) from error
    if attempt != first:
        raise RestartError(
            f"{name()} is of attempt {attempt or 'none'}, but host 0 of attempt {first or 'none'}: a process of an earlier start was still "
            "alive; rerun the same command"
        )


def tell(key: str, value: str) -> None:
    """Leaves a value for the other hosts, for good."""
    if count() > 1:
        _client().key_value_set(key, value)


def told(key: str) -> str | None:
    """The value that a host left, None where there is none yet. Does not wait."""
    try:
        return _client().key_value_try_get(key)
    except jax.errors.JaxRuntimeError:
        return None


def digest(text: str) -> str:
    """Short digest of a text, for `check_agreement`."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def meet_at_the_end(seconds: int | float) -> None:
    """The last barrier: from here on no host needs another."""
    global _ending_together
    barrier("end", seconds)
    _ending_together = True
    if _watcher is not None:
        _watcher.join()  # JAX is about to destroy the client that it uses


@contextlib.contextmanager
def leaving_at_once(closing: contextlib.ExitStack, heartbeat: int | float) -> Iterator[None]:
    """Where the block raises and there are other hosts, `closing` is not closed: a save would wait for hosts that wait for
    this one.

    Args:
      heartbeat: seconds after which JAX knows that a host is lost.

    Raises:
      RestartError: a collective failed, because another host is gone.
    """
    try:
        yield
    except BaseException as error:
        if count() == 1:
            raise
        _abandoned.append(closing.pop_all())
        # Gloo's errors are ValueErrors.
        if not (isinstance(error, jax.errors.JaxRuntimeError | ValueError) and _LOST.search(str(error))):
            raise
        # It fails in the middle of the collective before anybody has told why the other host is gone. That ends this process.
        time.sleep(heartbeat + FAREWELL_SECONDS)
        if logs.LogFile.current is not None:
            faulthandler.dump_traceback(logs.LogFile.current.stream)
        reason = str(error).splitlines()[0][:200]
        raise RestartError(f"{name()} lost another host ({reason}); rerun the same command") from error


def _watch() -> None:
    """Ends this process when another host has ended on its own."""
    while not _ending_together:
        time.sleep(POLL_SECONDS)
        client = _client()
        if client is None:
            return
        try:
            ends = client.key_value_dir_get(f"{_ENDED}/")
            end = next((end for end in (_end(key, value) for key, value in ends) if end.host != number()), None)
            if end is not None:
                client.key_value_set(f"{_SEEN}/{number()}", "", allow_overwrite=True)
        except jax.errors.JaxRuntimeError:
            continue  # a lost coordinator is JAX's to notice
        if end is not None and not _ending_together:
            _follow(end)


def _end(key: str, value: str) -> End:
    code, text = value.split(" ", 1)
    return End(int(key.rsplit("/", 1)[1]), int(code), text.removeprefix("error: "))


def _follow(end: End) -> None:
    """Ends this process because another host has ended."""
    cli.claim_end()

    def say_goodbye() -> None:
        logs.say(f"error: {name()} ends because host {end.host} ended with exit code {end.code}: {end.text}")
        if logs.LogFile.current is not None:
            faulthandler.dump_traceback(logs.LogFile.current.stream)
            storage.upload_now()
        if is_first():  # the others ask this process
            _wait_until_seen(count() - 2)

    _in_time(say_goodbye)
    os._exit(end.code if end.code in FINAL else ExitCode.RESTART)


def _leave(code: int, line: str | None) -> None:
    """The last that a process does: tells the others, unless they have ended together."""
    if count() == 1 or _ending_together:
        return
    _in_time(functools.partial(_publish, code, line or ""))
    os._exit(code)


def _publish(code: int, line: str) -> None:
    _client().key_value_set(f"{_ENDED}/{number()}", f"{code} {line}", allow_overwrite=True)
    if is_first():
        _wait_until_seen(count() - 1)


def _wait_until_seen(others: int) -> None:
    """Until so many have read how another host ended; they ask the first one, whose end they would take for a crash."""
    while len(_client().key_value_dir_get(f"{_SEEN}/")) < others:
        time.sleep(0.1)


def _in_time(action: Any) -> None:
    """Gives up after FAREWELL_SECONDS: a host that is lost answers nothing."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(FAREWELL_SECONDS)


def _client() -> Any:
    return distributed.global_state.client


# ---- C signal handlers

_libc = ctypes.CDLL(None)
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_abort_handler: Any = None


def _handler_of(number: int) -> int | None:
    """Address of a signal's handler in C: the first field of sigaction(2)'s record, on Linux and macOS."""
    record = ctypes.create_string_buffer(512)
    _libc.sigaction(number, None, record)
    return ctypes.c_void_p.from_buffer(record).value


def _end_on_abort(heartbeat: int | float) -> None:
    """Turns the SIGABRT with which JAX ends a process that has lost the others into one line and RESTART.

    JAX offers no callback for it (that of jaxlib 0.10 cannot convert its argument, and aborts too).
    """
    global _abort_handler

    def aborted(number: int) -> None:
        cli.claim_end()
        logs.say(
            f"error: {name()} lost another host: no answer for {heartbeat:g} s, or its coordinator ended; rerun the same command"
        )
        os._exit(ExitCode.RESTART)

    _abort_handler = _Handler(aborted)  # kept, because C has its address
    _libc.signal(signal.SIGABRT, _abort_handler)
