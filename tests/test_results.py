import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import ndcg_score

from benchmarks import baselines, results
from helpers import recommenders
from helpers.agents.evaluation import over_users
from helpers.agents.off_policy import fqe_update, new_judge, off_policy
from helpers.frames import Frames
from helpers.recommenders import UserHistory, fit_user_history

IDS = np.arange(30)


@pytest.fixture
def ratings():
    """Logs of 12 users, 24 ratings each, none twice, one rating an hour."""
    rng = np.random.default_rng(0)
    rows = [(user, item, float(rng.integers(1, 6)), 3600 * (24 * user + step)) for user in range(12)
            for step, item in enumerate(rng.permutation(30)[:24])]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])


@pytest.mark.parametrize("protocol", ["last-1", "last-5", "temporal"])
def test_no_protocol_fits_on_what_it_asks_for(ratings, protocol):
    if protocol == "temporal":
        ratings["timestamp"] %= 3600 * 24  # all users at once
        ratings = ratings.sort_values(["user_id", "timestamp"], ignore_index=True)
    part = results.cut(ratings, protocol)
    key = ["user_id", "item_id"]
    trained = set(part.train[key].itertuples(index=False, name=None))
    held_out = [set(cases[key].itertuples(index=False, name=None)) for turns in (part.valid, part.test)
                for _, cases in turns]
    test = set.union(*held_out[len(part.valid):])
    assert test and not trained & test
    if protocol != "temporal":  # whose validation lies inside the training part, and is fitted before it
        assert not trained & set.union(*held_out[:len(part.valid)])
    for turns in (part.valid, part.test):
        for history, cases in turns:
            known = set(history[key].itertuples(index=False, name=None))
            assert not known & set(cases[key].itertuples(index=False, name=None))
            latest = history.groupby("user_id")["timestamp"].max()
            assert (cases["timestamp"] > cases["user_id"].map(latest)).all()


def test_scores_of_others_are_judged_case_by_case(ratings, tmp_path):
    part = results.cut(ratings, "last-5")
    matrix = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    results.write_cases(tmp_path, part, IDS, matrix)
    cases, histories = (pd.read_csv(tmp_path / f"test{kind}.csv") for kind in ("", "_histories"))
    assert len(cases) == 60 and cases["case"].is_unique
    for case in (0, 17, 59):  # a case's history is all that its user had rated until then
        row = cases.set_index("case").loc[case]
        before = ratings[(ratings["user_id"] == row["user_id"]) & (ratings["timestamp"] < row["timestamp"])]
        assert histories.loc[histories["case"] == case, "item_id"].tolist() == before["item_id"].tolist()
    oracle = np.zeros((60, 30), np.float16)
    oracle[cases["case"], cases["item_id"]] = 1
    oracle[7] *= -1  # one case is answered wrongly: the film comes last
    (tmp_path / "scores").mkdir()
    np.save(tmp_path / "scores" / "oracle-0.npy", oracle)
    for known in ({"name": "oracle", "seeds": 1, "cpu_s": 2, "tried": []}, {"name": "slow", "seeds": 0}):
        (tmp_path / "scores" / f"{known['name']}.json").write_text(json.dumps(known))
    meta, = results.records(tmp_path)
    scores, = results.read_scores(tmp_path, meta)
    turns = results.framed(part.test, IDS, matrix)
    judged = results.judged_scores(scores, turns, None)
    wrong = cases.set_index("case").loc[7, "user_id"]
    expected = np.where(np.arange(12) == wrong, 0.8, 1.0)
    assert meta["name"] == "oracle" and judged["HR@10"].to_numpy() == pytest.approx(expected)
    assert results.read_scores(tmp_path, meta, " valid") == []


def test_scores_of_others_take_a_memory_as_a_policy_does(ratings):
    part = results.cut(ratings, "last-5")
    matrix = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    turns, term = results.framed(part.test, IDS, matrix), fit_user_history(part.train, IDS, matrix, 10.0, 3.0, 0.2)
    silent = results.judged_scores(torch.zeros(60, 30), turns, None, term)
    policy = recommenders.policy(lambda state: torch.zeros(len(state), 4), term)
    pd.testing.assert_frame_equal(silent, results.user_metrics(results.ranked(policy, turns)))


