import hashlib
import json
import shutil
from copy import deepcopy
from importlib.metadata import version

import faiss
import numpy as np
import onnx
import pandas as pd
import pytest
import torch

from helpers.agents import ship
from helpers.files import DEFAULT_DATASET, PROJECT, DataError, build_dir
from helpers.frames import Frames, flatten, unflatten
from helpers.losses import log_policy
from helpers.networks import ENCODERS, Actor, Critic
from helpers.recommenders import UserHistory
from tools import run as series
from tools.lessons import LESSONS, artefact
from tools.run import closing_table

N_ITEMS, EMBED_SIZE, FRAME_SIZE = 60, 8, 4
IDS = np.arange(N_ITEMS) * 3 + 1
MATRIX = np.random.default_rng(0).normal(size=(N_ITEMS, EMBED_SIZE)).astype(np.float32)
INFOS = {int(i): {"title": f"Film {i}", "genres": ["Drama"], "release_year": 1990 if i % 2 else None} for i in IDS}
STATES = torch.randn(32, FRAME_SIZE * (EMBED_SIZE + 1), generator=torch.Generator().manual_seed(1))
ABOUT = {"dataset": "toy", "rating": {"low": 1.0, "high": 5.0, "step": 1.0},
         "critic": {"gamma": 0.9}}
HISTORY = UserHistory(torch.randn(EMBED_SIZE, EMBED_SIZE, generator=torch.Generator().manual_seed(2)) / 10, 2.0, 0.3)


def networks(encoder="attention"):
    torch.manual_seed(0)
    return [kind(FRAME_SIZE, EMBED_SIZE, 16, encoder, dropout=0.5) for kind in (Actor, Critic)]


NETWORKS = networks()  # in the mode of training


