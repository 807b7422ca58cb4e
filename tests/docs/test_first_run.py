"""The commands of the README, one after the other as they stand there, on a small model instead of the released one."""

import json
import shutil

import pytest

from make_checkpoint import make_checkpoint
from support import processes
from support.finetune_runs import write_data
from support.pages import commands
from support.paths import ROOT

MODEL = "openbmb/MiniCPM-V-2_6"
TIME_LIMIT = 280  # seconds, for one command
DONE = ("finetune_lora.sh", "inspect_data.py", "plan_memory.py", "chat.py", "predict.py", "merge_lora.py")


@pytest.fixture
def work(tmp_path):
    """A clone with nothing but the programs, and a user's files beside them."""
    (tmp_path / "finetune").symlink_to(ROOT / "finetune")
    make_checkpoint(tmp_path / MODEL, "v2_6", size="tiny")
    for name in ("train.json", "eval.json", "test.json"):
        write_data(tmp_path, name=name, rows=4)
    shutil.copy(tmp_path / "train.json-0.png", tmp_path / "cat.jpg")
    return tmp_path


@pytest.mark.slow
def test_the_readme_leads_from_rows_to_a_merged_model(work):
    run = []
    for command in commands(ROOT / "README.md"):
        program = next((name for name in DONE if f"finetune/{name}" in command.line), None)
        if program is None or program in run or "--help" in command.words:
            continue
        line = command.line + (" --max_new_tokens 4" if program in ("chat.py", "predict.py") else "")
        done = processes.run(["bash", "-c", line], cwd=work, limit=TIME_LIMIT)
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        run.append(program)
    assert sorted(run) == sorted(DONE)
    history = json.loads((work / "output" / "output_lora" / "trainer_state.json").read_text())
    assert history["global_step"] == 12  # three epochs of four rows
    assert len((work / "test.jsonl").read_text().splitlines()) == 4
    assert (work / "output" / "merged" / "model.safetensors").exists()
