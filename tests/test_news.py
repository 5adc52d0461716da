import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import ndcg_score, roc_auc_score

from helpers import datasets
from helpers.agents import your_data
from helpers.extra import news
from helpers.extra.news import (
    all_shown,
    clicks_before,
    draw_skipped,
    impression_metrics,
    pages_of,
    part_of,
    read_mind,
    states_before,
    states_of_pages,
    texts_of,
)
from helpers.files import DataError
from helpers.frames import Frames

ARTICLES = ('N8\tsports\tgolf\tThe "Open" begins\tAll about it\thttps://x/8\t[]\t[]\n'
            "N3\tnews\tworld\tRain\t\thttps://x/3\t[]\t[]\n"
            "N5\tnews\tworld\t\t\t\t\t\n"
            "N1\tfood\tbread\t\"Dough\tRises\t\t\t\n")
LOG = ("1\tU9\t11/15/2019 9:05:58 AM\tN8 N3\tN5-0 N1-1 N8-0\n"
       "2\tU10\t11/15/2019 12:00:00 AM\t\tN1-0 N3-0\n"
       "3\tU9\t11/15/2019 12:00:01 PM\tN8 N3\tN3-1 N5-1\n"
       "4\tU10\t11/14/2019 11:59:59 PM\t\tN8-1 N1-0\n")
NOON = int(pd.Timestamp("2019-11-15 12:00").timestamp())


@pytest.fixture
def read(raw):
    """Return a function that reads texts of behaviors.tsv and news.tsv, written to one new folder."""
    return lambda behaviors=LOG, articles=ARTICLES: read_mind(raw({"behaviors.tsv": behaviors, "news.tsv": articles}))


def clicks_of(log, user):
    rows = log.ratings[log.ratings["user_id"].map(log.user_names) == user]
    return log.item_names[rows["item_id"]].tolist(), rows["timestamp"].tolist()


# --- what is read

def test_a_log_begins_with_the_history_and_goes_on_with_the_clicks(read):
    log = read()
    items, times = clicks_of(log, "U9")
    morning = int(pd.Timestamp("2019-11-15 09:05:58").timestamp())
    assert items == ["N8", "N3", "N1", "N3", "N5"]
    assert times == [morning - 2, morning - 1, morning, NOON + 1, NOON + 1]
    assert log.ratings["rating"].tolist() == [5] * 6
    assert log.ratings.dtypes.to_dict() == datasets.RATING_TYPES and list(log.ratings) == datasets.RATING_COLUMNS
    assert log.impression_of.tolist() == [3, -1, -1, 0, 2, 2]


def test_ids_are_numbered_from_one_and_given_back(read):
    log = read()
    assert log.user_names.to_dict() == {1: "U10", 2: "U9"}
    assert log.item_names.to_dict() == {1: "N8", 2: "N3", 3: "N5", 4: "N1"}
    assert log.items["item_id"].tolist() == [1, 2, 3, 4]


def test_midnight_and_noon_of_a_twelve_hour_clock(read):
    hours = pd.to_datetime(read().impressions["timestamp"], unit="s").dt.hour.tolist()
    assert hours == [9, 0, 12, 23]


def test_everything_shown_is_kept_with_its_label_in_the_order_of_the_file(read):
    log = read()
    assert log.shown["impression"].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert log.item_names[log.shown["item_id"]].tolist() == ["N5", "N1", "N8", "N1", "N3", "N3", "N5", "N8", "N1"]
    assert log.shown["clicked"].tolist() == [False, True, False, False, False, True, True, True, False]
    assert log.impressions["impression_id"].tolist() == ["1", "2", "3", "4"]
    assert log.user_names[log.impressions["user_id"]].tolist() == ["U9", "U10", "U9", "U10"]


def test_quotation_marks_are_letters_and_texts_may_be_missing(read):
    items = read().items
    assert items["title"].tolist() == ['The "Open" begins', "Rain", "", '"Dough']
    assert texts_of(items) == {1: 'The "Open" begins. All about it', 2: "Rain", 3: "", 4: '"Dough. Rises'}


