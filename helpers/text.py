"""Turn an item's facts into a text, and texts into vectors, with a transformer from a folder or by its name."""

import hashlib
import http.client
import os
import pickle
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants as hub
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers import logging as transformers_logging

from helpers.files import DataError, shown, write_vectors, writing

NO_OVERVIEW = {"no overview found", "no overview", "no movie overview available"}  # so TMDB's tables write "none"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")  # gpt2, google-bert/bert-base-uncased
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError)


def item_text(info: dict) -> str:
    """Write what is known of an item as one short text: title, year, genres, tagline, overview.

    What is unknown, blank or absent leaves no trace. The overview comes last: it is the longest, so it is
    what an encoder's `max_length` cuts.
    """
    year = f" ({info['release_year']})" if info.get("release_year") else ""
    overview = (info.get("overview") or "").strip()
    if overview.rstrip(".").lower() in NO_OVERVIEW:
        overview = ""
    tagline = (info.get("tagline") or "").strip().rstrip(".")
    parts = [f"{info.get('title') or ''}{year}", ", ".join(info.get("genres") or []), tagline, overview]
    return ". ".join(part.strip() for part in parts if part.strip())


def load_encoder(name: str | Path, device: str = "cpu") -> tuple:
    """Return (tokenizer, model) in float32 and evaluation mode, padding on the right.

    A decoder such as GPT-2 has no padding token; it pads with its end-of-text token. On the right no real token
    sees the padding or is moved by it.

    Args:
        name: a folder with weights and tokenizer, or the model's name on the Hugging Face hub (`bert-base-uncased`,
            `gpt2`): the hub's cache on this machine is tried first, then the hub.

    Raises:
        DataError: if the folder holds no transformer, or not all of it, or the name is not to be had.
    """
    folder = Path(name).expanduser()
    try:
        tokenizer, model = _read(folder) if folder.is_dir() else _from_hub(str(name))
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"{shown(folder)} holds no transformer that can be read: {_first_line(error)}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.use_cache = False  # keys and values are kept for writing on, which nobody does here
    return tokenizer, model.to(device).eval()


