"""Read news in the MIND format, look up what a reader had clicked by then, and rank what was shown.

Source: Wu et al. 2020, "MIND: A Large-scale Dataset for News Recommendation". A folder holds `behaviors.tsv` and
`news.tsv`, without headers, separated by tabs; a quotation mark is a letter like others.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from torch import Tensor

from helpers.files import DataError
from helpers.frames import Frames
from helpers.tables import RATING_COLUMNS, RATING_TYPES, in_order, refuse

BEHAVIORS = ["impression_id", "user_id", "time", "history", "impressions"]
NEWS = ["news_id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities"]
TIME = "%m/%d/%Y %I:%M:%S %p"     # 11/15/2019 9:05:58 AM
CLICKED, SKIPPED = 5.0, 2.0       # stars: rewards of 5 and −1
SPAN = 1 << 33                    # seconds from 1970 to the year 2242


class News(NamedTuple):
    """A log of news. Ids are numbered from 1: items in the order of `news.tsv`, users in alphabetical order."""

    ratings: pd.DataFrame      # clicks at 5 stars, as of `read_ratings`; histories lack times: one second apart, first
    impression_of: np.ndarray  # (len(ratings),) int32: the row of `impressions` of each click; −1 for the history
    impressions: pd.DataFrame  # impression_id, user_id, timestamp, part (0 for the first folder), as in the files
    shown: pd.DataFrame        # impression (a row of `impressions`, int32, rising), item_id int32, clicked bool
    items: pd.DataFrame        # item_id and texts, "" where there is none: category, subcategory, title, abstract
    user_names: pd.Series      # the id in the files by user_id
    item_names: pd.Series      # the id in the files by item_id; those that no news.tsv knows come last


def read_mind(*folders: Path) -> News:
    """Read one log from folders in the MIND format, such as the parts for training and for validation.

    Of a user's histories the one of the earliest impression is read: within a part of MIND the others repeat it. Times
    are taken for UTC. Of an item in two folders the first text counts. DataError: a missing file or a damaged line.
    """
    items = pd.concat([_read_items(folder / "news.tsv") for folder in folders]).drop_duplicates("news_id")
    visits = pd.concat([_read_behaviors(folder / "behaviors.tsv").assign(part=part)
                        for part, folder in enumerate(folders)], ignore_index=True)
    user_idx, users = pd.factorize(visits["user_id"], sort=True)
    visits["user_id"] = user_idx + 1
    earliest = visits.sort_values("timestamp", kind="stable").drop_duplicates("user_id").sort_index()
    history, labelled = _words(earliest["history"]), _words(visits["impressions"])
    item_idx, names = pd.factorize(pd.concat([items["news_id"], history, labelled.str[:-2]]))
    of_history, of_shown = np.split(item_idx[len(items):].astype(np.int32) + 1, [len(history)])
    shown = pd.DataFrame({"impression": labelled.index.astype(np.int32), "item_id": of_shown,
                          "clicked": labelled.str.endswith("-1").to_numpy()})
    ago = history.groupby(level=0).cumcount(ascending=False) + 1  # seconds before the first impression
    log = pd.concat([pd.DataFrame({"impression": history.index, "item_id": of_history, "ago": ago.to_numpy()}),
                     shown.loc[shown["clicked"], ["impression", "item_id"]].assign(ago=0)], ignore_index=True)
    if not len(log):
        raise DataError(f"{folders[0].name}/behaviors.tsv: nobody has clicked anything: there is nothing to learn from")
    log = log.join(visits[["user_id", "timestamp"]], on="impression")
    log = in_order(log.assign(rating=CLICKED, timestamp=log["timestamp"] - log["ago"]))
    item_ids = pd.RangeIndex(1, len(names) + 1, name="item_id")
    items = items.set_index("news_id").reindex(names, fill_value="").set_index(item_ids).reset_index()
    impression_of = np.where(log["ago"] > 0, -1, log["impression"]).astype(np.int32)
    return News(log[RATING_COLUMNS].astype(RATING_TYPES), impression_of,
                visits[["impression_id", "user_id", "timestamp", "part"]], shown, items,
                pd.Series(users, pd.RangeIndex(1, len(users) + 1, name="user_id"), name="user_id"),
                pd.Series(names, item_ids, name="news_id"))


def part_of(log: News) -> np.ndarray:
    """Return (len(ratings),): the part in which each click was logged; a history's is that of its impression."""
    by_time = log.impressions.sort_values("timestamp", kind="stable").drop_duplicates("user_id")
    of_history = by_time.set_index("user_id")["part"].loc[log.ratings["user_id"]].to_numpy()
    return np.where(log.impression_of < 0, of_history, log.impressions["part"].to_numpy()[log.impression_of])


