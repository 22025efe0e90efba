"""The checks of the data of a call, and of what the model returns for them. An error says what is wrong, what is
expected and what was given."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maml_cuda import pytrees
from maml_cuda.losses import Loss
from maml_cuda.plan.graph import Labels
from maml_cuda.pytrees import Tree
from maml_cuda.targets import POLICY_LOSSES, PolicyTarget, Target

OF_CLASSES = ("cross_entropy", "categorical_policy_gradient")  # whose targets are classes in [0, C)


def data(
    x_name: str, x: Tree, y_name: str | None, y: Any, like: Tensor, dtypes: Collection[torch.dtype], loss: Loss
) -> None:  # fmt: skip
    """One set: x [tasks, samples, ...] or a pytree of tensors [tasks, ...], and its target y.

    like: a trainable parameter of the model.
    dtypes: of all its parameters.
    """
    leaves = _leaves(x_name, x)
    if isinstance(x, Tensor):
        _has_axes(x_name, x, y_name, y)
    for name, leaf in leaves:
        if leaf.device != like.device:
            raise ValueError(f"{name} must be on the model's device {like.device}, got {leaf.device}")
        dtype = leaf.real.dtype if leaf.is_complex() else leaf.dtype  # torch.compile cannot trace to_real
        if dtype not in dtypes and dtype.is_floating_point:
            raise _of_another_dtype(name, leaf, dtypes)
    if y_name is not None:
        _fits(y_name, y, x_name, x, like, dtypes, loss)


def _of_another_dtype(name: str, t: Tensor, dtypes: Collection[torch.dtype]) -> TypeError:
    return TypeError(f"{name} must have the model's dtype {' or '.join(sorted(map(str, dtypes)))}, got {t.dtype}")


def one_tensor(x_name: str, x: Any, what: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{x_name} must be a tensor for {what}, got {type(x).__name__}")


def _leaves(name: str, tree: Tree) -> list[tuple[str, Tensor]]:
    """The tensors of a pytree by name, which must have the same number of tasks; other leaves must be None."""
    if isinstance(tree, Tensor):
        return [(name, tree)]
    leaves = pytrees.named_leaves(name, tree)
    found = [(where, leaf) for where, leaf in leaves if isinstance(leaf, Tensor)]
    if not found:
        raise TypeError(f"{name} must be a tensor or a pytree of tensors, got {type(tree).__name__}")
    for where, leaf in leaves:
        if leaf is not None and not isinstance(leaf, Tensor):
            raise TypeError(f"{where} must be a tensor [tasks, ...], got {type(leaf).__name__}")
    first, like = found[0]
    for where, leaf in found:
        if leaf.dim() == 0:
            raise ValueError(f"{where} must have shape [tasks, ...], got []")
        if len(leaf) == 0:
            raise ValueError(f"{where} must have at least 1 task, got 0")
        if len(leaf) != len(like):
            raise ValueError(f"{where} must have {len(like)} tasks like {first}, got {len(leaf)}")
    return found


def _has_axes(x_name: str, x: Tensor, y_name: str | None, y: Any) -> None:
    """x is [tasks, samples, ...], with at least one of each."""
    if isinstance(y, Tensor) and y.dim() >= 2 and x.dim() and len(x) != len(y) and len(x) == y.shape[1]:
        raise lacks_axis(x_name, x, f", without the axis of tasks of {y_name} {list(y.shape)}")
    if x.dim() < 2:
        raise lacks_axis(x_name, x)
    if x.shape[0] == 0:
        raise ValueError(f"{x_name} must have at least 1 task, got 0")
    if x.shape[1] == 0:
        raise ValueError(f"{x_name} must have at least 1 sample a task, got 0")


def lacks_axis(x_name: str, x: Tensor, why: str = "") -> ValueError:
    return ValueError(
        f"{x_name} must have shape [tasks, samples, ...], got {list(x.shape)}{why}: {x_name}.unsqueeze(0) makes it one "
        f"task, {x_name}.unsqueeze(-1) gives samples that are single numbers an axis"
    )


def _fits(
    y_name: str, y: Any, x_name: str, x: Tree, like: Tensor, dtypes: Collection[torch.dtype], loss: Loss
) -> None:  # fmt: skip
    """The target is what the loss takes, for these x."""
    if loss in POLICY_LOSSES:
        if not isinstance(y, PolicyTarget):
            raise TypeError(f"{y_name} must be a PolicyTarget for {loss}, got {type(y).__name__}")
        for field, value in zip(PolicyTarget._fields, y, strict=True):
            if value is not None or field not in PolicyTarget._field_defaults:
                _field_fits(f"{y_name}.{field}", value, x_name, x, like, str(loss))
            if not isinstance(x, Tensor):  # a pytree does not tell its samples, but the actions do
                x_name, x = f"{y_name}.actions", y.actions
        return
    if isinstance(loss, str) and not isinstance(y, Tensor):
        raise TypeError(f"{y_name} must be a tensor for {loss}, got {type(y).__name__}")
    for name, leaf in _leaves(y_name, y):
        _belongs_to(name, leaf, x_name, x, alone=isinstance(y, Tensor))
    if loss == "cross_entropy":
        if y.dtype != torch.int64:
            raise TypeError(f"{y_name} must hold int64 labels for cross_entropy, got {y.dtype}")
        if y.dim() != 2:
            raise ValueError(f"{y_name} must have shape [tasks, samples], got {list(y.shape)}")
    elif loss == "mse" and y.dtype not in dtypes:
        raise _of_another_dtype(y_name, y, dtypes)


def _field_fits(name: str, value: Any, x_name: str, x: Tree, like: Tensor, loss: str) -> None:
    """A field of a policy-gradient loss's target."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    _belongs_to(name, value, x_name, x)
    actions = name.endswith(".actions")
    dtype, rank = (torch.int64, 2) if actions and loss in OF_CLASSES else (like.dtype, 3 if actions else 2)
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} for {loss}, got {value.dtype}")
    if value.dim() != rank:
        form = "[tasks, samples, action]" if rank == 3 else "[tasks, samples]"
        raise ValueError(f"{name} must have shape {form} for {loss}, got {list(value.shape)}")


