"""The checks of the arguments of FusedMAML, the same for all backends. An error says what is wrong, what is expected
and what was given, before anything is computed. data_checks.py checks the data of a call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from maml_cuda import batch_norm
from maml_cuda.engine import cuda_runner
from maml_cuda.losses import LOSSES
from maml_cuda.optim import Groups, Optimizer
from maml_cuda.targets import POLICY_LOSSES

BACKENDS = ("auto", "fused", "reference")
PRECISIONS = ("float32", "bf16x3", "tf32", "bfloat16")


def constructor(
    model: Any, inner_steps: Any, loss: Any, first_order: Any, adapt_params: Any, backend: Any, precision: Any
) -> None:
    """The arguments of FusedMAML, but for the rates."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    steps(inner_steps, "inner_steps")
    _loss(loss)
    if not isinstance(first_order, bool):
        raise TypeError(f"first_order must be a bool, got {type(first_order).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    parameters = dict(model.named_parameters())
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError("model must have parameters that require grad, got none")
    on = next(iter(parameters.values())).device
    if precision != "float32" and not cuda_runner.has_precisions(on):
        raise ValueError(f"precision must be float32 on the CPU, got {precision!r}, which this device lacks")
    _adapt_params(parameters, adapt_params)


def on_device(cuda_graphs: Any, task_chunk: Any, check_labels: Any) -> None:
    """The arguments of FusedMAML that say how a GPU is used."""
    for name, value in (("cuda_graphs", cuda_graphs), ("check_labels", check_labels)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    if task_chunk is None:
        return
    if isinstance(task_chunk, bool) or not isinstance(task_chunk, int):
        raise TypeError(f"task_chunk must be an int or None, got {type(task_chunk).__name__}")
    if task_chunk < 1:
        raise ValueError(f"task_chunk must be at least 1, got {task_chunk}")


def checkpoint(value: Any) -> None:
    if value not in (None, "recompute", "sqrt"):
        raise ValueError(f'checkpoint must be None, "recompute" or "sqrt", got {value!r}')


def per_step_support(value: Any, steps: int) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"per_step_support must be a bool, got {type(value).__name__}")
    if value and steps == 0:
        raise ValueError("inner_steps must be at least 1 with per_step_support=True, got 0")


def support_batch(value: Any, per_step_support: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"support_batch must be an int or None, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"support_batch must be at least 1, got {value}")
    if per_step_support:
        raise ValueError(
            f"support_batch must be None with per_step_support=True, which gives each step its set, got {value}"
        )


def loss(value: Any) -> None:
    if isinstance(value, str):
        if value not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)} or a callable, got {value!r}")
    elif not callable(value):
        raise TypeError(f"loss must be a name or a callable (prediction, target) -> scalar, got {type(value).__name__}")
    elif isinstance(value, type):
        raise TypeError(
            f"loss must be a callable (prediction, target) -> scalar, got the class {value.__name__}: an "
            f"instance is meant, {value.__name__}()"
        )


_loss = loss  # for the function whose argument has this name


def _adapt_params(parameters: Mapping[str, Tensor], adapt_params: Any) -> None:
    if adapt_params is None:
        return
    if callable(adapt_params):
        if not any(p.requires_grad and adapt_params(name) for name, p in parameters.items()):
            raise ValueError(
                f"adapt_params must choose at least one trainable parameter of {', '.join(parameters)}; it chose none"
            )
        return
    if isinstance(adapt_params, str) or not isinstance(adapt_params, Iterable):
        raise TypeError(
            f"adapt_params must be a callable on names or a list of names, got {type(adapt_params).__name__}"
        )
    names = list(adapt_params)
    unknown = [name for name in names if name not in parameters]
    if unknown or not names:
        got = ", ".join(map(str, unknown)) if unknown else "an empty list"
        raise ValueError(f"adapt_params must name parameters of the model ({', '.join(parameters)}), got {got}")
    frozen = [name for name in names if not parameters[name].requires_grad]
    if frozen:
        raise ValueError(f"adapt_params must name parameters that require grad, got frozen {', '.join(frozen)}")


