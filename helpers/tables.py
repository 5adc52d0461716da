"""Turn a table of one's own into `ratings` or `items`, or say which of its rows cannot be used, and why."""

import ast
import contextlib
import json
import re
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from helpers.files import DataError

RATING_TYPES = {"user_id": np.int64, "item_id": np.int64, "rating": np.float32, "timestamp": np.int64}
RATING_COLUMNS = list(RATING_TYPES)
LATEST = 4_102_444_800  # seconds: the year 2100
DATE = r"(19|20)\d\d((0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])?)?"  # 2024, 202405, 20240501
# "(1995)", a range "(2001–2003)" or "(2007- )", and the mark of a video, "(1995) (V)"
YEAR_IN_TITLE = re.compile(r"\s*\((\d{4})\s*(?:[-–—]\s*\d{0,4}\s*)?\)(?:\s*\(V\))?\s*$")
ARTICLE_LAST = re.compile(r"^(.*), (The|A|An|Le|La|Les|Il|Das|Der|Die|El|L')(\s\(.*)?$")
NO_GENRE = {"unknown", "(no genres listed)", ""}


def from_frame(table: Any, user: str = "user_id", item: str = "item_id", rating: str | None = None,
               timestamp: str | None = "timestamp", stars: float = 5.0, users: pd.Series | None = None,
               items: pd.Series | None = None) -> tuple[pd.DataFrame, pd.Series, pd.Series]:
    """Turn a table of ratings or of clicks into (`ratings`, the users' own ids by `user_id`, the items' by `item_id`).

    >>> clicks = pd.DataFrame({"who": ["eve", "bob", "eve"], "what": [7, 9, 9],
    ...                        "when": pd.to_datetime(["2024-05-02", "2024-05-01", "2024-05-01"])})
    >>> ratings, user_names, item_names = from_frame(clicks, user="who", item="what", timestamp="when")
    >>> ratings.assign(user=ratings["user_id"].map(user_names))
       user_id  item_id  rating   timestamp user
    0        1        9     5.0  1714521600  bob
    1        2        9     5.0  1714521600  eve
    2        2        7     5.0  1714608000  eve

    `ratings` are as `datasets.read_ratings` returns them, ties in row order. DataError: a column that is not there, or
    the first row with a missing or impossible value.

    Args:
        table: of pandas, or of any library that hands over its columns as Arrow or by the interchange protocol.
        user, item: ids. Whole numbers from 0 on, also as text, are kept; others are numbered from 1, alphabetically.
        rating: stars, 0.5 to 5 in half stars; None where a row says only that it happened, which is worth `stars`.
        timestamp: datetimes, also as text such as 2024-05-01 12:00 (UTC where no time zone is named), or seconds since
            1970; None where the rows stand in the order of time. Fractions of a second count for the order only.
        users, items: the ids of an earlier call, as of the training table; they keep their numbers, new ones follow.
    """
    table = checked(table, "the table", user, item, rating, timestamp)
    if table.empty:
        raise DataError(f"{table.attrs['read from']} is empty: it has the columns but no row")
    user_ids, user_names = numbered(table[user], "user_id", users)
    item_ids, item_names = numbered(table[item], "item_id", items)
    given = table.assign(stars=stars)["stars"] if rating is None else table[rating]
    values = pd.to_numeric(pd.Series(_plain(given)), errors="coerce").to_numpy(np.float64)
    good = (values >= 0.5) & (values <= 5) & (2 * values == np.floor(2 * values))
    ones = rating is not None and len(values) > 1 and (values == 1).all()
    refuse(~good | ones, given, "is not one of 0.5, 1, 1.5, …, 5, or is 1 in every row: rescale the column, drop such "
           "rows, or leave it out (rating=None) if a row says only that it happened")
    times, seconds = _times(table[timestamp]) if timestamp is not None else [np.arange(len(table))] * 2
    ratings = pd.DataFrame({"user_id": user_ids, "item_id": item_ids, "rating": values, "timestamp": seconds})
    ratings = ratings.astype(RATING_TYPES).iloc[np.argsort(times, kind="stable")].reset_index(drop=True)
    return in_order(ratings), user_names, item_names


def in_order(ratings: pd.DataFrame) -> pd.DataFrame:
    """Return ratings sorted by (user_id, timestamp), ties as they came; the very same frame if it is sorted."""
    users, times = ratings["user_id"].to_numpy(), ratings["timestamp"].to_numpy()
    same = users[1:] == users[:-1]
    if (users[1:] < users[:-1]).any() or (same & (times[1:] < times[:-1])).any():
        ratings = ratings.iloc[np.lexsort((times, users))].reset_index(drop=True)
    return ratings


