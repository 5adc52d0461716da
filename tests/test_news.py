import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import ndcg_score, roc_auc_score

from helpers import tables
from helpers.agents import your_data
from helpers.extra import news
from helpers.extra.news import impression_metrics, read_mind, states_before
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
FILES = {"behaviors.tsv": LOG, "news.tsv": ARTICLES}
NOON = int(pd.Timestamp("2019-11-15 12:00").timestamp())
DAY = "11/15/2019 9:00:00 AM"


@pytest.fixture
def read(raw):
    """Return a function that reads texts of behaviors.tsv and news.tsv, written to one new folder."""
    return lambda behaviors=LOG, articles=ARTICLES: read_mind(raw({"behaviors.tsv": behaviors, "news.tsv": articles}))


def clicks_of(log, user):
    return log.item_names[log.ratings["item_id"][log.ratings["user_id"].map(log.user_names) == user]].tolist()


def frames_of(log):
    matrix = np.arange(1, 9, dtype=np.float32).reshape(4, 2)  # of N8, N3, N5, N1
    return Frames(log.ratings, log.items["item_id"].to_numpy(), matrix, frame_size=2)


def test_a_log_begins_with_the_history_and_goes_on_with_the_clicks(read):
    log, morning = read(), int(pd.Timestamp("2019-11-15 09:05:58").timestamp())
    assert clicks_of(log, "U9") == ["N8", "N3", "N1", "N3", "N5"] and clicks_of(log, "U10") == ["N8"]
    assert log.ratings["timestamp"].tolist() == [NOON - 43_201, morning - 2, morning - 1, morning, NOON + 1, NOON + 1]
    assert log.ratings["rating"].tolist() == [5] * 6 and log.impression_of.tolist() == [3, -1, -1, 0, 2, 2]
    assert log.ratings.dtypes.to_dict() == tables.RATING_TYPES and list(log.ratings) == tables.RATING_COLUMNS
    assert log.user_names.to_dict() == {1: "U10", 2: "U9"}
    assert log.item_names.to_dict() == {1: "N8", 2: "N3", 3: "N5", 4: "N1"}


def test_everything_shown_is_kept_with_its_label_and_rewarded_in_the_order_of_time(read):
    log = read()
    assert log.shown["impression"].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert log.item_names[log.shown["item_id"]].tolist() == ["N5", "N1", "N8", "N1", "N3", "N3", "N5", "N8", "N1"]
    assert log.shown["clicked"].tolist() == [False, True, False, False, False, True, True, True, False]
    assert log.shown.dtypes.tolist() == [np.int32, np.int32, bool]
    assert log.impressions["impression_id"].tolist() == ["1", "2", "3", "4"]
    assert log.user_names[log.impressions["user_id"]].tolist() == ["U9", "U10", "U9", "U10"]
    assert pd.to_datetime(log.impressions["timestamp"], unit="s").dt.hour.tolist() == [9, 0, 12, 23]  # AM and PM
    rewarded = news.all_shown(log)
    assert log.item_names[rewarded["item_id"]].tolist() == ["N8", "N1", "N1", "N3", "N5", "N1", "N8", "N3", "N5"]
    assert rewarded["rating"].tolist() == [5, 2, 2, 2, 2, 5, 2, 5, 5] and rewarded["timestamp"].is_monotonic_increasing
    assert rewarded.dtypes.to_dict() == tables.RATING_TYPES


