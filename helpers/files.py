"""Where artefacts lie, and how they are written: beside their place first, then renamed into it."""

import errno
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

PROJECT = Path(__file__).resolve().parent.parent
ROOT = Path(os.environ.get("RECNN_ROOT") or PROJECT)  # holds data/ and res/; the tests write elsewhere
DOWNLOADS = PROJECT / "data" / ".downloads"           # verified archives, shared by all
DEFAULT_DATASET = "ml-100k"


class DataError(ValueError):
    """Input that cannot be used; the message names the file, column or shape and what to do."""


def chosen_dataset() -> str:
    """Return the data set of this run: `DATASET` of `make run`, or ml-100k."""
    return os.environ.get("RECNN_DATASET") or DEFAULT_DATASET


def data_dir(dataset: str, root: Path = ROOT) -> Path:
    """Return (and make) the artefact folder of a data set: data/ml-100k, or data/clicks for ~/clicks or clicks.zip."""
    name = Path(dataset).name.removesuffix(".zip")
    if not name or name.startswith("."):
        raise DataError(f"data set {dataset!r} has no name: give a known name, a folder or a .zip")
    folder = root / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def res_dir(dataset: str, root: Path = ROOT, committed: bool = False) -> Path:
    """Return (and make) the folder of figures and tables: data/<name>/res, or res/ for what is committed of ML-100K."""
    committed = committed or bool(os.environ.get("RECNN_COMMITTED"))
    folder = root / "res" if committed and dataset == DEFAULT_DATASET else data_dir(dataset, root) / "res"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build_dir(dataset: str, root: Path = ROOT) -> Path:
    """Return the folder that is ready to ship: build/ for the default data set, else data/<name>/build."""
    return root / "build" if dataset == DEFAULT_DATASET else data_dir(dataset, root) / "build"


def shown(path: Path) -> str:
    """Return a path as a reader should see it: relative to the project, forward slashes.

    >>> shown(ROOT / "data" / "ml-100k" / "infos.json"), shown(Path("/elsewhere/infos.json"))
    ('data/ml-100k/infos.json', 'infos.json')
    """
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def damaged(path: Path, lesson: str, reason: Any) -> DataError:
    """Return the error of an artefact that cannot be read: which, why, and the lesson that writes it anew."""
    first = (str(reason) or "it ends early").splitlines()[0]
    return DataError(f"{shown(path)} is damaged, or not what we write ({first}): delete it and run {lesson}")


def need(path: Path, made_by: str) -> Path:
    """Return `path` if it exists; otherwise FileNotFoundError names it and the notebook to run."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{shown(path)} is not there yet: run notes/{made_by}.ipynb first, or `make run "
                                f"ONLY={made_by.split('_')[0]}`, which runs what that lesson reads from too")
    return Path(path)


@contextmanager
def writing(path: Path, wait: float = 5) -> Iterator[None]:
    """Be the only one who writes an artefact and what lies beside it; it may be entered again.

    Another writer has `wait` seconds to end, then a DataError names its process.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{path.name}.lock")
    lock = FileLock(place, is_singleton=True, on_acquired=_sign)  # one function: filelock refuses another
    try:
        lock.acquire(timeout=wait)
    except Timeout as error:
        writer = f"process {place.read_text()}" if place.exists() else "another process"
        raise DataError(f"{shown(path)} is being written by {writer} (make run, or a notebook): wait until it has "
                        f"ended, or stop it") from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # whoever waits looks whether the file is still the one that it has opened
            place.unlink(missing_ok=True)
        lock.release()


def _sign(lock: int) -> None:
    os.write(lock, str(os.getpid()).encode())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, where nothing lies yet; rename it into place on success, remove it on any failure.

    Whoever reads `path` sees the old artefact or the new one, never half of one. One process can write: see `writing`.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.part")
    with writing(path):
        _remove(beside)  # of a writer that was killed
        try:
            yield beside
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(beside, path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(errno.ENOSPC, f"the disk is full ({shutil.disk_usage(path.parent).free:,} bytes left) while "
                          f"writing {shown(path)}; what was there before is untouched") from error
        finally:
            _remove(beside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable UTF-8 JSON, keys in the order given."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def write_vectors(path: Path, vectors: dict[int, np.ndarray]) -> None:
    """Pickle `{item_id: vector (d,)}`, as the lessons keep text vectors."""
    with replacing(path) as beside, beside.open("wb") as file:
        pickle.dump({int(key): np.asarray(vector) for key, vector in vectors.items()}, file)


class _ArraysOnly(pickle.Unpickler):
    """Admit what a dict of numpy arrays consists of, by any numpy; a pickle that names anything else is refused."""

    ADMITTED = re.compile(r"numpy\.(ndarray|dtype)|numpy\._?core\.(multiarray\._reconstruct|numeric\._frombuffer)")

    def find_class(self, module: str, name: str) -> Any:
        if not self.ADMITTED.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_vectors(path: Path) -> dict[int, np.ndarray]:
    """Read {item_id: vector}, as `write_vectors` wrote it; DataError if it holds anything else or is damaged."""
    content = io.BytesIO(Path(path).read_bytes())
    try:
        vectors = _ArraysOnly(content).load()
        if not all(isinstance(key, int) and isinstance(vector, np.ndarray) for key, vector in vectors.items()):
            raise TypeError("it holds more than {item_id: numpy array}")
    except Exception as error:  # damaged bytes can make an unpickler raise nearly anything
        raise damaged(path, "notes/02_embeddings.ipynb", error) from error
    return vectors