def all_shown(log: News) -> pd.DataFrame:
    """Return everything shown as `ratings`: clicks at 5 stars (reward 5), skips, a milder sign, at 2 (reward −1)."""
    shown = log.shown.join(log.impressions[["user_id", "timestamp"]], on="impression")
    shown["rating"] = np.where(shown["clicked"], CLICKED, SKIPPED)
    return in_order(shown[RATING_COLUMNS].astype(RATING_TYPES))


def texts_of(items: pd.DataFrame) -> dict[int, str]:
    """Return {item_id: text}, the title and then the abstract; "" of an item with neither."""
    return (items["title"] + ". " + items["abstract"]).str.strip(". ").set_axis(items["item_id"]).to_dict()


class Pages(NamedTuple):
    """What stood beside each click, for rows of `ratings`; see `pages_of`."""

    begin: np.ndarray    # (n,) the first row of the reader's log
    before: np.ndarray   # (n,) the row at which the page's clicks begin: what is earlier was clicked before it
    first: np.ndarray    # (n,) where in `skipped` the items begin that the page showed in vain
    count: np.ndarray    # (n,) and how many they are
    skipped: np.ndarray  # item ids, by impression


def pages_of(log: News) -> Pages:
    """Look up the page of every click, once for all draws; a click of the history has one to itself, with no skips."""
    user, time = log.ratings["user_id"].to_numpy(), log.ratings["timestamp"].to_numpy()
    skipped = log.shown[~log.shown["clicked"]]
    count = np.bincount(skipped["impression"], minlength=len(log.impressions))
    key = user * SPAN + time
    return Pages(np.searchsorted(user, user), np.searchsorted(key, key), (count.cumsum() - count)[log.impression_of],
                 np.where(log.impression_of < 0, 0, count[log.impression_of]), skipped["item_id"].to_numpy())


