"""Recommend from the folder `model/` that lesson 11 writes: numpy and onnxruntime, nothing of the training.

n items, E numbers a vector, F places in a state, B requests answered together.
"""

import hashlib
import io
import json
import math
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime

FORMAT = 4       # of the model folder, as its manifest says
NEEDED = ("actor.onnx", "critic.onnx", "items.npz", "items.json")
THREADS = 1      # for a product: the networks are small, and the other processors are for other requests
SEARCHED = 1000  # nearest items an approximate index is always asked for; who needs more is served exactly
SAFE = 2 ** 53   # browsers read greater whole numbers as others
UNLIKED, LAST = 2.5, 100.0  # fewer stars than that have a negative reward: such items come after all others
SPELT = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "æ": "ae", "œ": "oe", "'": None, "’": None})


class ModelError(ValueError):
    """A model folder that cannot be served; the message says why and what to do."""


class UnknownItem(ValueError):
    """An item id that is not in the catalogue."""


class Ask(NamedTuple):
    """What one request asks for, in rows of the item matrix."""

    rows: np.ndarray     # (h,) items rated, oldest first, each once
    ratings: np.ndarray  # (h,) float32
    hidden: np.ndarray   # (m,) items that may not be in the slate: rated or left out, each once
    k: int               # items wanted
    beta: float          # weight of the expected stars; 0 asks what people do next, whether they like it or not


def parsed(content: bytes) -> dict | list:
    """Return what JSON says; NaN and infinity, which it does not have, as None."""
    return json.loads(content, parse_constant=lambda name: None)


def verified(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """Return (manifest, {file name: content}) of a model folder whose files are those of its manifest.

    Raises:
        ModelError: if a file is missing, or is not the one that the manifest describes.
    """
    path, whole = folder / "manifest.json", "copy the whole folder again, or run notes/11_ship.ipynb"
    try:
        manifest = parsed(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise ModelError(f"{path} is of format {manifest['format']!r}, and this code reads format {FORMAT}: "
                             f"take model and code from one version")
        content = {name: (folder / Path(name).name).read_bytes() for name in manifest["files"]}
        for name, described in manifest["files"].items():
            if hashlib.sha256(content[name]).hexdigest() != described["sha256"]:
                raise ModelError(f"{folder / name} is not the file that manifest.json describes: {whole}")
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename} is not there: run notes/11_ship.ipynb, or set RECNN_MODEL to the "
                         f"folder that it wrote") from error
    except OSError as error:
        raise ModelError(f"{error.filename} cannot be read ({error.strerror}): RECNN_MODEL must name a folder that "
                         f"notes/11_ship.ipynb wrote, readable for this user") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is no manifest of a model ({error}): {whole}") from error
    if missing := [name for name in NEEDED if name not in content]:
        raise ModelError(f"{path} lists no {', '.join(missing)}: {whole}")
    return manifest, content


def sendable(ids: list[int | str]) -> list[int | str]:
    """Return ids as a browser reads them back: all whole numbers below 2^53, else all text."""
    return ids if all(isinstance(one, int) and abs(one) < SAFE for one in ids) else [str(one) for one in ids]


def finite(number: float, digits: int) -> float | None:
    """Return a number rounded; None for NaN and infinity, which JSON does not have."""
    return round(float(number), digits) if math.isfinite(number) else None


def network(content: bytes) -> onnxruntime.InferenceSession:
    """Return an ONNX network, ready to run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def tilted(log_p: np.ndarray, stars: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Return log p + β·stars, minus LAST where fewer than UNLIKED are expected; with β = 0 log p alone."""
    return np.where(beta > 0, log_p + beta * stars - LAST * (stars < UNLIKED), log_p)


def words(text: str) -> list[str]:
    """Return the words of a text without case and accents.

    >>> words("Amélie’s Élan (2001)")
    ['amelies', 'elan', '2001']
    """
    plain = unicodedata.normalize("NFKD", text).casefold().translate(SPELT)
    return re.findall(r"\w+", "".join(letter for letter in plain if not unicodedata.combining(letter)))


