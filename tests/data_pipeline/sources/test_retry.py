"""Retries of transient storage errors."""

import errno

import pytest

from curia_common.errors import StorageError
from data_pipeline.sources import retry


def test_read_is_repeated_after_growing_pauses_until_it_succeeds(monkeypatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    errors = [OSError(number, "…") for number in (errno.EIO, errno.ECONNRESET, errno.ETIMEDOUT)]

    def read() -> str:
        if errors:
            raise errors.pop()
        return "content"

    assert retry.retry_transient(read, lambda item: None, "a") == "content"
    assert slept == list(retry.PAUSES[:3]) == sorted(slept)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC])
def test_other_errors_are_not_retried(number: int) -> None:
    calls: list[int] = []

    def read() -> None:
        calls.append(1)
        raise OSError(number, "…")

    with pytest.raises(OSError) as error:
        retry.retry_transient(read, lambda item: None, "a")
    assert error.value.errno == number and len(calls) == 1


def test_pauses_do_not_count_against_the_time_limit(monkeypatch) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0,))
    touched: list[str | None] = []

    def read() -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(StorageError, match=r"tried 2 times \(Stale file handle\); rerun the same command"):
        retry.retry_transient(read, touched.append, "a")
    assert touched == [None, "a"]