def write(folder, own=NETWORKS, states=STATES, **options):
    return ship.write_build(folder, *own, IDS, MATRIX, INFOS, pd.Series([1, 1, 4, 1]), states, ABOUT, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the model folder of a catalogue that counts as large, so that it has an index."""
    folder = tmp_path_factory.mktemp("ship") / "model"
    write(folder, term=HISTORY, said=torch.zeros(32, EMBED_SIZE), index_from=N_ITEMS)
    return folder


@pytest.mark.parametrize("encoder", sorted(set(ENCODERS) - {"ode"}))  # which wants states with gaps
def test_exported_networks_give_the_scores_of_torch(model, tmp_path, encoder):
    folder, own = (model, NETWORKS) if encoder == "attention" else (tmp_path, networks(encoder))
    if folder == tmp_path:
        ship.export_networks(folder, *own)
    for n_users, k in ((1, 1), (1, 9), (3, 2), (64, 5)):
        state, actions = torch.randn(n_users, FRAME_SIZE * (EMBED_SIZE + 1)), torch.randn(n_users, k, EMBED_SIZE)
        off = ship.largest_difference(folder, *own, state, actions)
        assert set(off) == {"proto_action", "values"} and max(off.values()) < 1e-4


def test_a_network_is_exported_without_dropout_and_traces_and_left_as_it_was(model):
    assert all(network.training for network in NETWORKS)
    actor = ship.open_network(model / "actor.onnx")
    once, again = (actor.run(None, {"state": STATES.numpy()})[0] for _ in range(2))
    assert np.array_equal(once, again)
    for path in model.glob("*.onnx"):
        assert str(PROJECT).encode() not in path.read_bytes()
        assert not any(node.metadata_props for node in onnx.load(path).graph.node)


def test_the_manifest_names_every_file_and_items_keep_order_titles_and_counts(model, tmp_path):
    manifest = json.loads((model / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {path.name for path in model.iterdir()} - {"manifest.json"}
    for name, known in manifest["files"].items():
        content = (model / name).read_bytes()
        assert known == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert ABOUT.items() <= manifest.items() and manifest["user_history"] == {"weight": 2.0, "rating_slope": 0.3}
    assert manifest["format"] == 4 and manifest["versions"]["onnxruntime"] == version("onnxruntime")
    assert manifest["n_items"] == faiss.read_index(str(model / "index.faiss")).ntotal == N_ITEMS
    assert manifest["search"] == {"kind": "hnsw", "recall@10": 1.0, "of": 32}  # so few items are all visited
    small = ship.manifest_of(tmp_path, NETWORKS[0], MATRIX, MATRIX, ABOUT, index_from=N_ITEMS + 1)
    assert small["search"] == {"kind": "exact"} and not list(tmp_path.iterdir())
    items = json.loads((model / "items.json").read_text(encoding="utf-8"))
    assert [item["id"] for item in items] == IDS.tolist()
    assert items[:2] == [{"id": 1, "title": "Film 1 (1990)", "genres": ["Drama"], "year": 1990},
                         {"id": 4, "title": "Film 4", "genres": ["Drama"], "year": None}]
    with np.load(model / "items.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["matrix"], MATRIX) and np.array_equal(arrays["user_history"], HISTORY.added)
        assert arrays["ratings"].tolist() == [3, 1] + [0] * (N_ITEMS - 2)
        np.testing.assert_allclose(arrays["map"], (MATRIX - arrays["mean"]) @ arrays["axes"].T, atol=1e-6)


@pytest.mark.parametrize(("own", "written"), [
    ([3, 2 ** 53 - 1, -7], [3, 2 ** 53 - 1, -7]), ([3, 2 ** 53, -7], ["3", str(2 ** 53), "-7"]),
    (["a <b>", "", "7"], ["a <b>", "", "7"])])  # a browser has floats alone
def test_items_go_by_the_readers_own_ids_as_a_browser_can_read_them_and_all_have_titles(own, written):
    infos = {i: {"title": title, "genres": [], "release_year": 1999} for i, title in enumerate(["NaN", " ", "item 2"])}
    items = ship.items_of(np.arange(3), infos, own)
    assert [item["id"] for item in items] == written
    assert [item["title"] for item in items] == ["NaN (1999)", f"item {written[1]} (1999)", f"item {written[2]} (1999)"]
    with pytest.raises(DataError, match="1 of 4 items"):
        ship.items_of(np.arange(4), infos, [*own, 9])


def test_the_folder_gives_the_slates_of_training(model, monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "build")
    from recommender import Recommender
    served, actor, items = Recommender(model), deepcopy(NETWORKS[0]).eval(), torch.tensor(MATRIX)
    histories = [[((5 * u + 7 * j) % N_ITEMS, 1.0 + (u + j) % 5) for j in range(6)] for u in range(8)]
    answers = served.recommend([served.ask([(int(IDS[row]), rating) for row, rating in h], k=5) for h in histories])
    for history, answer in zip(histories, answers, strict=True):
        rows, ratings = (torch.tensor(column) for column in zip(*history, strict=True))
        state = flatten(items[rows[-FRAME_SIZE:]][None], ratings[-FRAME_SIZE:][None])
        with torch.no_grad():
            m = HISTORY.counts(ratings) @ items[rows] @ HISTORY.added  # of all six, not four
            log_p = log_policy(actor(state) + m, items)[0]
        log_p[rows] = -torch.inf
        best = log_p.topk(5)
        assert [item["item_id"] for item in answer["slate"]] == IDS[best.indices].tolist()
        np.testing.assert_allclose([item["score"] for item in answer["slate"]], best.values, atol=1e-4)


def test_the_index_finds_what_exact_search_finds():
    rng = np.random.default_rng(0)
    matrix, asked = (rng.normal(size=(n, 16)).astype(np.float32) for n in (3000, 40))
    for p in asked:
        assert ship.exact(matrix, p, 10).tolist() == np.argsort(-(matrix @ p))[:10].tolist()
    assert ship.recall(ship.hnsw(matrix), matrix, asked) > 0.97
    assert ship.recall(ship.hnsw(matrix, neighbours=2, build_effort=2, effort=1), matrix, asked) < 0.9
    assert ship.recall(ship.hnsw(-matrix), matrix, asked) == 0  # it would tell a wrong index


@pytest.mark.parametrize(("changed", "scale"), [
    (slice(1), 1), (slice(1, 2), 1), (slice(0), float("nan"))], ids=["actor", "critic", "NaN"])
def test_networks_that_differ_from_torch_are_not_shipped(model, tmp_path, monkeypatch, changed, scale):
    own = networks()
    for network in own[changed]:
        torch.nn.init.normal_([*network.parameters()][-1])
    monkeypatch.setattr(ship, "export_networks", lambda folder, *_: shutil.copytree(model, folder, dirs_exist_ok=True))
    (tmp_path / "model" / "old").mkdir(parents=True)
    with pytest.raises(DataError, match="nothing was written"):
        write(tmp_path / "model", own, scale * STATES)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_short_histories_by_hand():
    v, rating = torch.arange(8.0).reshape(1, 4, 2), torch.tensor([[1.0, 2, 3, 4]])
    state = flatten(v, rating)
    for n, zeros, again in ((1, [0, 0, 0, 4], [4, 4, 4, 4]), (2, [0, 0, 3, 4], [3, 4, 3, 4]),
                            (3, [0, 2, 3, 4], [4, 2, 3, 4]), (4, [1, 2, 3, 4], [1, 2, 3, 4])):
        for repeat, expected in ((False, zeros), (True, again)):
            got_v, got = unflatten(ship.shortened(state, n, 4, repeat), 4)
            assert got[0].tolist() == expected
            assert got_v[0, :, 0].tolist() == [0.0 if r == 0 else v[0, r - 1, 0].item() for r in expected]
    knows = torch.cat([0 * state, state, ship.shortened(state, 2, 4)])
    rating = unflatten(ship.shortened(knows, 3, 4, repeat=True), 4)[1]
    assert rating.tolist() == [[0, 0, 0, 0], [4, 2, 3, 4], [3, 4, 3, 4]]  # of each state what it knows, nothing of none


def test_what_is_served_fills_the_frames_of_short_logs(frames):
    actor, users = Actor(2, 3, 16).eval(), np.array([1, 2])
    recommend = ship.as_served(actor, *ship.without(frames.items.numpy()), beta=0.0)
    with torch.no_grad():
        log_p = actor(frames.last_states(users)) @ frames.items.T / 3 ** 0.5
    torch.testing.assert_close(recommend(frames, users), log_p)
    short = pd.DataFrame({"user_id": [1, 2, 2, 2], "item_id": 10, "rating": 3.0, "timestamp": range(4)})
    torch.testing.assert_close(*recommend(Frames(short, frames.item_ids, frames.items, 2), users))


def test_a_policy_no_better_than_the_most_rated_is_warned_of_and_half_stars_are_found():
    assert ship.ratings_scale(pd.Series([0.5, 4, 5])) == {"low": 0.5, "high": 5, "step": 0.5}
    assert ship.no_better(0.0772, 0.0771) is None and "0.077 against 0.077" in ship.no_better(0.077, 0.077)


def test_proto_actions_spread_on_the_map_as_far_as_items():
    rng = np.random.default_rng(0)
    matrix, proto = rng.normal(size=(500, 6)) + 3, 100 * rng.normal(size=(80, 6))
    norm = ship.place_norm(proto, matrix)
    places = norm * proto / np.linalg.norm(proto, axis=1, keepdims=True)
    spread = [np.square(points[:, :2]).sum(axis=1).mean() for points in (places, matrix - matrix.mean(axis=0))]
    assert np.isclose(*spread) and np.isclose(ship.place_norm(5 * proto, matrix), norm)


def test_where_the_folder_lies_and_what_a_run_says_of_it(tmp_path, monkeypatch):
    assert build_dir(DEFAULT_DATASET, tmp_path) == tmp_path / "build"
    assert build_dir("my/clicks.zip", tmp_path) == tmp_path / "data" / "clicks" / "build"
    assert artefact("x", LESSONS["11_ship"].writes[0]) == build_dir("x") / "model" / "manifest.json"
    record = {"11_ship": {"outputs": [], "seconds": 1.0}}
    assert closing_table(DEFAULT_DATASET, record, []).endswith("make serve, then http://127.0.0.1:8000")
    assert "make serve DATASET='a b'," in closing_table("a b", record, [])
    assert "make serve" not in closing_table(DEFAULT_DATASET, {}, [])
    monkeypatch.setattr(series, "artefact", lambda dataset, path: tmp_path / "manifest.json")
    for warning in (None, "this policy ranked no better than a plain list"):  # it is not shipped in silence
        (tmp_path / "manifest.json").write_text(json.dumps({"warning": warning}))
        assert ("ranked no better" in closing_table("x", record, [])) == (warning is not None)
