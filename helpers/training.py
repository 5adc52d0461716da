"""The loop around an update rule: progress and log; and policies on disk."""

import pickle
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

from helpers.files import damaged, replacing
from helpers.frames import Frames, Transition
from helpers.losses import mean_item
from helpers.networks import POLICIES


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why. Good weights are kept."""


class Log:
    """What a run leaves behind: TensorBoard events as it goes, `scalars.csv` and `actions.npz` on `close`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
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
            covariance = torch.cov(actions.T, correction=0).reshape(2 * actions.shape[1:])  # (E, E)
            grey = 0.5 + 0.5 * covariance / max(covariance.max(), 1e-12)
            self.writer.add_image(f"covariance/{name}", grey, step, dataformats="HW")

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


def autocast(device: str | torch.device, bf16: bool = True) -> torch.autocast:
    """Let matrices be multiplied in bfloat16 where the processor does that faster; weights stay float32."""
    kind = torch.device(device).type
    fast = torch.cuda.is_bf16_supported() if kind == "cuda" else \
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=bf16 and fast, cache_enabled=False)  # an update changes weights


def fit(update: Callable[[Any], dict[str, Tensor]], frames: Frames, parts: dict[str, Any], *, batch_size: int,
        max_steps: int, watch: Callable[[int], dict[str, float]] | None = None, log_every: int = 10,
        safe_every: int = 200, log: Log | None = None, seed: int = 0, desc: str = "fit",
        sample: Callable[[int], Any] | None = None, shuffle_ties: bool = False, limit: float = 1e6, bf16: bool = True,
        start: dict[str, Any] | None = None, keep: Callable[[dict[str, Any]], None] = lambda _: None) -> pd.DataFrame:
    """Call `update` on shuffled batches, epoch after epoch, for `max_steps` steps; return the logged rows by step.

    Args:
        update: index (B,) into `frames`, or what `sample` returns for a batch_size → scalars to log.
        parts: networks, optimisers and the like by name (anything with `state_dict` and `load_state_dict`).
        watch: step → further numbers to log, every `log_every` steps and at the first and the last.
        safe_every: least steps between two copies of `parts`, to go back to if training fails.
        shuffle_ties: with every pass over the log, put ratings of one second in another order (see `Frames`); the
            priorities of parts["replay"] follow their ratings.
        limit: no logged number may be larger; rewards of −4 … 5 discounted by 0.99 make returns of at most 500.
        bf16: let `autocast` decide how matrices are multiplied; False keeps to float32.
        start: a copy to go on from, to the same end as if training had never stopped; None begins at step 1.
        keep: is given every copy, {"step", "rows", "parts"}; there is one of the last step.

    TrainingError: a number or weight is not finite, a number grows beyond `limit`, or `update` or `watch` raises
    ValueError; `parts` are as in their last copy.
    """
    if start is not None:
        restore(parts, start["parts"])
    kept = start or {"step": 0, "rows": [], "parts": snapshot(parts)}
    rows, first, per_pass = list(kept["rows"]), kept["step"] + 1, -(-len(frames) // batch_size)
    shuffled = chain.from_iterable(frames.sample(batch_size, seed=1000 * seed + epoch) for epoch in count())
    batches = islice(shuffled, kept["step"], None) if sample is None else (sample(batch_size) for _ in count())
    bar = tqdm(range(first, max_steps + 1), desc, max_steps, initial=kept["step"], unit="step", leave=False)

    def shuffle(step: int, follow: bool = True) -> None:
        before = _ratings(frames) if follow and shuffle_ties and "replay" in parts else None
        frames.shuffle_ties(1000 * seed + (step - 1) // per_pass if shuffle_ties and step else None)
        if before is not None:  # a priority belongs to a rating, wherever that stands
            parts["replay"].follow(before, _ratings(frames))

    shuffle(kept["step"], follow=False)
    try:
        for step in bar:
            if shuffle_ties and (step - 1) % per_pass == 0:
                shuffle(step)
            with autocast(frames.device, bf16):
                scalars = update(next(batches))
            if step > 1 and step % log_every and step < max_steps:
                continue
            values = {name: float(torch.as_tensor(value).detach()) for name, value in scalars.items()}
            values |= watch(step) if watch is not None else {}
            safe = step >= kept["step"] + safe_every or step == max_steps
            copied = snapshot(parts) if safe else {}
            wrong = [f"{name} is {value:.3g}" for name, value in values.items() if not abs(value) <= limit]
            wrong += [f"{name} holds NaN or infinity" for name, state in copied.items() if not _finite(state)]
            if wrong:
                raise ValueError(f"{', '.join(wrong)} (numbers up to {limit:,.0f} are sound): lower the learning rate, "
                                 f"strengthen the behaviour term, or look for NaN in the item matrix")
            rows.append({"step": step, **values})
            if log is not None:
                log.scalars(step, values)
            if safe:
                kept = {"step": step, "rows": list(rows), "parts": copied}
                keep(kept)
    except ValueError as error:  # of a check, or of a replay or a distribution that is given NaN, say
        restore(parts, kept["parts"])
        shuffle(kept["step"], follow=False)
        reason = str(error).partition("\n")[0]
        raise TrainingError(f"step {step}: {reason}; all parts are back at step {kept['step']}") from error
    finally:
        bar.close()
        shuffle(0)
    return pd.DataFrame(rows or {"step": []}).set_index("step")


def _ratings(frames: Frames) -> Tensor:
    """Return (n,): which rating the action of each transition is, numbered in the order that they came in."""
    numbers = torch.arange(len(frames.rating), device=frames.device)[frames.order]
    return numbers[frames.start.long() + frames.frame_size].cpu()


def _finite(value: Any) -> bool:
    """Say whether all tensors in a state are finite, in whatever dicts they are."""
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return not isinstance(value, Tensor) or bool(value.isfinite().all())


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
    """Return statistics of each policy's proto-actions for state (B, …), and how far the last one's are from items."""
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
    """Return (policy in eval mode, the whole file: network, config, weights, parts, meta).

    DataError: the file is damaged, holds anything but tensors, numbers and text, or is of an earlier version.
    """
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        actor = POLICIES[saved["network"]](**saved["config"])
        actor.load_state_dict(saved["weights"])
        if "memory" in saved["meta"]:  # what is "user_history" now
            raise RuntimeError("an earlier version has written it")
    except (RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise damaged(path, "the lesson that trains it again", error) from error
    return actor.to(device).eval(), saved
