import errno

import pytest

from curia_common.errors import DataError
from data_pipeline.sources.base import NO_MEMORY, ReadError
from data_pipeline.sources.silence import guarded


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("a header value"), r"damaged \(ValueError, .*\)"),
        (OSError("a header value"), r"damaged \(OSError, .*\)"), (MemoryError(), NO_MEMORY), (ReadError("as it is"), "as it is"),
    ],
)  # fmt: skip
def test_guarded_raises_read_errors_without_texts_of_libraries(error: Exception, reason: str) -> None:
    with pytest.raises(ReadError, match=f"^{reason}$") as raised, guarded("damaged ({kind}, {place})"):
        raise error
    assert "a header value" not in str(raised.value)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), DataError("an input changed")])
def test_guarded_lets_errors_of_the_storage_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, guarded("damaged"):
        raise error
    assert raised.value is error