def _belongs_to(y_name: str, y: Tensor, x_name: str, x: Tree, alone: bool = True) -> None:
    """y [tasks, ...] is on the device of x and has as many tasks; and where both are tensors, as many samples."""
    like = pytrees.tensors(x)[0]
    if y.device != like.device:
        raise ValueError(f"{y_name} must be on the device of {x_name}, {like.device}, got {y.device}")
    if y.dim() == 0 or len(y) != len(like):
        got = len(y) if y.dim() else "a scalar"
        raise ValueError(f"{y_name} must have {len(like)} tasks like {x_name}, got {got}")
    if not alone or not isinstance(x, Tensor) or y.shape[1:2] == x.shape[1:2]:
        return
    raise ValueError(
        f"{y_name} must have {x.shape[1]} samples a task like {x_name}, got {y.shape[1] if y.dim() > 1 else 'none'}; "
        f"if these are {len(y)} samples of one task, the axis of tasks is missing: {x_name}.unsqueeze(0), "
        f"{y_name}.unsqueeze(0)"
    )


def constant(x_name: str, x: Tree, y_name: str, y: Target | None) -> None:
    """The data of a fused call requires no grad."""
    for name, tree in ((x_name, x), (y_name, y)):
        for where, leaf in pytrees.named_leaves(name, tree):
            if isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{where} must not require grad on the fused path, got requires_grad=True; "
                    'backend="reference" takes it'
                )


def why_not_labels(of_classes: Iterable[Labels], sets: Iterable[tuple[str, Target]]) -> str:
    """The reason why a loss of the user's own is not served, or "": it may ignore labels that the core refuses.

    Args:
        sets: the name of the target and the target, of each set.
    """
    for name, y in sets:
        for leaf, classes, ignored in of_classes:
            labels = pytrees.tensors(y)[leaf]
            outside = (labels < 0) | (labels >= classes)
            if bool((outside if ignored is None else outside & (labels != ignored)).any()):
                return (
                    f"{name} holds labels outside of [0, {classes}), which a loss of yours may take and fused layers "
                    "do not"
                )
    return ""


def does_not_fit(x_name: str, x: Tree, like: Tensor, why: str) -> Exception:
    """The error for samples that the model does not take."""
    if not isinstance(x, Tensor):
        got = pytrees.mapped(lambda t: list(t.shape[1:]), x)
        return ValueError(f"{x_name} must be an input that the model takes, got tensors of shapes {got} a task: {why}")
    if not x.is_floating_point():
        return TypeError(
            f"{x_name} must have the model's dtype {like.dtype}, or one that the model takes, got {x.dtype}: {why}"
        )
    return ValueError(
        f"{x_name} must have samples that the model takes, got {list(x.shape[2:])}, {x.shape[1]} a task: {why}"
    )


def does_not_fit_loss(y_name: str, y: Target, why: str) -> Exception:
    """The error for a target that the user's own loss does not take with the model's prediction."""
    got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
    return ValueError(f"{y_name} must be a target that the loss takes with the model's prediction, got {got}: {why}")


def no_graph(method: str, **given: Any) -> None:
    """No tensor that a method is given requires grad, where its results are detached."""
    for name, tree in given.items():
        if torch.is_grad_enabled() and any(t.requires_grad for t in pytrees.tensors(tree)):
            raise ValueError(
                f"{name} must not require grad in {method}, whose results are detached, got requires_grad=True: detach "
                "it, or differentiate a loss of predict(fast, x), which has a graph"
            )


