"""``--early_stopping_patience``: end a run whose evaluations no longer improve."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback
from transformers.trainer_callback import TrainerState


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, which continues its count when the run is continued.

    transformers 5.23 only does so with ``--restore_callback_states_from_checkpoint``, which restores the control
    state of the interrupted run as well.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the count over from the checkpoint."""
        callbacks: Any = state.stateful_callbacks  # by name, as a checkpoint has them
        saved = callbacks.get(type(self).__name__)
        if saved is not None:
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        if args.load_best_model_at_end:  # its warning that the last model is kept is what the help text says
            super().on_train_begin(args, state, control, **kwargs)
