"""chat.py as a command: its --draw."""

import numpy as np
import pytest
from PIL import Image

import chat
from minicpm_tune.answering import generate
from support.tiny_checkpoints import checkpoint

BOX = "<ref>cup</ref><box>100 100 500 500</box>"


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (60, 40), "white").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def ask(monkeypatch, answers, *words):
    """Have chat.py ask one question for each answer that the model would give."""
    given = iter(answers)
    monkeypatch.setattr(generate, "answer", lambda *_, **__: [next(given)])
    questions = [word for _ in answers for word in ("--question", "Where?")]
    return chat.main([*map(str, ("--model_name_or_path", checkpoint("v2_6"), *words)), *questions])


def test_boxes_of_an_answer_are_drawn_on_the_picture(monkeypatch, picture, capsys):
    target = picture.with_name("found.png")
    assert (
        ask(
            monkeypatch,
            [f"<think><box>0 0 999 999</box></think>{BOX}", "Nowhere."],
            "--image",
            picture,
            "--draw",
            target,
        )
        == 0
    )
    colored = (np.asarray(Image.open(target)) != 255).any(axis=2)
    down, across = colored.nonzero()
    assert (across.min(), down.min(), across.max()) == (6, 4, 30)  # 100 to 500 of 60 x 40 pixels
    said = capsys.readouterr().err
    assert f"boxes drawn: {target}" in said
    assert "The answer has no box, so nothing is drawn." in said


def test_without_a_picture_nothing_is_drawn(monkeypatch, tmp_path, capsys):
    assert ask(monkeypatch, [BOX], "--draw", tmp_path / "found.png") == 0
    assert "No picture was shown" in capsys.readouterr().err
    assert not (tmp_path / "found.png").exists()


def test_a_place_that_cannot_be_written_is_named(monkeypatch, picture, capsys):
    target = picture.with_name("no folder") / "found.png"
    assert ask(monkeypatch, [BOX], "--image", picture, "--draw", target) == 1
    assert f"--draw {target}: it can't be written (No such file or directory)" in capsys.readouterr().err


def test_draw_takes_the_name_of_a_picture(capsys):
    with pytest.raises(SystemExit):
        chat.parse_flags(["--model_name_or_path", "x", "--draw", "found.txt"])
    assert "--draw found.txt: expected the name of a picture, such as found.png" in capsys.readouterr().err
