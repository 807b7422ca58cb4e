"""``--predict_with_generate``: answers to a few evaluation rows during training, as metrics and in TensorBoard.

The callback runs at every evaluation, before the best checkpoint is chosen, so that ``--metric_for_best_model
eval_anls`` works. A few rows are also answered before the first step, so that the run's report can show what has
changed; all answers are kept in ``logs/answers.jsonl``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from minicpm_tune.answering.generate import GREEDY
from minicpm_tune.answering.metrics import corpus_scores
from minicpm_tune.answering.prediction import PredictionRows, predict
from minicpm_tune.output_folder import LOGS
from minicpm_tune.processes import gather

logger = logging.getLogger(__name__)

SHOWN = 4  # examples with their picture per evaluation
ANSWERED_BEFORE = 8  # rows answered before the first step
ANSWERS_FILE = "answers.jsonl"  # in the folder of logs: for each evaluation its step and its lines
PICTURE_SIDE = 448  # longest side of a shown picture, in pixels


class PredictionCallback(TrainerCallback):
    """Lets the model answer evaluation rows at every evaluation.

    The processes share the rows. Under ZeRO-3, where every step needs all processes, each runs the same number of
    batches and steps.

    Args:
        trainer: The trainer; its model answers.
        rows: The evaluation rows, as questions.
        samples: How many of them are answered, spread evenly over the file.
        batch_size: Rows that each process answers at once.
        max_new_tokens: Longest answer, in tokens.
    """

    def __init__(
        self,
        trainer: Trainer,
        rows: PredictionRows,
        *,
        samples: int,
        batch_size: int,
        max_new_tokens: int = 128,
    ) -> None:
        self.trainer, self.rows, self.batch_size = trainer, rows, batch_size
        self.options = GREEDY | {"max_new_tokens": max_new_tokens}
        usable = [index for index in rows.rows.mixture.numbers.tolist() if index not in rows.rows.left_out]
        count = min(samples, len(usable))
        self.indices = [usable[index * len(usable) // count] for index in range(count)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget answers of later steps than this run starts at, and answer a few rows before its first step."""
        if state.is_world_process_zero:
            earlier = read_answers(Path(args.output_dir)) if state.global_step else []
            self._keep([one for one in earlier if one["step"] <= state.global_step], args, mode="w")
        # FSDP gathers a part of the weights only once the whole model has made a forward pass.
        if state.global_step == 0 and not args.eval_on_start and not self.trainer.is_fsdp_enabled:
            lines = self.answers(self.indices[:ANSWERED_BEFORE])
            if state.is_world_process_zero:
                self._keep([{"step": 0, "answers": lines}], args)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Answer the rows, add the metrics to the evaluation's, and show examples."""
        lines = self.answers()
        scores = {f"eval_{name}": value for name, value in corpus_scores(lines).items()}
        if metrics is not None:
            metrics.update(scores)
        if scores:
            self.trainer.log(dict(scores))
        if state.is_world_process_zero:
            self._show(lines, step=state.global_step)
            self._keep([{"step": state.global_step, "answers": lines}], args)

    def _keep(self, found: Sequence[dict[str, Any]], args: Any, *, mode: str = "a") -> None:
        path = Path(args.output_dir) / LOGS / ANSWERS_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open(mode, encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(one, ensure_ascii=False, default=str) + "\n" for one in found)
        except OSError as error:  # a list of answers is no reason to end a run
            logger.warning("%s was not written: %s", path, error)

    def answers(self, indices: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Answer the rows, or some of them, on all processes; each gets all lines, in the order of the rows."""
        indices = self.indices if indices is None else indices
        world, rank = self.trainer.args.world_size, self.trainer.args.process_index
        mine = indices[rank::world]
        synced = is_deepspeed_zero3_enabled() or self.trainer.is_fsdp_enabled
        if synced and indices:
            # Ranks with fewer rows answer some of theirs again; those answers are dropped below.
            most = len(indices[::world])
            mine = ([*(mine or indices[:1])] * most)[:most]
        options: dict[str, Any] = {"batch_size": self.batch_size, "options": self.options, "synced": synced}
        with self._ready_to_answer() as model:
            batches = list(predict(model, self.rows, mine, **options))
        lines = {line["row"]: line for batch in batches for line in batch}
        for found in gather(lines):
            lines |= found
        return [lines[index] for index in indices if index in lines]

    @contextmanager
    def _ready_to_answer(self) -> Iterator[Any]:
        """The model in eval mode and in the run's precision; its mode is restored at the end."""
        model: Any = self.trainer.model
        was_training = model.training
        model.eval()
        try:
            with self.trainer.compute_loss_context_manager():
                yield model
        finally:
            model.train(was_training)

    def _show(self, lines: Sequence[dict[str, Any]], *, step: int) -> None:
        """Show a few rows with their first picture in TensorBoard."""
        callbacks = self.trainer.callback_handler.callbacks
        boards = (callback for callback in callbacks if isinstance(callback, TensorBoardCallback))
        writer = getattr(next(boards, None), "tb_writer", None)
        if writer is None:
            return
        for number, line in enumerate(lines[:SHOWN]):
            writer.add_text(f"predictions/{number}", _as_text(line), step)
            picture = self.rows.picture(line["row"])
            if picture is not None:
                writer.add_image(f"pictures/{number}", _small(picture), step, dataformats="HWC")
        writer.flush()


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """What an output folder keeps of its evaluations' answers: ``step`` and ``answers``, the lines of ``predict``."""
    path = folder / LOGS / ANSWERS_FILE
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):  # cut short when the disk was full
            found.append(json.loads(line))
    return found


def _as_text(line: dict[str, Any]) -> str:
    """Markdown for TensorBoard, the texts set as code, so that none of them acts as markup."""
    texts = {name: line[name].splitlines() for name in ("question", "answer", "prediction") if line[name]}
    parts = [f"**{name}**\n\n" + "\n".join(f"    {one}" for one in lines) for name, lines in texts.items()]
    scores = ", ".join(f"{name} {value:.2f}" for name, value in corpus_scores([line]).items())
    return "\n\n".join([*parts, scores])


def _small(picture: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8, at most ``PICTURE_SIDE`` on a side."""
    small = picture.copy()
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return np.asarray(small)
