"""``--train_sampling_strategy`` decides the order of rows."""

from types import SimpleNamespace

import pytest

from minicpm_tune.settings.arguments import TrainingArguments
from trainer import CPMTrainer


class Rows:
    """Six rows; shuffled they stand backwards."""

    def epoch_order(self, *, seed, epoch, shuffle):
        return list(range(6))[:: -1 if shuffle else 1]


@pytest.mark.parametrize(
    ("strategy", "expected"), [("random", [5, 4, 3, 2, 1, 0]), ("sequential", [0, 1, 2, 3, 4, 5])]
)
def test_sequential_rows_keep_their_order(strategy, expected, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, train_sampling_strategy=strategy)
    rows = SimpleNamespace(rows=SimpleNamespace(mixture=Rows()))
    trainer = SimpleNamespace(args=arguments, _train_batch_size=1, train_dataset=rows, lengths=None)
    assert list(CPMTrainer._get_train_sampler(trainer)) == expected
