import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import ndcg_score

from helpers import evaluation, recommenders
from helpers.evaluation import (
    bootstrap,
    case_metrics,
    mask_seen,
    rank_held_out,
    split_last,
    together,
)
from helpers.files import DataError
from helpers.frames import Frames


@pytest.fixture
def log():
    """Users 1 (four in one second), 2 (too short for two held-out ratings), 3 (just long enough)."""
    rows = [(1, 10, 5), (1, 30, 7), (1, 20, 7), (1, 50, 7), (1, 40, 7), (2, 10, 1), (2, 20, 2),
            (3, 50, 4), (3, 30, 4), (3, 10, 4)]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).assign(rating=4.0)


def pairs(part):
    return list(zip(part["user_id"].tolist(), part["item_id"].tolist(), strict=True))


def constant(scores):
    return lambda history, user_ids: torch.tensor(scores).expand(len(user_ids), -1)


def held_out(*rows):
    return pd.DataFrame(rows, columns=["user_id", "item_id"]).assign(rating=4.0)


# --- splits

def test_last_rating_is_test_and_the_one_before_validation(log):
    split = split_last(log)
    assert pairs(split.test) == [(1, 40), (3, 10)]
    assert pairs(split.valid) == [(1, 50), (3, 30)]
    assert pairs(split.train) == [(1, 10), (1, 30), (1, 20), (2, 10), (2, 20), (3, 50)]


def test_user_too_short_to_train_on_stays_in_training(log):
    split = split_last(log, n_test=2, n_valid=1)
    assert pairs(split.test) == [(1, 50), (1, 40)] and pairs(split.valid) == [(1, 20)]
    assert {2, 3}.isdisjoint(split.test["user_id"]) and len(split.train) == 7


def test_no_validation_part_on_demand(log):
    split = split_last(log, n_test=1, n_valid=0)
    assert pairs(split.test) == [(1, 40), (2, 20), (3, 10)] and len(split.valid) == 0


def test_parts_are_indexed_from_zero_and_disjoint(log):
    split = split_last(log)
    assert all(part.index.tolist() == list(range(len(part))) for part in split)
    assert sorted(pairs(split.train) + pairs(split.valid) + pairs(split.test)) == sorted(pairs(log))


def test_nothing_to_hold_out_gets_a_sentence(log):
    with pytest.raises(DataError, match="no user has more than 5 ratings"):
        split_last(log, n_test=3, n_valid=2)


def test_parts_together_are_the_log_again(log):
    split = split_last(log)
    pd.testing.assert_frame_equal(together(*split), log)
    assert pairs(together(split.train, split.valid))[:4] == [(1, 10), (1, 30), (1, 20), (1, 50)]


# --- ranks

def test_seen_items_are_minus_infinity_and_others_untouched(frames, item_ids):
    scores = torch.arange(10.0).reshape(2, 5) - 20
    before = scores.clone()
    masked = mask_seen(scores, frames, np.array([5, 2]))  # seen: 20, 40 and 30, 50, 20
    seen = np.array([[item in (20, 40) for item in item_ids], [item in (30, 50, 20) for item in item_ids]])
    np.testing.assert_array_equal(masked.numpy() == -np.inf, seen)
    np.testing.assert_array_equal(masked.numpy()[~seen], before.numpy()[~seen])
    assert torch.equal(scores, before)


def test_seen_item_never_enters_the_slate_even_when_every_score_is_negative(frames, item_ids):
    scores = torch.where(torch.tensor([item in (20, 40) for item in item_ids]), -0.001, -1000.0).expand(1, -1)
    slate = mask_seen(scores, frames, np.array([5])).topk(3).indices[0]
    assert set(item_ids[slate].tolist()) == {10, 30, 50}


def test_mask_of_a_stranger_gets_a_sentence(frames):
    with pytest.raises(DataError, match="99"):
        mask_seen(torch.zeros(2, 5), frames, np.array([5, 99]))


def test_mask_takes_scores_as_a_plain_array(frames):
    assert torch.isinf(mask_seen(np.zeros((1, 5)), frames, np.array([5]))).sum() == 2


