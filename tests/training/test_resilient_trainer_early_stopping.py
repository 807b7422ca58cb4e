"""Early stopping counts evaluations without improvement, also over a resume."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from make_checkpoint import make_checkpoint
from minicpm_tune.training.resilient_trainer import EarlyStopping
from support import finetune_runs

BETTER, WORSE = {"eval_loss": 0.5}, {"eval_loss": 2.0}


def test_the_count_continues_where_the_checkpoint_was_written():
    args = SimpleNamespace(
        metric_for_best_model="loss", greater_is_better=False, load_best_model_at_end=False
    )
    state, control = TrainerState(best_metric=1.0), TrainerControl()
    before = EarlyStopping(2, 0.0)
    before.on_evaluate(args, state, control, WORSE)
    assert not control.should_training_stop
    state.stateful_callbacks = {"EarlyStopping": before.state()}
    after = EarlyStopping(2, 0.0)
    after.on_train_begin(args, state, control)
    after.on_evaluate(args, state, control, WORSE)
    assert control.should_training_stop


def test_an_improvement_starts_the_count_anew_and_a_small_one_does_not():
    args = SimpleNamespace(
        metric_for_best_model="loss", greater_is_better=False, load_best_model_at_end=False
    )
    state, control = TrainerState(best_metric=1.0), TrainerControl()
    callback = EarlyStopping(2, 0.1)
    for metrics in (WORSE, BETTER, {"eval_loss": 0.95}):
        callback.on_evaluate(args, state, control, metrics)
    assert callback.early_stopping_patience_counter == 1


@pytest.mark.slow
def test_a_run_without_improvement_ends_early(tmp_path):
    """A learning rate of 0 improves nothing: the second evaluation without improvement is the third of all."""
    model = make_checkpoint(tmp_path / "model", "v2_6", size="tiny")
    data = finetune_runs.write_data(tmp_path / "data")
    done = finetune_runs.run(
        ["--model_name_or_path", model, "--data_path", data, "--eval_data_path", data, "--output_dir", tmp_path / "out",
         "--max_steps", 9, "--learning_rate", 0, "--logging_steps", 1, "--report_to", "none", "--save_strategy", "no",
         "--eval_strategy", "steps", "--eval_steps", 1, "--early_stopping_patience", 2],
        launcher=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(finetune_runs.losses(tmp_path / "out")) == 3
