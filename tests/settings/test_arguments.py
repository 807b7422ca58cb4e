"""The command line: official defaults, old flags, and checks that collect everything."""

import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.trainer_pt_utils import AcceleratorConfig

from minicpm_tune import output_folder
from minicpm_tune.settings.arguments import ModelArguments, TrainingArguments, parse_arguments
from minicpm_tune.settings.checks import UsageError
from minicpm_tune.settings.deepspeed_setup import read_deepspeed_config
from minicpm_tune.settings.legacy_flags import DROPPED, RENAMED, REWRITTEN, translate


def parse(*words):
    return parse_arguments(["--model_name_or_path", "model", "--data_path", "rows.json", *words])


def test_defaults_are_the_official_ones(place):
    _, data, training, lora = parse()
    assert ModelArguments().model_name_or_path == "openbmb/MiniCPM-V-2"
    assert (training.tune_vision, training.tune_llm, training.tune_resampler, training.use_lora) == (
        True,
        True,
        True,
        False,
    )
    assert (training.model_max_length, training.max_slice_nums, training.llm_type) == (2048, 9, "auto")
    assert (training.optim, training.remove_unused_columns) == ("adamw_torch", False)
    assert training.label_names == ["labels"]
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_bias) == (64, 64, 0.05, "none")
    assert lora.lora_target_modules == r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)"
    assert (lora.q_lora, lora.modules_to_save, lora.lora_weight_path) == (False, None, "")
    assert (data.eval_data_path, training.do_train, training.resume_from_checkpoint) == (None, True, None)
    assert isinstance(training, transformers.TrainingArguments)


OFFICIAL_FLAGS = """
    --llm_type minicpm --eval_data_path rows.json --remove_unused_columns false --label_names labels
    --prediction_loss_only false --bf16 false --bf16_full_eval false --fp16 false --fp16_full_eval false
    --do_train --do_eval --tune_vision true --tune_llm false --use_lora true --q_lora false
    --lora_r 8 --lora_alpha 16 --lora_dropout 0.1 --lora_target_modules all-linear --lora_bias none
    --lora_modules_to_save resampler,embed_tokens vpm --lora_layer_replication [[0,2],[1,2]]
    --lora_layers_to_transform 0 1 --lora_layers_pattern layers --lora_weight_path adapter
    --model_max_length 1200 --max_slice_nums 4 --max_steps 7 --eval_steps 3 --output_dir out
    --logging_dir logs --logging_strategy steps --per_device_train_batch_size 3
    --per_device_eval_batch_size 5 --gradient_accumulation_steps 2 --evaluation_strategy steps
    --save_strategy steps --save_steps 4 --save_total_limit 6 --learning_rate 1e-6 --weight_decay 0.1
    --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1
    --gradient_checkpointing true --report_to tensorboard --cache_dir cache --optim adamw_torch
    --attn_implementation eager --resume_from_checkpoint true --seed 3 --tune_resampler false
    --enable_thinking false --image_folder model --quant_bits 8
""".split()


def test_every_flag_of_the_official_guides_arrives(place, monkeypatch):
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    model, data, training, lora = parse(*OFFICIAL_FLAGS)
    assert (training.eval_strategy, training.warmup_steps, training.activation_checkpointing) == (
        "steps",
        0.01,
        True,
    )
    assert (training.lr_scheduler_type, training.adam_beta2, training.max_steps) == ("cosine", 0.95, 7)
    assert (training.per_device_train_batch_size, training.per_device_eval_batch_size) == (3, 5)
    assert (training.do_eval, training.use_lora, training.tune_llm, training.tune_resampler) == (
        True,
        True,
        False,
        False,
    )
    assert (training.cache_dir, training.llm_type, training.max_slice_nums) == ("cache", "minicpm", 4)
    assert lora.modules_to_save == ["resampler", "embed_tokens", "vpm"]
    assert lora.layer_replication == [(0, 2), (1, 2)]
    assert (lora.lora_layers_to_transform, lora.quant_bits, lora.lora_r) == ([0, 1], 8, 8)
    assert (model.attn_implementation, data.enable_thinking, data.image_folder) == ("eager", "false", "model")
    assert training.resume_from_checkpoint is None  # nothing there yet, so the run starts
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--evaluation_strategy steps", "--eval_strategy steps"),
        ("--evaluation-strategy=steps", "--eval_strategy steps"),
        ("--warmup_ratio 0.03", "--warmup_steps 0.03"),
        ("--gradient_checkpointing", "--activation_checkpointing"),
        ("--no_cuda true", "--use_cpu true"),
        ("--group_by_length true", "--train_sampling_strategy group_by_length"),
        ("--group_by_length false", ""),
        ("--include_inputs_for_metrics", "--include_for_metrics inputs"),
        ("--adafactor", "--optim adafactor"),
        ("--optim adamw_hf", "--optim adamw_torch"),
        ("--optim sgd", "--optim sgd"),
        ("--save_safetensors true", ""),
        ("--logging_dir x", ""),
        ("--fp16_opt_level O1", ""),
        ("--batch_size 2", "--per_device_train_batch_size 2 --per_device_eval_batch_size 2"),
        (
            "--per_device_eval_batch_size 1 --batch_size 2",
            "--per_device_eval_batch_size 1 --per_device_train_batch_size 2",
        ),
        ("--per_gpu_train_batch_size 2", "--per_device_train_batch_size 2"),
        ("--warmup_ratio 0.1 --warmup_steps 5", "--warmup_steps 5"),
    ],
)
def test_an_old_flag_becomes_its_new_form_with_one_note(old, new):
    result = translate(old.split())
    assert " ".join(result.argv) == new
    expected_notes = 0 if old == new else 1
    assert len(result.notes) == expected_notes


