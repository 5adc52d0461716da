import asyncio
import copy
import gzip
import io
import json
import math
import tracemalloc

import pandas as pd
import pytest

from helpers.agents import data_parsing
from helpers.datasets import read_items, read_links, read_ratings
from helpers.extra import films, tmdb
from helpers.extra.films import add_facts, add_freebase, add_linked, from_tmdb, linked_ids, read_facts, read_imdb
from helpers.features import SCHEMA, catalogue_infos, read_infos, write_infos
from helpers.files import DataError

FACTS = [["m.a", "film.film.language", "m.02h40lc"], ["NA", "film.film.country", "m.09c7w0"]]
KG = "head_id:token\trelation_id:token\ttail_id:token\n" + "".join("\t".join(fact) + "\n" for fact in FACTS)
LINK = "item_id:token\tentity_id:token\n476\tm.a\n3\tNA\n"


@pytest.fixture
def infos():
    items = pd.DataFrame({"item_id": [1, 2, 3], "title": ["Toy Story", "GoldenEye", "Heat"],
                          "year": pd.array([1995, None, 1995], dtype="Int64"),
                          "genres": [["Comedy", "Animation"], [], ["Crime"]]})
    return catalogue_infos(items, pd.Series([1, 2, 9, 9, 8]))


def triples(*rows):
    return pd.DataFrame(rows, columns=["head", "relation", "tail"], dtype=str)


def test_catalogue_starts_every_film_with_every_field_of_the_schema(infos, tmp_path):
    assert list(infos) == [1, 2, 3, 8, 9] and all(list(info) == list(SCHEMA) for info in infos.values())
    assert infos[1] == {**SCHEMA, "title": "Toy Story", "release_year": 1995, "genres": ["Comedy", "Animation"]}
    assert infos[2] == {**SCHEMA, "title": "GoldenEye"}
    assert infos[9] == {**SCHEMA, "title": "item 9"}  # rated, but not in the catalogue
    write_infos(tmp_path / "infos.json", infos)
    assert read_infos(tmp_path / "infos.json") == infos


def test_freebase_facts_reach_their_fields_sorted_and_once(infos):
    facts = triples(("m.a", "film.film.language", "m.064_8sq"), ("m.a", "film.film.language", "m.02h40lc"),
                    ("m.a", "film.film.language", "m.02h40lc"), ("m.a", "film.film.country", "m.09c7w0"),
                    ("m.a", "film.film.production_companies", "m.zz"), ("m.a", "film.film.directed_by", "m.q"),
                    ("m.b", "film.film.language", "m.0other"))
    assert add_freebase(infos, facts, {1: "m.a", 2: "m.b", 8: "m.without", 77: "m.not_in_catalogue"}) == 3
    assert 77 not in infos and infos[8] == {**SCHEMA, "title": "item 8"} and SCHEMA["spoken_languages"] == []
    assert infos[1]["spoken_languages"] == ["en", "fr"]
    assert infos[1]["production_countries"] == ["US"]
    assert infos[1]["production_companies"] == ["m.zz"]
    assert infos[1]["original_language"] is None  # two are spoken: which came first is not said
    assert infos[2]["original_language"] == "m.0other"
    assert infos[3] == {**SCHEMA, "title": "Heat", "release_year": 1995, "genres": ["Crime"]}


def test_sequels_and_prequels_share_a_collection_named_by_the_smallest_id(infos):
    facts = triples(("m.c", "film.film.sequel", "m.b"), ("m.d", "film.film.prequel", "m.c"),
                    ("m.x", "film.film.sequel", "m.y"), ("m.b", "film.film.prequel", "m.a"),
                    ("m.a", "film.film.language", "m.x"))  # one language ties no films
    add_freebase(infos, facts, {1: "m.d", 2: "m.b", 3: "m.y", 8: "m.lone"})
    assert [infos[item]["collection"] for item in (1, 2, 3, 8)] == ["m.a", "m.a", "m.x", None]
    chain = [("m.5", "film.film.sequel", "m.4"), ("m.3", "film.film.sequel", "m.2"),
             ("m.4", "film.film.sequel", "m.3"), ("m.2", "film.film.prequel", "m.5")]
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        known = films.collections(triples(*(chain[i] for i in order)))
        assert known == dict.fromkeys(["m.2", "m.3", "m.4", "m.5"], "m.2")


