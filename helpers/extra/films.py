"""Collect the facts of every film into `infos`: one schema, whatever the source."""

import csv
import gzip
import io
import math
import os
import re
import zlib
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from helpers.datasets import find, read_links
from helpers.extra import tmdb
from helpers.files import DataError, shown
from helpers.tables import listed, no_overview

IMDB = "https://datasets.imdbws.com"
# Freebase's ids of the commonest languages and countries among films of the nineties; the rest keep their id
FREEBASE_NAMES = {
    "m.02h40lc": "en", "m.064_8sq": "fr", "m.06nm1": "es", "m.02bjrlw": "it", "m.04306rv": "de",
    "m.09c7w0": "US", "m.07ssc": "GB", "m.0f8l9c": "FR", "m.0345h": "DE", "m.03rjj": "IT",
}


def read_facts(folder: Path) -> tuple[pd.DataFrame, dict[int, str]]:
    """Read (triples `head, relation, tail`, {item_id: entity}) of a raw folder: empty without its `.kg` and `.link`."""
    path, links = find(folder, "*.kg"), read_links(folder)
    if path is None or "entity_id" not in links:
        return pd.DataFrame(columns=["head", "relation", "tail"], dtype=str), {}
    facts = pd.read_csv(path, sep="\t", dtype=str, names=["head", "relation", "tail"], header=0, keep_default_na=False)
    return facts, dict(zip(links["item_id"].tolist(), links["entity_id"], strict=True))


def relink(items: pd.DataFrame, numbered: pd.DataFrame, entity_of: dict[int, str]) -> dict[int, str]:
    """Return {item_id of `items`: entity} where `entity_of` speaks of the ids of `numbered`.

    Films are the same if title (any case) and year are, and only one film of `numbered` has both.
    """
    items, numbered = (table[["item_id", "title", "year"]].dropna().assign(title=table["title"].str.casefold())
                       for table in (items, numbered))
    same = items.merge(numbered.drop_duplicates(["title", "year"], keep=False), on=["title", "year"])
    pairs = zip(same["item_id_x"].tolist(), same["item_id_y"].tolist(), strict=True)
    return {item_id: entity_of[other] for item_id, other in pairs if other in entity_of}


def add_freebase(infos: dict[int, dict], facts: pd.DataFrame, entity_of: dict[int, str]) -> int:
    """Add languages, countries, companies and collections of Freebase to `infos`; return how many films were linked.

    `facts` are triples `head, relation, tail`. Check that `entity_of` speaks of your ids: notes/01_data_parsing.ipynb.
    """
    field_of = {"film.film.language": "spoken_languages", "film.film.country": "production_countries",
                "film.film.production_companies": "production_companies"}
    chosen = facts[facts["relation"].isin(field_of)]
    tails = chosen.groupby(["head", "relation"])["tail"].agg(list).to_dict()
    collection = collections(facts)
    linked = [item_id for item_id in infos if item_id in entity_of]
    for item_id in linked:
        info, entity = infos[item_id], entity_of[item_id]
        info["collection"] = collection.get(entity)
        for relation, field in field_of.items():
            names = [FREEBASE_NAMES.get(tail, tail) for tail in tails.get((entity, relation), [])]
            info[field] = sorted({*info[field], *names})
        languages = info["spoken_languages"]
        info["original_language"] = languages[0] if len(languages) == 1 else None
    return len(linked)


def collections(facts: pd.DataFrame) -> dict[str, str]:
    """Return {entity: collection} where sequels and prequels are tied together, named by the first of its ids."""
    tied = facts[facts["relation"].isin(["film.film.sequel", "film.film.prequel"])]
    places, entities = pd.factorize(tied[["head", "tail"]].to_numpy().ravel(), sort=True)
    ties = sparse.coo_array((np.ones(len(tied)), (places[::2], places[1::2])), shape=(len(entities), len(entities)))
    _, tie = sparse.csgraph.connected_components(ties, directed=False)
    return dict(zip(entities, pd.Series(entities).groupby(tie).transform("first"), strict=True))


