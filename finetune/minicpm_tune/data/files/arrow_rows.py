"""Rows of Parquet files and of data sets saved by Hugging Face datasets.

Both are read through Arrow's memory-mapped form, which gives single rows without decoding their neighbours.
A data set on disk has that form already; a Parquet file is converted once into the cache folder.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from minicpm_tune.data.files.index_cache import cached, replacing
from minicpm_tune.data.files.json_rows import JoinedRows, Rows
from minicpm_tune.errors import DataError

_ROWS_PER_BATCH = 256
_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev)\b|(train|test|validation|valid|val|dev)[-_]")


class ArrowRows:
    """The rows of one memory-mapped Arrow file.

    Args:
        path: What to call it in messages.
        arrow_path: The Arrow file.
        read_batches: Opens it and gives its record batches.
    """

    def __init__(self, path: Path, arrow_path: Path, read_batches: Callable[[Path], Sequence[Any]]) -> None:
        self.path = path
        self.files: Sequence[Path] = [path] if path.is_file() else [arrow_path]
        self._arrow_path = arrow_path
        self._read_batches = read_batches
        self._owner = 0
        self._batches: Sequence[Any] = []
        self._open()
        self._ends = [*accumulate(int(part.num_rows) for part in self._batches)]

    def _open(self) -> None:
        self._batches = self._read_batches(self._arrow_path)
        self._owner = os.getpid()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._owner != os.getpid():
            self._open()
        number = bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        return self._batches[number].slice(index - start, 1).to_pylist()[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": (), "_owner": 0}


def open_parquet(path: Path) -> Rows:
    """Open a Parquet file.

    Raises:
        DataError: When it is missing or no Parquet file.
    """
    arrow = _arrow()
    if not path.is_file():
        raise DataError(
            f"--data_path {path}: no such file, expected rows. Fix the path (looked at {path.absolute()})."
        )
    converted = cached(path, ".arrow")
    if not converted.is_file():
        try:
            source = arrow.parquet.ParquetFile(path)
            with replacing(converted) as file, arrow.ipc.new_file(file, source.schema_arrow) as writer:
                for batch in source.iter_batches(batch_size=_ROWS_PER_BATCH):
                    writer.write_batch(batch)
        except (arrow.ArrowException, OSError) as error:
            raise DataError(
                f"--data_path {path}: not readable as Parquet ({error}). Write the file again."
            ) from error
    return ArrowRows(path, converted, _file_batches)


def open_folder(path: Path) -> Rows:
    """Open a data set saved by Hugging Face datasets, or a folder of Parquet files.

    Raises:
        DataError: When it holds neither, or several splits.
    """
    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        _check_one_split(path, names)
        return open_folder(path / names[0])
    state = path / "state.json"
    if state.is_file():
        files = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        _arrow()
        parts = [ArrowRows(path, path / entry["filename"], _stream_batches) for entry in files]
        return JoinedRows(path / "state.json", parts)
    found = sorted(path.rglob("*.parquet"))
    if not found:
        raise DataError(
            f"--data_path {path}: the folder holds no Parquet files and no data set saved by "
            "datasets.save_to_disk, "
            "expected one of the two. Give the path of the data file itself."
        )
    matches = {(_SPLIT_NAME.match(file.name) or _SPLIT_NAME.match(file.parent.name)) for file in found}
    _check_one_split(path, sorted({match.group().rstrip("-_") for match in matches if match}))
    return JoinedRows(path / "data.parquet", [open_parquet(file) for file in found])


def _check_one_split(path: Path, names: Sequence[str]) -> None:
    if len(names) > 1:
        raise DataError(
            f"--data_path {path}: the folder holds the splits {', '.join(names)}, expected one, since "
            "training on "
            f"test rows would go unseen. Give {path / names[0]}, or a pattern such as "
            f"{path / (names[0] + '-*.parquet')}."
        )


def _file_batches(path: Path) -> Sequence[Any]:
    arrow = _arrow()
    reader = arrow.ipc.open_file(arrow.memory_map(str(path)))
    return [reader.get_batch(index) for index in range(reader.num_record_batches)]


def _stream_batches(path: Path) -> Sequence[Any]:
    arrow = _arrow()
    try:
        return arrow.ipc.open_stream(arrow.memory_map(str(path))).read_all().to_batches()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            f"--data_path {path}: not readable as Arrow ({error}). Save the data set again."
        ) from error


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "--data_path: Parquet files and saved data sets need the package 'pyarrow', which is not "
            "installed. Run: "
            "pip install pyarrow"
        ) from error
    return pyarrow