def test_an_item_that_news_lacks_comes_last_without_a_text(read):
    log = read(LOG + "5\tU9\t11/16/2019 1:00:00 AM\tN8\tN77-1 N78-0 N8-0\n"
               + "6\tU1\t11/16/2019 1:00:00 AM\tN79\tN77-0 N8-0\n")
    assert log.item_names[[5, 6, 7]].tolist() == ["N79", "N77", "N78"]
    assert log.items.iloc[4:][["title", "abstract", "category"]].eq("").all(axis=None)
    assert clicks_of(log, "U9")[0][-1] == "N77" and clicks_of(log, "U1")[0] == ["N79"]


def test_only_the_history_of_the_earliest_impression_is_read(read):
    later_first = ("1\tU1\t11/16/2019 9:00:00 AM\tN8 N3\tN5-0 N1-0\n"
                   "2\tU1\t11/15/2019 9:00:00 AM\tN8\tN3-1 N1-0\n")
    assert clicks_of(read(later_first), "U1")[0] == ["N8", "N3"]


def test_readers_without_a_history_or_a_click_are_in_the_impressions_alone(read):
    log = read("1\tU1\t11/15/2019 9:00:00 AM\t\tN8-0 N3-0\n" + LOG.replace("1\tU9", "7\tU9", 1))
    assert log.user_names.tolist() == ["U1", "U10", "U9"]
    assert 1 not in log.ratings["user_id"].tolist() and 1 in log.impressions["user_id"].tolist()


def test_a_log_without_any_click_is_refused_but_a_history_is_enough(read):
    assert clicks_of(read("1\tU1\t11/15/2019 9:00:00 AM\tN8\tN3-0\n"), "U1")[0] == ["N8"]
    with pytest.raises(DataError, match=r"behaviors.tsv: nobody has clicked anything"):
        read("1\tU1\t11/15/2019 9:00:00 AM\t\tN3-0 N8-0\n")


def test_a_click_that_comes_twice_is_two_steps(read):
    log = read("1\tU1\t11/15/2019 9:00:00 AM\tN8\tN8-1 N3-0\n2\tU1\t11/15/2019 9:00:00 AM\tN8\tN8-1 N3-0\n")
    assert clicks_of(log, "U1")[0] == ["N8", "N8", "N8"]


def test_two_folders_are_one_log(raw):
    train = raw({"behaviors.tsv": LOG, "news.tsv": ARTICLES})
    dev = raw({"behaviors.tsv": "1\tU9\t11/17/2019 9:00:00 AM\tN8 N3 N1\tN2-1 N8-0\n",
               "news.tsv": "N2\tnews\tworld\tSnow\t\t\t\t\nN3\tnews\tworld\tAnother text\t\t\t\t\n"})
    log = read_mind(train, dev)
    assert clicks_of(log, "U9")[0] == ["N8", "N3", "N1", "N3", "N5", "N2"]
    assert log.impressions["part"].tolist() == [0, 0, 0, 0, 1]
    assert part_of(log)[log.ratings["user_id"] == 2].tolist() == [0, 0, 0, 0, 0, 1]
    assert part_of(read_mind(dev, train))[log.ratings["user_id"] == 2].tolist() == [1, 1, 1, 1, 1, 0]
    assert log.item_names.tolist() == ["N8", "N3", "N5", "N1", "N2"] and log.items["title"][1] == "Rain"


def test_lines_may_end_as_on_windows_and_be_blank(read):
    plain, other = read(), read("\ufeff" + LOG.replace("\n", "\r\n\r\n"), ARTICLES.replace("\n", "\r\n"))
    for one, two in zip(plain, other, strict=True):
        pd.testing.assert_frame_equal(pd.DataFrame(one), pd.DataFrame(two))


def test_spaces_too_many_make_no_items(read):
    log = read(LOG.replace("N8 N3\tN5-0 N1-1", " N8  N3 \t N5-0  N1-1", 1))
    for one, two in zip(read(), log, strict=True):
        pd.testing.assert_frame_equal(pd.DataFrame(one), pd.DataFrame(two))


