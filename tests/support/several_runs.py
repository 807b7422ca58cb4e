"""Runs finetune.py several times in one process, which saves the time that imports take.

python several_runs.py '[["--model_name_or_path", ...], ...]'
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "finetune"))

from finetune import run
from minicpm_tune.training.process_lifecycle import ProcessLifecycle

if __name__ == "__main__":
    for argv in json.loads(sys.argv[1]):
        control = ProcessLifecycle()
        with control.user_errors_as_messages():
            run(argv, control)
        assert control.exit_code == 0, argv
    sys.exit(control.end())
