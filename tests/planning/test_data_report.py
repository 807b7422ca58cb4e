"""The page of inspect_data.py: what it shows, what it escapes, what it costs, and that it works in a browser."""

import json
import re
import wave
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from inspect_data import parse_flags
from inspect_data import run as inspect
from minicpm_tune.planning import data_report
from support.browser import CHECK_LAYOUT, look, needs_browser
from support.golden_checkpoints import checkpoint_folder
from support.paths import IMAGES
from support.rows import chat, write_rows

HOSTILE = "</script><img src=x onerror=\"document.title='taken over'\"></pre></article>"


def write_page(folder, rows, *more, name="v2_6"):
    """Inspect some rows and give the page's text."""
    path, page = write_rows(folder, rows), folder / "report.html"
    inspect(
        parse_flags(
            [
                "--model_name_or_path", str(checkpoint_folder(name)), "--data_path", str(path),
                "--report", str(page), *more,
            ]
        )
    )  # fmt: skip
    return page.read_text(encoding="utf-8")


def row(number, image="small", answer="A cat."):
    return {"id": number, "image": str(IMAGES / f"{image}.png"), "conversations": chat("What?", answer)}


ROWS = [
    row("one"),
    row("sliced", "big"),
    {"id": HOSTILE, "conversations": chat(HOSTILE, f"An answer. {HOSTILE}")},
    row("long", "wide", "A dog. " * 200),
    {"id": "role", "conversations": [{"role": "cat", "content": HOSTILE}]},
    {"id": "gone", "image": "gone.png", "conversations": chat("What?", "A cat.")},
    {"id": 7, "image": "gone too.png", "conversations": chat("What?", "A dog.")},
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("report"), ROWS)


