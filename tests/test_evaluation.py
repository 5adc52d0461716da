from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import evaluation, recommenders
from helpers.evaluation import bootstrap, case_metrics, mask_seen, rank_held_out, split_last, together
from helpers.files import DataError
from helpers.frames import Frames

NAN = float("nan")


def table(rows: list[tuple], *columns: str) -> pd.DataFrame:
    """Return rows of (user_id, item_id, *columns), rated 4 stars if they do not say."""
    named = pd.DataFrame(rows, columns=["user_id", "item_id", *columns])
    return named if "rating" in columns else named.assign(rating=4.0)


@pytest.fixture
def log():
    """Users 1 (four in one second), 2 (too short for two held-out ratings), 3 (just long enough)."""
    return table([(1, 10, 5), (1, 30, 7), (1, 20, 7), (1, 50, 7), (1, 40, 7), (2, 10, 1), (2, 20, 2),
                  (3, 50, 4), (3, 30, 4), (3, 10, 4)], "timestamp")


@pytest.fixture
def frames_of(item_ids, item_matrix):
    """Return a function from {user: items, oldest first} to frames; the catalogue is 50, 10, 40, 20, 30."""
    def build(logs: dict[int, list[int]]) -> Frames:
        rows = [(user, item, step) for user, items in logs.items() for step, item in enumerate(items)]
        return Frames(table(rows, "timestamp"), item_ids, item_matrix, frame_size=2)
    return build


def pairs(part):
    return list(zip(part["user_id"].tolist(), part["item_id"].tolist(), strict=True))


def constant(*scores):
    return lambda history, user_ids: torch.tensor(scores).expand(len(user_ids), -1)


@pytest.mark.parametrize(("options", "train", "valid", "test"), [
    ({}, [(1, 10), (1, 30), (1, 20), (2, 10), (2, 20), (3, 50)], [(1, 50), (3, 30)], [(1, 40), (3, 10)]),
    ({"n_test": 2, "n_valid": 1}, [(1, 10), (1, 30), (2, 10), (2, 20), (3, 50), (3, 30), (3, 10)], [(1, 20)],
     [(1, 50), (1, 40)]),
    ({"n_valid": 0}, [(1, 10), (1, 30), (1, 20), (1, 50), (2, 10), (3, 50), (3, 30)], [], [(1, 40), (2, 20), (3, 10)]),
])
def test_the_last_ratings_of_users_with_enough_are_held_out(log, options, train, valid, test):
    split = split_last(log, **options)
    assert (pairs(split.train), pairs(split.valid), pairs(split.test)) == (train, valid, test)
    assert all(part.index.tolist() == list(range(len(part))) for part in split)
    pd.testing.assert_frame_equal(together(*split), log)
    turned = table([(1, 1, 40), (1, 2, 30), (1, 3, 20), (1, 4, 10)], "timestamp")  # the order of rows chooses nothing
    assert split_last(turned).test["item_id"].tolist() == [1]
    turns = evaluation.rolling_cases(turned.iloc[3:], turned.iloc[:3])  # in turn, with the true history before each
    assert [[part["item_id"].tolist() for part in turn] for turn in turns] == [[[4], [3]], [[4, 3], [2]],
                                                                               [[4, 3, 2], [1]]]
    with pytest.raises(DataError, match="5 ratings"):
        split_last(log, n_test=3, n_valid=2)
    before, after = evaluation.split_time(turned, share=0.25, at_least=1)
    assert before["item_id"].tolist() == [4, 3, 2] and after["item_id"].tolist() == [1]


def test_a_cut_in_time_is_one_moment_for_all_and_keeps_what_is_new_to_a_known_user():
    log = table([(1, item, item, 4.0) for item in range(10)] + [(2, 0, 5, 3.0)] + [
        (1, 3, 90, 5.0), (1, 50, 91, 5.0), (1, 50, 92, 2.0), (2, 51, 93, 5.0), (3, 52, 94, 5.0)], "timestamp", "rating")
    before, after = evaluation.split_time(log, share=5 / 16, at_least=10)
    assert before["timestamp"].max() < 90 and len(before) == 11 and after.index.tolist() == [0]
    assert pairs(after) == [(1, 50)] and after["rating"].item() == 5  # 3 is known, users 2, 3 new
    with pytest.raises(DataError, match="100 ratings"):
        evaluation.split_time(log, share=5 / 16, at_least=100)