def test_rank_counts_the_unseen_items_scored_above(frames):
    recommend = constant([5.0, 4.0, 9.0, 8.0, 3.0])  # items 50, 10, 40, 20, 30; user 5 saw 40 and 20
    ranked = rank_held_out(recommend, frames, held_out((5, 50), (5, 10), (5, 30), (2, 10), (2, 40)))
    assert ranked["rank"].tolist() == [1, 2, 3, 2, 1]
    assert pairs(ranked) == [(5, 50), (5, 10), (5, 30), (2, 10), (2, 40)]


def test_ties_count_against_the_method(frames):
    assert rank_held_out(constant([0.0] * 5), frames, held_out((5, 10), (2, 40)))["rank"].tolist() == [3, 2]


def test_score_that_is_no_number_ranks_last(frames):
    nan = float("nan")
    own = rank_held_out(constant([1.0, nan, 1.0, 1.0, 1.0]), frames, held_out((5, 10)))["rank"].item()
    assert own >= 3  # of three unseen items
    other = rank_held_out(constant([nan, 5.0, 1.0, 1.0, 1.0]), frames, held_out((5, 10)))["rank"].item()
    assert other == 2
    assert rank_held_out(constant([nan] * 5), frames, held_out((5, 10)))["rank"].item() >= 3


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_ranks_do_not_depend_on_the_batch_size(frames, batch_size):
    cases = held_out((5, 50), (1, 20), (2, 10), (5, 30), (2, 40))

    def recommend(history, user_ids):
        return history.last_states(user_ids)[:, :3] @ history.items.T

    ranks = rank_held_out(recommend, frames, cases, batch_size)["rank"].tolist()
    assert ranks == rank_held_out(recommend, frames, cases)["rank"].tolist()


def test_held_out_item_without_a_row_gets_a_sentence(frames):
    with pytest.raises(DataError, match="1 items have no row in the item matrix"):
        rank_held_out(constant([0.0] * 5), frames, held_out((5, 10), (5, 11)))


def test_held_out_user_without_a_log_gets_a_sentence(frames):
    with pytest.raises(DataError, match="99"):
        rank_held_out(constant([0.0] * 5), frames, held_out((99, 10)))


def test_no_cases_are_refused_with_a_sentence(frames):
    with pytest.raises(DataError, match="nothing is held out"):
        rank_held_out(constant([0.0] * 5), frames, held_out())


def test_ranking_needs_no_gradients(frames):
    weight, with_gradient = torch.ones(1, 5, requires_grad=True), []

    def recommend(history, user_ids):
        with_gradient.append((weight * 2).requires_grad)
        return weight * 2

    rank_held_out(recommend, frames, held_out((5, 10)))
    assert with_gradient == [False]


# --- metrics

def test_metrics_by_hand():
    ranked = pd.DataFrame({"rank": [1, 3, 10, 11], "rating": [5.0, 0.5, 3.0, 5.0]})
    metrics = case_metrics(ranked)
    np.testing.assert_allclose(metrics["NDCG@10"], [1, 1 / 2, 1 / np.log2(11), 0])
    assert metrics["HR@10"].tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(metrics["MRR"], [1, 1 / 3, 1 / 10, 1 / 11])
    assert metrics["reward@10"].tolist() == [5, -4, 1, 0]


def test_metrics_are_named_and_cut_at_k():
    metrics = case_metrics(pd.DataFrame({"rank": [2, 3], "rating": [4.0, 4.0]}), k=2)
    assert metrics["HR@2"].tolist() == [1, 0] and metrics["reward@2"].tolist() == [3, 0]
    np.testing.assert_allclose(metrics["NDCG@2"], [1 / np.log2(3), 0])


def test_interval_holds_the_mean_and_is_reproducible():
    values = np.random.default_rng(1).exponential(size=80)
    low, high = bootstrap(values)
    assert low < values.mean() < high
    assert bootstrap(values) == (low, high) and bootstrap(values, seed=1) != (low, high)


def test_interval_is_as_wide_as_the_standard_error_says():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(400), rel=0.1)


def test_interval_of_equal_values_has_no_width():
    assert bootstrap(np.full(9, 0.25)) == (0.25, 0.25)


