"""The launchers, under sh and bash, with a torchrun that records how it was called."""

import os
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest

from minicpm_tune.settings.arguments import parse_arguments
from support import processes
from support.launcher_stage import Stage
from support.paths import FINETUNE

LAUNCHERS = ("finetune_lora.sh", "finetune_ds.sh")
ALL_LAUNCHERS = (*LAUNCHERS, "finetune.sh")
SHELLS = [shell for shell in ("dash", "bash", "sh", "busybox sh") if shutil.which(shell.split()[0])]


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("launcher", ALL_LAUNCHERS)
def test_variables_reach_the_program_from_any_folder_whatever_is_in_them(launcher, shell, stage):
    odd = 'it\'s a "folder" with $HOME, `ticks` & ünïcode/rows.json'
    values = {
        "GPUS_PER_NODE": "3",
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "7001",
        "MODEL": f"models/{odd}",
        "DATA": odd,
        "EVAL_DATA": f"eval {odd}",
        "LLM_TYPE": "qwen",
        "MODEL_MAX_Length": "1234",
        "OUTPUT_DIR": "out put",
    }
    done, call = stage.start(launcher, "--seed", "7 8", "", shell=shell, cwd="/", **values)
    assert done.stderr == ""
    assert (call.cwd, Path(call.program)) == ("/", FINETUNE / "finetune.py")
    flags = {
        "--nproc_per_node": "GPUS_PER_NODE",
        "--nnodes": "NNODES",
        "--node_rank": "NODE_RANK",
        "--master_addr": "MASTER_ADDR",
        "--master_port": "MASTER_PORT",
        "--model_name_or_path": "MODEL",
        "--data_path": "DATA",
        "--eval_data_path": "EVAL_DATA",
        "--llm_type": "LLM_TYPE",
        "--model_max_length": "MODEL_MAX_Length",
        "--output_dir": "OUTPUT_DIR",
    }
    assert {flag: call.value(flag) for flag in flags} == {flag: values[name] for flag, name in flags.items()}
    assert call.argv[-3:] == ["--seed", "7 8", ""]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_launcher_works_beside_the_user_and_in_a_folder_with_odd_characters(shell, stage):
    copy = stage.folder / 'it\'s "here" & ünï'
    copy.mkdir()
    for name in ("finetune_lora.sh", "launcher.sh"):
        shutil.copy(FINETUNE / name, copy)
    _, call = stage.start("", shell=shell, cwd=copy, script="finetune_lora.sh", MODEL="m", DATA="d")
    assert (call.cwd, call.program) == (str(copy), str(copy / "finetune.py"))
    _, call = stage.start("", shell=shell, script=copy / "finetune_lora.sh", MODEL="m", DATA="d")
    assert (call.cwd, call.program) == (str(stage.folder), str(copy / "finetune.py"))


@pytest.mark.parametrize("launcher", ALL_LAUNCHERS)
def test_what_is_not_set_follows_the_machine(launcher, stage):
    stage.hardware("gpu 4 bf16 16 6001")
    _, call = stage.start(launcher, MODEL="m", DATA="d")
    assert (call.value("--nproc_per_node"), call.value("--nnodes")) == ("4", "1")
    assert (call.value("--bf16"), call.value("--bf16_full_eval"), call.value("--fp16")) == (
        "true",
        "true",
        "false",
    )
    assert "OMP_NUM_THREADS" not in call.env
    assert "OMP_WAIT_POLICY" not in call.env
    assert call.env["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    _, call = stage.start(launcher, MODEL="m", DATA="d", PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:512")
    assert "PYTORCH_ALLOC_CONF" not in call.env
    stage.hardware("gpu 1 fp16 16 6001")
    _, call = stage.start(launcher, MODEL="m", DATA="d")
    assert (call.value("--bf16"), call.value("--fp16"), call.value("--fp16_full_eval")) == (
        "false",
        "true",
        "true",
    )
    stage.hardware("cpu 1 fp32 8 6001")
    _, call = stage.start(launcher, MODEL="m", DATA="d", GPUS_PER_NODE="2")
    assert (call.value("--bf16"), call.value("--fp16")) == ("false", "false")
    assert call.env["OMP_NUM_THREADS"] == "4"
    assert call.env["OMP_WAIT_POLICY"] == "passive"
    _, call = stage.start(launcher, MODEL="m", DATA="d", OMP_NUM_THREADS="3")
    assert call.env["OMP_NUM_THREADS"] == "3"
    assert not {"ACCELERATE_USE_CPU", "PYTORCH_ALLOC_CONF"} & set(call.env)


