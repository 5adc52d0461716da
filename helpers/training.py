"""The loop around an update rule: progress and log; and policies on disk."""

import contextlib
import math
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from helpers.files import DataError, replacing, shown
from helpers.frames import Frames, Transition, matrix_hash
from helpers.losses import mean_item
from helpers.networks import POLICIES


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why. Good weights are kept."""


class Log:
    """What a run leaves behind: TensorBoard events as it goes, `scalars.csv` and `actions.npz` on `close`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._begin()

    def _begin(self) -> None:
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = SummaryWriter(str(self.folder))
        self.rows: list[dict] = []
        self.snapshots: dict[str, Tensor] = {}

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers at a step; a name with a slash groups them in TensorBoard."""
        self.rows.append({"step": step, **values})
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def actions(self, step: int, **batches: Tensor) -> None:
        """Keep what networks say about the same states at a step, name → (B, E); to TensorBoard, its covariance too."""
        for name, batch in batches.items():
            actions = self.snapshots[f"{name}/{step}"] = batch.detach().float().cpu()
            self.writer.add_histogram(f"actions/{name}", actions, step)
            centred = actions - actions.mean(dim=0)
            covariance = centred.T @ centred  # (E, E), up to a factor
            grey = 0.5 + 0.5 * covariance / max(covariance.abs().max(), 1e-12)
            self.writer.add_image(f"covariance/{name}", grey, step, dataformats="HW")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "snapshots": self.snapshots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.writer.close()
        self._begin()
        for row in state["rows"]:
            self.scalars(row["step"], {name: value for name, value in row.items() if name != "step"})
        for key, batch in state["snapshots"].items():
            name, step = key.rsplit("/", 1)
            self.actions(int(step), **{name: batch})

    def close(self) -> None:
        """Write the two plain files."""
        self.writer.close()
        with replacing(self.folder / "scalars.csv") as beside:
            pd.DataFrame(self.rows or {"step": []}).groupby("step").first().to_csv(beside)
        with replacing(self.folder / "actions.npz") as beside, beside.open("wb") as file:
            np.savez_compressed(file, **{key: batch.numpy() for key, batch in self.snapshots.items()})


def read_log(folder: Path) -> tuple[pd.DataFrame, dict[str, dict[int, np.ndarray]]]:
    """Return (scalars indexed by step, {name: {step: actions (B, E)}}) of a finished run."""
    snapshots: dict[str, dict[int, np.ndarray]] = {}
    with np.load(folder / "actions.npz", allow_pickle=False) as file:
        for key in file.files:
            name, step = key.rsplit("/", 1)
            snapshots.setdefault(name, {})[int(step)] = file[key]
    return pd.read_csv(folder / "scalars.csv", index_col="step"), snapshots


def autocast(device: str | torch.device) -> torch.autocast:
    """Let matrices be multiplied in bfloat16 where the processor does that faster; weights stay float32.

    Without autocast's cache of converted weights: within one update the optimiser changes them.
    """
    kind = torch.device(device).type
    fast = torch.cuda.is_bf16_supported() if kind == "cuda" else \
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=fast, cache_enabled=False)


class CheckpointFile:
    """Where `fit` keeps its last copy: a file, written beside its place, gone when the run has ended."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return shown(self.path)

    def read(self, run: dict[str, Any]) -> dict[str, Any] | None:
        """Return what was kept, or None; `run` is what the run that asks is known by."""
        return torch.load(self.path, map_location="cpu", weights_only=True) if self.path.exists() else None

    def write(self, kept: dict[str, Any]) -> None:
        """Keep {"run", "step", "rows", "parts"}.

        Raises:
            OSError: saying why it cannot be written.
        """
        try:
            with replacing(self.path) as beside:
                torch.save(kept, beside)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a riddle
            full = shutil.disk_usage(self.path.parent).free < 1 << 20
            reason = "the disk is full" if full else str(error).splitlines()[0]
            raise OSError(f"{self} cannot be written ({reason})") from error

    def done(self) -> None:
        self.path.unlink(missing_ok=True)