def query_weights(value: Any, steps: int) -> tuple[float, ...] | None:
    """The weights of the query losses at phi_0 .. phi_steps, as numbers."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError("query_weights must not require grad, got requires_grad=True")
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"query_weights must be a tensor or a sequence of numbers, got {type(value).__name__}")
    value = list(value)
    wrong = [w for w in value if isinstance(w, bool) or not isinstance(w, (int, float))]
    if wrong:
        raise TypeError(f"query_weights must hold numbers, got {type(wrong[0]).__name__}")
    if len(value) != steps + 1:
        raise ValueError(
            f"query_weights must hold {steps + 1} weights, of phi_0 to phi_{steps} (inner_steps={steps}), "
            f"got {len(value)}"
        )
    if not all(math.isfinite(w) and w >= 0 for w in value) or not any(value):
        raise ValueError(f"query_weights must be finite, at least 0 and not all 0, got {value}")
    return tuple(float(w) for w in value)


def adapted(names: Iterable[str], parameters: Mapping[str, Tensor]) -> None:
    """At least one parameter is adapted; parameters may have been frozen since the constructor ran."""
    if not list(names):
        trainable = ", ".join(name for name, p in parameters.items() if p.requires_grad) or "none"
        raise ValueError(
            f"adapt_params must choose at least one trainable parameter, got none (trainable: {trainable})"
        )


def rates(tensors: Iterable[tuple[str, Tensor]], like: Tensor) -> None:
    """Inner rates are on the model's device."""
    for name, rate in tensors:
        if rate.device != like.device:
            raise ValueError(f"{name} must be on the model's device {like.device}, got {rate.device}")


def inner_update(optimizer: Any, clip_norm: Any, clip_value: Any, transform: Any, adapted: Iterable[Tensor]) -> None:
    """The arguments that say what an inner step does with the gradient.

    adapted: the parameters that the inner loop changes.
    """
    if optimizer is not None and not isinstance(optimizer, (Optimizer, Groups)):
        got = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(f"inner_optimizer must be one of maml_cuda.optim, such as maml_cuda.optim.Adam(), got {got}")
    for name, value in (("inner_clip_norm", clip_norm), ("inner_clip_value", clip_value)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number or None, got {type(value).__name__}")
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be finite and above 0, got {value}")
    if clip_value is not None and any(p.is_complex() for p in adapted):
        raise ValueError(f"inner_clip_value must be None for complex parameters, got {clip_value}")
    if transform is not None and (isinstance(transform, type) or not callable(transform)):
        got = f"the class {transform.__name__}" if isinstance(transform, type) else type(transform).__name__
        raise TypeError(
            f"inner_transform must be a function or nn.Module (dict name -> gradient) -> such a dict, got {got}"
        )


def not_adapted(names: Iterable[str], stepwise: Iterable[str]) -> None:
    """No parameter with a slot for each inner step is adapted."""
    adapted = [name for name in names if name in set(stepwise)]
    if adapted:
        raise ValueError(
            "adapt_params must leave out the parameters of per-step BatchNorm layers, of which each step has its own, "
            f"got {', '.join(adapted)}"
        )


def slot(value: Any) -> int:
    """The inner step whose slot of the per-step layers is read."""
    if value is None:
        return batch_norm.LAST
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"slot must be an int or None, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"slot must be at least 0, got {value}")
    return value


def steps(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{what} must be at least 0, got {value}")


def one_dtype_and_device(parameters: Iterable[Tensor]) -> None:
    """All parameters are on one device, and the trainable ones have one dtype (a complex one that of its parts)."""
    parameters = list(parameters)
    devices = {p.device for p in parameters}
    trainable = [p for p in parameters if p.requires_grad]
    if len(devices) > 1 or len({p.dtype.to_real() for p in trainable}) > 1:
        raise ValueError(
            "the model's trainable parameters must have one dtype, and all must stand on one device, got "
            + ", ".join(sorted({f"{p.dtype} on {p.device}" for p in (trainable if len(devices) == 1 else parameters)}))
        )


def policy_loss(loss: Any, what: str) -> None:
    if loss not in POLICY_LOSSES:
        got = repr(loss) if isinstance(loss, str) else "a callable"
        raise ValueError(f"{what} must have a loss of {' or '.join(POLICY_LOSSES)}, got {got}")


def tolerance(value: float, what: str) -> None:
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{what} must be a positive number, got {value}")
