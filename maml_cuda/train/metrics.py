"""metrics.csv: a row stands there whole or not at all, whatever becomes of the process and of the disk."""

import os
from collections.abc import Sequence
from pathlib import Path

from maml_cuda.train.checkpoint import with_path, write_file


class Metrics:
    """The rows of a run, each of an iteration; a context in which rows are added."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = columns  # "iteration" first

    def start(self) -> None:
        """An empty table."""
        write_file(self.path, (",".join(self.columns) + "\n").encode())

    def remove_after(self, iteration: int) -> None:
        """Removes the rows after ``iteration``, and what a crash has cut short. ValueError where they are no rows."""
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
        """OSError, which names the file and leaves it as it was, where the row cannot be written."""
        cells = [f"{row[column]:.6g}" if column in row else "" for column in self.columns[1:]]
        line = (",".join([str(iteration), *cells]) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            while line:  # a disk that is nearly full takes a part, and refuses the rest
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(size)
            raise with_path(error, self.path) from None

    def sync(self) -> None:
        """To the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise with_path(error, self.path) from None
