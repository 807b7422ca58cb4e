"""demo.sh, the first command of the README, with few steps on few pictures."""

import json
import os
import re
import shlex
import sys

import pytest
from PIL import Image

import draw_boxes
from draw_pictures import draw_data_set
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from support import processes
from support.finetune_runs import ROOT

TIME_LIMIT = 280  # seconds, for one start
LISTEN_LIMIT = 1500  # seconds, for a whole demo on a busy machine
SOUND_QUESTIONS = ("Which vowel is sung?", "How does the loudness change?")
PICTURES = {"train": 40, "eval": 8, "held_out": 48}
QUESTIONS = ("What color is the shape?", "What color is the background?", "Describe the picture.")


def demo(folder, *flags, steps=2, limit=TIME_LIMIT):
    return processes.run(
        ["bash", ROOT / "demo.sh", "--output", folder, "--steps", steps, *flags],
        # The environment of the tests holds what the demo would install.
        env={**processes.environment(), "VENV": sys.prefix},
        cwd=os.sep,
        limit=limit,
    )


def run_through(folder, *flags):
    """Start the demo on a small data set; its output, after checking what it leaves behind."""
    draw_data_set(folder / "data", sizes=PICTURES, seed=0)
    done = demo(folder, *flags)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    table = (folder / "accuracy.txt").read_text()
    assert table in done.stdout
    assert all(question in table for question in QUESTIONS)
    assert all(stage in table for stage in ("chance", "before", "after full tuning", "after LoRA"))
    assert Image.open(folder / "loss.png").size[0] > 500
    question = shlex.split(done.stdout.splitlines()[-1])
    asked = processes.run(question, env=processes.environment(), cwd=os.sep, limit=TIME_LIMIT)
    assert asked.returncode == 0, asked.stderr
    assert "FutureWarning" not in text
    assert "Traceback" not in text
    for name in ("full", "lora"):
        history = json.loads((folder / name / "trainer_state.json").read_text())
        assert history["global_step"] == 2
    return done


def test_the_demo_runs_and_uses_again_what_is_there(tmp_path):
    folder = tmp_path / "a demo's folder"
    run_through(folder)
    before = (folder / "full" / "run.json").read_bytes()
    again = demo(folder)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("That run is finished") == 2
    assert (folder / "full" / "run.json").read_bytes() == before


@pytest.mark.slow
def test_the_demo_points_at_shapes_and_draws_what_it_found(tmp_path):
    draw_boxes.draw_data_set(tmp_path / "data", sizes=PICTURES, seed=0)
    done = demo(tmp_path, "--task", "find")
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "accuracy.txt").read_text()
    assert table in done.stdout
    assert all(word in table for word in ("one box", "before", "after full tuning", "mean overlap"))
    question = shlex.split(done.stdout.splitlines()[-1])
    assert question[-2:] == ["--draw", str(tmp_path / "found.png")]
    asked = processes.run(question, env=processes.environment(), cwd=os.sep, limit=TIME_LIMIT)
    assert asked.returncode == 0, asked.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--epochs", "2"), "Unknown flag --epochs"),
        (("--generation",), "--generation needs a value"),
        (("--generation", "v9"), "--generation is 'v9', which is no model of the demo"),
        (("--task", "dig"), "--task is 'dig', expected"),
        (("--steps", "many"), "--steps is 'many', expected a whole number from 1"),
        (("--task", "sing"), "--task is 'sing', expected colors, find, or listen"),
        (
            ("--task", "listen", "--generation", "v4_5"),
            "v4_5 takes no audio, expected --generation o2_6 or o4_5",
        ),
    ],
)
def test_a_wrong_flag_is_named_before_anything_is_made(tmp_path, flags, message):
    done = demo(tmp_path / "out", *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_help_lists_every_model(tmp_path):
    done = demo(tmp_path / "out", "--help")
    assert done.returncode == 0
    words = re.findall(r"[\w-]+", done.stdout)
    assert all(name in words for name in (*GENERATIONS, "--steps", "--output"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("generation", [name for name in GENERATIONS if name != "v2_6"])
def test_every_generation_has_its_demo(tmp_path, generation):
    run_through(tmp_path, "--generation", generation)


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["o4_5", "o2_6"])
def test_the_model_learns_to_tell_sounds_of_singers_it_never_heard(tmp_path, generation):
    """The demo as users start it; docs/audio.md has what other seeds reached."""
    done = demo(
        tmp_path / "out", "--task", "listen", "--generation", generation, steps=500, limit=LISTEN_LIMIT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "out" / "accuracy.txt").read_text().splitlines()
    assert lines[0].split() == "exact match on held-out sounds chance before after full tuning".split()
    for line, question, chance in zip(lines[1:], SOUND_QUESTIONS, (1 / 5, 1 / 3), strict=True):
        assert line.startswith(question)
        found = [float(share.rstrip("%")) / 100 for share in line.removeprefix(question).split()]
        assert found[0] == pytest.approx(chance, abs=0.001)
        assert found[1] <= 0.5
        assert found[2] > 0.9
    question = shlex.split(done.stdout.splitlines()[-1])
    asked = processes.run(question, env=processes.environment(), cwd=os.sep, limit=TIME_LIMIT)
    assert asked.returncode == 0, asked.stderr
    held_out = json.loads((tmp_path / "out" / "data" / "held_out.json").read_text())
    assert asked.stdout.strip() == held_out[0]["conversations"][1]["content"]