class Recommender:
    """A model folder in memory: it finds items by title and answers requests, many at a time.

    Raises:
        ModelError: if the folder is not whole, or its parts do not fit each other.
    """

    def __init__(self, folder: Path):
        self.manifest, content = verified(Path(folder))
        try:
            self._take(content)
        except Exception as error:  # damaged contents can make their readers raise nearly anything
            raise ModelError(f"{folder} holds no model that fits its manifest ({type(error).__name__}: "
                             f"{str(error).partition(chr(10))[0]}): run notes/11_ship.ipynb again") from error

    def _take(self, content: dict[str, bytes]) -> None:
        manifest = self.manifest
        self.frame_size, self.embed_size = manifest["frame_size"], manifest["embed_size"]
        self.dataset, self.policy = str(manifest["dataset"]), str(manifest["policy"])
        self.beta, self.noise, self.damping = (float(manifest["liking"][key]) for key in ("beta", "noise", "damping"))
        self.gamma = float(manifest["critic"]["gamma"])
        self.rating_slope = float(manifest["user_history"]["rating_slope"])
        self.low, self.high, self.step = (float(manifest["rating"][key]) for key in ("low", "high", "step"))
        self.items: list[dict] = parsed(content["items.json"])
        for item, item_id in zip(self.items, sendable([item["id"] for item in self.items]), strict=True):
            item["id"] = item_id
        with np.load(io.BytesIO(content["items.npz"]), allow_pickle=False) as arrays:
            self.matrix = np.ascontiguousarray(arrays["matrix"], np.float32)  # (n, E)
            self.n_ratings = arrays["ratings"]                                # (n,)
            self.map = arrays["map"]                                          # (n, 2)
            self.axes, self.mean = arrays["axes"], arrays["mean"]             # (2, E), (E,)
            self.user_history = np.asarray(arrays["user_history"], np.float32)  # (E, E): zeros for a policy without one
            self.offset = np.asarray(arrays["offset"], np.float32)              # (n,) stars, whoever is asked
            self.root = np.asarray(arrays["root"], np.float32)                  # (E, E) of the covariance of tastes
        self.place_norm = float(manifest["map"]["norm"])
        self.actor, self.critic = network(content["actor.onnx"]), network(content["critic.onnx"])
        self.index = None
        if manifest["search"]["kind"] == "hnsw":
            import faiss  # for large catalogues alone
            faiss.omp_set_num_threads(THREADS)
            self.index = faiss.deserialize_index(np.frombuffer(content["index.faiss"], np.uint8))
        n, width = len(self.items), self.frame_size * (self.embed_size + 1)
        self.row_of = {item["id"]: row for row, item in enumerate(self.items)}
        if not (n == len(self.row_of) == manifest["n_items"] and self.matrix.shape == (n, self.embed_size)
                and self.map.shape == (n, 2) and self.n_ratings.shape == (n,)
                and self.axes.shape == (2, self.embed_size) and self.mean.shape == (self.embed_size,)
                and self.user_history.shape == self.root.shape == (self.embed_size, self.embed_size)
                and self.offset.shape == (n,) and self.noise > 0
                and (self.index is None or self.index.ntotal == n)
                and all(net.get_inputs()[0].shape[1] == width for net in (self.actor, self.critic))):
            raise ModelError("sizes differ")
        with np.errstate(invalid="ignore"):
            self.tasted = self.matrix @ self.root  # (n, E): what a taste is multiplied with
        self.norm = np.maximum(np.linalg.norm(self.matrix, axis=1), 1e-12)  # (n,)
        self.by_ratings = np.argsort(-self.n_ratings, kind="stable")        # rows, most rated first
        self.popularity = np.log((self.n_ratings + 1) / (self.n_ratings + 1).sum())
        found: dict[str, set[int]] = {}
        for place, row in enumerate(self.by_ratings):
            for word in words(self.items[row]["title"]):
                found.setdefault(word, set()).add(place)
        self.vocabulary = sorted(found)
        self.places = [found[word] for word in self.vocabulary]  # of each word: which of `by_ratings` have it

    def search(self, text: str, limit: int) -> list[dict]:
        """Return the items whose titles have words that begin like those of `text`, most rated first."""
        places: range | list[int] = range(len(self.items))
        for number, word in enumerate(words(text)):
            first = bisect_left(self.vocabulary, word)
            last = bisect_left(self.vocabulary, word + "\U0010ffff")
            having = set().union(*self.places[first:last])
            places = sorted(having if number == 0 else having.intersection(places))
        return [{"item_id": item["id"], "title": item["title"], "year": item["year"], "genres": item["genres"],
                 "ratings": int(self.n_ratings[row])}
                for row in self.by_ratings[list(places[:limit])] for item in [self.items[row]]]

    def rows(self, ids: Iterable[int | str]) -> np.ndarray:
        """Return the rows of items.

        Raises:
            UnknownItem: naming the first five ids that are not in the catalogue.
        """
        ids = list(ids)
        if unknown := [item_id for item_id in ids if item_id not in self.row_of]:
            named = ", ".join(json.dumps(item_id, ensure_ascii=False)[:40] for item_id in unknown[:5])
            named = named.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no UTF-8
            raise UnknownItem(f"{named} {'is' if len(unknown) == 1 else 'are'} not in the catalogue of "
                              f"{len(self.items):,} items: GET /items finds ids by title")
        return np.array([self.row_of[item_id] for item_id in ids], np.int64)

    def ask(self, history: Iterable[tuple[int | str, float]], k: int, exclude: Iterable[int | str] = (),
            beta: float | None = None) -> Ask:
        """Return a request for `recommend`; an item rated twice counts once, with its last rating and its place.

        Raises:
            UnknownItem: for an id that is not in the catalogue.
        """
        last: dict[int | str, float] = {}
        for item_id, rating in history:
            last.pop(item_id, None)
            last[item_id] = rating
        rows = self.rows(last)
        return Ask(rows, np.fromiter(last.values(), np.float32, len(last)),
                   np.unique(np.concatenate([rows, self.rows(exclude)])), k, self.beta if beta is None else beta)

    def states(self, asks: list[Ask]) -> np.ndarray:
        """Return (B, F·(E+1)) float32: vectors of the last F items, oldest first, then their ratings.

        A shorter history, of one rating at least, is repeated until the frame is full, the newest last: the critic
        has never seen a frame with gaps, and lesson 11 shows what it makes of one.
        """
        place = np.arange(-self.frame_size, 0)
        known = [np.mod(place, len(rows)) + len(ask.rows) - len(rows)
                 for ask in asks for rows in [ask.rows[-self.frame_size:]]]
        vectors = np.stack([self.matrix[ask.rows[kept]] for ask, kept in zip(asks, known, strict=True)])
        ratings = np.stack([ask.ratings[kept] for ask, kept in zip(asks, known, strict=True)])
        return np.concatenate([vectors.reshape(len(asks), -1), ratings], axis=1)

    def remembered(self, asks: list[Ask]) -> np.ndarray:
        """Return (B, E) float32: what whole histories add to the proto-actions, lesson 05b's history term.

        That is the sum of all rated items' vectors, each counted 1 + rating slope · (rating − 3), times a matrix.
        """
        sums = [(1 + self.rating_slope * (ask.ratings - 3)) @ self.matrix[ask.rows] for ask in asks]
        return np.stack(sums).astype(np.float32) @ self.user_history

    def tastes(self, asks: list[Ask]) -> tuple[np.ndarray, np.ndarray]:
        """Return bias (B,) in stars and taste (B, E) of whole histories, by which lesson 05b expects stars of an item.

        That is offset + bias + tasted · taste, where the taste is a ridge regression of the stars that were given.
        """
        bias, taste = np.zeros(len(asks), np.float32), np.zeros((len(asks), self.embed_size), np.float32)
        for b, ask in enumerate(asks):
            x = np.nan_to_num(self.tasted[ask.rows])  # an item without a number says nothing
            deviation = ask.ratings - self.offset[ask.rows]
            bias[b] = deviation.sum() / (len(x) + self.damping)
            taste[b] = np.linalg.solve(np.eye(self.embed_size) + x.T @ x / self.noise,
                                       x.T @ (deviation - bias[b]) / self.noise)
        return bias, taste

    def best(self, proto_action: np.ndarray, asks: list[Ask], bias: np.ndarray,
             taste: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (rows, `tilted` scores) for each request: its k best items that are not hidden, best first.

        They are fewer where the others have no finite score. log p(i | s) is the log softmax of proto_action · e_i / √E
        over the catalogue; where an approximate index chose, over the items that it always finds, SEARCHED of them.
        """
        wanted = [min(ask.k, len(self.items) - len(ask.hidden)) for ask in asks]
        beta = np.array([[ask.beta] for ask in asks], np.float32)
        near = np.array([self.index is not None and count + len(ask.hidden) <= min(SEARCHED, len(self.items))
                         for count, ask in zip(wanted, asks, strict=True)])
        answer: list = [None] * len(asks)
        for by_index, method in ((True, self._nearest), (False, self._exact)):
            chosen = np.flatnonzero(near == by_index)
            if len(chosen):
                found = method(proto_action[chosen], [asks[b] for b in chosen], [wanted[b] for b in chosen],
                               beta[chosen], bias[chosen, None], taste[chosen])
                for b, one in zip(chosen, found, strict=True):
                    unliked = asks[b].beta > 0 and (one[1] < -LAST / 2).any()
                    answer[b], near[b] = one, len(one[0]) == wanted[b] and not unliked  # else asked again, exactly
        return answer

    def _nearest(self, proto_action: np.ndarray, asks: list[Ask], wanted: list[int], beta: np.ndarray,
                 bias: np.ndarray, taste: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        answer = []
        asked = proto_action + self.embed_size ** 0.5 * beta * (taste @ self.root.T)
        _, found = self.index.search(asked.astype(np.float32), min(SEARCHED, len(self.items)))
        for b, (ask, count, rows) in enumerate(zip(asks, wanted, found, strict=True)):
            rows = rows[rows >= 0]
            logits = self.matrix[rows] @ proto_action[b] / self.embed_size ** 0.5
            log_p = logits - np.logaddexp.reduce(logits[np.isfinite(logits)])
            score = tilted(log_p, self.offset[rows] + bias[b] + self.tasted[rows] @ taste[b], beta[b])
            kept = np.isfinite(score) & ~np.isin(rows, ask.hidden)
            rows, score = rows[kept], score[kept]
            order = np.argsort(-score, kind="stable")[:count]
            answer.append((rows[order], score[order]))
        return answer

    def _exact(self, proto_action: np.ndarray, asks: list[Ask], wanted: list[int], beta: np.ndarray,
               bias: np.ndarray, taste: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        answer = []
        logits = proto_action / np.float32(self.embed_size ** 0.5) @ self.matrix.T
        logits[~np.isfinite(logits)] = -np.inf
        top = np.maximum(logits.max(axis=1, keepdims=True), np.finfo(np.float32).min)  # where nothing has a score
        total = top + np.log(np.maximum(np.exp(logits - top).sum(axis=1, keepdims=True), 1))  # the sum has exp(0)
        score = logits - total
        if beta.any():
            score = tilted(score, self.offset + bias + taste @ self.tasted.T, beta)
            score[~np.isfinite(score)] = -np.inf
        for ask, count, of_all in zip(asks, wanted, score, strict=True):
            of_all[ask.hidden] = -np.inf
            place = len(of_all) - max(count, 1)
            rows = np.flatnonzero(of_all >= np.partition(of_all, place)[place])
            rows = rows[np.argsort(-of_all[rows], kind="stable")][:count]
            rows = rows[of_all[rows] > -np.inf]
            answer.append((rows, of_all[rows]))
        return answer

    def recommend(self, asks: list[Ask]) -> list[dict]:
        """Return the answer to each request, as the service sends it; nobody's answer depends on the others.

        A history without ratings gets the most rated items, log of their smoothed share of all ratings as score.
        """
        known = [ask for ask in asks if len(ask.rows)]
        answers = iter(self._by_policy(known) if known else [])
        return [next(answers) if len(ask.rows) else self._by_popularity(ask) for ask in asks]

    @np.errstate(invalid="ignore", over="ignore")  # NaN is left out of what is answered
    def _by_policy(self, asks: list[Ask]) -> list[dict]:
        state = self.states(asks)
        proto_action = self.actor.run(["proto_action"], {"state": state})[0] + self.remembered(asks)
        bias, taste = self.tastes(asks)
        best = self.best(proto_action, asks, bias, taste)
        rows = np.zeros((len(asks), max(1, *(len(own) for own, _ in best))), np.int64)
        for b, (own, _) in enumerate(best):
            rows[b, :len(own)] = own
        values = self.critic.run(["values"], {"state": state, "actions": self.matrix[rows]})[0]
        length = np.maximum(np.linalg.norm(proto_action, axis=1, keepdims=True), 1e-12)
        places = (proto_action * (self.place_norm / length) - self.mean) @ self.axes.T
        answers = []
        for b, (ask, (own, score), value, place) in enumerate(zip(asks, best, values, places, strict=True)):
            used = ask.rows[-self.frame_size:]
            stars = (self.offset[own] + bias[b] + self.tasted[own] @ taste[b]).clip(self.low, self.high)
            similarity = np.nan_to_num(self.matrix[own] @ self.matrix[used].T
                                       / np.outer(self.norm[own], self.norm[used]))
            slate = [{**self._named(row), "score": finite(score[i], 6), "stars": finite(stars[i], 2),
                      "value": finite(value[i], 6),
                      "because": {**self._named(used[like.argmax()]), "similarity": round(float(like.max()), 4)}}
                     for i, (row, like) in enumerate(zip(own, similarity, strict=True))]
            lies = dict(zip("xy", (finite(part, 4) for part in place), strict=True))
            answers.append({"slate": slate, "used": len(used), "note": self._note(ask, len(slate)),
                            "proto_action": None if None in lies.values() else lies})
        return answers

    def _by_popularity(self, ask: Ask) -> dict:
        rows = self.by_ratings[~np.isin(self.by_ratings, ask.hidden)][:ask.k]
        slate = [{**self._named(row), "score": round(float(self.popularity[row]), 6), "stars": None, "value": None,
                  "because": None} for row in rows]
        return {"slate": slate, "used": 0, "note": self._note(ask, len(slate)), "proto_action": None}

    def _named(self, row: int) -> dict:
        return {"item_id": self.items[row]["id"], "title": self.items[row]["title"]}

    def _note(self, ask: Ask, n: int) -> str | None:
        rated, size, n_left, notes = len(ask.rows), self.frame_size, len(self.items) - len(ask.hidden), []
        if rated == 0:
            notes.append("There are no ratings yet: these are the items that were rated most.")
        elif rated < size:
            yours = "your rating fills" if rated == 1 else f"your {rated} fill"
            notes.append(f"A state has {size} places, which {yours} over and over.")
        if n_left < ask.k:
            notes.append("Every item is rated or left out: there is nothing to recommend." if n_left == 0 else
                         f"Only {n_left} {'item is' if n_left == 1 else 'items are'} neither rated nor left out.")
        if n < min(ask.k, n_left):
            notes.append(f"The model has a score for {n or 'none'} of the items left.")
        return " ".join(notes) or None
