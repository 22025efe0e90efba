"""Training steps as people write them: correct loops in several libraries, and loops with one fault each.

Each is a step(model, x_spt, y_spt, x_qry, y_qry) for doctor, with rate LR and STEPS inner steps.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from maml_cuda import FusedMAML

LR, STEPS = 0.3, 2


def fused(model, *data):
    maml = FusedMAML(model, LR, STEPS)
    out = maml(*data)
    out.loss.backward()
    return out


# -- correct ---------------------------------------------------------------------------------------------------


def plain(model, x_spt, y_spt, x_qry, y_qry, steps=STEPS, lr=LR):
    names, theta = zip(*model.named_parameters(), strict=True)
    losses = []
    for xs, ys, xq, yq in zip(x_spt, y_spt, x_qry, y_qry, strict=True):
        phi = theta
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(model, dict(zip(names, phi, strict=True)), (xs,)), ys)
            grads = torch.autograd.grad(loss, phi, create_graph=True)
            phi = [p - lr * g for p, g in zip(phi, grads, strict=True)]
        losses.append(F.cross_entropy(functional_call(model, dict(zip(names, phi, strict=True)), (xq,)), yq))
    return torch.stack(losses).mean()


def plain_with_backward(model, *data):
    model.zero_grad()
    loss = plain(model, *data)
    loss.backward()
    return loss.item()


def sum_over_tasks(model, x_spt, y_spt, x_qry, y_qry):
    """As higher's example: a backward for each task, and the mean is returned."""
    total = 0.0
    for t in range(len(x_spt)):
        one = slice(t, t + 1)
        loss = plain(model, x_spt[one], y_spt[one], x_qry[one], y_qry[one])
        loss.backward()
        total += loss.item()
    return total / len(x_spt)


def task_loss(model, theta, xs, ys, xq, yq):
    def loss(p, x, y):
        return F.cross_entropy(functional_call(model, p, (x,)), y)

    phi = theta
    for _ in range(STEPS):
        grads = grad(loss)(phi, xs, ys)
        phi = {name: p - LR * grads[name] for name, p in phi.items()}
    return loss(phi, xq, yq)


def of_torch_func(model, *data):
    """Per-task gradients inside vmap."""
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def gradient(*task):
        return grad(lambda p: task_loss(model, p, *task))(theta)

    gradients = vmap(gradient)(*data)
    losses = vmap(lambda *task: task_loss(model, theta, *task))(*data)
    for name, p in model.named_parameters():
        p.grad = gradients[name].mean(0)
    return losses.mean()


def vmap_inside(model, *data):
    """The losses of all tasks in a vmap, and the gradient outside: right without BatchNorm."""
    theta = dict(model.named_parameters())
    return vmap(lambda *task: task_loss(model, theta, *task))(*data).mean()


def of_higher(model, x_spt, y_spt, x_qry, y_qry, **flags):
    import higher

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    total = 0.0
    for xs, ys, xq, yq in zip(x_spt, y_spt, x_qry, y_qry, strict=True):
        with higher.innerloop_ctx(model, optimizer, **flags) as (fast, inner):
            for _ in range(STEPS):
                inner.step(F.cross_entropy(fast(xs), ys))
            loss = F.cross_entropy(fast(xq), yq) / len(x_spt)
            loss.backward()
            total += loss.item()
    return total


def of_learn2learn(model, x_spt, y_spt, x_qry, y_qry, maml_class, **flags):
    maml = maml_class(model, lr=LR, **flags)
    losses = []
    for xs, ys, xq, yq in zip(x_spt, y_spt, x_qry, y_qry, strict=True):
        learner = maml.clone()
        for _ in range(STEPS):
            learner.adapt(F.cross_entropy(learner(xs), ys))
        losses.append(F.cross_entropy(learner(xq), yq))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss


# -- with faults -----------------------------------------------------------------------------------------------