class Elements(HTMLParser):
    """Every element of a page with its attributes, in order, and the text inside some of them."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self._inside = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("pre", "mark"):
            self._inside.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        for tag in self._inside:
            self.texts[tag][-1] += data

    def named(self, tag, **wanted):
        return [given for name, given in self.elements if name == tag and wanted.items() <= given.items()]


def test_the_page_shows_what_the_rows_hold(page):
    found = Elements(page)
    assert [given["data-place"] for given in found.named("article")] == ["0", "1", "2", "3", "4", "5", "6"]
    assert [given["data-problem"] for given in found.named("article")][4:] == [
        "role",
        "missing image",
        "missing image",
    ]
    assert "A cat." in found.texts["mark"]
    assert "<|im_end|>" in found.texts["mark"]
    assert not any("What?" in text for text in found.texts["mark"])
    assert any("<image><unk>x16</image><slice><unk>x16</slice>" in text for text in found.texts["pre"])
    assert [given["class"] for given in found.named("figure") if "class" in given] == ["chart"] * 5
    sliced = page[page.index('data-place="1"') : page.index('data-place="2"')]
    assert "cut into 2 x 2 and an overview" in sliced
    assert sliced.count('class="cut light"') == 2


def test_nothing_of_a_row_becomes_markup(page):
    found = Elements(page)
    assert sum(HOSTILE in text for text in found.texts["pre"]) == 1
    assert not [
        given
        for given in found.named("img")
        if "onerror" in given or not given["src"].startswith("data:image/webp;")
    ]
    assert len(found.named("script")) == len(found.named("style")) == 1
    json_text = "".join(text for text in found.texts["pre"] if '"cat"' in text)
    assert json.loads(json_text)["conversations"][0]["content"] == HOSTILE


def test_the_page_asks_for_nothing_from_outside(page):
    addresses = [
        value
        for _, given in Elements(page).elements
        for name, value in given.items()
        if name in ("src", "href", "srcset", "action", "poster", "data")
    ]
    assert addresses
    assert all(value.startswith(("data:", "#")) for value in addresses)
    [policy] = [given["content"] for given in Elements(page).named("meta") if "http-equiv" in given]
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest| style=", page.replace(HOSTILE, ""))


def test_rows_are_chosen_by_place_problem_length_and_chance(tmp_path, monkeypatch):
    chosen = []
    choose = data_report.choose_rows
    monkeypatch.setattr(
        data_report, "choose_rows", lambda *given: chosen.append(choose(*given)) or chosen[-1]
    )
    many = [row(number) for number in range(30)]
    many[20] = row(20, answer="A dog. " * 50)
    many[10:13] = [{"conversations": [{"role": "cat", "content": "x"}]}] * 3
    many[14] = {**row("gone"), "image": "gone.png"}
    write_page(tmp_path, many, "--report_rows", "2")
    groups = {
        name: [place for place, inside in chosen[0].items() if name in inside] for name in data_report.GROUPS
    }
    assert groups["first"] == [0, 1]
    assert groups["problems"] == [10, 14]  # one of each kind before a second of any
    assert groups["longest"] == [0, 20]
    assert len(groups["random"]) == 2
    assert 'id="rows"' not in write_page(tmp_path, many, "--report_rows", "0")


def test_pictures_and_sounds_keep_to_the_limit_of_a_page(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    with wave.open(str(tmp_path / "long.wav"), "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(bytes(2 * 16_000 * 40))
    rows = [{"image": "noise.png", "conversations": chat("What?", "Noise.")}] * 3
    rows += [{"audio": "long.wav", "conversations": chat("What?", "Nothing.")}] * 3

    def written(limit):
        monkeypatch.setattr(data_report, "PAGE_LIMIT", limit)
        page = write_page(tmp_path, rows, "--model_max_length", "0", name="o2_6_audio")
        return page, sum(map(len, re.findall(r'src="(data:[^"]*)"', page)))

    whole, size = written(10**8)
    assert whole.count("sound, 40.0 s, the first 30 s") == 6  # the caption, and the player's label
    assert size > 3_000_000
    small, less = written(1_500_000)
    assert 500_000 < less <= 1_500_000
    assert "sound, 40.0 s, the first " in small
    none, nothing = written(1_000)
    assert nothing == 0
    assert none.count("have reached") == 3


@needs_browser
def test_filters_and_keys_work_in_a_browser(tmp_path, page):
    found = look(
        tmp_path,
        page,
        """
        const results = { all: shown(), title: document.title };
        type("problem", "missing image"); results.problem = shown();
        type("problem", ""); type("least", "300"); results.long = shown();
        type("least", ""); type("text", "taken OVER"); results.text = shown();
        results.count = document.querySelector("output").textContent;
        press("Escape", document.querySelector(".filters").elements.text); results.reset = shown().length;
        document.querySelector('[data-group="problems"]').click(); results.group = shown();
        document.querySelector('[data-group=""]').click();
        const at = () => document.activeElement.dataset.place;
        press("j", document.body); results.first = at();
        press("j"); press("ArrowRight"); results.third = at();
        press("k"); results.second = at();
        press("/"); results.search = document.activeElement.name;
        press("?", document.body); results.help = document.querySelector("dialog.keys").open;
        document.querySelector("dialog.keys").close();
        document.querySelector("button.picture").click();
        results.large = document.querySelector("dialog.large img").naturalWidth > 0;
        const attack = document.createElement("img"); attack.src = "https://example.com/x.png";
        document.body.append(attack);
        setTimeout(() => report({ ...results, refused }), 500);
        """,
    )
    assert found["title"] == "Data report: train.json"
    assert found["all"] == ["0", "1", "2", "3", "4", "5", "6"]
    assert found["problem"] == ["5", "6"]
    assert found["long"] == ["3"]
    assert (found["text"], found["count"], found["reset"]) == (["2", "4"], "2 of 7 rows", 7)
    assert found["group"] == ["4", "5", "6"]
    assert (found["first"], found["third"], found["second"]) == ("0", "2", "1")
    assert (found["search"], found["help"], found["large"]) == ("text", True, True)
    assert found["refused"] == ["https://example.com/x.png"]


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window_and_texts_stand_out(tmp_path, page, width, dark):
    found = look(tmp_path, page, CHECK_LAYOUT, width=width, dark=dark)
    assert found["wide"] <= found["inside"] <= width
    assert found["weak"] == []
    assert found["unnamed"] == 0


def test_a_number_of_rows_below_0_is_refused(tmp_path, capsys):
    path = write_rows(tmp_path, ROWS[:1])
    with pytest.raises(SystemExit):
        parse_flags(["--model_name_or_path", "x", "--data_path", str(path), "--report_rows", "-1"])
    assert "error: --report_rows: found -1, expected 0 or more" in capsys.readouterr().err
