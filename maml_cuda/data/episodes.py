"""Few-shot episodes, drawn and normalised on the device that holds the images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maml_cuda import _core
from maml_cuda.data.meta_batch import MetaBatch
from maml_cuda.engine import cuda_runner as devices


class Episodes:
    """N-way K-shot tasks from a uint8 tensor of images.

    An episode depends only on the seed and its number (Philox4x32-10, Salmon et al. 2011): it has the same bits on a
    CPU and on a GPU, and for any number of episodes per draw. Classes are drawn without replacement within an episode,
    and samples without replacement within a class.

        episodes = Episodes(images, n_way=5, k_shot=1, n_query=15, mean=0.5, std=0.25).to("cuda")
        for step in range(1000):
            out = maml(*episodes.draw(4, seed=0, first=4 * step))

    Args:
        images: uint8 ``[classes, samples, channels, height, width]`` or ``[classes, samples, height, width]``.
        n_way: classes per episode.
        k_shot: support images per class.
        n_query: query images per class.
        mean: subtracted from a pixel in [0, 1]: the result is ``(pixel / 255 - mean) / std``. A number, or one per
            channel.
        std: divides a pixel, see ``mean``. A number, or one per channel.
        rotations: 1 to 4. Each class becomes this many classes, rotated by 0, 1, ... quarter turns. More than 1 needs
            square images.
        dtype: of the episodes' images, float32 or float64.

    Raises:
        TypeError: ``images`` is not a uint8 tensor, or ``dtype`` is not float32 or float64.
        ValueError: a shape, a number or the device does not fit.
    """

    def __init__(
        self,
        images: Tensor,
        n_way: int,
        k_shot: int,
        n_query: int,
        *,
        mean: float | Sequence[float] | Tensor = 0.0,
        std: float | Sequence[float] | Tensor = 1.0,
        rotations: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check(images, n_way, k_shot, n_query, rotations, dtype)
        self.images = (images.unsqueeze(2) if images.dim() == 4 else images).contiguous()
        channels = self.images.shape[2]
        if not _numbers("std", std, channels).all():
            raise ValueError(f"std must not be 0, got {std}")
        pixel = torch.arange(256, dtype=torch.float64, device="cpu") / 255
        values = (pixel - _numbers("mean", mean, channels)) / _numbers("std", std, channels)
        self.values = values.to(images.device, dtype)  # [channels, 256]: the normalised value of each pixel value
        self.n_way, self.k_shot, self.n_query = n_way, k_shot, n_query
        self.rotations = rotations

    @property
    def device(self) -> torch.device:
        """The device of the images and of the episodes."""
        return self.images.device

    def to(self, device: torch.device | str) -> Episodes:
        """A copy with its images on another device.

        Args:
            device: a CPU, or a GPU that maml_cuda has kernels for.

        Raises:
            ValueError: maml_cuda has no kernels for the device.
        """
        if why_not := devices.why_not(torch.device(device)):
            raise ValueError(f"episodes cannot be drawn on {device}: {why_not}")
        moved = copy.copy(self)
        moved.images, moved.values = self.images.to(device), self.values.to(device)
        return moved

    def draw(self, num_tasks: int, seed: int, first: int = 0) -> MetaBatch:
        """Draws the episodes ``first`` to ``first + num_tasks - 1`` of a seed.

        Args:
            num_tasks: the number of episodes, at least 1.
            seed: 0 to 2**63 - 1.
            first: the number of the first episode, at least 0.

        Returns:
            x ``[num_tasks, n_way * images per class, channels, height, width]``, class by class, and int64 labels y
                ``[num_tasks, n_way * images per class]``. Labels number the classes of an episode in the random order
                in which they were drawn.

        Raises:
            ValueError: an argument is out of range.
        """
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be 0 to 2**63 - 1, got {seed}")
        if not 0 <= first < 2**63 - num_tasks:
            raise ValueError(f"first must be at least 0, and first + num_tasks less than 2**63, got first {first}")
        return MetaBatch(
            *torch.ops.maml_cuda.episodes(
                self.images, self.values, self.n_way, self.k_shot, self.n_query, self.rotations, num_tasks, seed, first
            )
        )


def _check(images: Any, n_way: int, k_shot: int, n_query: int, rotations: int, dtype: torch.dtype) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.dim() not in (4, 5) or images.numel() == 0:
        raise ValueError(
            "images must have shape [classes, samples, channels, height, width] or [classes, samples, height, width], "
            f"no axis of length 0, got {list(images.shape)}"
        )
    if why_not := devices.why_not(images.device):
        raise ValueError(f"episodes cannot be drawn on {images.device}: {why_not}")
    if not 1 <= rotations <= 4:
        raise ValueError(f"rotations must be 1 to 4 quarter turns, got {rotations}")
    height, width = images.shape[-2:]
    if rotations > 1 and height != width:
        raise ValueError(f"rotations must be 1 where images are not square, got {rotations} of {height} x {width}")
    classes = images.shape[0] * rotations
    if not 2 <= n_way <= classes:
        raise ValueError(f"n_way must be 2 to {classes}, the number of classes, got {n_way}")
    if k_shot < 1 or n_query < 1 or k_shot + n_query > images.shape[1]:
        raise ValueError(
            f"k_shot + n_query must be at most {images.shape[1]}, the samples of a class, each at least 1, "
            f"got k_shot {k_shot} and n_query {n_query}"
        )
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")


def _numbers(name: str, value: float | Sequence[float] | Tensor, channels: int) -> Tensor:
    """``value`` as float64 ``[channels, 1]`` on the CPU."""
    numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    if numbers.dim() and numbers.shape != (channels,):
        raise ValueError(f"{name} must be a number or {channels} numbers, one per channel, got {value}")
    if not numbers.isfinite().all():
        raise ValueError(f"{name} must be finite, got {value}")
    return numbers.expand(channels).unsqueeze(1)


# -- the op --------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("maml_cuda", "FRAGMENT")
_LIBRARY.define(
    "episodes(Tensor images, Tensor values, int n_way, int k_shot, int n_query, int rotations, SymInt tasks, "
    "SymInt seed, SymInt first) -> (Tensor x_spt, Tensor y_spt, Tensor x_qry, Tensor y_qry)"
)


def _episodes(
    images: Tensor, values: Tensor, n_way: int, k_shot: int, n_query: int, rotations: int, tasks: int, seed: int,
    first: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    data = _episodes_fake(images, values, n_way, k_shot, n_query, rotations, tasks, seed, first)
    episodes = _core.Episodes(
        images=images.data_ptr(),
        values=values.data_ptr(),
        double=values.dtype == torch.float64,
        shape=images.shape,
        rotations=rotations,
        n_way=n_way,
        k_shot=k_shot,
        n_query=n_query,
        seed=seed,
        first=first,
        tasks=tasks,
        data=[t.data_ptr() for t in data],
    )
    if devices.backend_of(images.device) == "cuda":
        episodes.enqueue(images.device.index or 0, devices.stream_of(images.device))
    else:
        episodes.draw(torch.get_num_threads())
    return data


def _episodes_fake(
    images: Tensor, values: Tensor, n_way: int, k_shot: int, n_query: int, rotations: int, tasks: int, seed: int,
    first: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    data: list[Tensor] = []
    for n in (k_shot, n_query):
        data.append(values.new_empty((tasks, n_way * n, *images.shape[2:])))
        data.append(values.new_empty((tasks, n_way * n), dtype=torch.int64))
    return tuple(data)


_LIBRARY.impl("episodes", _episodes, "CPU")
_LIBRARY.impl("episodes", _episodes, "CUDA")
_LIBRARY.impl("episodes", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("maml_cuda::episodes", _episodes_fake, lib=_LIBRARY)
