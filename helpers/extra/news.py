"""Read news in the MIND format, look up what a reader had clicked by then, and rank what was shown.

Source: Wu et al. 2020, "MIND: A Large-scale Dataset for News Recommendation". A folder holds `behaviors.tsv`
(impression_id, user_id, time, history, impressions) and `news.tsv` (news_id, category, subcategory, title, abstract,
url, title_entities, abstract_entities), without headers, separated by tabs; a quotation mark is a letter like others.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import torch
from torch import Tensor

from helpers.datasets import RATING_TYPES
from helpers.files import DataError
from helpers.frames import Frames, flatten

BEHAVIORS = ["impression_id", "user_id", "time", "history", "impressions"]
NEWS = ["news_id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities"]
TEXTS = NEWS[1:5]
TIME = "%m/%d/%Y %I:%M:%S %p"     # 11/15/2019 9:05:58 AM
CLICKED, SKIPPED = 5.0, 2.0       # stars: rewards of 5 and −1


class News(NamedTuple):
    """A log of news. Ids are numbered from 1: items in the order of `news.tsv`, users in alphabetical order.

    ratings: what was clicked, as `read_ratings` returns it, at 5 stars: a user's log begins with the history and goes
        on with the clicks. Histories have no times: their clicks stand one second apart, before the first impression.
    impression_of: (len(ratings),) int32, the row of `impressions` in which each was clicked; −1 for the history.
    impressions: `impression_id, user_id, timestamp, part`, one row an impression in the order of the files; part is
        the place of its folder among those read.
    shown: `impression` (a row of `impressions`, int32, rising), `item_id` int32, `clicked` bool: each item shown.
    items: `item_id, category, subcategory, title, abstract`; "" where there is none. An item that behaviors speak of
        and no news.tsv knows comes last, with nothing but its id.
    user_names, item_names: the ids as they are in the files, `item_names[item_id]`.
    """

    ratings: pd.DataFrame
    impression_of: np.ndarray
    impressions: pd.DataFrame
    shown: pd.DataFrame
    items: pd.DataFrame
    user_names: pd.Series
    item_names: pd.Series


def read_mind(*folders: Path) -> News:
    """Read one log from folders in the MIND format, such as the parts for training and for validation.

    Of a user's histories the one of the earliest impression is read. Within a part of MIND the others repeat it; a
    click that only a later history knows, as between parts of different weeks, is not in the log. Times name no zone
    and are taken for UTC. A click that comes twice is two steps of the log. Of an item in two folders the first text
    counts.

    Raises:
        DataError: a missing file, or the first line that is damaged: with its number, and what is wrong with it.
    """
    items = _read_items(folders)
    names = pa.array(items["news_id"], pa.string())
    heads = pd.concat([_read_heads(folder / "behaviors.tsv").assign(part=part) for part, folder in enumerate(folders)],
                      ignore_index=True)
    user_idx, users = pd.factorize(heads["user_id"], sort=True)
    when = heads["timestamp"].to_numpy()
    by_time = np.lexsort((when, user_idx))
    first = np.zeros(len(heads), bool)
    first[by_time[np.r_[True, np.diff(user_idx[by_time]) != 0]]] = True
    pieces, history = [], []
    for part, folder in enumerate(folders):
        row = int((heads["part"] < part).sum())
        for batch in _batches(folder / "behaviors.tsv", BEHAVIORS[3:]):
            rows = np.arange(row, row + batch.num_rows, dtype=np.int32)
            own = first[rows]
            place, words = _words(batch["history"].filter(pa.array(own)))
            item_idx, names = _codes(words, names)
            history.append((rows[own][place], item_idx))
            place, words = _words(batch["impressions"])
            words, clicked = _labels(words, place, rows, heads, folder / "behaviors.tsv")
            item_idx, names = _codes(words, names)
            pieces.append((rows[place], item_idx, clicked))
            row += batch.num_rows
    impression, item_idx, clicked = (np.concatenate(column) for column in zip(*pieces, strict=True))
    of_history, history_idx = (np.concatenate(column) for column in zip(*history, strict=True))
    impression_of = np.r_[np.full(len(of_history), -1, np.int32), impression[clicked]]
    rows = np.r_[of_history, impression[clicked]]
    if not len(rows):
        raise DataError(f"{_name(folders[0] / 'behaviors.tsv')}: nobody has clicked anything, neither in a history "
                        f"nor in an impression: there is nothing to learn from")
    seconds = when[rows]
    seconds[:len(of_history)] -= _from_end(of_history)
    order = np.lexsort((seconds, user_idx[rows]))  # stable
    columns = (user_idx[rows] + 1, np.r_[history_idx, item_idx[clicked]] + 1, np.full(len(rows), CLICKED), seconds)
    ratings = pd.DataFrame({name: column[order].astype(kind) for (name, kind), column in
                            zip(RATING_TYPES.items(), columns, strict=True)}, copy=False)
    unknown = pd.DataFrame({"news_id": names[len(items):].to_pylist()}, dtype=str)
    items = pd.concat([items, unknown], ignore_index=True).fillna("")
    item_ids = pd.RangeIndex(1, len(items) + 1, name="item_id")
    return News(ratings, impression_of[order],
                heads.assign(user_id=user_idx + 1)[["impression_id", "user_id", "timestamp", "part"]],
                pd.DataFrame({"impression": impression, "item_id": item_idx + 1, "clicked": clicked}, copy=False),
                items[TEXTS].assign(item_id=item_ids)[["item_id", *TEXTS]],
                pd.Series(users, pd.RangeIndex(1, len(users) + 1, name="user_id"), name="user_id"),
                items["news_id"].set_axis(item_ids))


def part_of(log: News) -> np.ndarray:
    """Return (len(ratings),): the part in which each click was logged; a history's is that of its impression."""
    by_time = log.impressions.sort_values("timestamp", kind="stable").drop_duplicates("user_id")
    of_history = by_time.set_index("user_id")["part"].loc[log.ratings["user_id"]].to_numpy()
    return np.where(log.impression_of < 0, of_history, log.impressions["part"].to_numpy()[log.impression_of])


