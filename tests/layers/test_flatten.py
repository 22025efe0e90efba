"""flatten: features in the order of the user's channels-first images."""

from torch import nn


def test_flatten_keeps_the_users_order(check_passes):
    check_passes(nn.Sequential(nn.Conv2d(2, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 3 * 2, 4)), (2, 4, 3), 3)


def test_flatten_of_the_input(check_passes):
    check_passes(nn.Sequential(nn.Flatten(), nn.Linear(24, 3)), (2, 4, 3), 3)
    check_passes(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (4, 3), 3)
