"""Collect the facts of every film into `infos`: one schema, whatever the source."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.datasets import find, read_links
from helpers.files import DataError, shown, write_json

# The schema of a film's facts. None: unknown; an empty list: none known.
SCHEMA: dict[str, Any] = {
    "adult": False, "collection": None, "genres": [], "original_language": None, "overview": None,
    "popularity": None, "production_companies": [], "production_countries": [], "release_year": None,
    "release_month": None, "revenue": None, "runtime": None, "spoken_languages": [], "tagline": None,
    "title": None, "vote_average": None, "vote_count": None, "budget": None, "revenue_d": None,
}

# Freebase names things by opaque ids. These are the commonest languages and countries among films
# of the nineties; the rest keep their id.
FREEBASE_NAMES = {
    "m.02h40lc": "en", "m.064_8sq": "fr", "m.06nm1": "es", "m.02bjrlw": "it", "m.04306rv": "de",
    "m.09c7w0": "US", "m.07ssc": "GB", "m.0f8l9c": "FR", "m.0345h": "DE", "m.03rjj": "IT",
}


def catalogue_infos(items: pd.DataFrame, rated: pd.Series) -> dict[int, dict]:
    """Start `infos` from the catalogue; a rated item it lacks gets its id as title.

    Args:
        items: as `datasets.read_items` returns it.
        rated: item ids of the ratings (int64, repeats allowed).
    """
    infos = {}
    for item_id, title, year, genres in items[["item_id", "title", "year", "genres"]].itertuples(index=False):
        infos[int(item_id)] = {**deepcopy(SCHEMA), "title": title, "genres": list(genres),
                               "release_year": None if pd.isna(year) else int(year)}
    for item_id in sorted(set(rated.unique()) - infos.keys()):
        infos[int(item_id)] = {**deepcopy(SCHEMA), "title": f"item {item_id}"}
    return infos


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


def write_infos(path: Path, infos: dict[int, dict]) -> None:
    """Write `infos.json`, keys as text as JSON wants them."""
    write_json(path, {str(item_id): info for item_id, info in infos.items()})


def read_infos(path: Path) -> dict[int, dict]:
    """Read `infos.json` back, with integer item ids.

    Raises:
        DataError: if the file is damaged or a film lacks a field of the schema.
    """
    try:
        infos = {int(key): info for key, info in json.loads(Path(path).read_text(encoding="utf-8")).items()}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, ValueError) as error:
        raise DataError(f"{shown(path)} is damaged ({error}): delete it and run notes/01_data_parsing.ipynb") from error
    for item_id, info in infos.items():
        if lacking := SCHEMA.keys() - (info.keys() if isinstance(info, dict) else set()):
            raise DataError(f"{shown(path)}: film {item_id} lacks {', '.join(sorted(lacking))}")
    return infos