def fast_copies(model, x_spt, y_spt, x_qry, y_qry, inner):
    """A copy of the model for each task, whose gradients go back to the model, as many first-order scripts have it."""
    model.zero_grad()
    total = 0.0
    for xs, ys, xq, yq in zip(x_spt, y_spt, x_qry, y_qry, strict=True):
        fast = copy.deepcopy(model)
        inner(fast, xs, ys)
        loss = F.cross_entropy(fast(xq), yq) / len(x_spt)
        grads = torch.autograd.grad(loss, list(fast.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g if p.grad is None else p.grad + g
        total += loss.item()
    return total


def param_data(model, *data):
    def inner(fast, xs, ys):
        for _ in range(STEPS):
            grads = torch.autograd.grad(F.cross_entropy(fast(xs), ys), list(fast.parameters()), create_graph=True)
            for p, g in zip(fast.parameters(), grads, strict=True):
                p.data = p.data - LR * g.detach()

    return fast_copies(model, *data, inner=inner)


def torch_optimizer(model, *data):
    def inner(fast, xs, ys):
        optimizer = torch.optim.SGD(fast.parameters(), lr=LR)
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(fast(xs), ys).backward()
            optimizer.step()

    return fast_copies(model, *data, inner=inner)


def loop(model, x_spt, y_spt, x_qry, y_qry, *, create_graph=True, detach=False, reduction="mean", query_mode=None,
         together=False, query_reduction="mean"):  # fmt: skip
    """The plain loop with switches for its faults."""
    names, theta = zip(*model.named_parameters(), strict=True)
    losses = []
    for xs, ys, xq, yq in zip(x_spt, y_spt, x_qry, y_qry, strict=True):
        phi = theta

        def forward(phi, x, other):
            phi = dict(zip(names, phi, strict=True))
            if together:
                return functional_call(model, phi, (torch.cat((x, other)),))[: len(x)]
            return functional_call(model, phi, (x,))

        for _ in range(STEPS):
            loss = F.cross_entropy(forward(phi, xs, xq), ys, reduction=reduction)
            grads = torch.autograd.grad(loss, phi, create_graph=create_graph)
            phi = [p - LR * g for p, g in zip(phi, grads, strict=True)]
            if detach:
                phi = [p.detach().requires_grad_() for p in phi]
        before = model.training
        model.train(before if query_mode is None else query_mode)
        losses.append(F.cross_entropy(forward(phi, xq, xs), yq, reduction=query_reduction))
        model.train(before)
    return torch.stack(losses).mean()


def no_create_graph(model, *data):
    return loop(model, *data, create_graph=False)


def detached(model, *data):
    loss = loop(model, *data, detach=True)
    loss.backward()
    return loss


def detached_gradients(model, x_spt, y_spt, x_qry, y_qry):
    """The inner gradients are detached, although they were made with create_graph=True."""
    names, theta = zip(*model.named_parameters(), strict=True)
    total = 0.0
    for xs, ys, xq, yq in zip(x_spt, y_spt, x_qry, y_qry, strict=True):
        phi = theta
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(model, dict(zip(names, phi, strict=True)), (xs,)), ys)
            grads = torch.autograd.grad(loss, phi, create_graph=True)
            phi = [p - LR * g.detach() for p, g in zip(phi, grads, strict=True)]
        total = total + F.cross_entropy(functional_call(model, dict(zip(names, phi, strict=True)), (xq,)), yq)
    return total / len(x_spt)


def flag_of_a_script(model, *data, first_order=True):
    return loop(model, *data, create_graph=not first_order)


def flag_of_ours(model, *data):
    maml = FusedMAML(model, LR, STEPS, first_order=True)
    out = maml(*data)
    out.loss.backward()
    return out.loss


def summed(model, *data):
    return loop(model, *data, reduction="sum")


def query_summed(model, *data):
    return loop(model, *data, query_reduction="sum")


def query_in_eval_mode(model, *data):
    return loop(model, *data, query_mode=False)


def normalised_together(model, *data):
    return loop(model, *data, together=True)


def weights_left(model, x_spt, y_spt, x_qry, y_qry):
    """In place on the model, which the next task finds adapted."""
    total = 0.0
    model.zero_grad()
    for xs, ys, xq, yq in zip(x_spt, y_spt, x_qry, y_qry, strict=True):
        for _ in range(STEPS):
            grads = torch.autograd.grad(F.cross_entropy(model(xs), ys), list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    p -= LR * g
        loss = F.cross_entropy(model(xq), yq) / len(x_spt)
        loss.backward()
        total += loss.item()
    return total


def one_learner(model, x_spt, y_spt, x_qry, y_qry):
    """The fast weights are made once, and every task goes on from the last one's."""
    names, phi = zip(*model.named_parameters(), strict=True)
    losses = []
    for xs, ys, xq, yq in zip(x_spt, y_spt, x_qry, y_qry, strict=True):
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(model, dict(zip(names, phi, strict=True)), (xs,)), ys)
            grads = torch.autograd.grad(loss, phi, create_graph=True)
            phi = [p - LR * g for p, g in zip(phi, grads, strict=True)]
        losses.append(F.cross_entropy(functional_call(model, dict(zip(names, phi, strict=True)), (xq,)), yq))
    return torch.stack(losses).mean()


# -- nets ------------------------------------------------------------------------------------------------------


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def relu_net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def batch_norm_net(track_running_stats=True):
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=track_running_stats), nn.Tanh(), nn.Linear(6, 3)
    )