def test_seen_items_are_minus_infinity_and_others_untouched(frames, item_ids):
    scores, users = torch.arange(10.0).reshape(2, 5) - 20, np.array([5, 2])
    seen = torch.tensor(np.stack([np.isin(item_ids, [20, 40]), np.isin(item_ids, [30, 50, 20])]))
    masked = mask_seen(scores, frames, users)
    assert torch.equal(masked, torch.where(seen, -torch.inf, torch.arange(10.0).reshape(2, 5) - 20))
    assert torch.equal(masked, mask_seen(scores.numpy(), frames, users)) and scores.isfinite().all()


# items 50, 10, 40, 20, 30; user 5 has seen 40 and 20, user 2 has seen 30, 50 and 20
@pytest.mark.parametrize(("scores", "cases", "ranks"), [
    ([5.0, 4.0, 9.0, 8.0, 3.0], [(5, 50), (5, 10), (5, 30), (2, 10), (2, 40)], [1, 2, 3, 2, 1]),
    ([0.0] * 5, [(5, 10), (2, 40)], [3, 2]),  # ties count against the method
    ([NAN, 5.0, 1.0, 1.0, 1.0], [(5, 10)], [2]),  # and so does what is no number: here of another item,
    ([1.0, NAN, 1.0, 1.0, 1.0], [(5, 10)], [5]), ([NAN] * 5, [(5, 10)], [5])])  # here of its own
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_rank_counts_the_unseen_items_scored_as_high_or_higher(frames, scores, cases, ranks, batch_size):
    ranked = rank_held_out(constant(*scores), frames, table(cases), batch_size)
    assert ranked["rank"].tolist() == ranks and pairs(ranked) == cases


def test_every_user_is_ranked_by_their_own_scores_and_without_gradients(frames):
    with_gradients, weight = [], torch.ones(1, requires_grad=True)

    def by_state(history, user_ids):
        scores = history.last_states(user_ids)[:, :3] @ history.items.T * weight
        with_gradients.append(scores.requires_grad)
        return scores

    cases = table([(5, 50), (2, 10), (7, 10), (5, 30), (2, 40)])
    at_once, alone = (rank_held_out(by_state, frames, cases, size)["rank"].tolist() for size in (100, 1))
    assert at_once == alone and len(set(alone)) > 1
    assert evaluation.slates_of(by_state, frames, np.array([5, 2]), k=1).shape == (2, 1) and not any(with_gradients)


def test_a_catalogue_is_scored_in_blocks_of_bounded_memory(frames, monkeypatch):
    asked, ids = [], np.arange(200_000)
    monkeypatch.setattr(evaluation, "mask_seen", lambda scores, *_: scores)
    monkeypatch.setattr(frames, "item_ids", ids)

    def recommend(history, user_ids):
        asked.append(len(user_ids))
        return torch.zeros(len(user_ids), 1).expand(-1, len(ids))
    rank_held_out(recommend, frames, table([(5, 10)] * 400))
    assert max(asked) * len(ids) <= 1 << 25 and len(asked) == 3


def test_what_cannot_be_ranked_is_refused_and_repeats_are_counted_aloud(frames):
    for cases, sentence in (([(5, 10), (5, 11)], "ids 11"), ([(99, 10)], "99"), ([], "nothing")):
        with pytest.raises(DataError, match=sentence):
            rank_held_out(constant(*[0.0] * 5), frames, table(cases))
    cases = table([(2, 30), (2, 50), (2, 20), (5, 10), (5, 30), (5, 50), (2, 10)])
    with pytest.warns(UserWarning, match="3 of 7"):
        assert rank_held_out(recommenders.random(), frames, cases)["rank"].tolist()[:3] == [5, 5, 5]


