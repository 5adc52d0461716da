"""Collect the facts of every film into `infos`: one schema, whatever the source."""

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.datasets import find, listed, read_links
from helpers.extra import tmdb
from helpers.files import DataError, shown

# Freebase names things by opaque ids. These are the commonest languages and countries among films
# of the nineties; the rest keep their id.
FREEBASE_NAMES = {
    "m.02h40lc": "en", "m.064_8sq": "fr", "m.06nm1": "es", "m.02bjrlw": "it", "m.04306rv": "de",
    "m.09c7w0": "US", "m.07ssc": "GB", "m.0f8l9c": "FR", "m.0345h": "DE", "m.03rjj": "IT",
}


def read_facts(folder: Path) -> tuple[pd.DataFrame, dict[int, str]]:
    """Read the knowledge graph of a raw folder: (triples `head, relation, tail`, {item_id: entity}).

    Both are empty where the folder has no `.kg` and `.link`.
    """
    path, links = find(folder, "*.kg"), read_links(folder)
    if path is None or "entity_id" not in links:
        return pd.DataFrame(columns=["head", "relation", "tail"], dtype=str), {}
    facts = pd.read_csv(path, sep="\t", dtype=str, names=["head", "relation", "tail"], header=0,
                        keep_default_na=False)
    return facts, dict(zip(links["item_id"].tolist(), links["entity_id"], strict=True))


def relink(items: pd.DataFrame, numbered: pd.DataFrame, entity_of: dict[int, str]) -> dict[int, str]:
    """Return {item_id of `items`: entity} where `entity_of` speaks of the ids of `numbered`.

    Films are the same if title (any case) and year are, and only one film of `numbered` has both.
    """
    key = [numbered["title"].str.casefold(), numbered["year"]]
    alone = numbered[~numbered.assign(title=key[0]).duplicated(["title", "year"], keep=False)]
    id_of = {(title.casefold(), year): item_id for item_id, title, year
             in alone[["item_id", "title", "year"]].dropna().itertuples(index=False)}
    same = ((item_id, id_of.get((title.casefold(), year))) for item_id, title, year
            in items[["item_id", "title", "year"]].dropna().itertuples(index=False))
    return {int(item_id): entity_of[other] for item_id, other in same if other in entity_of}


def add_freebase(infos: dict[int, dict], facts: pd.DataFrame, entity_of: dict[int, str]) -> int:
    """Add Freebase facts to `infos`; return how many films were linked.

    Language, country and production company are lists; films tied by sequel and prequel share a
    `collection`. Producers, actors, writers and awards are left: the schema has no field for them.

    Args:
        facts: triples `head, relation, tail`.
        entity_of: {item_id: entity}. Check that it speaks of your ids: notes/01_data_parsing.ipynb.
    """
    field_of = {"film.film.language": "spoken_languages", "film.film.country": "production_countries",
                "film.film.production_companies": "production_companies"}
    chosen = facts[facts["relation"].isin(field_of)]
    tails = {head: list(zip(group["relation"], group["tail"], strict=True)) for head, group in chosen.groupby("head")}
    collection = collections(facts)
    linked = [item_id for item_id in infos if item_id in entity_of]
    for item_id in linked:
        info, entity = infos[item_id], entity_of[item_id]
        info["collection"] = collection.get(entity)
        for relation, tail in tails.get(entity, []):
            info[field_of[relation]].append(FREEBASE_NAMES.get(tail, tail))
        for field in field_of.values():
            info[field] = sorted(set(info[field]))
        languages = info["spoken_languages"]
        info["original_language"] = languages[0] if len(languages) == 1 else None
    return len(linked)


def collections(facts: pd.DataFrame) -> dict[str, str]:
    """Return {entity: collection} where sequels and prequels are tied together (union–find)."""
    parent: dict[str, str] = {}

    def root(entity: str) -> str:
        while parent.setdefault(entity, entity) != entity:
            entity = parent[entity]
        return entity

    tied = facts[facts["relation"].isin(["film.film.sequel", "film.film.prequel"])]
    for head, tail in tied[["head", "tail"]].itertuples(index=False):
        first, second = sorted((root(head), root(tail)))
        parent[second] = first
    return {entity: root(entity) for entity in parent}


