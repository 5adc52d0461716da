"""Turn ratings and an item matrix into transitions: on the fly from memory, or from a static HDF5 file."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import hdf5plugin
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from helpers.datasets import in_order
from helpers.fast import Pool, fill
from helpers.files import DataError, need, replacing, shown, write_json, writing

GROUP = 1 << 21  # rows shuffled together
FIELDS = ("state", "action", "reward", "next_state", "done")


class Transition(NamedTuple):
    """A batch of B transitions; F = frame_size, E = embed_size; float32 throughout.

    state (B, F·(E+1)): embeddings of the last F items, oldest first, flattened; then their F ratings.
    action (B, E): embedding of the item the user took next.
    reward (B, 1): 2·(rating − 2.5) of that item, in [−4, 5].
    next_state (B, F·(E+1)): the same frame, one step on.
    done (B, 1): 1 at the last transition of that user's log, else 0.
    """

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    done: Tensor


def reward_of(rating):
    """Return 2·(rating − 2.5): half stars become the whole numbers from −4 to 5."""
    return 2 * (rating - 2.5)


def rows_of(wanted: pd.Series | np.ndarray, item_ids: np.ndarray) -> np.ndarray:
    """Return the row of the item matrix (int32) of each wanted item, rows in the order of `item_ids`.

    Raises:
        DataError: for items without a row.
    """
    codes, distinct = pd.factorize(np.asarray(wanted))
    rows = pd.Index(item_ids).get_indexer(distinct).astype(np.int32)
    if (unknown := np.sort(distinct[rows < 0])).size:
        raise DataError(f"{len(unknown)} items have no row in the item matrix (ids {', '.join(map(str, unknown[:5]))} "
                        f"…): make it from the same data set, notes/03_pca.ipynb")
    return rows[codes]


class Frames(torch.utils.data.Dataset):
    """All transitions of all users' logs, made on the fly: an index of windows, nothing materialised.

    A user's log of n ratings gives max(n − frame_size, 0) transitions, in the order of time. Kept in memory:
    10 bytes a rating, 4 a transition, and the item matrix. To split by user, give the ratings of some users.

    Args:
        ratings: `user_id, item_id, rating, timestamp` in any row order.
        item_ids: (n_items,) ids, the rows of `item_matrix`.
        item_matrix: (n_items, embed_size) float32.
        frame_size: items in a state.
        device: where the item matrix, and so every batch, lives.
        times: end every state with F gaps, days since the user's rating before it (0 for the first of a log).

    Raises:
        DataError: ids and rows that do not pair, a rated item without a row, or nobody with more
            than frame_size ratings.
    """

    def __init__(self, ratings: pd.DataFrame, item_ids: np.ndarray, item_matrix: np.ndarray | Tensor,
                 frame_size: int = 10, device: str | torch.device = "cpu", times: bool = False):
        if len(item_ids) != len(item_matrix) or len(np.unique(item_ids)) != len(item_ids):
            raise DataError(f"{len(item_ids)} item ids ({len(np.unique(item_ids))} distinct) for an item matrix of "
                            f"{len(item_matrix)} rows: each row wants one id of its own")
        ratings = in_order(ratings)
        users, when = ratings["user_id"].to_numpy(), ratings["timestamp"].to_numpy()
        item_idx, rating = rows_of(ratings["item_id"], item_ids), ratings["rating"].to_numpy(np.float32, copy=True)
        is_last = np.ones(len(users), bool)
        np.not_equal(users[1:], users[:-1], out=is_last[:-1])
        ends = np.flatnonzero(is_last) + 1
        starts = np.r_[0, ends[:-1]][:len(ends)]
        lengths = ends - starts
        long = lengths > frame_size
        if not long.any():
            raise DataError(f"no user has more than frame_size = {frame_size} ratings (the longest log has "
                            f"{lengths.max(initial=0)}): use a smaller frame")
        is_start = np.repeat(long, lengths)
        for place in range(1, frame_size + 1):  # the last frame_size ratings of a log start no window
            is_start[ends[long] - place] = False
        start = np.flatnonzero(is_start).astype(np.int32 if len(users) <= np.iinfo(np.int32).max else np.int64)
        self.frame_size, self.embed_size = frame_size, int(item_matrix.shape[1])
        self.user_ids, self.log_start, self.log_length = users[starts], starts, lengths
        self.n_short_users = int((~long).sum())
        self.device, self._pool = torch.device(device), Pool()
        self.item_ids = np.asarray(item_ids)
        self.items = torch.as_tensor(item_matrix, dtype=torch.float32, device=device) \
            .clone(memory_format=torch.contiguous_format)             # (n_items, E): torch begins it at a cache line
        self.item_idx = torch.as_tensor(item_idx, device=device)      # (n_ratings,) rows of the item matrix
        self.rating = torch.as_tensor(rating, device=device)          # (n_ratings,)
        self.is_last = torch.as_tensor(is_last, device=device)        # (n_ratings,) last of its user's log
        self.start = torch.as_tensor(start, device=device)            # (n,) first of a window
        self.tied = torch.zeros(len(users), dtype=torch.bool)         # (n_ratings,) of the second of the one before
        self.tied[1:] = torch.as_tensor((when[1:] == when[:-1]) & ~is_last[:-1])
        self.in_order: tuple[Tensor, Tensor] | None = None
        self.gap = None
        if times:
            days = np.diff(when, prepend=when[:1]) / 86_400
            days[starts] = 0
            self.gap = torch.as_tensor(days.astype(np.float32), device=device)  # (n_ratings,)

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: int) -> Transition:
        return Transition(*(field[0] for field in self.gather(torch.tensor([range(len(self))[index]]))))

    def __getitems__(self, indices: list[int]) -> list[Transition]:
        return [_Whole(*self.gather(torch.as_tensor(indices)))]

    def gather(self, index: Tensor) -> Transition:
        """Return the transitions at `index` (B,), whole numbers from 0, as one batch.

        Raises:
            IndexError: for an index outside of the transitions.
        """
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            raise IndexError(f"transitions are numbered from 0 to {len(self) - 1:,}; asked for "
                             f"{int(index.min()):,} to {int(index.max()):,}")
        batch = self._fill(index.cpu()) if self.device.type == "cpu" else self.gather_on_device(index)
        if self.gap is None:
            return batch
        first = self.start[index.to(self.device)].long()
        gap = self.gap[first.unsqueeze(1) + torch.arange(self.frame_size + 1, device=self.device)]
        return batch._replace(state=torch.cat([batch.state, gap[:, :-1]], dim=1),
                              next_state=torch.cat([batch.next_state, gap[:, 1:]], dim=1))

    def gather_on_device(self, index: Tensor) -> Transition:
        """Return the same as `gather`, with torch alone: where the item matrix lives on a GPU."""
        first = self.start[index.to(self.device)].long()
        rows = first.unsqueeze(1) + torch.arange(self.frame_size + 1, device=self.device)    # (B, F+1)
        vectors, rating = self.items[self.item_idx[rows]], self.rating[rows]                 # (B, F+1, E), (B, F+1)
        return Transition(state=flatten(vectors[:, :-1], rating[:, :-1]), action=vectors[:, -1],
                          reward=reward_of(rating[:, -1:]), next_state=flatten(vectors[:, 1:], rating[:, 1:]),
                          done=self.is_last[rows[:, -1:]].float())

    def _fill(self, index: Tensor) -> Transition:
        n, width = len(index), self.frame_size * (self.embed_size + 1)
        arrays = self._pool.take([(n, size) for size in (width, self.embed_size, 1, width, 1)])
        log = (field.numpy() for field in (self.start, self.item_idx, self.rating, self.items))
        fill(0, n, index.numpy(), *log, self.frame_size, *arrays)
        return Transition(*self._pool.lend(arrays))

    def shuffle_ties(self, seed: int | None) -> None:
        """Put ratings that share a user and a second in another order, the same for a seed; None: as they came.

        That order is arbitrary (in ML-100K half of the ratings share their second), so any is as true as the file's.
        The transitions keep their numbers and change what they hold. To go back, 8 bytes a rating are kept.
        """
        if self.in_order is None:
            if seed is None:
                return
            self.in_order = self.item_idx.clone(), self.rating.clone()
        item_idx, rating = self.in_order
        order = torch.arange(len(rating))
        if seed is not None:
            second = (~self.tied).cumsum(0).numpy()
            order = torch.as_tensor(np.lexsort((np.random.default_rng(seed).random(len(second)), second)))
        self.item_idx.copy_(item_idx[order.to(self.device)])
        self.rating.copy_(rating[order.to(self.device)])

    def log_hash(self) -> str:
        """Return the sha256 of which items were rated how, and which windows are transitions."""
        digest = hashlib.sha256()
        for field in (self.item_idx, self.rating, self.start):
            digest.update(field.cpu().numpy())
        return digest.hexdigest()

    def next_items(self, index: Tensor, n: int = 1) -> Tensor:
        """Return (B, n) rows of the item matrix: the logged action of each transition and the n − 1 after it.

        −1 stands where the user's log has ended.
        """
        rows, within = self._next_rows(index, n)
        return torch.where(within, self.item_idx[rows].long(), -1)

    def next_rewards(self, index: Tensor, n: int = 1) -> tuple[Tensor, Tensor]:
        """Return the rewards (B, n) of each transition and the n − 1 after it, and which are still in the log.

        The reward is 0 where the user's log has ended.
        """
        rows, within = self._next_rows(index, n)
        return reward_of(self.rating[rows]) * within, within

    def _next_rows(self, index: Tensor, n: int) -> tuple[Tensor, Tensor]:
        first = self.start[index.to(self.device)].long().unsqueeze(1) + self.frame_size
        rows = (first + torch.arange(n, device=self.device)).clamp(max=len(self.item_idx) - 1)
        ended = self.is_last[rows].cumsum(1) - self.is_last[rows].long()  # logs that ended before
        return rows, ended == 0

    def sample(self, batch_size: int, shuffle: bool = True, seed: int = 0) -> Iterator[Tensor]:
        """Yield index batches (≤ batch_size,) that cover every transition once; the same for a seed."""
        in_order = (torch.arange(low, min(low + GROUP, len(self))) for low in range(0, len(self), GROUP))
        rest = torch.empty(0, dtype=torch.int64)
        for piece in _shuffled(len(self), seed) if shuffle else in_order:
            *full, rest = torch.cat([rest, piece]).to(self.device).split(batch_size)
            yield from full
        yield rest

    def batches(self, batch_size: int, shuffle: bool = True, seed: int = 0,
                device: str | torch.device | None = None) -> Iterator[Transition]:
        """Yield every transition once, as batches of at most `batch_size`; the same for a seed.

        Args:
            device: where the batches go; by default they stay where the item matrix is.
        """
        for index in self.sample(batch_size, shuffle, seed):
            batch = self.gather(index)
            yield batch if device is None else Transition(*(field.to(device) for field in batch))

    def places(self, user_ids: np.ndarray) -> np.ndarray:
        """Return where users stand in `user_ids`, `log_start` and `log_length`.

        Raises:
            DataError: a user without a log.
        """
        place = pd.Index(self.user_ids).get_indexer(user_ids)
        if (place < 0).any():
            raise DataError(f"{(place < 0).sum()} users have no log, e.g. user {np.asarray(user_ids)[place < 0][0]}")
        return place

    def logs(self, user_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return every rating of users: (place of its user in `user_ids`, its row in `item_idx` and `rating`)."""
        place = self.places(user_ids)
        lengths = self.log_length[place]
        return (np.repeat(np.arange(len(place)), lengths),
                np.concatenate([np.arange(n) for n in lengths]) + np.repeat(self.log_start[place], lengths))

    def last_states(self, user_ids: np.ndarray) -> Tensor:
        """Return (n_users, F·(E+1)): the frame at the end of each user's log, what a policy is asked about.

        A log shorter than the frame is padded at its old end with zero vectors, ratings and gaps.
        """
        place = self.places(user_ids)
        end = torch.as_tensor((self.log_start + self.log_length)[place], device=self.device).unsqueeze(1)
        first = torch.as_tensor(self.log_start[place], device=self.device).unsqueeze(1)
        rows = end - self.frame_size + torch.arange(self.frame_size, device=self.device)
        real = rows >= first
        rows = torch.where(real, rows, first)
        state = flatten(self.items[self.item_idx[rows]] * real.unsqueeze(2), self.rating[rows] * real)
        return state if self.gap is None else torch.cat([state, self.gap[rows] * real], dim=1)