def test_texts_keep_quotation_marks_and_may_be_missing_and_unknown_items_come_last(read):
    log = read(LOG + "5\tU9\t11/16/2019 1:00:00 AM\tN8\tN77-1 N78-0 N8-0\n"
               + "6\tU1\t11/16/2019 1:00:00 AM\tN79\tN77-0 N8-0\n")
    assert list(news.texts_of(log.items).items())[:4] == [(1, 'The "Open" begins. All about it'), (2, "Rain"), (3, ""),
                                                          (4, '"Dough. Rises')]
    assert log.item_names[[5, 6, 7]].tolist() == ["N79", "N77", "N78"]
    assert log.items["item_id"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert log.items.iloc[4:][["title", "abstract", "category", "subcategory"]].eq("").all(axis=None)
    assert clicks_of(log, "U9")[-1] == "N77" and clicks_of(log, "U1") == ["N79"]


@pytest.mark.parametrize("behaviors, clicks", [
    (f"1\tU1\t11/16/2019 9:00:00 AM\tN8 N3\tN5-0\n2\tU1\t{DAY}\tN8\tN3-1\n", ["N8", "N3"]),  # the earliest history
    (f"1\tU1\t{DAY}\tN8\tN3-0\n", ["N8"]),
    (f"1\tU1\t{DAY}\tN8\tN8-1 N3-0\n2\tU1\t{DAY}\tN8\tN8-1 N3-0\n", ["N8", "N8", "N8"]),
    (f"1\tU1\t{DAY}\t\tN8-0 N3-0\n" + LOG.replace("1\tU9", "7\tU9", 1), []),
])
def test_what_a_reader_has_clicked(read, behaviors, clicks):
    log = read(behaviors)
    assert clicks_of(log, "U1") == clicks and "U1" in log.user_names[log.impressions["user_id"]].tolist()


def test_two_folders_are_one_log(raw):
    train = raw({"behaviors.tsv": LOG, "news.tsv": ARTICLES})
    dev = raw({"behaviors.tsv": "1\tU9\t11/17/2019 9:00:00 AM\tN8 N3 N1\tN2-1 N8-0\n",
               "news.tsv": "N2\tnews\tworld\tSnow\t\t\t\t\nN3\tnews\tworld\tAnother text\t\t\t\t\n"})
    log = read_mind(train, dev)
    assert clicks_of(log, "U9") == ["N8", "N3", "N1", "N3", "N5", "N2"]
    assert log.impressions["part"].tolist() == [0, 0, 0, 0, 1]
    assert news.part_of(log)[log.ratings["user_id"] == 2].tolist() == [0, 0, 0, 0, 0, 1]
    assert news.part_of(read_mind(dev, train))[log.ratings["user_id"] == 2].tolist() == [1, 1, 1, 1, 1, 0]
    assert log.item_names.tolist() == ["N8", "N3", "N5", "N1", "N2"] and log.items["title"][1] == "Rain"


@pytest.mark.parametrize("behaviors, articles", [
    ("\ufeff" + LOG.replace("\n", "\r\n\r\n"), ARTICLES.replace("\n", "\r\n")),       # as on Windows, and blank lines
    (LOG.replace("N8 N3\tN5-0 N1-1", " N8  N3 \t N5-0  N1-1", 1), ARTICLES),          # spaces too many
    (LOG.replace("12:00:00 AM", " 12:00:00 AM "), ARTICLES + ARTICLES),               # a line twice is one item
])
def test_harmless_differences_make_the_same_log(read, behaviors, articles):
    for one, two in zip(read(), read(behaviors, articles), strict=True):
        pd.testing.assert_frame_equal(pd.DataFrame(one), pd.DataFrame(two))


@pytest.mark.parametrize("old, new, words", [
    ("\tN1-0 N3-0", "", "line 2: text"),
    *[("N1-0 N3-0", bad, "line 2: impressions") for bad in ("", "N1-0 N3", "N1-0 N3-2", "-1")],
    ("12:00:01 PM", "13:00:01 PM", "line 3: time"), ("11/15/2019 12:00:01", "15/11/2019 12:00:01", "line 3: time"),
    ("3\tU9", "3\t ", "line 3: user_id"), ("3\tU9", "1\tU9", "line 3: impression_id"),
    ("3\tU9\t11/15/2019 12:00:01", "\n\n3\tU9\t", "line 5: time"),
    ("N5\tnews\tworld\t\t\t", "N5\tnews", "line 3: text"),
    *[("N5\tnews", f"{bad}\tnews", "line 3: news_id") for bad in ("N 5", "news_id", "N3")],
])
def test_a_damaged_line_is_named(raw, old, new, words):
    name = "behaviors.tsv" if old in LOG else "news.tsv"
    assert FILES[name].count(old) == 1
    good, bad = raw(FILES), raw(FILES | {name: FILES[name].replace(old, new)})
    for folders in ([bad], [good, bad]):
        with pytest.raises(DataError, match=f"{bad.name}/{name}, {words}"):
            read_mind(*folders)


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_text_and_a_log_without_clicks_are_refused(raw, name):
    damaged = FILES[name].encode().replace(b"N3", b"N\xe9", 1)
    line = damaged[:damaged.find(b"\xe9")].count(b"\n") + 1
    for content, words in ((damaged, f", line {line}"), ("", ""), ("\n\n", "")):
        with pytest.raises(DataError, match=name + words):
            read_mind(raw(FILES | {name: content}))
    with pytest.raises(DataError, match=name):
        read_mind(raw({key: text for key, text in FILES.items() if key != name}))
    with pytest.raises(DataError, match="nobody has clicked"):
        read_mind(raw(FILES | {"behaviors.tsv": f"1\tU1\t{DAY}\t\tN3-0 N8-0\n"}))


def test_states_and_counts_hold_what_was_clicked_before_that_second(read):
    log = read()
    frames, ratings = frames_of(log), log.ratings
    states = states_before(frames, ratings, np.array([2, 2, 2, 2, 1, 1, 3, 1]),
                           NOON + np.array([1, 2, -10**6, 10**6, -43201, -43200, 0, 10**12]))
    assert states.tolist() == [[3, 4, 7, 8, 5, 5], [3, 4, 5, 6, 5, 5], [0] * 6, [3, 4, 5, 6, 5, 5],
                               [0] * 6, [0, 0, 1, 2, 0, 5], [0] * 6, [0, 0, 1, 2, 0, 5]]
    assert torch.equal(states[[3]], frames.last_states(np.array([2])))
    of_pages = news.states_of_pages(frames, news.pages_of(log), np.arange(6))  # the last two were clicked on one page
    assert torch.equal(of_pages, states_before(frames, ratings, ratings["user_id"], ratings["timestamp"]))
    for other in (ratings[:5], ratings[::-1]):
        with pytest.raises(DataError, match="frames of 6"):
            states_before(frames, other, np.array([1]), np.array([NOON]))
    when = ratings["timestamp"].max() + np.array([0, 0, 1, 1, -NOON])
    assert news.clicks_before(ratings, np.array([1, 2, 2, 3, 4]), when).tolist() == [2, 1, 2, 1, 0]  # by anyone


@pytest.mark.parametrize("clicked, score, expected", [
    ([1, 0, 0, 0], [1, 1, 1, 0], [2 / 3, 1 / 3, 1 / 2, 1 / 2]),  # ties are half right in AUC, and wrong in ranks
    ([1, 0, 0], [np.nan, 2, 1], [0, 1 / 3, 1 / 2, 1 / 2]),       # no number never helps
    ([1, 0, 0], [1, np.nan, np.nan], [0, 1 / 3, 1 / 2, 1 / 2]),
    ([0, 0], [1, 2], None), ([1, 1], [1, 2], None), ([], [], None),  # no order to find
])
def test_metrics_by_hand(clicked, score, expected):
    table = impression_metrics(np.zeros(len(score), int), np.array(clicked, bool), np.array(score, float))
    assert list(table) == ["AUC", "MRR", "nDCG@5", "nDCG@10"] and table.index.name == "impression"
    assert table.to_numpy().ravel().tolist() == pytest.approx(expected or [])


def test_metrics_agree_with_sklearn_on_many_impressions_in_any_order_of_rows():
    rng = np.random.default_rng(0)
    impression, clicked, score = rng.integers(60, size=1500), rng.random(1500) < 0.2, rng.normal(size=1500)
    table = impression_metrics(impression, clicked, score)
    assert table.index.tolist() == list(range(60))
    for name, row in table.iterrows():
        own = impression == name
        assert row["AUC"] == pytest.approx(roc_auc_score(clicked[own], score[own]))
        assert row["MRR"] == pytest.approx((1 / ((-score[own]).argsort().argsort()[clicked[own]] + 1)).mean())
        for k in (5, 10):
            assert row[f"nDCG@{k}"] == pytest.approx(ndcg_score([clicked[own]], [score[own]], k=k))


def test_a_skip_is_of_the_same_page_and_a_transition_that_leaves_the_reader_where_she_is(read):
    log = read()
    frames, pages = frames_of(log), news.pages_of(log)
    drawn = np.array([news.draw_skipped(pages, np.arange(6), np.random.default_rng(seed)) for seed in range(50)])
    assert [sorted(set(column)) for column in drawn.T] == [[4], [-1], [-1], [1, 3], [-1], [-1]]
    index = torch.arange(len(frames))  # U9's clicks on N1, beside which N8 and N5 were skipped, then on N3 and N5
    skipped = your_data.skips_beside(index, frames, pages, np.random.default_rng(0))
    assert skipped[0] in (0, 2) and skipped[1:].tolist() == [-1, -1]
    clicks = your_data.as_the_page_was_shown(frames.gather(index), index, frames, pages)
    assert torch.equal(clicks.state[1], clicks.state[2])  # N3 and N5 were clicked on one page
    both = your_data.with_skips(clicks, frames.items, skipped)
    skip = (clicks.state[0], frames.items[skipped[0]], torch.tensor([-1.0]), clicks.state[0], torch.tensor([0.0]))
    for field, own, last in zip(both, clicks, skip, strict=True):
        assert torch.equal(field, torch.cat([own, last[None]]))
