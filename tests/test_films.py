import asyncio
import copy
import gzip
import io
import json
import math
import tracemalloc

import pandas as pd
import pytest

from helpers.datasets import items_from_frame, read_links
from helpers.extra import tmdb
from helpers.extra.films import (
    add_facts,
    add_freebase,
    add_linked,
    collections,
    from_tmdb,
    linked_ids,
    read_facts,
    read_imdb,
    relink,
)
from helpers.features import SCHEMA, catalogue_infos, read_infos, write_infos
from helpers.files import DataError

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


TOY_STORY = {
    "adult": False, "backdrop_path": "/a.jpg", "belongs_to_collection": {"id": 10194, "name": "Toy Story Collection"},
    "budget": 30000000, "genres": [{"id": 16, "name": "Animation"}, {"id": 35, "name": "Comedy"}], "id": 862,
    "original_language": "en", "overview": " Led by Woody, Andy's toys live happily. ", "popularity": 25.398,
    "production_companies": [{"id": 3, "name": "Pixar"}, {"id": 4, "name": "L'Atelier Zoé & 東宝"}],
    "production_countries": [{"iso_3166_1": "US", "name": "United States of America"}],
    "release_date": "1995-10-30", "revenue": 373554033, "runtime": 81, "status": "Released", "tagline": "",
    "spoken_languages": [{"iso_639_1": "en", "name": "English"}], "title": "Toy Story", "vote_average": 7.9,
    "vote_count": 9787}


def test_record_of_tmdb_in_the_words_of_the_schema():
    assert from_tmdb(TOY_STORY) == {
        "adult": False, "collection": "Toy Story Collection", "genres": ["Animation", "Comedy"],
        "original_language": "en", "overview": "Led by Woody, Andy's toys live happily.", "popularity": 25.398,
        "production_companies": ["Pixar", "L'Atelier Zoé & 東宝"], "production_countries": ["US"],
        "release_year": 1995, "release_month": 10, "revenue": 373554033, "runtime": 81, "spoken_languages": ["en"],
        "tagline": None, "title": "Toy Story", "vote_average": 7.9, "vote_count": 9787, "budget": 30000000,
        "revenue_d": 343554033}


@pytest.mark.parametrize("field, value, expected", [
    ("overview", None, {"overview": None}), ("overview", " \n", {"overview": None}),
    ("overview", 5, {"overview": None}),
    ("overview", "No overview found.", {"overview": None}), ("overview", "no Overview found", {"overview": None}),
    ("overview", "No overview found. A thief flees.", {"overview": "No overview found. A thief flees."}),
    ("overview", "half \ud83d a pair", {"overview": "half ? a pair"}), ("overview", "🚀", {"overview": "🚀"}),
    ("budget", 0, {"budget": None, "revenue_d": None}), ("revenue", 0, {"revenue": None, "revenue_d": None}),
    ("budget", "30000000", {}), ("budget", -5, {"budget": None, "revenue_d": None}),
    ("budget", True, {"budget": None, "revenue_d": None}), ("budget", 10 ** 400, {"budget": None, "revenue_d": None}),
    ("budget", [1], {"budget": None, "revenue_d": None}), ("revenue", 1000, {"revenue": 1000, "revenue_d": -29999000}),
    ("runtime", 0, {"runtime": None}), ("runtime", None, {"runtime": None}), ("runtime", "long", {"runtime": None}),
    ("popularity", math.nan, {"popularity": None}), ("popularity", math.inf, {"popularity": None}),
    ("popularity", 0, {"popularity": 0.0}), ("vote_count", 0, {"vote_count": 0, "vote_average": None}),
    ("vote_average", "7.5", {"vote_average": 7.5}), ("vote_average", {}, {"vote_average": None}),
    ("release_date", "", {"release_year": None, "release_month": None}),
    ("release_date", None, {"release_year": None, "release_month": None}),
    ("release_date", 1995, {"release_year": None, "release_month": None}),
    ("release_date", "0000-00-00", {"release_year": None, "release_month": None}),
    ("release_date", "1995", {"release_year": 1995, "release_month": None}),
    ("release_date", "1995-13-01", {"release_year": 1995, "release_month": None}),
    ("release_date", "soon", {"release_year": None, "release_month": None}),
    ("adult", True, {"adult": True}), ("adult", None, {"adult": None}), ("adult", "yes", {"adult": None}),
    ("belongs_to_collection", None, {"collection": None}), ("belongs_to_collection", {}, {"collection": None}),
    ("belongs_to_collection", "Alien", {"collection": None}), ("genres", None, {"genres": []}),
    ("genres", "[{'name': 'Dra", {"genres": []}),
    ("genres", [None, 3, {}, {"name": None}, {"name": ""}], {"genres": []}),
    ("genres", [{"name": "War"}, {"name": "Drama"}, {"name": "War"}], {"genres": ["War", "Drama"]}),
    ("production_countries", [{"name": "France"}], {"production_countries": []}),
    ("spoken_languages", {"en": 1}, {"spoken_languages": []}), ("title", None, {"title": None})])
