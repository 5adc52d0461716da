"""Measure how fast texts become vectors, beside sentence-transformers: `python -m benchmarks.text`.

Both encode the same 1,000 SYNTHETIC texts with the same MiniLM, batch size, cut and pooling, in one process, in turns.
sentence-transformers is no requirement of the project: without it our own rate is shown alone.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from transformers import logging as transformers_logging

from helpers.datasets import fetch_model
from helpers.text import encode, load_encoder

N_TEXTS, BATCH_SIZE, MAX_LENGTH, ROUNDS = 1_000, 32, 256, 5


def synthetic_texts(n_texts: int, words: list[str], seed: int = 0) -> list[str]:
    """Make texts of random words: most of the length of a title with a tagline, some longer than a plot."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(mean=3.3, sigma=0.9, size=n_texts), 3, 300).astype(int)
    return [" ".join(rng.choice(words, length)) for length in lengths]


def masked_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average the hidden states (B, T, d) over the real tokens, as sentence-transformers does → (B, d)."""
    mask = mask.unsqueeze(2).to(hidden.dtype)
    return (mask * hidden).sum(dim=1) / mask.sum(dim=1)


def in_turns(ways: dict[str, Callable[[], np.ndarray]], rounds: int) -> tuple[dict[str, list[float]], dict]:
    """Run each way once a round, the first one changing; return its seconds a round and its last result."""
    seconds, results = {name: [] for name in ways}, {}
    for turn in range(rounds):
        for name in sorted(ways, reverse=bool(turn % 2)):
            started = time.perf_counter()
            results[name] = ways[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds, results


def main(rounds: int = ROUNDS, n_texts: int = N_TEXTS) -> None:
    """Print texts a second, and how far the two are apart in time and in their vectors."""
    folder = fetch_model()
    tokenizer, model = load_encoder(folder)
    texts = synthetic_texts(n_texts, sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 2))
    numbered = dict(enumerate(texts))
    ways = {"helpers.text": lambda: np.stack(list(encode(numbered, tokenizer, model, masked_mean, BATCH_SIZE,
                                                         MAX_LENGTH).values()))}
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        print("sentence-transformers is not installed, so there is nothing to compare with; to compare, install it "
              "where it does no harm: pip install --no-deps --target <folder> sentence-transformers==6.2.0, and put "
              "<folder> on PYTHONPATH")
    else:
        transformers_logging.set_verbosity_error()
        other = SentenceTransformer(str(folder), device="cpu")
        other.max_seq_length = MAX_LENGTH
        ways["sentence-transformers"] = lambda: other.encode(texts, batch_size=BATCH_SIZE, show_progress_bar=False)
    in_turns(ways, 1)  # warms up
    seconds, results = in_turns(ways, rounds)
    print(f"{n_texts:,} synthetic texts, MiniLM, batch size {BATCH_SIZE}, {MAX_LENGTH} tokens at most, "
          f"{torch.get_num_threads()} threads, median of {rounds} rounds in turns")
    for name, taken in seconds.items():
        print(f"{name:22} {n_texts / median(taken):7.0f} texts/s   (from {n_texts / max(taken):.0f} "
              f"to {n_texts / min(taken):.0f})")
    if len(ways) == 2:
        ours, theirs = (seconds[name] for name in ("helpers.text", "sentence-transformers"))
        ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
        apart = np.abs(results["helpers.text"] - results["sentence-transformers"]).max()
        print(f"our rate is {ratio:.2f} times theirs; no number of a vector differs by more than {apart:.0e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    main(parser.parse_args().rounds)
