import concurrent.futures
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import faiss
import httpx
import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.service import answer, flat, free_port, ratios, service, write_model
from helpers.agents import ddpg, ship
from helpers.files import PROJECT
from helpers.frames import flatten
from helpers.losses import log_policy

N_ITEMS, EMBED_SIZE, FRAME_SIZE = 120, 8, 10
TITLES = ["Amélie", "Léon: The Professional", "Toy Story", "Schindler's List", "Das Boot", "Ævintýri"]
IDS = np.arange(1, N_ITEMS + 1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return (model folder, actor, critic, item matrix) of a small catalogue with untrained networks."""
    folder = tmp_path_factory.mktemp("shipped") / "model"
    return folder, *write_model(folder, N_ITEMS, EMBED_SIZE, FRAME_SIZE, TITLES)


@pytest.fixture(scope="module")
def port(written):
    port = free_port()
    with service(written[0], port):
        yield port


@pytest.fixture(scope="module")
def client(port):
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client


@pytest.fixture
def recommender(monkeypatch):
    """Return the module, as the service imports it."""
    monkeypatch.syspath_prepend(PROJECT / "build")
    import recommender
    return recommender


def history(*ids: int | str, rating: float = 4.0) -> list[dict]:
    return [{"item_id": item_id.item() if isinstance(item_id, np.integer) else item_id, "rating": rating}
            for item_id in ids]


def slate(client: httpx.Client, **wish) -> dict:
    response = client.post("/recommend", json=wish)
    assert response.status_code == 200, response.text
    return response.json()


def ids_of(answer: dict) -> list[int]:
    return [item["item_id"] for item in answer["slate"]]


def torch_state(matrix: np.ndarray, rated: list[tuple[int, float]]) -> torch.Tensor:
    """Return (1, F·(E+1)): the frame at the end of such a log, which a short one fills over and over."""
    frame = (rated[-FRAME_SIZE:] * FRAME_SIZE)[-FRAME_SIZE:]
    vectors = torch.as_tensor(np.stack([matrix[item_id - 1] for item_id, _ in frame]))
    return flatten(vectors[None], torch.tensor([[stars for _, stars in frame]]))


# What is recommended

@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 40])
@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_a_slate_is_what_torch_and_lesson_05_would_recommend(client, written, n, beta):
    _, actor, critic, matrix = written
    rng = np.random.default_rng(n)
    rated = [(int(item), float(rng.integers(1, 11)) / 2) for item in rng.choice(IDS, n, replace=False)]
    with torch.no_grad():
        state, items = torch_state(matrix, rated), torch.as_tensor(matrix)
        log_p = log_policy(actor(state), items)
        log_p[0, [item - 1 for item, _ in rated]] = -torch.inf
        candidates = log_p.topk(min(100, N_ITEMS - n)).indices
        q = critic.among(state, items[candidates])
        score = ddpg.rerank(log_p.clamp(min=-1e6), q, candidates, beta)[0]
    expected = score.topk(10)
    got = slate(client, history=[{"item_id": item, "rating": stars} for item, stars in rated], k=10, beta=beta)
    assert ids_of(got) == (expected.indices + 1).tolist()
    np.testing.assert_allclose([item["score"] for item in got["slate"]], expected.values, atol=1e-4)
    value = dict(zip((candidates[0] + 1).tolist(), q[0].tolist(), strict=True))
    np.testing.assert_allclose([item["value"] for item in got["slate"]], [value[i] for i in ids_of(got)], atol=1e-4)
    assert got["used"] == min(n, FRAME_SIZE)


def test_a_states_layout_is_that_of_the_frames_of_training(recommender, written, ratings, item_ids):
    from helpers.frames import Frames
    model = recommender.Recommender(written[0])
    frames = Frames(ratings, item_ids, written[3][item_ids - 1], frame_size=2)
    model.frame_size = 2
    for user, log in ratings.groupby("user_id"):
        log = log[~log["item_id"].duplicated(keep="last")]
        ask = model.ask(log[["item_id", "rating"]].itertuples(index=False, name=None), k=3)
        np.testing.assert_array_equal(model.states([ask])[0], frames.last_states(np.array([user]))[0])


def test_the_reason_is_the_nearest_item_of_the_state(client, written):
    matrix, rated = written[3], [3, 50, 77]
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    for item in slate(client, history=history(*rated), k=20)["slate"]:
        similarity = unit[item["item_id"] - 1] @ unit[np.array(rated) - 1].T
        assert item["because"]["item_id"] == rated[similarity.argmax()]
        assert item["because"]["similarity"] == pytest.approx(similarity.max(), abs=1e-4)


def test_the_proto_action_lies_where_the_manifest_says(client, written):
    folder, actor, _, matrix = written
    with np.load(folder / "items.npz") as arrays, torch.no_grad():
        proto_action = actor(torch_state(matrix, [(5, 4.0), (6, 4.0)]))[0].numpy()
        norm = json.loads((folder / "manifest.json").read_text())["map"]["norm"]
        x, y = arrays["axes"] @ (norm * proto_action / np.linalg.norm(proto_action) - arrays["mean"])
    assert slate(client, history=history(5, 6))["proto_action"] == pytest.approx({"x": x, "y": y}, abs=1e-3)


def test_rated_and_excluded_items_never_enter_a_slate(client):
    left = [7, 8, 9]
    got = slate(client, history=history(*IDS[9:60]), exclude=[1, 2, 3, 4, 5, 6, *IDS[60:].tolist()], k=100)
    assert sorted(ids_of(got)) == left and got["note"] == "Only 3 items are neither rated nor left out."
    for rated in (history(*IDS), []):
        got = slate(client, history=rated, exclude=IDS.tolist())
        assert got["slate"] == [] and "nothing to recommend" in got["note"]


def test_an_empty_history_gets_the_most_rated_items_and_is_told_so(client):
    most_rated = [item["item_id"] for item in client.get("/items", params={"limit": 12}).json()["items"]]
    got = slate(client, history=[], exclude=most_rated[:2], k=10)
    assert ids_of(got) == most_rated[2:] and "no ratings" in got["note"] and got["used"] == 0
    assert got["proto_action"] is None and {item["value"] for item in got["slate"]} == {None}
    assert [item["score"] for item in got["slate"]] == sorted((item["score"] for item in got["slate"]), reverse=True)


def test_a_short_history_is_told_how_it_was_served_and_a_long_one_is_not(client):
    assert "which your 3 fill over and over" in slate(client, history=history(1, 2, 3))["note"]
    assert slate(client, history=history(*IDS[:10]))["note"] is None


def test_an_item_rated_twice_counts_with_its_last_rating(client):
    twice = [*history(1, rating=1.0), *history(2, 3), *history(1, rating=5.0)]
    assert slate(client, history=twice) == slate(client, history=[*history(2, 3), *history(1, rating=5.0)])
    assert slate(client, history=twice) != slate(client, history=[*history(1, rating=1.0), *history(2, 3)])


def test_everybody_gets_their_own_answer(client, recommender, written):
    model = recommender.Recommender(written[0])
    rng = np.random.default_rng(0)
    wishes = [{"history": history(*rng.choice(IDS, rng.integers(0, 30), replace=False)), "k": int(rng.integers(1, 50)),
               "beta": float(rng.choice([0, 1]))} for _ in range(200)]
    alone = [model.recommend([model.ask([(r["item_id"], r["rating"]) for r in wish["history"]], wish["k"],
                                        beta=wish["beta"])])[0] for wish in wishes]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda wish: slate(client, **wish), wishes))
    for one, other in zip(together, alone, strict=True):
        assert ids_of(one) == ids_of(other) and one["used"] == other["used"] and one["note"] == other["note"]
        np.testing.assert_allclose([item["score"] for item in one["slate"]],
                                   [item["score"] for item in other["slate"]], atol=1e-4)
    batches = metric(client, "recnn_batch_size_count"), metric(client, "recnn_batch_size_sum")
    assert batches[1] > batches[0], "no two of 200 requests from 32 clients were answered together"


def test_an_approximate_index_recommends_the_same(recommender, written, tmp_path):
    folder, lesson, n = shutil.copytree(written[0], tmp_path / "model"), ship, 2000
    matrix = np.random.default_rng(1).normal(size=(n, EMBED_SIZE)).astype(np.float32)
    infos = {i: {"title": "A film", "genres": [], "release_year": None} for i in range(n)}
    user_history = np.random.default_rng(2).normal(size=(EMBED_SIZE, EMBED_SIZE)).astype(np.float32) / 20
    lesson.write_items(folder, np.arange(n), matrix, infos, pd.Series([1, 2]), user_history)
    faiss.write_index(lesson.hnsw(matrix), str(folder / "index.faiss"))
    described_anew(folder, n_items=n, search={"kind": "hnsw"})
    model = recommender.Recommender(folder)
    asks = [model.ask([(i + j, 4.0) for j in range(12)], k=10, exclude=range(500, 500 + 9 * i)) for i in range(20)]
    answers = model.recommend(asks)
    found = [ids_of(answer) for answer in answers]
    for ask, together in zip(asks, answers, strict=True):  # whatever the others leave out
        alone = model.recommend([ask])[0]
        assert ids_of(alone) == ids_of(together)
        np.testing.assert_allclose([item["score"] for item in alone["slate"]],
                                   [item["score"] for item in together["slate"]], atol=1e-4)
    for ask, ids in zip(asks, found, strict=True):
        assert len(ids) == 10 and not set(ids) & set(ask.hidden.tolist())
    many = model.ask([(1, 4.0)], k=10, exclude=range(2, 1500))  # more than an index is asked for
    assert len(ids_of(model.recommend([many])[0])) == 10
    model.index = SimpleNamespace(search=lambda asked, k: (  # its graph reaches the first item alone
        np.zeros((len(asked), k), np.float32), np.tile(np.where(np.arange(k) == 0, 0, -1), (len(asked), 1))))
    poor = [ids_of(answer) for answer in model.recommend(asks)]
    model.index = None
    exact = [ids_of(answer) for answer in model.recommend(asks)]
    assert poor == exact  # whoever would get too few is served exactly
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)]) > 9.5


def with_arrays(recommender, folder: Path, **changed):
    """Return the model of a folder with some of its arrays changed."""
    with np.load(folder / "items.npz") as arrays:
        np.savez(folder / "items.npz", **dict(arrays) | changed)
    described_anew(folder)
    return recommender.Recommender(folder)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_what_has_no_number_is_never_recommended_and_never_sent(recommender, written, tmp_path, beta):
    nobody = np.isin(IDS, [4, 50, 99])
    matrix = np.where(nobody[:, None], [[np.nan], [np.inf], [-np.inf]] * 40, written[3])
    model = with_arrays(recommender, shutil.copytree(written[0], tmp_path / "model"), matrix=matrix)
    asks = [model.ask([(item, 4.0)], k=100, beta=beta, exclude=range(31, 51)) for item in (1, 2)]
    for one in model.recommend(asks):
        assert len(one["slate"]) == 97 and not {4, 50, 99} & set(ids_of(one))
        assert "score for 97 of the items left" in one["note"] and json.dumps(one, allow_nan=False)

    true = model.critic
    model.critic = SimpleNamespace(run=lambda *request: [
        np.where(np.arange(values.shape[1]) % 2, values, np.nan) for values in true.run(*request)])
    one = model.recommend(asks)[0]
    assert sum(item["value"] is None for item in one["slate"]) in (48, 49) and json.dumps(one, allow_nan=False)
    assert [item["score"] for item in one["slate"]] == sorted((item["score"] for item in one["slate"]), reverse=True)


def test_where_nothing_has_a_score_the_slate_is_empty_and_says_so(recommender, written, tmp_path):
    model = with_arrays(recommender, shutil.copytree(written[0], tmp_path / "model"),
                        user_history=np.full((EMBED_SIZE, EMBED_SIZE), np.nan))
    bad, good = model.recommend([model.ask([(1, 4.0)], k=3), model.ask([], k=3)])
    assert bad["slate"] == [] and bad["proto_action"] is None and "score for none of the items left" in bad["note"]
    assert len(good["slate"]) == 3 and json.dumps([bad, good], allow_nan=False)


def test_a_head_is_answered_and_no_host_is_taken_on_trust(client):
    for path in ("/health", "/"):
        response = client.head(path)
        assert response.content == b"" and response.status_code == client.get(path).status_code
    assert client.get("/recommend/", headers={"Host": "evil.example"}).status_code == 404


# What is found, shown and counted

@pytest.mark.parametrize(("text", "titles"), [
    ("amelie", {"Amélie"}), ("AMÉ", {"Amélie"}), ("prof leon", {"Léon: The Professional"}), ("story t", {"Toy Story"}),
    ("schindlers", {"Schindler's List"}), ("schindler’s li", {"Schindler's List"}), ("aevin", {"Ævintýri"}),
    ("mélie", set()), ("toy boot", set()), ("1953", {"Schindler's List", "Léon: The Professional"})])
def test_items_are_found_by_the_beginnings_of_their_words(client, text, titles):
    items = client.get("/items", params={"q": text, "limit": 100}).json()["items"]
    assert {item["title"].rsplit(" (", 1)[0] for item in items} == titles
    assert [item["ratings"] for item in items] == sorted((item["ratings"] for item in items), reverse=True)


def test_no_text_finds_the_most_rated(client):
    items = client.get("/items").json()["items"]
    assert len(items) == 10 and items == client.get("/items", params={"q": " ?! "}).json()["items"]
    assert items[0]["ratings"] == max(i["ratings"] for i in client.get("/items?limit=100").json()["items"])
    assert items[0].keys() == {"item_id", "title", "year", "genres", "ratings"}


def test_the_map_has_every_item_and_is_sent_once(client, written):
    response = client.get("/map")
    with np.load(written[0] / "items.npz") as arrays:
        np.testing.assert_allclose(np.transpose([response.json()["x"], response.json()["y"]]), arrays["map"], atol=6e-4)
    assert response.json()["item_id"] == IDS.tolist()
    again = client.get("/map", headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_health_and_metrics(client):
    health = client.get("/health").json()
    assert (health["status"], health["items"], health["frame_size"]) == ("ok", N_ITEMS, FRAME_SIZE)
    assert health["rating"] == {"low": 0.5, "high": 5.0, "step": 0.5} and health["warning"] is None
    names = 'recnn_requests_total{path="/recommend",status="200"}', 'recnn_requests_total{path="other",status="404"}'
    before = [metric(client, name) for name in names]
    slate(client, history=history(1))
    client.get("/no-such-thing")
    assert [metric(client, name) for name in names] == [before[0] + 1, before[1] + 1]
    assert metric(client, "process_resident_memory_bytes") > 0


def test_a_browser_is_told_to_be_careful(client):
    for path in ("/", "/health", "/docs", "/no-such-thing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "access-control-allow-origin" not in client.get("/health", headers={"Origin": "http://x.org"}).headers


# What is refused

FINE = '{"item_id": 1, "rating": 4}'
REFUSED = {
    "unknown item": ('{"history": [{"item_id": 999, "rating": 4}]}', "999 is not in the catalogue of 120 items"),
    "unknown exclude": (f'{{"history": [{FINE}], "exclude": [-1, 0]}}', "-1, 0 are not in the catalogue"),
    "immense id": (f'{{"history": [{{"item_id": 1{"0" * 4000}, "rating": 4}}]}}', "not in the catalogue"),
    "longer id": (f'{{"history": [{{"item_id": 1{"0" * 9000}, "rating": 4}}]}}', "no JSON that can be read"),
    "rating between": ('{"history": [{"item_id": 1, "rating": 3.3}]}', "history[0].rating: Input should be a multiple"),
    "rating too high": ('{"history": [{"item_id": 1, "rating": 5.5}]}', "history[0].rating: Input should be less"),
    "rating too low": ('{"history": [{"item_id": 1, "rating": 0}]}', "history[0].rating: Input should be greater"),
    "NaN": ('{"history": [{"item_id": 1, "rating": NaN}]}', "history[0].rating: Input should be a finite number"),
    "Infinity": ('{"history": [{"item_id": 1, "rating": Infinity}]}', "should be a finite number"),
    "1e999": ('{"history": [{"item_id": 1, "rating": 1e999}]}', "should be a finite number"),
    "rating of text": ('{"history": [{"item_id": 1, "rating": "4"}]}', "history[0].rating: Input should be a"),
    "rating of true": ('{"history": [{"item_id": 1, "rating": true}]}', "history[0].rating: Input should be a valid"),
    "id of text": ('{"history": [{"item_id": "1", "rating": 4}]}', "].item_id: ids are whole numbers here, such as 1"),
    "id of true": ('{"history": [{"item_id": true, "rating": 4}]}', "history[0].item_id: ids are whole"),
    "exclude of text": ('{"history": [], "exclude": [1, "<b>"]}', "exclude[1]: ids are whole numbers here"),
    "no rating": ('{"history": [{"item_id": 1}]}', "history[0].rating: Field required"),
    "no history": ("{}", "history: Field required"),
    "history of null": ('{"history": null}', "history: Input should be a valid list"),
    "misspelt": ('{"history": [], "exlude": []}', "exlude: Extra inputs are not permitted"),
    "k of 0": ('{"history": [], "k": 0}', "k: Input should be greater than or equal to 1"),
    "k of a million": ('{"history": [], "k": 1000000}', "k: Input should be less than or equal to 100"),
    "k of 2.5": ('{"history": [], "k": 2.5}', "k: Input should be a valid integer"),
    "k of true": ('{"history": [], "k": true}', "k: Input should be a valid integer"),
    "beta too loud": ('{"history": [], "beta": 11}', "beta: Input should be less than or equal to 10"),
    "beta of NaN": ('{"history": [], "beta": NaN}', "beta: Input should be a finite number"),
    "too long": (f'{{"history": [{",".join([FINE] * 1001)}]}}', "history: List should have at most 1000 items"),
    "too much excluded": (f'{{"history": [], "exclude": [{",".join(["1"] * 10_001)}]}}', "exclude: List should have"),
    "broken": ('{"history": [', "The body is no JSON: Expecting value at character 13"),
    "nothing": ("", "no JSON object"),
    "a list": ("[]", "no JSON object"),
    "null": ("null", "no JSON object"),
    "deep": ("[" * 60_000, "no JSON that can be read"),
    "deep objects": ('{"a":' * 12_000, "no JSON that can be read"),
    "no UTF-8": (b'{"history": "\xff\xfe"}', "no JSON that can be read"),
    "surrogates": (r'{"history": [], "\ud800": "\udfff"}', "no JSON"),
    "null byte": ('{"history": "\x00"}', "no JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_with_a_sentence(client, name):
    body, sentence = REFUSED[name]
    response = client.post("/recommend", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422 and response.json().keys() == {"detail"}, response.text
    assert sentence in response.json()["detail"] and response.json()["detail"].endswith(".")
    assert len(response.json()["detail"]) < 300


def test_whole_numbers_may_be_written_with_a_point(client):
    assert slate(client, history=[{"item_id": 1.0, "rating": 4}], k=3.0) == slate(client, history=history(1), k=3)


def test_as_many_ratings_as_permitted_are_served(client):
    many = [{"item_id": int(IDS[i % N_ITEMS]), "rating": 4.5} for i in range(1000)]
    assert slate(client, history=many, exclude=[1] * 10_000)["slate"] == []


@pytest.mark.parametrize("path", ["/items?limit=0", "/items?limit=101", "/items?limit=x", f"/items?q={'a' * 201}"])
def test_searches_are_bounded(client, path):
    response = client.get(path)
    assert response.status_code == 422 and response.json()["detail"].endswith(".")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/recommend", 405), ("POST", "/items", 405),
                                                        ("GET", "/page.html", 404), ("GET", "/../service.py", 404)])
def test_what_is_not_there_is_said_in_a_sentence(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status and "/docs" in response.json()["detail"]


@pytest.mark.parametrize("megabytes", [0.07, 5, 40])
@pytest.mark.parametrize("chunked", [False, True])
def test_megabytes_are_refused_and_not_kept(client, megabytes, chunked):
    def chunks():
        yield b'{"history": ['
        for _ in range(int(megabytes * 16)):
            yield f"{FINE}, ".encode() * 2300  # 69 KB
    body = chunks() if chunked else b"".join(chunks())
    before = metric(client, "process_resident_memory_bytes")
    response = client.post("/recommend", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and "larger than 65,536 bytes" in response.json()["detail"]
    assert metric(client, "process_resident_memory_bytes") < before + 8e6
    slate(client, history=history(1))


# Starting, dying, starting again

def damaged(name: str):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    return damage


def edited(**changes):
    def edit(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return edit


def described_anew(folder, **changes) -> None:
    """Let the manifest say what lies in the folder now."""
    files = ship.describe(folder)
    files.pop("manifest.json")
    edited(files=files, **changes)(folder)


def pickled(folder) -> None:
    """Put an array into the folder that only a pickle can hold."""
    with np.load(folder / "items.npz") as arrays:
        np.savez(folder / "items.npz", **dict(arrays) | {"matrix": np.array([{"a": 1}], dtype=object)})
    described_anew(folder)


@pytest.mark.parametrize(("damage", "sentence"), [
    (shutil.rmtree, "manifest.json is not there: run notes/11_ship.ipynb"),
    (damaged("actor.onnx"), "actor.onnx is not the file that manifest.json describes"),
    (damaged("items.npz"), "items.npz is not the file that manifest.json describes"),
    (lambda folder: (folder / "critic.onnx").unlink(), "critic.onnx is not there"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is no manifest"),
    (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json is no manifest"),
    (edited(format=2), "is of format 2, and this code reads format 3"),
    (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "cannot be read (Not a directory)"),
    (lambda folder: ((folder / "actor.onnx").unlink(), (folder / "actor.onnx").mkdir()), "cannot be read (Is a dir"),
    (edited(files={}), "lists no actor.onnx"),
    (edited(critic={"beta": 0.0, "candidates": 100}), "holds no model that fits its manifest"),
    (edited(critic={"gamma": 0.9, "beta": 0.0, "candidates": "many"}), "holds no model that fits its manifest"),
    (edited(policy=None, rating={"low": 1, "high": 5}), "holds no model that fits its manifest"),
    (edited(frame_size=9), "holds no model that fits its manifest"),
    (edited(n_items=5), "holds no model that fits its manifest"),
    (edited(map={"norm": float("nan")}), "holds no model that fits its manifest"),
    (pickled, "allow_pickle"),
], ids=["no folder", "actor", "items", "no critic", "broken manifest", "list", "format",
        "file for a folder", "folder for a file", "no files", "no gamma", "candidates in words", "no step", "frame",
        "size", "no number", "pickle"])
def test_a_model_that_is_not_whole_is_refused_in_a_sentence(recommender, written, tmp_path, damage, sentence):
    shutil.copytree(written[0], tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(recommender.ModelError) as error:
        recommender.Recommender(tmp_path / "model")
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("damage", "setting"), [(damaged("items.json"), {}), (None, {"RECNN_BATCH": "0"}),
                                                 (None, {"RECNN_BATCH": "many"})])
def test_the_service_says_it_at_the_start_and_ends(written, tmp_path, damage, setting):
    shutil.copytree(written[0], tmp_path / "model")
    if damage:
        damage(tmp_path / "model")
    ended = subprocess.run([sys.executable, "-m", "uvicorn", "service:app", "--app-dir", PROJECT / "build"],
                           env=os.environ | {"RECNN_MODEL": str(tmp_path / "model")} | setting, text=True, timeout=60,
                           capture_output=True)
    assert ended.returncode not in (0, None) and "Traceback" not in ended.stderr + ended.stdout
    assert ended.stderr.startswith("The service cannot start: ") and ended.stderr.count("\n") == 1


def test_killed_while_it_answers_and_started_again_it_answers_the_same(written):
    port, body = free_port(), json.dumps({"history": history(1, 2, 3), "k": 100}).encode()

    def ask_on() -> None:
        while True:
            answer(port, body)

    with service(written[0], port) as process, concurrent.futures.ThreadPoolExecutor(4) as pool:
        before = answer(port, body)
        asking = [pool.submit(ask_on) for _ in range(4)]
        time.sleep(0.3)
        process.kill()
        assert all(isinstance(future.exception(timeout=30), OSError | http.client.HTTPException) for future in asking)
    with service(written[0], port):
        assert answer(port, body) == before


def test_the_folder_runs_alone_and_ids_may_be_words(written, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(PROJECT / "build", folder, ignore=shutil.ignore_patterns("model", "__pycache__"))
    path = shutil.copytree(written[0], folder / "model") / "items.json"
    names = [2 ** 53, "a \"b\" <b>'c'</b> & d", "ünï שלום 🎬\n", "1", *(f"film {number}" for number in IDS[4:])]
    path.write_text(json.dumps([item | {"id": name}
                                for item, name in zip(json.loads(path.read_text()), names, strict=True)]))
    described_anew(folder / "model", held_out={"ndcg@10": float("nan")}, warning="Beware.")
    code = ("import json, sys, service\n"
            "assert not {'torch', 'helpers', 'pandas'} & {name.split('.')[0] for name in sys.modules}\n"
            "from fastapi.testclient import TestClient\n"
            "with TestClient(service.app) as client:\n"
            "    said = [client.get(path).json() for path in ('/health', '/map', '/items?q=amelie&limit=100')]\n"
            "    client.headers['Content-Type'] = 'application/json'\n"
            "    said += [client.post('/recommend', content=wish).json() for wish in json.load(sys.stdin)]\n"
            "print(json.dumps(said))\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RECNN_MODEL")}
    names[0] = str(names[0])
    wishes = [json.dumps({"history": history(*rated), "k": 100, "exclude": ["film 8"]})
              for rated in (names[:4], ["film", "\ud800"], [1], [None])]
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True,
                           timeout=60, input=json.dumps(wishes))
    assert ended.returncode == 0, ended.stderr
    health, places, found, served, unknown, *wrong = json.loads(ended.stdout)
    assert health["held_out"] == {"ndcg@10": None} and health["warning"] == "Beware."
    assert places["item_id"] == names and {item["item_id"] for item in found["items"]} == set(names[::6])
    assert len(ids_of(served)) == 100 and set(ids_of(served)) < set(names[4:]) - {"film 8"}
    assert unknown["detail"].startswith('"film", "\\ud800" are not in the catalogue')
    assert {refusal["detail"] for refusal in wrong} == {
        f'history[0].item_id: ids are text here, such as "{2 ** 53}"; /docs says what is expected.'}


# Requests made from the service's own description of itself

def test_the_service_keeps_to_its_own_description(client, tmp_path):
    document = client.get("/openapi.json").json()
    parts = document["components"]["schemas"]  # an unknown id is refused with reason, so these are the ones to ask with
    parts["Rated"]["properties"]["item_id"] = parts["Wish"]["properties"]["exclude"]["items"] = {"enum": IDS.tolist()}
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "schemathesis.toml").write_text("[checks.negative_data_rejection]\nexpected-statuses = [413, 422]\n")
    ended = subprocess.run([Path(sys.executable).parent / "schemathesis", "run", "openapi.json", "--max-examples=60",
                            "--url", str(client.base_url), "--seed=1", "--no-color", "--generation-database=none"],
                           cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, "\n".join(line[:300] for line in ended.stdout.splitlines()) + ended.stderr
    assert re.search(r"Tested: 5\b", ended.stdout)


# The measured numbers

def test_the_measured_ratios_follow_from_their_rows_and_no_request_failed():
    result = json.loads((PROJECT / "res" / "bench_service.json").read_text(encoding="utf-8"))
    assert ratios(result["rows"]) == result["ratios"] and set(result["ratios"]) == {"1", "16", "64"}
    assert not any(row["errors"] for row in [*result["rows"], result["soak"]])
    assert flat(result["memory_mb"])
