"""What lesson 11 writes: the same scores as in training, a manifest that is true, a folder that works elsewhere."""

import hashlib
import json
import shutil
import subprocess
import sys
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
from tools.lessons import LESSONS, artefact
from tools.run import closing_table

N_ITEMS, EMBED_SIZE, FRAME_SIZE = 60, 8, 4
IDS = np.arange(N_ITEMS) * 3 + 1
ABOUT = {"dataset": "toy", "rating": {"low": 1.0, "high": 5.0, "step": 1.0},
         "critic": {"gamma": 0.9, "beta": 0.0, "candidates": 20}, "held_out": None, "short_histories": None,
         "licence": "Drawn at random: nobody's."}
HISTORY = UserHistory(torch.randn(EMBED_SIZE, EMBED_SIZE, generator=torch.Generator().manual_seed(2)) / 10, 2.0, 0.3)
PROGRAM = """
import json, sys
from pathlib import Path
from recommender import Recommender
served = Recommender(Path("model"))
answers = served.recommend([served.ask([tuple(pair) for pair in history], k=5) for history in json.load(sys.stdin)])
assert not {"torch", "helpers", "pandas"} & {name.split(".")[0] for name in sys.modules}
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def lesson():
    return ship


def networks(encoder="attention", dropout=0.5):
    torch.manual_seed(0)
    return (Actor(FRAME_SIZE, EMBED_SIZE, 16, encoder, dropout=dropout),
            Critic(FRAME_SIZE, EMBED_SIZE, 16, encoder, dropout=dropout))


@pytest.fixture(scope="module")
def toy():
    """Return (actor, critic, item matrix, infos, training ratings' item ids, states) of a small catalogue."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(N_ITEMS, EMBED_SIZE)).astype(np.float32)
    infos = {int(i): {"title": f"Film {i}", "genres": ["Drama"], "release_year": 1990 if i % 2 else None} for i in IDS}
    states = torch.randn(32, FRAME_SIZE * (EMBED_SIZE + 1), generator=torch.Generator().manual_seed(1))
    return *networks(), matrix, infos, pd.Series([1, 1, 4, 1]), states


def write(lesson, folder, toy, **options):
    actor, critic, matrix, infos, rated, states = toy
    return lesson.write_build(folder, actor, critic, IDS, matrix, infos, rated, states, ABOUT, **options)


@pytest.fixture(scope="module")
def model(lesson, toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ship") / "model"
    write(lesson, folder, toy, term=HISTORY, said=torch.zeros(32, EMBED_SIZE))
    return folder


@pytest.mark.parametrize(("n_users", "k"), [(1, 1), (1, 9), (3, 2), (64, 5)])
def test_exported_networks_give_the_scores_of_torch(lesson, model, toy, n_users, k):
    generator = torch.Generator().manual_seed(n_users)
    state = torch.randn(n_users, FRAME_SIZE * (EMBED_SIZE + 1), generator=generator)
    actions = torch.randn(n_users, k, EMBED_SIZE, generator=generator)
    off = lesson.largest_difference(model, toy[0], toy[1], state, actions)
    assert set(off) == {"proto_action", "values"} and max(off.values()) < 1e-4


@pytest.mark.parametrize("encoder", sorted(set(ENCODERS) - {"ode", "attention"}))  # "ode" wants states with gaps
def test_every_encoder_can_be_exported(lesson, tmp_path, toy, encoder):
    actor, critic = networks(encoder)
    lesson.export_networks(tmp_path, actor, critic)
    off = lesson.largest_difference(tmp_path, actor, critic, toy[-1][:3], torch.randn(3, 7, EMBED_SIZE))
    assert max(off.values()) < 1e-4


def test_a_network_is_exported_without_dropout_and_left_as_it_was(lesson, model, toy):
    assert toy[0].training and toy[1].training
    feed = {"state": toy[-1].numpy()}
    session = lesson.open_network(model / "actor.onnx")
    assert np.array_equal(session.run(None, feed)[0], session.run(None, feed)[0])


def test_a_network_says_nothing_of_where_it_was_made(model):
    for name in ("actor.onnx", "critic.onnx"):
        assert str(PROJECT).encode() not in (model / name).read_bytes()
        assert not any(node.metadata_props for node in onnx.load(model / name).graph.node)


def test_the_manifest_names_every_file_with_its_hash(model):
    manifest = json.loads((model / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {path.name for path in model.iterdir()} - {"manifest.json"}
    for name, known in manifest["files"].items():
        content = (model / name).read_bytes()
        assert known == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert manifest["format"] == 3 and manifest["n_items"] == N_ITEMS and manifest["search"] == {"kind": "exact"}
    assert manifest["versions"]["onnxruntime"] == version("onnxruntime")
    assert {key: manifest[key] for key in ABOUT} == ABOUT


def test_items_keep_order_titles_and_counts(model, toy):
    items = json.loads((model / "items.json").read_text(encoding="utf-8"))
    assert [item["id"] for item in items] == IDS.tolist()
    assert items[0] == {"id": 1, "title": "Film 1 (1990)", "genres": ["Drama"], "year": 1990}
    assert items[1]["title"] == "Film 4" and items[1]["year"] is None
    with np.load(model / "items.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["matrix"], toy[2])
        assert arrays["ratings"].tolist() == [3, 1] + [0] * (N_ITEMS - 2)
        assert np.array_equal(arrays["user_history"], HISTORY.added)
        np.testing.assert_allclose(arrays["map"], (toy[2] - arrays["mean"]) @ arrays["axes"].T, atol=1e-6)


@pytest.mark.parametrize(("own", "written"), [
    ([3, 2 ** 53 - 1, -7], [3, 2 ** 53 - 1, -7]), ([3, 2 ** 53, -7], ["3", str(2 ** 53), "-7"]),
    (["a <b>", "", "7"], ["a <b>", "", "7"]), ([1234567890123456789, 8, 9], ["1234567890123456789", "8", "9"])])
def test_items_go_by_the_readers_own_ids_as_a_browser_can_read_them(lesson, own, written):
    ids = np.array([1, 2, 3])
    infos = {i: {"title": title, "genres": [], "release_year": 1999} for i, title in zip(ids, ("NaN", " ", "item 3"),
                                                                                         strict=True)}
    items = lesson.items_of(ids, infos, pd.Series(own, index=ids).tolist())
    assert [item["id"] for item in items] == written
    assert all(isinstance(one, str) or int(float(one)) == one for one in written)  # a browser has floats alone
    assert [item["title"] for item in items] == [
        "NaN (1999)", f"item {written[1]} (1999)", f"item {written[2]} (1999)"]  # a title is never empty


def test_a_copied_folder_gives_the_slates_of_training_without_torch(model, toy, tmp_path):
    actor, _, matrix, *_ = toy
    histories = [[(int(IDS[(5 * u + 7 * j) % N_ITEMS]), 1 + (u + j) % 5) for j in range(6)] for u in range(8)]
    shutil.copy(PROJECT / "build" / "recommender.py", tmp_path)
    shutil.copytree(model, tmp_path / "model")
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, input=json.dumps(histories), text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stderr
    for history, answer in zip(histories, json.loads(run.stdout), strict=True):
        rows, ratings = (torch.tensor(values) for values in zip(*[(int(i) // 3, float(r)) for i, r in history],
                                                                strict=True))
        state = flatten(torch.tensor(matrix)[rows[-FRAME_SIZE:]][None], ratings[-FRAME_SIZE:][None])
        with torch.no_grad():
            m = HISTORY.counts(ratings) @ torch.tensor(matrix)[rows] @ HISTORY.added  # of all six, not four
            log_p = log_policy(actor.eval()(state) + m, torch.tensor(matrix))[0]
        actor.train()
        log_p[rows] = -torch.inf
        best = log_p.topk(5)
        assert [item["item_id"] for item in answer["slate"]] == IDS[best.indices].tolist()
        np.testing.assert_allclose([item["score"] for item in answer["slate"]], best.values, atol=1e-4)


def test_a_large_catalogue_gets_an_index_and_its_recall(lesson, toy, tmp_path):
    manifest = write(lesson, tmp_path / "model", toy, index_from=N_ITEMS)
    assert manifest["search"] == {"kind": "hnsw", "recall@10": 1.0, "of": 32}  # so few items are all visited
    index = faiss.read_index(str(tmp_path / "model" / "index.faiss"))
    assert index.ntotal == N_ITEMS and "index.faiss" in manifest["files"]


def test_the_index_finds_what_exact_search_finds(lesson):
    rng = np.random.default_rng(0)
    matrix, asked = (rng.normal(size=(n, 16)).astype(np.float32) for n in (3000, 40))
    for p in asked:
        assert lesson.exact(matrix, p, 10).tolist() == np.argsort(-(matrix @ p))[:10].tolist()
    assert lesson.recall(lesson.hnsw(matrix), matrix, asked) > 0.97
    assert lesson.recall(lesson.hnsw(matrix, neighbours=2, build_effort=2, effort=1), matrix, asked) < 0.9
    assert lesson.recall(lesson.hnsw(-matrix), matrix, asked) == 0  # it would tell a wrong index


class Dice(Actor):
    """An actor that never says the same twice, so that nothing exported of it can be equal."""

    def forward(self, state):
        proto_action = super().forward(state)
        return proto_action + torch.rand_like(proto_action)


@pytest.mark.parametrize(("kind", "scale"), [(Dice, 1), (Actor, float("nan"))])
def test_networks_that_differ_from_torch_are_not_shipped(lesson, toy, tmp_path, kind, scale):
    _, critic, matrix, infos, rated, states = toy
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("kept")
    with pytest.raises(DataError, match=r"differ from torch's by .*: nothing was written"):
        lesson.write_build(tmp_path / "model", kind(FRAME_SIZE, EMBED_SIZE, 16), critic, IDS, matrix, infos, rated,
                           scale * states, ABOUT)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_an_item_without_facts_is_named(lesson, toy, tmp_path):
    actor, critic, matrix, infos, rated, states = toy
    lacking = {item_id: info for item_id, info in infos.items() if item_id != 4}
    with pytest.raises(DataError, match=r"no title for 1 of 60 items, the first is 4: run notes/01_data_parsing"):
        lesson.write_build(tmp_path / "model", actor, critic, IDS, matrix, lacking, rated, states, ABOUT)


def test_short_histories_by_hand(lesson):
    v, rating = torch.arange(8.0).reshape(1, 4, 2), torch.tensor([[1.0, 2, 3, 4]])
    state = flatten(v, rating)
    for n, zeros, again in ((1, [0, 0, 0, 4], [4, 4, 4, 4]), (2, [0, 0, 3, 4], [3, 4, 3, 4]),
                            (3, [0, 2, 3, 4], [4, 2, 3, 4]), (4, [1, 2, 3, 4], [1, 2, 3, 4])):
        for repeat, expected in ((False, zeros), (True, again)):
            got_v, got = unflatten(lesson.shortened(state, n, 4, repeat), 4)
            assert got[0].tolist() == expected
            assert got_v[0, :, 0].tolist() == [0.0 if r == 0 else v[0, r - 1, 0].item() for r in expected]
    knows = lesson.shortened(state.repeat(3, 1), 4, 4) * torch.tensor([[0.0], [1], [1]])
    knows[2] = lesson.shortened(state, 2, 4)[0]
    rating = unflatten(lesson.shortened(knows, 3, 4, repeat=True), 4)[1]
    assert rating.tolist() == [[0, 0, 0, 0], [4, 2, 3, 4], [3, 4, 3, 4]]  # of each state what it knows, nothing of none


def test_what_is_served_fills_the_frames_of_short_logs(lesson, frames):
    actor, term = Actor(2, 3, 16).eval(), UserHistory(torch.zeros(3, 3), 1.0)
    users = np.array([1, 5])
    full, one = lesson.as_served(actor, term)(frames, users), frames.last_states(users)
    with torch.no_grad():
        torch.testing.assert_close(full, actor(one) @ frames.items.T)
    short = Frames(pd.DataFrame({"user_id": [1, 2, 2, 2], "item_id": 10, "rating": 3.0, "timestamp": range(4)}),
                   frames.item_ids, frames.items, 2)
    torch.testing.assert_close(*lesson.as_served(actor, term)(short, np.array([1, 2])))


def test_a_policy_no_better_than_the_most_rated_is_warned_of(lesson):
    assert lesson.no_better(0.0772, 0.0771) is None
    for ndcg in (0.068, 0.077):
        assert f"most rated items (NDCG@10 {ndcg:.3f} against 0.077)" in lesson.no_better(ndcg, 0.077)


def test_proto_actions_spread_on_the_map_as_far_as_items(lesson):
    rng = np.random.default_rng(0)
    matrix, proto = rng.normal(size=(500, 6)) + 3, 100 * rng.normal(size=(80, 6))
    norm = lesson.place_norm(proto, matrix)
    places = norm * proto / np.linalg.norm(proto, axis=1, keepdims=True)
    spread = [np.square(points[:, :2]).sum(axis=1).mean() for points in (places, matrix - matrix.mean(axis=0))]
    assert np.isclose(*spread) and np.isclose(lesson.place_norm(5 * proto, matrix), norm)


def test_the_scale_of_ratings(lesson):
    assert lesson.ratings_scale(pd.Series([1.0, 4, 5])) == {"low": 1, "high": 5, "step": 1}
    assert lesson.ratings_scale(pd.Series([0.5, 4, 5])) == {"low": 0.5, "high": 5, "step": 0.5}


def test_where_the_folder_lies_and_what_a_run_says_of_it(tmp_path):
    assert build_dir(DEFAULT_DATASET, tmp_path) == tmp_path / "build"
    assert build_dir("my/clicks.zip", tmp_path) == tmp_path / "data" / "clicks" / "build"
    assert artefact(DEFAULT_DATASET, LESSONS["11_ship"].writes[0]) == build_dir(DEFAULT_DATASET) / "model" / "manifest.json"
    record = {"11_ship": {"outputs": [], "seconds": 1.0}}
    assert closing_table(DEFAULT_DATASET, record, []).endswith("make serve, then http://127.0.0.1:8000")
    assert "make serve DATASET='a b'," in closing_table("a b", record, [])
    assert "make serve" not in closing_table(DEFAULT_DATASET, {}, [])
