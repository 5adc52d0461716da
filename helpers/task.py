"""What lessons 05 to 09 train on and are judged by: one data set, split, framed, with the users held out."""

import inspect
import os
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from IPython.display import Markdown

from helpers import datasets, evaluation, features
from helpers.files import DEFAULT_DATASET, data_dir, need
from helpers.frames import Frames, Transition

MOST_APART = 300  # users: their transitions are looked at together


class Task(NamedTuple):
    """Everything a training and its judgement need of a data set.

    split: ratings by purpose; the last of each user is the test, the one before is for validation.
    frames: transitions to train on, of the training part without the users held out.
    apart: transitions of the users held out.
    history, longer_history: all users' logs, of the training part, and with validation added.
    """

    home: Path
    ids: np.ndarray
    matrix: np.ndarray
    title: dict[int, str]
    split: evaluation.Split
    frames: Frames
    apart: Frames
    history: Frames
    longer_history: Frames

    def watched(self) -> Transition:
        """Return up to 1,024 transitions of users held out, always the same: the states that figures show."""
        n = min(1024, max(128, (1 << 22) // len(self.ids)))  # the distance of each to every item is asked for
        order = torch.randperm(len(self.apart), generator=torch.Generator().manual_seed(0))
        return self.apart.gather(order[:n])

    def n_steps(self, most: int, batch_size: int, passes: int, least: int = 60) -> int:
        """Return how many steps to train for: so many passes over the transitions, between `least` and `most` steps.

        More would teach a small data set by heart: of 8,000 invented transitions five to ten passes ranked best.
        """
        return min(most, max(least, passes * -(-len(self.frames) // batch_size)))


def load_task(dataset: str, frame_size: int = 10, device: str | torch.device = "cpu", share_apart: float = 0.05,
              times: bool = False, most_scores: int = 1 << 26) -> Task:
    """Read a data set and its item matrix, hold out, and frame; FileNotFoundError names a lesson to run first.

    `share_apart` of the users with a frame, MOST_APART at most, are not trained on. `most_scores`, users × items, are
    validated and tested with (268 MB): of more users a part is drawn, the same each time. For `times` see `Frames`.
    """
    home = data_dir(dataset)
    split = evaluation.split_last(datasets.read_ratings(datasets.fetch(dataset)))
    ids, matrix = features.read_item_matrix(home / "embeddings.npz")
    infos = features.read_infos(need(home / "infos.json", "01_data_parsing"))
    log_length = split.train.groupby("user_id").size()
    long_enough = log_length.index[log_length > frame_size]
    n_apart = max(1, min(MOST_APART, int(share_apart * len(long_enough))))
    apart = split.train["user_id"].isin(np.random.default_rng(0).choice(long_enough, n_apart, replace=False))
    make = partial(Frames, item_ids=ids, item_matrix=matrix, frame_size=frame_size, device=device, times=times)
    longer_history = make(evaluation.together(split.train, split.valid))
    most_users = most_scores // len(ids)
    if len(split.test) > most_users:
        some = np.random.default_rng(0).choice(split.test["user_id"], most_users, replace=False)
        valid, test = (part[part["user_id"].isin(some)].reset_index(drop=True) for part in (split.valid, split.test))
        print(f"validated and tested with {most_users:,} of {len(split.test):,} users, drawn at random")
        split = split._replace(valid=valid, test=test)
    return Task(home, ids, matrix, {i: info["title"] for i, info in infos.items()}, split,
                make(split.train[~apart]), make(split.train[apart]), make(split.train), longer_history)


def text_says(dataset: str, sentence: str, came: object, holds: bool) -> None:
    """Hold a sentence of a lesson's text, which is of ML-100K, against what came out here; print both if it fails.

    With RECNN_STRICT=1 (`make notes`, `make test FULL=1`) AssertionError instead. Of other data the text says nothing.
    """
    if not holds and dataset == DEFAULT_DATASET:
        came = f"{came:.3f}" if isinstance(came, float) else came
        message = f"The text says: {sentence}. Here it is {came}."
        if os.environ.get("RECNN_STRICT"):
            raise AssertionError(message)
        print(message)


def source(*objects: Callable | type) -> Markdown:
    """Return the code of functions and classes, as a notebook shows it in colour."""
    return Markdown("\n".join(f"```python\n{textwrap.dedent(inspect.getsource(each))}```" for each in objects))