def test_the_supervised_baseline_chooses_the_history_term_and_a_tilt_keeps_its_ranking(monkeypatch):
    monkeypatch.setattr(results, "policy_of", lambda agent, term=None: (agent, term, None, 0.0))
    monkeypatch.setattr(results.liking, "tilted", lambda policy, tilt, beta: (*policy[:2], tilt, beta))
    monkeypatch.setattr(results, "CHOOSING_SEEDS", 2)
    good, poor = (lambda *_: None), (lambda *_: None)

    def users_of(policy):
        (name, seed), term, _, beta = policy
        ndcg = 0.1 + 0.01 * (term.weight == 4.0) + 0.001 * (term.matrix == 200) - 0.02 * term.rating_slope
        ndcg -= beta * 0.0041 + (name == "DDPG") * 0.02 + seed / 1000
        return pd.DataFrame({"NDCG@10": [ndcg], "reward@10": [0.4 + beta / 10]})

    histories = {ridge: UserHistory(ridge, 1.0) for ridge in results.RIDGES}
    agents = {name: [((name, seed), 1.0) for seed in range(5)] for name in ("supervised baseline", "DDPG")}
    chosen, tried = results.choose_all(agents, histories, {"good": good, "poor": poor}, users_of)
    assert chosen["user_history"] == {"ridge": 200, "weight": 4.0, "rating_slope": 0.0}
    # 3 % of 0.1105 are spent at β = 0.8; DDPG has not that much to begin with, and is left as it is
    assert chosen["beta"] == {"supervised baseline, good": 0.8, "supervised baseline, poor": 0.8, "DDPG, good": 0.0,
                              "DDPG, poor": 0.0}
    assert [len(some) for some in tried.values()] == [len(results.RIDGES) * len(results.SAYS), 4 * len(results.BETAS)]
    assert tried["histories"][0] == {"ridge": 100, "weight": 2.0, "rating_slope": 0.0, "ndcg@10": 0.0995,
                                     "reward@10": 0.4}


def test_differences_are_paired_and_rows_say_their_spread():
    users = {"a": pd.DataFrame({"NDCG@10": [0.5, 0.7, 0.9]}), "b": pd.DataFrame({"NDCG@10": [0.4, 0.6, 0.8]})}
    assert results.difference(users, "a", "b") == {"one": "a", "other": "b", "metric": "ndcg@10", "difference": 0.1,
                                                   "low": 0.1, "high": 0.1, "ratio": 1.167}
    row, mean = results.judged_row("a", "rl", "last-1", list(users.values()), 3.14159)
    assert row["ndcg@10"] == 0.65 and row["std"] == 0.0707 and row["seeds"] == 2 and row["cpu_s"] == 3.1
    assert mean["NDCG@10"].tolist() == pytest.approx([0.45, 0.65, 0.85])


def test_estimates_of_another_policy_by_hand():
    reward, weight = np.array([1.0, 2.0, 4.0]), np.array([0.5, 1.0, 2.0])
    model_logged, model_policy = np.array([1.0, 1.0, 3.0]), np.array([2.0, 2.0, 3.0])
    said = off_policy(reward, weight, model_logged, model_policy)
    assert said["IPS"] == pytest.approx((0.5 + 2 + 8) / 3) and said["SN"] == pytest.approx((0.5 + 2 + 8) / 3.5)
    assert said["DR"] == pytest.approx((2 + (2 + 1) + (3 + 2)) / 3) and said["model alone"] == pytest.approx(7 / 3)
    assert said["effective cases"] == pytest.approx(3.5 ** 2 / 5.25)
    assert said["mean weight"] == pytest.approx(3.5 / 3)
    assert 2 <= said["DR low"] < said["DR"] < said["DR high"] <= 5
    alike = np.repeat([0.0, 1.0], 50)  # fifty steps of a user say no more than one
    assert over_users(alike, np.repeat([0, 1], 50)) == (0, 1)
    low, high = over_users(alike, np.arange(100))
    assert 0.35 < low < 0.45 and 0.55 < high < 0.65


