import numpy as np
import torch

from helpers import toy
from helpers.frames import reward_of

GAMMA = 0.9


def test_the_optimum_is_the_best_of_all_policies_by_brute_force():
    reward = reward_of(toy.STARS)
    everything = [np.array(choice) for choice in np.ndindex(3, 3, 3)]
    values = {tuple(map(int, choice)): toy.policy_return(choice, reward, GAMMA) for choice in everything}
    best = tuple(map(int, toy.solve(reward, GAMMA).argmax(axis=1)))
    assert max(values, key=values.get) == best == (1, 2, 1)
    assert toy.share_of_optimum(np.array(best), GAMMA) == 1
    greedy = reward.argmax(axis=1)
    assert greedy[0] == 0 and toy.share_of_optimum(greedy, GAMMA) < 0.8  # the trap


def test_the_log_is_of_the_world():
    frames = toy.toy_frames()
    t = frames.gather(torch.arange(len(frames)))
    seen, taken = t.state[:, :3].argmax(dim=1), t.action.argmax(dim=1)
    np.testing.assert_array_equal(t.reward[:, 0], reward_of(toy.STARS)[seen, taken])
    assert toy.toy_states().shape == (3, t.state.shape[1])
