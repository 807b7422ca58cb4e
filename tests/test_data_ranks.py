"""The check of the rows when several ranks share it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from data_helpers import checkpoint_folder, processing, write_rows
from dataset import DataOptions, SupervisedDataset
from test_dataset import BAD_ROWS, good

ROOT = Path(__file__).resolve().parent.parent
RANK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from dataset import DataOptions, SupervisedDataset
from processing import load_processing
from row_errors import DataError

dist.init_process_group("gloo")
prepared = load_processing(sys.argv[2])
options = {"model_max_length": 512, "on_bad_row": sys.argv[4]}
rows = SupervisedDataset(sys.argv[3], prepared, DataOptions(**options))
try:
    rows.check_rows()
    found = {"lengths": rows.lengths().tolist(), "left_out": sorted(rows._left_out)}
except DataError as error:
    found = {"error": str(error)}
dist.barrier()
sys.stdout.write(json.dumps(found))
dist.destroy_process_group()
"""


def on_two_ranks(path, on_bad_row):
    """What two processes find, as they print it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [
        sys.executable,
        "-c",
        RANK,
        str(ROOT / "finetune"),
        str(checkpoint_folder("v2_6")),
        str(path),
        on_bad_row,
    ]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            words, env={**os.environ, **shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        return [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_every_rank_knows_all_lengths_and_all_bad_rows(tmp_path):
    path = write_rows(tmp_path, [*BAD_ROWS, good(6), *BAD_ROWS[1:3], good(9)])
    alone = SupervisedDataset(path, processing("v2_6"), DataOptions(model_max_length=512, on_bad_row="skip"))
    alone.check_rows()
    expected = {"lengths": alone.lengths().tolist(), "left_out": [1, 2, 3, 4, 5, 7, 8]}
    assert on_two_ranks(path, "skip") == [expected, expected]
    first, second = on_two_ranks(path, "error")
    assert first == second
    assert first["error"].startswith("7 of 10 rows can't be used:")