def test_the_users_precision_is_not_contradicted(stage):
    stage.hardware("gpu 1 bf16 16 6001")
    _, call = stage.start("finetune_ds.sh", "--fp16", "true", MODEL="m", DATA="d")
    assert (call.value("--bf16"), call.value("--fp16")) == ("false", "true")
    _, call = stage.start("finetune_ds.sh", "--bf16=true", MODEL="m", DATA="d")
    assert (call.value("--bf16"), call.argv[-1]) == ("false", "--bf16=true")
    _, call = stage.start("finetune_ds.sh", MODEL="m", DATA="d", PRECISION="fp32")
    assert (call.value("--bf16"), call.value("--fp16")) == ("false", "false")
    done, _ = stage.start("finetune_ds.sh", MODEL="m", DATA="d", PRECISION="int8")
    assert done.returncode == 1
    assert "PRECISION is 'int8', expected bf16, fp16 or fp32" in done.stderr


def test_epochs_that_are_asked_for_are_not_overruled_by_the_steps(stage):
    _, call = stage.start("finetune_lora.sh", MODEL="m", DATA="d")
    assert call.value("--max_steps") == "10000"
    _, call = stage.start("finetune_lora.sh", "--num_train_epochs", "2", MODEL="m", DATA="d")
    assert call.value("--max_steps") == "-1"


def test_a_port_in_use_is_replaced_on_one_machine_only_and_named(stage):
    stage.hardware("cpu 1 fp32 8 45454")
    done, call = stage.start("finetune_lora.sh", MODEL="m", DATA="d")
    assert call.value("--master_port") == "45454"
    assert "Port 6001 is in use on this machine; using 45454" in done.stderr
    done, call = stage.start("finetune_lora.sh", MODEL="m", DATA="d", NNODES="2")
    assert (call.value("--master_port"), done.stderr) == ("6001", "")


@pytest.mark.parametrize("shell", SHELLS)
def test_restarts_go_on_from_the_last_checkpoint_and_nothing_contradicts_it(stage, shell):
    _, call = stage.start(
        "finetune_lora.sh", "--seed", "1", shell=shell, MODEL="m", DATA="d", MAX_RESTARTS="3"
    )
    assert call.value("--max_restarts") == "3"
    assert call.argv[-4:] == ["--seed", "1", "--resume_from_checkpoint", "true"]
    for words in (["--resume_from_checkpoint", "true"], ["--resume_from_checkpoint=true"]):
        done, _ = stage.start("finetune_lora.sh", *words, shell=shell, MODEL="m", DATA="d", MAX_RESTARTS="3")
        assert done.returncode == 0, done.stderr
    for words in (
        ["--resume_from_checkpoint", "a/path"],
        ["--overwrite_output_dir"],
        ["--overwrite_output_dir=true"],
    ):
        done, _ = stage.start("finetune_lora.sh", *words, shell=shell, MODEL="m", DATA="d", MAX_RESTARTS="3")
        assert done.returncode == 1
        assert "With MAX_RESTARTS a run goes on from the last checkpoint" in done.stderr


def meeting(call):
    """The options of torchrun that say how processes find each other."""
    words = call.torchrun[1 : call.torchrun.index("--max_restarts")]
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize("shell", SHELLS)
def test_restarts_never_meet_at_a_store_that_outlives_a_start(stage, shell):
    shared = {"shell": shell, "MODEL": "m", "DATA": "d", "MAX_RESTARTS": "3"}
    _, call = stage.start("finetune_lora.sh", **shared)
    alone = {"--rdzv_backend": "c10d", "--rdzv_endpoint": "localhost:0", "--rdzv_id": "finetune"}
    assert meeting(call) == alone
    assert call.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    for rank, host in (("0", "1"), ("1", "0")):
        machines = {"NNODES": "2", "NODE_RANK": rank, "MASTER_ADDR": "10.0.0.1"}
        _, call = stage.start("finetune_lora.sh", **shared, **machines)
        assert meeting(call) == {
            "--rdzv_backend": "c10d",
            "--rdzv_endpoint": "10.0.0.1:6001",
            "--rdzv_id": "finetune",
            "--rdzv_conf": f"is_host={host}",
        }
    _, call = stage.start("finetune_lora.sh", **shared, NNODES="2", RDZV="10.0.0.2:7", RDZV_ID="two")
    assert meeting(call) == {"--rdzv_backend": "c10d", "--rdzv_endpoint": "10.0.0.2:7", "--rdzv_id": "two"}


@pytest.mark.parametrize("number", ["0", "two", "-1"])
def test_a_wrong_number_of_processes_is_refused(number, stage):
    done, _ = stage.start("finetune_lora.sh", MODEL="m", DATA="d", GPUS_PER_NODE=number)
    assert done.returncode == 1
    assert f"GPUS_PER_NODE is '{number}', expected a number from 1" in done.stderr