def all_shown(log: News) -> pd.DataFrame:
    """Return everything shown as `ratings`: what was clicked at 5 stars (reward 5), what was not at 2 (reward −1).

    Without foresight nothing but the order of the two matters to a ranking by value. A skip is mild: the reader may not
    have looked.
    """
    rows = log.shown["impression"].to_numpy()
    table = pd.DataFrame({"user_id": log.impressions["user_id"].to_numpy()[rows],
                          "item_id": log.shown["item_id"].to_numpy(),
                          "rating": np.where(log.shown["clicked"], CLICKED, SKIPPED),
                          "timestamp": log.impressions["timestamp"].to_numpy()[rows]}).astype(RATING_TYPES)
    return table.iloc[np.lexsort((table["timestamp"], table["user_id"]))].reset_index(drop=True)


def texts_of(items: pd.DataFrame) -> dict[int, str]:
    """Return {item_id: text}, the title and then the abstract; "" of an item with neither."""
    parts = (items["title"].str.strip().str.cat(items["abstract"].str.strip(), sep=". ")).str.strip(". ")
    return dict(zip(items["item_id"].tolist(), parts.tolist(), strict=True))


class Pages(NamedTuple):
    """What stood beside each click, for rows of `ratings`; see `pages_of`.

    begin: (n,) the first row of the reader's log.
    before: (n,) the row at which the page's clicks begin: what is earlier was clicked before the page was shown.
    first, count: (n,) where in `skipped` the items begin that the page showed in vain, and how many they are.
    skipped: item ids, by impression.
    """

    begin: np.ndarray
    before: np.ndarray
    first: np.ndarray
    count: np.ndarray
    skipped: np.ndarray


def pages_of(log: News) -> Pages:
    """Look up the page of every click, once for all draws; a click of the history has one to itself, with no skips."""
    user, time = log.ratings["user_id"].to_numpy(), log.ratings["timestamp"].to_numpy()
    new_user = np.r_[True, user[1:] != user[:-1]]
    rows = np.arange(len(user))
    begin = np.maximum.accumulate(np.where(new_user, rows, 0))
    before = np.maximum.accumulate(np.where(new_user | np.r_[True, time[1:] != time[:-1]], rows, 0))
    skipped = log.shown[~log.shown["clicked"]]
    count = np.bincount(skipped["impression"], minlength=len(log.impressions))
    first, of_history = np.cumsum(count) - count, log.impression_of < 0
    return Pages(begin, before, first[log.impression_of], np.where(of_history, 0, count[log.impression_of]),
                 skipped["item_id"].to_numpy())


