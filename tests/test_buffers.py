"""Buffers are reused once nobody holds them, never before, and shared buffers reach the training process."""

import gc

import numpy as np
import pytest

from curia_jax import buffers, data
from tests.test_data import Slices

shared_only = pytest.mark.skipif(not buffers.SharedBufferPool.supported(), reason="only Linux has in-memory files")


def test_buffer_is_reused_once_nobody_holds_it_and_never_before() -> None:
    pool = buffers.BufferPool((2, 3, 5))
    pixels = pool.take()
    assert pixels.ctypes.data % buffers.ALIGNMENT == 0
    address = pixels.ctypes.data
    view = pixels[1:]
    del pixels
    assert pool.take().ctypes.data != address  # a view still reads it
    del view
    assert address in {array.ctypes.data for array in [pool.take(), pool.take()]}


@shared_only
def test_shared_buffer_is_reused_once_its_reader_drops_it() -> None:
    pool, reader = buffers.SharedBufferPool((2, 3, 5)), buffers.SharedBufferReader()
    pixels, buffer = pool.take()
    pixels[:] = np.arange(30).reshape(2, 3, 5)
    read = reader.open(buffer)
    np.testing.assert_array_equal(read, pixels)
    assert read.ctypes.data % buffers.ALIGNMENT == 0
    view = read[1:]
    del read
    gc.collect()
    assert pool.take()[1].file != buffer.file  # a view still reads it
    del view
    gc.collect()
    assert pool.take()[1].file == buffer.file


@shared_only
def test_workers_reuse_shared_buffers() -> None:
    stream = data.training_batches(Slices(40), batch_size=4, canvas=(8, 8), seed=0, threads=1, workers=1)
    assert len({next(stream)["pixels"].ctypes.data for _ in range(40)}) < 10