async def add_linked(infos: dict[int, dict], links: pd.DataFrame, journal: Path, *imdb: Path,
                     **options: Any) -> dict[str, int]:
    """Add to `infos` what TMDB knows of its films, and IMDb of those TMDB has not: `tmdb.run(add_linked(…))`.

    Return, and print, how many films are known from "TMDB", from "IMDb", from "neither", or have "failed" at TMDB:
    these get IMDb's facts for now, and are asked for again at the next start. Without `TMDB_API_KEY` in the
    environment only the answers in the journal are used. `links` are those of `datasets.read_links` (DataError if one
    is not a number), `journal` keeps TMDB's answers, `imdb` is as for `read_imdb`, `options` are of `tmdb.fetch`.
    """
    tmdb_id, imdb_id = (linked_ids(links, column, infos) for column in ("tmdbId", "imdbId"))
    if os.environ.get(tmdb.KEY) or not tmdb_id:
        answers, failed = await tmdb.fetch(tmdb_id.values(), journal, **options)
    else:
        answers, failed = tmdb.read_journal(journal), {}
        print(f"{tmdb.KEY} is not set: TMDB is not asked")
    wanted = [film for item_id, film in imdb_id.items() if not answers.get(tmdb_id.get(item_id))]
    facts = read_imdb(wanted, *imdb) if imdb else {}
    counts = dict.fromkeys(("TMDB", "IMDb", "neither", "failed"), 0)
    for item_id, info in infos.items():
        film = tmdb_id.get(item_id)
        record, by_imdb = answers.get(film), facts.get(imdb_id.get(item_id), {})
        add_facts(info, from_tmdb(record) if record else by_imdb)
        counts["TMDB" if record else "failed" if film in failed else "IMDb" if by_imdb else "neither"] += 1
    print(f"of {len(infos):,} films:", ", ".join(f"{source} {count:,}" for source, count in counts.items()))
    if failed:
        print(f"failed at TMDB, to be asked for again at the next start: {failed}"[:200])
    return counts


def linked_ids(links: pd.DataFrame, column: str, infos: Iterable[int]) -> dict[int, int]:
    """Return {item_id: number} of one column of links, for films of `infos`; DataError if a cell is not a number.

    >>> linked_ids(pd.DataFrame({"item_id": [1, 2, 3, 7], "tmdbId": ["tt0862", "", "949.0", "5"]}), "tmdbId", [1, 3])
    {1: 862, 3: 949}
    """
    if column not in links:
        return {}
    cells = links.set_index("item_id")[column].fillna("").astype(str).str.strip()
    numbers = cells[cells != ""].str.extract(r"^(?:tt)?(\d{1,18})(?:\.0*)?$", expand=False)
    for film in numbers.index[numbers.isna()]:
        raise DataError(f"links: {column} {cells[film]!r} of film {film} is not a number; empty the cell")
    return {film: int(number) for film, number in numbers.items() if film in infos}


def add_facts(info: dict, facts: dict) -> None:
    """Put facts into a film's record; where the source has nothing, what the record has stays."""
    info.update({field: value for field, value in facts.items() if value is not None and value != []})


def from_tmdb(record: dict) -> dict:
    """Return a record of TMDB, or a row of a table, in the words of SCHEMA; None: missing, blank or of another type.

    Money is in US dollars, unknown below 1,000; `runtime` in minutes; `revenue_d` is revenue − budget. An average of
    no votes is unknown. Languages are ISO 639-1, countries ISO 3166-1 codes.
    """
    year, month = _date(record.get("release_date"))
    overview, collection = _text(record.get("overview")), record.get("belongs_to_collection")
    genres, votes = record.get("genres"), _number(record.get("vote_count"), least=0)
    budget, revenue = (_number(record.get(field), least=1000) for field in ("budget", "revenue"))
    return {
        "adult": {"true": True, "false": False}.get(str(record.get("adult")).strip().lower()),
        "collection": next(iter(_names([collection] if isinstance(collection, dict) else collection, "name")), None),
        "genres": _names(genres, "name", "|" if "|" in str(genres) else ","),
        "original_language": _text(record.get("original_language")),
        "overview": None if no_overview(overview or "") else overview,
        "popularity": _number(record.get("popularity"), least=0, kind=float),
        "production_companies": _names(record.get("production_companies"), "name", "|"),
        "production_countries": _names(record.get("production_countries"), "iso_3166_1"),
        "release_year": year, "release_month": month, "revenue": revenue,
        "runtime": _number(record.get("runtime"), least=1),
        "spoken_languages": _names(record.get("spoken_languages"), "iso_639_1"),
        "tagline": _text(record.get("tagline")),
        "title": _text(record.get("title")),
        "vote_average": None if votes == 0 else _number(record.get("vote_average"), least=0, kind=float),
        "vote_count": votes, "budget": budget,
        "revenue_d": None if revenue is None or budget is None else revenue - budget,
    }