def test_every_dropped_and_renamed_flag_is_really_gone_or_deprecated_in_transformers():
    known = {item.name for item in dataclasses.fields(transformers.TrainingArguments)}
    deprecated = {"gradient_checkpointing", "gradient_checkpointing_kwargs", "optim"}
    assert not (set(RENAMED) | set(DROPPED) | set(REWRITTEN)) & known - deprecated
    assert set(RENAMED.values()) <= known | {"model_max_length"}


@pytest.mark.parametrize("words", ["--warmup_ratio 5", "--warmup_ratio many", "--save_safetensors false"])
def test_an_old_flag_without_counterpart_is_an_error(words, place):
    with pytest.raises(UsageError, match=words.split()[0]):
        translate(words.split())
    with pytest.raises(UsageError, match=words.split()[0]):
        parse(*words.split())


PROBLEMS = [
    ("--use_lora true", "The model cannot simultaneously adjust LLM parameters and apply LoRA."),
    ("--tune_llm false --tune_vision false --tune_resampler false", "Nothing would be trained"),
    ("--q_lora true", "--q_lora true needs --use_lora true"),
    (
        "--use_lora true --tune_llm false --q_lora true --quant_bits 8 --fsdp true",
        "--quant_bits 8 can't be divided by --fsdp",
    ),
    (
        "--use_lora true --tune_llm false --lora_layers_pattern layers",
        "--lora_layers_pattern acts only together with --lora_layers_to_transform",
    ),
    ("--lora_weight_path model", "--lora_weight_path is given, but --use_lora is false"),
    ("--use_lora true --tune_llm false --lora_weight_path model", "no adapter_config.json in 'model'"),
    ("--new_tokens none.txt", "--new_tokens none.txt: no such file"),
    (
        "--new_tokens none.txt --tune_llm false",
        "--new_tokens is given, but the embeddings don't train: they do with --tune_llm or --use_lora",
    ),
    ("--lora_layer_replication 0-4", "--lora_layer_replication is '0-4'"),
    ("--lora_layer_replication [[0,-1]]", "--lora_layer_replication is"),
    ("--lora_r 0", "--lora_r is 0, expected at least 1"),
    ("--model_max_length 0", "--model_max_length is 0"),
    ("--max_slice_nums 0", "--max_slice_nums is 0"),
    ("--per_device_train_batch_size 0", "--per_device_train_batch_size is 0"),
    ("--learning_rate -1", "--learning_rate is -1.0, expected 0 or more"),
    ("--learning_rate nan", "--learning_rate is nan"),
    ("--lora_dropout 1", "--lora_dropout is 1.0"),
    ("--model_name_or_path missing", "there is no folder 'missing'"),
    ("--model_name_or_path ./a/b", "there is no folder './a/b'"),
    ("--model_name_or_path .", "is a folder without config.json"),
    ("--model_name_or_path adapter", "is an adapter, not a model"),
    ("--data_path missing.json", "--data_path: there is no file 'missing.json'"),
    ("--eval_data_path missing.json", "--eval_data_path: there is no file"),
    ("--do_eval", "--do_eval needs --eval_data_path"),
    ("--eval_strategy steps", "--eval_strategy steps needs --eval_data_path"),
    ("--eval_split 0.1 --do_eval --eval_data_path rows.json", "--eval_split and --eval_data_path both name"),
    ("--eval_split 0.1", "--eval_split 0.1 would hold rows out of training that nothing evaluates"),
    (
        "--eval_split 1.5 --do_eval",
        "--eval_split is 1.5, expected a fraction such as 0.01, or a whole number",
    ),
    ("--eval_split nan --do_eval", "--eval_split is nan, expected a fraction"),
    ("--eval_max_samples 5", "--eval_max_samples is given, but there are no evaluation rows"),
    ("--do_train false", "leaves nothing to do"),
    ("--image_folder rows.json", "--image_folder: 'rows.json' is a file, expected a folder"),
    ("--model_name_or_path rows.json", "--model_name_or_path 'rows.json' is a file, expected a folder"),
    ("--image_folder nowhere", "--image_folder: 'nowhere' does not exist"),
    ("--fp16 true --use_cpu", "--fp16 true needs a GPU"),
    ("--fp16_full_eval true --use_cpu", "--fp16_full_eval true needs a GPU"),
    ("--bf16 true --fp16 true", "contradict each other"),
    ("--attn_implementation flash_attention_2 --use_cpu", "flash_attention_2 needs a GPU"),
    ("--remove_unused_columns true", "--remove_unused_columns true is not supported: rows hold more"),
    ("--label_names answers", "--label_names answers is not supported: a row's labels are called labels"),
    ("--label_smoothing_factor 0.1", "--label_smoothing_factor 0.1 is not supported: the loss never builds"),
    ("--do_predict", "--do_predict true is not supported: predict.py answers"),
    ("--deepspeed ds_config_zero4.json", "--deepspeed: no file 'ds_config_zero4.json'"),
    ("--deepspeed rows.json", "found a list, expected a JSON object"),
    ("--deepspeed broken.json", "broken.json, line 1"),
    ("--output_dir rows.json", "is a file"),
    ("--resume_from_checkpoint model", "'model' is not a complete checkpoint"),
    ("--overwrite_output_dir --resume_from_checkpoint", "contradict each other. Keep one."),
    ("--learning_rat 1", "unknown argument --learning_rat. Did you mean --learning_rate?"),
    ("--lerning-rate 1", "unknown argument --lerning_rate. Did you mean --learning_rate?"),
    ("--qwertzuiop", "unknown argument --qwertzuiop. finetune.py --help-all lists"),
    ("--early_stop 3", "unknown argument --early_stop. Did you mean --early_stopping"),
    ("--cutoff_len 9", "unknown argument --cutoff_len. Here it is --model_max_length."),
    (
        "--freeze_vit true",
        "unknown argument --freeze_vit. Here it is --tune_vision, with the opposite value.",
    ),
    ("--fp32_residual_connection false", "--fp32_residual_connection false needs --bf16 true"),
    (
        "--fp32_residual_connection true --deepspeed ds_config_zero2.json",
        "--fp32_residual_connection: --deepspeed holds the model itself in 16 bit",
    ),
    ("--packing maybe", "--packing: found 'maybe', expected true or false. finetune.py"),
    ("--model_max 5", "unknown argument --model_max. Did you mean --model_max_length?"),
    ("--bf16 false true", "unrecognized arguments: true"),
    ("--eval_strategy sometimes", "--eval_strategy: found 'sometimes', expected one of no, steps, epoch."),
    ("--llm_type bert", "--llm_type: found 'bert', expected one of auto"),
    ("--lora_r many", "--lora_r: found 'many', expected a whole number."),
]


