"""The tensors that every sampler of tasks returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

WHOLE = slice(None)  # all tasks of a draw
TORCHMETA_KEYS = (("train", "test"), ("support", "query"))  # of a batch, as its ClassSplitter is told


class MetaBatch(NamedTuple):
    """One meta-batch of tasks, in the order of FusedMAML's arguments: ``maml(*batch)``.

    Attributes:
        x_spt: support inputs ``[tasks, n_support, ...]``.
        y_spt: support labels, int64 ``[tasks, n_support]``, or targets, float ``[tasks, n_support, ...]``.
        x_qry: query inputs ``[tasks, n_query, ...]``.
        y_qry: query labels or targets, like ``y_spt``.
    """

    x_spt: Tensor
    y_spt: Tensor
    x_qry: Tensor
    y_qry: Tensor

    @classmethod
    def from_torchmeta(cls, batch: Mapping[str, Any]) -> MetaBatch:
        """A batch of torchmeta's ``BatchMetaDataLoader``: ``maml(*MetaBatch.from_torchmeta(batch))``.

        Args:
            batch: a dict with ``train`` and ``test``, or ``support`` and ``query``, each a pair (inputs ``[tasks, n,
                ...]``, targets ``[tasks, n]`` or ``[tasks, n, ...]``). Other entries are left out.

        Returns:
            The same tensors.

        Raises:
            TypeError: ``batch`` is no dict, or an entry no pair of tensors.
            ValueError: ``batch`` lacks an entry, or shapes do not fit.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch must be a dict of train and test, got {type(batch).__name__}")
        keys = next((keys for keys in TORCHMETA_KEYS if all(key in batch for key in keys)), None)
        if keys is None:
            got = ", ".join(map(str, batch)) or "none"
            raise ValueError(f"batch must have the entries train and test, or support and query, got {got}")
        made = cls(*_pair(keys[0], batch[keys[0]]), *_pair(keys[1], batch[keys[1]]))
        if len(made.x_spt) != len(made.x_qry):
            raise ValueError(
                f"{keys[0]} and {keys[1]} must have as many tasks, got {len(made.x_spt)} and {len(made.x_qry)}"
            )
        return made


def _pair(key: str, entry: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(entry, (tuple, list)) or len(entry) != 2 or not all(isinstance(t, Tensor) for t in entry):
        got = [type(t).__name__ for t in entry] if isinstance(entry, (tuple, list)) else type(entry).__name__
        raise TypeError(f"{key} must be two tensors, inputs and targets, got {got}")
    inputs, targets = entry
    if inputs.dim() < 2 or targets.dim() < 2 or inputs.shape[:2] != targets.shape[:2]:
        raise ValueError(
            f"{key} must be inputs [tasks, n, ...] and targets [tasks, n, ...], got {list(inputs.shape)} and "
            f"{list(targets.shape)}"
        )
    return inputs, targets
