"""Both Dockerfiles say what they must; with RECNN_DOCKER=1 and a Docker engine they are built, run and asked."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import packages_distributions

import pytest

from benchmarks.service import answer, write_model
from helpers.files import PROJECT

BUILDS = {"notebooks": PROJECT, "service": PROJECT / "build"}
BOTH = pytest.mark.parametrize(("name", "port"), [("notebooks", "8888"), ("service", "8000")])


def values(name: str, instruction: str) -> list[str]:
    """Return what a Dockerfile says at each of its lines that begin with an instruction."""
    text = (BUILDS[name] / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [value.strip() for value in re.findall(rf"^(?:{instruction})\s(.*)", text, flags=re.M)]


@BOTH
def test_an_image_is_pinned_unprivileged_and_watched_and_holds_neither_data_nor_model(name, port):
    (image,), (command,), (health,) = (values(name, instruction) for instruction in ("FROM", "CMD", "HEALTHCHECK"))
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", image) and values(name, "USER")[-1] == "recnn"
    assert f"urlopen('http://127.0.0.1:{port}/" in json.loads(health.split("CMD")[1])[-1]
    command = " ".join(json.loads(command))  # a list, so that signals arrive
    assert "0.0.0.0" in command and port in command and port in values(name, "EXPOSE")[0].split()
    ignored = [line for line in (BUILDS[name] / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    sources = {word for value in values(name, "COPY") for word in value.split()[:-1] if not word.startswith("--")}
    assert all((BUILDS[name] / source).exists() for source in sources)
    needed = {f"!{source}" for source in sources} if ignored[0] == "*" else {".git", ".venv", "data/*", "build/model"}
    assert needed <= set(ignored)


def test_what_the_service_imports_is_in_its_image_and_pinned():
    pinned = re.findall(r"^([\w-]+)==[\d.]+", (PROJECT / "build" / "requirements.txt").read_text(), flags=re.M)
    copied, packages = " ".join(values("service", "COPY")).split(), packages_distributions()
    assert {"service.py", "recommender.py", "page.html"} <= set(copied) and "uvicorn" in pinned
    code = "".join((PROJECT / "build" / name).read_text(encoding="utf-8") for name in ("service.py", "recommender.py"))
    for module in set(re.findall(r"^ *(?:from|import) (\w+)", code, flags=re.M)) - sys.stdlib_module_names:
        assert f"{module}.py" in copied or packages[module][0].replace("_", "-") in pinned, module


@pytest.mark.skipif(not os.environ.get("RECNN_DOCKER") or os.system("docker info > /dev/null 2>&1") != 0,
                    reason="wants RECNN_DOCKER=1, a Docker engine that answers, and minutes: make docker-check")
@BOTH
def test_a_built_image_becomes_healthy_runs_without_root_and_answers(name, port, tmp_path):
    def docker(*words) -> str:
        return subprocess.run(["docker", *words], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    image = f"recnn-test-{name}-{os.getpid()}"
    write_model(tmp_path / "model", n_items=60, embed_size=8, frame_size=10)
    docker("build", "--tag", image, BUILDS[name])
    try:
        docker("run", "--detach", f"--name={image}", f"--publish=127.0.0.1:0:{port}",
               f"--volume={tmp_path / 'model'}:/app/model:ro", image)
        deadline = time.monotonic() + 120
        while docker("inspect", "--format", "{{.State.Health.Status}}", image) != "healthy":
            assert time.monotonic() < deadline, docker("logs", image)
            time.sleep(1)
        assert docker("exec", image, "id", "-u") == "10001"
        if name == "notebooks":
            assert "tools.run" in docker("exec", image, "make", "--dry-run", "run")
        else:
            there = int(docker("port", image, port).splitlines()[0].rpartition(":")[2])
            assert len(answer(there, b'{"history": [{"item_id": 3, "rating": 4.5}], "k": 5}')["slate"]) == 5
    finally:
        docker("rm", "--force", image)
        docker("rmi", "--force", image)
