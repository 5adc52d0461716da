"""Fit recommenders people would use instead: `python benchmarks/baselines.py FOLDER [--only NAME]`.

Runs in an environment of its own (requirements-results.txt) and imports nothing of the project, which in turn has none
of the libraries: each is imported where it is used.
FOLDER holds the cases as CSV: train, item_ids, valid, valid_histories, test, test_histories; and item_matrix.npy.
Settings are tried on earlier.csv: train.csv again, or what came before validation cases that are the end of train.csv.
Into FOLDER/scores go `NAME-SEED.npy`, the scores of every item for every test case, and `NAME.json`, how they came
about; of sequence models also `NAME-SEED valid.npy`, for whoever joins them with a second model. What is finished is
not redone.

Each model may try a dozen settings at most, with one seed, judged by NDCG@10 on the validation cases; the sequence
models, which stop by themselves, fewer. What is reported is fitted on train.csv alone, and scores a case from its
history.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from itertools import chain, product, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch.utils.data import DataLoader
from tqdm import tqdm

FRAME = 10                                # items in a state of recnn
MOST_EPOCHS, EVERY, PATIENCE = 100, 5, 3  # of the sequence models: judge every 5 epochs, stop if no better 3 times
RELEVANT = 4                              # stars from which a film of a case with several counts as found
RULE = ("NDCG@10 on the validation cases, seed 0, whole catalogue without seen items, ties against the method; "
        "where cases have several films, those with 4 stars or more are relevant")


class Part(NamedTuple):
    """The cases of one part: case i has the history [starts[i], starts[i+1]) and the rows of `answers` with case i."""

    items: np.ndarray
    ratings: np.ndarray
    starts: np.ndarray
    answers: pd.DataFrame


class Task(NamedTuple):
    """What FOLDER holds, items as columns 0 … n_items − 1; `earlier` is what settings are tried on."""

    train: pd.DataFrame
    earlier: pd.DataFrame
    n_items: int
    matrix: np.ndarray
    valid: Part
    test: Part


Scorer = Callable[[Part], np.ndarray]


def read_part(folder: Path, name: str, item_ids: pd.Index) -> Part:
    """Read the cases of a part, numbered from 0 in the order of `case`."""
    answers, history = pd.read_csv(folder / f"{name}.csv"), pd.read_csv(folder / f"{name}_histories.csv")
    cases, case = np.unique(answers["case"], return_inverse=True)
    history = history[history["case"].isin(cases)].sort_values("case", kind="stable")
    answers = answers.assign(case=case, item=item_ids.get_indexer(answers["item_id"]))
    starts = np.r_[np.searchsorted(history["case"], cases), len(history)]
    return Part(item_ids.get_indexer(history["item_id"]), history["rating"].to_numpy(np.float32), starts,
                answers.sort_values("case", kind="stable"))


def read_task(folder: Path) -> Task:
    """Read FOLDER."""
    item_ids = pd.Index(pd.read_csv(folder / "item_ids.csv")["item_id"])
    train, earlier = (pd.read_csv(folder / name) for name in ("train.csv", "earlier.csv"))
    for log in (train, earlier):
        log["item"] = item_ids.get_indexer(log["item_id"])
    task = Task(train, earlier, len(item_ids), np.load(folder / "item_matrix.npy").astype(np.float32),
                read_part(folder, "valid", item_ids), read_part(folder, "test", item_ids))
    columns = [train["item"], task.valid.items, task.test.items, task.valid.answers["item"], task.test.answers["item"]]
    if any((np.asarray(column) < 0).any() for column in columns):
        raise SystemExit("item_ids.csv lacks an item of the other files")
    for part, log in ((task.valid, earlier), (task.test, train)):
        held_out = pd.MultiIndex.from_frame(part.answers[["user_id", "item_id"]])
        if held_out.isin(pd.MultiIndex.from_frame(log[["user_id", "item_id"]])).any():
            raise SystemExit("the ratings to fit on hold an answer of a case")
    return task


def last(part: Part, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (items, ratings), both (n_cases, length): the end of each history, −1 and 0 in front of a short one."""
    place = part.starts[1:, None] - length + np.arange(length)
    inside = place >= part.starts[:-1, None]
    place = np.where(inside, place, 0)
    return np.where(inside, part.items[place], -1), np.where(inside, part.ratings[place], 0)


def matrix_of(items: np.ndarray, starts: np.ndarray, n_items: int) -> sparse.csr_matrix:
    """Return who has rated what as ones."""
    rated = sparse.csr_matrix((np.ones(len(items), np.float32), items, starts), shape=(len(starts) - 1, n_items))
    rated.sum_duplicates()
    rated.data[:] = 1
    return rated