def draw_skipped(pages: Pages, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (n,) an item_id drawn of those shown in vain beside each click, a row of `ratings`; −1 if none was."""
    drawn, some = np.full(len(rows), -1), rows[pages.count[rows] > 0]
    drawn[pages.count[rows] > 0] = pages.skipped[pages.first[some] + rng.integers(pages.count[some])]
    return drawn


def states_of_pages(frames: Frames, pages: Pages, rows: np.ndarray) -> Tensor:
    """Return (n, F·(E+1)): each reader's frame, padded as in `states_before`, without the clicks of the page itself."""
    return frames.states_until(pages.begin[rows], pages.before[rows])


def states_before(frames: Frames, ratings: pd.DataFrame, user_ids: np.ndarray, timestamps: np.ndarray) -> Tensor:
    """Return (n, F·(E+1)): the frames of what users had clicked before that second, padded at the old end with zeros.

    `ratings` are those of the frames, in order.
    """
    if len(ratings) != len(frames.item_idx) or in_order(ratings) is not ratings:
        raise DataError(f"{len(ratings):,} ratings are not those of frames of {len(frames.item_idx):,} in the order of "
                        f"user_id and timestamp: sort them, and make the frames of them")
    return frames.states_until(*_ends(ratings["user_id"], ratings["timestamp"], user_ids, timestamps))


def _ends(groups: pd.Series, times: pd.Series, of: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where group `of` starts, and where its rows earlier than `before` end, in a table by (group, time)."""
    key, begin = groups.to_numpy(np.int64) * SPAN + times.to_numpy(), np.asarray(of, np.int64) * SPAN
    return np.searchsorted(key, begin), np.searchsorted(key, begin + np.clip(before, 0, SPAN - 1))


def clicks_before(ratings: pd.DataFrame, item_ids: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
    """Return (n,): how often each item had been clicked before a moment, by anyone."""
    by_item = ratings.sort_values(["item_id", "timestamp"])
    start, end = _ends(by_item["item_id"], by_item["timestamp"], item_ids, timestamps)
    return end - start


def impression_metrics(impression: np.ndarray, clicked: np.ndarray, score: np.ndarray) -> pd.DataFrame:
    """Return AUC, MRR, nDCG@5 and nDCG@10 of each impression, as MIND defines them, of (n,) items shown, in any order.

    AUC counts ties half; in ranks they count against the method, and so does a NaN score, in all four. Impressions
    without a click, or with nothing skipped, have no order to find and are left out.

    >>> one = impression_metrics(np.zeros(4, int), np.array([0, 1, 0, 0]), np.array([0.9, 0.8, 0.1, 0.2]))
    >>> one.round(3).loc[0].to_dict()
    {'AUC': 0.667, 'MRR': 0.5, 'nDCG@5': 0.631, 'nDCG@10': 0.631}
    """
    clicked = np.asarray(clicked, bool)
    score = np.where(np.isnan(score), np.where(clicked, -np.inf, np.inf), score).astype(np.float64)
    group, names = pd.factorize(np.asarray(impression), sort=True)
    order = np.lexsort((clicked, -score, group))  # of a tie the skipped first
    group, clicked, scores = group[order], clicked[order], pd.Series(score[order]).groupby(group[order])
    rank, best = scores.cumcount().to_numpy() + 1, np.r_[0, np.cumsum(1 / np.log2(np.arange(2, 12)))]
    n_clicked = np.bincount(group, clicked).astype(int)
    pairs = n_clicked * (np.bincount(group) - n_clicked)
    wrong = np.bincount(group, clicked * scores.rank(ascending=False)) - n_clicked * (n_clicked + 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        table = {"AUC": 1 - wrong / pairs, "MRR": np.bincount(group, clicked / rank) / n_clicked}
        for k in (5, 10):
            gain = np.bincount(group, clicked * (1 / np.log2(1 + rank)) * (rank <= k))
            table[f"nDCG@{k}"] = gain / best[n_clicked.clip(max=k)]
    return pd.DataFrame(table, index=pd.Index(names, name="impression"))[pairs > 0]


def _read(path: Path, names: list[str]) -> pd.DataFrame:
    """Return a file as columns of text, trimmed, indexed by the numbers of its lines; blank ones are left out."""
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise DataError(f"{name} is not there: a folder in the MIND format holds behaviors.tsv and news.tsv")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}, line {line} is not UTF-8 text: convert the file") from error
    rows = {number: [value.strip() for value in line.split("\t")] for number, line in enumerate(lines, 1) if line}
    if not rows:
        raise DataError(f"{name} is empty")
    values = pd.Series(rows, name="text").rename_axis("line")
    values.attrs = {"read from": name}
    refuse(values.map(len) != len(names), values, f"has not {len(names)} values between tabs: {', '.join(names)}")
    table = pd.DataFrame(values.tolist(), values.index, names, "str")
    table.attrs = values.attrs
    return table


def _read_items(path: Path) -> pd.DataFrame:
    items = _read(path, NEWS)[NEWS[:5]].drop_duplicates()
    bad = items["news_id"].str.contains(" ") | items["news_id"].isin(["", "news_id"])
    refuse(bad, items["news_id"], "is not an id without spaces, or it is a header: take that away")
    refuse(items["news_id"].duplicated(), items["news_id"], "stands on an earlier line with another text")
    return items


def _read_behaviors(path: Path) -> pd.DataFrame:
    table = _read(path, BEHAVIORS)
    for name in ("impression_id", "user_id"):
        refuse(table[name] == "", table[name], "is missing")
    refuse(table["impression_id"].duplicated(), table["impression_id"], "stands on an earlier line already")
    when = pd.to_datetime(table["time"], format=TIME, errors="coerce")
    refuse(when.isna(), table["time"], "is not a time such as 11/15/2019 9:05:58 AM")
    good = table["impressions"].str.fullmatch(r"\S+-[01]( +\S+-[01])*")
    refuse(~good, table["impressions"], "does not say what was shown and clicked, as N45-1 N46-0; MIND's test part "
           "does not")
    return table.assign(timestamp=when.astype("datetime64[s]").astype(np.int64))


def _words(texts: pd.Series) -> pd.Series:
    """Cut texts at their spaces; return the words, each indexed as its text is."""
    words = texts.astype(pd.ArrowDtype(pa.large_string())).str.split(" ").list.flatten().astype("str")
    return words[words != ""]