def test_pieces_of_a_large_file_make_the_same_log(read, monkeypatch):
    whole = read()
    read_options = news.pyarrow.csv.ReadOptions
    monkeypatch.setattr(news.pyarrow.csv, "ReadOptions", lambda **options: read_options(**options | {"block_size": 70}))
    for one, two in zip(whole, read(), strict=True):
        pd.testing.assert_frame_equal(pd.DataFrame(one), pd.DataFrame(two))


# --- what is refused

@pytest.mark.parametrize("old, new, sentence", [
    ("\tN1-0 N3-0", "", r"line 2: 4 values separated by tabs; expected 5: impression_id, user_id, time"),
    ("N1-0 N3-0", "N1-0\tN3-0", r"line 2: 6 values separated by tabs"),
    ("N1-0 N3-0", "", r"line 2: the impression shows no news"),
    ("N1-0 N3-0", "N1-0 N3", r"line 2: 'N3' does not say whether it was clicked, as N45-1 or N45-0 do"),
    ("N1-0 N3-0", "N1-0 N3-2", r"line 2: 'N3-2' does not say"),
    ("N1-0 N3-0", "-1", r"line 2: '-1' does not say"),
    ("12:00:01 PM", "12:00:01", r"line 3: time '11/15/2019 12:00:01' is not a time such as .* \(1 such"),
    ("12:00:01 PM", "13:00:01 PM", r"line 3: time"),
    ("12:00:01 PM", "0:00:01 PM", r"line 3: time"),
    ("11/15/2019 12:00:01", "15/11/2019 12:00:01", r"line 3: time"),
    ("3\tU9", "3\t ", r"line 3: user_id '' is empty"),
    ("3\tU9", "1\tU9", r"line 3: impression_id '1' stands on an earlier line already"),
    ("3\tU9", "\tU9", r"line 3: impression_id '' is empty"),
])
def test_a_damaged_line_of_behaviors_is_named(read, old, new, sentence):
    assert LOG.count(old) == 1
    with pytest.raises(DataError, match=r"raw\d/behaviors.tsv, " + sentence):
        read(LOG.replace(old, new))


@pytest.mark.parametrize("old, new, sentence", [
    ("N5\tnews\tworld\t\t\t\t\t\n", "N5\tnews\n", r"line 3: 2 values separated by tabs; expected 8: news_id"),
    ("N5", "", r"line 3: news_id '' is not an id without spaces"),
    ("N5", "N 5", r"line 3: news_id 'N 5' is not an id"),
    ("N5", "N3", r"line 3: news_id 'N3' stands on an earlier line with another text"),
])
def test_a_damaged_line_of_news_is_named(read, old, new, sentence):
    with pytest.raises(DataError, match=r"raw\d/news.tsv, " + sentence):
        read(articles=ARTICLES.replace(old, new, 1))


def test_the_line_is_counted_with_blank_ones_and_from_the_start_of_its_own_file(raw, read):
    with pytest.raises(DataError, match=r"behaviors.tsv, line 4: 'N3' does not say"):
        read(LOG.replace("2\tU10", "\n\n2\tU10", 1).replace("N3-0", "N3", 1))
    good = raw({"behaviors.tsv": LOG, "news.tsv": ARTICLES})
    bad = raw({"behaviors.tsv": LOG.replace("N3-0", "N3", 1), "news.tsv": ARTICLES})
    with pytest.raises(DataError, match=rf"{bad.name}/behaviors.tsv, line 2: 'N3' does not say"):
        read_mind(good, bad)


def test_a_line_repeated_in_news_is_one_item(read):
    assert read(articles=ARTICLES + ARTICLES).item_names.tolist() == ["N8", "N3", "N5", "N1"]


