"""What the lesson cells of notes/11_ship.ipynb define; `make agents` writes it."""

import hashlib
import logging
import platform
import shutil
import warnings
from copy import copy, deepcopy
from importlib.metadata import version
from pathlib import Path

import faiss
import numpy as np
import onnx
import onnxruntime
import pandas as pd
import torch
from torch import Tensor, nn

from helpers import recommenders
from helpers.files import DataError, replacing, write_json
from helpers.frames import Frames, flatten, unflatten
from helpers.liking import Liking
from helpers.recommenders import Recommender, UserHistory


def shortened(state: Tensor, n: int, frame_size: int, repeat: bool = False) -> Tensor:
    """Return states (B, F·(E+1)) that know the last n ratings alone: zeros before them, or the n over and over.

    Of a state that knows fewer, its older places being rated 0, all are kept.
    """
    v, rating = unflatten(state, frame_size)
    place = torch.arange(frame_size, device=state.device)
    kept = (rating != 0).sum(dim=1, keepdim=True).clamp(max=n)
    if repeat:
        kept = kept.clamp(min=1)
        place = frame_size - kept + (place - frame_size) % kept  # the newest is last
        return flatten(v.take_along_dim(place[:, :, None], dim=1), rating.take_along_dim(place, dim=1))
    known = place >= frame_size - kept
    return flatten(v * known[:, :, None], rating * known)


def tilt_of(expected: Tensor, beta: float) -> Tensor:
    """Return what expected stars (…) add to log p: β·stars, and −100 where fewer than 2.5 make the reward negative."""
    return beta * expected - 100.0 * ((expected < 2.5) & (beta > 0))


def as_served(actor: nn.Module, term: UserHistory, stars: Liking, beta: float, repeat: bool = True) -> Recommender:
    """Score by the policy, with its history term and its tilt; by `repeat` frames are always full."""
    policy = recommenders.policy(lambda s: actor(shortened(s, actor.frame_size, actor.frame_size, repeat)), term)
    return lambda history, user_ids: policy(history, user_ids) + tilt_of(stars(history, user_ids), beta)


class Among(nn.Module):
    """What is exported of a critic: the values of k actions of each state, for which the state is read once."""

    def __init__(self, critic: nn.Module):
        super().__init__()
        self.critic = critic

    def forward(self, state: Tensor, actions: Tensor) -> Tensor:
        """state (B, F·(E+1)), actions (B, k, E) → values (B, k)."""
        return self.critic.among(state, actions)


def export(path: Path, network: nn.Module, inputs: dict[str, Tensor], output: str, open_axes: dict[str, dict]) -> None:
    """Write a network as ONNX, in evaluation mode, with the named axes of its inputs open: {input: {axis: name}}."""
    network = deepcopy(network).cpu().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        model = torch.onnx.export(network, tuple(inputs.values()), dynamo=True, verbose=False, input_names=[*inputs],
                                  output_names=[output], dynamic_shapes=tuple(open_axes.values())).model_proto
    for node in model.graph.node:
        node.ClearField("metadata_props")  # the traces of this machine's files
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def export_networks(folder: Path, actor: nn.Module, critic: nn.Module) -> None:
    """Write actor.onnx, state → proto_action, and critic.onnx, (state, actions) → values; B and k stay open."""
    frame_size, embed_size = actor.config["frame_size"], actor.config["embed_size"]
    state, actions = torch.zeros(2, frame_size * (embed_size + 1)), torch.zeros(2, 3, embed_size)
    export(folder / "actor.onnx", actor, {"state": state}, "proto_action", {"state": {0: "B"}})
    export(folder / "critic.onnx", Among(critic), {"state": state, "actions": actions}, "values",
           {"state": {0: "B"}, "actions": {0: "B", 1: "k"}})


def open_network(path: Path) -> onnxruntime.InferenceSession:
    """Return an exported network, ready to run on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def largest_difference(folder: Path, actor: nn.Module, critic: nn.Module, state: Tensor, actions: Tensor) -> dict:
    """Return the largest |exported − torch| of proto-actions and values: state (B, F·(E+1)), actions (B, k, E).

    Where numbers are beyond 50, it is as much smaller as makes the largest 50: float32 has seven digits.
    """
    actor, critic, state, actions = (deepcopy(x).cpu().eval() if isinstance(x, nn.Module) else x.cpu()
                                     for x in (actor, critic, state, actions))
    feed = {"state": state.numpy(), "actions": actions.numpy()}
    ours = {"proto_action": actor(state), "values": critic.among(state, actions)}
    theirs = {"proto_action": open_network(folder / "actor.onnx").run(None, {"state": feed["state"]})[0],
              "values": open_network(folder / "critic.onnx").run(None, feed)[0]}
    return {name: float(np.abs(ours[name].numpy() - theirs[name]).max() / max(1, np.abs(theirs[name]).max() / 50))
            for name in ours}


def must_be_equal(folder: Path, *networks_and_inputs) -> None:
    """Raise a DataError unless the exported networks are torch's to 1e-4."""
    off = largest_difference(folder, *networks_and_inputs)
    if not all(difference <= 1e-4 for difference in off.values()):  # NaN is not small either
        raise DataError(f"the exported networks differ from torch's by {off}: nothing was written")