def train_matrix(task: Task) -> sparse.csr_matrix:
    """Return who has rated what in the training part as ones."""
    starts = np.r_[np.flatnonzero(~task.train["user_id"].duplicated()), len(task.train)]
    return matrix_of(task.train["item"].to_numpy(), starts, task.n_items)


def ndcg(scores: np.ndarray, part: Part, k: int = 10) -> float:
    """Return the mean NDCG@k over cases."""
    answers, scores = part.answers, scores.copy()
    scores[np.repeat(np.arange(len(part.starts) - 1), np.diff(part.starts)), part.items] = -np.inf
    case, own = answers["case"].to_numpy(), scores[answers["case"], answers["item"]]
    rank = np.concatenate([(~(scores[rows] < own[start:start + 500, None])).sum(axis=1)
                           for start, rows in ((start, case[start:start + 500]) for start in range(0, len(case), 500))])
    gain = np.where(rank <= k, 1 / np.log2(1 + rank), 0)
    good = (answers["rating"] >= RELEVANT).to_numpy() | (not answers["case"].duplicated().any())
    found = np.bincount(case[good], weights=gain[good], minlength=len(scores))
    n_good = np.bincount(case[good], minlength=len(scores))
    best = np.r_[0, np.cumsum(1 / np.log2(np.arange(2, k + 2)))][np.minimum(n_good, k)]
    return float((found[n_good > 0] / best[n_good > 0]).mean())


def item_knn(task: Task, settings: dict, seed: int) -> tuple[Scorer, dict]:
    """Fit implicit's cosine between items, shrunk to xy / (|x||y| + shrink).

    Kept are the k nearest to each item rated, as implicit has it, or the k nearest to each item to recommend.
    """
    from implicit.nearest_neighbours import CosineRecommender

    rated = train_matrix(task)
    model = CosineRecommender(K=task.n_items, num_threads=1)
    model.fit(rated, show_progress=False)
    near = model.similarity.toarray()
    length = np.sqrt(np.asarray(rated.sum(axis=0)).ravel())
    product_of = np.outer(length, length)
    near *= product_of / np.maximum(product_of + settings["shrink"], 1e-9)
    np.fill_diagonal(near, 0)
    far = np.argpartition(-near, settings["k"], axis=1)[:, settings["k"]:]
    np.put_along_axis(near, far, 0, axis=1)
    near = sparse.csr_matrix(near if settings["nearest_to"] == "rated" else near.T)
    return lambda part: (matrix_of(part.items, part.starts, task.n_items) @ near).toarray(), settings


def implicit_als(task: Task, settings: dict, seed: int) -> tuple[Scorer, dict]:
    """Fit implicit's ALS; a case's factors are computed from its history."""
    from implicit.cpu.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(**settings, random_state=seed, num_threads=1)
    model.fit(train_matrix(task), show_progress=False)

    def score(part: Part) -> np.ndarray:
        rated = matrix_of(part.items, part.starts, task.n_items)
        return model.recalculate_user(np.arange(rated.shape[0]), rated) @ model.item_factors.T
    return score, settings


def faster_training() -> type:
    """Return RecTools' training with the same value of both losses, without the scores of padding: half the time."""
    from rectools.models.nn.transformers.lightning import TransformerLightningModule

    class RealPositions(TransformerLightningModule):
        """Train on the positions that have a next item."""

        def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
            """Return the mean cross-entropy of the next items."""
            items = self.torch_model.item_model.get_all_embeddings()
            real = batch["y"] != 0
            logits, target = self.torch_model.encode_sessions(batch, items)[real] @ items.T, batch["y"][real]
            if self.loss == "sampled_softmax":
                logits = logits.gather(1, torch.cat([target[:, None], batch["negatives"][real]], dim=1))
                target = torch.zeros_like(target)
            return torch.nn.functional.cross_entropy(logits, target)

    return RealPositions


def shuffled(items: list[int], second: list[float]) -> list[int]:
    """Return items in the order of their seconds, those of one second in an order drawn anew."""
    return np.asarray(items)[np.lexsort((torch.rand(len(second)).numpy(), second))].tolist()


def shuffled_ties() -> type:
    """Return RecTools' preparation of batches that puts ratings of the same second in another order each time.

    The order inside a second is arbitrary in MovieLens; our own agents are trained so. A weight says which ratings
    share theirs. Ratings of one second that lie in two sessions stay there.
    """
    from rectools.models.nn.transformers.sasrec import SASRecDataPreparator

    class ShuffledTies(SASRecDataPreparator):
        """Shuffle what has the same weight."""

        def _collate_fn_train(self, batch: list[tuple]) -> dict[str, torch.Tensor]:
            return super()._collate_fn_train([(shuffled(items, second), [1.0] * len(items), *more)
                                              for items, second, *more in batch])

    return ShuffledTies