def same_tasks(x_spt: Tree, x_qry: Tree, sets: int = 1) -> None:
    """The two sets of an episode fit each other. sets: support sets of a task, which follow each other."""
    tasks, got = pytrees.tasks(x_spt) // sets, pytrees.tasks(x_qry)
    if got != tasks:
        raise ValueError(f"x_qry must have {tasks} tasks like x_spt, got {got}")


def other_samples(x_spt: Tree, x_qry: Tree, why: str) -> ValueError:
    """The error for a model that does not take the shapes of both sets."""
    expected, got = (pytrees.mapped(lambda t: list(t.shape[2:]), x) for x in (x_spt, x_qry))
    return ValueError(
        f"x_qry must have samples of shape {expected} like x_spt, or of another one that the model takes, got {got}: "
        f"{why}"
    )


def query_sample_weights(weights: Any, x_qry: Tensor, like: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor, got {type(weights).__name__}")
    if weights.shape != x_qry.shape[:2]:
        raise ValueError(
            f"weights must have shape {list(x_qry.shape[:2])}, one a query sample, got {list(weights.shape)}"
        )
    is_like("weights", weights, like)


def direction(parameters: Mapping[str, Tensor], v: Any) -> None:
    """One tensor of its shape for each trainable parameter."""
    if not isinstance(v, Mapping):
        raise TypeError(f"v must be a mapping from parameter names to tensors, got {type(v).__name__}")
    if v.keys() != parameters.keys():
        missing = ", ".join(n for n in parameters if n not in v)
        unknown = ", ".join(str(n) for n in v if n not in parameters)
        got = " and ".join(([f"none for {missing}"] if missing else []) + ([f"unknown {unknown}"] if unknown else []))
        raise ValueError(f"v must hold exactly the trainable parameters, got {got}")
    for name, p in parameters.items():
        t = v[name]
        if not isinstance(t, Tensor) or t.shape != p.shape:
            form = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"v[{name!r}] must have shape {list(p.shape)}, got {form}")
        if t.dtype != p.dtype or t.device != p.device:
            raise TypeError(f"v[{name!r}] must be {p.dtype} on {p.device}, got {t.dtype} on {t.device}")


def task_weights(weights: Any, tasks: int, like: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"task_weights must be a tensor, got {type(weights).__name__}")
    if tuple(weights.shape) != (tasks,):
        raise ValueError(f"task_weights must have shape [{tasks}], one a task, got {list(weights.shape)}")
    is_like("task_weights", weights, like)
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("task_weights must not require grad, got requires_grad=True")


def is_like(name: str, weights: Tensor, like: Tensor) -> None:
    if weights.dtype != like.dtype or weights.device != like.device:
        raise TypeError(
            f"{name} must be {like.dtype} on {like.device} like the model, got {weights.dtype} on {weights.device}"
        )


def target_values(name: str, y: Target, classes: int | None) -> None:
    """Labels or actions [tasks, samples] or [tasks, inner steps, samples] are in [0, classes), and weights have a
    positive sum. For paths where neither the core nor torch looks at them."""
    if not isinstance(y, Tensor):
        if y.weights is not None:
            sample_weights(f"{name}.weights", y.weights)
        name, y = f"{name}.actions", y.actions
    if classes is None:
        return
    wrong = ((y < 0) | (y >= classes)).nonzero()
    if len(wrong):
        what = "actions" if name.endswith(".actions") else "labels"
        raise ValueError(f"{name} must hold {what} in [0, {classes}), got {int(y[tuple(wrong[0])])} {_where(wrong[0])}")


def sample_weights(name: str, weights: Tensor) -> None:
    """Weights [tasks, samples] or [tasks, inner steps, samples] are at least 0, with a positive sum in each set."""
    wrong = (~(weights >= 0) | weights.isinf()).nonzero()
    if len(wrong):
        got = weights[tuple(wrong[0])].item()
        raise ValueError(f"{name} must be finite and at least 0, got {got} {_where(wrong[0])}")
    empty = (weights.sum(-1) == 0).nonzero()
    if len(empty):
        task, *step = empty[0].tolist()
        of = "".join(f", inner step {k}" for k in step)
        raise ValueError(
            f"{name} must have a positive sum in every {'set' if step else 'task'}, got 0 in task {task}{of}"
        )


def _where(index: Tensor) -> str:
    task, *step, sample = index.tolist()
    return f"(task {task}{''.join(f', inner step {k}' for k in step)}, sample {sample})"