def test_odd_values_become_unknown_and_change_nothing_else(tmp_path, field, value, expected):
    facts = from_tmdb({**TOY_STORY, field: value})
    assert facts == {**from_tmdb(TOY_STORY), **expected}
    write_infos(tmp_path / "infos.json", {1: {**copy.deepcopy(SCHEMA), **facts}})
    assert "NaN" not in (tmp_path / "infos.json").read_text(encoding="utf-8")


TABLES = {  # how tables of TMDB's films write what the API gives as lists
    "json": {"genres": '[{"id": 9648, "name": "Mystery"}, {"id": 37, "name": "Western"}]',
             "production_companies": '[{"name": "Sorrel & Daughter", "id": 71}]',
             "production_countries": '[{"iso_3166_1": "NZ", "name": "New Zealand"}]',
             "spoken_languages": '[{"iso_639_1": "mi", "name": ""}]',
             "belongs_to_collection": '{"id": 5, "name": "The Ferry Collection", "poster_path": null}'},
    "Python": {"genres": "[{'id': 9648, 'name': 'Mystery'}, {'id': 37, 'name': 'Western'}]",
               "production_companies": "[{'name': 'Sorrel & Daughter', 'id': 71}]",
               "production_countries": "[{'iso_3166_1': 'NZ', 'name': 'New Zealand'}]",
               "spoken_languages": "[{'iso_639_1': 'mi', 'name': ''}]",
               "belongs_to_collection": "{'id': 5, 'name': \"The Ferry Collection\", 'poster_path': None}"},
    "names": {"genres": "Mystery|Western", "production_companies": "Sorrel & Daughter", "spoken_languages": "English",
              "belongs_to_collection": math.nan},
    "commas": {"genres": "Mystery, Western", "production_companies": "Sorrel & Daughter"}}


@pytest.mark.parametrize("kind", TABLES)
def test_lists_of_a_table_are_read_however_it_writes_them(kind):
    row = {"title": "Night Ferry", "adult": "False", "runtime": 96.0, "tagline": math.nan, **TABLES[kind]}
    csv = pd.DataFrame([row, {"title": "Another"}]).to_csv(index=False)
    read, empty = map(from_tmdb, pd.read_csv(io.StringIO(csv)).to_dict("records"))
    assert (read["genres"], read["production_companies"]) == (["Mystery", "Western"], ["Sorrel & Daughter"])
    assert (read["adult"], read["runtime"], read["tagline"]) == (False, 96, None)
    assert (read["production_countries"], read["spoken_languages"], read["collection"]) == (
        (["NZ"], ["mi"], "The Ferry Collection") if kind in ("json", "Python") else ([], [], None))
    assert empty == {**from_tmdb({}), "title": "Another"}


@pytest.mark.parametrize("text, year, month", [
    ("2/17/88", 1988, 2), ("17/2/1988", 1988, 2), ("17.02.1988", 1988, 2), ("4/4/71", 1971, 4),
    ("3/9/1988", 1988, None), ("3/9/88", 1988, None), ("13/14/88", 1988, None),
    ("1988-03-09", 1988, 3), (" 1988-03", 1988, 3), ("6/30/99", 1999, 6), ("6/30/00", 2000, 6),
    ("6/30/1850", None, None), ("6/30", None, None), (pd.Timestamp("1988-03-09"), 1988, 3), (pd.NaT, None, None)])
def test_year_of_a_date_is_known_and_its_month_where_it_cannot_be_the_day(text, year, month):
    facts = from_tmdb({"release_date": text})
    assert (facts["release_year"], facts["release_month"]) == (year, month)


def test_year_of_two_digits_is_never_in_the_future():
    now = pd.Timestamp.now().year
    assert [from_tmdb({"release_date": f"1/20/{year % 100:02}"})["release_year"] for year in (now - 1, now, now + 1)] \
        == [now - 1, now, now - 99]


def test_money_of_fewer_than_a_thousand_dollars_is_unknown():
    facts = from_tmdb({"budget": 12, "revenue": "999"})
    assert facts["budget"] is facts["revenue"] is facts["revenue_d"] is None