def draw_skipped(pages: Pages, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return, for clicks given as rows of `ratings`, an item_id (n,) that the same impression showed in vain.

    It is drawn at random; −1 stands for a click of the history, and where nothing was skipped.
    """
    some = pages.count[rows] > 0
    drawn = np.full(len(rows), -1)
    drawn[some] = pages.skipped[pages.first[rows[some]] + rng.integers(pages.count[rows[some]])]
    return drawn


def states_of_pages(frames: Frames, pages: Pages, rows: np.ndarray) -> Tensor:
    """Return (n, F·(E+1)): the reader's frame when the page of each click was shown, padded at its old end with zeros.

    Clicks of one page share their second: none is in the frame of another, for the reader had not seen the page yet.
    """
    return _frames_until(frames, pages.begin[rows], pages.before[rows])


def _ends(groups: np.ndarray, times: np.ndarray, of: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where group `of` starts, and where its rows earlier than `before` end, in a table by (group, time).

    Raises:
        DataError: if the table is in another order.
    """
    low, span = times.min(), int(times.max() - times.min()) + 2
    key = groups.astype(np.int64) * span + (times - low)
    if (key[1:] < key[:-1]).any():
        raise DataError("the log is not in the order of user_id and timestamp: sort it by them first")
    begin = of.astype(np.int64) * span
    return np.searchsorted(key, begin), np.searchsorted(key, begin + np.clip(before - low, 0, span - 1))


def states_before(frames: Frames, ratings: pd.DataFrame, user_ids: np.ndarray, timestamps: np.ndarray) -> Tensor:
    """Return (n, F·(E+1)): the frame of what each user had clicked before a moment, padded at its old end with zeros.

    Args:
        frames: made of `ratings`, all of them; a user without any gets zeros.
        timestamps: (n,) seconds; a click of that very second is not in the frame.
    """
    if len(ratings) != len(frames.item_idx):
        raise DataError(f"frames of {len(frames.item_idx):,} ratings are asked about a log of {len(ratings):,}")
    start, end = _ends(ratings["user_id"].to_numpy(), ratings["timestamp"].to_numpy(), np.asarray(user_ids),
                       np.asarray(timestamps))
    return _frames_until(frames, start, end)


def _frames_until(frames: Frames, start: np.ndarray, end: np.ndarray) -> Tensor:
    rows = torch.as_tensor(end, device=frames.device)[:, None] - frames.frame_size + \
        torch.arange(frames.frame_size, device=frames.device)
    real = rows >= torch.as_tensor(start, device=frames.device)[:, None]
    rows = torch.where(real, rows, 0)
    return flatten(frames.items[frames.item_idx[rows]] * real.unsqueeze(2), frames.rating[rows] * real)


def clicks_before(ratings: pd.DataFrame, item_ids: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
    """Return (n,): how often each item had been clicked before a moment, by anyone."""
    by_item = ratings.iloc[np.lexsort((ratings["timestamp"], ratings["item_id"]))]
    start, end = _ends(by_item["item_id"].to_numpy(), by_item["timestamp"].to_numpy(), np.asarray(item_ids),
                       np.asarray(timestamps))
    return end - start


def impression_metrics(impression: np.ndarray, clicked: np.ndarray, score: np.ndarray) -> pd.DataFrame:
    """Return AUC, MRR, nDCG@5 and nDCG@10 of each impression, as MIND defines them, indexed by impression.

    AUC is the share of pairs (clicked, skipped) in the right order, ties half. MRR is the mean of 1 / rank over the
    clicked. In ranks, ties count against the method, and so does a NaN score, in all four. Impressions without a click,
    or with nothing skipped, have no order to find and are left out.

    >>> one = impression_metrics(np.zeros(4, int), np.array([0, 1, 0, 0]), np.array([0.9, 0.8, 0.1, 0.2]))
    >>> one.round(3).loc[0].to_dict()
    {'AUC': 0.667, 'MRR': 0.5, 'nDCG@5': 0.631, 'nDCG@10': 0.631}

    Args:
        impression, clicked, score: (n,) of each item shown, in any order.
    """
    clicked = np.asarray(clicked, bool)
    score = np.where(np.isnan(score), np.where(clicked, -np.inf, np.inf), score).astype(np.float64)
    group, names = pd.factorize(np.asarray(impression), sort=True)
    order = np.lexsort((clicked, -score, group))  # of a tie the skipped first
    group, clicked, score = group[order], clicked[order], score[order]
    size, n_clicked = np.bincount(group), np.bincount(group, clicked)
    rank = np.arange(len(group)) - (np.cumsum(size) - size)[group] + 1
    tie = np.cumsum(np.r_[True, (np.diff(group) != 0) | (score[1:] != score[:-1])][:len(group)]) - 1
    skips = np.cumsum(~clicked)
    skips_before_group = (np.r_[0, np.cumsum(size - n_clicked)][:-1])[group]
    better = (skips - skips_before_group)[clicked]  # of the skipped, those not worse than this click
    tied = np.bincount(tie, ~clicked)[tie][clicked]
    gain = 1 / np.log2(1 + rank)
    best = np.r_[0, np.cumsum(1 / np.log2(np.arange(2, 12)))]
    sums = {"AUC": np.bincount(group[clicked], better - tied / 2, len(size)),
            "MRR": np.bincount(group, clicked / rank)}
    with np.errstate(invalid="ignore", divide="ignore"):
        table = {"AUC": 1 - sums["AUC"] / (n_clicked * (size - n_clicked)), "MRR": sums["MRR"] / n_clicked}
        for k in (5, 10):
            table[f"nDCG@{k}"] = np.bincount(group, clicked * gain * (rank <= k)) / \
                best[np.minimum(n_clicked, k).astype(int)]
    judged = (n_clicked > 0) & (n_clicked < size)
    return pd.DataFrame(table, index=pd.Index(names, name="impression"))[judged]


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield columns of `behaviors.tsv` as text, some 16 MB of the file at a time."""
    try:
        yield from pyarrow.csv.open_csv(path, *_options(BEHAVIORS, columns))
    except pa.ArrowInvalid as error:
        raise _damage(path, BEHAVIORS, error) from error


def _options(names: list[str], columns: list[str]) -> tuple:
    return (pyarrow.csv.ReadOptions(column_names=names, block_size=1 << 24),
            pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False),
            pyarrow.csv.ConvertOptions(include_columns=columns, strings_can_be_null=False,
                                       column_types=dict.fromkeys(columns, pa.string())))


def _read_columns(path: Path, names: list[str], columns: list[str]) -> pd.DataFrame:
    """Read some columns of a file as text, all of its lines being of that format."""
    if not path.is_file():
        raise DataError(f"{_name(path)} is not there: a folder in the MIND format holds behaviors.tsv and news.tsv")
    try:
        table = pyarrow.csv.read_csv(path, *_options(names, columns)) if path.stat().st_size else ()
    except pa.ArrowInvalid as error:
        raise _damage(path, names, error) from error
    if not len(table):
        raise DataError(f"{_name(path)} is empty")
    return table.to_pandas()


def _damage(path: Path, names: list[str], error: Exception) -> DataError:
    """Find the line that could not be read, and say what is wrong with it."""
    for number, line in enumerate(_lines(path), 1):
        n = line.count(b"\t") + 1
        if line and n != len(names):
            return DataError(f"{_name(path)}, line {number}: {n} values separated by tabs; expected {len(names)}: "
                             f"{', '.join(names)}")
        try:
            line.decode()
        except UnicodeDecodeError:
            return DataError(f"{_name(path)}, line {number} is not UTF-8 text: convert the file")
    return DataError(f"{_name(path)} is not a table separated by tabs: {error}")


def _line(path: Path, row: int) -> int:
    """Return the number of the line that holds a row, counted from 0, of a file that may have blank lines."""
    full = (number for number, line in enumerate(_lines(path), 1) if line)
    return next(number for place, number in enumerate(full) if place == row)


def _lines(path: Path) -> list[bytes]:
    """Cut a file as pyarrow does: a carriage return alone ends a line too."""
    return re.split(rb"\r\n|\r|\n", path.read_bytes())


def _refuse(bad: np.ndarray, path: Path, what: pd.Series, why: str) -> None:
    rows = np.flatnonzero(bad)
    if len(rows):
        raise DataError(f"{_name(path)}, line {_line(path, rows[0])}: {what.name} {what.iloc[rows[0]]!r} {why} "
                        f"({len(rows):,} such lines)")


def _read_items(folders: tuple[Path, ...]) -> pd.DataFrame:
    """Return news_id and texts of all folders, an item once."""
    tables = []
    for path in (folder / "news.tsv" for folder in folders):
        table = _read_columns(path, NEWS, NEWS[:5])
        for name in ("news_id", *TEXTS):
            table[name] = table[name].str.strip()
        _refuse((table["news_id"] == "") | table["news_id"].str.contains(" "), path, table["news_id"],
                "is not an id without spaces")
        _refuse(table["news_id"] == NEWS[0], path, table["news_id"], "is the name of a column: take the header away")
        once = table.drop_duplicates()
        _refuse(table.index.isin(once.index[once["news_id"].duplicated()]), path, table["news_id"],
                "stands on an earlier line with another text")
        tables.append(once)
    return pd.concat(tables).drop_duplicates("news_id", ignore_index=True)


def _read_heads(path: Path) -> pd.DataFrame:
    """Return `impression_id, user_id, timestamp` of each impression."""
    table = _read_columns(path, BEHAVIORS, BEHAVIORS[:3])
    for name in ("impression_id", "user_id"):
        table[name] = table[name].str.strip()
        _refuse(table[name] == "", path, table[name], "is empty")
    _refuse(table["impression_id"].duplicated(), path, table["impression_id"], "stands on an earlier line already")
    when = pd.to_datetime(table["time"].str.strip(), format=TIME, errors="coerce")
    _refuse(when.isna(), path, table["time"], "is not a time such as 11/15/2019 9:05:58 AM")
    return table.assign(timestamp=when.to_numpy().astype("datetime64[s]").astype(np.int64)).drop(columns="time")


def _words(column: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Cut texts at their spaces; return (the place of each word's text (n,), the words)."""
    lists = pc.split_pattern(column, " ")
    place, words = pc.list_parent_indices(lists), pc.list_flatten(lists)
    some = pc.not_equal(words, "")
    if not pc.all(some, min_count=0).as_py():
        place, words = place.filter(some), words.filter(some)
    return place.to_numpy(), words


def _labels(words: pa.Array, place: np.ndarray, rows: np.ndarray, heads: pd.DataFrame,
            path: Path) -> tuple[pa.Array, np.ndarray]:
    """Return (ids, clicked) of words such as N45-1.

    Raises:
        DataError: an impression that shows nothing, or the first word without a label.
    """
    first_of_file = int((heads["part"] < heads["part"].iloc[rows[0]]).sum()) if len(rows) else 0
    empty = np.flatnonzero(np.bincount(place, minlength=len(rows)) == 0)
    if len(empty):
        line = _line(path, rows[empty[0]] - first_of_file)
        raise DataError(f"{_name(path)}, line {line}: the impression shows no news")
    label = pc.binary_slice(words.cast(pa.binary()), -2)
    clicked = pc.equal(label, b"-1").to_numpy(zero_copy_only=False)
    good = (clicked | pc.equal(label, b"-0").to_numpy(zero_copy_only=False)) \
        & (pc.binary_length(words).to_numpy() > 2)
    bad = np.flatnonzero(~good)
    if len(bad):
        line = _line(path, rows[place[bad[0]]] - first_of_file)
        raise DataError(f"{_name(path)}, line {line}: {words[bad[0]].as_py()!r} does not say whether it was clicked, "
                        f"as N45-1 or N45-0 do (MIND's test part hides it: read the other parts)")
    return pc.binary_slice(words.cast(pa.binary()), 0, -2).cast(pa.string()), clicked


def _codes(words: pa.Array, names: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Return (the place of each word in `names` (n,) int32, names with the new words at their end)."""
    codes = pc.index_in(words, value_set=names)
    if codes.null_count:
        new = pc.unique(words.filter(codes.is_null()))
        names = pa.concat_arrays([names, new])
        codes = pc.index_in(words, value_set=names)
    return codes.to_numpy(), names


def _from_end(rows: np.ndarray) -> np.ndarray:
    """Return, for equal numbers that stand side by side, how many are left of each with itself: 3, 2, 1, 2, 1, …"""
    ends = np.flatnonzero(np.r_[rows[1:] != rows[:-1], len(rows) > 0])
    return np.repeat(ends, np.diff(ends, prepend=-1)) - np.arange(len(rows)) + 1
