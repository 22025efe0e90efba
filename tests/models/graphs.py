"""Graph convolutions. The adjacency matrix of the graph is a buffer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalised_adjacency(nodes: int) -> Tensor:
    """A ring with self-loops and a chord, its rows divided by their sums."""
    adjacency = torch.eye(nodes) + torch.eye(nodes).roll(1, 0) + torch.eye(nodes).roll(-1, 0)
    adjacency[0, nodes // 2] = adjacency[nodes // 2, 0] = 1
    return adjacency / adjacency.sum(1, keepdim=True)


class GraphConvolution(nn.Module):
    """pygcn's layer: the adjacency matrix, times the nodes' features, times a weight."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(features, width)), nn.Parameter(torch.empty(width))
        bound = 1.0 / math.sqrt(width)
        self.weight.data.uniform_(-bound, bound)
        self.bias.data.uniform_(-bound, bound)

    def forward(self, input: Tensor, adj: Tensor) -> Tensor:
        return torch.matmul(adj, torch.matmul(input, self.weight)) + self.bias


class GCN(nn.Module):
    """pygcn's network: log-probabilities of the classes of each node, [nodes, classes].

    On [nodes, features] the nodes are the samples, so that the layers mix them. On [n, nodes, features] a sample is a
    whole graph; its prediction is then the mean over the nodes.
    """

    def __init__(self, nodes: int, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("adj", normalised_adjacency(nodes))
        self.gc1, self.gc2 = GraphConvolution(features, hidden), GraphConvolution(hidden, classes)
        self.dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gc1(x, self.adj))
        x = F.dropout(x, self.dropout, training=self.training)
        x = self.gc2(x, self.adj)
        if x.dim() == 3:
            x = x.mean(dim=1)
        return F.log_softmax(x, dim=1)
