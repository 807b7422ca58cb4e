"""``--cache_vision_features``: the vision tower's output, kept on disk and computed once per image.

What is kept is the output of the frozen tower, in front of the resampler (4.6 and 4.7: the merger): that
part usually trains, and costs little beside the tower. An entry is a safetensors file with all slices of
one image. Its name is a digest of everything it depends on:

- the image file's bytes, and whether its EXIF orientation is applied;
- how it is resized and cut (sizes, grid, Pillow's version);
- the tower: values of its weights in the checkpoint's files, its configuration, the precision.

So an entry is never wrong, only unused: nothing has to be emptied when images or checkpoints change.
Frames of videos are not kept. Letters: C width of the tower.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import PIL
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minicpm_tune.batch import NewFeatures, PictureFeatures
from minicpm_tune.checkpoints.model_generations import Generation, plain_name
from minicpm_tune.checkpoints.weight_files import stored_tensors
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.slicing.layouts import ImageLayout
from minicpm_tune.errors import UserError
from minicpm_tune.files import written_whole

logger = logging.getLogger(__name__)

_FORMAT = 1  # raise it when tower, slicing or the form of an entry change what an entry holds
_WAITING = 64  # pictures that may wait to be written before training waits for the disk
# What of config.json decides the tower's output.
_CONFIG_KEYS = (
    "vision_config", "vision_encoder", "drop_vision_last_layer", "downsample_mode", "version", "model_type",
    "insert_layer_id",
)  # fmt: skip


class VisionCacheError(UserError):
    """A run whose vision features can't be kept; the message says why."""


@dataclass(frozen=True)
class VisionCache:
    """The entries of one tower.

    Attributes:
        folder: Where they are; different towers have different folders.
        patches_per_token: Patches that the tower joins to one feature token.
        whole_samples: Whether a slice's features depend on the other slices of its sample, as in 2.5.
    """

    folder: Path
    patches_per_token: int = 1
    whole_samples: bool = False

    def pictures(
        self, pictures: Sequence[Picture], layouts: Sequence[tuple[ImageLayout, ...]]
    ) -> list[PictureFeatures]:
        """Look a sample's pictures up.

        Args:
            pictures: The sample's pictures.
            layouts: How their frames are cut.
        """
        patches = [
            [rows * columns for layout in frames for rows, columns in layout.encoded_sizes]
            for frames in layouts
        ]
        context = f"{max(chain(*patches), default=0)}" if self.whole_samples else ""
        entries = []
        for picture, frames, slices in zip(pictures, layouts, patches, strict=True):
            key = None if picture.digest is None else _key(picture.digest(), frames, context)
            features = None if key is None else self.read(key, sum(slices))
            entries.append(PictureFeatures(len(slices), key, features))
        if self.whole_samples and any(entry.features is None for entry in entries):
            return [replace(entry, features=None) for entry in entries]
        return entries

    def read(self, key: str, patches: int) -> Tensor | None:
        """[tokens, C] of a picture with so many patches; None when there is no whole entry."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            features = load_file(path)["features"]
        except (OSError, SafetensorError, KeyError):  # cut short by a full disk or a power failure
            return None
        return features if features.shape[0] * self.patches_per_token == patches else None

    def write(self, key: str, features: Tensor) -> None:
        """Keep an entry; several processes may write the same one at once."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(save({"features": features}))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _key(content: bytes, frames: tuple[ImageLayout, ...], context: str) -> str:
    cut = "|".join(repr(layout) for layout in frames)
    text = f"{_FORMAT}|{PIL.__version__}|{cut}|{context}|"
    return hashlib.blake2b(text.encode() + content, digest_size=16).hexdigest()