def hnsw(matrix: np.ndarray, neighbours: int = 32, build_effort: int = 80, effort: int = 512) -> faiss.Index:
    """Return a graph of near neighbours over the rows of `matrix` (n, E), to search by inner product.

    Args:
        neighbours: M, links a node; build_effort, effort: candidates kept in mind while building, and while searching.
    """
    index = faiss.IndexHNSWFlat(matrix.shape[1], neighbours, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = build_effort, effort
    index.add(np.ascontiguousarray(matrix, np.float32))
    return index


def exact(matrix: np.ndarray, proto_action: np.ndarray, k: int) -> np.ndarray:
    """Return the k rows of `matrix` (n, E) of greatest inner product with proto_action (E,), the greatest first."""
    scores = matrix @ proto_action
    rows = np.argpartition(scores, len(scores) - k)[-k:]
    return rows[np.argsort(-scores[rows], kind="stable")]


def recall(index: faiss.Index, matrix: np.ndarray, proto_actions: np.ndarray, k: int = 10) -> float:
    """Return the mean share of the k truly best rows that the index finds: proto_actions (U, E)."""
    found = index.search(proto_actions, k)[1]
    return float(np.mean([np.isin(exact(matrix, p, k), rows).mean() for p, rows in zip(proto_actions, found,
                                                                                       strict=True)]))


def knowing(history: Frames, n: int) -> Frames:
    """Return the same users with their last n ratings alone."""
    short = copy(history)
    short.log_length = np.minimum(history.log_length, n)
    short.log_start = history.log_start + history.log_length - short.log_length
    return short


def short_scores(history: Frames, user_ids: np.ndarray, *, actor: nn.Module, term: UserHistory, stars: Liking,
                 beta: float, n: int, repeat: bool = False) -> Tensor:
    """Score for everyone as if their last n ratings were all that is known of them."""
    return as_served(actor, term, stars, beta, repeat)(knowing(history, n), user_ids)


def place_norm(proto_actions: np.ndarray, matrix: np.ndarray) -> float:
    """Return the length at which proto-actions (U, E) spread as far on the map as items (n, E) do.

    A proto-action is a direction: its length says how sure the policy is, not where. So all are given one length.
    """
    direction = proto_actions / np.maximum(np.linalg.norm(proto_actions, axis=1, keepdims=True), 1e-12)
    mean_square = [np.square(points[:, :2]).sum(axis=1).mean() for points in (matrix - matrix.mean(axis=0), direction)]
    return float(np.sqrt(mean_square[0] / max(mean_square[1], 1e-12)))


def sendable(ids: list[int | str]) -> list[int | str]:
    """Return ids as a browser reads them back: all whole numbers below 2^53, else all text."""
    return ids if all(isinstance(one, int) and abs(one) < 2 ** 53 for one in ids) else [str(one) for one in ids]


def items_of(ids: np.ndarray, infos: dict[int, dict], own: list[int | str]) -> list[dict]:
    """Return what is said of each item: its own id, title, genres, year; without a title, the id is the title.

    Raises:
        DataError: if `infos` lacks an item.
    """
    lacking = [item_id for item_id in ids.tolist() if item_id not in infos]
    if lacking:
        raise DataError(f"infos.json has no title for {len(lacking)} of {len(ids)} items, the first is {lacking[0]}: "
                        f"run notes/01_data_parsing.ipynb")
    items = []
    for item_id, name in zip(ids.tolist(), sendable(own), strict=True):
        info = infos[item_id]
        year = f" ({info['release_year']})" if info["release_year"] else ""
        title = info["title"] if (info["title"] or "").strip() not in ("", f"item {item_id}") else f"item {name}"
        items.append({"id": name, "title": title + year, "genres": info["genres"], "year": info["release_year"]})
    return items


def write_items(folder: Path, ids: np.ndarray, matrix: np.ndarray, infos: dict[int, dict], rated: pd.Series,
                term: np.ndarray, stars: Liking, own: pd.Series | None = None) -> None:
    """Write items.npz (vectors, how often rated, places on the map) and items.json (see `items_of`).

    Args:
        matrix: (n, E) float32, whose columns are principal components, the largest first.
        rated: item ids of the training ratings, repeats and all.
        term: (E, E), `UserHistory.added`. stars: the policy's expected stars.
        own: what the reader calls each item, by id, if not so (see `datasets.own_ids`).
    """
    items = items_of(ids, infos, ids.tolist() if own is None else own.loc[ids].tolist())
    matrix, axes = np.asarray(matrix, np.float32), np.eye(2, matrix.shape[1], dtype=np.float32)
    mean = matrix.mean(axis=0)
    counts = rated.value_counts().reindex(ids, fill_value=0).to_numpy(np.int64)
    with replacing(folder / "items.npz") as beside, beside.open("wb") as file:
        np.savez_compressed(file, matrix=matrix, ratings=counts, map=(matrix - mean) @ axes.T, axes=axes, mean=mean,
                            user_history=term, offset=stars.offset.numpy(), root=stars.root.numpy())
    write_json(folder / "items.json", items)


def describe(folder: Path) -> dict[str, dict]:
    """Return {file name: sha256 and bytes} of a folder."""
    return {path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
            for path in sorted(folder.iterdir())}


def ratings_scale(rating: pd.Series) -> dict[str, float]:
    """Return the lowest and the highest rating, and the step between two.

    >>> ratings_scale(pd.Series([1.0, 3.0, 5.0]))
    {'low': 1.0, 'high': 5.0, 'step': 1.0}
    """
    whole = (rating % 1 == 0).all()
    return {"low": float(rating.min()), "high": float(rating.max()), "step": 1.0 if whole else 0.5}


def no_better(ndcg: float, most_rated: float) -> str | None:
    """Return the sentence of a policy that ranks no better than one list for all; None if it ranks better."""
    return None if ndcg > most_rated else (
        f"On ratings it had never seen this policy ranked no better than a plain list of the most rated items "
        f"(NDCG@10 {ndcg:.3f} against {most_rated:.3f}): more ratings, or fewer training steps, may help.")


def manifest_of(folder: Path, actor: nn.Module, matrix: np.ndarray, proto_actions: np.ndarray, about: dict,
                index_from: int) -> dict:
    """Write the index where the catalogue is large, and return what the manifest says."""
    search = {"kind": "exact"}
    if len(matrix) >= index_from:
        index = hnsw(matrix)
        faiss.write_index(index, str(folder / "index.faiss"))
        search = {"kind": "hnsw", "recall@10": recall(index, matrix, proto_actions), "of": len(proto_actions)}
    rule = ("a proto-action p lies at axes @ (norm * p / |p| - mean): the first two columns of the item matrix, "
            "with a length at which users' proto-actions spread as far as the items")
    packages = ("torch", "onnx", "onnxruntime", "numpy", "faiss-cpu")
    return {"format": 4, "policy": "DDPG", "frame_size": actor.config["frame_size"],
            "embed_size": actor.config["embed_size"], "n_items": len(matrix), **about, "search": search,
            "map": {"norm": place_norm(proto_actions, matrix), "rule": rule},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "files": describe(folder)}


def without(matrix: np.ndarray) -> tuple[UserHistory, Liking]:
    """Return a history term that adds nothing, and a liking that expects 3 stars of everything."""
    zeros = torch.zeros(matrix.shape[1], matrix.shape[1])
    return UserHistory(zeros, 0.0), Liking(torch.full((len(matrix),), 3.0), zeros, 1.0)


def write_build(folder: Path, actor: nn.Module, critic: nn.Module, ids: np.ndarray, matrix: np.ndarray,
                infos: dict, rated: pd.Series, states: Tensor, about: dict, index_from: int = 50_000,
                term: UserHistory | None = None, said: Tensor | float = 0.0, own: pd.Series | None = None,
                stars: Liking | None = None, beta: float = 0.0) -> dict:
    """Write the whole model folder, or nothing of it, and return its manifest.

    Args:
        states: (U, F·(E+1)), real ones: on them the exported networks must equal torch's to 1e-4.
        about: what the manifest says besides; see "The manifest".
        index_from: number of items from which on an index is written; own: see `write_items`.
        term, said: its history term, and what that adds for the users of `states` (U, E). stars, beta: its tilt.
    """
    term, stars = term or without(matrix)[0], stars or without(matrix)[1]
    with replacing(folder) as beside:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        export_networks(beside, actor, critic)
        must_be_equal(beside, actor, critic, states, torch.tensor(matrix[:100]).expand(len(states), -1, -1))
        write_items(beside, ids, matrix, infos, rated, term.added.numpy(), stars, own)
        proto_actions = open_network(beside / "actor.onnx").run(None, {"state": states.cpu().numpy()})[0]
        about = about | {"user_history": {"weight": term.weight, "rating_slope": term.rating_slope},
                         "liking": {"beta": beta, "noise": stars.noise, "damping": stars.damping}}
        manifest = manifest_of(beside, actor, matrix, proto_actions + np.asarray(said), about, index_from)
        write_json(beside / "manifest.json", manifest)
    return manifest