# --- recommenders

def test_popularity_counts_the_training_part(frames, item_ids):
    train = pd.DataFrame({"item_id": [10, 10, 30, 20, 10, 30]})
    scores = recommenders.popularity(train)(frames, np.array([1, 5]))
    assert scores.tolist() == [[0, 3, 0, 1, 2]] * 2  # items 50, 10, 40, 20, 30


def test_random_scores_repeat_for_a_seed(frames):
    users = np.array([1, 2, 5])
    assert torch.equal(recommenders.random(3)(frames, users), recommenders.random(3)(frames, users))
    assert not torch.equal(recommenders.random(3)(frames, users), recommenders.random(4)(frames, users))
    assert recommenders.random()(frames, users).shape == (3, 5)


def ease_in_closed_form(x, ridge):
    p = np.linalg.inv(x.T @ x + ridge * np.eye(x.shape[1]))
    b = np.eye(x.shape[1]) - p @ np.diag(1 / np.diag(p))
    np.fill_diagonal(b, 0)
    return b


def test_ease_is_its_closed_form(frames, ratings, item_ids):
    x = (pd.crosstab(ratings["user_id"], ratings["item_id"])[item_ids].to_numpy() > 0).astype(float)
    scores = recommenders.ease(recommenders.fit_ease(ratings, item_ids, 2.0), 100, 1.0)(frames, np.array([1, 2, 5, 7]))
    np.testing.assert_allclose(scores, x @ ease_in_closed_form(x, 2.0), atol=1e-5)


def test_ease_weighs_the_last_items_by_their_age(frames, ratings, item_ids):
    x = (pd.crosstab(ratings["user_id"], ratings["item_id"])[item_ids].to_numpy() > 0).astype(float)
    scores = recommenders.ease(recommenders.fit_ease(ratings, item_ids, 2.0), 2, 0.5)(frames, np.array([7, 5]))
    # items 50, 10, 40, 20, 30: user 7 ends with 30, 20; user 5 with 20, 40
    weights = np.array([[0, 0, 0, 1, 1 / 2], [0, 0, 1, 1 / 2, 0]])
    np.testing.assert_allclose(scores, weights @ ease_in_closed_form(x, 2.0), atol=1e-5)


def test_item_taken_twice_weighs_as_its_latest_time(ratings, item_ids, item_matrix):
    x = (pd.crosstab(ratings["user_id"], ratings["item_id"])[item_ids].to_numpy() > 0).astype(float)
    log = pd.DataFrame({"user_id": 4, "item_id": [10, 20, 10], "rating": 3.0, "timestamp": [1, 2, 3]})
    history = Frames(log, item_ids, item_matrix, 2)
    scores = recommenders.ease(recommenders.fit_ease(ratings, item_ids, 2.0), 3, 0.5)(history, np.array([4]))
    np.testing.assert_allclose(scores, np.array([[0, 1, 0, 1 / 2, 0]]) @ ease_in_closed_form(x, 2.0), atol=1e-5)


def test_ease_on_the_popular_items_leaves_the_others_at_zero(frames, item_ids):
    train = pd.DataFrame({"user_id": [1, 1, 2, 2, 3, 3, 4], "item_id": [10, 20, 10, 20, 10, 30, 20]})
    fitted = recommenders.fit_ease(train, item_ids, 1.0, most=2)
    scores = recommenders.ease(fitted, 9, 1.0)(frames, np.array([1, 5])).numpy()
    b = ease_in_closed_form(np.array([[1.0, 1], [1, 1], [1, 0], [0, 1]]), 1.0)  # items 10 and 20
    expected = np.zeros((2, 5))
    expected[0, [1, 3]] = np.array([1, 1]) @ b
    expected[1, [1, 3]] = np.array([0, 1]) @ b
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_ease_refuses_a_stranger(frames, ratings, item_ids):
    with pytest.raises(DataError, match="99"):
        recommenders.ease(recommenders.fit_ease(ratings, item_ids, 1.0), 9, 1.0)(frames, np.array([99]))