def rows_of(wanted: pd.Series | np.ndarray, item_ids: np.ndarray) -> np.ndarray:
    """Return the row (int32) of each wanted item where `item_ids` (n_items,) name rows; DataError if it has none."""
    codes, distinct = pd.factorize(np.asarray(wanted))
    rows = pd.Index(item_ids).get_indexer(distinct).astype(np.int32)
    if len(unknown := distinct[rows < 0]):
        raise DataError(f"{len(unknown)} items have no row in the item matrix (ids {', '.join(map(str, unknown[:5]))} "
                        f"…): make it from the same data set, notes/03_pca.ipynb")
    return rows[codes]


def check_rows(matrix: Any, item_ids: np.ndarray) -> None:
    """Raise a DataError unless `matrix` (n_items, d) has one row for each of `item_ids`, which are distinct."""
    if not len(n := np.unique(item_ids)) == len(item_ids) == len(matrix):
        raise DataError(f"a matrix of {len(matrix)} rows for {len(item_ids)} items ({len(n)} distinct): each wants one "
                        f"row of its own, as notes/03_pca.ipynb makes them")


def items_from_frame(table: Any, item: str = "item_id", title: str = "title", genres: str | None = "genres",
                     items: pd.Series | None = None, between: str = "|") -> pd.DataFrame:
    """Turn an item table into `items`, one row an item, in its order, never rated ones too.

    >>> items_from_frame(pd.DataFrame({"sku": ["b", "a"], "name": ["Matrix, The (1999)", None], "kind": ["War|", ""]}),
    ...                  item="sku", title="name", genres="kind")
       item_id       title  year genres
    0        2  The Matrix  1999  [War]
    1        1      item a  <NA>     []

    Return `item_id` int64, `title` str without its year ("item …" where there is none), `year` Int64 (NA where unknown;
    a column `release_year` is believed before the title), `genres` list of str (empty where unknown). `genres` are
    lists, or text that `listed` reads; `items` the ids as `from_frame` returned them, so that both tables number alike.
    DataError: a missing column, an item without an id or with two rows, or genres that cannot be read.
    """
    table = checked(table, "the item table", item, title, genres)
    ids, _ = numbered(table[item], "item_id", items)
    refuse(pd.Series(ids).duplicated(), table[item], "is there for the second time: an item has one row")
    titles = table[title].astype(object).where(table[title].notna(), "").astype(str).str.strip()
    titles = titles.where(titles != "", "item " + table[item].astype(str))
    years, bare = titles.str.extract(YEAR_IN_TITLE)[0], titles.str.replace(YEAR_IN_TITLE, "", regex=True)
    if "release_year" in table:
        years = table["release_year"].astype(str).str.extract(r"^(\d{4})(?:\.0)?$")[0].fillna(years)
    bare = bare.str.replace(ARTICLE_LAST, r"\2 \1\3", regex=True).str.replace("^L' ", "L'", regex=True)
    known = []
    for row, value in enumerate(table[genres] if genres else [None] * len(table)):
        try:
            names = (genre.get("name", "") if isinstance(genre, dict) else genre for genre in listed(value, between))
            known.append([str(name) for name in names if str(name) not in NO_GENRE])
        except ValueError:
            refuse(np.arange(len(table)) == row, table[genres], "starts like a list and is none")
    return pd.DataFrame({"item_id": ids, "title": bare.where(bare != "", titles).array,
                         "year": pd.to_numeric(years).astype("Int64").array, "genres": known})


def listed(value: Any, between: str = "|") -> list:
    """Return the entries of a list, of text that holds one (JSON or Python), or of names separated by `between`.

    >>> listed('[{"id": 18, "name": "Drama"}]'), listed("['War', 'Drama']"), listed("War|Drama"), listed(None)
    ([{'id': 18, 'name': 'Drama'}], ['War', 'Drama'], ['War', 'Drama'], [])

    ValueError: the text begins like a list and is none.
    """
    if not isinstance(value, str):
        return list(value) if isinstance(value, list | tuple | np.ndarray) else []
    text = value.strip()
    if not text.startswith(("[", "{")):
        return [name.strip() for name in text.split(between) if name.strip()]
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            found = read(text)
            return list(found) if isinstance(found, list | tuple) else [found]
    raise ValueError(f"{text[:60]!r} begins like a list and is none")


def no_overview(text: str) -> bool:
    """Say whether a text is one of the ways in which TMDB's tables write that there is none."""
    return bool(re.fullmatch(r"no (movie )?overview( found| available)?\.*", text.strip(), re.IGNORECASE))


def checked(table: Any, source: str, *columns: str | None, first_line: int | None = None) -> pd.DataFrame:
    """Return any library's table, with each of `columns` once, as a frame that tells `refuse` its source and lines."""
    if not isinstance(table, pd.DataFrame):
        if hasattr(table, "__arrow_c_stream__"):
            table = pa.table(table).to_pandas()
        elif hasattr(table, "__dataframe__"):
            table = pd.api.interchange.from_dataframe(table)
        else:
            raise DataError(f"{source} is a {type(table).__name__}: a table is wanted, as of pandas, polars or Arrow")
    if "read from" not in table.attrs:
        first, unit = (0, "row") if first_line is None else (first_line, "line")
        table = table.set_axis(pd.RangeIndex(first, first + len(table), name=unit))
        table.attrs = {"read from": source}
    for name in columns:
        if name is not None and (there := list(table.columns).count(name)) != 1:
            raise DataError(f"{table.attrs['read from']} has {there or 'no'} columns {name!r}; its columns are "
                            f"{', '.join(map(str, table))} (timestamp=None if the rows stand in the order of time)")
    return table


