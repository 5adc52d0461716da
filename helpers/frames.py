"""Turn ratings and an item matrix into transitions: on the fly from memory, or from a static HDF5 file."""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import h5py
import hdf5plugin
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from helpers.fast import Pool, fill
from helpers.files import DataError, damaged, need, replacing, shown
from helpers.tables import check_rows, in_order, rows_of

GROUP = 1 << 21  # transitions shuffled together, in the cache
ROWS = 4096      # of a static file, written or read together
LESSON = "notes/04_static_dataset.ipynb"  # writes it


class Transition(NamedTuple):
    """A batch of B transitions; F = frame_size, E = embed_size; float32 throughout."""

    state: Tensor       # (B, F·(E+1)): embeddings of the last F items, oldest first, flattened; then their F ratings
    action: Tensor      # (B, E): embedding of the item the user took next
    reward: Tensor      # (B, 1): 2·(rating − 2.5) of that item, in [−4, 5]
    next_state: Tensor  # (B, F·(E+1)): the same frame, one step on
    done: Tensor        # (B, 1): 1 at the last transition of that user's log, else 0


FIELDS = Transition._fields


def reward_of(rating):
    """Return 2·(rating − 2.5): half stars become the whole numbers from −4 to 5.

    >>> [reward_of(half / 2) for half in range(1, 11)]
    [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    return 2 * (rating - 2.5)


class Frames(torch.utils.data.Dataset):
    """All transitions of all users' logs, made on the fly: an index of windows, nothing materialised.

    A user's log of n ratings gives max(n − frame_size, 0) transitions, in the order of time. Kept in memory: 10 bytes
    a rating, 4 a transition, and the item matrix. `DataLoader(frames, None, sampler=BatchSampler(…))` loads batches.

    Args:
        ratings: `user_id, item_id, rating, timestamp` in any row order; to split by user, those of some users.
        item_ids, item_matrix: (n_items,) distinct ids and (n_items, embed_size) float32, kept, as all, on `device`.
        frame_size: items in a state; DataError if nobody has more ratings than that.
        times: end every state with F gaps, days since the user's rating before it (0 for the first of a log).

    >>> log = pd.DataFrame({"user_id": 1, "item_id": [7, 9, 7, 8], "rating": [5.0, 3, 4, 0.5], "timestamp": range(4)})
    >>> frames = Frames(log, np.array([7, 8, 9]), np.array([[1.0], [2], [3]]), frame_size=2)
    >>> [field.tolist() for field in frames[1]]  # items 9 and 7 with their stars, then 8, of half a star
    [[3.0, 1.0, 3.0, 4.0], [2.0], [-4.0], [1.0, 2.0, 4.0, 0.5], [1.0]]
    """

    def __init__(self, ratings: pd.DataFrame, item_ids: np.ndarray, item_matrix: np.ndarray | Tensor,
                 frame_size: int = 10, device: str | torch.device = "cpu", times: bool = False):
        check_rows(item_matrix, item_ids)
        ratings = in_order(ratings)
        users, when = ratings["user_id"].to_numpy(), ratings["timestamp"].to_numpy()
        is_first = np.append(True, users[1:] != users[:-1])[:len(users)]
        self.log_start = np.flatnonzero(is_first)
        self.user_ids, self.log_length = users[self.log_start], np.diff(self.log_start, append=len(users))
        self.n_short_users = int((self.log_length <= frame_size).sum())
        start = np.flatnonzero(users[frame_size:] == users[:-frame_size])  # a window ends in the log it begins in
        if not len(start):
            raise DataError(f"no user has more than frame_size = {frame_size} ratings (the longest log has "
                            f"{self.log_length.max(initial=0)}): use a smaller frame")
        self.frame_size, self.embed_size = frame_size, int(item_matrix.shape[1])
        self.device, self._pool = torch.device(device), Pool()
        self._as_they_came: tuple[Tensor, Tensor] | tuple[()] = ()  # items and ratings before ties were shuffled
        self.order: Tensor | slice = slice(None)  # (n_ratings,) which rating stands where, as ties are shuffled
        self.item_ids, put = np.asarray(item_ids), partial(torch.as_tensor, device=device)
        self.items = put(item_matrix, dtype=torch.float32).clone(memory_format=torch.contiguous_format)  # (n_items, E)
        self.item_idx = put(rows_of(ratings["item_id"], item_ids))            # (n_ratings,) rows of the item matrix
        self.rating = put(ratings["rating"].to_numpy(np.float32, copy=True))  # (n_ratings,)
        self.is_last = put(np.append(is_first[1:], True))                     # (n_ratings,) last of its user's log
        self.start = put(start.astype(np.int32 if len(users) < 1 << 31 else np.int64))    # (n,) first of a window
        self.tied = torch.as_tensor(np.append(False, when[1:] == when[:-1]) & ~is_first)  # with the rating before it
        days = np.where(is_first, 0, np.diff(when, prepend=when[0]) / 86_400) if times else None
        self.gap = put(days.astype(np.float32)) if times else None            # (n_ratings,)

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: int | list[int]) -> Transition:
        """Return one transition, without the axis B; or the batch of a list."""
        t = self.gather(torch.as_tensor(index).reshape(-1))
        return t if isinstance(index, list) else Transition(*(field[0] for field in t))

    def gather(self, index: Tensor) -> Transition:
        """Return the transitions at `index` (B,), whole numbers from 0, as one batch; IndexError outside of them."""
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"transitions are numbered from 0 to {len(self) - 1:,}; asked for "
                             f"{int(index.min()):,} to {int(index.max()):,}")
        if self.device.type == "cpu":
            width = self.frame_size * (self.embed_size + 1)
            t = Transition(*self._pool.take([(len(index), n) for n in (width, self.embed_size, 1, width, 1)]))
            log = [field.numpy() for field in (self.start, self.is_last, self.item_idx, self.rating, self.items)]
            fill(index.cpu().numpy(), *log, self.frame_size, *(field.numpy() for field in t))
            t.reward.copy_(reward_of(t.reward))  # the kernel leaves the rating there
        else:
            t = self.gather_on_device(index)
        if self.gap is None:
            return t
        gap = self.gap[self._rows(index, 0, self.frame_size + 1)]
        state, next_state = torch.cat([t.state, gap[:, :-1]], dim=1), torch.cat([t.next_state, gap[:, 1:]], dim=1)
        return t._replace(state=state, next_state=next_state)

    def gather_on_device(self, index: Tensor) -> Transition:
        """Return the same as `gather`, but for the gaps, with torch alone: where the item matrix lives on a GPU."""
        rows = self._rows(index, 0, self.frame_size + 1)                      # (B, F+1)
        vectors, rating = self.items[self.item_idx[rows]], self.rating[rows]  # (B, F+1, E), (B, F+1)
        return Transition(state=flatten(vectors[:, :-1], rating[:, :-1]), action=vectors[:, -1],
                          reward=reward_of(rating[:, -1:]), next_state=flatten(vectors[:, 1:], rating[:, 1:]),
                          done=self.is_last[rows[:, -1:]].float())

    def _rows(self, index: Tensor, low: int, high: int) -> Tensor:
        """Return (B, high − low): the ratings `low` to `high` of each window, counted from its first."""
        return self.start[index.to(self.device)].long().unsqueeze(1) + torch.arange(low, high, device=self.device)

    def shuffle_ties(self, seed: int | None) -> None:
        """Put ratings that share a user and a second in another order, the same for a seed; None: as they came.

        Any order of them is as true as the file's. Transitions keep their numbers and change what they hold.
        """
        if seed is None and not self._as_they_came:
            return
        self._as_they_came = self._as_they_came or (self.item_idx.clone(), self.rating.clone())
        self.order = slice(None)
        if seed is not None:  # seconds are numbered in their order, and what is drawn is less than 1
            drawn = np.random.default_rng(seed).random(len(self.tied))
            self.order = torch.as_tensor(np.argsort((~self.tied).cumsum(0).numpy() + drawn), device=self.device)
        for field, as_it_came in zip((self.item_idx, self.rating), self._as_they_came, strict=True):
            field.copy_(as_it_came[self.order])

    def next_items(self, index: Tensor, n: int = 1) -> Tensor:
        """Return (B, n) rows of the item matrix: each logged action and the n − 1 after it; −1 beyond the log."""
        rows, within = self._next_rows(index, n)
        return torch.where(within, self.item_idx[rows].long(), -1)

    def next_rewards(self, index: Tensor, n: int = 1) -> tuple[Tensor, Tensor]:
        """Return the rewards (B, n) of those actions, 0 beyond the user's log, and which are within it (B, n)."""
        rows, within = self._next_rows(index, n)
        return reward_of(self.rating[rows]) * within, within

    def _next_rows(self, index: Tensor, n: int) -> tuple[Tensor, Tensor]:
        rows = self._rows(index, self.frame_size, self.frame_size + n).clamp(max=len(self.item_idx) - 1)
        return rows, self.is_last[rows].cumsum(1) == self.is_last[rows]  # none before it was the last

    def sample(self, batch_size: int, shuffle: bool = True, seed: int = 0) -> Iterator[Tensor]:
        """Yield index batches (≤ batch_size,) that cover every transition once; the same for a seed."""
        order = torch.arange(len(self))
        if shuffle:  # each draws a group, which are shuffled one by one: every order is as likely (Rao 1961)
            generator, n_groups = torch.Generator().manual_seed(seed), min(1 + len(self) // GROUP, 256)
            drawn = partial(torch.randint, n_groups, generator=generator) if n_groups > 1 else torch.zeros
            group = drawn(order.shape, dtype=torch.uint8)
            parts = (order[group == g] for g in range(n_groups))
            order = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])
        for low in range(0, len(self), batch_size):
            yield order[low:low + batch_size].to(self.device)

    def batches(self, batch_size: int, shuffle: bool = True, seed: int = 0) -> Iterator[Transition]:
        """Yield every transition once, as batches of at most `batch_size`; the same for a seed."""
        yield from map(self.gather, self.sample(batch_size, shuffle, seed))

    def places(self, user_ids: np.ndarray) -> np.ndarray:
        """Return where users stand in `user_ids`, `log_start` and `log_length`; DataError for a user without a log."""
        place = pd.Index(self.user_ids).get_indexer(user_ids)
        if (place < 0).any():
            raise DataError(f"{(place < 0).sum()} users have no log, e.g. user {np.asarray(user_ids)[place < 0][0]}")
        return place

    def logs(self, user_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return every rating of users: (place of its user in `user_ids`, its row in `item_idx` and `rating`)."""
        place = self.places(user_ids)
        length = self.log_length[place]
        shift = self.log_start[place] - (length.cumsum() - length)  # from its number here to its row
        return np.repeat(np.arange(len(place)), length), np.arange(length.sum()) + np.repeat(shift, length)

    def last_states(self, user_ids: np.ndarray) -> Tensor:
        """Return (n_users, F·(E+1)): the frame at the end of each user's log, padded with zeros at its old end."""
        place = self.places(user_ids)
        return self.states_until(self.log_start[place], (self.log_start + self.log_length)[place])

    def states_until(self, first: np.ndarray, end: np.ndarray) -> Tensor:
        """Return (n, F·(E+1)): the last F of the ratings `first` … `end` − 1, padded with zeros at their old end."""
        rows = torch.as_tensor(end, device=self.device).unsqueeze(1) + torch.arange(-self.frame_size, 0).to(self.device)
        real = rows >= torch.as_tensor(first, device=self.device).unsqueeze(1)
        rows = rows * real  # where there is none the very first, whose gap is 0
        state = flatten(self.items[self.item_idx[rows]] * real.unsqueeze(2), self.rating[rows] * real)
        return state if self.gap is None else torch.cat([state, self.gap[rows]], dim=1)


def flatten(vectors: Tensor, rating: Tensor) -> Tensor:
    """Lay out a frame: vectors (B, F, E) and ratings (B, F) → state (B, F·(E+1)).

    >>> flatten(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[5.0, 0.5]])).tolist()
    [[1.0, 2.0, 3.0, 4.0, 5.0, 0.5]]
    """
    return torch.cat([vectors.flatten(1), rating], dim=1)


def unflatten(state: Tensor, frame_size: int, embed_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Undo `flatten`: state (B, F·(E+1)) → vectors (B, F, E), ratings (B, F); with `embed_size` gaps may follow it."""
    embed_size = state.shape[1] // frame_size - 1 if embed_size is None else embed_size
    vectors, rating = state[:, :frame_size * (embed_size + 1)].split([frame_size * embed_size, frame_size], dim=1)
    return vectors.unflatten(1, (frame_size, embed_size)), rating


def gaps(state: Tensor, frame_size: int, embed_size: int) -> Tensor:
    """Return (B, F): days between each rating of a frame and the user's before it; 1 for frames without `times`."""
    after = state[:, frame_size * (embed_size + 1):]
    return after if after.shape[1] else state.new_ones(len(state), frame_size)


def to_autocast(t: Transition) -> Transition:
    """Return a batch whose vectors are in the type of autocast, if that is on: converted once for all."""
    kind = t.state.device.type
    if not torch.is_autocast_enabled(kind):
        return t
    dtype = torch.get_autocast_dtype(kind)
    return t._replace(state=t.state.to(dtype), action=t.action.to(dtype), next_state=t.next_state.to(dtype))


def write_static(path: Path, frames: Frames, source: str, seed: int | None = None, dtype: str = "float16",
                 smallest: bool = False) -> None:
    """Write every transition to HDF5, in order of users and time, or shuffled when a seed is given.

    A chunk holds whole rows, with a checksum: the copies of each embedding in neighbouring rows lie side by side, and
    compression removes them, unless rows are shuffled. `smallest` puts states too into Zstandard and chunks of 2,048
    rows (5 MB), written more slowly and slow to read in small slices, in place of LZ4 and 256 rows (660 KB).
    `source` says what the ratings are. DataError: frames with times, or numbers that `dtype` float16 cannot hold.
    """
    if frames.gap is not None:
        raise DataError("a static file holds states of vectors and ratings: make the frames without times")
    if dtype == "float16" and float(frames.items.abs().max()) > torch.finfo(torch.float16).max:
        raise DataError("the item matrix holds numbers beyond 65,504, the largest of float16: write dtype='float32'")
    batches = frames.batches(ROWS, shuffle=seed is not None, seed=seed or 0)
    with replacing(path) as beside, h5py.File(beside, "w") as file:
        file.attrs.update(frame_size=frames.frame_size, embed_size=frames.embed_size, source=source,
                          hash=matrix_hash(frames.items), seed=-1 if seed is None else seed)
        for name, field in zip(FIELDS, frames.gather(torch.arange(1)), strict=True):
            shape, kind = (field.shape[1:], dtype) if field.shape[1] > 1 else ((), np.int8)
            quick = name.endswith("state") and not smallest
            rows = min(len(frames), 256 if quick else 2048 if name.endswith("state") else ROWS)
            file.create_dataset(name, (len(frames), *shape), kind, chunks=(rows, *shape), fletcher32=True,
                                **(hdf5plugin.LZ4() if quick else hdf5plugin.Zstd()))
        for n, t in enumerate(tqdm(batches, path.name, -(-len(frames) // ROWS), leave=False)):
            for name, field in zip(FIELDS, t, strict=True):
                stored = field.to(getattr(torch, dtype)).cpu().numpy()
                file[name][n * ROWS:n * ROWS + len(field)] = stored.reshape(-1, *file[name].shape[1:])


def read_static(path: Path, batch_size: int, frame_size: int, item_matrix: np.ndarray | Tensor) -> Iterator[Transition]:
    """Yield the transitions of a static file in its order, float32, as `Frames.batches` does; DataError if damaged."""
    with open_static(path) as file:
        of_file, wanted = (file.attrs["frame_size"], file.attrs["hash"]), (frame_size, matrix_hash(item_matrix))
        if of_file != wanted:
            raise DataError(f"{shown(path)} was written with frame_size {of_file[0]} and item matrix {of_file[1]:.8}, "
                            f"not {wanted[0]} and {wanted[1]:.8}: run {LESSON} again")
        pool, rows = Pool(), batch_size * -(-ROWS // batch_size)  # whole batches of whole chunks
        for low in range(0, len(file["reward"]), rows):
            try:
                stored = [torch.from_numpy(file[name][low:low + rows]) for name in FIELDS]
            except OSError as error:
                raise damaged(path, LESSON, f"in the {rows:,} rows from {low:,} on: {error}") from error
            for batch in zip(*(field.split(batch_size) for field in stored), strict=True):
                t = pool.take([(len(field), field[0].numel()) for field in batch])
                yield Transition(*(to.copy_(field.view_as(to)) for to, field in zip(t, batch, strict=True)))


def open_static(path: Path) -> h5py.File:
    """Open a static file; FileNotFoundError if there is none, DataError if it is locked, damaged or not one of ours."""
    need(path, "04_static_dataset")
    try:
        file = h5py.File(path, "r", rdcc_nbytes=1 << 21)  # a cache of chunks that fits the processor's own
    except OSError as error:
        raise damaged(path, LESSON, f"{error}; if another program writes it, close it there") from error
    lengths = {len(file[name]) for name in FIELDS if name in file}
    if not {*FIELDS} <= {*file} or len(lengths) > 1 or not {"frame_size", "hash"} <= {*file.attrs}:
        file.close()
        raise damaged(path, LESSON, f"{', '.join(FIELDS)} of one length, frame_size and hash are wanted")
    return file


def matrix_hash(item_matrix: np.ndarray | Tensor) -> str:
    """Return the sha256 of an item matrix's float32 bytes, which ties a static file to it."""
    matrix = torch.as_tensor(item_matrix).cpu().numpy().astype(np.float32)
    return hashlib.sha256(str(matrix.shape).encode() + matrix.tobytes()).hexdigest()
