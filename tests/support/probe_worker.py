"""finetune.py with faults planted, or with every gradient counted. The variable FAULTS says what, as JSON:

    {"several": true}                         the last argument is a JSON list of command lines, run in turn
    {"go_on": true}                           ... the next ones also after an error
    {"count_gradients": "folder"}             into folder/rank<N>.json: batches, and parameters without a gradient
    {"raise": [rank, step]}                   an error of the program's
    {"bad_row": [rank, step]}                 an error of the user's
    {"memory": [rank, step]}                  more memory asked for than there is
    {"memory_in": "loading" or "evaluating"}  ... elsewhere
    {"nan": [rank, first, last]}              losses that are NaN in these steps
    {"kill": [rank, step]}                    the process kills itself
    {"kill_in_save": [rank, step]}            ... while it writes that step's checkpoint
    {"hang": [rank, step]}                    a row that never comes
    {"slow": seconds}                         every batch takes longer; there is a file "slow" when one has begun
    {"slow_check": seconds}                   ... every row of the check does
    {"slow_weights": ["file", seconds]}       ... every tensor of the checkpoint does; there is this file then
    {"full_disk": step}                       writing that step's checkpoint fails for want of space

Ranks count from 0, steps from 1.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "finetune"))

import torch
from torch.distributed.tensor import DTensor
from transformers import core_model_loading

import finetune
from minicpm_tune.data import row_check
from minicpm_tune.errors import UserError
from minicpm_tune.training.process_lifecycle import ProcessLifecycle, end_at_interrupt
from minicpm_tune.training.resilient_trainer import MicroBatch
from trainer import CPMTrainer

FAULTS = json.loads(os.environ.get("FAULTS", "{}"))
RANK = int(os.environ.get("RANK", "0"))
FOR_EVER = 10_000  # seconds
batches = []


def planted(name, step):
    where = FAULTS.get(name)
    return (
        where is not None
        and where[0] == RANK
        and where[1] <= step <= (where[2] if len(where) > 2 else where[1])
    )


class PlantedError(UserError):
    """Looks like a mistake of the user's."""


class Probed(CPMTrainer):
    """Fails as it is told to."""

    def get_batch_samples(self, *args, **kwargs):
        if planted("hang", self.state.global_step + 1):
            self.peers.mark(f"loading the rows of step {self.state.global_step + 1}")
            time.sleep(FOR_EVER)
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step + 1
        if "slow" in FAULTS:
            Path(self.args.output_dir, "slow").touch()
            time.sleep(FAULTS["slow"])
        if planted("raise", step):
            raise KeyError("planted error")
        if planted("bad_row", step):
            raise PlantedError("row 5: planted mistake")
        if planted("kill", step):
            os.kill(os.getpid(), signal.SIGKILL)
        if planted("nan", step):
            num_items_in_batch = torch.tensor(float("nan"))
        if planted("memory", step):
            self._batches.append(MicroBatch.of(inputs))
            torch.empty(10**15)
        if "count_gradients" in FAULTS:
            return self.counted_step(model, inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def counted_step(self, model, inputs, num_items_in_batch):
        found = {name: 0 for name, parameter in model.named_parameters() if parameter.requires_grad}
        hooks = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:

                def count(gradient, name=name):
                    found[name] += 1

                hooks.append(parameter.register_hook(count))
        slices, rows = len(inputs["tgt_sizes"]), sum(row is not None for row in inputs["provenance"].rows)
        loss = super().training_step(model, inputs, num_items_in_batch)
        for hook in hooks:
            hook.remove()
        if self.is_fsdp_enabled:  # it reduces gradients without calling hooks
            found = {
                name: int(parameter.grad is not None)
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
        without = [name for name, times in found.items() if times != 1]
        divided = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
        whole = len(list(model.parameters())) - divided
        batches.append(
            {"slices": slices, "parameters": len(found), "without": without, "rows": rows, "whole": whole}
        )
        return loss

    def evaluates_batch(self, inputs):
        super().evaluates_batch(inputs)
        if FAULTS.get("memory_in") == "evaluating":
            torch.empty(10**15)

    def _save_optimizer_and_scheduler(self, output_dir):
        if planted("kill_in_save", self.state.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULTS.get("full_disk") == self.state.global_step:
            # As large a file as there is room for, so that the failure is the system's own.
            with open("/dev/full", "wb") as file:
                file.write(bytes(2**20))
        super()._save_optimizer_and_scheduler(output_dir)


def slow_check(rows, index, check=row_check.check_row):
    Path(rows.bad_rows.path.parent, "slow").touch()
    time.sleep(FAULTS["slow_check"])
    return check(rows, index)


def slow_weights(tensor, *args, copy=core_model_loading._materialize_copy, **kwargs):
    Path(FAULTS["slow_weights"][0]).touch()
    time.sleep(FAULTS["slow_weights"][1])
    return copy(tensor, *args, **kwargs)


def more_memory_than_there_is(*_, **__):
    torch.empty(10**15)


def main():
    end_at_interrupt()
    finetune.CPMTrainer = Probed
    if "slow_check" in FAULTS:
        row_check.check_row = slow_check
    if "slow_weights" in FAULTS:
        core_model_loading._materialize_copy = slow_weights
    if FAULTS.get("memory_in") == "loading":
        finetune.load_model = more_memory_than_there_is
    command_lines = json.loads(sys.argv[-1]) if FAULTS.get("several") else [sys.argv[1:]]
    for argv in command_lines:
        control = ProcessLifecycle()
        with control.user_errors_as_messages():
            finetune.run(argv, control)
        if control.exit_code and not FAULTS.get("go_on"):
            break
    if "count_gradients" in FAULTS:
        Path(FAULTS["count_gradients"], f"rank{RANK}.json").write_text(json.dumps(batches))
    return control.end()


if __name__ == "__main__":
    sys.exit(main())
