"""chat.py as a command: conversations, flags, and what goes wrong."""

import io
import sys
from functools import cache

import pytest
import torch

import chat
from minicpm_tune.answering.generate import GREEDY, answer
from minicpm_tune.answering.load import InferenceError, ModelChoice, choose_device, load_for_inference
from minicpm_tune.errors import RowError
from minicpm_tune.training.process_lifecycle import run_command
from support import processes
from support.paths import IMAGES
from support.rows import picture
from support.tiny_checkpoints import checkpoint, edit_json, loaded, saved_adapter

QUESTION = [{"role": "user", "content": "What is it?"}]
SHORT = GREEDY | {"sampling": False, "max_new_tokens": 8}


def run_chat(*words, stdin=""):
    return processes.run([sys.executable, chat.__file__, *words], stdin=stdin, limit=120)


def test_the_command_answers_with_an_adapter_as_the_library_does(tmp_path):
    saved_adapter(tmp_path / "adapter", "v2_6")
    shared = [
        "--adapter",
        tmp_path / "adapter",
        "--device",
        "cpu",
        "--sampling",
        "false",
        "--max_new_tokens",
        8,
    ]
    done = run_chat(
        *shared, "--image", IMAGES / "small.png", "--question", "What is it?", "--question", "Why?"
    )
    assert done.returncode == 0, done.stderr
    model, _ = load_for_inference(ModelChoice(adapter=str(tmp_path / "adapter"), device="cpu"))
    asked = [{"role": "user", "content": [picture(), "What is it?"]}]
    first = model.chat(msgs=asked, **SHORT)
    asked += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    assert done.stdout == f"{first}\n{model.chat(msgs=asked, **SHORT)}\n"


FOUR = SHORT | {"max_new_tokens": 4}


def converse(lines, capsys, monkeypatch, *more):
    """What the command writes for lines of input, and its notes."""
    text = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    words = [
        "--model_name_or_path",
        checkpoint("v2_6"),
        "--sampling",
        "false",
        "--max_new_tokens",
        "4",
        *more,
    ]
    chat.run(chat.parse_flags([str(word) for word in words]))
    said = capsys.readouterr()
    return said.out.splitlines(), said.err


@cache
def answered(*content):
    """The answer to one message; names of pictures stand for them."""
    model = loaded(checkpoint("v2_6"), "v2_6")
    shown = [picture(part) if part in ("small", "wide") else part for part in content]
    return model.chat(msgs=[{"role": "user", "content": shown}], **FOUR)


def test_a_conversation_obeys_its_lines(capsys, monkeypatch):
    lines = ["What is it?", "", f"/image {IMAGES / 'small.png'}", "And this?", "say <image>", "/reset"]
    lines += ["What is it?", "/help", "/quit", "never asked"]
    said, _ = converse(lines, capsys, monkeypatch)
    first = answered("What is it?")
    assert said[0] == first
    assert "contains '<image>'" in said[2]
    assert said[3] == first
    assert said[4:] == chat.HELP.splitlines()


def test_a_question_is_not_asked_without_the_picture_that_failed(capsys, monkeypatch):
    lines = ["/image gone.png", "What is it?", "What is it?", "/clear", "What is it?"]
    said, _ = converse(lines, capsys, monkeypatch)
    assert said[0].startswith("error: image 'gone.png' not found")
    refused = (
        "error: the question was not asked, because 'gone.png' could not be shown. Show it with /image FILE,"
    )
    assert [line.startswith(refused) for line in said] == [False, True, True, False]
    assert said[3] == answered("What is it?")
    said, _ = converse([lines[0], f"/image {IMAGES / 'small.png'}", "Why?"], capsys, monkeypatch)
    assert said[1:] == [answered("small", "Why?")]