def test_item_table_of_ones_own_with_gaps_becomes_infos(tmp_path):
    table = pd.DataFrame({"item_id": [31, 32, 33], "title": ["Salt Road (2004)", math.nan, None],
                          "genres": ["['War', 'Drama']", math.nan, "Drama|Western"]})
    infos = catalogue_infos(items_from_frame(table), pd.Series([31]))
    assert [(info["title"], info["genres"]) for info in infos.values()] == [
        ("Salt Road", ["War", "Drama"]), ("item 32", []), ("item 33", ["Drama", "Western"])]
    write_infos(tmp_path / "infos.json", infos)
    assert read_infos(tmp_path / "infos.json") == infos


def test_record_without_any_field_has_every_field_of_the_schema_unknown():
    assert from_tmdb({}).keys() == SCHEMA.keys()
    assert all(value in (None, []) for value in from_tmdb({}).values())


def test_what_the_catalogue_knows_stays_where_the_source_has_nothing(infos):
    add_facts(infos[1], from_tmdb({"title": "", "genres": [], "runtime": 81, "adult": True}))
    assert infos[1] == {**SCHEMA, "title": "Toy Story", "release_year": 1995, "genres": ["Comedy", "Animation"],
                        "runtime": 81, "adult": True}


BASICS = ("tconst\ttitleType\tprimaryTitle\toriginalTitle\tisAdult\tstartYear\tendYear\truntimeMinutes\tgenres\n"
          "tt0000001\tshort\tCarmencita\tCarmencita\t0\t1894\t\\N\t1\tDocumentary,Short\n"
          "tt0113277\tmovie\tHeat \"1995\"\tHeat\t0\t1995\t\\N\t170\tAction,Crime,Drama\n"
          "tt0114709\tmovie\tToy Story\tToy Story\t0\t1995\t\\N\t81\tAdventure,Animation\n"
          "tt1140000\tmovie\tNothing Known\tx\t\\N\t\\N\t\\N\t\\N\t\\N\n"
          "tt12345678\tmovie\tLong Number\tx\t1\t2020\t\\N\t0\n")
RATINGS = "tconst\taverageRating\tnumVotes\ntt0000001\t5.7\t2000\ntt0114709\t8.3\t1000000\n"
HEAT = {"title": 'Heat "1995"', "adult": False, "release_year": 1995, "runtime": 170,
        "genres": ["Action", "Crime", "Drama"], "vote_average": None, "vote_count": None}
TOY_STORY_IMDB = {"title": "Toy Story", "adult": False, "release_year": 1995, "runtime": 81,
                  "genres": ["Adventure", "Animation"], "vote_average": 8.3, "vote_count": 1000000}


@pytest.fixture
def dumps(raw):
    return raw({"title.basics.tsv.gz": gzip.compress(BASICS.encode()),
                "title.ratings.tsv.gz": gzip.compress(RATINGS.encode())})


def test_needed_rows_of_imdb_are_read_from_a_folder_or_from_files(dumps, raw):
    expected = {114709: TOY_STORY_IMDB, 113277: HEAT}
    assert read_imdb([114709, 113277, 7], dumps) == expected
    assert read_imdb({113277, 114709}, dumps / "title.ratings.tsv.gz", dumps / "title.basics.tsv.gz") == expected
    assert read_imdb([114709], raw({"title.basics.tsv": BASICS}))[114709] == {
        **TOY_STORY_IMDB, "vote_average": None, "vote_count": None}
    assert read_imdb([], dumps) == {}


def test_null_of_imdb_is_unknown_and_a_short_row_survives(dumps):
    unknown = {"adult": None, "release_year": None, "runtime": None, "genres": [], "vote_average": None,
               "vote_count": None}
    assert read_imdb([1140000, 12345678], dumps) == {
        1140000: {"title": "Nothing Known", **unknown},
        12345678: {"title": "Long Number", **unknown, "adult": True, "release_year": 2020}}


def test_dumps_of_imdb_are_not_held_in_memory(raw):
    rows = "".join(f"tt{number:07d}\tmovie\tFilm\tFilm\t0\t1995\t\\N\t81\tDrama\n" for number in range(2, 200_000))
    folder = raw({"title.basics.tsv.gz": gzip.compress((BASICS.splitlines(True)[0] + rows).encode(), 1)})
    tracemalloc.start()
    try:
        assert list(read_imdb([199_999, 5_000_000], folder)) == [199_999]
        assert tracemalloc.get_traced_memory()[1] < len(rows) / 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("files, sentence", [
    ({}, "title.basics.tsv.gz is not in"), ({"title.ratings.tsv": RATINGS}, "title.basics.tsv.gz is not in"),
    ({"title.basics.tsv": BASICS.replace("startYear", "year")}, "title.basics.tsv lacks the column startYear"),
    ({"title.basics.tsv": ""}, "title.basics.tsv lacks the column tconst"),
    ({"title.basics.tsv.gz": gzip.compress(BASICS.encode())[:-40]}, "title.basics.tsv.gz cannot be read"),
    ({"title.basics.tsv.gz": BASICS}, "title.basics.tsv.gz cannot be read")])