def test_without_evaluation_rows_nothing_asks_for_evaluation(stage):
    _, call = stage.start("finetune_lora.sh", MODEL="m", DATA="d")
    assert "--eval_data_path" not in call.argv
    assert "--do_eval" not in call.argv
    assert call.value("--eval_strategy") == "no"
    _, call = stage.start("finetune_lora.sh", MODEL="m", DATA="d", EVAL_DATA="e")
    assert call.value("--eval_strategy") == "steps"
    assert "--do_eval" in call.argv
    for words in (("--eval_split", "0.1"), ("--eval_split=0.1",)):
        _, call = stage.start("finetune_lora.sh", *words, MODEL="m", DATA="d")
        assert call.value("--eval_strategy") == "steps"
        assert "--do_eval" in call.argv
        assert "--eval_data_path" not in call.argv


def test_deepspeed_can_be_replaced_or_left_out(stage):
    _, call = stage.start("finetune_ds.sh", MODEL="m", DATA="d")
    assert call.value("--deepspeed") == "ds_config_zero2.json"
    _, call = stage.start("finetune_ds.sh", MODEL="m", DATA="d", DEEPSPEED="ds_config_zero3.json")
    assert call.value("--deepspeed") == "ds_config_zero3.json"
    _, call = stage.start("finetune_ds.sh", MODEL="m", DATA="d", DEEPSPEED="")
    assert "--deepspeed" not in call.argv


def test_finetune_sh_is_finetune_ds_sh_with_the_values_of_the_xcomposer_guide(stage):
    _, call = stage.start("finetune.sh", MODEL="m")
    expected = {
        "--data_path": "data.txt", "--model_max_length": "4096", "--num_train_epochs": "1", "--max_steps": "-1",
        "--gradient_accumulation_steps": "8", "--learning_rate": "1e-5", "--save_strategy": "epoch",
        "--tune_llm": "true", "--tune_vision": "true", "--deepspeed": "ds_config_zero2.json",
    }  # fmt: skip
    assert {flag: call.value(flag) for flag in expected} == expected
    assert not {"--img_size", "--hd_num"} & set(call.argv)
    chosen = {"IMG_SIZE": "490", "HD_NUM": "-1", "MAX_STEPS": "7"}
    _, call = stage.start("finetune.sh", "--learning_rate", "3e-5", MODEL="m", **chosen)
    assert (call.value("--img_size"), call.value("--hd_num")) == ("490", "-1")
    assert (call.value("--max_steps"), call.value("--learning_rate")) == ("7", "3e-5")
    assert "--num_train_epochs" not in call.argv


def test_full_means_full_and_lora_means_lora(stage):
    _, full = stage.start("finetune_ds.sh", MODEL="m", DATA="d")
    assert (full.value("--tune_llm"), full.value("--tune_vision")) == ("true", "true")
    assert "--use_lora" not in full.argv
    _, lora = stage.start("finetune_lora.sh", MODEL="m", DATA="d")
    assert (lora.value("--tune_llm"), lora.value("--use_lora")) == ("false", "true")


@pytest.mark.parametrize("launcher", ALL_LAUNCHERS)
def test_the_parser_knows_what_the_launchers_say(launcher, stage):
    (stage.folder / "model").mkdir()
    (stage.folder / "model" / "config.json").write_text("{}")
    (stage.folder / "rows.json").write_text("[]")
    rows = str(stage.folder / "rows.json")
    _, call = stage.start(
        launcher, MODEL=str(stage.folder / "model"), DATA=rows, EVAL_DATA=rows, DEEPSPEED=""
    )
    _, _, training, lora = parse_arguments([*call.argv, "--output_dir", str(stage.folder / "out")])
    assert training.lr_scheduler_type == "cosine"
    assert training.warmup_steps == 0.01
    assert lora.lora_r == 64


def test_flags_stand_one_per_line():
    for line in (FINETUNE / "launcher.sh").read_text().splitlines():
        if line.startswith("    --") or line.startswith("    ${"):
            assert len(re.findall(r"(?<!\S)(?:\$\{\w+:\+)?--\w+", line)) <= 1, line