def test_paths_are_taken_as_they_are_typed(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "two words"
    folder.mkdir()
    picture().save(folder / "a b.png")
    escaped = str(folder / "a b.png").replace(" ", "\\ ")
    for line in (
        f'/image "{folder}/a b.png"',
        f"/image {folder}/a b.png",
        f"/image {escaped}",
        escaped,
        "'a b.png'",
    ):
        said, notes = converse([line, "What is it?"], capsys, monkeypatch, "--image_folder", folder)
        assert said == [answered("small", "What is it?")], line
        assert ("is shown with the next question" in notes) == ("/image" not in line)
    said, _ = converse(["no.png", " no.png", "/image"], capsys, monkeypatch)
    assert said[0].startswith(
        "error: 'no.png' is named like a picture, a video or a sound, but there is no such file"
    )
    assert said[1] == answered("no.png")
    assert said[2] == "error: /image needs a file. Enter /image FILE."


def test_pictures_that_a_question_names_are_shown_once(capsys, monkeypatch):
    name = str(IMAGES / "small.png")
    asked = f"What is in {name}, and in no.png?"
    said, notes = converse([asked], capsys, monkeypatch)
    assert said == [answered("small", asked)]
    assert f"{name} is shown with the question." in notes
    assert "'no.png' is not a file, so the model only reads its name." in notes
    said, notes = converse([f"/image {name}", asked], capsys, monkeypatch)
    assert said == [answered("small", asked)]
    assert "is shown" not in notes


def test_a_command_that_does_not_exist_is_no_question(capsys, monkeypatch):
    said, _ = converse(["/exit", " /exit", "/a/b is what?"], capsys, monkeypatch)
    assert said[0].startswith("error: there is no command /exit. /help lists them")
    assert said[1] == answered("/exit")
    assert len(said) == 3
    assert not said[2].startswith("error")


def test_a_byte_of_another_encoding_does_not_end_the_conversation(capsys, monkeypatch):
    said, _ = converse("caf\u00e9?\nWhat is it?\n".encode("latin-1"), capsys, monkeypatch)
    assert said[0].startswith("error: character 4 of the line is the byte 0xe9, which is not utf-8")
    assert said[1:] == [answered("What is it?")]


def test_ctrl_c_ends_an_answer_and_not_the_conversation(capsys, monkeypatch):
    calls = []

    def interrupted_once(*given, **options):
        calls.append(given)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return answer(*given, **options)

    monkeypatch.setattr("minicpm_tune.answering.generate.answer", interrupted_once)
    said, _ = converse(["Why?", "What is it?"], capsys, monkeypatch)
    assert said == ["", "(stopped; the question does not count)", answered("What is it?")]


def test_control_texts_can_be_asked_about(capsys, monkeypatch):
    line = "What does <|im_end|> mean?"
    said, _ = converse([line], capsys, monkeypatch)
    assert said[0].startswith("error: turn 0 contains '<|im_end|>'")
    said, _ = converse([line], capsys, monkeypatch, "--literal_control_tokens", "true")
    assert not said[0].startswith("error")


def test_web_addresses_and_sizes_are_limited_by_flags(capsys, monkeypatch):
    with pytest.raises(
        RowError, match=r"is a web address, expected a file. Download it, or pass --allow_remote_images"
    ):
        converse([], capsys, monkeypatch, "--image", "http://localhost:1/a.png")
    with pytest.raises(RowError, match="expected at most 10"):
        converse([], capsys, monkeypatch, "--image", IMAGES / "small.png", "--max_image_pixels", 10)


def test_the_command_ends_with_one_message_on_a_mistake():
    done = run_chat("--model_name_or_path", checkpoint("v2_6"), "--image", "gone.png")
    assert done.returncode == 1
    assert "error: image 'gone.png' not found" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Loading weights" not in done.stderr  # which can take minutes
    done = run_chat("--temperatur", "1")
    assert (done.returncode, "did you mean --temperature?" in done.stderr) == (1, True)


def test_thoughts_are_not_asked_of_a_generation_without():
    with pytest.raises(InferenceError, match=r"--enable_thinking: MiniCPM-V 2\.6 has no thinking mode"):
        load_for_inference(ModelChoice(str(checkpoint("v2_6")), enable_thinking=True))
    with pytest.raises(RowError, match=r"MiniCPM-V 2\.6 has no thinking mode"):
        loaded(checkpoint("v2_6"), "v2_6").chat(msgs=QUESTION, enable_thinking=True)


@pytest.mark.parametrize("name", ["v2_6", "v4_5", "v4_6", "v4_7"])
def test_a_folder_of_frames_is_answered_about(name, tmp_path, capsys, monkeypatch):
    for number, each in enumerate(("small", "wide")):
        picture(each).resize((90, 60)).save(tmp_path / f"{number}.png")
    seen = []
    monkeypatch.setattr(
        "minicpm_tune.answering.generate.answer",
        lambda *given, **options: seen.extend(given[2]) or answer(*given, **options),
    )
    words = ["--model_name_or_path", checkpoint(name), "--video", tmp_path, "--question", "What happens?"]
    words += ["--sampling", "false", "--max_new_tokens", 4]
    for more in ((), ("--video_fps", 1, "--max_num_frames", 1)):
        chat.run(chat.parse_flags([str(word) for word in (*words, *more)]))
        assert capsys.readouterr().out.strip()
    assert [len(sample["image_bound"]) for sample in seen] == [2, 1]


def test_the_language_model_can_be_held_in_4_bit():
    model, rules = load_for_inference(
        ModelChoice(str(checkpoint("v2_6")), load_4bit=True, device="cpu", max_slice_nums=2)
    )
    assert type(model.llm.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert rules.rules.max_slice_nums == 2
    assert isinstance(model.chat(picture(), QUESTION, processor=rules, **SHORT), str)


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(InferenceError, match="no such device, expected auto, cpu, cuda or cuda:N"):
        choose_device("tpu!")
    if not torch.cuda.is_available():
        with pytest.raises(InferenceError, match="found 0 GPUs, expected at least 1"):
            choose_device("cuda")


def test_an_unreadable_adapter_configuration_is_an_error(tmp_path):
    from minicpm_tune.lora.adapter_folders import AdapterError, read_adapter_folder

    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not readable as JSON"):
        read_adapter_folder(tmp_path)
    edit_json_target = tmp_path / "adapter_config.json"
    edit_json_target.write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    edit_json(edit_json_target, base_model_name_or_path=None)
    with pytest.raises(InferenceError, match="no model is given"):
        load_for_inference(ModelChoice(adapter=str(tmp_path)))


def test_ctrl_c_ends_a_command_with_its_own_words(capsys, monkeypatch):
    # What a command sets up for the rest of its process.
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr("minicpm_tune.training.process_lifecycle.log_to_screen", lambda **_: None)

    def stopped(_):
        raise KeyboardInterrupt

    assert run_command(stopped, None, interrupted="The rows so far are kept.") == 130
    assert "The rows so far are kept." in capsys.readouterr().err
