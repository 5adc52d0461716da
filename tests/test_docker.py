"""Both Dockerfiles: what they must and must not say, and that following them ends in a service that answers.

Where a Docker engine answers, it builds and runs them. Elsewhere their instructions are followed in a folder and an
environment of their own, without a container: what that leaves out is printed (`pytest -s`).
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
import venv
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from dockerfile_parse import DockerfileParser

from benchmarks.service import answer, free_port, write_model
from helpers.files import PROJECT

FILES = {"notebooks": PROJECT / "Dockerfile", "service": PROJECT / "build" / "Dockerfile"}
ALL = bool(os.environ.get("RECNN_DOCKER"))  # `make docker-check`: the notebooks' requirements too, some minutes
MAKES_A_USER = re.compile(r"useradd\b[^&|;]*")


def engine() -> bool:
    """Return whether a Docker engine answers."""
    return bool(shutil.which("docker")) and subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return the (instruction, value) pairs of a Dockerfile, comments left out."""
    parser = DockerfileParser(path=str(path))
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


def values(path: Path, instruction: str) -> list[str]:
    return [value for name, value in instructions(path) if name == instruction]


def health_command(path: Path) -> list[str]:
    """Return the command of HEALTHCHECK."""
    return json.loads(values(path, "HEALTHCHECK")[0].split("CMD", 1)[1])


def ignored(relative: str, patterns: list[str]) -> bool:
    """Return whether .dockerignore keeps a path out of the build: the last pattern that fits decides."""
    out = False
    for pattern in patterns:
        plain = pattern.removeprefix("!").removeprefix("**/")
        parts = relative.split("/")
        heads = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        tails = parts if pattern.removeprefix("!").startswith("**/") else heads
        if any(fnmatch.fnmatchcase(tail, plain) and tail.count("/") == plain.count("/") for tail in tails):
            out = not pattern.startswith("!")
    return out


