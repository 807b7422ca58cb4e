"""The check of rows by two processes: as a module what they find, as a program one of them."""

import json
import socket
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "finetune"))
else:
    from support.golden_checkpoints import checkpoint_folder
    from support.processes import Started, environment


def on_two_ranks(path, on_bad_row):
    """What two processes find."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [sys.executable, __file__, checkpoint_folder("v2_6"), path, on_bad_row]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both = [Started(words, env={**environment(), **shared, "RANK": str(rank)}) for rank in range(2)]
    return [json.loads(process.end(limit=120).stdout) for process in both]


def main(checkpoint, path, on_bad_row):
    """Check as one of several processes, and print what was found."""
    import torch.distributed as dist

    from dataset import SupervisedDataset
    from minicpm_tune.data.row_check import check_rows
    from minicpm_tune.data.samples import load_processing
    from minicpm_tune.errors import DataError
    from minicpm_tune.settings.data_arguments import DataArguments

    dist.init_process_group("gloo")
    arguments = DataArguments.of_checkpoint(model_max_length=512, on_bad_row=on_bad_row)
    rows = SupervisedDataset(path, load_processing(checkpoint, arguments))
    try:
        found = {"lengths": check_rows(rows).tolist(), "left_out": sorted(rows.left_out)}
    except DataError as error:
        found = {"error": str(error)}
    dist.barrier()
    sys.stdout.write(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