def sessions(task: Task, length: int) -> pd.DataFrame:
    """Cut each user's log from its end into sessions of `length` steps, so that every rating but the first is a target.

    RecTools itself would train on the last `length` of a user alone. The weight is the second, as `shuffled_ties` asks.
    """
    parts = []
    for user, log in task.train.groupby("user_id"):
        items, second = log["item"].to_numpy(), log["timestamp"].rank(method="dense").to_numpy()
        for end in range(len(items), 1, -length):
            start = max(end - length - 1, 0)
            parts.append(pd.DataFrame({"user_id": f"{user} {end}", "item_id": items[start:end],
                                       "weight": second[start:end],
                                       "datetime": pd.to_datetime(np.arange(start, end), unit="s")}))
    return pd.concat(parts, ignore_index=True)


def sequence_scorer(model, n_items: int) -> Scorer:
    """Score with a RecTools model's last position; an item the model has not been fitted on gets −∞."""
    network, ids = model.torch_model, model.data_preparator.item_id_map.external_ids
    column = np.asarray(ids[1:], int)               # row 0 is padding
    row = np.zeros(n_items + 1, int)
    row[column] = np.arange(1, len(ids))            # items[-1], padding, is row 0

    @torch.no_grad()
    def score(part: Part) -> np.ndarray:
        network.eval()
        items = network.item_model.get_all_embeddings()
        known = np.flatnonzero(row[part.items])
        kept = part._replace(items=part.items[known], ratings=part.ratings[known],
                             starts=np.searchsorted(known, part.starts))
        x = torch.as_tensor(row[last(kept, model.session_max_len)[0]])
        scores = np.full((len(x), n_items), -np.inf, np.float32)
        for start in range(0, len(x), 256):
            end = network.encode_sessions({"x": x[start:start + 256]}, items)[:, -1]
            scores[start:start + 256, column] = (end @ items[1:].T).numpy()
        network.train()
        return scores
    return score


def sequence_model(task: Task, settings: dict, seed: int, **kind) -> tuple[Scorer, dict]:
    """Fit RecTools' SASRecModel for settings["epochs"], or without it for as long as validation rises."""
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    torch.manual_seed(seed)
    options = {key: value for key, value in settings.items() if key != "epochs"}
    model = SASRecModel(n_factors=64, n_blocks=2, recommend_torch_device="cpu",
                        lightning_module_type=faster_training(), data_preparator_type=shuffled_ties(), **options,
                        **kind)
    dataset = Dataset.construct(sessions(task, settings["session_max_len"]))
    if "epochs" in settings:
        model.fit_partial(dataset, settings["epochs"], settings["epochs"])
        return sequence_scorer(model, task.n_items), settings
    best, best_epoch, kept = -1.0, 0, {}
    for epoch in range(EVERY, MOST_EPOCHS + 1, EVERY):
        model.fit_partial(dataset, EVERY, EVERY)
        value = ndcg(sequence_scorer(model, task.n_items)(task.valid), task.valid)
        print(f"  epoch {epoch}: {value:.4f}", flush=True)
        if value > best:
            best, best_epoch, kept = value, epoch, deepcopy(model.torch_model.state_dict())
        elif epoch - best_epoch >= EVERY * PATIENCE:
            break
    model.torch_model.load_state_dict(kept)
    return sequence_scorer(model, task.n_items), settings | {"epochs": best_epoch}


def sasrec(task: Task, settings: dict, seed: int) -> tuple[Scorer, dict]:
    """Fit SASRec with softmax over the whole catalogue."""
    return sequence_model(task, settings, seed, loss="softmax")


def esasrec(task: Task, settings: dict, seed: int) -> tuple[Scorer, dict]:
    """Fit eSASRec as RecTools' README makes it: SASRec with LiGR layers and sampled softmax."""
    from rectools.models.nn.transformers.ligr import LiGRLayers

    return sequence_model(task, settings, seed, loss="sampled_softmax", transformer_layers_type=LiGRLayers)


