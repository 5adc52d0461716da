"""Turn an item's facts into a text, and texts into vectors, with a transformer from a folder or by its name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers import logging as transformers_logging

from helpers.files import DataError, write_vectors
from helpers.tables import no_overview

FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # of a model on the hub; the rest is the same in other formats
transformers_logging.set_verbosity_error()  # `load_encoder` checks itself what matters of the warnings
transformers_logging.disable_progress_bar()


def item_text(info: dict) -> str:
    """Write what is known of an item as one short text: title, year, genres, tagline, overview.

    What is unknown or blank leaves no trace. The overview, the longest, comes last: `max_length` of an encoder cuts it.

    >>> item_text({"title": "Heat", "release_year": 1995, "genres": ["Crime", "Drama"], "tagline": " ",
    ...            "overview": "A thief plans a last job."})
    'Heat (1995). Crime, Drama. A thief plans a last job.'
    """
    year = f" ({info['release_year']})" if info.get("release_year") else ""
    tagline, overview = ((info.get(field) or "").strip() for field in ("tagline", "overview"))
    parts = [f"{info.get('title') or ''}{year}", ", ".join(info.get("genres") or []), tagline.rstrip("."),
             "" if no_overview(overview) else overview]
    return ". ".join(part.strip() for part in parts if part.strip())


def load_encoder(name: str | Path, device: str = "cpu") -> tuple:
    """Return (tokenizer, model) in float32 and evaluation mode, padding on the right.

    On the right, no real token sees the padding or is moved by it. GPT-2 pads with its end-of-text token. `name` is a
    folder with weights and tokenizer, or a model on the Hugging Face hub (`bert-base-uncased`, `gpt2`), of whose cache
    it is read without a network. DataError: no such folder or name, the hub is out of reach, or no whole encoder.
    """
    folder = Path(name).expanduser()
    try:
        source = folder if folder.is_dir() else snapshot_download(str(name), allow_patterns=FILES)
        model, report = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
            raise ValueError("its tokenizer knows no words")
        if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):  # the pooler is not used
            raise ValueError(f"its weights lack {missing[0]} ({len(missing)} such)")
        if model.config.is_encoder_decoder:
            raise ValueError(f"{model.config.model_type} has a decoder beside its encoder; BERT and GPT-2 do not")
    except Exception as error:  # damaged files can make the library raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"text encoder {name} cannot be loaded ({reason}): give a folder with its config.json, "
                        f"model.safetensors and tokenizer.json, or a name that the hub has") from error
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.use_cache = False  # keys and values are kept for writing on, which nobody does here
    return tokenizer, model.to(device)


@torch.inference_mode()
def encode(texts: dict[int, str], tokenizer, model, pool: Callable[[Tensor, Tensor], Tensor], batch_size: int = 32,
           max_length: int = 256, path: Path | None = None) -> dict[int, np.ndarray]:
    """Return `{item_id: vector (d,) float32}` in the order of `texts`, and write it to `path`, if one is given.

    A batch holds texts of similar length, the longest come first: little is padding. A text's vector is the same in
    any batch, but for the rounding of float32.

    Args:
        pool: (hidden (B, T, d), mask (B, T) int64, 1 for a real token) → (B, d), the lesson's own pooling.
        max_length: tokens of a text that are read; never more than the model has positions for.
    """
    learnt = [table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
              for name, table in model.named_modules()  # RoBERTa's first positions are not for tokens
              if isinstance(table, nn.Embedding) and name.endswith(("position_embeddings", "wpe"))]
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None), *learnt)
    max_length = min(max_length, *(limit for limit in limits if limit and limit > 0))  # XLNet has −1 for "any number"
    padding = tokenizer.pad_token_id or 0
    rows = (tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts.values())
    tokens = [torch.tensor(ids or [padding]) for ids in rows]  # no text is one padding token, seen as real
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    pooled = []
    for start in tqdm(range(0, len(order), batch_size), desc="encode", unit="batch", leave=False):
        batch = [tokens[i] for i in order[start:start + batch_size]]
        input_ids = pad_sequence(batch, batch_first=True, padding_value=padding).to(model.device)
        mask = pad_sequence([torch.ones_like(ids) for ids in batch], batch_first=True).to(model.device)
        hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        pooled.extend(pool(hidden, mask).float().cpu().numpy())
    vector_of = dict(zip(order, pooled, strict=True))
    vectors = {item_id: vector_of[i] for i, item_id in enumerate(texts)}
    if path:
        write_vectors(path, vectors)
    return vectors
