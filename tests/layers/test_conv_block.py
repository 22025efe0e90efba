"""conv_block (CPU): convolution, BatchNorm, residual sum, ReLU or LeakyReLU, and max-pool in one layer.

Where other layers read a value in between, they stay several layers.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests import conftest
from tests.conftest import check_meta_gradient

SAMPLE = (3, 7, 9)


class Net(nn.Module):
    """`join` combines h, the output of a stem, with normalised convolutions of h (3 x 3, 1 x 1) and of x (1 x 1)."""

    def __init__(self, join, channels: int = 5, inputs: int = 3) -> None:
        super().__init__()

        def normalised(inputs: int, kernel: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, channels, kernel, padding=kernel // 2, bias=kernel == 3)
            return nn.Sequential(conv, nn.BatchNorm2d(channels, track_running_stats=False))

        self.stem, self.body = normalised(inputs, 3), normalised(channels, 3)
        self.narrow, self.shortcut, self.last = normalised(channels, 1), normalised(inputs, 1), normalised(channels, 3)
        self.head = nn.Linear(channels, 3)
        self.join = join
        self.double()
        self(torch.randn(2, inputs, *SAMPLE[1:], dtype=torch.double)).sum().backward()
        for p in self.parameters():  # the join may leave some out
            p.requires_grad_(p.grad is not None)
            p.grad = None

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.stem(x), 0.1)
        h = self.join(h, self.body, self.narrow, lambda: self.shortcut(x))
        return self.head(F.relu(self.last(h)).mean((2, 3)))


JOINS = {
    "chain": lambda h, body, narrow, shortcut: F.leaky_relu(body(h), 0.3),
    "identity": lambda h, body, narrow, shortcut: F.relu(body(h) + h),
    "identity first": lambda h, body, narrow, shortcut: F.relu(h + body(h)),
    "stem": lambda h, body, narrow, shortcut: F.max_pool2d(F.leaky_relu(body(h) + shortcut(), 0.1), 2),
    "two": lambda h, body, narrow, shortcut: F.max_pool2d(F.leaky_relu(body(h) + narrow(h), 0.1), 2),
    "sum alone": lambda h, body, narrow, shortcut: narrow(h) + body(h),
    "sum of sums": lambda h, body, narrow, shortcut: F.relu(narrow(h) + F.relu(body(h) + shortcut())),
    "itself": lambda h, body, narrow, shortcut: (lambda y: F.relu(y + y))(body(h)),
    "read again": lambda h, body, narrow, shortcut: (lambda y: F.relu(y + h) + y)(body(h)),
    "smooth, pooled": lambda h, body, narrow, shortcut: F.max_pool2d(torch.tanh(body(h) + h), 2),
    "pool first": lambda h, body, narrow, shortcut: F.relu(F.max_pool2d(body(h) + h, 2)),
    "no slope": lambda h, body, narrow, shortcut: F.leaky_relu(body(h) + h, 1.0),
    "descends": lambda h, body, narrow, shortcut: F.max_pool2d(F.leaky_relu(body(h), -0.2), 2),
}
ADAPTED = {
    "all": None,
    "head": lambda name: name.startswith("head"),
    "body": lambda name: name.startswith(("body", "head")),
    "last": lambda name: name.startswith("last"),
}


def episode(tasks: int = 2) -> list[Tensor]:
    return conftest.episode(SAMPLE, tasks=tasks, n=(4, 5), classes=3)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("join", JOINS)
def test_against_autograd(join, adapted):
    check_meta_gradient(Net(JOINS[join]), "cross_entropy", episode(), 0.1, 2, adapt_params=ADAPTED[adapted])


def test_a_summand_that_moves_alone():
    """The residual sum has a tangent; the convolution fused with it has none."""
    adapt = lambda name: name.startswith("narrow")  # noqa: E731
    model = Net(lambda h, body, narrow, shortcut: F.relu(body(h) + F.relu(narrow(h))))
    check_meta_gradient(model, "cross_entropy", episode(), 0.1, 2, adapt_params=adapt)


def test_many_samples_and_wide_vectors():
    """Several groups of samples, and enough channels for Winograd's method."""
    x, y = torch.randn(1, 60, 2, 16, 16, dtype=torch.double), torch.randint(3, (1, 60))
    model = Net(JOINS["two"], channels=18, inputs=2)
    check_meta_gradient(model, "cross_entropy", [x, y, x, y], 0.1, 1)


@pytest.mark.usefixtures("machine")
def test_a_sum_of_another_shape():
    """No sum of the block: the mean of each channel is added to its pixels."""
    model = Net(lambda h, body, narrow, shortcut: F.relu(body(h) + F.adaptive_avg_pool2d(h, 1)))
    check_meta_gradient(model, "cross_entropy", episode(), 0.1, 2)


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("layer", ["stem", "body", "last"])
def test_relu_of_what_is_not_finite(layer: str, value: float) -> None:
    """As in torch, relu(-inf) is 0; the product 0 * -inf would be NaN."""

    def join(h, body, narrow, shortcut):
        return F.relu(body(h) + shortcut())

    torch.manual_seed(0)
    model = Net(join)
    getattr(model, layer)[1].bias.data[2] = value
    x = torch.randn(2, 4, *SAMPLE, dtype=torch.double)
    fused, reference = FusedMAML(model, 0.1), FusedMAML(model, 0.1, backend="reference")
    fast = {name: p.detach().expand(2, *p.shape) for name, p in model.named_parameters()}
    torch.testing.assert_close(fused.predict(fast, x), reference.predict(fast, x), equal_nan=True)