class _Whole(Transition):
    """A batch fetched whole: a DataLoader collates a list of one of these by taking it out."""


torch.utils.data._utils.collate.default_collate_fn_map[_Whole] = \
    lambda batch, *, collate_fn_map=None: Transition(*batch[0])


def _shuffled(n: int, seed: int) -> Iterator[Tensor]:
    """Yield 0 … n − 1 in a random order, every order being as likely, in pieces of some two million.

    Each number draws a group; the groups then are shuffled as their turn comes, in the cache and not all at the
    start. (Rao 1961 and Sandelius 1962, "A simple randomization procedure".)
    """
    generator, n_groups = torch.Generator().manual_seed(seed), min(1 + n // GROUP, 256)
    group = torch.randint(n_groups, (n,), generator=generator, dtype=torch.uint8).numpy() if n_groups > 1 else None
    for g in range(n_groups):
        members = torch.arange(n) if group is None else torch.from_numpy(np.flatnonzero(group == g))
        yield members[torch.randperm(len(members), generator=generator)]


def flatten(vectors: Tensor, rating: Tensor) -> Tensor:
    """Lay out a frame: vectors (B, F, E) and ratings (B, F) → state (B, F·(E+1))."""
    return torch.cat([vectors.flatten(1), rating], dim=1)


def unflatten(state: Tensor, frame_size: int, embed_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Undo `flatten`: state (B, F·(E+1)) → vectors (B, F, E), ratings (B, F).

    With `embed_size` the state may go on after that, with gaps.
    """
    embed_size = state.shape[1] // frame_size - 1 if embed_size is None else embed_size
    vectors, rating = state[:, :frame_size * (embed_size + 1)].split([frame_size * embed_size, frame_size], dim=1)
    return vectors.unflatten(1, (frame_size, embed_size)), rating


def gaps(state: Tensor, frame_size: int, embed_size: int) -> Tensor:
    """Return (B, F): days between each rating of a frame and the user's rating before it.

    Frames made without `times` are taken for one rating a day.
    """
    after = state[:, frame_size * (embed_size + 1):]
    return after if after.shape[1] else state.new_ones(len(state), frame_size)


def to_autocast(t: Transition) -> Transition:
    """Return a batch as matrices are multiplied: under bfloat16 autocast, its vectors are converted once for all."""
    kind = t.state.device.type
    if not torch.is_autocast_enabled(kind):
        return t
    dtype = torch.get_autocast_dtype(kind)
    return t._replace(state=t.state.to(dtype), action=t.action.to(dtype), next_state=t.next_state.to(dtype))


def write_static(path: Path, frames: Frames, source: str, seed: int | None = None, dtype: str = "float16",
                 smallest: bool = False, rows: int = 4096, save_every: int = 1 << 17) -> None:
    """Write every transition to HDF5, in order of users and time, or shuffled when a seed is given.

    A chunk holds whole rows: the ten copies of each embedding in neighbouring rows then lie side by side, and
    the compression removes them. (Shuffled rows share nothing, so such a file is several times as large.) Each
    chunk carries a checksum.
    `f[key][i*n:(i+1)*n]` reads the file with plain h5py (after `import hdf5plugin`).

    Rows go to a part beside `path` that takes its place when it is whole. Interrupted or killed, the same call
    goes on where the part was last saved. Memory does not grow with the number of rows.

    Args:
        source: what the ratings are, kept as an attribute.
        dtype: "float16" or "float32" for vectors and ratings.
        smallest: states too in Zstandard and chunks of 2,048 rows (5 MB): smaller, written more slowly, and slow to
            read in small slices. Otherwise LZ4 and 256 rows (660 KB).
        rows: rows made at a time, and in a chunk of actions; a chunk of states holds a whole fraction of them, so
            that every save finds whole chunks.
        save_every: rows between two moments from which an interrupted write can go on.

    Raises:
        DataError: numbers that float16 cannot hold, frames with times, or another process that writes it.
    """
    if frames.gap is not None:
        raise DataError("a static file holds states of vectors and ratings: make the frames without times")
    if dtype == "float16" and float(frames.items.abs().max()) > torch.finfo(torch.float16).max:
        raise DataError("the item matrix holds numbers beyond 65,504, the largest of float16: write dtype='float32'")
    width = frames.frame_size * (frames.embed_size + 1)
    columns = {"state": (width,), "action": (frames.embed_size,), "reward": (), "next_state": (width,), "done": ()}
    about = {"frame_size": frames.frame_size, "embed_size": frames.embed_size, "source": source,
             "hash": matrix_hash(frames.items), "seed": -1 if seed is None else seed}
    recipe = {**about, "dtype": dtype, "smallest": smallest, "rows": rows, "log": frames.log_hash()}
    with writing(path, wait=0), replacing(path) as beside:
        journal = beside.with_name(beside.name + ".json")
        written = _rows_saved(journal, recipe) if beside.exists() else 0
        if not written:
            journal.unlink(missing_ok=True)
        with h5py.File(beside, "r+" if written else "w") as file:
            _write_metadata_on_flush_alone(file)
            for name, shape in {} if written else columns.items():
                packed = hdf5plugin.LZ4() if name.endswith("state") and not smallest else hdf5plugin.Zstd()
                chunk = math.gcd(rows, 2048 if smallest else 256) if name.endswith("state") else rows
                file.create_dataset(name, (len(frames), *shape), dtype=dtype if shape else np.int8, fletcher32=True,
                                    chunks=(min(chunk, len(frames)), *shape), **packed)
            file.attrs.update(about)

            def save(n_rows: int) -> None:  # the journal stands only while the part on disk is whole
                journal.unlink(missing_ok=True)
                file.flush()
                write_json(journal, {"recipe": recipe, "written": n_rows})

            with tqdm(total=len(frames), initial=written, desc=path.name, unit="row", unit_scale=True,
                      leave=False) as bar:
                try:
                    for n, index in enumerate(frames.sample(rows, shuffle=seed is not None, seed=seed or 0)):
                        if n * rows < written:
                            continue
                        stored = [field.to(getattr(torch, dtype)).cpu().numpy() for field in frames.gather(index)]
                        for name, values in zip(FIELDS, stored, strict=True):
                            file[name][n * rows:n * rows + len(index)] = values if columns[name] else values[:, 0]
                        written = n * rows + len(index)
                        bar.update(len(index))
                        if written % save_every < rows:
                            save(written)
                except BaseException:
                    with contextlib.suppress(OSError, RuntimeError):  # a full disk: there is nothing to go on from
                        save(written // rows * rows)
                    raise
        journal.unlink(missing_ok=True)


def _rows_saved(journal: Path, recipe: dict) -> int:
    """Return how many rows of a part are whole and the same as would be written now."""
    try:
        known = json.loads(journal.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return 0
    return known["written"] if known.get("recipe") == recipe else 0


def _write_metadata_on_flush_alone(file: h5py.File) -> None:
    """Keep HDF5's index of chunks in memory between flushes, so that a kill in between leaves the last one intact."""
    config = file.id.get_mdc_config()
    config.evictions_enabled, config.incr_mode, config.flash_incr_mode, config.decr_mode = False, 0, 0, 0
    file.id.set_mdc_config(config)


def read_static(path: Path, batch_size: int, frame_size: int, item_matrix: np.ndarray | Tensor,
                device: str | torch.device = "cpu") -> Iterator[Transition]:
    """Yield the transitions of a static file in its order, float32, as `Frames.batches` does.

    Raises:
        DataError: damaged file, or one written with another frame size or item matrix.
    """
    with open_static(path) as file:
        if not {"frame_size", "hash"} <= set(file.attrs):
            raise DataError(f"{shown(path)} does not say its frame_size and item matrix: it is not one of ours; "
                            f"run notes/04_static_dataset.ipynb")
        if file.attrs["frame_size"] != frame_size:
            raise DataError(f"{shown(path)} was written with frame_size {file.attrs['frame_size']}, not {frame_size}")
        if file.attrs["hash"] != matrix_hash(item_matrix):
            raise DataError(f"{shown(path)} was written with another item matrix: "
                            f"run notes/04_static_dataset.ipynb again")
        fields, n_rows, pool = [file[name] for name in FIELDS], len(file["reward"]), Pool()
        rows = batch_size * -(-4096 // batch_size)  # whole batches and whole chunks, even where batches are small
        stored = [np.empty((min(rows, n_rows), *field.shape[1:]), field.dtype) for field in fields]
        for low in range(0, n_rows, rows):
            high = min(low + rows, n_rows)
            try:
                for field, raw in zip(fields, stored, strict=True):
                    field.read_direct(raw, np.s_[low:high], np.s_[:high - low])
            except OSError as error:
                raise DataError(f"{shown(path)} is damaged between rows {low:,} and {high:,} ({error}): "
                                f"delete it and run notes/04_static_dataset.ipynb") from error
            for first in range(0, high - low, batch_size):
                n = min(batch_size, high - low - first)
                arrays = pool.take([(n, *(field.shape[1:] or (1,))) for field in fields])
                for raw, array in zip(stored, arrays, strict=True):
                    torch.from_numpy(array).copy_(torch.from_numpy(raw[first:first + n].reshape(array.shape)))
                yield Transition(*(field.to(device) for field in pool.lend(arrays)))


def open_static(path: Path) -> h5py.File:
    """Open a static file for reading.

    Raises:
        FileNotFoundError: if there is none.
        DataError: if it is locked or damaged, or lacks one of the five fields, or they differ in length.
    """
    need(path, "04_static_dataset")
    try:
        file = h5py.File(path, "r", rdcc_nbytes=1 << 21)  # a cache of chunks that fits the processor's own
    except OSError as error:
        if "unable to lock" in str(error):
            raise DataError(f"{shown(path)} is locked: another program has it open for writing, so close it there; or "
                            f"its disk knows no locks, then set HDF5_USE_FILE_LOCKING=FALSE") from error
        raise DataError(f"{shown(path)} is not a readable HDF5 file ({error}): delete it and run "
                        f"notes/04_static_dataset.ipynb") from error
    lacking = [name for name in FIELDS if name not in file]
    if lacking:
        file.close()
        raise DataError(f"{shown(path)} lacks {', '.join(lacking)}")
    if len({len(file[name]) for name in FIELDS}) > 1:
        lengths = ", ".join(f"{name} {len(file[name])}" for name in FIELDS)
        file.close()
        raise DataError(f"{shown(path)} holds fields of different lengths ({lengths})")
    return file


def matrix_hash(item_matrix: np.ndarray | Tensor) -> str:
    """Return the sha256 of an item matrix's float32 bytes, which ties a static file to it."""
    matrix = torch.as_tensor(item_matrix).cpu().numpy().astype(np.float32)
    return hashlib.sha256(str(matrix.shape).encode() + np.ascontiguousarray(matrix).tobytes()).hexdigest()
