import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import faiss
import httpx
import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.service import free_port, service, write_model
from helpers.agents import ship
from helpers.files import PROJECT
from helpers.frames import Frames, flatten
from helpers.liking import Liking
from helpers.losses import log_policy

N_ITEMS, EMBED_SIZE, FRAME_SIZE = 120, 8, 10
TITLES = ["Amélie", "Léon: The Professional", "Toy Story", "Schindler's List", "Das Boot", "Ævintýri"]
IDS = list(range(1, N_ITEMS + 1))
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return (model folder, actor, critic, item matrix) of a small catalogue with untrained networks."""
    folder = tmp_path_factory.mktemp("shipped") / "model"
    return folder, *write_model(folder, N_ITEMS, EMBED_SIZE, FRAME_SIZE, TITLES)


@pytest.fixture
def copied(written, tmp_path):
    """Return a model folder that may be changed."""
    return shutil.copytree(written[0], tmp_path / "model")


@pytest.fixture(scope="module")
def client(written):
    port = free_port()
    with service(written[0], port), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client


@pytest.fixture
def recommender(monkeypatch):
    """Return the module, as the service imports it."""
    monkeypatch.syspath_prepend(PROJECT / "build")
    import recommender
    return recommender


def history(*ids: int | str, rating: float = 4.0) -> list[dict]:
    return [{"item_id": item_id, "rating": rating} for item_id in ids]


def slate(client: httpx.Client, **wish) -> dict:
    response = client.post("/recommend", json=wish)
    assert response.status_code == 200, response.text
    return response.json()


def of(answer: dict, field: str = "item_id") -> list:
    """Return one field of every item in a slate."""
    return [item[field] for item in answer["slate"]]


def check_same(answers: list[dict], others: list[dict]) -> None:
    for one, other in zip(answers, others, strict=True):
        assert of(one) == of(other) and one["used"] == other["used"] and one["note"] == other["note"]
        np.testing.assert_allclose(of(one, "score"), of(other, "score"), atol=1e-4)


def described_anew(folder: Path, **changes) -> None:
    """Let the manifest say what lies in the folder now, with some other changes."""
    path = folder / "manifest.json"
    files = {name: known for name, known in ship.describe(folder).items() if name != path.name}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files} | changes))


def with_arrays(folder: Path, **changes) -> Path:
    """Change some arrays of the items, and the manifest with them."""
    with np.load(folder / "items.npz") as arrays:
        np.savez(folder / "items.npz", **dict(arrays) | changes)
    described_anew(folder)
    return folder


@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 40])
@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_a_slate_is_what_torch_and_lesson_05_would_recommend(client, written, n, beta):
    folder, actor, critic, matrix = written
    rng = np.random.default_rng(n)
    rated = [(int(item), float(rng.integers(1, 11)) / 2) for item in rng.choice(IDS, n, replace=False)]
    ids, stars = zip(*(rated[-FRAME_SIZE:] * FRAME_SIZE)[-FRAME_SIZE:], strict=True)  # a short log fills the frame
    with torch.no_grad():
        items = torch.as_tensor(matrix)
        state = flatten(items[np.array(ids) - 1][None], torch.tensor([stars]))
        proto_action = actor(state)
        log_p = log_policy(proto_action, items)
        log_p[0, [item - 1 for item, _ in rated]] = -torch.inf
        log = pd.DataFrame(rated * 11, columns=["item_id", "rating"]).assign(user_id=1, timestamp=0)
        log = Frames(log, np.array(IDS), matrix)  # eleven times over, for a transition; of a repeat the last counts
        with np.load(folder / "items.npz") as arrays:
            said = Liking(*(torch.tensor(arrays[name]) for name in ("offset", "root")), 0.8)(log, [1])[0]
        expected = (log_p[0] + beta * said - 100.0 * ((said < 2.5) & (beta > 0))).topk(10)
        values = critic.among(state, items[expected.indices][None])[0]
    got = slate(client, history=[{"item_id": item, "rating": stars} for item, stars in rated], k=10, beta=beta)
    assert of(got) == (expected.indices + 1).tolist() and got["used"] == min(n, FRAME_SIZE)
    np.testing.assert_allclose(of(got, "score"), expected.values, atol=1e-4)
    np.testing.assert_allclose(of(got, "value"), values, atol=1e-4)
    np.testing.assert_allclose(of(got, "stars"), said[expected.indices].clamp(0.5, 5), atol=6e-3)

    used, unit = [item for item, _ in rated[-FRAME_SIZE:]], matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    for item in got["slate"]:
        similarity = unit[item["item_id"] - 1] @ unit[np.array(used) - 1].T
        assert item["because"]["item_id"] == used[similarity.argmax()]
        assert item["because"]["similarity"] == pytest.approx(similarity.max(), abs=1e-4)
    norm = json.loads((folder / "manifest.json").read_text())["map"]["norm"]
    with np.load(folder / "items.npz") as arrays:
        x, y = arrays["axes"] @ (norm * (proto_action[0] / proto_action.norm()).numpy() - arrays["mean"])
    assert got["proto_action"] == pytest.approx({"x": x, "y": y}, abs=1e-3)


def test_rated_and_excluded_items_never_enter_a_slate_and_an_item_rated_twice_counts_with_its_last_rating(client):
    got = slate(client, history=history(*IDS[9:60]), exclude=[1, 2, 3, 4, 5, 6, *IDS[60:]], k=100)
    assert sorted(of(got)) == [7, 8, 9] and "Only 3 items" in got["note"]
    for rated in (history(*IDS), [], history(*IDS) * 8 + history(*IDS[:40])):  # a thousand ratings, as permitted
        got = slate(client, history=rated, exclude=IDS + [1] * 9_880)
        assert got["slate"] == [] and "nothing to recommend" in got["note"]
    twice = [*history(1, rating=1.0), *history(2, 3), *history(1, rating=5.0)]
    assert slate(client, history=twice) == slate(client, history=[*history(2, 3), *history(1.0, rating=5)], k=10.0)
    assert slate(client, history=twice) != slate(client, history=[*history(1, rating=1.0), *history(2, 3)])


def test_an_empty_history_gets_the_most_rated_items_and_a_short_one_is_told_how_it_was_served(client):
    most_rated = [item["item_id"] for item in client.get("/items", params={"limit": 12}).json()["items"]]
    got = slate(client, history=[], exclude=most_rated[:2], k=10)
    assert of(got) == most_rated[2:] and "no ratings" in got["note"] and got["used"] == 0
    assert got["proto_action"] is None and of(got, "value") == of(got, "because") == [None] * 10
    assert of(got, "score") == sorted(of(got, "score"), reverse=True)
    assert "which your 3 fill over and over" in slate(client, history=history(1, 2, 3))["note"]
    assert slate(client, history=history(*IDS[:10]))["note"] is None


def test_everybody_gets_their_own_answer(client, recommender, written):
    model, rng = recommender.Recommender(written[0]), np.random.default_rng(0)
    wishes = [{"history": history(*rng.choice(IDS, rng.integers(0, 30), replace=False).tolist()),
               "k": int(rng.integers(1, 50)), "beta": float(rng.choice([0, 1]))} for _ in range(200)]
    asks = [model.ask([tuple(one.values()) for one in wish["history"]], wish["k"], beta=wish["beta"])
            for wish in wishes]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        check_same(list(pool.map(lambda wish: slate(client, **wish), wishes)),
                   [model.recommend([ask])[0] for ask in asks])
    assert metric(client, "recnn_batch_size_sum") > metric(client, "recnn_batch_size_count"), "none were batched"


def test_an_approximate_index_recommends_the_same(recommender, copied):
    n = 2000
    matrix = np.random.default_rng(1).normal(size=(n, EMBED_SIZE)).astype(np.float32)
    infos = {i: {"title": "A film", "genres": [], "release_year": None} for i in range(n)}
    user_history = np.random.default_rng(2).normal(size=(EMBED_SIZE, EMBED_SIZE)).astype(np.float32) / 20
    ship.write_items(copied, np.arange(n), matrix, infos, pd.Series([1, 2]), user_history, ship.without(matrix)[1])
    faiss.write_index(ship.hnsw(matrix), str(copied / "index.faiss"))
    described_anew(copied, n_items=n, search={"kind": "hnsw"})
    model = recommender.Recommender(copied)
    asks = [model.ask([(i + j, 4.0) for j in range(12)], k=10, exclude=range(500, 500 + 9 * i)) for i in range(20)]
    found = model.recommend(asks)
    check_same(found, [model.recommend([ask])[0] for ask in asks])  # whatever the others leave out
    for ask, one in zip(asks, found, strict=True):
        assert len(of(one)) == 10 and not set(of(one)) & set(ask.hidden.tolist())
    many = model.ask([(1, 4.0)], k=10, exclude=range(2, 1500))  # more than an index is asked for
    assert len(of(model.recommend([many])[0])) == 10
    model.index = SimpleNamespace(search=lambda asked, k: (  # its graph reaches the first item alone
        np.zeros((len(asked), k), np.float32), np.tile(np.where(np.arange(k) == 0, 0, -1), (len(asked), 1))))
    poor, model.index = model.recommend(asks), None
    exact = model.recommend(asks)
    check_same(poor, exact)  # whoever would get too few is served exactly
    assert np.mean([len({*of(one)} & {*of(other)}) for one, other in zip(found, exact, strict=True)]) > 9.5


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_what_has_no_number_is_never_recommended_and_never_sent(recommender, written, copied, beta):
    nobody = np.isin(IDS, [4, 50, 99])
    matrix = np.where(nobody[:, None], [[np.nan], [np.inf], [-np.inf]] * 40, written[3])
    model = recommender.Recommender(with_arrays(copied, matrix=matrix))
    true = model.critic
    model.critic = SimpleNamespace(run=lambda *request: [
        np.where(np.arange(values.shape[1]) % 2, values, np.nan) for values in true.run(*request)])
    for one in model.recommend([model.ask([(i, 4.0)], k=100, beta=beta, exclude=range(31, 51)) for i in (1, 2)]):
        assert len(one["slate"]) == 97 and not {4, 50, 99} & set(of(one))
        assert "score for 97 of the items left" in one["note"] and json.dumps(one, allow_nan=False)
        assert of(one, "value").count(None) in (48, 49)

    nowhere = np.full((EMBED_SIZE, EMBED_SIZE), np.nan)
    model = recommender.Recommender(with_arrays(copied, user_history=nowhere))
    bad, good = model.recommend([model.ask([(1, 4.0)], k=3, beta=beta), model.ask([], k=3, beta=beta)])
    assert bad["slate"] == [] and bad["proto_action"] is None and "score for none of the items left" in bad["note"]
    assert len(good["slate"]) == 3 and json.dumps([bad, good], allow_nan=False)


@pytest.mark.parametrize(("text", "titles"), [
    ("AMÉ", {"Amélie"}), ("prof leon", {"Léon: The Professional"}), ("schindler’s li", {"Schindler's List"}),
    ("aevin", {"Ævintýri"}), ("mélie", set()), ("toy boot", set()),
    ("1953", {"Schindler's List", "Léon: The Professional"}), (" ?! ", set(TITLES))])
def test_items_are_found_by_the_beginnings_of_their_words_most_rated_first(client, text, titles):
    items = client.get("/items", params={"q": text, "limit": 100}).json()["items"]
    assert {item["title"].rsplit(" (", 1)[0] for item in items} == titles
    assert [item["ratings"] for item in items] == sorted((item["ratings"] for item in items), reverse=True)
    assert all(item.keys() == {"item_id", "title", "year", "genres", "ratings"} for item in items)
    assert client.get("/items", params={"q": text}).json()["items"] == items[:10]


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_health_metrics_and_the_map(client, written):
    health = client.get("/health").json()
    expected = {"status": "ok", "items": N_ITEMS, "frame_size": FRAME_SIZE, "beta": 0, "gamma": 0.9, "warning": None,
                "rating": {"low": 0.5, "high": 5, "step": 0.5}, "held_out": None}
    assert {name: health[name] for name in expected} == expected
    names = ('recnn_requests_total{path="/recommend",status="200"}', 'recnn_requests_total{path="other",status="404"}',
             'recnn_request_seconds_count{path="/recommend"}')
    before = [metric(client, name) for name in names]
    slate(client, history=history(1))
    client.get("/no-such-thing")
    assert [metric(client, name) for name in names] == [count + 1 for count in before]

    places = client.get("/map")
    with np.load(written[0] / "items.npz") as arrays:
        np.testing.assert_allclose(np.transpose([places.json()["x"], places.json()["y"]]), arrays["map"], atol=6e-4)
    assert places.json()["item_id"] == IDS
    again = client.get("/map", headers={"If-None-Match": places.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/", "/health", "/docs", "/no-such-thing"])
def test_a_browser_is_told_to_be_careful_and_a_head_is_answered(client, path):
    headers = client.get(path, headers={"Origin": "http://x.org"}).headers
    assert headers["x-content-type-options"] == "nosniff" and "access-control-allow-origin" not in headers
    assert headers["content-security-policy"].startswith("default-src 'none'")
    if path in ("/", "/health"):
        assert (client.head(path).status_code, client.head(path).content) == (200, b"")


def rated(item_id: str, rating: str = "4") -> str:
    return f'{{"history": [{{"item_id": {item_id}, "rating": {rating}}}]}}'


def empty(more: str) -> str:
    return f'{{"history": [], {more}}}'


FINE = '{"item_id": 1, "rating": 4}'
REFUSED = [
    (rated("999"), "999 is not in the catalogue of 120"), (empty('"exclude": [-1, 0]'), "-1, 0 are not in the"),
    (rated("1" + "0" * 4000), "not in the catalogue"), (rated("1", "3.3"), "history[0].rating: Input should be a mul"),
    (rated("1", "5.5"), "should be less"), (rated("1", "0"), "should be greater"),
    (rated("1", "NaN"), "should be a finite"), (rated("1", '"4"'), "history[0].rating: Input should be a valid"),
    (rated("true"), "history[0].item_id: ids are whole"), (rated('"1"'), "item_id: ids are whole numbers here, such"),
    ('{"history": [{"item_id": 1}]}', "history[0].rating: Field required"), ("{}", "history: Field required"),
    (empty('"exlude": []'), "exlude: Extra inputs"), (empty('"k": 101'), "k: Input should be less"),
    (empty('"k": 2.5'), "k: Input should be a valid integer"), (empty('"beta": -1'), "beta: Input should be greater"),
    (f'{{"history": [{",".join([FINE] * 1001)}]}}', "history: List should have at most 1000"),
    (empty(f'"exclude": [{",".join(["1"] * 10_001)}]'), "exclude: List should have at most 10000"),
    ('{"history": [', "no JSON: Expecting value at character 13"), ("[]", "no JSON object"),
    ("[" * 60_000, "no JSON that can be read"), (b'{"history": "\xff\xfe"}', "no JSON that can be read"),
    (empty(r'"\ud800": "\udfff"'), "no JSON")]


@pytest.mark.parametrize(("body", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_served_is_refused_with_a_sentence(client, body, words):
    response = client.post("/recommend", content=body, headers=JSON)
    assert response.status_code == 422 and response.json().keys() == {"detail"}, response.text
    detail = response.json()["detail"]
    assert words in detail and detail.endswith(".") and len(detail) < 300


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/items?limit=101", 422), ("GET", f"/items?q={'a' * 201}", 422), ("GET", "/recommend", 405),
    ("GET", "/../service.py", 404)])
def test_searches_are_bounded_and_what_is_not_there_is_said_in_a_sentence(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status and "/docs" in response.json()["detail"]


@pytest.mark.parametrize("megabytes", [0.07, 40])
@pytest.mark.parametrize("chunked", [False, True])
def test_megabytes_are_refused_and_not_kept(client, megabytes, chunked):
    parts = [b'{"history": [', *[f"{FINE}, ".encode() * 2300] * int(megabytes * 16)]  # of 69 KB
    before = metric(client, "process_resident_memory_bytes")
    response = client.post("/recommend", content=iter(parts) if chunked else b"".join(parts), headers=JSON)
    assert response.status_code == 413 and "larger than 65,536 bytes" in response.json()["detail"]
    assert 0 < metric(client, "process_resident_memory_bytes") < before + 8e6
    slate(client, history=history(1))


def damaged(name: str):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    return damage


def manifest(**changes):
    return lambda folder: described_anew(folder, **changes)


UNFIT = "holds no model that fits its manifest"


@pytest.mark.parametrize(("damage", "words"), [
    (shutil.rmtree, "manifest.json is not there"),
    (lambda folder: (folder / "critic.onnx").unlink(), "critic.onnx is not there"),
    (damaged("actor.onnx"), "actor.onnx is not the file"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is no manifest"),
    (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json is no manifest"),
    (manifest(format=2), "is of format 2"), (manifest(files={}), "lists no actor.onnx"),
    (manifest(critic={"beta": 0.0}), UNFIT), (manifest(rating={"low": 1, "high": 5}), UNFIT),
    (manifest(n_items=5), UNFIT), (manifest(frame_size=9), UNFIT), (manifest(map={"norm": float("nan")}), UNFIT),
    (lambda folder: with_arrays(folder, matrix=np.array([{"a": 1}], dtype=object)), "allow_pickle")])
def test_a_model_that_is_not_whole_is_refused_in_a_sentence(recommender, copied, damage, words):
    damage(copied)
    with pytest.raises(recommender.ModelError) as error:
        recommender.Recommender(copied)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("damage", "batch"), [(damaged("items.json"), "64"), (bool, "0")])
def test_the_service_says_it_at_the_start_and_ends(copied, damage, batch):
    damage(copied)
    ended = subprocess.run([sys.executable, "-m", "uvicorn", "service:app", "--app-dir", PROJECT / "build"],
                           env=os.environ | {"RECNN_MODEL": str(copied), "RECNN_BATCH": batch}, text=True, timeout=60,
                           capture_output=True)
    assert ended.returncode not in (0, None) and "Traceback" not in ended.stderr + ended.stdout
    assert ended.stderr.startswith("The service cannot start: ") and ended.stderr.count("\n") == 1


def test_the_folder_runs_alone_and_ids_may_be_words(written, tmp_path):
    folder = shutil.copytree(PROJECT / "build", tmp_path / "elsewhere",
                             ignore=shutil.ignore_patterns("model", "__pycache__"))
    path = shutil.copytree(written[0], folder / "model") / "items.json"
    names = [str(2 ** 53), "a \"b\" <b>'c'</b> & d", "ünï שלום 🎬\n", "1", *(f"film {number}" for number in IDS[4:])]
    items = [item | {"id": name} for item, name in zip(json.loads(path.read_text()), names, strict=True)]
    items[0]["id"] = 2 ** 53
    path.write_text(json.dumps(items))
    described_anew(folder / "model", held_out={"ndcg@10": float("nan")}, warning="Beware.")
    code = ("import json, sys, service\n"
            "assert not {'torch', 'helpers', 'pandas'} & {name.split('.')[0] for name in sys.modules}\n"
            "from fastapi.testclient import TestClient\n"
            "with TestClient(service.app) as client:\n"
            "    said = [client.get(path).json() for path in ('/health', '/map', '/items?q=amelie&limit=100')]\n"
            "    client.headers['Content-Type'] = 'application/json'\n"
            "    said += [client.post('/recommend', content=wish).json() for wish in json.load(sys.stdin)]\n"
            "print(json.dumps(said))\n")
    wishes = [json.dumps({"history": history(*rated), "k": 100, "exclude": ["film 8"]})
              for rated in (names[:4], ["film", "\ud800"], [1], [None])]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RECNN_MODEL")}
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True,
                           timeout=60, input=json.dumps(wishes))
    assert ended.returncode == 0, ended.stderr
    health, places, found, served, unknown, *wrong = json.loads(ended.stdout)
    assert health["held_out"] == {"ndcg@10": None} and health["warning"] == "Beware."
    assert places["item_id"] == names and {item["item_id"] for item in found["items"]} == set(names[::6])
    assert len(of(served)) == 100 and set(of(served)) < set(names[4:]) - {"film 8"}
    assert unknown["detail"].startswith('"film", "\\ud800" are not in the catalogue')
    assert all(f'item_id: ids are text here, such as "{2 ** 53}"' in refusal["detail"] for refusal in wrong)


def test_the_service_keeps_to_its_own_description(client, tmp_path):
    document = client.get("/openapi.json").json()
    parts = document["components"]["schemas"]  # an unknown id is refused with reason, so these are the ones to ask with
    parts["Rated"]["properties"]["item_id"] = parts["Wish"]["properties"]["exclude"]["items"] = {"enum": IDS}
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "schemathesis.toml").write_text("[checks.negative_data_rejection]\nexpected-statuses = [413, 422]\n")
    ended = subprocess.run([Path(sys.executable).parent / "schemathesis", "run", "openapi.json", "--max-examples=20",
                            "--url", str(client.base_url), "--seed=1", "--no-color", "--generation-database=none"],
                           cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, "\n".join(line[:300] for line in ended.stdout.splitlines()) + ended.stderr
    assert "Tested: 5\n" in ended.stdout
