"""The loop around an update rule: progress and log; and policies on disk."""

import math
from collections.abc import Callable
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from helpers.files import DataError, replacing, shown
from helpers.frames import Frames
from helpers.networks import Actor


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why. Good weights are kept."""


class Log:
    """What a run leaves behind: TensorBoard events as it goes, `scalars.csv` and `actions.npz` on `close`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = SummaryWriter(str(folder))
        self.rows: list[dict] = []
        self.snapshots: dict[str, np.ndarray] = {}

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers at a step; a name with a slash groups them in TensorBoard."""
        self.rows.append({"step": step, **values})
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def actions(self, step: int, **batches: Tensor) -> None:
        """Keep what networks say about the same states at a step: name → (B, E)."""
        for name, batch in batches.items():
            self.snapshots[f"{name}/{step}"] = batch.detach().cpu().numpy().astype(np.float32)

    def close(self) -> None:
        """Write the two plain files."""
        self.writer.close()
        with replacing(self.folder / "scalars.csv") as beside:
            pd.DataFrame(self.rows).groupby("step").first().to_csv(beside)
        with replacing(self.folder / "actions.npz") as beside, beside.open("wb") as file:
            np.savez_compressed(file, **self.snapshots)


def read_log(folder: Path) -> tuple[pd.DataFrame, dict[str, dict[int, np.ndarray]]]:
    """Return (scalars indexed by step, {name: {step: actions (B, E)}}) of a finished run."""
    snapshots: dict[str, dict[int, np.ndarray]] = {}
    with np.load(folder / "actions.npz", allow_pickle=False) as file:
        for key in file.files:
            name, step = key.rsplit("/", 1)
            snapshots.setdefault(name, {})[int(step)] = file[key]
    return pd.read_csv(folder / "scalars.csv", index_col="step"), snapshots


def fit(update: Callable[[Tensor], dict[str, Tensor]], frames: Frames, parts: dict[str, Any], *, batch_size: int,
        max_steps: int, watch: Callable[[int], dict[str, float]] | None = None, log_every: int = 10,
        safe_every: int = 200, log: Log | None = None, seed: int = 0, desc: str = "fit") -> pd.DataFrame:
    """Call `update` on shuffled batches, epoch after epoch, for `max_steps` steps.

    Args:
        update: index (B,) into `frames` → scalars to log.
        parts: networks and optimisers by name (anything with `state_dict` and `load_state_dict`).
        watch: step → further numbers to log, asked at every logged step.
        log_every: steps between two logged rows.
        safe_every: least steps between two copies of `parts`, to go back to if training fails.

    Returns:
        The logged rows, indexed by step.

    Raises:
        TrainingError: if a logged number is not finite; `parts` are as in their last copy.
    """
    rows: list[dict] = []
    safe, safe_step = snapshot(parts), 0
    batches = chain.from_iterable(frames.sample(batch_size, seed=1000 * seed + epoch) for epoch in count())
    bar = tqdm(islice(batches, max_steps), total=max_steps, desc=desc, unit="step", leave=False)
    for step, index in enumerate(bar, start=1):
        scalars = update(index)
        if step > 1 and step % log_every and step < max_steps:
            continue
        values = {name: float(torch.as_tensor(value).detach()) for name, value in scalars.items()}
        values |= watch(step) if watch is not None else {}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            bar.close()
            restore(parts, safe)
            raise TrainingError(f"step {step}: {', '.join(wrong)} is not a finite number; all parts are back at step "
                                f"{safe_step}. Lower the learning rate, or look for NaN in the item matrix")
        rows.append({"step": step, **values})
        if log is not None:
            log.scalars(step, values)
        if step >= safe_step + safe_every:
            safe, safe_step = snapshot(parts), step
    return pd.DataFrame(rows).set_index("step")


def snapshot(parts: dict[str, Any]) -> dict[str, Any]:
    """Copy the states of networks and optimisers, and of torch's random numbers."""
    rng = {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
    return rng | {name: _copy(part.state_dict()) for name, part in parts.items()}


def restore(parts: dict[str, Any], state: dict[str, Any]) -> None:
    """Put back what `snapshot` copied: the next step is then identical to the one that followed it."""
    for name, part in parts.items():
        part.load_state_dict(_copy(state[name]))
    torch.set_rng_state(state["rng"].cpu())
    torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def save_policy(path: Path, actor: Actor, parts: dict[str, Any], **meta: Any) -> None:
    """Save an actor with all it takes to train on (`parts`) and to trust it (`meta`: numbers, text)."""
    with replacing(path) as beside:
        torch.save({"config": actor.config, "weights": actor.state_dict(), "parts": snapshot(parts),
                    "meta": meta}, beside)


def load_policy(path: Path, device: str | torch.device = "cpu") -> tuple[Actor, dict]:
    """Return (actor in eval mode, the whole checkpoint: config, weights, parts, meta).

    Raises:
        DataError: if the file is damaged or holds anything but tensors, numbers and text.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        actor = Actor(**checkpoint["config"])
        actor.load_state_dict(checkpoint["weights"])
    except (RuntimeError, KeyError, TypeError, EOFError, torch.serialization.pickle.UnpicklingError) as error:
        raise DataError(f"{shown(path)} is not a policy that can be read ({str(error).splitlines()[0]}): delete it and "
                        f"run the lesson that trains it again") from error
    return actor.to(device).eval(), checkpoint