def context(folder: Path) -> list[str]:
    """Return what a build in `folder` may copy: its files less those of .dockerignore."""
    lines = (folder / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    kept = []
    for where, folders, files in os.walk(folder):
        relative = Path(where).relative_to(folder)
        again = any(pattern.startswith("!") for pattern in patterns)  # a later pattern may take a file back in
        if not again or relative.parts:
            folders[:] = [name for name in folders if not ignored((relative / name).as_posix(), patterns)]
        else:
            folders[:] = [name for name in folders if name not in (".git", ".venv")]
        kept += [path for path in ((relative / name).as_posix() for name in files) if not ignored(path, patterns)]
    return sorted(kept)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a small model folder with untrained networks."""
    folder = tmp_path_factory.mktemp("docker") / "model"
    write_model(folder, n_items=60, embed_size=8, frame_size=10)
    return folder


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_is_pinned_unprivileged_and_watched(path):
    (image,) = values(path, "FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", image)
    assert values(path, "USER")[-1:] == ["recnn"], "the last user is not root"
    assert len(values(path, "HEALTHCHECK")) == 1 and "urlopen" in health_command(path)[-1]
    assert len(values(path, "CMD")) == 1 and json.loads(values(path, "CMD")[0]), "a list, so that signals arrive"
    assert "0.0.0.0" in values(path, "CMD")[0] and values(path, "EXPOSE")
    assert not values(path, "ADD")
    text = "\n".join(value for name, value in instructions(path) if name != "HEALTHCHECK")
    assert not re.search(r"https?://|\b(curl|wget|git clone)\b|(?i:password|token|secret)", text)


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_neither_data_nor_model_is_copied(path, tmp_path):
    folder = tmp_path / "context"
    for name in ("data/README.md", "data/ml-100k/embeddings.npz", "build/model/actor.onnx", "model/items.npz",
                 ".git/config", ".venv/bin/python", "helpers/__pycache__/a.pyc", "requirements.txt", "service.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    shutil.copy(path.parent / ".dockerignore", folder)
    kept = context(folder)
    assert {"requirements.txt", "service.py"} <= set(kept)
    leaked = [name for name in kept if re.search(r"npz|onnx|\.git/|\.venv/|pycache", name)]
    assert leaked == (["model/items.npz"] if path == FILES["notebooks"] else [])  # no folder of that repository
    assert all("data" not in value.split()[:-1] for value in values(path, "COPY"))


def test_every_file_that_is_copied_is_there():
    for path in FILES.values():
        there = context(path.parent)
        for value in values(path, "COPY"):
            *sources, _ = [word for word in value.split() if not word.startswith("--")]
            for source in sources:
                assert source == "." or any(name == source or name.startswith(f"{source}/") for name in there), source


def test_what_the_service_imports_of_its_folder_is_in_the_image():
    copied = " ".join(values(FILES["service"], "COPY"))
    for name in ("service.py", "recommender.py"):
        assert name in copied
        for module in re.findall(r"^(?:from|import) (\w+)", (PROJECT / "build" / name).read_text(), flags=re.M):
            assert not (PROJECT / "build" / f"{module}.py").exists() or f"{module}.py" in copied
    assert "page.html" in copied


def follow(path: Path, root: Path, environment: Path | None = None) -> tuple[Path, dict[str, str]]:
    """Do in `root` what a Dockerfile does in an image, all but starting it; return its (WORKDIR, variables).

    Args:
        environment: of the packages; it takes the place of the image's own Python, and of what `make` would make.
    """
    root.mkdir()
    place, variables = root, {"PATH": os.environ["PATH"], "HOME": str(root)}
    variables |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    if environment is not None:
        variables["PATH"] = f"{environment / 'bin'}:{variables['PATH']}"
    for name, value in instructions(path):
        if name == "ENV":
            variables |= dict(word.split("=", 1) for word in shlex.split(value))
        elif name == "WORKDIR":
            place = root / value.lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            _copy(path.parent, place, [word for word in value.split() if not word.startswith("--")])
        elif name == "RUN":
            _run(value.replace("/home/", f"{root}/home/"), place, variables)
    return place, variables


def _copy(folder: Path, place: Path, words: list[str]) -> None:
    *sources, target = words
    for name in context(folder):
        for source in sources:
            if source == "." or name == source or name.startswith(f"{source}/"):
                inside = name if source == "." else Path(name).name if name == source else name[len(source) + 1:]
                to = place / target / inside
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(folder / name, to)


def _run(command: str, place: Path, variables: dict[str, str]) -> None:
    if MAKES_A_USER.fullmatch(command):
        print(f"  not done, for it needs an image: {command}")
        return
    if command.startswith("apt-get"):
        wanted = re.search(r"install ((?:--\S+ )*)(.*?) &&", command)[2].split()
        print(f"  not done, for it needs an image: {command}\n  here instead: {', '.join(wanted)} found on the path")
        assert all(shutil.which(name) for name in wanted)
        return
    if command.startswith("make .venv/ready") and not ALL:
        print(f"  not repeated (`make docker-check` does): {command}; the environment that runs this test was made so")
        (place / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
        return
    started = time.monotonic()
    done = subprocess.run(["sh", "-c", command], cwd=place, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"RUN {command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    print(f"  done in {time.monotonic() - started:.0f} s: {command}")


@contextmanager
def started(path: Path, place: Path, variables: dict[str, str], port: str):
    """Start CMD in `place` and wait until HEALTHCHECK's own command succeeds; yield the address."""
    free = str(free_port())  # the image's port may be taken on this machine
    command, check = ([word.replace(port, free) for word in words]
                      for words in (json.loads(values(path, "CMD")[0]), health_command(path)))
    command += ["--allow-root"] if "jupyter" in command[0] and os.geteuid() == 0 else []
    executable = shutil.which(command[0], path=f"{variables['PATH']}:{place}") or str(place / command[0])
    with (place / "log").open("w") as log:
        process = subprocess.Popen([executable, *command[1:]], cwd=place, env=variables, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while subprocess.run(check, cwd=place, env=variables, capture_output=True).returncode:
            assert process.poll() is None and time.monotonic() < deadline, (place / "log").read_text()[-3000:]
            time.sleep(0.3)
        print(f"  healthy, on port {free} in place of {port}: {' '.join(command)}")
        yield f"http://127.0.0.1:{free}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
    assert process.returncode in (0, -signal.SIGTERM, 143), "it ends when it is told to"


def recommended(address: str) -> dict:
    """Return what the service recommends to somebody with two ratings."""
    body = {"history": [{"item_id": 3, "rating": 4.5}, {"item_id": 7, "rating": 1}], "k": 5}
    return answer(urlsplit(address).port, json.dumps(body).encode())


@contextmanager
def container(path: Path, port: int, *options: str):
    """Build an image and run it; yield (its address, its name) once it reports that it is healthy."""
    name = f"recnn-test-{uuid.uuid4().hex[:8]}"
    subprocess.run(["docker", "build", "--tag", name, str(path.parent)], check=True)
    subprocess.run(["docker", "run", "--detach", "--name", name, "--publish", f"127.0.0.1:0:{port}", *options, name],
                   check=True)
    try:
        deadline, state = time.monotonic() + 120, ""
        while state != "healthy":
            assert time.monotonic() < deadline, subprocess.run(["docker", "logs", name], capture_output=True, text=True)
            state = _docker("inspect", "--format", "{{.State.Health.Status}}", name)
            time.sleep(1)
        assert _docker("exec", name, "id", "-u") != "0"
        yield "http://" + _docker("port", name, str(port)).splitlines()[0], name
    finally:
        subprocess.run(["docker", "rm", "--force", name], check=False)
        subprocess.run(["docker", "rmi", "--force", name], check=False)


def _docker(*words: str) -> str:
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True).stdout.strip()


def test_the_services_dockerfile_ends_in_a_service_that_recommends(model, tmp_path):
    path = FILES["service"]
    if engine():
        print("\nbuilt and run by Docker")
        with container(path, 8000, "--volume", f"{model}:/app/model:ro") as (address, _):
            assert len(recommended(address)["slate"]) == 5
        return
    print("\nno Docker engine answers; build/Dockerfile is followed in a new environment:")
    venv.create(tmp_path / "venv", with_pip=True)
    place, variables = follow(path, tmp_path / "root", tmp_path / "venv")
    assert sorted(found.name for found in place.iterdir()) == ["page.html", "recommender.py", "requirements.txt",
                                                              "service.py"]
    shutil.copytree(model, place / "model")  # docker run --volume
    with started(path, place, variables, "8000") as address:
        got = recommended(address)
        assert len(got["slate"]) == 5 and got["used"] == 2
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/model/manifest.json", timeout=20)
    packages = {found.name for found in (tmp_path / "venv").glob("lib/python*/site-packages/*")}
    assert "onnxruntime" in packages and not packages & {"torch", "pandas", "helpers"}


def test_the_notebooks_dockerfile_ends_in_jupyter_and_make_run_knows_what_to_do(tmp_path):
    path = FILES["notebooks"]
    if engine() and ALL:
        print("\nbuilt and run by Docker")
        with container(path, 8888) as (address, name):
            assert json.load(urllib.request.urlopen(f"{address}/api", timeout=20))["version"]
            assert "00_architecture" in _docker("exec", name, "make", "run")
        return
    print("\nDockerfile is followed " + ("in a new environment:" if ALL else "in the environment of this test:"))
    place, variables = follow(path, tmp_path / "root")
    assert not list(place.glob("data/*/*")) and not (place / "build" / "model").exists()
    with started(path, place, variables, "8888") as address:
        assert json.load(urllib.request.urlopen(f"{address}/api", timeout=20))["version"]
        with pytest.raises(urllib.error.HTTPError, match="403"):  # who has not the token reads nothing
            urllib.request.urlopen(f"{address}/api/contents", timeout=20)
    told = subprocess.run(["make", "--dry-run", "run"], cwd=place, env=variables, capture_output=True, text=True)
    assert told.returncode == 0 and "tools.run" in told.stdout
    if ALL:
        first = [".venv/bin/python", "-m", "tools.run", "00", "01"]
        done = subprocess.run(first, cwd=place, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        print("  ran lessons 00 and 01 there")
