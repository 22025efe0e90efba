"""``metrics.csv``: each row is written completely or not at all, even if the process is killed or the disk is full."""

import os
from collections.abc import Sequence
from pathlib import Path

from maml_cuda.train.checkpoint import with_path, write_file


class Metrics:
    """The rows of a run, one for each logged iteration. Rows are added inside its context."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = columns  # "iteration" first

    def start(self) -> None:
        """Writes an empty table."""
        write_file(self.path, (",".join(self.columns) + "\n").encode())

    def remove_after(self, iteration: int) -> None:
        """Removes the rows after ``iteration``, and a row that a crash has truncated.

        Raises:
            ValueError: a row does not begin with an iteration.
        """
        head, *lines = self.path.read_bytes().splitlines(keepends=True) or [b""]
        try:
            rows = [line for line in lines if line.endswith(b"\n") and int(line.split(b",")[0]) <= iteration]
        except ValueError as error:
            raise ValueError(f"{self.path} must have rows that begin with an iteration: {error}") from None
        write_file(self.path, b"".join([head, *rows]))

    def __enter__(self) -> "Metrics":
        self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, iteration: int, row: dict[str, float]) -> None:
        """Appends a row.

        Raises:
            OSError: it cannot be written; the error names the file, which stays as it was.
        """
        cells = [f"{row[column]:.6g}" if column in row else "" for column in self.columns[1:]]
        line = (",".join([str(iteration), *cells]) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            while line:  # a disk that is nearly full accepts only part of a write
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(size)
            raise with_path(error, self.path) from None

    def sync(self) -> None:
        """Writes the rows to the disk (fsync).

        Raises:
            OSError: they cannot be written; the error names the file.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise with_path(error, self.path) from None