class FeatureWriter:
    """Writes the tower's output into the cache beside the training, in a thread of its own."""

    def __init__(self, cache: VisionCache) -> None:
        self.cache = cache
        self._queue: queue.Queue[tuple[str, Tensor, Any] | None] = queue.Queue(maxsize=_WAITING)
        self._thread: threading.Thread | None = None
        self._failed = False

    def keep(self, new: NewFeatures | None) -> None:
        """Keep what a forward found."""
        for key, features in () if new is None or self._failed else new.entries:
            if key is not None:
                self._put(key, features)

    def _put(self, key: str, features: Tensor) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="vision features", daemon=True)
            self._thread.start()
        event = None
        if features.is_cuda:
            # Copied while the step goes on; the thread waits for the copy, training does not.
            target = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            features = target.copy_(features, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._queue.put((key, features, event))

    def _write_all(self) -> None:
        while (entry := self._queue.get()) is not None:
            key, features, event = entry
            if event is not None:
                event.synchronize()
            if self._failed:
                continue
            try:
                self.cache.write(key, features)
            except OSError as error:
                self._failed = True
                logger.warning(
                    "--cache_vision_features: %s can't be written to (%s). Training goes on; images that are not "
                    "there yet are computed each time.",
                    self.cache.folder,
                    error,
                )

    def close(self) -> None:
        """Wait until everything is written."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None


def open_cache(
    folder: str | Path,
    checkpoint: Path,
    generation: Generation,
    *,
    precision: str,
    downsample_mode: str | None = None,
) -> VisionCache:
    """Find or make the entries' folder of a checkpoint's tower.

    Args:
        folder: What ``--cache_vision_features`` was given.
        checkpoint: The folder of the model.
        generation: Its generation.
        precision: Everything that decides in which precision the tower computes.
        downsample_mode: The run's; None for the generations without.

    Raises:
        VisionCacheError: When the folder can't be written to.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config |= {"downsample_mode": downsample_mode} if downsample_mode else {}
    digest = hashlib.blake2b(f"{generation.name}|{precision}|{_FORMAT}".encode(), digest_size=16)
    digest.update(json.dumps({key: config.get(key) for key in _CONFIG_KEYS}, sort_keys=True).encode())
    prefixes = tuple(f"{name}." for name in generation.modules["vision"])
    tower = (tensor for tensor in stored_tensors(checkpoint) if tensor.name.startswith(prefixes))
    for name, values in sorted((tensor.name, tensor.read()) for tensor in tower):
        digest.update(f"{name}|{values.dtype}|{tuple(values.shape)}".encode())
        digest.update(values.contiguous().flatten().view(torch.uint8).numpy().data)
    own = Path(folder).expanduser() / f"{generation.name}-{digest.hexdigest()}"
    try:
        own.mkdir(parents=True, exist_ok=True)
        with written_whole(own / "writable"):
            pass
    except OSError as error:
        raise VisionCacheError(
            f"--cache_vision_features {folder}: can't be written to ({error}). Give a folder that can."
        ) from error
    joined = generation.downsampling[downsample_mode].patches_per_feature if downsample_mode else 1
    return VisionCache(own, joined, generation.positions == "one_row")


def use_cache(
    root: str, checkpoint: Path, model: nn.Module, datasets: Sequence[Any], *, precision: str
) -> FeatureWriter:
    """Let data sets look the features of their images up.

    Args:
        root: ``--cache_vision_features``.
        checkpoint: The checkpoint's folder.
        model: Its model, with what trains settled.
        datasets: The ``SupervisedDataset`` of each data file.
        precision: What the tower computes in.

    Returns:
        What keeps the features that are not there yet.

    Raises:
        VisionCacheError: When the tower does not stay what the checkpoint's files say.
    """
    first = datasets[0].processing
    check_tower_is_frozen(model, first.generation)
    cache = open_cache(
        root, checkpoint, first.generation, precision=precision, downsample_mode=first.media.downsample_mode
    )
    for rows in datasets:
        rows.processing = replace(rows.processing, vision_cache=cache)
    logger.info("Vision features are kept in %s", cache.folder)
    return FeatureWriter(cache)


def check_tower_is_frozen(model: nn.Module, generation: Generation) -> None:
    """See that the tower computes what the checkpoint's files say, throughout the run.

    Raises:
        VisionCacheError: When it trains, has adapters, or was replaced by an adapter's own.
    """
    prefixes = tuple(f"{name}." for name in generation.modules["vision"])
    for name, parameter in model.named_parameters():
        if not plain_name(name).startswith(prefixes):
            continue
        changed = "lora_" in name or "modules_to_save." in name
        if parameter.requires_grad or changed:
            raise VisionCacheError(
                f"--cache_vision_features: the vision tower has {'an adapter' if changed else 'trained weights'} "
                f"({name}), expected the checkpoint's own, frozen: features kept from one step would be wrong in "
                "the next. Leave the tower out of --lora_target_modules and --lora_modules_to_save, with "
                "--tune_vision false, or leave --cache_vision_features out."
            )
