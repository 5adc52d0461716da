import numpy as np

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


def test_n_step_values_by_brute_force_over_what_the_log_chose_in_between():
    reward = reward_of(toy.STARS)
    behaviour = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]])
    q = toy.solve(reward, GAMMA, 3, behaviour)
    best = q.max(axis=1)
    for seen, first in np.ndindex(3, 3):
        total = reward[seen, first]
        for second, third in np.ndindex(3, 3):  # two choices of the log's people, then the best there is
            chance = behaviour[first, second] * behaviour[second, third]
            later = GAMMA * reward[first, second] + GAMMA ** 2 * reward[second, third] + GAMMA ** 3 * best[third]
            total += chance * later
        np.testing.assert_allclose(q[seen, first], total, rtol=1e-6)
    np.testing.assert_allclose(toy.solve(reward, GAMMA, 2), toy.solve(reward, GAMMA, 2, np.full((3, 3), 1 / 3)))