def test_unusable_dump_of_imdb_is_said(raw, files, sentence):
    with pytest.raises(DataError, match=sentence):
        read_imdb([99], raw(files))


def test_links_are_numbers_or_empty(infos, raw):
    links = read_links(raw({"links.csv": "movieId,imdbId,tmdbId\n1,0114709,862\n2,tt0113277,\n3,,949.0\n77,5,6\n"}))
    assert linked_ids(links, "tmdbId", infos) == {1: 862, 3: 949}
    assert linked_ids(links, "imdbId", infos) == {1: 114709, 2: 113277}
    assert linked_ids(links, "entity_id", infos) == {}
    with pytest.raises(DataError, match="tmdbId 'abc' of film 1 is not a number"):
        linked_ids(links.assign(tmdbId="abc"), "tmdbId", infos)


@pytest.fixture
def answered(monkeypatch):
    """Let `tmdb.fetch` answer from a dict; return what it was asked."""
    def use(answers, failed):
        asked = []

        async def fetch(films, journal, **options):
            asked.append((list(films), options))
            return {film: answers[film] for film in asked[-1][0] if film in answers}, failed

        monkeypatch.setattr(tmdb, "fetch", fetch)
        monkeypatch.setenv(tmdb.KEY, "a-key-for-nothing")
        return asked
    return use


LINKS = pd.DataFrame({"item_id": [1, 2, 3, 8, 77], "imdbId": ["0114709", "0113277", "0000001", "999", "1"],
                      "tmdbId": ["862", "404", "503", "", "1"]})


def test_films_come_from_tmdb_then_imdb_and_each_is_counted_once(infos, dumps, tmp_path, answered, capsys):
    asked = answered({862: TOY_STORY, 404: None}, {503: "HTTP 503"})
    counts = asyncio.run(add_linked(infos, LINKS, tmp_path / "t", dumps, rate=7))
    assert asked == [([862, 404, 503], {"rate": 7})]
    assert counts == {"TMDB": 1, "IMDb": 1, "neither": 2, "failed": 1} and sum(counts.values()) == len(infos)
    assert infos[1] == {**SCHEMA, **from_tmdb(TOY_STORY)}
    assert infos[2] == {**SCHEMA, **HEAT}  # 404
    assert infos[3]["title"] == "Carmencita" and infos[3]["release_year"] == 1894  # failed: IMDb for now
    assert infos[8] == {**SCHEMA, "title": "item 8"} and infos[9] == {**SCHEMA, "title": "item 9"}
    out = capsys.readouterr().out
    assert "of 5 films: 1 from TMDB, 1 from IMDb, 2 known to neither, 1 failed" in out and "503 (HTTP 503)" in out


def test_film_without_tmdb_id_goes_to_imdb(infos, dumps, tmp_path, answered):
    answered({}, {})
    links = pd.DataFrame({"item_id": [8], "imdbId": ["0114709"], "tmdbId": [""]})
    assert asyncio.run(add_linked(infos, links, tmp_path / "t", dumps))["IMDb"] == 1
    assert infos[8] == {**SCHEMA, **TOY_STORY_IMDB}


def test_two_films_of_one_tmdb_id_share_facts_but_no_list(infos, tmp_path, answered):
    answered({862: TOY_STORY}, {})
    links = pd.DataFrame({"item_id": [1, 2], "tmdbId": ["862", "862"]})
    assert asyncio.run(add_linked(infos, links, tmp_path / "t"))["TMDB"] == 2
    assert infos[1] == infos[2]
    infos[1]["genres"].append("new")
    assert infos[2]["genres"] == ["Animation", "Comedy"]


def test_without_a_key_the_journal_and_imdb_are_used(infos, dumps, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(tmdb.KEY, raising=False)
    (tmp_path / "t").write_text(json.dumps({"id": 862, "record": TOY_STORY}) + "\n")
    counts = tmdb.run(add_linked(infos, LINKS, tmp_path / "t", dumps))
    assert counts == {"TMDB": 1, "IMDb": 2, "neither": 2, "failed": 0}
    assert "TMDB_API_KEY is not set: TMDB is not asked" in capsys.readouterr().out


def test_without_links_nothing_is_asked_nor_changed(infos, tmp_path, monkeypatch):
    monkeypatch.delenv(tmdb.KEY, raising=False)
    before = copy.deepcopy(infos)
    links = pd.DataFrame({"item_id": [1], "entity_id": ["m.a"]})
    assert tmdb.run(add_linked(infos, links, tmp_path / "t")) == {"TMDB": 0, "IMDb": 0, "neither": 5, "failed": 0}
    assert infos == before