@pytest.mark.parametrize(("words", "message"), PROBLEMS, ids=[words for words, _ in PROBLEMS])
def test_a_wrong_command_line_says_what_to_change(words, message, place):
    (place / "broken.json").write_text("{'a': 1}")
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=re.escape(message)):
        parse(*words.split())


def test_all_problems_are_reported_at_once(place):
    with pytest.raises(UsageError) as caught:
        parse("--lora_r", "0", "--do_eval", "--deepspeed", "x.json", "--model_name_or_path", "y")
    text = str(caught.value)
    assert text.startswith("4 problems with the command line:\n  1. ")
    assert all(flag in text for flag in ("--lora_r", "--do_eval", "--deepspeed", "--model_name_or_path"))


def test_a_hub_id_and_a_counted_data_file_are_accepted(place):
    model, data, *_ = parse("--model_name_or_path", "openbmb/MiniCPM-V-2_6", "--data_path", "rows.json#50")
    assert (model.model_name_or_path, data.data_path) == ("openbmb/MiniCPM-V-2_6", "rows.json#50")


def test_evaluating_alone_needs_no_training_rows(place):
    words = ["--model_name_or_path", "model", "--do_eval", "--eval_data_path", "rows.json"]
    _, _, training, _ = parse_arguments(words)
    assert (training.do_train, training.do_eval) == (False, True)