def test_metrics_of_a_case_by_hand():
    ranked = pd.DataFrame({"rank": [1, 3, 10, 11], "rating": [5.0, 0.5, 3.0, 5.0]})
    metrics = case_metrics(ranked)
    np.testing.assert_allclose(metrics["NDCG@10"], [1, 1 / 2, 1 / np.log2(11), 0])
    np.testing.assert_allclose(metrics["MRR"], [1, 1 / 3, 1 / 10, 1 / 11])
    assert metrics["HR@10"].tolist() == [1, 1, 1, 0] and metrics["reward@10"].tolist() == [5, -4, 1, 0]


def test_interval_is_that_of_the_mean_and_reproducible():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(400), rel=0.1)
    assert bootstrap(values) == (low, high) != bootstrap(values, seed=1)


def test_a_slate_holds_unseen_items_with_a_score_and_empty_places(frames_of):
    history = frames_of({1: [50, 10, 40, 20], 2: [50, 10, 40, 20, 30], 5: [20, 40]})
    by_row, odd = constant(0.0, 1.0, 2.0, 3.0, 4.0), constant(NAN, 0.1, 0.2, 0.3, -torch.inf)
    assert evaluation.slates_of(by_row, history, np.array([1, 2]), 2).tolist() == [[4, -1], [-1, -1]]
    assert evaluation.slates_of(by_row, history, np.array([5]), 3).tolist() == [[4, 1, 0]]
    assert evaluation.slates_of(odd, history, np.array([5]), 3).tolist() == [[1, -1, -1]]
    with pytest.raises(DataError, match="slate of 6 items"):
        evaluation.slates_of(by_row, history, np.array([1]), 6)


def test_compare_averages_seeds_and_differences_are_paired(frames_of, tmp_path):
    held_out, history = table([(1, 30, 5.0), (2, 40, 1.0)], "rating"), frames_of({1: [10, 20, 50], 2: [30, 50, 20]})
    first, last = constant(0.0, 0.0, 0.0, 0.0, 1.0), constant(0.0, 0.0, 1.0, 0.0, 0.0)  # items 30 and 40
    result, cases = evaluation.compare({"first": [first], "both": [first, last]}, history, held_out)
    second = 1 / np.log2(3)  # of two unseen items
    assert cases["first"]["NDCG@10"].tolist() == pytest.approx([1, second])
    assert cases["both"]["NDCG@10"].tolist() == pytest.approx([(1 + second) / 2] * 2)
    assert result["model"].tolist() == ["first", "both"] and result["NDCG@10"].tolist() == [0.815, 0.815]
    assert result["NDCG@10 over seeds"].tolist() == ["", "± 0.0000"]
    assert result["95 % over users"].tolist() == ["0.631 – 1.000", "0.815 – 0.815"]
    assert evaluation.ndcg(first, history, held_out) == pytest.approx((1 + second) / 2)

    evaluation.write_cases(tmp_path / "cases.csv", cases)
    again = evaluation.read_cases(tmp_path / "cases.csv")
    assert list(again) == ["first", "both"]
    pd.testing.assert_frame_equal(again["both"], cases["both"])
    minus = evaluation.differences(again, "both", ["both", "first"])
    assert minus["NDCG@10"].tolist() == ["+0.000  [+0.000, +0.000]", "+0.000  [-0.185, +0.185]"]
    assert minus["both minus …"].tolist() == ["both", "first"]


def test_observed_returns_by_hand_and_never_across_users(frames):
    total, left = evaluation.observed_returns(frames, 0.5)
    # rewards of the transitions: user 1: 5, 0, 1, −2; user 2: 2; user 7: −1, −4
    assert total.tolist() == [5 + 0 + 1 / 4 - 2 / 8, 0 + 1 / 2 - 2 / 4, 1 - 2 / 2, -2, 2, -1 - 4 / 2, -4]
    assert left.tolist() == [4, 3, 2, 1, 1, 2, 1]


