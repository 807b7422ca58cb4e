"""Every generation through the real command line: one LoRA step and one full step, and what moved."""

import json
import re
import sys

import pytest
from safetensors import safe_open

from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from support import finetune_runs, processes
from support.paths import SUPPORT

TIME_LIMIT = 400  # seconds, for all runs of one kind
KINDS = {
    "full": [],
    "lora": ["--use_lora", "true", "--tune_llm", "false", "--tune_vision", "false", "--lora_r", "4"],
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in GENERATIONS:
        make_checkpoint(folder / name, name, size="tiny")
    return folder


@pytest.fixture(scope="module")
def outputs(checkpoints, tmp_path_factory):
    """All finetune_runs, LoRA and full side by side in two processes; generation and kind -> output folder."""
    data = finetune_runs.write_data(tmp_path_factory.mktemp("data"), rows=4)
    folder = tmp_path_factory.mktemp("outputs")
    started = []
    for kind, flags in KINDS.items():
        commands = [
            [
                "--model_name_or_path", str(checkpoints / name), "--data_path", str(data),
                "--output_dir", str(folder / kind / name), "--max_steps", "1", "--per_device_train_batch_size", "4",
                "--learning_rate", "1e-2", "--lr_scheduler_type", "constant", "--logging_steps", "1",
                "--report_to", "none", "--save_strategy", "no", *flags,
            ]
            for name in GENERATIONS
        ]  # fmt: skip
        worker = SUPPORT / "several_runs.py"
        started.append(processes.Started([sys.executable, worker, json.dumps(commands)], merged=True))
    for process in started:
        done = process.end(limit=TIME_LIMIT)
        assert done.returncode == 0, done.stdout[-5000:]
    return folder


def tensors(folder, name="model.safetensors"):
    files = sorted(folder.glob("model*.safetensors")) if name.startswith("model") else [folder / name]
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}
    return found


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_full_step_moves_every_part_and_saves_the_released_layout(checkpoints, outputs, generation):
    source, output = checkpoints / generation, outputs / "full" / generation
    before, after = tensors(source), tensors(output)
    assert after.keys() == before.keys()
    row = GENERATIONS[generation]
    # A fixed table; a norm that no feature goes through.
    norm = "vit.vision_tower.vision_model.post_layernorm."
    untouched = {"resampler.pos_embed", f"{norm}weight", f"{norm}bias"}
    own = [key for key in before if not key.startswith(("apm.", "tts.", "audio_"))]
    moved = {row.part_of(key) for key in own if not before[key].equal(after[key].to(before[key].dtype))}
    assert moved == {"vision", "resampler", "embeddings", "llm"}
    still = [key for key in own if before[key].equal(after[key]) and key not in untouched]
    if row.downsample_mode == "4x":  # the tower's inner merger is skipped
        still = [key for key in still if ".vit_merger." not in key]
    # Gradients that are zero by construction, and expectations of a token that no row has, move nothing.
    # Behind the last layer's attention nothing reads an image token, where alone a partial LoRA acts.
    last = re.compile(r"model\.layers\.1\.(attention\.wo|feed_forward\.w\d)\.Plora_[AB]\.weight")
    assert all("bias" in key or last.fullmatch(key) for key in still), still
    for key in before.keys() - set(own):
        assert before[key].equal(after[key]), key
    files = {path.name for path in source.iterdir() if not path.name.startswith("model")}
    assert files <= {path.name for path in output.iterdir()}
    config, wanted = (json.loads((folder / "config.json").read_text()) for folder in (output, source))
    # transformers' own classes (4.6, 4.7) may write defaults of theirs besides.
    assert config.keys() >= wanted.keys() if row.downsampling else config == wanted


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_lora_step_saves_the_adapter_and_what_trains_in_full_beside_it_and_nothing_frozen(
    outputs, generation
):
    saved = tensors(outputs / "lora" / generation, "adapter_model.safetensors")
    row = GENERATIONS[generation]
    # In 4.6 and 4.7 the output layer is the embeddings' transpose, so it trains and is saved with them.
    parts = {row.part_of(key) for key in saved if not (row.downsampling and "lm_head" in key)}
    assert parts == {"lora", *row.adapter_parts} - {"vision", "audio"}
    layers = ("self_attn",) if row.family != "xcomposer2" else ("attention.w", "feed_forward.w")
    assert all(any(layer in key for layer in layers) for key in saved if "lora_" in key)
    assert any(saved[key].abs().max() > 0 for key in saved if "lora_B" in key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_loss_is_logged_and_finite(outputs, generation, kind):
    lines = finetune_runs.losses(outputs / kind / generation)
    assert len(lines) == 1
    assert 0 < lines[0]["loss"] < 20
    assert 0 < lines[0]["grad_norm"] < 1e4
