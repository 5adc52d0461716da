"""Serve recommendations over HTTP: `uvicorn service:app`. The model is read once; nothing else is kept."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy reads it when it is imported; see THREADS there

import asyncio
import base64
import hashlib
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import prometheus_client as prometheus
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from recommender import Ask, ModelError, Recommender, UnknownItem, finite
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HERE = Path(__file__).resolve().parent
BODY_LIMIT = 64 * 1024  # bytes: a thousand ratings are half of it
BATCH_LIMIT = os.environ.get("RECNN_BATCH") or "64"  # requests answered together; 1: each alone
if not re.fullmatch("[1-9][0-9]{0,3}", BATCH_LIMIT):
    sys.exit(f"The service cannot start: RECNN_BATCH is {BATCH_LIMIT!r}, and must be a whole number from 1 to 9999")
BATCH_LIMIT = int(BATCH_LIMIT)

try:
    MODEL = Recommender(Path(os.environ.get("RECNN_MODEL") or HERE / "model"))
except ModelError as error:
    sys.exit(f"The service cannot start: {error}")

# What comes in and goes out. Strict: "5" is no rating, true is no number, and a misspelt field is refused.

OR_5_0 = BeforeValidator(lambda n: int(n) if isinstance(n, float) and n.is_integer() else n)  # JSON has one number
NUMBERED = all(isinstance(item["id"], int) for item in MODEL.items)
ItemId = Annotated[int, OR_5_0] if NUMBERED else str


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Rated(Strict):
    item_id: ItemId
    rating: Annotated[float, Field(ge=MODEL.low, le=MODEL.high, multiple_of=MODEL.step, allow_inf_nan=False)]


class Wish(Strict):
    history: Annotated[list[Rated], Field(max_length=1000, description="What was rated, oldest first; may be empty. "
                                          f"The last {MODEL.frame_size} make the state, all the history term.")]
    k: Annotated[int, Field(ge=1, le=100, description="How many items are wanted."), OR_5_0] = 10
    exclude: Annotated[list[ItemId], Field(max_length=10_000, description="Items to leave out, beside the rated.")] = []
    beta: Annotated[float | None, Field(ge=0, le=10, allow_inf_nan=False, description="Weight of the expected stars in "
                                        "the ranking: 0 asks what people do next, 2.5 what they will like. Null is "
                                        f"the model's own {MODEL.beta}.")] = None


class Named(BaseModel):
    item_id: ItemId
    title: str


class Because(Named):
    similarity: Annotated[float, Field(description="Cosine of the two items' vectors, −1 to 1.")]


class Choice(Named):
    score: Annotated[float, Field(description="log p(item | state) + β · expected stars, minus 100 where they "
                                    "are below 2.5: the slate's order. Without "
                                    "a history: the log of the item's share of all ratings.")]
    stars: Annotated[float | None, Field(description="The stars that this person is expected to give; null without a "
                                         "history.")]
    value: Annotated[float | None, Field(description="The critic's Q: discounted sum of rewards to come; null where "
                                         "nothing was rated or the critic gives no number.")]
    because: Annotated[Because | None, Field(description="The nearest of the items in the state.")]


class Place(BaseModel):
    x: float
    y: float


class Slate(BaseModel):
    slate: list[Choice]
    used: Annotated[int, Field(description="How many ratings are in the state.")]
    note: Annotated[str | None, Field(description="How a short or empty history was served, and why a slate is short.")]
    proto_action: Annotated[Place | None, Field(description="Its place on the map; null where nothing was rated or the "
                                                "actor gives no number.")]


class Item(Named):
    year: int | None
    genres: list[str]
    ratings: Annotated[int, Field(description="How often it was rated in training.")]


class Items(BaseModel):
    items: list[Item]


class Map(BaseModel):
    item_id: list[ItemId]
    x: list[float | None]
    y: list[float | None]


class Health(BaseModel):
    status: str
    dataset: str
    policy: str
    items: int
    frame_size: int
    beta: float
    gamma: float
    rating: dict[str, float]
    held_out: dict | None
    warning: Annotated[str | None, Field(description="What to know before trusting the slates, as the manifest says.")]


class Refusal(BaseModel):
    detail: Annotated[str, Field(description="A sentence that says what is wrong.")]


TOO_LARGE_SENTENCE = f"The body is larger than {BODY_LIMIT:,} bytes: send fewer ratings, or leave out fewer items."
REFUSED = {422: {"model": Refusal, "description": "The request cannot be understood, or names what is not there"}}
TOO_LARGE = {413: {"model": Refusal, "description": f"The body is larger than {BODY_LIMIT:,} bytes"}}


# What is counted

METRICS = prometheus.CollectorRegistry()
prometheus.ProcessCollector(registry=METRICS)
REQUESTS = prometheus.Counter("recnn_requests", "Answers by path and status.", ["path", "status"], registry=METRICS)
SECONDS = prometheus.Histogram("recnn_request_seconds", "From the request's head to the end of its answer.", ["path"],
                               registry=METRICS, buckets=(.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 5))
BATCHES = prometheus.Histogram("recnn_batch_size", "Requests answered together.", registry=METRICS,
                               buckets=(1, 2, 4, 8, 16, 32, 64))


class Batches:
    """Answer requests in a thread of their own, together with all that came in while the last ones were answered.

    Nobody waits for company: a request that finds the thread idle is taken at once.
    """

    def __init__(self):
        self.thread, self.waiting, self.running = ThreadPoolExecutor(1), [], None

    async def answer(self, ask: Ask) -> dict:
        promise = asyncio.get_running_loop().create_future()
        self.waiting.append((ask, promise))
        if self.running is None:
            self.running = asyncio.create_task(self._run())
        return await promise

    async def _run(self) -> None:
        while self.waiting:
            batch, self.waiting = self.waiting[:BATCH_LIMIT], self.waiting[BATCH_LIMIT:]
            BATCHES.observe(len(batch))
            try:
                answers = await asyncio.get_running_loop().run_in_executor(
                    self.thread, MODEL.recommend, [ask for ask, _ in batch])
                for (_, promise), answer in zip(batch, answers, strict=True):
                    if not promise.done():  # whoever left has cancelled it
                        promise.set_result(answer)
            except Exception as error:
                for _, promise in batch:
                    if not promise.done():
                        promise.set_exception(error)
        self.running = None


@asynccontextmanager
async def lifespan(app: FastAPI):
    app.state.batches = Batches()
    yield
    app.state.batches.thread.shutdown()


app = FastAPI(title="RecNN", version=str(MODEL.manifest["format"]), lifespan=lifespan, redoc_url=None,
              redirect_slashes=False,
              description=f"{MODEL.policy} on {MODEL.dataset}: ratings in, a slate out.")


@app.post("/recommend", response_model=Slate, responses=REFUSED | TOO_LARGE, max_body_size=BODY_LIMIT)
async def recommend(wish: Wish) -> Response:
    """Recommend the items that fit a history of ratings, best first.

    An item rated twice counts once, with its last rating. What was rated is never recommended.
    """
    ask = MODEL.ask([(rated.item_id, rated.rating) for rated in wish.history], wish.k, wish.exclude, wish.beta)
    return as_json(await app.state.batches.answer(ask))


@app.get("/items", response_model=Items, responses=REFUSED)
async def items(q: Annotated[str, Query(max_length=200)] = "",
                limit: Annotated[int, Query(ge=1, le=100)] = 10) -> Response:
    """Find items by the beginnings of the words in their titles, whatever case and accents; most rated first."""
    return as_json({"items": MODEL.search(q, limit)})


@app.get("/map", response_model=Map)
async def map_of_items(request: Request) -> Response:
    """Return where every item lies on the map: the first two columns of its vector."""
    headers = {"ETag": MAP_TAG, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == MAP_TAG:
        return Response(status_code=304, headers=headers)
    return Response(MAP, media_type="application/json", headers=headers)


@app.head("/health", include_in_schema=False)
@app.get("/health", response_model=Health)
async def health() -> Response:
    """Say what is served, and what it reached on ratings that it has never seen."""
    return as_json(HEALTH)


@app.get("/metrics", response_class=Response)
async def metrics() -> Response:
    """Return what is counted, as Prometheus reads it."""
    return Response(prometheus.generate_latest(METRICS), media_type=prometheus.CONTENT_TYPE_LATEST)


@app.head("/", include_in_schema=False)
@app.get("/", response_class=HTMLResponse, include_in_schema=False)
def page() -> HTMLResponse:
    """Return the page, which may run its own script, wear its own style, and talk to this service alone."""
    path = HERE / "page.html"
    if not path.exists():
        raise HTTPException(404, "page.html does not lie beside service.py: copy the whole folder build/.")
    html = path.read_text(encoding="utf-8")
    own = {tag: " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
                         for inside in re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", html, flags=re.S)) or "'none'"
           for tag in ("script", "style")}
    return HTMLResponse(html, headers={"Cache-Control": "no-cache", "Content-Security-Policy":
                                       f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
                                       f"form-action 'none'; frame-ancestors 'none'; "
                                       f"script-src {own['script']}; style-src {own['style']}"})


def as_json(answer: dict, status: int = 200) -> Response:
    """Return an answer as it is, for what we make ourselves need not be validated again."""
    return Response(json.dumps(answer, ensure_ascii=False, allow_nan=False), status, media_type="application/json")


MAP = json.dumps({"item_id": [item["id"] for item in MODEL.items],
                  "x": [finite(x, 3) for x in MODEL.map[:, 0]], "y": [finite(y, 3) for y in MODEL.map[:, 1]]},
                 allow_nan=False).encode()
MAP_TAG = f'"{hashlib.sha256(MAP).hexdigest()[:16]}"'
HEALTH = {"status": "ok", "dataset": MODEL.dataset, "policy": MODEL.policy,
          "items": len(MODEL.items), "frame_size": MODEL.frame_size, "beta": MODEL.beta,
          "gamma": MODEL.gamma, "rating": MODEL.manifest["rating"],
          "held_out": MODEL.manifest.get("held_out"), "warning": MODEL.manifest.get("warning")}
KIND_OF_ID = (f"ids are {'whole numbers' if NUMBERED else 'text'} here, such as "
              f"{json.dumps(MODEL.items[0]['id'], ensure_ascii=False)[:60]}")


# Refusals: one sentence each

@app.exception_handler(UnknownItem)
async def unknown_item(request: Request, error: UnknownItem) -> Response:
    return as_json({"detail": f"{error}."}, 422)


@app.exception_handler(RequestValidationError)
async def not_understood(request: Request, error: RequestValidationError) -> Response:
    first, more = error.errors()[0], len(error.errors()) - 1
    if first["type"] == "json_invalid":
        return as_json({"detail": f"The body is no JSON: {first['ctx']['error']} at character {first['loc'][1]}."}, 422)
    if first["loc"] == ("body",):
        return as_json({"detail": "The body is no JSON object: send {\"history\": […]} as application/json."}, 422)
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{ascii(step)[1:-1][:40]}" for step in first["loc"][1:])
    is_id = first["type"].startswith(("int_", "string_")) and (first["loc"][-1] == "item_id" or
                                                               first["loc"][1] == "exclude")
    what = KIND_OF_ID if is_id else first['msg']
    others = f", and {more} more {'fault' if more == 1 else 'faults'}" if more else ""
    return as_json({"detail": f"{where[1:]}: {what}{others}; /docs says what is expected."}, 422)


@app.exception_handler(HTTPException)
async def refused(request: Request, error: HTTPException) -> Response:
    status, detail = error.status_code, str(error.detail)
    if status == 400:  # what json refuses in other ways: too deep, numbers too long, no UTF-8
        status, detail = 422, "The body is no JSON that can be read."
    elif status == 413:
        detail = TOO_LARGE_SENTENCE
    elif detail in ("Not Found", "Method Not Allowed"):
        detail = f"{detail}: /docs lists what can be asked for."
    answer = as_json({"detail": detail}, status)
    answer.headers.update(error.headers or {})
    return answer


@app.exception_handler(Exception)
async def failed(request: Request, error: Exception) -> Response:
    return as_json({"detail": "The service failed at this request, which is its own fault; its log says more."}, 500)


# Around everything: count the answers, and give them the headers that keep a browser careful

HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
DOCS_POLICY = (b"content-security-policy",  # FastAPI's page of documentation takes its code from there
               b"default-src 'none'; connect-src 'self'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
               b"style-src 'unsafe-inline' https://cdn.jsdelivr.net; img-src data: https://fastapi.tiangolo.com; "
               b"frame-ancestors 'none'")
PATHS = {"/recommend", "/items", "/map", "/health", "/metrics", "/", "/docs", "/openapi.json"}


def observed(inner: ASGIApp) -> ASGIApp:
    """Return the application with that around it; a body that says it is too large goes no further."""
    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await inner(scope, receive, send)
        path, start, status = scope["path"] if scope["path"] in PATHS else "other", time.perf_counter(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
                if not any(name == b"content-security-policy" for name, _ in message["headers"]):
                    message["headers"].append(DOCS_POLICY if path == "/docs" else POLICY)
            await send(message)

        try:
            length = Headers(scope=scope).get("content-length", "")
            if length.isdecimal() and int(length) > BODY_LIMIT:  # of unknown length: see max_body_size
                answer = as_json({"detail": TOO_LARGE_SENTENCE}, 413)
                await answer(scope, receive, send_with_headers)
            else:
                await inner(scope, receive, send_with_headers)
        finally:
            REQUESTS.labels(path, status).inc()
            SECONDS.labels(path).observe(time.perf_counter() - start)

    return outer


app.add_middleware(observed)