class Probe(torch.nn.Module):
    def __init__(self, fail=False):
        super().__init__()
        self.dropout, self.fail, self.modes = torch.nn.Dropout(0.5), fail, []

    def forward(self, state):
        self.modes.append((self.training, self.dropout.training, torch.is_grad_enabled()))
        if self.fail:
            raise RuntimeError("no memory")
        return self.dropout(state[:, :3])


@pytest.mark.parametrize("training", [True, False])
def test_policy_is_asked_in_evaluation_mode_and_left_as_it_was(frames, training):
    actor = Probe().train(training)
    users = np.array([7, 1])
    scores = recommenders.policy(actor)(frames, users)
    assert actor.modes == [(False, False, False)]
    assert actor.training is training and actor.dropout.training is training
    torch.testing.assert_close(scores, frames.last_states(users)[:, :3] @ frames.items.T)


def test_policy_that_fails_is_left_as_it_was(frames):
    actor = Probe(fail=True).train()
    with pytest.raises(RuntimeError):
        recommenders.policy(actor)(frames, np.array([7]))
    assert actor.training


def test_policy_can_be_a_plain_function(frames):
    scores = recommenders.policy(lambda state: state[:, 3:6])(frames, np.array([5]))
    torch.testing.assert_close(scores, frames.items[2:3] @ frames.items.T)  # item 40 was the last


def test_recommender_that_knows_the_item_ranks_it_first(frames, item_ids):
    def oracle(history, user_ids):
        return torch.nn.functional.one_hot(torch.tensor([1] * len(user_ids)), 5).float() - 7

    metrics = case_metrics(rank_held_out(oracle, frames, held_out((5, 10), (2, 10), (7, 10))))
    assert metrics["NDCG@10"].tolist() == [1, 1, 1]


def test_observed_returns_by_hand_and_never_across_users(frames):
    total, left = evaluation.observed_returns(frames, 0.5)
    # rewards of the transitions: user 1: 5, 0, 1, −2; user 2: 2; user 7: −1, −4
    assert total.tolist() == [5 + 0 + 1 / 4 - 2 / 8, 0 + 1 / 2 - 2 / 4, 1 - 2 / 2, -2, 2, -1 - 4 / 2, -4]
    assert left.tolist() == [4, 3, 2, 1, 1, 2, 1]


def test_promises_stand_beside_the_returns_of_the_same_transitions(frames):
    def value(state, action):
        return state[:, :1] + 10 * action[:, :1]

    told = evaluation.calibration(value, frames, 0.5, at_least=2, choose=lambda state: -state[:, :3])
    total, left = evaluation.observed_returns(frames, 0.5)
    t = frames.gather(torch.arange(len(frames)))
    assert told.index.tolist() == [i for i, n in enumerate(left.tolist()) if n >= 2] and len(told) > 1
    for i, row in told.iterrows():
        assert row["observed"] == total[i].item()
        assert row["promised"] == pytest.approx(value(t.state, t.action)[i].item(), rel=1e-6)
        assert row["own"] == pytest.approx(value(t.state, -t.state[:, :3])[i].item(), rel=1e-6)
    assert "own" not in evaluation.calibration(value, frames, 0.5, at_least=2)


def test_a_cut_in_time_is_one_moment_for_all_and_keeps_what_is_new_to_a_known_user():
    log = pd.DataFrame([(1, item, 4.0, item) for item in range(10)] + [(2, 0, 3.0, 5)]
                       + [(1, 3, 5.0, 90), (1, 50, 5.0, 91), (1, 50, 2.0, 92), (2, 51, 5.0, 93), (3, 52, 5.0, 94)],
                       columns=["user_id", "item_id", "rating", "timestamp"]).sort_values(["user_id", "timestamp"])
    before, after = evaluation.split_time(log, share=5 / 16, at_least=10)
    assert before["timestamp"].max() < 90 and len(before) == 11
    assert after[["user_id", "item_id", "rating"]].to_numpy().tolist() == [[1, 50, 5.0]]  # 3 is known, users 2, 3 new
    with pytest.raises(DataError, match="nobody with 100 ratings before the last 31% of the log"):
        evaluation.split_time(log, share=5 / 16, at_least=100)


