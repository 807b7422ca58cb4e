"""The command that continues a stopped run."""

from minicpm_tune.training.stop_signals import command_to_continue


def test_the_command_that_continues_leaves_out_what_contradicts_it(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    words = [
        "--data_path",
        "it's.json",
        "--overwrite_output_dir",
        "--seed",
        "1",
        "--resume_from_checkpoint=x",
    ]
    command = command_to_continue(words, script="finetune.py")
    assert (
        command == "python finetune.py --data_path 'it'\"'\"'s.json' --seed 1 --resume_from_checkpoint true"
    )
    for name, value in {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {
        "GROUP_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    start = "torchrun --nproc_per_node 2 --nnodes 2 --node_rank 1 --master_addr a --master_port 1 finetune.py"
    assert command_to_continue([], script="finetune.py") == f"{start} --resume_from_checkpoint true"
