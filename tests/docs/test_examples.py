"""The examples of the documentation: rows load, and code runs."""

import json
import re

import pytest
import torch
from PIL import Image

from make_checkpoint import make_checkpoint
from minicpm_tune.answering import chat as released_form
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.row_parsing import parse_row
from minicpm_tune.lora.build import add_adapter
from minicpm_tune.models.loading import load_model
from minicpm_tune.settings.argument_groups import LoraArguments
from support.pages import PAGES, fenced, name_of

EXAMPLES = [(name_of(page), text) for page in PAGES for text in fenced(page, "json")]


@pytest.mark.parametrize(
    ("page", "text"), EXAMPLES, ids=[f"{page}-{at}" for at, (page, _) in enumerate(EXAMPLES)]
)
def test_rows_are_used_as_they_stand(page, text):
    for row in json.loads(text):
        conversation = parse_row(row, hears="audios" in row)
        assert conversation.turns[-1].role == "assistant"
        paths = re.findall(r'"([\w/]+\.(?:jpg|png|wav))"', json.dumps(row))
        assert [source.value for source in conversation.sources] == paths


CODE = [(name_of(page), text) for page in PAGES for text in fenced(page, "python")]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A small checkpoint and an adapter on it, in a folder as the commands of the pages leave them."""
    folder = tmp_path_factory.mktemp("work")
    model = make_checkpoint(folder / "output" / "merged", "v2_6", size="tiny")
    generation = GENERATIONS["v2_6"]
    base = load_model(model, dtype=torch.float32)
    adapted = add_adapter(base, generation, LoraArguments(lora_r=4), vision=False, resampler=True)
    adapted.save_pretrained(folder / "output" / "output_lora")
    Image.new("RGB", (40, 30), "red").save(folder / "cat.jpg")
    return folder


@pytest.mark.parametrize(("page", "code"), CODE, ids=[f"{page}-{at}" for at, (page, _) in enumerate(CODE)])
def test_code_runs_as_it_stands(page, code, stand_ins, monkeypatch):
    monkeypatch.chdir(stand_ins)
    base = load_model(stand_ins / "output" / "merged", dtype=torch.float32)
    picture = Image.open("cat.jpg")
    msgs = [{"role": "user", "content": "What is it?"}]
    names = {"base": base, "json": json, "picture": picture, "other": picture, "msgs": msgs}
    names |= {f"msgs_{number}": msgs for number in (1, 2, 3)}
    monkeypatch.setitem(
        released_form.chat.__kwdefaults__, "max_new_tokens", 4
    )  # an untrained model does not end
    exec(compile(code, page, "exec"), names)
