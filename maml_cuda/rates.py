"""Inner learning rates and other hyperparameters of the inner loop: every form that the argument `inner_lr` accepts
becomes one `Rate` for each parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rate:
    """The inner learning rate (alpha) of one parameter, or another hyperparameter of its optimizer.

    Attributes:
        value: a number, or a tensor of the shape that the two flags say.
        per_step: the first axis of `value` counts inner steps.
        elementwise: the other axes have the parameter's shape (Meta-SGD; Li, Zhou, Chen, Li 2017). Otherwise there are
            no other axes.
    """

    value: float | Tensor
    per_step: bool = False
    elementwise: bool = False

    def at(self, step: int) -> float | Tensor:
        """The rate of inner step `step`, from 0. Steps beyond the last rate use the last one."""
        if isinstance(self.value, Tensor) and self.per_step:
            return self.value[min(step, len(self.value) - 1)]
        return self.value


class InnerRates(nn.Module):
    """A dict parameter name -> rate, as a module.

    The tensors among the rates are parameters or buffers of the module. In `state_dict` each has the name of the
    parameter whose rate it is. Names contain dots, so submodules are made for the parts of a name.
    """

    def __init__(self, rates: Mapping[str, float | Tensor]) -> None:
        super().__init__()
        self._rate_names = tuple(rates)
        self._constants = {name: float(r) for name, r in rates.items() if not isinstance(r, Tensor)}
        for name, rate in rates.items():
            if isinstance(rate, Tensor):
                *path, leaf = name.split(".")
                module: nn.Module = self
                for part in path:
                    if part not in module._modules:
                        module.add_module(part, nn.Module())
                    module = module._modules[part]  # type: ignore[assignment]
                _register(module, leaf, rate)

    def __getitem__(self, name: str) -> float | Tensor:
        if name in self._constants:
            return self._constants[name]
        *path, leaf = name.split(".")
        module: nn.Module = self
        for part in path:
            module = module._modules[part]  # type: ignore[assignment]
        rate = module._parameters.get(leaf)
        return module._buffers[leaf] if rate is None else rate  # type: ignore[return-value]

    def items(self) -> list[tuple[str, float | Tensor]]:
        return [(name, self[name]) for name in self._rate_names]


def _register(module: nn.Module, name: str, rate: Tensor) -> None:
    if isinstance(rate, nn.Parameter):
        module.register_parameter(name, rate)
    else:
        module.register_buffer(name, rate)


Value = float | Tensor | Mapping[str, float | Tensor]  # the forms of inner_lr
Held = float | Tensor | InnerRates  # as a module holds them


def hold(owner: nn.Module, name: str, value: Value) -> None:
    """Sets an attribute of `owner`: a number as a float, a tensor as a parameter or buffer, a dict as InnerRates."""
    if isinstance(value, Tensor):
        _register(owner, name, value)
    elif isinstance(value, Mapping):
        setattr(owner, name, InnerRates(value))
    else:
        setattr(owner, name, float(value))


def tensors(value: Value | Held, what: str = "inner_lr") -> list[tuple[str, Tensor]]:
    """The rates that are tensors, each with its name for error messages."""
    if isinstance(value, (Mapping, InnerRates)):
        return [(f"{what}[{name!r}]", rate) for name, rate in value.items() if isinstance(rate, Tensor)]
    return [(what, value)] if isinstance(value, Tensor) else []


def read_rates(
    value: Value | Held, adapted: Mapping[str, torch.Size], steps: int, what: str = "inner_lr"
) -> dict[str, Rate]:
    """Reads `inner_lr`, or another hyperparameter, as one Rate for each adapted parameter.

    Args:
        value: a float or 0-d tensor; a tensor [steps]; or a dict whose keys are exactly the adapted names. Each of
            its values is a float or a tensor of shape [], [steps], the parameter's shape, or [steps, *shape].
        adapted: name -> shape of the parameters that the inner loop changes.
        steps: number of inner steps.
        what: the argument's name in errors.

    Raises:
        ValueError: a name is missing or extra; a shape fits none of the forms, or two of them; a rate is not finite.
        TypeError: a rate is neither a number nor a floating-point tensor.
    """
    if isinstance(value, (Mapping, InnerRates)):
        given = dict(value.items())
        missing = [name for name in adapted if name not in given]
        extra = [name for name in given if name not in adapted]
        if missing or extra:
            raise ValueError(
                f"{what} must have exactly the adapted parameters as keys, got "
                + " and ".join(
                    ([f"none for {', '.join(missing)}"] if missing else [])
                    + ([f"{', '.join(map(str, extra))}, which are not adapted"] if extra else [])
                )
            )
        return {name: _read(f"{what}[{name!r}]", given[name], shape, steps) for name, shape in adapted.items()}
    rate = _read(what, value, None, steps)
    return dict.fromkeys(adapted, rate)


def _read(what: str, rate: object, shape: torch.Size | None, steps: int) -> Rate:
    if isinstance(rate, Tensor):
        if not rate.is_floating_point():
            raise TypeError(f"{what} must be a floating-point tensor, got {rate.dtype}")
        if not bool(torch.isfinite(rate.detach()).all()):
            raise ValueError(f"{what} must be finite, got {rate.detach().flatten().tolist()[:8]}")
        return _read_shape(what, rate, shape, steps)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"{what} must be a float or a tensor, got {type(rate).__name__}")
    if not math.isfinite(rate):
        raise ValueError(f"{what} must be finite, got {rate}")
    return Rate(float(rate))


def _read_shape(what: str, rate: Tensor, shape: torch.Size | None, steps: int) -> Rate:
    if rate.dim() == 0:
        return Rate(rate)
    readings = []
    if tuple(rate.shape) == (steps,):
        readings.append(Rate(rate, per_step=True))
    if shape is not None:
        if rate.shape == shape:
            readings.append(Rate(rate, elementwise=True))
        if len(shape) > 0 and tuple(rate.shape) == (steps, *shape):
            readings.append(Rate(rate, per_step=True, elementwise=True))
    if len(readings) == 1:
        return readings[0]
    forms = f"[] or [{steps}] (inner_steps)"
    if shape is not None:
        forms = f"[], [{steps}] (inner_steps), {list(shape)} or {[steps, *shape]}"
    if not readings:
        raise ValueError(f"{what} must have shape {forms}, got {list(rate.shape)}")
    raise ValueError(
        f"{what} of shape {list(rate.shape)} is ambiguous: it can be one rate for each step (inner_steps={steps}) or "
        f"one for each element of the parameter {list(shape or ())}; give it as {[steps, *(shape or ())]}"
    )