def test_predictions_stand_beside_the_returns_of_the_same_transitions(frames):
    def value(state, action):
        return state[:, :1] + 10 * action[:, :1]

    told = evaluation.calibration(value, frames, 0.5, at_least=2, choose=lambda state: -state[:, :3])
    rows = [0, 1, 2, 5]  # those with two steps to come
    assert told.index.tolist() == rows
    assert told["observed"].tolist() == evaluation.observed_returns(frames, 0.5)[0][rows].tolist()
    t = frames.gather(torch.tensor(rows))
    for name, action in (("predicted", t.action), ("own", -t.state[:, :3])):
        assert told[name].tolist() == pytest.approx(value(t.state, action)[:, 0].tolist(), rel=1e-6)
    with pytest.warns(UserWarning, match="77 steps"):
        assert list(evaluation.calibration(value, frames, 0.5, at_least=77)) == ["predicted", "observed"]


def test_random_scores_repeat_for_a_seed(frames):
    one, again, other = (recommenders.random(seed)(frames, np.array([1, 2, 5])) for seed in (3, 3, 4))
    assert one.shape == (3, 5) and torch.equal(one, again) and not torch.equal(one, other)


def ease_in_closed_form(x, ridge):
    p = np.linalg.inv(x.T @ x + ridge * np.eye(x.shape[1]))
    b = np.eye(x.shape[1]) - p @ np.diag(1 / np.diag(p))
    np.fill_diagonal(b, 0)
    return b


@pytest.mark.parametrize(("rated", "last", "decay", "weights"), [  # of the items 50, 10, 40, 20, 30
    ([50, 40, 30, 20], 100, 1.0, [1, 0, 1, 1, 1]),
    ([50, 40, 30, 20], 2, 0.5, [0, 0, 0, 1, 1 / 2]),
    ([10, 20, 10], 3, 0.5, [0, 1, 0, 1 / 2, 0])])  # an item taken twice weighs as its latest time
def test_ease_is_its_closed_form_and_weighs_the_last_items_by_their_age(ratings, item_ids, frames_of, rated, last,
                                                                        decay, weights):
    x = (pd.crosstab(ratings["user_id"], ratings["item_id"])[item_ids].to_numpy() > 0).astype(float)
    recommend = recommenders.ease(recommenders.fit_ease(ratings, item_ids, 2.0), last, decay)
    history = frames_of({4: rated, 9: [10]})
    np.testing.assert_allclose(recommend(history, np.array([9, 4])),
                               [[0, 1, 0, 0, 0], weights] @ ease_in_closed_form(x, 2.0), atol=1e-5)
    with pytest.raises(DataError, match="99"):
        recommend(history, np.array([99]))


def test_ease_on_the_popular_items_leaves_the_others_at_zero(frames, item_ids):
    train = table([(1, 10), (1, 20), (2, 10), (2, 20), (3, 10), (3, 30), (4, 20)])
    with pytest.warns(UserWarning, match="2 most rated of 3"):
        fitted = recommenders.fit_ease(train, item_ids, 1.0, most=2)
    scores = recommenders.ease(fitted, 9, 1.0)(frames, np.array([1, 5]))
    expected = np.zeros((2, 5))  # users 1 and 5 have rated 10 and 20, and 20
    expected[:, [1, 3]] = [[1, 1], [0, 1]] @ ease_in_closed_form(np.array([[1.0, 1], [1, 1], [1, 0], [0, 1]]), 1.0)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_policy_is_asked_in_evaluation_mode_and_left_as_it_was(frames, training, fails):
    actor, expected = torch.nn.Module(), frames.items[2:3] @ frames.items.T / 3 ** 0.5  # 40 came last

    def forward(state):
        assert (actor.training, actor.dropout.training, torch.is_grad_enabled()) == (False, False, False)
        if fails:
            raise RuntimeError("no memory")
        return actor.dropout(state[:, 3:6])
    actor.forward, actor.dropout = forward, torch.nn.Dropout(0.5)
    actor.train(training)
    with pytest.raises(RuntimeError, match="no memory") if fails else nullcontext():
        torch.testing.assert_close(recommenders.policy(actor)(frames, np.array([5])), expected)
    assert actor.training is training and actor.dropout.training is training
    torch.testing.assert_close(recommenders.policy(lambda state: state[:, 3:6])(frames, np.array([5])), expected)