def fit(update: Callable[[Any], dict[str, Tensor]], frames: Frames, parts: dict[str, Any], *, batch_size: int,
        max_steps: int, watch: Callable[[int], dict[str, float]] | None = None, log_every: int = 10,
        safe_every: int = 200, log: Log | None = None, seed: int = 0, desc: str = "fit",
        sample: Callable[[int], Any] | None = None, shuffle_ties: bool = False, limit: float = 1e6, bf16: bool = True,
        checkpoint: Path | Any = None) -> pd.DataFrame:
    """Call `update` on shuffled batches, epoch after epoch, for `max_steps` steps.

    Args:
        update: index (B,) into `frames` → scalars to log.
        parts: networks, optimisers and the like by name (anything with `state_dict` and `load_state_dict`).
        watch: step → further numbers to log, asked at every logged step.
        log_every: steps between two logged rows.
        safe_every: least steps between two copies of `parts`, to go back to if training fails.
        sample: batch_size → what is handed to `update`; by default each transition once an epoch, shuffled.
        shuffle_ties: with every pass over the log, put ratings of one second in another order (see `Frames`).
        limit: no logged number may be larger; rewards of −4 … 5 discounted by 0.99 make returns of at most 500.
        bf16: let `autocast` decide how matrices are multiplied; False keeps to float32.
        checkpoint: file to keep the last copy in, or what has `CheckpointFile`'s methods. A run that was
            stopped goes on from there, to the same end as if it had not been; a finished run removes the file. It is
            ignored if it belongs to other settings.

    Returns:
        The logged rows, indexed by step.

    Raises:
        TrainingError: if a number or weight is not finite, a number grows beyond `limit`, `update` raises ValueError,
            or the copy cannot be written; `parts` are as in their last copy.
    """
    everything = parts | ({} if log is None else {"log": log})
    checkpoint = CheckpointFile(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    frames.shuffle_ties(None)
    run = _identity(update, frames, batch_size=batch_size, seed=seed, desc=desc, sampled=sample is not None,
                    shuffle_ties=shuffle_ties)
    safe_step, rows, safe = _resume(checkpoint, run, everything)
    batches = (sample(batch_size) for _ in count()) if sample is not None else islice(chain.from_iterable(
        frames.sample(batch_size, seed=1000 * seed + epoch) for epoch in count()), safe_step, None)
    first, per_pass = safe_step + 1, -(-len(frames) // batch_size)
    bar = tqdm(total=max_steps, initial=safe_step, desc=desc, unit="step", leave=False)

    def stop(step: int, reason: str, advice: str = "Lower the learning rate, or look for NaN in the item matrix"
             ) -> TrainingError:
        bar.close()
        with contextlib.suppress(OSError):  # a full disk does not let TensorBoard begin a new file
            restore(everything, safe)
        return TrainingError(f"step {step}: {reason}; all parts are back at step {safe_step}. {advice}".strip())

    for step, batch in zip(range(first, max_steps + 1), batches, strict=False):
        if shuffle_ties and (step == first or (step - 1) % per_pass == 0):
            frames.shuffle_ties(1000 * seed + (step - 1) // per_pass)
        try:
            with autocast(frames.device) if bf16 else contextlib.nullcontext():
                scalars = update(batch)
        except ValueError as error:  # of a replay or a distribution that is given NaN, say
            raise stop(step, str(error).partition("\n")[0], "") from error
        bar.update()
        if step > 1 and step % log_every and step < max_steps:
            continue
        values = {name: float(torch.as_tensor(value).detach()) for name, value in scalars.items()}
        values |= watch(step) if watch is not None else {}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise stop(step, f"{', '.join(wrong)} is not a finite number")
        wild = [f"{name} is {value:.3g}" for name, value in values.items() if abs(value) > limit]
        if wild:
            raise stop(step, f"{', '.join(wild)}, beyond {limit:,.0f}: the training diverges",
                       "Lower the learning rate, or strengthen the behaviour term")
        rows.append({"step": step, **values})
        if log is not None:
            try:
                log.scalars(step, values)
            except OSError as error:
                raise stop(step, f"the log cannot be written ({error})", "Make room and run again") from error
        if step >= safe_step + safe_every:
            copied = snapshot(everything)
            spoilt = [name for name, state in copied.items() if not _all_finite(state)]
            if spoilt:
                raise stop(step, f"{', '.join(spoilt)} holds numbers that are not finite")
            if checkpoint is not None:
                try:
                    checkpoint.write({"run": run, "step": step, "rows": rows, "parts": copied})
                except OSError as error:
                    raise stop(step, str(error), "Make room; the same call goes on from there") from error
            safe, safe_step = copied, step
    bar.close()
    frames.shuffle_ties(None)
    if checkpoint is not None:
        checkpoint.done()
    return pd.DataFrame(rows or {"step": []}).set_index("step")


def _identity(update: Callable, frames: Frames, **settings: Any) -> dict[str, Any]:
    """Return what a checkpoint must agree with to be gone on from."""
    chosen = {name: value for name, value in getattr(update, "keywords", {}).items()
              if isinstance(value, int | float | str | bool)}
    code = getattr(update, "func", update).__code__.co_code.hex()
    return settings | chosen | {"code": code, "log": frames.log_hash(), "items": matrix_hash(frames.items)}


def _resume(checkpoint: Any, run: dict, parts: dict[str, Any]) -> tuple[int, list[dict], dict]:
    """Return (step, rows, copy of the parts): of the checkpoint if it belongs to this run, else of a beginning."""
    try:
        kept = None if checkpoint is None else checkpoint.read(run)
        if kept is not None and kept["run"] == run:
            restore(parts, kept["parts"])
            return kept["step"], kept["rows"], kept["parts"]
    except DataError:
        raise
    except (RuntimeError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{checkpoint} is not a checkpoint of this run ({str(error).splitlines()[0]}): "
                        f"delete it to begin anew") from error
    return 0, [], snapshot(parts)


def _all_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return all(_all_finite(item) for item in values)


def snapshot(parts: dict[str, Any]) -> dict[str, Any]:
    """Copy the states of networks, optimisers and the like, and of torch's random numbers."""
    rng = {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
    return rng | {name: deepcopy(part.state_dict()) for name, part in parts.items()}


def restore(parts: dict[str, Any], state: dict[str, Any]) -> None:
    """Put back what `snapshot` copied: the next step is then identical to the one that followed it."""
    for name, part in parts.items():
        part.load_state_dict(deepcopy(state[name]))
    torch.set_rng_state(state["rng"].cpu())
    torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])


@torch.no_grad()
def watch_policy(policies: dict[str, nn.Module], state: Tensor, items: Tensor) -> dict[str, float]:
    """Return statistics of proto-actions for state (B, …), over states: of each policy by name, in eval mode.

    And how far the last one's proto-action and mean item are from the nearest item.
    """
    numbers = {"items/length": items.norm(dim=1).mean()}
    for name, policy in policies.items():
        was_training = policy.training
        proto_action = policy.eval()(state)
        policy.train(was_training)
        variance = proto_action.var(dim=0, correction=int(len(proto_action) > 1))
        numbers |= {f"{name}/mean": proto_action.mean(), f"{name}/std": variance.sqrt().mean(),
                    f"{name}/variance": variance.mean(), f"{name}/length": proto_action.norm(dim=1).mean()}
    for label, action in (("proto-action", proto_action), ("mean item", mean_item(proto_action, items))):
        numbers[f"distance/{label} to nearest item"] = torch.cdist(action, items).min(dim=1).values.mean()
    return {name: number.item() for name, number in numbers.items()}


def watcher(log: Log, policies: dict[str, nn.Module], value: Callable[[Tensor, Tensor], Tensor], t: Transition,
            items: Tensor, look: Callable[[nn.Module], float], look_every: int,
            keep_at: tuple[int, ...]) -> Callable[[int], dict[str, float]]:
    """Return what `fit` asks at each logged step: numbers on transitions t of users never trained on.

    Args:
        policies: {"actor": …, "actor_target": …}; the last one recommends.
        value: state (B, …), action (B, E) → (B, 1), the critic's estimate.
        look: policy → NDCG@10 on validation, asked every `look_every` steps and at the last of `keep_at`.
        keep_at: steps at which the proto-actions themselves are kept, the last step of the training at their end.
    """
    *_, policy = policies.values()
    log.actions(0, logged=t.action)

    @torch.no_grad()
    def watch(step: int) -> dict[str, float]:
        numbers = watch_policy(policies, t.state, items)
        if step in keep_at:
            log.actions(step, **{name: deepcopy(network).eval()(t.state) for name, network in policies.items()})
        numbers["Q held-out users/logged action"] = value(t.state, t.action).mean().item()
        numbers["Q held-out users/policy's action"] = value(t.state, mean_item(policy(t.state), items)).mean().item()
        if step % look_every == 0 or step in keep_at[-1:]:
            numbers["valid/NDCG@10"] = look(policy)
        return numbers
    return watch


def save_policy(path: Path, actor: nn.Module, parts: dict[str, Any], **meta: Any) -> None:
    """Save a policy of `POLICIES` with all it takes to train on (`parts`) and to trust it (`meta`: numbers, text)."""
    with replacing(path) as beside:
        torch.save({"network": type(actor).__name__, "config": actor.config, "weights": actor.state_dict(),
                    "parts": snapshot(parts), "meta": meta}, beside)


def load_policy(path: Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict]:
    """Return (policy in eval mode, the whole checkpoint: network, config, weights, parts, meta).

    Raises:
        DataError: if the file is damaged or holds anything but tensors, numbers and text.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        actor = POLICIES[checkpoint["network"]](**checkpoint["config"])
        actor.load_state_dict(checkpoint["weights"])
    except (RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{shown(path)} is not a policy that can be read ({str(error).splitlines()[0]}): delete it and "
                        f"run the lesson that trains it again") from error
    return actor.to(device).eval(), checkpoint