@pytest.mark.parametrize("name", ["behaviors.tsv", "news.tsv"])
def test_bytes_that_are_not_utf8_an_empty_file_and_a_missing_one(raw, name):
    files = {"behaviors.tsv": LOG.encode(), "news.tsv": ARTICLES.encode()}
    damaged = files[name].replace(b"N3", b"N\xe9", 1)
    line = damaged[:damaged.find(b"\xe9")].count(b"\n") + 1
    with pytest.raises(DataError, match=rf"{name}, line {line} is not UTF-8"):
        read_mind(raw(files | {name: damaged}))
    for nothing in (b"", b"\n\n"):
        with pytest.raises(DataError, match=rf"{name} is empty"):
            read_mind(raw(files | {name: nothing}))
    with pytest.raises(DataError, match=rf"{name} is not there: a folder in the MIND format"):
        read_mind(raw({key: value for key, value in files.items() if key != name}))


# --- what is made of it

def test_all_shown_gives_clicks_a_reward_and_skips_a_penalty_in_the_order_of_time(read):
    log = read()
    shown = all_shown(log)
    assert log.item_names[shown["item_id"]].tolist() == ["N8", "N1", "N1", "N3", "N5", "N1", "N8", "N3", "N5"]
    assert shown["rating"].tolist() == [5, 2, 2, 2, 2, 5, 2, 5, 5]
    assert shown.dtypes.to_dict() == datasets.RATING_TYPES and shown["timestamp"].is_monotonic_increasing


def test_skipped_items_come_from_the_same_impression(read):
    log, rng = read(), np.random.default_rng(0)
    pages = pages_of(log)
    drawn = np.array([draw_skipped(pages, np.arange(len(log.ratings)), rng) for _ in range(50)])
    assert [sorted(set(column)) for column in drawn.T] == [[4], [-1], [-1], [1, 3], [-1], [-1]]


def test_states_hold_what_was_clicked_before_that_second_and_nothing_of_others(read):
    log = read()
    matrix = np.arange(1, 9, dtype=np.float32).reshape(4, 2)  # of N8, N3, N5, N1
    frames = Frames(log.ratings, log.items["item_id"].to_numpy(), matrix, frame_size=2)
    states = states_before(frames, log.ratings, np.array([2, 2, 2, 2, 1, 1, 3]),
                           NOON + np.array([1, 2, -10**6, 10**6, -43201, -43200, 0]))
    nothing = [0] * 6
    assert states.tolist() == [[3, 4, 7, 8, 5, 5], [3, 4, 5, 6, 5, 5], nothing, [3, 4, 5, 6, 5, 5],
                               nothing, [0, 0, 1, 2, 0, 5], nothing]
    assert torch.equal(states[[3]], frames.last_states(np.array([2])))
    with pytest.raises(DataError, match="frames of 6 ratings are asked about a log of 5"):
        states_before(frames, log.ratings[:5], np.array([1]), np.array([NOON]))
    with pytest.raises(DataError, match="not in the order of user_id and timestamp"):
        states_before(frames, log.ratings[::-1], np.array([1]), np.array([NOON]))


def test_the_state_of_a_page_is_the_one_before_it_was_shown(read):
    log = read()
    matrix = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
    frames, rows = Frames(log.ratings, log.items["item_id"].to_numpy(), matrix, frame_size=2), np.arange(6)
    states = states_of_pages(frames, pages_of(log), rows)
    before = states_before(frames, log.ratings, log.ratings["user_id"].to_numpy(), log.ratings["timestamp"].to_numpy())
    assert torch.equal(states, before)
    same_page = log.impression_of[4:6]
    assert same_page[0] == same_page[1] >= 0 and torch.equal(states[4], states[5])


def test_clicks_before_counts_everyones_and_not_that_seconds(read):
    log = read()
    when = log.ratings["timestamp"].max()
    assert clicks_before(log.ratings, np.array([1, 2, 2, 3, 4]), np.array([when, when, when + 1, when + 1, 0])) \
        .tolist() == [2, 1, 2, 1, 0]


# --- how a ranking is judged

