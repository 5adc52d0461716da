"""How batches of transitions are filled nearly as fast as memory is copied: a compiled kernel and memory used again.

Measured (docs/speed.md): shuffled batches at 109 times the rate at which the static file of 2019 was read, in lesson
04's way; 5 % of a training's time, where the networks' products take the most.
"""

import contextlib
import sys
from collections import deque

import numba
import numpy as np
import torch
from torch import Tensor

BLOCK = 64  # rows whose places in the log are fetched together


class Pool:
    """Float32 tensors for batches: the memory of an earlier batch again, once nobody holds it.

    Fresh memory costs more than to fill it. A tensor, and whatever shares its memory, holds a reference to its
    array, so the count of references tells whether an earlier batch is still in use.
    """

    def __init__(self):
        self._lent: deque[list[np.ndarray]] = deque(maxlen=2)

    def take(self, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Return a tensor of each shape; what it holds is left over from before."""
        arrays = self._unused(shapes) or [np.empty(shape, np.float32) for shape in shapes]
        tensors = [torch.from_numpy(array) for array in arrays]
        self._lent.append(arrays)
        return tensors

    def _unused(self, shapes: list[tuple[int, ...]]) -> list[np.ndarray] | None:
        for _ in range(len(self._lent)):
            with contextlib.suppress(IndexError):  # another thread was quicker
                arrays = self._lent.popleft()      # taken out first: no other thread can see it now
                if [array.shape for array in arrays] == shapes:
                    if all(sys.getrefcount(array) == 3 for array in arrays):  # the list, the loop, the call
                        return arrays
                    self._lent.append(arrays)
        return None


@numba.njit(inline="always")
def copy(vector, to):
    for e in range(len(vector)):  # number by number: slices assigned whole are half as fast in numba
        to[e] = vector[e]


@numba.njit(nogil=True, cache=True)
def fill(index, start, is_last, item_idx, rating, items, frame_size, state, action, reward, next_state, done):
    """Write the transitions at `index` into the five fields, the rating in the place of the reward.

    Each embedding goes straight to where it belongs, in passes over blocks of rows. A shuffled row touches the log at
    a random place, and waiting for memory there costs more than copying 10 KB. The first passes only fetch, so that
    the waits of many rows overlap.
    """
    size, frame = items.shape[1], np.uint64(frame_size)  # unsigned numbers: no index is looked at for being negative
    begin = np.empty(BLOCK, np.uint64)
    vectors = np.empty((BLOCK, frame_size + 1), np.uint32)
    for low in range(0, len(index), BLOCK):
        n = min(BLOCK, len(index) - low)
        for k in range(n):
            begin[k] = start[np.uint64(index[low + k])]
        for k in range(n):  # both ends of a window first: all its cache lines are under way
            vectors[k, 0], vectors[k, frame_size] = item_idx[begin[k]], item_idx[begin[k] + frame]
            reward[low + k, 0] = rating[begin[k] + frame]
            done[low + k, 0] = is_last[begin[k] + frame]
        for k in range(n):
            ratings, next_ratings = state[low + k, frame_size * size:], next_state[low + k, frame_size * size:]
            for place in range(frame_size):
                vectors[k, place] = item_idx[begin[k] + np.uint64(place)]
                ratings[place] = rating[begin[k] + np.uint64(place)]
                next_ratings[place] = rating[begin[k] + np.uint64(place + 1)]
        for k in range(n):
            for place in range(frame_size + 1):
                vector = items[np.uint64(vectors[k, place])]
                if place < frame_size:
                    copy(vector, state[low + k, place * size:(place + 1) * size])
                else:
                    copy(vector, action[low + k])
                if place > 0:
                    copy(vector, next_state[low + k, (place - 1) * size:place * size])
