"""What the lesson cells of notes/13_beyond_one_machine.ipynb define; `make agents` writes it."""

import time
from itertools import chain, count

import numpy as np
import pandas as pd
import torch

from helpers.agents import d4pg
from helpers.extra import cluster


def learn_from_players(ray, agent: dict, noises: tuple[float, ...], **options) -> pd.DataFrame:
    """Do lesson 06's `learn_from_actors` with one Ray actor for each noise, spread over the nodes."""
    class Player:
        def __init__(self, noise):
            self.act, self.noise = d4pg.act, noise

        def play(self, weights, seed):
            return self.act(weights, seed, 30, self.noise)

    remote = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(Player)
    players = {noise: remote.remote(noise) for noise in noises}

    def collect(tickets):
        return tickets[0], ray.get(tickets[0])

    return d4pg.learn_from_actors(
        agent, lambda weights, seed, noise: players[noise].play.remote(weights, seed), collect, noises, **options)


def rate_of(engine, workers: int, home: str, item_ids: np.ndarray, matrix, frame_size: int,
            seconds: float) -> float:
    """Return transitions a second that workers make of their shards, all in the same `seconds`."""
    class Maker:
        def __init__(self, rank, matrix):
            torch.set_num_threads(1)
            self.frames = cluster.shared_frames(cluster.read_shards(home, rank, workers), item_ids, matrix, frame_size)

        def made(self, begin, seconds):
            time.sleep(max(0, begin - time.time()))
            total, passes = 0, (self.frames.batches(4096, seed=seed) for seed in count())
            for batch in chain.from_iterable(passes):
                total += len(batch.reward)
                if time.time() > begin + seconds:
                    break
            return total

    spread = engine.remote(num_cpus=1, scheduling_strategy="SPREAD")(Maker).remote
    makers = [spread(rank, matrix) for rank in range(workers)]
    for length in (0.1, seconds):  # the first time starts and compiles
        begin = time.time() + 1
        total = sum(engine.get([maker.made.remote(begin, length) for maker in makers]))
    for maker in makers:
        engine.kill(maker)
    return total / seconds
