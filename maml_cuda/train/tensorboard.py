"""Curves for TensorBoard: the numbers of metrics.csv, in event files in the run's folder ``tensorboard``."""

from __future__ import annotations

from pathlib import Path

FOLDER = "tensorboard"


class TensorBoard:
    """The event files of a run, open inside its context. A tag is a column of metrics.csv.

    A resumed run begins a new file, whose first event says from which iteration on earlier files no longer count, so
    that TensorBoard shows no point twice.

    Args:
        run: the run's folder.
        done: the iterations done.
    """

    def __init__(self, run: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / FOLDER), purge_step=done + 1)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def add(self, iteration: int, row: dict[str, float]) -> None:
        """Adds a point to each curve that the row has a value of."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, iteration)

    def sync(self) -> None:
        """Writes all points to the files, before a checkpoint that relies on them."""
        self._writer.flush()