def test_held_out_ratings_are_asked_in_turn_with_the_true_history_before_each(log):
    split = evaluation.split_last(log, 2, 2)
    turns = evaluation.rolling_cases(evaluation.together(split.train, split.valid), split.test)
    assert len(turns) == 2
    for number, (history, cases) in enumerate(turns):
        for case in cases.itertuples():
            whole = log.loc[log["user_id"] == case.user_id, "item_id"].tolist()
            known = history.loc[history["user_id"] == case.user_id, "item_id"].tolist()
            assert [*known, case.item_id] == whole[:len(whole) - 1 + number]


def test_metrics_of_a_slate_with_several_hits_by_hand():
    ranked = pd.DataFrame({"user_id": [1, 1, 1, 1, 2, 3], "rating": [5.0, 4.0, 2.0, 4.5, 5.0, 3.0],
                           "rank": [1, 3, 2, 40, 11, 1]})
    metrics = evaluation.user_metrics(ranked, relevant=4.0)
    best = 1 + 1 / np.log2(3) + 1 / 2  # three relevant films at the ranks 1, 2, 3
    assert metrics.index.tolist() == [1, 2]  # user 3 has nothing relevant
    assert metrics.loc[1].tolist() == pytest.approx([(1 + 1 / 2) / best, 1, 1, 5 + 3 - 1])
    assert metrics.loc[2].tolist() == pytest.approx([0, 0, 1 / 11, 0])
    plain = evaluation.user_metrics(ranked)
    assert plain.loc[1, "HR@10"] == 3 / 4 and plain.index.tolist() == [1, 2, 3]


def test_ndcg_of_many_hits_is_scikit_learns():
    scores = np.random.default_rng(0).permutation(30).astype(float)
    relevant = np.random.default_rng(1).choice(30, 13, replace=False)
    rank = (scores[:, None] <= scores).sum(axis=1)[relevant]
    ranked = pd.DataFrame({"user_id": 1, "rating": 5.0, "rank": rank})
    truth = np.isin(np.arange(30), relevant)[None].astype(float)
    assert evaluation.user_metrics(ranked, relevant=4.0).loc[1, "NDCG@10"] == \
        pytest.approx(ndcg_score(truth, scores[None], k=10))


def test_what_slates_are_like_by_hand(frames, item_ids):
    train = pd.DataFrame({"user_id": [1, 2, 3, 4], "item_id": [50, 50, 50, 10], "rating": 4.0, "timestamp": 0})
    similarity = np.array([[1.0, 0], [2, 0], [0, 3], [0, 0], [1, 1]])
    slates = np.array([[0, 1], [0, 2]])
    like = evaluation.slate_metrics(slates, similarity, train, item_ids)
    assert like["coverage"] == 3 / 5 and like["diversity"] == pytest.approx((0 + 1) / 2)
    assert like["novelty"] == pytest.approx(-(2 * np.log2(3 / 4) + 2 * np.log2(1 / 4)) / 4)
    seen = evaluation.slates_of(lambda history, users: torch.arange(5.0).expand(len(users), 5), frames,
                                frames.user_ids[2:3], k=3, batch_size=1)
    assert seen.tolist() == [[4, 1, 0]]  # user 5 has seen items 20 and 40, rows 3 and 2


def test_compare_averages_seeds_and_differences_are_paired(frames, tmp_path):
    held_out = pd.DataFrame({"user_id": [1, 2], "item_id": [30, 40], "rating": [5.0, 1.0], "timestamp": [900, 900]})
    history = frames_without(frames, held_out)
    first, last = (lambda history, users, best=best: (torch.as_tensor(history.item_ids) == best).float().expand(
        len(users), -1) for best in (30, 40))
    table, cases = evaluation.compare({"first": [first], "both": [first, last]}, history, held_out)
    assert table["model"].tolist() == ["first", "both"] and table["NDCG@10 over seeds"].tolist()[0] == ""
    alone = [evaluation.case_metrics(evaluation.rank_held_out(model, history, held_out)) for model in (first, last)]
    np.testing.assert_allclose(cases["both"]["NDCG@10"], (alone[0]["NDCG@10"] + alone[1]["NDCG@10"]) / 2)
    evaluation.write_cases(tmp_path / "cases.csv", cases)
    again = evaluation.read_cases(tmp_path / "cases.csv")
    assert list(again) == ["first", "both"]
    pd.testing.assert_frame_equal(again["both"], cases["both"])
    assert evaluation.differences(again, "both", ["both"])["NDCG@10"].tolist() == ["+0.000  [+0.000, +0.000]"]


