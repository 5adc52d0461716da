import copy
import json

import pandas as pd
import pytest

from helpers.files import DataError
from helpers.metadata import (
    SCHEMA,
    add_freebase,
    catalogue_infos,
    collections,
    read_facts,
    read_infos,
    relink,
    write_infos,
)

KG = "head_id:token\trelation_id:token\ttail_id:token\n"


@pytest.fixture
def infos():
    items = pd.DataFrame({"item_id": [1, 2, 3], "title": ["Toy Story", "GoldenEye", "Heat"],
                          "year": pd.array([1995, None, 1995], dtype="Int64"),
                          "genres": [["Comedy", "Animation"], [], ["Crime"]]})
    return catalogue_infos(items, pd.Series([1, 2, 9, 9, 8]))


def triples(*rows):
    return pd.DataFrame(rows, columns=["head", "relation", "tail"], dtype=str)


def test_catalogue_gives_every_field_of_the_schema(infos):
    assert all(list(info) == list(SCHEMA) for info in infos.values())
    assert infos[1] == {**SCHEMA, "title": "Toy Story", "release_year": 1995, "genres": ["Comedy", "Animation"]}
    assert infos[2]["release_year"] is None and infos[2]["genres"] == []


def test_rated_item_that_the_catalogue_lacks_gets_its_id_as_title(infos):
    assert list(infos) == [1, 2, 3, 8, 9]
    assert infos[9] == {**SCHEMA, "title": "item 9"}


def test_infos_can_be_written_as_json(infos, tmp_path):
    write_infos(tmp_path / "infos.json", infos)
    assert read_infos(tmp_path / "infos.json") == infos


@pytest.mark.parametrize("changed, other", [(1, 2), (8, 9), (9, 3)])
def test_no_two_films_share_a_list(infos, changed, other):
    before = copy.deepcopy(SCHEMA)
    others = copy.deepcopy(infos[other])
    try:
        for field, value in before.items():
            if isinstance(value, list):
                infos[changed][field].append("new")
        assert infos[other] == others
        assert before == SCHEMA
    finally:
        for field, value in before.items():
            if isinstance(value, list):
                SCHEMA[field][:] = value


def test_catalogue_genres_are_copied():
    genres = ["Comedy"]
    items = pd.DataFrame({"item_id": [1], "title": ["A"], "year": pd.array([1995], dtype="Int64"), "genres": [genres]})
    catalogue_infos(items, pd.Series([1]))[1]["genres"].append("new")
    assert genres == ["Comedy"]


def test_freebase_facts_reach_their_fields_sorted_and_once(infos):
    facts = triples(("m.a", "film.film.language", "m.064_8sq"), ("m.a", "film.film.language", "m.02h40lc"),
                    ("m.a", "film.film.language", "m.02h40lc"), ("m.a", "film.film.country", "m.09c7w0"),
                    ("m.a", "film.film.production_companies", "m.zz"), ("m.a", "film.film.directed_by", "m.q"),
                    ("m.b", "film.film.language", "m.0other"))
    add_freebase(infos, facts, {1: "m.a", 2: "m.b"})
    assert infos[1]["spoken_languages"] == ["en", "fr"]
    assert infos[1]["production_countries"] == ["US"]
    assert infos[1]["production_companies"] == ["m.zz"]
    assert infos[1]["original_language"] is None  # two are spoken: which came first is not said
    assert infos[2]["original_language"] == "m.0other"
    assert infos[3] == {**SCHEMA, "title": "Heat", "release_year": 1995, "genres": ["Crime"]}


def test_linked_films_of_the_catalogue_are_counted(infos):
    facts = triples(("m.a", "film.film.language", "m.02h40lc"))
    assert add_freebase(infos, facts, {1: "m.a", 2: "m.without", 77: "m.not_in_catalogue"}) == 2
    assert 77 not in infos


