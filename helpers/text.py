"""Turn a film's facts into a text, and texts into vectors, with a transformer read from a folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers import logging as transformers_logging

from helpers.files import DataError, shown


def item_text(info: dict) -> str:
    """Write what is known of a film as one short text: title, year, genres, tagline, overview."""
    year = f" ({info['release_year']})" if info["release_year"] else ""
    parts = [f"{info['title']}{year}", ", ".join(info["genres"]), info["tagline"], info["overview"]]
    return ". ".join(part.strip() for part in parts if part and part.strip())


def load_encoder(folder: Path, device: str = "cpu") -> tuple:
    """Return (tokenizer, model) from a folder with weights and tokenizer, in evaluation mode.

    Raises:
        DataError: if the folder holds no transformer.
    """
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{shown(folder)} holds no transformer that can be read: {reason}") from error
    return tokenizer, model.to(device).eval()


@torch.no_grad()
def encode(texts: dict[int, str], tokenizer, model, pool: Callable, batch_size: int = 64,
           max_length: int = 256) -> dict[int, np.ndarray]:
    """Encode texts in batches of similar length, so that little of a batch is padding.

    Args:
        texts: `{item_id: text}`.
        pool: (hidden (B, T, d), mask (B, T)) → (B, d), the lesson's own pooling.

    Returns:
        `{item_id: vector (d,) float32}` in the order of `texts`.
    """
    ids = sorted(texts, key=lambda item_id: len(texts[item_id]))
    vectors: dict[int, np.ndarray] = {}
    for start in tqdm(range(0, len(ids), batch_size), desc="encode", leave=False):
        chunk = ids[start:start + batch_size]
        tokens = tokenizer([texts[item_id] for item_id in chunk], padding=True, truncation=True,
                           max_length=max_length, return_tensors="pt").to(model.device)
        pooled = pool(model(**tokens).last_hidden_state, tokens["attention_mask"])
        vectors.update(zip(chunk, pooled.float().cpu().numpy(), strict=True))
    return {item_id: vectors[item_id] for item_id in texts}