def weights_in_order(name: str, weights: Tensor, x: Tensor, looks: bool) -> None:
    """The weights of an op: those of padding, 0, stand behind the others. looks: at the values."""
    if weights.shape != x.shape[:2]:
        raise ValueError(f"{name} must have shape {list(x.shape[:2])}, one a sample, got {list(weights.shape)}")
    if not looks:
        return
    sample_weights(name, weights)
    wrong = ((weights[:, :-1] == 0) & (weights[:, 1:] > 0)).nonzero()
    if len(wrong):
        raise ValueError(f"{name} must be positive first and then 0 in each task, got a 0 before in task {wrong[0, 0]}")


def prediction(loss: str, value: Any) -> None:
    """What the model returns is what the loss takes."""
    if loss == "gaussian_policy_gradient":
        form = isinstance(value, tuple) and len(value) == 2 and all(isinstance(t, Tensor) for t in value)
        if not form:
            raise ValueError(f"the model must return (mean, log_std) for {loss}, got {_described(value)}")
        mean, log_std = value
        if mean.dim() != 2 or tuple(log_std.shape) not in (tuple(mean.shape), tuple(mean.shape[1:])):
            raise ValueError(
                f"the model must return mean [n, action] and log_std [action] or [n, action] for {loss}, "
                f"got {list(mean.shape)} and {list(log_std.shape)}"
            )
    elif not isinstance(value, Tensor):
        raise ValueError(
            f"the model must return one tensor for {loss}, got {_described(value)}; (mean, log_std) goes with "
            "gaussian_policy_gradient"
        )
    elif value.is_complex():
        raise TypeError(f"the model must return real numbers for {loss}, got {value.dtype}")
    elif loss in OF_CLASSES and value.dim() != 2:
        raise ValueError(f"the model must return logits [n, classes] for {loss}, got {list(value.shape)}")


def returns_policy(loss: str, pair: bool) -> None:
    """The same, where it is only known whether the model returns (mean, log_std) or one tensor."""
    if pair != (loss == "gaussian_policy_gradient"):
        prediction(loss, (None, None) if pair else torch.empty(0))


def _described(value: Any) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__


def target(name: str, loss: str, y: Target, shape: tuple[int, ...]) -> None:
    """The target has exactly the shape of a task's prediction (or mean), samples first: nothing broadcasts."""
    if isinstance(y, PolicyTarget):
        name, y = f"{name}.actions", y.actions
    if loss in OF_CLASSES:
        if y.shape[1] != shape[0]:
            raise ValueError(
                f"{name} must have {shape[0]} samples a task like the prediction for {loss}, got {y.shape[1]}"
            )
    elif tuple(y.shape[1:]) != shape:
        expected = [len(y), *shape]
        what = "prediction" if loss == "mse" else "mean"
        raise ValueError(f"{name} must have the {what}'s shape {expected} for {loss}, got {list(y.shape)}")


def target_dtypes(name: str, loss: str, y: Sequence[Tensor | None], dtype: torch.dtype) -> None:
    """The tensors of an op's target are int64 where they are classes, otherwise of the dtype of x: the core reads their
    memory as such."""
    of_policy = loss in POLICY_LOSSES
    for i, t in enumerate(y):
        expected = torch.int64 if i == 0 and loss in OF_CLASSES else dtype
        if t is not None and t.dtype != expected:
            what = f"{name}.{PolicyTarget._fields[i]}" if of_policy else name
            like = "" if expected == torch.int64 else " like x"
            raise TypeError(f"{what} must be {expected}{like} for {loss}, got {t.dtype}")


def fast(parameters: Mapping[str, Tensor], given: Any, tasks: int, what: str, all_names: bool) -> None:
    """Per-task tensors by name: [tasks, *shape] of each parameter."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a mapping from parameter names to tensors, got {type(given).__name__}")
    unknown = [name for name in given if name not in parameters]
    missing = [name for name in parameters if name not in given] if all_names else []
    if unknown or missing:
        raise ValueError(
            f"{what} must hold {'exactly' if all_names else 'only'} the model's parameters, got "
            + " and ".join(
                ([f"unknown {', '.join(map(str, unknown))}"] if unknown else [])
                + ([f"none for {', '.join(missing)}"] if missing else [])
            )
        )
    for name, value in given.items():
        p = parameters[name]
        if not isinstance(value, Tensor) or tuple(value.shape) != (tasks, *p.shape):
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if all_names and isinstance(value, Tensor) and value.dim() == p.dim() + 1 and value.shape[1:] == p.shape:
                raise ValueError(
                    f"x must have {len(value)} tasks like {what}, got {tasks}; samples of one task are x.unsqueeze(0)"
                )
            raise ValueError(f"{what}[{name!r}] must have shape {[tasks, *p.shape]}, got {got}")
        if value.dtype != p.dtype or value.device != p.device:
            raise TypeError(f"{what}[{name!r}] must be {p.dtype} on {p.device}, got {value.dtype} on {value.device}")