def test_sequels_and_prequels_share_a_collection_named_by_the_smallest_id(infos):
    facts = triples(("m.c", "film.film.sequel", "m.b"), ("m.d", "film.film.prequel", "m.c"),
                    ("m.x", "film.film.sequel", "m.y"), ("m.b", "film.film.prequel", "m.a"),
                    ("m.a", "film.film.language", "m.x"))  # one language ties no films
    add_freebase(infos, facts, {1: "m.d", 2: "m.b", 3: "m.y", 8: "m.lone"})
    assert [infos[item]["collection"] for item in (1, 2, 3, 8)] == ["m.a", "m.a", "m.x", None]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_collections_do_not_depend_on_the_order_of_the_facts(order):
    chain = [("m.5", "film.film.sequel", "m.4"), ("m.3", "film.film.sequel", "m.2"),
             ("m.4", "film.film.sequel", "m.3"), ("m.2", "film.film.prequel", "m.5")]
    assert collections(triples(*(chain[i] for i in order))) == dict.fromkeys(["m.2", "m.3", "m.4", "m.5"], "m.2")


def test_facts_of_one_film_do_not_reach_another_nor_the_schema(infos):
    before = copy.deepcopy(SCHEMA)
    try:
        add_freebase(infos, triples(("m.a", "film.film.language", "m.02h40lc")), {8: "m.a", 9: "m.b"})
        assert infos[8]["spoken_languages"] == ["en"]
        assert infos[9]["spoken_languages"] == []
        assert before == SCHEMA
    finally:
        SCHEMA["spoken_languages"][:] = []


def test_facts_and_links_are_read(raw):
    folder = raw({"x.kg": KG + "m.a\tfilm.film.language\tm.02h40lc\nm.b\tfilm.film.country\tm.09c7w0\n",
                  "x.link": "item_id:token\tentity_id:token\n476\tm.a\n7\tm.b\n"})
    facts, entity_of = read_facts(folder)
    assert facts.to_dict("list") == {"head": ["m.a", "m.b"], "relation": ["film.film.language", "film.film.country"],
                                     "tail": ["m.02h40lc", "m.09c7w0"]}
    assert entity_of == {476: "m.a", 7: "m.b"}


@pytest.mark.parametrize("files", [{}, {"x.kg": KG + "m.a\tfilm.film.language\tm.b\n"},
                                   {"x.link": "item_id:token\tentity_id:token\n1\tm.a\n"},
                                   {"x.kg": KG, "links.csv": "movieId,imdbId,tmdbId\n1,2,3\n"}])
def test_folder_without_a_knowledge_graph_changes_nothing(infos, raw, files):
    before = copy.deepcopy(infos)
    facts, entity_of = read_facts(raw(files))
    assert (len(facts), entity_of) == (0, {})
    assert add_freebase(infos, facts, entity_of) == 0 and infos == before


def catalogue(*films):
    items = pd.DataFrame(films, columns=["item_id", "title", "year"])
    return items.astype({"year": "Int64"})


def test_films_are_linked_anew_by_title_and_year():
    items = catalogue((1, "Toy Story", 1995), (2, "HEAT", 1995), (3, "Heat", 1972), (4, "Kolya", None),
                      (5, "New", 1996))
    numbered = catalogue((10, "Heat", 1995), (11, "toy story", 1995), (12, "Kolya", None), (13, "New", 1996))
    entity_of = {10: "m.heat", 11: "m.toy", 12: "m.kolya", 1: "m.wrong", 2: "m.wrong"}
    assert relink(items, numbered, entity_of) == {1: "m.toy", 2: "m.heat"}


def test_film_that_is_numbered_twice_is_not_linked():
    numbered = catalogue((10, "Heat", 1995), (11, "heat", 1995), (12, "Toy Story", 1995), (13, "Toy Story", 1999))
    entity_of = {10: "m.a", 11: "m.b", 12: "m.toy", 13: "m.toy2"}
    assert relink(catalogue((1, "Heat", 1995), (2, "Toy Story", 1999)), numbered, entity_of) == {2: "m.toy2"}


@pytest.mark.parametrize("content", ["", '{"1": {"title": "Toy', "[1, 2]", '{"one": {}}', '{"1": 5}', "\xff"])
def test_damaged_infos_get_a_sentence(tmp_path, content):
    (tmp_path / "infos.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"infos.json.*01_data_parsing|infos.json: film 1"):
        read_infos(tmp_path / "infos.json")


def test_film_that_lacks_a_field_is_named(tmp_path):
    film = {key: value for key, value in SCHEMA.items() if key not in ("budget", "adult")}
    (tmp_path / "infos.json").write_text(json.dumps({"1": SCHEMA, "4": film}))
    with pytest.raises(DataError, match="film 4 lacks adult, budget"):
        read_infos(tmp_path / "infos.json")