def refuse(bad: np.ndarray | pd.Series, values: pd.Series, why: str) -> None:
    """Raise a DataError that names the first bad value of a column of a `checked` table."""
    if len(rows := np.flatnonzero(bad)):
        unit = values.index.name
        counted = f"{len(rows):,} such {unit}s{', counted from 0' if unit == 'row' else ''}"
        raise DataError(f"{values.attrs['read from']}, {unit} {values.index[rows[0]]}: {values.name} "
                        f"'{values.iloc[rows[0]]}' {why} ({counted})")


def _plain(values: pd.Series) -> np.ndarray:
    """Return a column as numpy has it: numbers, bools, datetimes (UTC), or objects (text); missing is None or NaN."""
    try:
        column = pa.array(values)
        if pa.types.is_nested(column.type):
            raise TypeError("lists: explode the column")
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{values.attrs['read from']}: {values.name} holds values of several kinds, such as 0 and '0' "
                        f"mixed ({error}): read the column as text, as by pd.read_csv(…, dtype=str)") from error
    if isinstance(column.type, pa.BaseExtensionType):  # UUIDs, for example
        return values.astype(str).to_numpy(object)
    return column.to_numpy(zero_copy_only=False)


def numbered(values: pd.Series, column: str, known: pd.Series | None = None) -> tuple[np.ndarray, pd.Series]:
    """Return ids as int64, and the Series of what each stands for: whole numbers for themselves, words by number."""
    refuse(values.isna(), values, "is missing: drop such rows")
    codes, own = pd.factorize(_plain(values))
    text = pd.Series(own).astype(str).str.strip()
    refuse((text == "").to_numpy()[codes], values, "is missing: drop such rows")
    zeros = "0*" if values.index.name == "line" else ""  # a file's 007 is 7, a text's is not
    whole = text.str.fullmatch(zeros + r"(0|[1-9]\d{0,18})(\.0*)?")
    numbers = [int(name.partition(".")[0]) if is_whole else -1 for name, is_whole in zip(text, whole, strict=True)]
    top = 1 << (np.finfo(own.dtype).nmant + 1 if own.dtype.kind == "f" else 63)  # from there on floats run ids together
    bad = np.array([not 0 <= number < top for number in numbers])
    if bad.any() and pd.to_numeric(text, errors="coerce").notna().all() and not text.str.isdecimal().all():
        refuse(bad[codes], values, f"is not a whole number from 0 to {top - 1} (beyond, {own.dtype} mixes up ids)")
    own = text.to_numpy(object) if bad.any() else np.array(numbers, np.int64)
    if not bad.any() and (known is None or known.dtype == np.int64):
        numbers = own
    else:
        place = {} if known is None else {str(name): number for number, name in known.items()}
        new = sorted({str(name) for name in own} - place.keys())
        place |= {name: number for number, name in enumerate(new, 1 + max(place.values(), default=0))}
        numbers = np.array([place[str(name)] for name in own])
    names = pd.concat([known, pd.Series(own, pd.Index(numbers, name=column), name=values.name)])
    return numbers[codes], names[~names.index.duplicated()].sort_index()


def _times(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return times to sort by, datetimes or seconds since 1970, and the whole seconds."""
    refuse(values.isna(), values, "is missing: drop such rows")
    times = _plain(values)
    if times.dtype.kind not in "iufM":
        text = pd.Series(times).astype(str).str.strip()
        dates = pd.to_datetime(text, format="ISO8601", errors="coerce", utc=True).dt.tz_convert(None)
        times = min(pd.to_numeric(text, errors="coerce"), dates, key=lambda read: read.isna().sum()).to_numpy()
        refuse(pd.isna(times), values, "is neither a number of seconds since 1970 nor a date as 2024-05-01 12:00; "
               "pd.to_datetime makes dates of others")
    seconds = times.astype("datetime64[s]").astype(np.int64) if times.dtype.kind == "M" else times
    refuse(~((seconds >= 0) & (seconds <= LATEST)), values, "is not between 1970 and 2100, in seconds since 1970; if "
           "the column counts milliseconds: pd.to_datetime(…, unit='ms')")
    if times.dtype.kind != "M" and times.max() < 21_000_000:
        dates = pd.Series(seconds).astype(int).astype(str).str.fullmatch(DATE)
        refuse(dates & dates.all(), values, "is a date and no second: pd.to_datetime(….astype(str), format='%Y%m%d')")
    return times, seconds