def _read(source: str | Path, local: bool = True) -> tuple:
    """Return (tokenizer, model), checked for what the library lets pass with a warning, or with none.

    Raises:
        ValueError: a tokenizer without words, weights that leave a part of the model random, or an encoder with a
            decoder; and one of `UNREADABLE` for files that are missing or damaged.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        model, report = AutoModel.from_pretrained(source, local_files_only=local, dtype=torch.float32,
                                                  output_loading_info=True)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ValueError("its tokenizer knows no words; put the model's tokenizer.json beside the weights")
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # the pooler is not used
    if missing:
        raise ValueError(f"its weights lack {missing[0]} ({len(missing)} such); they belong to another config.json")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{model.config.model_type} is an encoder with a decoder; give one that is either, as BERT "
                         f"and GPT-2 are")
    return tokenizer, model


def _from_hub(name: str) -> tuple:
    """Read a model by name from the hub's cache, else from the hub.

    Raises:
        DataError: saying what to do instead.
    """
    instead = "give a folder with its config.json, model.safetensors and tokenizer.json"
    if not HUB_NAME.fullmatch(name):
        raise DataError(f"text encoder {name!r} is neither a folder nor a model's name: {instead}")
    with suppress(UNREADABLE):  # not in the cache, or not all of it
        return _read(name)
    try:
        if not hub.HF_HUB_OFFLINE:  # asked once: the hub's own client tries for most of a minute
            urllib.request.urlopen(hub.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"text encoder {name!r} is no folder, not in the hub's cache, and the hub is out of reach "
                        f"({getattr(error, 'reason', error)}): {instead}") from error
    try:
        return _read(name, local=False)
    except UNREADABLE as error:
        raise DataError(f"text encoder {name!r} is no folder, and the hub does not give it ({_first_line(error)}): "
                        f"{instead}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@torch.inference_mode()
def encode(texts: dict[int, str], tokenizer, model, pool: Callable[[Tensor, Tensor], Tensor], batch_size: int = 32,
           max_length: int = 256, path: Path | None = None) -> dict[int, np.ndarray]:
    """Encode texts in batches of similar length, longest first, so that little of a batch is padding.

    A text's vector is the same alone and in any batch, but for the rounding of float32.

    Args:
        texts: `{item_id: text}`.
        tokenizer, model: as `load_encoder` returns them.
        pool: (hidden (B, T, d), mask (B, T) int64, 1 for a real token) → (B, d), the lesson's own pooling.
        batch_size: texts at once; memory, not quality, depends on it.
        max_length: tokens of a text that are read; never more than the model has positions for.
        path: where to write the vectors (`texts_bert.p`). Each batch is then saved in a journal beside it, and a run
            that was killed goes on there: with the same texts, model and pooling; otherwise it starts anew.

    Returns:
        `{item_id: vector (d,) float32}` in the order of `texts`.

    Raises:
        DataError: another process is writing `path`.
    """
    tokens = _tokenize(list(texts.values()), tokenizer, _limit(tokenizer, model, max_length))
    order = np.argsort([-len(ids) for ids in tokens], kind="stable")
    journal = path and Path(path).with_name(f".{Path(path).name}.journal")
    recipe = _recipe(list(texts), tokens, model, pool) if journal else b""
    with writing(path) if path else nullcontext():
        parts = [_resume(journal, recipe)] if journal else []
        n_done = sum(map(len, parts))
        lengths = torch.tensor([len(tokens[i]) for i in order], dtype=torch.long)
        with tqdm(total=int(lengths.sum()), initial=int(lengths[:n_done].sum()), desc="encode", unit="token",
                  unit_scale=True, leave=False) as bar:
            for start in range(n_done, len(texts), batch_size):
                batch = [torch.from_numpy(tokens[i]) for i in order[start:start + batch_size]]
                input_ids = pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
                n_real = lengths[start:start + batch_size]
                mask = (torch.arange(input_ids.shape[1]) < n_real.unsqueeze(1)).long().to(model.device)
                hidden = model(input_ids=input_ids.to(model.device), attention_mask=mask).last_hidden_state
                parts.append(pool(hidden, mask).float().cpu().numpy())
                if journal:
                    _save(journal, recipe, start, parts[-1])
                bar.update(int(n_real.sum()))
        vector_of = dict(zip(order.tolist(), (row for part in parts for row in part), strict=True))
        vectors = {item_id: vector_of[i] for i, item_id in enumerate(texts)}
        if journal:
            write_vectors(path, vectors)
            journal.unlink(missing_ok=True)  # no texts, no journal
    return vectors


def _limit(tokenizer, model, max_length: int) -> int:
    """Return the tokens of a text that are read: `max_length`, or what tokenizer and positions admit."""
    learnt = [table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
              for name, table in model.named_modules()
              if isinstance(table, nn.Embedding) and name.endswith(("position_embeddings", "wpe"))]
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None), *learnt)
    return min(max_length, *(limit for limit in limits if limit and limit > 0))  # XLNet has −1 for "as many as wanted"


def _tokenize(texts: list[str], tokenizer, max_length: int, piece: int = 1000) -> list[np.ndarray]:
    """Return the token ids of each text, (T,) int64; a text without any is one padding token, seen as real."""
    tokens = []
    for start in range(0, len(texts), piece):
        rows = tokenizer(texts[start:start + piece], truncation=True, max_length=max_length)["input_ids"]
        tokens += [np.array(row or [tokenizer.pad_token_id or 0], dtype=np.int64) for row in rows]
    return tokens


# The journal: 32 bytes that name the recipe, then for each text, longest first, its vector and a checksum. The
# checksum knows recipe and place, so neither a torn line nor one of another run is ever taken for a vector.

def _recipe(item_ids: list[int], tokens: list[np.ndarray], model, pool: Callable) -> bytes:
    """Return the sha256 of all that the vectors depend on: ids, tokens, model, and what pooling does to a toy."""
    hidden = torch.linspace(-1, 1, 6 * model.config.hidden_size, device=model.device).reshape(2, 3, -1)
    toy = pool(hidden, torch.tensor([[1, 1, 0], [1, 1, 1]], device=model.device))
    digest = hashlib.sha256(f"{model.config.to_json_string()} {item_ids} {[*map(len, tokens)]}".encode())
    for weights in (toy, *model.state_dict().values()):
        digest.update(np.ascontiguousarray(weights.float().cpu().numpy()))
    for ids in tokens:
        digest.update(ids)
    return digest.digest()


def _checksum(recipe: bytes, place: int, vector: bytes) -> bytes:
    return zlib.crc32(b"%b%d %b" % (recipe, place, vector)).to_bytes(4, "little")


def _save(journal: Path, recipe: bytes, start: int, vectors: np.ndarray) -> None:
    """Append vectors (B, d) float32, those of the places from `start` on; the first call makes the journal."""
    if start == 0:
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.write_bytes(recipe + vectors.shape[1].to_bytes(4, "little"))
    rows = (row.tobytes() for row in vectors)
    with journal.open("ab") as file:
        file.write(b"".join(row + _checksum(recipe, start + i, row) for i, row in enumerate(rows)))


def _resume(journal: Path, recipe: bytes) -> np.ndarray:
    """Return the vectors (n, d) float32 saved by an earlier run of this recipe, and cut off what is torn."""
    saved = journal.read_bytes() if journal.exists() else b""
    if saved[:32] != recipe or len(saved) < 36:
        return np.empty((0, 0), np.float32)
    size = 4 * int.from_bytes(saved[32:36], "little")
    vectors: list[bytes] = []
    for first in range(36, len(saved), size + 4):
        vector, checksum = saved[first:first + size], saved[first + size:first + size + 4]
        if checksum != _checksum(recipe, len(vectors), vector):
            break
        vectors.append(vector)
    os.truncate(journal, 36 + len(vectors) * (size + 4))
    return np.frombuffer(bytearray().join(vectors), np.float32).reshape(len(vectors), size // 4)
