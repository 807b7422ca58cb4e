"""What the trainer hands on: ``--train_sampling_strategy`` to the order of rows, and settings to DDP."""

from types import SimpleNamespace

import pytest
from accelerate import DistributedDataParallelKwargs

from minicpm_tune.settings.arguments import TrainingArguments
from minicpm_tune.training.resilient_trainer import ResilientTrainer
from trainer import CPMTrainer


class Rows:
    """Six rows; shuffled they stand backwards."""

    def epoch_order(self, epoch, *, seed, shuffle):
        return list(range(6))[:: -1 if shuffle else 1]


@pytest.mark.parametrize(
    ("strategy", "expected"), [("random", [5, 4, 3, 2, 1, 0]), ("sequential", [0, 1, 2, 3, 4, 5])]
)
def test_sequential_rows_keep_their_order(strategy, expected, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, train_sampling_strategy=strategy)
    rows = SimpleNamespace(rows=SimpleNamespace(mixture=Rows()))
    trainer = SimpleNamespace(args=arguments, _train_batch_size=1, train_dataset=rows)
    assert list(CPMTrainer._get_train_sampler(trainer)) == expected


def test_ddp_keeps_no_second_copy_of_the_gradients(monkeypatch):
    monkeypatch.setattr(ResilientTrainer, "create_accelerator_and_postprocess", lambda self: None)
    trainer, handler = CPMTrainer.__new__(CPMTrainer), DistributedDataParallelKwargs()
    trainer.accelerator, trainer.args = SimpleNamespace(ddp_handler=handler), SimpleNamespace(fsdp=None)
    trainer.create_accelerator_and_postprocess()
    assert handler.to_kwargs() == {"gradient_as_bucket_view": True}