@pytest.mark.parametrize("shell", SHELLS)
def test_epochs_rates_and_intervals_are_variables(shell, stage):
    chosen = {"EPOCHS": "3", "LEARNING_RATE": "2e-5", "SAVE_STEPS": "20", "EVAL_STEPS": "10"}
    _, call = stage.start("finetune_lora.sh", shell=shell, MODEL="m", DATA="d", EVAL_DATA="e", **chosen)
    expected = {
        "--num_train_epochs": "3", "--max_steps": "-1", "--learning_rate": "2e-5", "--save_steps": "20",
        "--eval_steps": "10",
    }  # fmt: skip
    assert {flag: call.value(flag) for flag in expected} == expected
    _, call = stage.start("finetune_lora.sh", shell=shell, MODEL="m", DATA="d")
    assert "--num_train_epochs" not in call.argv
    assert (call.value("--learning_rate"), call.value("--save_steps")) == ("1e-6", "1000")


def test_fsdp_takes_the_place_of_deepspeed(stage):
    _, call = stage.start("finetune_ds.sh", MODEL="m", DATA="d", FSDP="full_shard auto_wrap")
    assert call.value("--fsdp") == "full_shard auto_wrap"
    assert "--deepspeed" not in call.argv


@pytest.fixture
def real(tmp_path):
    """A launcher with the real python, in a folder without a model."""
    env = {**processes.environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def start(launcher, *words, **variables):
        return processes.run(
            ["sh", FINETUNE / launcher, *words], env={**env, **variables}, cwd=tmp_path, limit=60
        )

    return start


@pytest.mark.parametrize("launcher", ALL_LAUNCHERS)
@pytest.mark.parametrize("word", ["--help", "-h", "--version"])
def test_help_and_version_are_answered_by_every_launcher(word, launcher, real):
    done = real(launcher, word)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("minicpm_tune 0." if word == "--version" else "--lora_target_modules") in done.stdout


def test_mistakes_show_before_the_hardware_is_looked_at(real):
    """A python that finds torch broken would say so first."""
    done = real("finetune_lora.sh", "--lerning_rate", "1", MODEL="nowhere", DATA="no.json", GPUS_PER_NODE="x")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: unknown argument --lerning_rate. Did you mean --learning_rate?"
    done = real("finetune_lora.sh", MODEL="nowhere", DATA="no.json", GPUS_PER_NODE="x")
    assert "1. --model_name_or_path: there is no folder 'nowhere'" in done.stderr
    assert "2. --data_path: there is no file 'no.json'" in done.stderr
    assert "GPUS_PER_NODE" not in done.stderr


def test_without_torchrun_the_same_python_starts_its_module(stage):
    (stage.bin / "torchrun").unlink()
    (stage.bin / "python").unlink()
    answer = "if sys.argv[1].endswith('hardware.py'): print('cpu 1 fp32 1 6001')"
    stage.program("python3", *stage.recorder(), answer)
    links = stage.folder / "tools"
    links.mkdir()
    for tool in ("dirname", "bash", "env"):
        (links / tool).symlink_to(shutil.which(tool))
    copy = stage.folder / "finetune"
    copy.mkdir()
    for name in ("finetune_lora.sh", "launcher.sh"):
        shutil.copy(FINETUNE / name, copy)
    path = f"{stage.bin}:{links}"
    _, call = stage.start("", script=copy / "finetune_lora.sh", MODEL="m", DATA="d", PATH=path)
    assert Path(call.torchrun[0]) == copy / "start_processes.py"


def test_a_python_without_the_requirements_says_how_to_install_them(stage):
    asked = "sys.argv[1].endswith('hardware.py')"
    stage.program("python", "import sys", f"if {asked}: raise SystemExit('No module named torch')")
    done, _ = stage.start("finetune_lora.sh", MODEL="m", DATA="d")
    assert done.returncode == 1
    assert "-m pip install -r" in done.stderr


def test_the_hardware_answer_has_five_words_and_a_free_port():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        question = [sys.executable, FINETUNE / "minicpm_tune" / "settings" / "hardware.py", port]
        done = processes.run(question, env=os.environ, limit=60)
    assert done.returncode == 0, done.stderr
    device, count, precision, cores, free = done.stdout.split()
    assert device in ("cpu", "gpu")
    assert precision in ("fp32", "fp16", "bf16")
    assert int(count) >= 1
    assert int(cores) >= 1
    assert int(free) != port


def test_a_port_taken_between_the_look_and_the_start_is_replaced(tmp_path):
    script = tmp_path / "trained.py"
    script.write_text("import os; print('port', os.environ['MASTER_PORT'])")
    with socket.socket() as other_run:
        other_run.bind(("", 0))
        other_run.listen()
        port = str(other_run.getsockname()[1])
        options = "--nproc_per_node 1 --nnodes 1 --node_rank 0 --master_addr localhost --master_port".split()
        done = processes.run(
            [sys.executable, FINETUNE / "start_processes.py", *options, port, script], limit=60
        )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()[1]
    assert found != port
    assert f"Another run has just taken port {port}; using {found}." in done.stderr
