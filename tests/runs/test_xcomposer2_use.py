"""InternLM-XComposer2 from the command line: its guide's flags, chat, prediction, merging, 4 bit, plans, real runs."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import chat as chat_command
import inspect_data
import merge_lora
import plan_memory
import predict
import quantize
from minicpm_tune.answering.chat import MessageError, place_pictures, read_messages
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.checkpoints.weight_files import tensor_names
from minicpm_tune.data.samples import load_processing
from minicpm_tune.models.loading import load_model
from minicpm_tune.settings.arguments import parse_arguments
from minicpm_tune.settings.data_arguments import DataArguments
from minicpm_tune.settings.legacy_flags import translate
from support import finetune_runs, processes
from support.tiny_checkpoints import checkpoint
from support.xcomposer2_cases import THREE

FINETUNE = finetune_runs.ROOT / "finetune"
TIME_LIMIT = 400  # seconds, for one launcher
LOSS_TOLERANCE = 1e-4
# What the guide's scripts say; model, data and folder are put in by the test.
GUIDE = (
    "--img_size 490 --hd_num -1 --given_num True --bf16 True --fix_vit {vit} --fix_sampler {sampler} --use_lora {lora} "
    "--num_train_epochs 1 --batch_size 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 "
    "--gradient_accumulation_steps 8 --evaluation_strategy no --save_strategy epoch --save_total_limit 1 "
    "--learning_rate 1e-5 --weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine "
    "--logging_steps 1 --report_to none --max_length 4096 --gradient_checkpointing True"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows in the guide's form: several images, one without a mark, text alone; and its data.txt."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(3)
    for number, size in enumerate(((60, 40), (40, 90), (56, 56))):
        pixels = random.randint(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")

    def row(images, *texts):
        turns = [
            {"from": "assistant" if number % 2 else "user", "value": text}
            for number, text in enumerate(texts)
        ]
        return {"conversations": turns} | ({"image": images} if images else {})

    seen = [
        row(["0.png", "1.png"], "<ImageHere> <ImageHere>Compare the two.", "The second is taller."),
        row(["2.png"], "<ImageHere> what is it", "Noise.", "Are you sure?", "Yes, it is noise."),
        row(["1.png"], "Describe it.", "A tall one."),
    ]
    text = [row([], "Hello", "Hello, how can I help?"), row([], "Who are you?", "A model.")]
    (folder / "vl_data.json").write_text(json.dumps(seen))
    (folder / "text_data.json").write_text(json.dumps(text))
    (folder / "data.txt").write_text("vl_data.json 0.006\ntext_data.json 0.002\n")
    return folder


# --- flags ---


def test_the_guides_commands_are_understood(data, tmp_path):
    folder = checkpoint("xc2_7b")
    start = [
        "--model_name_or_path",
        str(folder),
        "--data_path",
        str(data / "data.txt"),
        "--output_dir",
        str(tmp_path),
    ]
    words = (
        GUIDE.format(vit="True", sampler="False", lora="False").replace("--bf16 True", "--bf16 False").split()
    )
    _, data_args, training, _ = parse_arguments([*start, *words])
    assert (training.tune_vision, training.tune_resampler, training.tune_llm) == (False, True, True)
    assert (training.model_max_length, training.per_device_train_batch_size) == (4096, 1)
    assert (data_args.img_size, data_args.hd_num, data_args.given_num) == (490, -1, True)


@pytest.mark.parametrize(("old", "new"), [
    ("--fix_vit True", "--tune_vision false"), ("--fix_vit False", "--tune_vision true"),
    ("--fix_sampler True", "--tune_resampler false"), ("--fix_sampler false", "--tune_resampler true"),
    ("--max_length 4096", "--model_max_length 4096"),
])  # fmt: skip
def test_each_of_the_guides_own_flags_is_mapped_and_said(old, new):
    translation = translate(old.split())
    assert translation.argv == new.split()
    assert translation.notes == [f"{old} is now {new}."]


def test_amounts_count_unless_given_num_says_otherwise(data):
    from dataset import SupervisedDataset

    for given_num, expected in ((True, 8), (False, 5)):
        rules = load_processing(checkpoint("xc2_7b"), DataArguments.of_checkpoint(given_num=given_num))
        assert len(SupervisedDataset(data / "data.txt", rules)) == expected


# --- asking ---


def test_pictures_stand_where_the_question_says_or_in_front(loaded_chat):
    question = "First picture:<ImageHere>, second picture:<ImageHere>. Compare."
    pictures = [Image.new("RGB", (9, 9)), Image.new("RGB", (8, 8))]
    content = place_pictures(question, pictures)
    assert content == ["First picture:", pictures[0], ", second picture:", pictures[1], ". Compare."]
    assert place_pictures("Compare.", pictures) == [*pictures, "Compare."]
    with pytest.raises(MessageError, match="2 <ImageHere> for 1 pictures"):
        place_pictures(question, pictures[:1])
    turns, _ = read_messages([{"role": "user", "content": content}], joined_by="")
    assert turns[0].text == "First picture:, second picture:. Compare."


@pytest.fixture
def loaded_chat():
    return checkpoint("xc2_7b")


@pytest.mark.parametrize("name", THREE)
def test_chat_answers_about_several_pictures(name, data, capsys):
    shown = ["--image", str(data / "0.png"), "--image", str(data / "1.png")]
    command = ["--model_name_or_path", str(checkpoint(name)), *shown]
    question = "First: <ImageHere>, second: <ImageHere>. Compare."
    words = [*command, "--question", question, "--max_new_tokens", "4", "--sampling", "false"]
    assert chat_command.main(words) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_predict_answers_the_guides_rows(data, tmp_path):
    output = tmp_path / "answers.jsonl"
    words = ["--model_name_or_path", str(checkpoint("xc2_7b")), "--data_path", str(data / "vl_data.json")]
    assert predict.main([*words, "--output", str(output), "--max_new_tokens", "4", "--batch_size", "3"]) == 0
    assert len(output.read_text().splitlines()) == 3


def test_inspect_data_shows_a_row_and_the_sizes(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "--model_name_or_path",
        str(checkpoint("xc2_4khd_7b")),
        "--data_path",
        str(data / "vl_data.json"),
    ]
    assert inspect_data.main([*words, "--hd_num", "4", "--workers", "1"]) == 0
    assert inspect_data.main([*words, "--hd_num", "4", "--show", "0"]) == 0
    shown = capsys.readouterr().out
    assert "[[The second is taller.[UNUSED_TOKEN_145]]]" in shown


def test_a_contradicting_size_ends_the_command_with_the_right_one(data, capsys):
    words = ["--model_name_or_path", str(checkpoint("xc2_7b")), "--data_path", str(data / "vl_data.json")]
    assert inspect_data.main([*words, "--img_size", "490", "--workers", "1"]) == 1
    assert "--img_size: found 490, expected 112" in capsys.readouterr().err


# --- memory ---


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_memory_is_planned(name, method, capsys):
    words = ["--model_name_or_path", str(checkpoint(name)), "--method", method, "--model_max_length", "600"]
    assert plan_memory.main(words) == 0
    assert GENERATIONS[name].title in capsys.readouterr().out


# --- 4 bit and merging ---


def test_a_4_bit_copy_loads_with_its_partial_lora(tmp_path):
    name = "xc2_7b"
    assert (
        quantize.main(["--model_name_or_path", str(checkpoint(name)), "--output_dir", str(tmp_path / "int4")])
        == 0
    )
    model = load_model(tmp_path / "int4", dtype=torch.float32)
    exact = load_model(checkpoint(name), dtype=torch.float32)
    key = "model.layers.0.attention.wqkv.Plora_A.weight"
    assert torch.equal(model.get_parameter(key).float(), exact.get_parameter(key))


# --- real runs ---


def launched(launcher, name, data, output, *flags, limit=TIME_LIMIT, **variables):
    """Start a launcher as a user does; give the losses it logged."""
    environment = processes.environment() | {
        "MODEL": str(checkpoint(name)), "DATA": str(data), "OUTPUT_DIR": str(output), "PRECISION": "fp32",
        "MAX_STEPS": "2", "MASTER_PORT": "0", **variables,
    }  # fmt: skip
    environment["PATH"] = f"{sys.prefix}/bin:{environment['PATH']}"
    words = [
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--save_strategy", "no",
        "--report_to", "none", "--logging_steps", "1", "--learning_rate", "1e-3", *flags,
    ]  # fmt: skip
    done = processes.run(["bash", FINETUNE / launcher, *words], env=environment, limit=limit)
    assert done.returncode == 0, done.stderr[-6000:]
    return [line["loss"] for line in finetune_runs.losses(output)]


KINDS = {"full": ("finetune.sh",), "lora": ("finetune_lora.sh", "--fix_vit", "True", "--lora_r", "4")}


def check_run(kind, name, data, folder, stage, *flags, processes=2):
    launcher, *own = KINDS[kind]
    config = f"ds_config_zero{stage}.json"
    losses = launched(
        launcher,
        name,
        data / "data.txt",
        folder / "out",
        *own,
        *flags,
        DEEPSPEED=config,
        GPUS_PER_NODE=str(processes),
    )
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    if kind == "full":
        assert tensor_names(folder / "out") == tensor_names(checkpoint(name))
        return
    merged = ["--adapter", str(folder / "out"), "--output_dir", str(folder / "merged")]
    assert merge_lora.main(merged) == 0
    assert tensor_names(folder / "merged") == tensor_names(checkpoint(name))


def mixed_rows(data, folder):
    """Two rows: of two processes one sees text alone, the other an image, in every step."""
    rows = [json.loads((data / name).read_text())[1] for name in ("vl_data.json", "text_data.json")]
    rows[0]["image"] = [str(data / rows[0]["image"][0])]
    path = folder / "mixed.json"
    path.write_text(json.dumps(rows))
    return path


def test_text_alone_beside_images_trains_under_zero_3(data, tmp_path):
    rows = mixed_rows(data, tmp_path)
    flags = ("--per_device_train_batch_size", "1")
    variables = {"DEEPSPEED": "ds_config_zero3.json", "GPUS_PER_NODE": "2"}
    losses = launched("finetune.sh", "xc2_7b", rows, tmp_path / "out", *flags, **variables)
    assert all(0 < loss < 20 for loss in losses)
    assert tensor_names(tmp_path / "out") == tensor_names(checkpoint("xc2_7b"))


def test_a_lora_run_under_zero_2_merges(data, tmp_path):
    check_run("lora", "xc2_4khd_7b", data, tmp_path, 2, "--hd_num", "4", processes=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xc2_7b", "xc2_4khd_7b"])
def test_losses_under_zero_3_are_those_of_one_process(name, data, tmp_path):
    """Without the partial LoRA's dropout, which draws its own numbers in every process."""
    base = tmp_path / "base"
    shutil.copytree(checkpoint(name), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"plora_dropout": 0.0}))
    rows = mixed_rows(data, tmp_path)
    shared = ("--model_name_or_path", str(base), *(("--hd_num", "4") if "4khd" in name else ()))
    one = launched("finetune.sh", name, rows, tmp_path / "one", *shared, DEEPSPEED="", GPUS_PER_NODE="1")
    batch = ("--per_device_train_batch_size", "1")
    variables = {"DEEPSPEED": "ds_config_zero3.json", "GPUS_PER_NODE": "2"}
    two = launched("finetune.sh", name, rows, tmp_path / "two", *shared, *batch, **variables)
    assert two == pytest.approx(one, abs=LOSS_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", THREE)
def test_every_model_trains_with_both_launchers_under_both_stages(name, kind, stage, data, tmp_path):
    check_run(kind, name, data, tmp_path, stage, *(("--hd_num", "4") if "4khd" in name else ()))