async def add_linked(infos: dict[int, dict], links: pd.DataFrame, journal: Path, *imdb: Path,
                     **options: Any) -> dict[str, int]:
    """Add to `infos` what TMDB knows of its films, and IMDb of those TMDB has not; print a summary.

    Without the environment's `TMDB_API_KEY` TMDB is not asked, but the answers in the journal are used. A film
    that failed at TMDB gets IMDb's facts for now, and is asked for again at the next start.

    `await` it in a notebook; in a script, `tmdb.run(add_linked(…))`.

    Args:
        links: `item_id`, and `tmdbId`, `imdbId` as text, as `datasets.read_links` returns them.
        journal: where TMDB's answers are kept, for instance data/<dataset>/tmdb.jsonl.
        imdb: the dumps of IMDb, or the folder that holds them, as `read_imdb` takes them.
        options: of `tmdb.fetch`, such as `rate`.

    Returns:
        How many films are known from "TMDB", from "IMDb", from "neither", or have "failed" at TMDB: each film of
        `infos` in one of the four.

    Raises:
        DataError: as `tmdb.fetch` and `read_imdb`; or a link that is not a number.
    """
    tmdb_id, imdb_id = (linked_ids(links, column, infos) for column in ("tmdbId", "imdbId"))
    if os.environ.get(tmdb.KEY) or not tmdb_id:
        answers, failed = await tmdb.fetch(tmdb_id.values(), journal, **options)
    else:
        answers, failed = tmdb.read_journal(journal), {}
        print(f"{tmdb.KEY} is not set: TMDB is not asked")
    records = {item_id: answers[film] for item_id, film in tmdb_id.items() if answers.get(film) is not None}
    wanted = {film for item_id, film in imdb_id.items() if item_id not in records}
    facts = read_imdb(wanted, *imdb) if imdb else {}
    counts = dict.fromkeys(("TMDB", "IMDb", "neither", "failed"), 0)
    for item_id, info in infos.items():
        by_imdb = facts.get(imdb_id.get(item_id))
        add_facts(info, from_tmdb(records[item_id]) if item_id in records else by_imdb or {})
        counts["TMDB" if item_id in records else "failed" if tmdb_id.get(item_id) in failed
               else "IMDb" if by_imdb else "neither"] += 1
    print(f"of {len(infos):,} films: {counts['TMDB']:,} from TMDB, {counts['IMDb']:,} from IMDb, "
          f"{counts['neither']:,} known to neither, {counts['failed']:,} failed")
    if failed:
        some = ", ".join(f"{film} ({reason})" for film, reason in list(failed.items())[:3])
        print(f"failed at TMDB, to be tried again at the next start: {some}{', …' if len(failed) > 3 else ''}")
    return counts


def linked_ids(links: pd.DataFrame, column: str, infos: Iterable[int]) -> dict[int, int]:
    """Return {item_id: number} of one column of links, for films of `infos`; films with an empty cell are left out.

    Raises:
        DataError: naming the film whose cell is not a number.
    """
    numbers = {}
    if column in links:
        for item_id, text in zip(links["item_id"].tolist(), links[column].fillna("").astype(str), strict=True):
            found = re.fullmatch(r"\s*(?:tt)?(\d{1,18})(?:\.0*)?\s*", text)
            if found and item_id in infos:
                numbers[item_id] = int(found[1])
            elif text.strip() and not found:
                raise DataError(f"links: {column} {text!r} of film {item_id} is not a number; leave the cell empty "
                                f"if there is none")
    return numbers


def add_facts(info: dict, facts: dict) -> None:
    """Put facts into a film's record; where the source has nothing, what the record has stays."""
    info.update({field: value for field, value in facts.items() if value is not None and value != []})