def checkpoint(folder, step, complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("")
    if complete:
        (path / "trainer_state.json").write_text("{}")
    return path


def test_an_output_folder_with_a_finished_run_is_refused_unless_told_what_to_do(place):
    checkpoint(place / "out", 9)
    checkpoint(place / "out", 10)
    checkpoint(place / "out", 11, complete=False)
    with pytest.raises(UsageError, match=r"an unfinished run \(checkpoint-10\)"):
        parse("--output_dir", "out")
    (place / "out" / "adapter_model.safetensors").write_text("")
    with pytest.raises(UsageError, match="a finished run"):
        parse("--output_dir", "out")
    _, _, training, _ = parse("--output_dir", "out", "--resume_from_checkpoint", "true")
    assert Path(training.resume_from_checkpoint) == Path("out/checkpoint-10")
    _, _, training, _ = parse("--output_dir", "out", "--resume_from_checkpoint", "out/checkpoint-9")
    assert training.resume_from_checkpoint == "out/checkpoint-9"
    _, _, training, _ = parse("--output_dir", "out", "--overwrite_output_dir", "true")
    assert training.resume_from_checkpoint is None


def test_other_files_in_the_output_folder_are_nobodys_business(place):
    (place / "out").mkdir()
    (place / "out" / "notes.txt").write_text("mine")
    parse("--output_dir", "out")


def test_clearing_an_output_folder_takes_all_of_the_model_and_leaves_other_files(tmp_path):
    """An export overwrites no tokenizer, so that of another base would stay."""
    checkpoint(tmp_path, 3)
    weights = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    beside = ("config.json", "tokenizer.json", "preprocessor_config.json", "modeling_minicpmv.py")
    others = ["new_tokens.txt", "notes.txt", "run.json", "train.py"]
    for name in (*weights, *beside, *others):
        (tmp_path / name).write_text("")
    output_folder.remove_earlier_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == others
    assert not output_folder.find_earlier_run(tmp_path)


@pytest.mark.parametrize(
    ("flags", "config", "expected"),
    [
        ({}, None, "adamw_torch_fused"),
        ({"bf16": True}, None, "adamw_torch_fused"),
        ({"fp16": True}, None, "adamw_torch"),
        ({"fp16": True}, {"zero_optimization": {"stage": 2}}, "adamw_torch_fused"),
        ({}, {"optimizer": {"type": "AdamW"}}, "adamw_torch"),
        ({"use_cpu": True}, None, "adamw_torch"),
    ],
)
def test_the_optimizer_follows_machine_and_precision(monkeypatch, flags, config, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values = {"use_cpu": False, "fp16": False, "deepspeed": config, **flags}
    assert TrainingArguments.default_optimizer(SimpleNamespace(**values)) == expected


def test_the_log_says_where_the_fused_optimizer_runs(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level("INFO"):
        for name in ("ds_config_zero2.json", "ds_config_zero2_offload.json"):
            config = read_deepspeed_config(name)
            TrainingArguments.default_optimizer(SimpleNamespace(use_cpu=False, fp16=False, deepspeed=config))
    assert [record.getMessage() for record in caplog.records] == [
        "--optim adamw_torch_fused is used, on the GPU.",
        "--optim adamw_torch_fused is used, on the CPU, where its states are.",
    ]


def test_batches_are_copied_without_blocking_where_memory_is_pinned(monkeypatch):
    for pinned in (True, False):
        options = SimpleNamespace(
            dataloader_num_workers=0, dataloader_persistent_workers=True, dataloader_pin_memory=pinned,
            use_cpu=False, accelerator_config=None,
        )  # fmt: skip
        TrainingArguments.set_loading_defaults(options)
        assert options.accelerator_config == ({"non_blocking": True} if pinned else None)
    assert "non_blocking" in {field.name for field in dataclasses.fields(AcceleratorConfig)}
