"""``report.html``: a page about a run, with its losses, rates, speed and memory, and answers before and after."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from minicpm_tune.answering.prediction import PredictionRows
from minicpm_tune.answering.prediction_callback import read_answers
from minicpm_tune.files import whole_file
from minicpm_tune.output_folder import RUN_RECORD
from minicpm_tune.pages.page import Chart, Series, chart, data_uri, render, shown_number, thumbnail
from minicpm_tune.training.run_record import read_starts
from minicpm_tune.training.step_metrics import points, running_mean

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
_SHOWN_ANSWERS = 12
_PICTURE_SIDE = 512  # pixels
_TABLE_LINES = 200
_MOST_SOURCES = 4  # files whose losses are drawn
# What a page can fail of: a full disk, a picture that is gone, numbers of another program in the record.
_FAILURES = (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, TemplateError)
_FACTS = {
    "ModelArguments": ("model_name_or_path", "llm_type", "attn_implementation"),
    "DataArguments": ("data_path", "eval_data_path", "eval_split", "model_max_length", "max_slice_nums"),
    "TrainingArguments": (
        "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps", "packing",
        "bf16", "fp16", "optim", "seed", "use_lora", "tune_llm", "tune_vision", "tune_resampler", "tune_audio",
        "gradient_checkpointing",
    ),
    "LoraArguments": ("lora_r", "lora_alpha", "lora_dropout", "q_lora", "lora_target_modules"),
}  # fmt: skip


class RunReport(TrainerCallback):
    """Writes the page on rank 0: with every checkpoint, and when the run has ended or was stopped.

    Whatever goes wrong with it is logged; a page is no reason to end a run.

    Args:
        rows: The evaluation rows as questions, for the pictures of answered rows; None without an evaluation.
    """

    def __init__(self, rows: PredictionRows | None) -> None:
        self.rows = rows
        self._pictures: dict[int, str | None] = {}

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the page as far as the run has come."""
        self.write(args, state)

    def write(self, args: Any, state: TrainerState) -> None:
        """Write the page."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        try:
            page = run_page(
                state,
                read_starts(folder / RUN_RECORD),
                examples(read_answers(folder), self._picture),
                folder=folder,
            )
            with whole_file(str(folder / REPORT_FILE), flag="--run_report") as file:
                file.write(page)
        except _FAILURES as error:
            logger.warning("%s was not written: %s", folder / REPORT_FILE, error)

    def _picture(self, row: int) -> str | None:
        """A row's first picture as a data URI; a row that can't be opened any more has none."""
        if row not in self._pictures:
            self._pictures[row] = None
            with suppress(*_FAILURES):
                if self.rows is not None and (picture := self.rows.picture(row)) is not None:
                    self._pictures[row] = data_uri(thumbnail(picture, _PICTURE_SIDE), "image/webp")
        return self._pictures[row]


def examples(answers: Sequence[dict[str, Any]], picture: Any) -> list[dict[str, Any]]:
    """Rows with their first and their last answer, those that were answered before training first.

    Args:
        answers: From ``read_answers``.
        picture: Gives a row's picture as a data URI, or None.

    Returns:
        ``row``, ``id``, ``question``, ``answer``, ``picture``, and ``before`` and ``after``: (step, line).
    """
    seen: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for one in answers:
        for line in one["answers"]:
            seen.setdefault(line["row"], []).append((one["step"], line))
    return [
        {
            **given[-1][1],
            "picture": picture(row),
            "before": given[0] if len(given) > 1 else None,
            "after": given[-1],
        }
        for row, given in islice(seen.items(), _SHOWN_ANSWERS)
    ]


def run_page(
    state: TrainerState, starts: Sequence[dict[str, Any]], answered: Sequence[dict[str, Any]], *, folder: Path
) -> str:
    """The page.

    Args:
        state: The trainer's, with its ``log_history``; that of a continued run holds what came before, too.
        starts: The entries of ``run.json``, one for every start.
        answered: From ``examples``.
        folder: The output folder.
    """
    history = [line for line in state.log_history if "step" in line]
    last_step = max([state.global_step, *(int(line["step"]) for line in history)])
    start = starts[-1] if starts else {}
    columns = list(dict.fromkeys(["step", *(name for line in history for name in line)]))
    lines = history[:: -(-len(history) // _TABLE_LINES) or 1]
    return render(
        "run.html",
        name=folder.absolute().name,
        folder=str(folder.absolute()),
        outcome=start.get("outcome") or "not ended when this was written",
        steps=state.global_step,
        all_steps=state.max_steps,
        epoch=state.epoch,
        tiles=_tiles(history, starts),
        charts=_charts(history, columns, last_step),
        columns=columns,
        table=[[line.get(name, "") for name in columns] for line in lines],
        thinned=len(lines) < len(history),
        answered=answered,
        facts=_facts(start),
        starts=starts,
        commands=[shlex.join(map(str, one.get("command", ()))) for one in starts],
        arguments=start.get("arguments", {}),
        versions=start.get("versions", {}),
    )


def _charts(history: Sequence[dict[str, Any]], columns: Sequence[str], last_step: int) -> list[Chart]:
    """The charts that there are numbers for; the first is the losses'."""

    def drawn(title: str, *series: Series, from_zero: bool = False) -> Chart | None:
        return chart(title, series, last_step=last_step, from_zero=from_zero)

    def one(title: str, name: str) -> Chart | None:
        return drawn(title, Series(title, points(history, name)), from_zero=True)

    losses = points(history, "loss")
    means = list(zip([step for step, _ in losses], running_mean([loss for _, loss in losses]), strict=True))
    sources = [name for name in columns if name.startswith("loss/")][:_MOST_SOURCES]
    scores = [name for name in columns if name.startswith("eval_") and _is_share(history, name)]
    found = [
        drawn(
            "Loss (nats per supervised token)",
            Series("training", losses, look="faint"),
            Series("training, running mean", means),
            Series("evaluation", points(history, "eval_loss"), look="dots", color=1),
        ),
        one("Learning rate", "learning_rate"),
        one("Gradient norm", "grad_norm"),
        one("Tokens per second", "tokens_per_second"),
        drawn(
            "Shares (%)",
            Series("supervised tokens", points(history, "supervised_share", 100)),
            Series("padding", points(history, "padding_share", 100), color=1),
            from_zero=True,
        ),
        one("Peak memory (GiB)", "peak_memory_gib"),
        drawn(
            "Loss by data file",
            *(
                Series(name.removeprefix("loss/"), points(history, name), color=color)
                for color, name in enumerate(sources)
            ),
        ),
        *(
            drawn(f"Evaluation: {name[5:]}", Series(name, points(history, name), look="dots", color=1))
            for name in scores
        ),
    ]
    return [each for each in found if each is not None]


