"""What the small commands share: flags that are checked, places that are written to, and a quiet screen."""

import sys

import pytest

import chat
import merge_lora
import plan_memory
import predict
import quantize
from support import processes
from support.paths import FINETUNE, IMAGES
from support.tiny_checkpoints import checkpoint, saved_adapter

NEEDED = {
    chat: ["--question", "x"],
    predict: ["--data_path", "x", "--output", "x"],
    merge_lora: ["--adapter", "x", "--output_dir", "x"],
    quantize: ["--model_name_or_path", "x", "--output_dir", "x"],
    plan_memory: ["--model_name_or_path", "x"],
}


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (merge_lora, ["--adpter", "x"], "unknown flag --adpter; did you mean --adapter?"),
        (quantize, ["--outputdir=x"], "unknown flag --outputdir; did you mean --output_dir?"),
        (plan_memory, ["--zzz"], "unknown flag --zzz."),
        (chat, ["--adapter", "a", "--adapter=b"], "--adapter is given twice; give it once."),
        (chat, ["--load_4bit", "maybe"], "--load_4bit: found 'maybe', expected true or false. chat.py"),
        (chat, ["--max_new_tokens", "0"], "--max_new_tokens: found '0', expected a whole number from 1 on"),
        (chat, ["--temperature", "0"], "--temperature: found '0', expected a number above 0"),
        (chat, ["--temperature", "nan"], "--temperature: found 'nan', expected a number above 0"),
        (predict, ["--sampling", "--top_p", "3"], "--top_p: found '3', expected a number above 0, at most 1"),
        (predict, ["--batch_size", "0"], "--batch_size: found '0', expected a whole number from 1 on"),
        (
            predict,
            ["--temperature", "0.5"],
            "--temperature is given, but --sampling is false: set it to true",
        ),
    ],
)
def test_flags_that_cannot_act_are_refused(command, words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.parse_flags([*NEEDED[command], *words])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


def said_by(script, *words):
    """What a command writes, without its progress bars."""
    variables = {name: value for name, value in processes.environment().items() if name != "DS_ACCELERATOR"}
    done = processes.run([sys.executable, FINETUNE / script, *words], env=variables, limit=120)
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and "it/s]" not in line and "?it/s" not in line]


@pytest.mark.slow
def test_commands_say_what_they_do_and_nothing_else(tmp_path):
    """As a newcomer sees it: every line is one of ours."""
    base = checkpoint("v2_6")
    saved_adapter(tmp_path / "adapter", "v2_6")
    said = said_by("merge_lora.py", "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert len(said) == 2, said
    assert said[0].startswith("probe of ")
    assert said[1] == f"Merged model: {tmp_path / 'merged'} (float32)"
    said = said_by("quantize.py", "--model_name_or_path", base, "--output_dir", tmp_path / "int4")
    assert said[0] == "Quantized weights:"
    assert said[-1].startswith(f"{tmp_path / 'int4'}: 14 layers in 4 bit")
    assert len(said) == 8, said
    said = said_by("plan_memory.py", "--model_name_or_path", base)
    assert said[0].startswith("MiniCPM-V 2.6, lora, bf16")
    assert all(line.startswith("  ") for line in said[1:]), said


@pytest.mark.slow
def test_a_4_7_conversation_shows_the_answer_and_nothing_else():
    model = checkpoint("v4_7")
    said = said_by("chat.py", "--model_name_or_path", model, "--image", IMAGES / "small.png", "--question", "What?",
                   "--sampling", "false", "--max_new_tokens", 4)  # fmt: skip
    assert said[-1] == "MiniCPM-V 4.7 on cpu in float32", said
    assert len(said) == 2, said