@pytest.mark.parametrize("files, n_facts", [
    ({"x.kg": KG, "x.link": LINK}, 2), ({}, 0), ({"x.kg": KG}, 0), ({"x.link": LINK}, 0),
    ({"x.kg": KG, "links.csv": "movieId,imdbId,tmdbId\n1,2,3\n"}, 0)])
def test_facts_and_links_are_read_and_without_them_nothing_changes(infos, raw, files, n_facts):
    before = copy.deepcopy(infos)
    facts, entity_of = read_facts(raw(files))
    assert (facts.to_numpy().tolist(), entity_of) == ((FACTS, {476: "m.a", 3: "NA"}) if n_facts else ([], {}))
    assert add_freebase(infos, facts, entity_of) == n_facts // 2 and (infos == before) == (n_facts == 0)


def test_films_are_linked_anew_by_title_and_year_where_only_one_has_both():
    def catalogue(*films):
        return pd.DataFrame(films, columns=["item_id", "title", "year"]).astype({"year": "Int64"})

    items = catalogue((1, "Toy Story", 1995), (2, "HEAT", 1995), (3, "Heat", 1972), (4, "Kolya", None),
                      (5, "New", 1996), (6, "Twice", 1990))
    numbered = catalogue((10, "Heat", 1995), (11, "toy story", 1995), (12, "Kolya", None), (13, "New", 1996),
                         (14, "Twice", 1990), (15, "twice", 1990), (16, "Toy Story", 1999))
    entity_of = {10: "m.heat", 11: "m.toy", 12: "m.kolya", 14: "m.t", 15: "m.u", 16: "m.toy2", 1: "m.wrong"}
    assert films.relink(items, numbered, entity_of) == {1: "m.toy", 2: "m.heat"}


@pytest.mark.parametrize("content, said", [
    ('{"1": {"title": "Toy', "01_data"), ("[1, 2]", "01_data"), ('{"one": {}}', "01_data"), ("\xff", "01_data"),
    ('{"1": 5}', "film 1"), (json.dumps({"1": SCHEMA, "4": {"adult": None}}), "film 4")])
