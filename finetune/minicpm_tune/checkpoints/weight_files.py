"""A model folder's large files: which weights it holds, and which other files an export carries along."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from minicpm_tune.errors import UserError
from minicpm_tune.files import unreadable_files_as_messages
from minicpm_tune.output_folder import RUN_RECORD

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
GENERATION_FILE = "generation_config.json"
# How a Git LFS pointer begins, a text of about 130 bytes.
LFS_MARK = b"version https://git-lfs.github.com/spec/"
_TOKENIZER_FILES = ("*token*", "*process*", "vocab*", "merges.txt", "chat_template*", "*.model")
# Parts that the model saves itself; what else is found of them are quantization states and tied copies.
_OWN_PARTS = ("llm.", "vpm.", "resampler.", "model.", "lm_head.", "output.", "vision_proj.")
# What an export takes from its source folder. Weights and their index it writes itself; other files there are
# those of the run that wrote the folder.
_MODEL_FILES = (*_TOKENIZER_FILES, "*config*.json", "*.py")


class WeightFileError(UserError):
    """Weights that are missing, incomplete or not weights at all."""


def weight_files(folder: Path) -> list[Path]:
    """Every weight file of a model folder: a single file or the index's shards, safetensors before .bin.

    Raises:
        WeightFileError: When there are none, a shard is missing, or a file is a Git LFS pointer.
    """
    for name in (SINGLE_FILES[0], INDEX_FILES[0], SINGLE_FILES[1], INDEX_FILES[1]):
        path = folder / name
        if not path.is_file():
            continue
        files = [path] if name in SINGLE_FILES else [folder / shard for shard in _shard_names(path)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise WeightFileError(
                f"{path}: {len(missing)} of {len(files)} shards are missing (the first is {missing[0]}). Download the "
                "model again."
            )
        for file in files:
            with file.open("rb") as opened:
                is_pointer = opened.read(len(LFS_MARK)) == LFS_MARK
            if is_pointer:
                raise WeightFileError(
                    f"{file}: found a Git LFS pointer of {file.stat().st_size} bytes, expected the weights. Run "
                    "`git lfs pull` in that folder, or download the model with `hf download`."
                )
        return files
    raise WeightFileError(
        f"{folder}: found no weights, expected one of {', '.join(SINGLE_FILES + INDEX_FILES)}. Check the path, or "
        "download the model again."
    )


def _shard_names(index: Path) -> list[str]:
    """The files that an index names; names that lead out of the folder would read any file of this machine."""
    try:
        names = sorted(
            {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightFileError(
            f"{index}: not the index of a model's weights ({error!r}), expected a JSON object with weight_map. "
            "Download the model again."
        ) from error
    for name in names:
        if name in (".", "..") or "/" in name or "\\" in name:
            raise WeightFileError(
                f"{index}: found the shard name {name!r}, expected a file name without a folder. Download the model "
                "again, from a source that you trust."
            )
    return names


def has_weights(folder: Path) -> bool:
    """Whether a folder has all its weight files; an index without its shards does not count."""
    indexes = [folder / name for name in INDEX_FILES if (folder / name).is_file()]
    return any((folder / name).is_file() for name in SINGLE_FILES) or any(
        all((folder / shard).is_file() for shard in _shard_names(index)) for index in indexes
    )


class StoredTensor(NamedTuple):
    """A tensor in a weight file, of which only the header has been read so far.

    Attributes:
        name: Its name.
        shape: Its shape.
        values: What gives its values when indexed.
    """

    name: str
    shape: tuple[int, ...]
    values: Any

    def read(self) -> Tensor:
        """All values, on the CPU, in the precision that they are stored in."""
        return self.values[...]

    def read_first_row(self) -> Tensor:
        """The values at index 0 of the first dimension; all of them where there is only one."""
        return self.read() if len(self.shape) < 2 else self.values[0]


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Every tensor of a model folder, file by file; read what is needed of one before asking for the next.

    Raises:
        WeightFileError: As ``weight_files``.
    """
    for path in weight_files(folder):
        yield from tensors_in_file(path)


def tensors_in_file(path: Path) -> Iterator[StoredTensor]:
    """Every tensor of a safetensors file, or of a .bin file that holds nothing but tensors.

    Raises:
        UnreadableFileError: When the file is damaged, or holds something else.
    """
    with unreadable_files_as_messages(path.parent):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    values = file.get_slice(name)
                    yield StoredTensor(name, tuple(values.get_shape()), values)
        else:
            mappable = zipfile.is_zipfile(path)  # not the format before torch 1.6
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
            for name, tensor in content.items():
                yield StoredTensor(name, tuple(tensor.shape), tensor)


def tensor_shape(folder: Path, name: str) -> tuple[int, ...] | None:
    """Shape of one tensor of a model folder; None when there is no such tensor."""
    return next((tensor.shape for tensor in stored_tensors(folder) if tensor.name == name), None)


def tensor_names(folder: Path) -> set[str]:
    """Names of all tensors of a model folder."""
    return {tensor.name for tensor in stored_tensors(folder)}


def untouched_tensors(source: Path | None, *, known: Collection[str]) -> dict[str, Tensor]:
    """Tensors of the source folder that the model has no place for, to be saved unchanged.

    Args:
        source: Folder the model was loaded from; None, or a folder without weights, gives nothing.
        known: Names that the model saves itself.

    Returns:
        Name -> tensor on the CPU (o-2.6's ``apm.*``, ``audio_projection_layer.*``, ``tts.*``).
    """
    if source is None or not any((source / name).is_file() for name in SINGLE_FILES + INDEX_FILES):
        return {}
    return {
        tensor.name: tensor.read().clone()  # the file itself may be replaced next
        for tensor in stored_tensors(source)
        if tensor.name not in known and not tensor.name.startswith(_OWN_PARTS)
    }


def copy_model_files(source: Path | None, target: Path) -> None:
    """Copy a model's small files: tokenizer, processor, configuration and *.py; never overwrite what is there.

    Except generation_config.json, which must stay as released: transformers writes one into every folder, and
    servers read their sampling settings from it.

    Args:
        source: Folder the model was loaded from, or None.
        target: Folder the export was written to.
    """
    if source is None or not source.is_dir() or source.resolve() == target.resolve():
        return
    (target / GENERATION_FILE).unlink(missing_ok=True)
    # A run's README.md is about that run.
    papers = () if (source / RUN_RECORD).is_file() else ("*.md", "LICENSE*")
    _copy_files(source, target, (*_MODEL_FILES, *papers))


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy tokenizer and processor, with their *.py files; never overwrite what is there."""
    _copy_files(source, target, _TOKENIZER_FILES)


def _copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    for path in sorted(source.iterdir()):
        wanted = any(fnmatchcase(path.name, pattern) for pattern in patterns)
        if (
            wanted
            and path.name != "adapter_config.json"
            and path.is_file()
            and not (target / path.name).exists()
        ):
            shutil.copy2(path, target / path.name)