def test_a_policys_judge_asks_the_policy_about_the_next_state_and_learns(twenty_users: Frames):
    asked = []

    def choose(state):
        asked.append(state)
        return twenty_users.items[:1].expand(len(state), -1)

    judge, index = new_judge(0, twenty_users, hidden_size=32), torch.arange(9)
    t = twenty_users.gather(index)
    with torch.no_grad():
        y = t.reward + 0.9 * judge["critic_target"](t.next_state, twenty_users.items[:1].expand(9, -1))
        loss = (judge["critic"](t.state, t.action) - y).square().mean()
    assert fqe_update(judge, twenty_users, index, choose=choose, gamma=0.9, tau=0.1)["loss/critic"].item() == \
        pytest.approx(loss.item(), rel=1e-5)
    assert torch.equal(asked[0], t.next_state)
    learn = partial(fqe_update, judge, twenty_users, torch.arange(len(twenty_users)), choose=None, gamma=0.0, tau=0.5)
    losses = [learn()["loss/critic"].item() for _ in range(201)]  # without a discount, of its reward alone
    assert losses[-1] < losses[0] / 3


def test_only_ratings_of_one_second_change_places_and_each_order_comes():
    torch.manual_seed(0)
    orders = {tuple(baselines.shuffled([7, 8, 9, 5], [1.0, 2.0, 2.0, 3.0])) for _ in range(40)}
    assert orders == {(7, 8, 9, 5), (7, 9, 8, 5)}


def test_metrics_of_a_slate_with_several_hits_by_hand():
    ranked = pd.DataFrame({"user_id": [1, 1, 1, 1, 2, 3], "rating": [5.0, 4.0, 2.0, 4.5, 5.0, 3.0],
                           "rank": [1, 3, 2, 40, 11, 1]})
    metrics = results.user_metrics(ranked, relevant=4.0)
    best = 1 + 1 / np.log2(3) + 1 / 2  # three relevant films at the ranks 1, 2, 3
    assert metrics.index.tolist() == [1, 2]  # user 3 has nothing relevant
    assert metrics.loc[1].tolist() == pytest.approx([(1 + 1 / 2) / best, 1, 1, 5 + 3 - 1])
    assert metrics.loc[2].tolist() == pytest.approx([0, 0, 1 / 11, 0])
    plain = results.user_metrics(ranked)
    assert plain.loc[1, "HR@10"] == 3 / 4 and plain.index.tolist() == [1, 2, 3]
    scores = np.random.default_rng(0).permutation(30).astype(float)
    relevant = np.random.default_rng(1).choice(30, 13, replace=False)
    ranked = pd.DataFrame({"user_id": 1, "rating": 5.0, "rank": (scores[:, None] <= scores).sum(axis=1)[relevant]})
    truth = np.isin(np.arange(30), relevant)[None].astype(float)
    of_many = results.user_metrics(ranked, relevant=4.0).loc[1, "NDCG@10"]
    assert of_many == pytest.approx(ndcg_score(truth, scores[None], k=10))


@pytest.mark.parametrize(("slates", "coverage", "diversity", "novelty"), [
    ([[0, 1], [0, 2]], 3 / 5, (0 + 1) / 2, -(2 * np.log2(3 / 4) + 2 * np.log2(1 / 4)) / 4),
    ([[0, 2], [1, -1]], 3 / 5, 1, -(np.log2(3 / 4) + 2 * np.log2(1 / 4)) / 3),  # an empty place counts for nothing
    ([[0], [2]], 2 / 5, 0, -np.log2(3 / 16) / 2)])
def test_what_slates_are_like_by_hand(item_ids, slates, coverage, diversity, novelty):
    train = pd.DataFrame({"user_id": [1, 2, 3, 3, 4], "item_id": [50, 50, 50, 50, 10]})
    similarity = np.array([[1.0, 0], [2, 0], [0, 3], [0, 0], [1, 1]])
    like = results.slate_metrics(np.array(slates), similarity, train, item_ids)
    assert like == pytest.approx({"coverage": coverage, "diversity": diversity, "novelty": novelty})
