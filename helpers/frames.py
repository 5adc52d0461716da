"""Turn ratings and an item matrix into transitions: on the fly from memory, or from a static HDF5 file."""

import hashlib
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

from helpers.files import DataError, need, replacing, shown

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


class Frames(torch.utils.data.Dataset):
    """All transitions of all users' logs, made on the fly: an index of windows, nothing materialised.

    A user's log of n ratings gives max(n − frame_size, 0) transitions, in the order of time.

    Args:
        ratings: `user_id, item_id, rating, timestamp` in any row order.
        item_ids: (n_items,) ids, the rows of `item_matrix`.
        item_matrix: (n_items, embed_size) float32.
        frame_size: items in a state.
        device: where the item matrix, and so every batch, lives.

    Raises:
        DataError: ids and rows that do not pair, a rated item without a row, or nobody with more than
            frame_size ratings.
    """

    def __init__(self, ratings: pd.DataFrame, item_ids: np.ndarray, item_matrix: np.ndarray,
                 frame_size: int = 10, device: str | torch.device = "cpu"):
        if len(item_ids) != len(item_matrix) or len(np.unique(item_ids)) != len(item_ids):
            raise DataError(f"{len(item_ids)} item ids ({len(np.unique(item_ids))} distinct) for an item matrix of "
                            f"{len(item_matrix)} rows: each row wants one id of its own")
        item_idx = pd.Index(item_ids).get_indexer(ratings["item_id"])
        if (item_idx < 0).any():
            unknown = sorted(set(ratings["item_id"][item_idx < 0]))
            raise DataError(f"{len(unknown)} rated items have no embedding (ids {', '.join(map(str, unknown[:5]))} …): "
                            f"make the item matrix from the same data set, notes/03_pca.ipynb")
        users, times = ratings["user_id"].to_numpy(), ratings["timestamp"].to_numpy()
        if ((np.diff(users) < 0) | ((np.diff(users) == 0) & (np.diff(times) < 0))).any():
            order = np.lexsort((times, users))
        else:
            order = np.arange(len(users))
        users = users[order]
        starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]]) if len(users) else np.zeros(0, dtype=np.int64)
        lengths = np.diff(np.r_[starts, len(users)])
        n_windows = np.maximum(lengths - frame_size, 0)
        if n_windows.sum() == 0:
            raise DataError(f"no user has more than frame_size = {frame_size} ratings (the longest log has "
                            f"{lengths.max(initial=0)}): use a smaller frame")
        within = np.arange(n_windows.sum()) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
        self.frame_size, self.embed_size = frame_size, int(item_matrix.shape[1])
        self.user_ids, self.log_start, self.log_length = users[starts], starts, lengths
        self.n_short_users = int((n_windows == 0).sum())
        self.device = torch.device(device)
        self.item_ids = np.asarray(item_ids)
        self.items = torch.as_tensor(item_matrix, dtype=torch.float32, device=device)
        self.item_idx = torch.as_tensor(item_idx[order].astype(np.int64), device=device)
        self.rating = torch.as_tensor(ratings["rating"].to_numpy(np.float32)[order], device=device)
        self.start = torch.as_tensor(np.repeat(starts, n_windows) + within, device=device)
        self.log_end = torch.as_tensor(np.repeat(starts + lengths, n_windows), device=device)
        self._window = torch.arange(frame_size + 1, device=device)

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: int) -> Transition:
        return Transition(*(field[0] for field in self.gather(torch.tensor([index]))))

    def __getitems__(self, indices: list[int]) -> list[Transition]:
        batch = self.gather(torch.as_tensor(indices))
        return [Transition(*row) for row in zip(*batch, strict=True)]

    def gather(self, index: Tensor) -> Transition:
        """Return the transitions at `index` (B,) int64, as one batch."""
        index = index.to(self.device)
        rows = self.start[index].unsqueeze(1) + self._window                     # (B, F+1)
        vectors, rating = self.items[self.item_idx[rows]], self.rating[rows]     # (B, F+1, E), (B, F+1)
        done = (rows[:, -1:] + 1 == self.log_end[index].unsqueeze(1)).float()
        return Transition(state=flatten(vectors[:, :-1], rating[:, :-1]), action=vectors[:, -1],
                          reward=reward_of(rating[:, -1:]),
                          next_state=flatten(vectors[:, 1:], rating[:, 1:]), done=done)

    def next_items(self, index: Tensor, n: int = 1) -> Tensor:
        """Return (B, n) rows of the item matrix: the logged action of each transition and the n − 1 after it.

        −1 stands where the user's log has ended.
        """
        index = index.to(self.device)
        rows = self.start[index].unsqueeze(1) + self.frame_size + torch.arange(n, device=self.device)
        inside = rows < self.log_end[index].unsqueeze(1)
        return torch.where(inside, self.item_idx[rows.clamp(max=len(self.item_idx) - 1)], -1)

    def sample(self, batch_size: int, shuffle: bool = True, seed: int = 0) -> Iterator[Tensor]:
        """Yield index batches (≤ batch_size,) that cover every transition once; the same for a seed."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator) if shuffle else torch.arange(len(self))
        yield from order.to(self.device).split(batch_size)

    def batches(self, batch_size: int, shuffle: bool = True, seed: int = 0) -> Iterator[Transition]:
        """Yield every transition once, as batches of at most `batch_size`; the same for a seed."""
        for index in self.sample(batch_size, shuffle, seed):
            yield self.gather(index)

    def places(self, user_ids: np.ndarray) -> np.ndarray:
        """Return where users stand in `user_ids`, `log_start` and `log_length`.

        Raises:
            DataError: a user without a log.
        """
        place = pd.Index(self.user_ids).get_indexer(user_ids)
        if (place < 0).any():
            raise DataError(f"{(place < 0).sum()} users have no log, e.g. user {np.asarray(user_ids)[place < 0][0]}")
        return place

    def last_states(self, user_ids: np.ndarray) -> Tensor:
        """Return (n_users, F·(E+1)): the frame at the end of each user's log, what a policy is asked about.

        A log shorter than the frame is padded at its old end with zero vectors and zero ratings.
        """
        place = self.places(user_ids)
        end = torch.as_tensor((self.log_start + self.log_length)[place], device=self.device).unsqueeze(1)
        first = torch.as_tensor(self.log_start[place], device=self.device).unsqueeze(1)
        rows = end - self.frame_size + self._window[:-1]
        real = rows >= first
        rows = torch.where(real, rows, first)
        return flatten(self.items[self.item_idx[rows]] * real.unsqueeze(2), self.rating[rows] * real)


def flatten(vectors: Tensor, rating: Tensor) -> Tensor:
    """Lay out a frame: vectors (B, F, E) and ratings (B, F) → state (B, F·(E+1))."""
    return torch.cat([vectors.flatten(1), rating], dim=1)


def unflatten(state: Tensor, frame_size: int) -> tuple[Tensor, Tensor]:
    """Undo `flatten`: state (B, F·(E+1)) → vectors (B, F, E), ratings (B, F)."""
    vectors, rating = state[:, :-frame_size], state[:, -frame_size:]
    return vectors.unflatten(1, (frame_size, -1)), rating


def write_static(path: Path, frames: Frames, source: str, seed: int | None = None, dtype: str = "float16",
                 rows: int = 4096) -> None:
    """Write every transition to HDF5, in order of users and time, or shuffled when a seed is given.

    A chunk holds 64 whole rows: the ten copies of each embedding in neighbouring rows then lie
    side by side and LZ4 removes them. `f[key][i*n:(i+1)*n]` reads the file with plain h5py (after
    `import hdf5plugin`).

    Args:
        source: what the ratings are, kept as an attribute.
        dtype: "float16" or "float32" for vectors and ratings.
    """
    width = frames.frame_size * (frames.embed_size + 1)
    columns = {"state": (width,), "action": (frames.embed_size,), "reward": (), "next_state": (width,), "done": ()}
    with replacing(path) as beside, h5py.File(beside, "w") as file:
        file.attrs.update(frame_size=frames.frame_size, embed_size=frames.embed_size, source=source,
                          hash=matrix_hash(frames.items), seed=-1 if seed is None else seed)
        for name, shape in columns.items():
            file.create_dataset(name, (len(frames), *shape), dtype=np.int8 if not shape else dtype,
                                chunks=(min(64 if shape else rows, len(frames)), *shape), **hdf5plugin.LZ4())
        bar = tqdm(total=len(frames), desc=path.name, unit="row", unit_scale=True, leave=False)
        first = 0
        for batch in frames.batches(rows, shuffle=seed is not None, seed=seed or 0):
            last = first + len(batch.state)
            for name, field in zip(FIELDS, batch, strict=True):
                values = field.cpu().numpy()
                file[name][first:last] = values[:, 0] if not columns[name] else values
            bar.update(last - first)
            first = last
        bar.close()


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
        for first in range(0, len(file["reward"]), batch_size):
            fields = (torch.as_tensor(file[name][first:first + batch_size], dtype=torch.float32) for name in FIELDS)
            yield Transition(*(f.to(device) if f.ndim == 2 else f.unsqueeze(1).to(device) for f in fields))


def open_static(path: Path) -> h5py.File:
    """Open a static file for reading.

    Raises:
        FileNotFoundError: if there is none.
        DataError: if it is damaged or lacks one of the five fields.
    """
    need(path, "04_static_dataset")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{shown(path)} is not a readable HDF5 file ({error}): delete it and run "
                        f"notes/04_static_dataset.ipynb") from error
    lacking = [name for name in FIELDS if name not in file]
    if lacking:
        file.close()
        raise DataError(f"{shown(path)} lacks {', '.join(lacking)}")
    return file


def matrix_hash(item_matrix: np.ndarray | Tensor) -> str:
    """Return the sha256 of an item matrix's float32 bytes, which ties a static file to it."""
    matrix = torch.as_tensor(item_matrix).cpu().numpy().astype(np.float32)
    return hashlib.sha256(str(matrix.shape).encode() + np.ascontiguousarray(matrix).tobytes()).hexdigest()