def test_damaged_infos_get_a_sentence(tmp_path, content, said):
    (tmp_path / "infos.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=said):
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


def test_record_of_tmdb_in_the_words_of_the_schema_adds_to_what_is_known(infos):
    assert from_tmdb({}).keys() == SCHEMA.keys() and all(value in (None, []) for value in from_tmdb({}).values())
    add_facts(infos[1], from_tmdb({"title": "", "genres": [], "runtime": 81, "adult": True}))
    assert infos[1] == {**SCHEMA, "title": "Toy Story", "release_year": 1995, "genres": ["Comedy", "Animation"],
                        "runtime": 81, "adult": True}
    assert from_tmdb(TOY_STORY) == {
        "adult": False, "collection": "Toy Story Collection", "genres": ["Animation", "Comedy"],
        "original_language": "en", "overview": "Led by Woody, Andy's toys live happily.", "popularity": 25.398,
        "production_companies": ["Pixar", "L'Atelier Zoé & 東宝"], "production_countries": ["US"],
        "release_year": 1995, "release_month": 10, "revenue": 373554033, "runtime": 81, "spoken_languages": ["en"],
        "tagline": None, "title": "Toy Story", "vote_average": 7.9, "vote_count": 9787, "budget": 30000000,
        "revenue_d": 343554033}


@pytest.mark.parametrize("field, values, expected", [
    ("overview", [None, " \n", 5, "No overview found.", "no movie Overview available"], {"overview": None}),
    ("overview", ["No overview found. A thief."], {"overview": "No overview found. A thief."}),
    ("overview", ["half \ud83d a pair"], {"overview": "half ? a pair"}),
    ("budget", [0, -5, "999", True, 10 ** 400, [1], math.nan], {"budget": None, "revenue_d": None}),
    ("revenue", [1000], {"revenue": 1000, "revenue_d": -29999000}), ("runtime", [0, None, "long"], {"runtime": None}),
    ("popularity", [math.nan, math.inf, -1], {"popularity": None}), ("popularity", [0], {"popularity": 0.0}),
    ("vote_count", [0], {"vote_count": 0, "vote_average": None}), ("vote_average", ["7.5"], {"vote_average": 7.5}),
    ("adult", [True, "true"], {"adult": True}), ("adult", [None, "yes"], {"adult": None}),
    ("belongs_to_collection", [None, {}, "Alien"], {"collection": None}),
    ("genres", [None, "[{'name': 'Dra", [None, 3, {}, {"name": None}, {"name": ""}]], {"genres": []}),
    ("genres", [[{"name": "War"}, {"name": "Drama"}, {"name": "War"}], "War|Drama"], {"genres": ["War", "Drama"]}),
    ("production_countries", [[{"name": "France"}], "US"], {"production_countries": []})])
def test_odd_values_become_unknown_and_change_nothing_else(tmp_path, field, values, expected):
    for value in values:
        facts = from_tmdb({**TOY_STORY, field: value})
        assert facts == {**from_tmdb(TOY_STORY), **expected}
        write_infos(tmp_path / "infos.json", {1: {**SCHEMA, **facts}})
        assert "NaN" not in (tmp_path / "infos.json").read_text(encoding="utf-8")


LISTS = {"genres": [{"id": 9648, "name": "Mystery"}, {"id": 37, "name": "Western"}],
         "production_companies": [{"name": "Sorrel & Daughter", "id": 71}],
         "production_countries": [{"iso_3166_1": "NZ", "name": "New Zealand"}],
         "spoken_languages": [{"iso_639_1": "mi", "name": ""}],
         "belongs_to_collection": {"id": 5, "name": "The Ferry Collection", "poster_path": None}}
NAMES = {"production_companies": "Sorrel & Daughter", "spoken_languages": "English", "belongs_to_collection": math.nan}


@pytest.mark.parametrize("lists", [
    {field: json.dumps(value) for field, value in LISTS.items()}, {field: str(value) for field, value in LISTS.items()},
    {"genres": "Mystery|Western", **NAMES}, {"genres": "Mystery, Western", **NAMES}])
def test_lists_of_a_table_are_read_however_it_writes_them(lists):
    row = {"title": "Night Ferry", "adult": "False", "runtime": 96.0, "tagline": math.nan, **lists}
    table = pd.DataFrame([row, {"title": "Another"}]).to_csv(index=False)
    read, empty = map(from_tmdb, pd.read_csv(io.StringIO(table)).to_dict("records"))
    assert (read["genres"], read["production_companies"]) == (["Mystery", "Western"], ["Sorrel & Daughter"])
    assert (read["adult"], read["runtime"], read["tagline"]) == (False, 96, None)
    assert (read["production_countries"], read["spoken_languages"], read["collection"]) == (
        (["NZ"], ["mi"], "The Ferry Collection") if "production_countries" in lists else ([], [], None))
    assert empty == {**from_tmdb({}), "title": "Another"}


NOW = pd.Timestamp.now().year


@pytest.mark.parametrize("text, year, month", [
    ("", None, None), (1995, None, None), ("0000-00-00", None, None), ("1995", 1995, None), ("1995-13-01", 1995, None),
    (" 1988-03", 1988, 3), ("2/17/88", 1988, 2), ("17.02.1988", 1988, 2), ("4/4/71", 1971, 4),
    ("3/9/1988", 1988, None), ("13/14/88", 1988, None), ("6/30/00", 2000, 6), ("6/30/1850", None, None),
    (pd.Timestamp("1988-03-09"), 1988, 3), (pd.NaT, None, None), (f"1/20/{(NOW + 1) % 100:02}", NOW - 99, 1)])
def test_year_of_a_date_is_known_and_its_month_where_it_cannot_be_the_day(text, year, month):
    facts = from_tmdb({"release_date": text})
    assert (facts["release_year"], facts["release_month"]) == (year, month)


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
    unknown = {"adult": None, "release_year": None, "runtime": None, "genres": [], "vote_average": None,
               "vote_count": None}
    expected = {114709: TOY_STORY_IMDB, 113277: HEAT, 1140000: {"title": "Nothing Known", **unknown},
                12345678: {"title": "Long Number", **unknown, "adult": True, "release_year": 2020}}
    assert read_imdb([*expected, 7], dumps) == expected
    assert read_imdb(set(expected), dumps / "title.ratings.tsv.gz", dumps / "title.basics.tsv.gz") == expected
    assert read_imdb([114709], raw({"title.basics.tsv": BASICS}))[114709] == {
        **TOY_STORY_IMDB, "vote_average": None, "vote_count": None}
    assert read_imdb([], dumps) == {}


def test_dumps_of_imdb_are_not_held_in_memory(raw):
    rows = "".join(f"tt{number:07d}\tmovie\tFilm\tFilm\t0\t1995\t\\N\t81\tDrama\n" for number in range(2, 200_000))
    folder = raw({"title.basics.tsv.gz": gzip.compress((BASICS.splitlines(True)[0] + rows).encode(), 1)})
    tracemalloc.start()
    try:
        assert list(read_imdb([199_999, 5_000_000], folder)) == [199_999]
        assert tracemalloc.get_traced_memory()[1] < len(rows) / 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("files, said", [
    ({"title.ratings.tsv": RATINGS}, "title.basics"), ({"title.basics.tsv": ""}, "title.basics"),
    ({"title.basics.tsv": BASICS.replace("startYear", "year")}, "startYear"),
    ({"title.basics.tsv.gz": gzip.compress(BASICS.encode())[:-40]}, "title.basics")])
def test_unusable_dump_of_imdb_is_said(raw, files, said):
    with pytest.raises(DataError, match=said):
        read_imdb([99], raw(files))


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
    assert "TMDB 1, IMDb 1, neither 2, failed 1" in out and "HTTP 503" in out
    with pytest.raises(DataError, match="'abc' of film 1"):
        linked_ids(LINKS.assign(tmdbId="abc"), "tmdbId", infos)
    assert linked_ids(LINKS, "entity_id", infos) == {}


def test_a_film_without_tmdb_id_goes_to_imdb_and_two_of_one_id_share_no_list(infos, dumps, tmp_path, answered):
    answered({862: TOY_STORY}, {})
    links = pd.DataFrame({"item_id": [1, 2, 8], "imdbId": ["", "", "0114709"], "tmdbId": ["862", "862", ""]})
    counts = asyncio.run(add_linked(infos, links, tmp_path / "t", dumps))
    assert counts == {"TMDB": 2, "IMDb": 1, "neither": 2, "failed": 0}
    assert infos[8] == {**SCHEMA, **TOY_STORY_IMDB} and infos[1] == infos[2]
    assert infos[1]["genres"] is not infos[2]["genres"]


def test_without_a_key_the_journal_and_imdb_are_used(infos, dumps, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(tmdb.KEY, raising=False)
    (tmp_path / "t").write_text(json.dumps({"id": 862, "record": TOY_STORY}) + "\n")
    counts = tmdb.run(add_linked(infos, LINKS, tmp_path / "t", dumps))
    assert counts == {"TMDB": 1, "IMDb": 2, "neither": 2, "failed": 0}
    assert "TMDB_API_KEY is not set: TMDB is not asked" in capsys.readouterr().out


def test_summary_counts_what_a_reader_should_know(raw):
    folder = raw({"ratings.csv": "userId,movieId,rating,timestamp\n1,10,3,5\n1,20,4,5\n1,10,5,9\n1,10,1,9\n2,10,2,9\n"
                                 "2,77,2,8\n3,20,2,9\n",
                  "movies.csv": "movieId,title,genres\n" + "".join(f"{i},A,B\n" for i in (20, 10, 50, 40, 30)),
                  "links.csv": "movieId,imdbId,tmdbId\n10,01,8\n20,02,\n30,03,8\n40,04,9\n40,05,9\n"})
    table = data_parsing.what_is_odd(read_ratings(folder), read_items(folder), read_links(folder))
    assert {fact: (row["count"], row["which"]) for fact, row in table.iterrows()} == {
        "ratings": (7, ""),
        "users": (3, ""),
        "items rated": (3, ""),
        "duplicate (user, item) ratings": (2, ""),                  # user 1 rates item 10 three times
        "ratings in the same second as the one before": (2, ""),    # users 1 and 3 are not user 2
        "items never rated": (3, [30, 40, 50]),
        "items rated but not in the catalogue": (1, [77]),
        "items without a tmdbId": (2, [20, 50]),                    # an empty one, and no line at all
        "tmdbIds used by several items": (1, {"8": [10, 30]}),      # item 40 is there twice, but one item
    }