def from_tmdb(record: dict) -> dict:
    """Return a record of TMDB in the words of SCHEMA; whatever is missing, blank or of another type is unknown.

    It may be a row of a table too, as `pd.read_csv` gives it. Money is in US dollars and `runtime` in minutes; TMDB
    writes 0 where it does not know them, and fewer than 1,000 dollars are as good as unknown. `revenue_d` is
    revenue − budget, as in the project of 2019. An average of no votes is unknown. Languages are ISO 639-1,
    countries ISO 3166-1 codes.
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
        "overview": None if re.fullmatch(r"no overview (found|available)\.?", overview or "", re.I) else overview,
        "popularity": _number(record.get("popularity"), least=0, kind=float),
        "production_companies": _names(record.get("production_companies"), "name", "|"),
        "production_countries": _names(record.get("production_countries"), "iso_3166_1"),
        "release_year": year, "release_month": month,
        "revenue": revenue,
        "runtime": _number(record.get("runtime"), least=1),
        "spoken_languages": _names(record.get("spoken_languages"), "iso_639_1"),
        "tagline": _text(record.get("tagline")),
        "title": _text(record.get("title")),
        "vote_average": None if votes == 0 else _number(record.get("vote_average"), least=0, kind=float),
        "vote_count": votes,
        "budget": budget,
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
    """Return (year, month) of 1995-10-30, 10/30/95 or 30.10.1995; no month where either number may be the day.

    A year of two digits is the last such one that has begun.
    """
    text, year, month = str(value) if isinstance(value, str | date) else "", 0, 0
    if iso := re.match(r"\s*(\d{4})(?:-(\d{1,2})(?!\d))?", text):
        year, month = int(iso[1]), int(iso[2] or 0)
    elif parts := re.match(r"\s*(\d{1,2})([/.-])(\d{1,2})\2(\d{4}|\d\d)(?!\d)", text):
        low, high = sorted((int(parts[1]), int(parts[3])))
        year, month = int(parts[4]), low if high > 12 or low == high else 0
        if len(parts[4]) == 2:
            year += (date.today().year - year) // 100 * 100
    return (year, month if 1 <= month <= 12 else None) if year >= 1870 else (None, None)


def read_imdb(imdb_ids: Iterable[int], *paths: Path) -> dict[int, dict]:
    """Read the facts of some films from IMDb's dumps, row by row; the rest of their ten million rows is not kept.

    The dumps are IMDb's non-commercial data sets, https://developer.imdb.com/non-commercial-datasets/, in UTF-8,
    tab-separated, with `\\N` where nothing is known.

    Args:
        imdb_ids: numbers of films without "tt": 114709 is tt0114709.
        paths: `title.basics.tsv.gz` and, if at hand, `title.ratings.tsv.gz` (or both unpacked), or their folder.

    Returns:
        {imdb_id: facts}: title, release_year, runtime (minutes), genres, adult, vote_average, vote_count.

    Raises:
        DataError: no `title.basics` there, a missing column, or a damaged file.
    """
    wanted, found = {b"tt%07d" % film: film for film in imdb_ids}, {}
    files = [file for path in map(Path, paths)
             for file in (sorted(path.glob("title.*"), reverse=True) if path.is_dir() else [path])]
    for kind, columns in (("basics", ("primaryTitle", "isAdult", "startYear", "runtimeMinutes", "genres")),
                          ("ratings", ("averageRating", "numVotes"))):
        path = next((file for file in files if re.fullmatch(rf"title\.{kind}\.tsv(\.gz)?", file.name)), None)
        if path is not None:
            found[kind] = dict(_read_dump(path, wanted, columns))
    if "basics" not in found:
        raise DataError(f"title.basics.tsv.gz is not in {', '.join(shown(path) for path in paths)}: get it from "
                        f"https://datasets.imdbws.com")
    facts = {}
    for film, (title, adult, year, runtime, genres) in found["basics"].items():
        average, votes = found.get("ratings", {}).get(film, (None, None))
        facts[film] = {
            "title": title, "adult": {"0": False, "1": True}.get(adult), "release_year": _number(year, least=1870),
            "runtime": _number(runtime, least=1), "genres": genres.split(",") if genres else [],
            "vote_average": _number(average, least=0, kind=float), "vote_count": _number(votes, least=0)}
    return facts


def _read_dump(path: Path, wanted: dict[bytes, int], columns: Iterable[str]) -> Iterator[tuple[int, list[str | None]]]:
    """Yield (imdb_id, cells of `columns`) of the wanted rows; a cell is None where the dump has `\\N` or nothing."""
    if not wanted:
        return
    left = set(wanted)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = file.readline().decode("utf-8").rstrip("\r\n").split("\t")
            if lacking := [column for column in ("tconst", *columns) if column not in header]:
                raise DataError(f"{shown(path)} lacks the column {lacking[0]}: it is no such dump of IMDb")
            places = [header.index(column) for column in columns]
            for line in file:
                if (name := line[:line.find(b"\t")]) in left:
                    cells = line.decode("utf-8", "replace").rstrip("\r\n").split("\t")
                    cells += [""] * (len(header) - len(cells))
                    yield wanted[name], [None if cells[place] in ("\\N", "") else cells[place] for place in places]
                    left.remove(name)
                    if not left:
                        return
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{shown(path)} cannot be read ({error}): fetch it again from "
                        f"https://datasets.imdbws.com") from error
