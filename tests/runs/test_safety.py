"""Files that want to run code do nothing but raise, and odd names in paths are names."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from minicpm_tune import output_folder
from support import finetune_runs, live_runs, processes
from support.hostile import ODD, Bomb
from support.live_runs import LORA, STAGES, finish


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safety")
    model, data = live_runs.tiny(folder / "model"), finetune_runs.write_data(folder / "data", rows=4)
    return model, data, folder


def several(commands, expected):
    """Run command lines in one process, each to its own error; give what was printed."""
    return finish(
        ["--output_dir", "none", json.dumps(commands)],
        faults={"several": True, "go_on": True},
        expected=expected,
        start=[sys.executable, live_runs.WORKER],
    )


def test_malicious_files_of_models_adapters_and_checkpoints_only_raise(small, tmp_path):
    model, data, _ = small
    mark = tmp_path / "mark"
    finish(live_runs.flags(model, data, tmp_path / "good", *LORA, "--max_steps", 2))
    commands = []

    def with_bomb(name, folder, file, *flags, base=model):
        target = tmp_path / name
        shutil.copytree(folder, target)
        torch.save({"state": Bomb(mark)}, target / file)
        manifest = target / output_folder.MANIFEST
        if manifest.exists():
            content = json.loads(manifest.read_text())
            content["files"][file] = (target / file).stat().st_size
            manifest.write_text(json.dumps(content))
        given = [str(target) if word == "BOMB" else word for word in flags]
        base = target if base is None else base
        commands.append(live_runs.flags(base, data, tmp_path / f"out-{name}", *given))

    weights = tmp_path / "bin-model"
    shutil.copytree(model, weights)
    for path in weights.glob("*.safetensors*"):
        path.unlink()
    with_bomb("weights", weights, "pytorch_model.bin", base=None)
    adapter = tmp_path / "bin-adapter"
    shutil.copytree(tmp_path / "good", adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with_bomb("adapter", adapter, "adapter_model.bin", *LORA, "--lora_weight_path", "BOMB")
    checkpoint = tmp_path / "good" / "checkpoint-2"
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with_bomb(file.partition(".")[0], checkpoint, file, *LORA, "--resume_from_checkpoint", "BOMB")
    rotten = shutil.copytree(checkpoint, tmp_path / "rotten")
    (rotten / "optimizer.pt").write_bytes(bytes((checkpoint / "optimizer.pt").stat().st_size))
    commands.append(live_runs.flags(model, data, tmp_path / "o", *LORA, "--resume_from_checkpoint", rotten))
    printed = several(commands, expected=1)
    assert not mark.exists()
    assert "Traceback" not in printed
    assert printed.count("\nerror: ") == len(commands)
    assert "pickle protocol" not in printed  # torch's own warning in front of it
    assert printed.count("something other than tensors, which is not loaded (") == len(commands)


@pytest.mark.slow
def test_a_malicious_state_of_deepspeed_only_raises(small, tmp_path):
    model, data, _ = small
    output, mark = tmp_path / "out", tmp_path / "mark"
    flags = live_runs.flags(model, data, output, *STAGES["zero2"])
    finish(flags, processes=2)
    shutil.rmtree(output / "checkpoint-4")
    (state,) = (output / "checkpoint-2").glob("global_step*/*rank_1*optim_states.pt")
    good = state.stat().st_size
    torch.save({"optimizer_state_dict": Bomb(mark), "filler": bytes(good)}, state)
    manifest = output / "checkpoint-2" / output_folder.MANIFEST
    content = json.loads(manifest.read_text())
    content["files"][state.relative_to(output / "checkpoint-2").as_posix()] = state.stat().st_size
    manifest.write_text(json.dumps(content))
    printed = finish([*flags, "--resume_from_checkpoint", "true"], processes=2, expected=1)
    assert "something other than tensors, which is not loaded" in printed
    assert not mark.exists()


def test_odd_names_and_links_go_through_the_launcher_and_no_code_of_a_model_runs(small, tmp_path):
    model, data, _ = small
    mark = tmp_path / "mark"
    place = tmp_path / ODD
    place.mkdir()
    (place / "model").symlink_to(shutil.copytree(model, tmp_path / "copied"))
    (tmp_path / "copied" / "modeling_minicpmv.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (place / "rows").symlink_to(shutil.copytree(data.parent, tmp_path / "rows"))
    done = processes.run(
        ["sh", finetune_runs.FINETUNE.with_name("finetune_lora.sh"), "--lora_r", "4", "--logging_steps", "1"],
        env={
            **processes.environment(), "MODEL": str(place / "model"), "DATA": str(place / "rows" / data.name),
            "OUTPUT_DIR": str(place / "out $(touch mark)"), "GPUS_PER_NODE": "1", "MAX_STEPS": "2", "DEEPSPEED": "",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        cwd=place, limit=live_runs.LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    output = place / "out $(touch mark)"
    assert len(finetune_runs.losses(output)) == 2
    assert sorted(path.name for path in place.iterdir()) == ["model", output.name, "rows"]
    assert not mark.exists()