def _is_share(history: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether a metric is a score between 0 and 1 rather than a count or a time."""
    values = [value for _, value in points(history, name)]
    counted = ("loss", "runtime", "_per_second", "tokens")
    return bool(values) and not name.endswith(counted) and all(0 <= value <= 1 for value in values)


def _tiles(history: Sequence[dict[str, Any]], starts: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The figures at the top: what, how much, and a note."""

    def values(name: str) -> list[float]:
        return [float(value) for _, value in points(history, name)]

    tiles = []
    if losses := values("loss"):
        last = losses[-max(len(losses) // 10, 1) :]
        note = f"mean of the last {len(last)} of {len(losses)} log lines; {shown_number(losses[0])} at first"
        tiles.append(("Training loss", shown_number(float(np.mean(last))), note))
    if evaluated := points(history, "eval_loss"):
        step, best = min(evaluated, key=lambda point: point[1])
        note = f"the best is {shown_number(float(best))}, at step {step:,}"
        tiles.append(("Evaluation loss", shown_number(float(evaluated[-1][1])), note))
    if speeds := values("tokens_per_second"):
        rows = values("samples_per_second")
        note = f"median; {shown_number(float(np.median(rows)))} rows per second" if rows else "median"
        tiles.append(("Tokens per second", shown_number(float(np.median(speeds))), note))
    if shares := values("supervised_share"):
        tiles.append(("Supervised", f"{100 * float(np.mean(shares)):.1f} %", "of the tokens, mean"))
    if memory := values("peak_memory_gib"):
        tiles.append(("Peak memory", f"{max(memory):.2f} GiB", "of the first process"))
    if len(starts) > 1:
        tiles.append(("Starts", str(len(starts)), "the curves hold all of them"))
    return tiles


def _rows_of(file: dict[str, Any]) -> str:
    rows = file["rows"]
    used = file.get("rows_used", rows)  # records of earlier versions lack it
    return f"{used:,} of {file['path']}" if used == rows else f"{used:,} of the {rows:,} of {file['path']}"


def _facts(start: dict[str, Any]) -> dict[str, str]:
    """What the run was made of: the machine, the data and the arguments that matter most."""
    facts: dict[str, str] = {}
    if machine := start.get("machine"):
        gpus, processes = machine.get("gpus") or [], machine.get("processes")
        parts = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
        parts = parts or [f"{machine.get('cpu_cores')} CPU cores"]
        parts.append("1 process" if processes == 1 else f"{processes} processes")
        facts["machine"] = ", ".join([str(machine.get("host")), *parts])
    for kind, files in (start.get("data") or {}).items():
        facts[f"{kind} rows"] = "; ".join(_rows_of(file) for file in files)
    arguments = start.get("arguments", {})
    for group, names in _FACTS.items():
        if group != "LoraArguments" or arguments.get("TrainingArguments", {}).get("use_lora"):
            given = arguments.get(group, {})
            facts |= {f"--{name}": str(given[name]) for name in names if given.get(name) not in (None, "")}
    if start.get("git_commit"):
        facts["commit"] = start["git_commit"]
    return facts