def recnn_batches(task: Task, n_users: int, seed: int) -> DataLoader:
    """Return recnn's own batches: all windows of some users (25 in its notebooks)."""
    import recnn

    tqdm.pandas(disable=True)
    log = pd.DataFrame({"userId": task.train["user_id"], "movieId": task.train["item"], "rating": task.train["rating"],
                        "timestamp": np.arange(len(task.train))})  # recnn's sort is not stable: the order as the time
    logs, users = recnn.data.prepare_dataset(log, {item: item for item in range(task.n_items)}, FRAME + 1)
    matrix = torch.as_tensor(task.matrix)
    return DataLoader(recnn.data.UserDataset(users, logs), batch_size=n_users, shuffle=True,
                      generator=torch.Generator().manual_seed(seed),
                      collate_fn=lambda rows: recnn.data.prepare_batch_static_size(rows, matrix, FRAME))


def recnn_scorer(actor: torch.nn.Module, matrix: np.ndarray) -> Scorer:
    """Score every item by its dot product with the actor's answer."""
    @torch.no_grad()
    def score(part: Part) -> np.ndarray:
        items, ratings = last(part, FRAME)
        frame = np.where(items[..., None] < 0, 0, matrix[items]).reshape(len(items), -1)
        ratings = np.where(items < 0, 0, 2 * (ratings - 2.5))
        return actor.eval()(torch.as_tensor(np.c_[frame, ratings], dtype=torch.float32)).numpy() @ matrix.T
    return score


def recnn_agent(task: Task, settings: dict, seed: int, update: Callable[..., dict], nets: dict,
                optimizer: dict) -> tuple[Scorer, dict]:
    """Train with a published update function."""
    import recnn

    batches = recnn_batches(task, settings["users_in_batch"], seed)
    for step, batch in zip(range(settings["updates"]), chain.from_iterable(repeat(batches)), strict=False):
        update(batch, settings, nets, optimizer, device=torch.device("cpu"), debug={},
               writer=recnn.utils.misc.DummyWriter(), step=step)
    return recnn_scorer(nets["policy_net"], task.matrix), settings


def recnn_networks(settings: dict, critics: tuple[str, ...]) -> tuple[dict, dict]:
    """Return recnn's networks, each with a target, and a Ranger for each network."""
    import recnn

    state, action = FRAME * (128 + 1), 128
    nets = {"policy_net": recnn.nn.Actor(state, action, 256, settings["actor_weight_init"])}
    nets |= {name: recnn.nn.Critic(state, action, 256, settings["critic_weight_init"]) for name in critics}
    optimizer = {name.replace("_net", "_optimizer"): recnn.optim.Ranger(net.parameters(), settings["lr"],
                                                                           weight_decay=settings["weight_decay"])
                 for name, net in nets.items()}
    return nets | {f"target_{name}": deepcopy(net).eval() for name, net in nets.items()}, optimizer


def recnn_ddpg(task: Task, settings: dict, seed: int) -> tuple[Scorer, dict]:
    """Train recnn's DDPG."""
    import recnn

    torch.manual_seed(seed)
    return recnn_agent(task, settings, seed, recnn.nn.ddpg_update, *recnn_networks(settings, ("value_net",)))


def recnn_td3(task: Task, settings: dict, seed: int) -> tuple[Scorer, dict]:
    """Train recnn's TD3."""
    import recnn

    torch.manual_seed(seed)
    critics = ("value_net1", "value_net2")
    return recnn_agent(task, settings, seed, recnn.nn.td3_update, *recnn_networks(settings, critics))


def grid(**values: list) -> list[dict]:
    """Return all combinations."""
    return [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]


SEQUENCE = [{"dropout_rate": dropout, "lr": lr, "session_max_len": 50, "batch_size": 32, "n_heads": 1}
            for dropout, lr in ((0.5, 1e-3), (0.3, 1e-3), (0.5, 2e-3))]
