"""How batches of transitions are filled as fast as memory can be written: a compiled kernel and memory used again.

109 × the static loop of 2019 in `make bench`; 5 % of a training step.
"""

import contextlib
import sys
from collections import deque

import numba
import numpy as np
import torch
from torch import Tensor

BLOCK = 64    # rows whose places in the log are fetched together
ALONE = 1024  # rows up to which one thread does it: a training step keeps its threads to itself


class Pool:
    """Float32 arrays for batches: those of an earlier batch again, once nobody holds them.

    Fresh memory costs more than to fill it. A tensor, and whatever shares its memory, holds a reference to its
    array, so the count of references tells whether an earlier batch is still in use.
    """

    def __init__(self):
        self._lent: deque[list[np.ndarray]] = deque(maxlen=2)

    def take(self, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        for _ in range(len(self._lent)):
            with contextlib.suppress(IndexError):  # another thread was quicker
                arrays = self._lent.popleft()      # taken out first: no other thread can see it now
                if [array.shape for array in arrays] == shapes:
                    if all(sys.getrefcount(array) == 3 for array in arrays):  # the list, the loop, the call
                        return arrays
                    self._lent.append(arrays)
        return [np.empty(shape, np.float32) for shape in shapes]

    def lend(self, arrays: list[np.ndarray]) -> list[Tensor]:
        self._lent.append(arrays)
        return [torch.from_numpy(array) for array in arrays]


@numba.njit(nogil=True, cache=True)
def fill_rows(first, stop, index, start, item_idx, rating, items, frame_size,
               state, action, reward, next_state, done):
    """Write transitions first … stop − 1 of a batch; each embedding goes straight to where it belongs.

    In two passes over blocks of rows. A shuffled row touches the log at a random place, and waiting for memory
    there costs more than copying 10 KB. The first pass only fetches, so that the waits of many rows overlap.
    """
    size = items.shape[1]
    begin = np.empty(BLOCK, dtype=np.uint64)
    vectors = np.empty((BLOCK, frame_size + 1), dtype=np.uint32)
    stars = np.empty((BLOCK, frame_size + 1), dtype=np.float32)
    for low in range(first, stop, BLOCK):
        n = min(BLOCK, stop - low)
        for k in range(n):
            transition = np.uint64(index[low + k])
            begin[k] = start[transition]
            following = transition + np.uint64(1)  # windows of one log stand side by side
            done[low + k, 0] = following == len(start) or start[following] != start[transition] + 1
        for k in range(n):  # both ends of a window first: all its cache lines are under way
            vectors[k, 0] = item_idx[begin[k]]
            vectors[k, frame_size] = item_idx[begin[k] + np.uint64(frame_size)]
            stars[k, 0] = rating[begin[k]]
            stars[k, frame_size] = rating[begin[k] + np.uint64(frame_size)]
        for k in range(n):
            for place in range(frame_size + 1):
                vectors[k, place] = item_idx[begin[k] + np.uint64(place)]
                stars[k, place] = rating[begin[k] + np.uint64(place)]
            reward[low + k, 0] = 2 * (stars[k, frame_size] - 2.5)
        for k in range(n):  # row by row, number by number: slices assigned whole are half as fast in numba
            row, next_row, taken = state[low + k], next_state[low + k], action[low + k]
            for place in range(frame_size + 1):
                vector = items[np.uint64(vectors[k, place])]
                if place < frame_size:
                    part = row[place * size:(place + 1) * size]
                    for e in range(size):
                        part[e] = vector[e]
                else:
                    for e in range(size):
                        taken[e] = vector[e]
                if place > 0:
                    part = next_row[(place - 1) * size:place * size]
                    for e in range(size):
                        part[e] = vector[e]
            for place in range(frame_size):
                row[frame_size * size + place] = stars[k, place]
                next_row[frame_size * size + place] = stars[k, place + 1]


@numba.njit(parallel=True, nogil=True, cache=True)
def fill_in_parallel(first, stop, index, start, item_idx, rating, items, frame_size,
                      state, action, reward, next_state, done):
    for block in numba.prange((stop - first + BLOCK - 1) // BLOCK):
        low = first + block * BLOCK
        fill_rows(low, min(low + BLOCK, stop), index, start, item_idx, rating, items, frame_size,
                   state, action, reward, next_state, done)


def fill(*arguments) -> None:
    """Call `fill_rows`, by several threads where the batch is large."""
    (fill_in_parallel if torch.get_num_threads() > 1 and arguments[1] > ALONE else fill_rows)(*arguments)
