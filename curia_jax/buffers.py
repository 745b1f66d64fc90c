"""Buffers for the pixels of batches, reused as soon as nobody holds the batch they were used for.

New memory costs as much as decoding does, in pages that the operating system has to zero. Pixels start at a multiple of 64
bytes, which lets a CPU "device" use them in place, without a copy (XLA's alignment).
"""

import collections
import math
import mmap
import os
import threading
import weakref
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt16

ALIGNMENT = 64
Pixels = UInt16[np.ndarray, "batch height width"]


class BufferPool:
    """Buffers of one process.

    Args:
      shape: of a batch's pixels.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self._free: collections.deque[np.ndarray] = collections.deque()

    def take(self) -> Pixels:
        """Pixels of any value, which go back to the pool when the array and all views of it are gone."""
        size = 2 * math.prod(self._shape)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(size + ALIGNMENT, np.uint8)
            start = -memory.ctypes.data % ALIGNMENT
            memory = memory[start : start + size]
        # Through a memoryview, so that this very array is the `base` of every view, JAX's included, and dies with the last of
        # them. Otherwise numpy would name the array that owns the memory.
        pixels = np.frombuffer(memory.data, np.uint16)
        weakref.finalize(pixels, self._free.append, memory).atexit = False
        return pixels.reshape(self._shape)


class SharedBuffer(NamedTuple):
    """Where a worker process left the pixels of a batch.

    Attributes:
      process: the worker's id.
      file: descriptor of an in-memory file that the worker has open.
      shape: of the pixels.
    """

    process: int
    file: int
    shape: tuple[int, int, int]


class SharedBufferPool:
    """Buffers of a worker process that the training process reads in place.

    Grain would copy every batch to new shared memory, which costs more than reading the batch, and more with every worker. The
    first byte of a buffer says whether it is in use. Its file has no name, so nothing is left when the processes end, however
    they do. Only Linux has such files.

    Args:
      shape: of a batch's pixels.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self._files: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()

    @staticmethod
    def supported() -> bool:
        """Whether the system has in-memory files."""
        return hasattr(os, "memfd_create")

    def take(self) -> tuple[Pixels, SharedBuffer]:
        """Pixels of any value, and where SharedBufferReader finds them; free again when the reader's array is gone."""
        with self._lock:
            file = next((file for file, memory in self._files.items() if memory[0] == _FREE), None)
            if file is None:
                file = os.memfd_create("batch")
                size = ALIGNMENT + 2 * math.prod(self._shape)
                os.truncate(file, size)
                self._files[file] = mmap.mmap(file, size)
            self._files[file][0] = _IN_USE
        pixels = np.frombuffer(self._files[file], np.uint16, offset=ALIGNMENT).reshape(self._shape)
        return pixels, SharedBuffer(os.getpid(), file, self._shape)


_FREE, _IN_USE = 0, 1


class SharedBufferReader:
    """Opens the buffers of worker processes in the training process, each file once."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, int], mmap.mmap] = {}

    def open(self, buffer: SharedBuffer) -> Pixels:
        """The pixels in place; the buffer is free for the worker when the array and all views of it are gone."""
        key = buffer.process, buffer.file
        if key not in self._files:
            with open(f"/proc/{buffer.process}/fd/{buffer.file}", "r+b") as file:
                self._files[key] = mmap.mmap(file.fileno(), 0)
        memory = self._files[key]
        pixels = np.frombuffer(memoryview(memory)[ALIGNMENT:], np.uint16)  # through a memoryview: see BufferPool.take
        weakref.finalize(pixels, memory.__setitem__, 0, _FREE).atexit = False
        return pixels.reshape(buffer.shape)