RANGER = {"lr": 1e-5, "weight_decay": 1e-2}
MODELS = {
    "item-kNN": (item_knn, grid(k=[10, 20, 100], shrink=[0, 10], nearest_to=["rated", "recommended"]),
                 ["pm-implicit"]),
    "implicit ALS": (implicit_als, grid(factors=[16, 32, 64], regularization=[0.01, 3.0], alpha=[0.3, 1.0]),
                     ["pm-implicit"]),
    "recnn 0.1, DDPG": (recnn_ddpg, [{"gamma": 0.99, "min_value": -10, "max_value": 10, "policy_step": 10,
                                      "soft_tau": 0.001, "actor_weight_init": 0.6, "critic_weight_init": 0.54,
                                      "updates": 1000, "users_in_batch": 5} | RANGER], ["recnn", "torch"]),
    "recnn 0.1, TD3": (recnn_td3, [{"gamma": 0.99, "noise_std": 0.5, "noise_clip": 3, "soft_tau": 0.001,
                                    "policy_update": 10, "actor_weight_init": 0.25, "critic_weight_init": 0.6,
                                    "updates": 1000, "users_in_batch": 5} | RANGER], ["recnn", "torch"]),
    "SASRec": (sasrec, SEQUENCE, ["rectools", "torch"]),
    "eSASRec": (esasrec, [setting | {"n_negatives": 256} for setting in SEQUENCE], ["rectools", "torch"]),
}
SAME_FOR_ALL_SEEDS = {"item-kNN"}
VALIDATION_TOO = {"SASRec", "eSASRec"}


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside and move into place, so that a file is whole or not there."""
    beside = path.with_name("part of " + path.name)
    write(beside)
    beside.replace(path)


def write_scores(path: Path, score: Scorer, task: Task, validation_too: bool) -> None:
    """Keep the scores of the test cases as float32, and of the validation cases beside them if wanted."""
    for part, name in ((task.valid, f"{path.stem} valid.npy"), (task.test, path.name))[not validation_too:]:
        replace(path.with_name(name), lambda beside, part=part: np.save(beside, score(part).astype(np.float32)))


def write_record(path: Path, record: dict) -> None:
    """Keep how scores came about."""
    replace(path, lambda beside: beside.write_text(json.dumps(record, indent=1) + "\n"))


def run(task: Task, name: str, seeds: int, home: Path) -> None:
    """Choose the settings of a model with seed 0, then score the test cases with each seed, going on where it was."""
    model, settings, libraries = MODELS[name]
    path, best, both = home / f"{name}.json", home / f"{name} tuning.npy", name in VALIDATION_TOO
    library = ", ".join(f"{package} {version(package)}" for package in libraries)
    record = {"name": name, "seeds": 0, "tried": [], "tried_cpu_s": [], "cpu_s_of_seeds": {}, "rule": RULE,
              "budget": {"settings": len(settings), "seeds": 1}, "library": library}
    record |= json.loads(path.read_text()) if path.exists() else {}
    same = len(task.earlier) == len(task.train)  # then what is tried may be reported
    for setting in settings[len(record["tried"]):]:
        begin = time.process_time()
        score, used = model(task._replace(train=task.earlier), setting, 0)
        value = ndcg(score(task.valid), task.valid)
        if same and value > max((old for _, old in record["tried"]), default=-1):
            write_scores(best, score, task, both)
        record["tried"].append([used, value])
        record["tried_cpu_s"].append(round(time.process_time() - begin, 1))
        write_record(path, record)
        print(f"{name}: {used} → {value:.4f}", flush=True)
    place = max(range(len(settings)), key=lambda row: record["tried"][row][1])
    record["chosen"] = record["tried"][place][0]
    if best.exists():
        if both:
            best.with_name(f"{name} tuning valid.npy").replace(home / f"{name}-0 valid.npy")
        best.replace(home / f"{name}-0.npy")
        record["cpu_s_of_seeds"]["0"] = record["tried_cpu_s"][place]
    for seed in range(1 if name in SAME_FOR_ALL_SEEDS else seeds):
        file = home / f"{name}-{seed}.npy"
        if not file.exists():
            begin = time.process_time()
            score, _ = model(task, record["chosen"], seed)
            write_scores(file, score, task, both)
            record["cpu_s_of_seeds"][str(seed)] = round(time.process_time() - begin, 1)
        record["seeds"] = max(record["seeds"], seed + 1)
        record["cpu_s"] = list(record["cpu_s_of_seeds"].values())[-1]
        write_record(path, record)
        print(f"{name}, seed {seed}: test {ndcg(np.load(file), task.test):.4f}, "
              f"{record['cpu_s_of_seeds'].get(str(seed))} s", flush=True)


def main() -> None:
    """Score the cases of a folder."""
    parser = argparse.ArgumentParser(description="Fit recommenders people would use instead and score given cases.")
    parser.add_argument("folder", type=Path, help="train.csv, item_ids.csv, valid.csv, …")
    parser.add_argument("--only", action="append", choices=MODELS, help="a model; may be given again")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--force", action="store_true", help="redo what is finished")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    task, home = read_task(arguments.folder), arguments.folder / "scores"
    home.mkdir(exist_ok=True)
    for name in arguments.only or MODELS:
        if arguments.force:
            for old in [home / f"{name}.json", *home.glob(f"{name} tuning*.npy"), *home.glob(f"{name}-*.npy")]:
                old.unlink(missing_ok=True)
        run(task, name, arguments.seeds, home)


if __name__ == "__main__":
    main()
