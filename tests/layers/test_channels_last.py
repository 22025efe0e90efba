"""channels_last: the input and the prediction keep the user's channels-first order."""

import torch
from torch import nn


def test_image_prediction_in_the_users_order(check_passes):
    check_passes(nn.Sequential(nn.Conv2d(2, 5, 2), nn.Tanh()), (2, 4, 3), 3)


def test_input_read_as_image_and_as_features(check_passes):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 2)
            self.flat = nn.Linear(24, 3)

        def forward(self, x):
            return self.conv(x).mean([2, 3]) + self.flat(x.flatten(1)) + self.flat(torch.relu(x).view(x.size(0), -1))

    check_passes(Both(), (2, 4, 3), 3)
