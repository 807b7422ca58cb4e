"""Mutated rows and mutated files: never another exception, never a hang, never a wrong sample."""

import copy
import io
import json
import random

import pytest
from PIL import Image

from dataset import SupervisedDataset
from minicpm_tune.data.files.row_files import open_rows
from minicpm_tune.data.media.images import ImageOptions, open_image
from minicpm_tune.data.row_check import check_rows
from minicpm_tune.data.row_parsing import parse_row
from minicpm_tune.errors import DataError, RowError
from support.golden_checkpoints import limited, processing
from support.rows import chat

SEEDS = [
    {
        "id": "0",
        "image": "a.png",
        "conversations": chat("<image>\nWhat?", "A cat.", "And?", "A dog.", system="s"),
    },
    {
        "image": {"<image_00>": "a.png", "<image_01>": "a.png"},
        "conversations": chat("<image_01> <image_00>", "x"),
    },
    {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "x", "loss": False},
        ],
    },
    {
        "video": ["a.png", "a.png"],
        "conversations": [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "x"}],
    },
    {"image": "a.png", "question": "What?", "answers": ["x", {"answer": "y"}]},
    {"system": "s", "history": [["a?", "A."]], "query": "b?", "response": "B.", "weight": 0.5},
]
JUNK = [
    None,
    0,
    -1,
    1.5,
    True,
    "",
    "x",
    "<image>",
    "<image_01>",
    "<|im_end|>",
    "\0",
    "é" * 50,
    [],
    {},
    [[]],
    {"a": 1},
    b"x",
]
SPECIAL = ["role", "from", "content", "value", "user", "assistant", "system", "type", "image", "loss", "id"]


def places(value, path=()):
    """Every place inside a nested value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(row, draw):
    """A row with one to three places changed, removed, doubled or renamed."""
    row = copy.deepcopy(row)
    for _ in range(draw.randint(1, 3)):
        path = draw.choice([place for place in places(row) if place] or [()])
        if not path:
            return draw.choice(JUNK)
        parent = row
        for key in path[:-1]:
            parent = parent[key]
        action = draw.randrange(4)
        if action == 0:
            parent[path[-1]] = copy.deepcopy(draw.choice(JUNK))
        elif action == 1:
            del parent[path[-1]]
        elif action == 2 and isinstance(parent, list):
            parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
        elif isinstance(parent, dict):
            parent[draw.choice(SPECIAL)] = parent.pop(path[-1])
        else:
            parent[path[-1]] = draw.choice(SPECIAL)
    return row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    Image.new("RGB", (40, 30), (9, 90, 200)).save(path / "a.png")
    return path


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["v2", "v2_5", "v2_6", "v4_5", "v4_6"])
def test_mutated_rows_give_a_right_sample_or_a_named_problem(name, folder):
    draw = random.Random(f"rows {name}")
    prepared = processing(name)
    refused = 0
    for _ in range(400):
        row = mutated(draw.choice(SEEDS), draw)
        try:
            conversation = parse_row(row)
            options = ImageOptions(folder=folder)
            pictures = [
                open_image(source.value, options) if source.kind == "image" else None
                for source in conversation.sources
            ]
            if None in pictures:
                continue  # videos are mutated with their files below
            sample = limited(prepared, 512).encode(conversation.turns, pictures)
        except RowError:
            refused += 1
            continue
        check_sample(prepared, conversation, sample)
    assert 100 < refused < 390


def check_sample(prepared, conversation, sample):
    """Bounds enclose exactly the pad tokens, and what is supervised is a beginning of the answers."""
    pad = prepared.tokenizer.convert_tokens_to_ids(prepared.style.pad)
    ids, labels = sample["input_ids"], sample["labels"]
    bounds = sample["image_bound"].tolist()
    assert sum(end - start for start, end in bounds) == (ids == pad).sum()
    counts = [prepared.style.token_count(tuple(size)) for size in sample["tgt_sizes"].tolist()]
    assert [end - start for start, end in bounds] == counts
    assert sample["pixel_values"].shape[2] == 14 * sample["tgt_sizes"].prod(1).sum()
    assert (labels[labels != -100] == ids[labels != -100]).all()
    learned = "".join(prepared.tokenizer.decode(labels[labels != -100]).split())
    end = prepared.generation.turn_end
    answers = [turn.text for turn in conversation.turns if turn.role == "assistant" and turn.weight]
    for text in (learned, *answers):
        assert "<image" not in text
    whole = "".join(
        "".join(answer.split()) + ("" if prepared.generation.prompt == "minicpm" else end)
        for answer in answers
    )
    assert (whole + end).startswith(learned.removesuffix(end)) or whole.startswith(learned)


@pytest.mark.timeout(120)
def test_mutated_rows_never_break_a_data_set(folder):
    draw = random.Random(11)
    rows = [mutated(draw.choice(SEEDS), draw) for _ in range(300)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    dataset = SupervisedDataset(path, processing("v2_6", on_bad_row="skip", model_max_length=512))
    lengths = check_rows(dataset)
    samples = [dataset[index] for index in range(dataset.mixture.row_count)]
    assert [len(sample["input_ids"]) for sample in samples] == lengths.tolist()
    assert sum(sample["origin"] is None for sample in samples) > 50


@pytest.mark.timeout(120)
def test_mutated_bytes_of_a_data_file_are_refused_or_read(folder):
    draw = random.Random(5)
    whole = json.dumps(SEEDS, indent=1).encode()
    path = folder / "bytes.json"
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.randint(1, len(data))] if draw.random() < 0.3 else data)
        try:
            rows = open_rows(path)
        except DataError:
            continue
        for index in range(len(rows)):
            try:
                parse_row(rows[index])
            except RowError:
                continue


def encodings():
    """An image in several formats."""
    image = Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 20).convert("RGB")
    formats = {
        "PNG": {},
        "JPEG": {"progressive": True},
        "GIF": {},
        "WEBP": {},
        "BMP": {},
        "TIFF": {"compression": "tiff_lzw"},
        "PPM": {},
        "TGA": {},
        "ICO": {"sizes": [(32, 32)]},
        "JPEG2000": {},
        "AVIF": {},
        "DDS": {},
    }
    for kind, options in formats.items():
        data = io.BytesIO()
        image.save(data, kind, **options)
        yield kind, data.getvalue()


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("kind", "whole"), [pytest.param(*item, id=item[0]) for item in encodings()])
def test_mutated_images_are_decoded_or_named(kind, whole, tmp_path):
    draw = random.Random(kind)
    options = ImageOptions(folder=tmp_path, upright=draw.random() < 0.5, max_pixels=1_000_000)
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.3:
            data = data[: draw.randint(1, len(data))]
        try:
            picture = open_image(bytes(data), options)
            [image] = picture.frames()
        except RowError:
            continue
        assert image.mode == "RGB"
        assert picture.sizes == (image.size,)