def _text(value: Any) -> str | None:
    """Return text without blanks around it, half a surrogate pair as '?'; None where there is none."""
    return (value.encode("utf-8", "replace").decode().strip() or None) if isinstance(value, str) else None


def _number(value: Any, least: float, kind: type = int) -> int | float | None:
    """Return a finite number, given as one or as text, not less than `least`; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return kind(number) if math.isfinite(number) and number >= least else None


def _names(value: Any, field: str, between: str = "") -> list[str]:
    """Return one text field of each entry of a list, in order, each once; plain names too, if they have a separator."""
    try:
        entries = listed(value, between or "|")
    except ValueError:  # a list that is cut off, say
        entries = []
    texts = (_text(entry.get(field) if isinstance(entry, dict) else between and entry) for entry in entries)
    return list(dict.fromkeys(text for text in texts if text))


def _date(value: Any) -> tuple[int | None, int | None]:
    """Return (year, month) of 1995-10-30, 10/30/95 or 30.10.1995; no month where either number may be the day."""
    text, year, month = str(value) if isinstance(value, str | date) else "", 0, 0
    if iso := re.match(r"\s*(\d{4})(?:-(\d{1,2})(?!\d))?", text):
        year, month = int(iso[1]), int(iso[2] or 0)
    elif parts := re.match(r"\s*(\d{1,2})([/.-])(\d{1,2})\2(\d{4}|\d\d)(?!\d)", text):
        low, high = sorted((int(parts[1]), int(parts[3])))
        year, month = int(parts[4]), low if high > 12 or low == high else 0
        if len(parts[4]) == 2:  # the last such year that has begun
            year += (date.today().year - year) // 100 * 100
    return (year, month if 1 <= month <= 12 else None) if year >= 1870 else (None, None)


def read_imdb(imdb_ids: Iterable[int], *paths: Path) -> dict[int, dict]:
    """Read {imdb_id: facts} of some films (114709 is tt0114709) from IMDb's dumps, in the words of SCHEMA.

    `paths` are `title.basics.tsv.gz` and, if at hand, `title.ratings.tsv.gz` (or both unpacked), or their folder.
    Source: https://developer.imdb.com/non-commercial-datasets/. DataError: no such file, a missing column, or damage.
    """
    files = [file for path in map(Path, paths) for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    basics, ratings = (next((file for file in files if file.name.removesuffix(".gz") == name), None)
                       for name in ("title.basics.tsv", "title.ratings.tsv"))
    if basics is None:
        raise DataError(f"title.basics.tsv.gz is not in {', '.join(map(shown, paths))}: get it from {IMDB}")
    wanted = {f"tt{film:07}" for film in imdb_ids}
    rows = _rows(basics, wanted, "primaryTitle", "isAdult", "startYear", "runtimeMinutes", "genres")
    if ratings:
        rows = rows.join(_rows(ratings, wanted, "averageRating", "numVotes"))
    return {int(name[2:]): {
        "title": _text(row["primaryTitle"]), "adult": {"0": False, "1": True}.get(row["isAdult"]),
        "release_year": _number(row["startYear"], least=1870), "runtime": _number(row["runtimeMinutes"], least=1),
        "genres": _names(row["genres"], "", ","), "vote_count": _number(row.get("numVotes"), least=0),
        "vote_average": _number(row.get("averageRating"), least=0, kind=float)} for name, row in rows.iterrows()}


def _rows(path: Path, wanted: set[str], *columns: str) -> pd.DataFrame:
    """Return some columns of the wanted rows of a dump, as text, NaN where it has `\\N`; `tconst` is the index."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors="replace") as file:
            lines = [next(file, ""), *(line for line in file if line.partition("\t")[0] in wanted)]
        return pd.read_csv(io.StringIO("".join(lines)), sep="\t", usecols=["tconst", *columns], index_col="tconst",
                           dtype=str, na_values="\\N", keep_default_na=False, quoting=csv.QUOTE_NONE)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{shown(path)} is no dump of IMDb, or damaged ({error}): get it from {IMDB}") from error