def test_metrics_by_hand():
    score = {"a": [0.9, 0.8, 0.1, 0.2], "b": [3, 2, 1], "c": [1, 2], "d": [1, 2]}
    clicked = {"a": [0, 1, 0, 0], "b": [1, 0, 1], "c": [0, 0], "d": [1, 1]}
    rows = [(name, *pair) for name in score for pair in zip(clicked[name], score[name], strict=True)]
    table = impression_metrics(*(np.array(column) for column in zip(*rows, strict=True)))
    assert list(table.index) == ["a", "b"]  # the others have no order to find
    assert table.loc["a"].tolist() == pytest.approx([2 / 3, 1 / 2, 1 / np.log2(3), 1 / np.log2(3)])
    best = 1 + 1 / np.log2(3)
    assert table.loc["b"].tolist() == pytest.approx([1 / 2, (1 + 1 / 3) / 2, 1.5 / best, 1.5 / best])


def test_metrics_agree_with_sklearn_on_many_impressions_in_any_order_of_rows():
    rng = np.random.default_rng(0)
    impression, clicked = rng.integers(60, size=1500), rng.random(1500) < 0.2
    score = rng.normal(size=1500)
    table = impression_metrics(impression, clicked, score)
    for name, row in table.iterrows():
        own = impression == name
        assert row["AUC"] == pytest.approx(roc_auc_score(clicked[own], score[own]))
        for k in (5, 10):
            assert row[f"nDCG@{k}"] == pytest.approx(ndcg_score([clicked[own]], [score[own]], k=k))
        ranks = (-score[own]).argsort().argsort()[clicked[own]] + 1
        assert row["MRR"] == pytest.approx((1 / ranks).mean())
    assert len(table) == 60


def test_ties_are_half_right_in_auc_and_count_against_the_method_in_ranks():
    table = impression_metrics(np.zeros(4), np.array([1, 0, 0, 0]), np.array([1.0, 1, 1, 0]))
    assert table.loc[0].tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 2, 1 / 2])


def test_a_score_that_is_no_number_never_helps():
    right = np.array([1, 0, 0])
    perfect = impression_metrics(np.zeros(3), right, np.array([3.0, 2, 1])).loc[0]
    for score in ([np.nan, 2, 1], [np.nan, np.nan, np.nan]):
        worst = impression_metrics(np.zeros(3), right, np.array(score)).loc[0]
        assert worst["AUC"] == 0 and worst["MRR"] == 1 / 3 < perfect["MRR"]


def test_no_impressions_give_an_empty_table():
    nothing = np.array([])
    table = impression_metrics(nothing.astype(int), nothing.astype(bool), nothing)
    assert table.shape == (0, 4) and list(table) == ["AUC", "MRR", "nDCG@5", "nDCG@10"]
    assert table.index.name == "impression"


# --- the lesson's own step

def test_a_skip_is_a_transition_of_its_own_that_leaves_the_reader_where_she_is(read):
    lesson, log = your_data, read()
    matrix = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
    frames = Frames(log.ratings, log.items["item_id"].to_numpy(), matrix, frame_size=2)
    index = torch.arange(len(frames))  # U9's clicks on N1, beside which N8 and N5 were skipped, then on N3 and N5
    pages = pages_of(log)
    skipped = lesson.skips_beside(index, frames, pages, np.random.default_rng(0))
    assert skipped[0] in (0, 2) and skipped[1:].tolist() == [-1, -1]
    clicks = lesson.as_the_page_was_shown(frames.gather(index), index, frames, pages)
    assert torch.equal(clicks.state[1], clicks.state[2])  # N3 and N5 were clicked on one page
    both = lesson.with_skips(clicks, frames.items, skipped)
    assert [len(field) for field in both] == [4] * 5
    for field, own in zip(both, clicks, strict=True):
        assert torch.equal(field[:3], own)
    assert torch.equal(both.state[3], clicks.state[0]) and torch.equal(both.next_state[3], clicks.state[0])
    assert both.reward[:, 0].tolist() == [5, 5, 5, -1] and both.done[3] == 0
    assert torch.equal(both.action[3], frames.items[skipped[0]])