def frames_without(frames, held_out):
    """Return the log of users 1 and 2 without the held-out items."""
    logs = {1: [(10, 4.0), (20, 0.5), (50, 5.0)], 2: [(30, 1.0), (50, 4.5), (20, 3.5)]}
    rows = [(user, item, rating, 100 * step) for user, log in logs.items() for step, (item, rating) in enumerate(log)]
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])
    return Frames(table, frames.item_ids, frames.items, frame_size=2)


def test_order_of_rows_does_not_choose_what_is_held_out():
    log = pd.DataFrame({"user_id": 1, "item_id": [1, 2, 3, 4], "rating": 4.0, "timestamp": [40, 30, 20, 10]})
    assert evaluation.split_last(log).test["item_id"].tolist() == [1]
    turns = evaluation.rolling_cases(log.iloc[3:], log.iloc[:3])
    assert [cases["item_id"].tolist() for _, cases in turns] == [[3], [2], [1]]
    before, after = evaluation.split_time(log, share=0.25, at_least=1)
    assert before["item_id"].tolist() == [4, 3, 2] and after["item_id"].tolist() == [1]


def small_catalogue():
    log = pd.DataFrame({"user_id": [1] * 3 + [2] * 4, "item_id": [0, 1, 2, 0, 1, 2, 3], "rating": 4.0,
                        "timestamp": range(7)})
    return Frames(log, np.arange(4), np.eye(4, dtype=np.float32), frame_size=2)


def test_a_slate_holds_unseen_items_alone_and_empty_places():
    def by_number(history, user_ids):
        return torch.arange(4.0).flip(0).expand(len(user_ids), -1)

    assert evaluation.slates_of(by_number, small_catalogue(), np.array([1, 2]), k=2).tolist() == [[3, -1], [-1, -1]]
    with pytest.raises(DataError, match=r"slate of 5 items .* catalogue of 4"):
        evaluation.slates_of(by_number, small_catalogue(), np.array([1]), k=5)


def test_an_item_scored_nan_is_on_no_slate():
    history = small_catalogue()
    fresh = Frames(pd.DataFrame({"user_id": 3, "item_id": [0, 0, 1], "rating": 4.0, "timestamp": range(3)}),
                   history.item_ids, history.items, frame_size=2)
    scores = torch.tensor([[0.1, 0.2, float("nan"), -torch.inf]])
    assert evaluation.slates_of(lambda *_: scores, fresh, np.array([3]), k=2).tolist() == [[-1, -1]]
    assert evaluation.slates_of(lambda *_: scores.nan_to_num(1), fresh, np.array([3]), k=2).tolist() == [[2, 3]]


def test_empty_places_count_for_nothing_and_a_slate_of_one_has_no_diversity():
    train = pd.DataFrame({"user_id": [1, 1, 2], "item_id": [0, 1, 0]})
    with_places = evaluation.slate_metrics(np.array([[0, 1], [1, -1]]), np.eye(4), train, np.arange(4))
    assert with_places == pytest.approx({"coverage": 2 / 4, "diversity": 1, "novelty": (0 + 1 + 1) / 3})
    assert evaluation.slate_metrics(np.array([[0], [1]]), np.eye(4), train, np.arange(4))["diversity"] == 0


def test_repeats_that_nothing_can_find_are_counted_aloud():
    history = small_catalogue()
    cases = pd.DataFrame({"user_id": [1, 2], "item_id": [3, 3], "rating": 4.0})
    with pytest.warns(UserWarning, match="1 of 2 held-out items had been rated before"):
        evaluation.rank_held_out(recommenders.random(), history, cases)
