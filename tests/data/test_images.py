"""Images of every kind, opened as the released inference does, and damaged ones named."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from minicpm_tune.data.media.images import ImageOptions, open_image
from minicpm_tune.data.media.sources import decode_data_uri
from minicpm_tune.errors import RowError

RED = (200, 30, 40)


def encode(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def open_one(value, folder, **options):
    opened = open_image(value, ImageOptions(folder=folder, **options))
    [image] = opened.frames()
    assert image.mode == "RGB"
    assert opened.sizes == (image.size,)
    return image


def photo(size=(40, 20)):
    """Red on the left, green on the right."""
    image = Image.new("RGB", size, RED)
    image.paste((10, 200, 30), (size[0] // 2, 0, *size))
    return image


def turned_photo(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo(), exif=exif)


def test_orientation_is_ignored_or_applied_as_asked(tmp_path):
    data = turned_photo(6)  # turn right by 90 degrees
    assert open_one(data, tmp_path).size == (40, 20)
    upright = open_one(data, tmp_path, upright=True)
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == RED
    assert open_one(turned_photo(3), tmp_path, upright=True).getpixel((35, 5)) == RED


def test_the_orientation_of_each_generation_is_that_of_its_inference(tmp_path):
    from dataset import SupervisedDataset
    from support.golden_checkpoints import processing
    from support.rows import chat, write_rows

    (tmp_path / "a.png").write_bytes(turned_photo(6))
    path = write_rows(tmp_path, [{"image": "a.png", "conversations": chat("Hi", "x")}])
    wide, high = [[23, 45]], [[44, 24]]
    assert SupervisedDataset(path, processing("v2_6"))[0]["tgt_sizes"].tolist() == wide
    assert SupervisedDataset(path, processing("v4_6"))[0]["tgt_sizes"].tolist() == high
    assert SupervisedDataset(path, processing("v2_6", exif_orientation="apply"))[0]["tgt_sizes"].tolist() == [
        [45, 23]
    ]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "I;16", "I", "F", "YCbCr", "HSV"])
def test_every_mode_becomes_what_pillows_convert_gives(mode, tmp_path):
    gradient = Image.linear_gradient("L").resize((30, 20))
    image = (
        gradient.convert(mode)
        if mode != "I;16"
        else Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30))
    )
    kind = "TIFF" if mode in ("CMYK", "I", "F", "YCbCr", "I;16") else "PNG"
    if mode == "HSV":
        image, kind = image.convert("RGB"), "PNG"
    data = encode(image, kind)
    with Image.open(io.BytesIO(data)) as plain:
        expected = plain.convert("RGB")
    assert np.array_equal(np.asarray(open_one(data, tmp_path)), np.asarray(expected))


def test_transparency_is_dropped(tmp_path):
    image = Image.new("RGBA", (8, 8), (*RED, 0))
    assert open_one(encode(image), tmp_path).getpixel((3, 3)) == RED


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (9, 7), color) for color in (RED, (0, 255, 0))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert max(abs(a - b) for a, b in zip(open_one(data, tmp_path).getpixel((4, 4)), RED, strict=True)) < 10


def test_sources_of_every_form(tmp_path):
    data = encode(photo())
    (tmp_path / "a b.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    forms = (
        "a b.png",
        str(tmp_path / "a b.png"),
        f"file://{tmp_path}/a b.png",
        data,
        {"bytes": data, "path": None},
        {"bytes": None, "path": "a b.png"},
        {"bytes": data, "path": "elsewhere.png"},
        uri,
    )
    for value in forms:
        assert open_one(value, tmp_path).size == (40, 20)


def test_paths_may_be_relative_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encode(photo()))
    monkeypatch.chdir(tmp_path)
    assert open_one("a.png", tmp_path / "elsewhere").size == (40, 20)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (
            "no.png",
            "missing image",
            r"image 'no.png' not found \(looked at .*no.png'\), expected a file.*--image_folder",
        ),
        ("empty.png", "image", r"empty.png' has 0 bytes"),
        ("text.png", "image", "text.png' is in no format that Pillow knows"),
        ("half.png", "image", "half.png' can't be decoded"),
        ("half.jpg", "image", "half.jpg' can't be decoded"),
        ("a\0b", "missing image", "(no file name|not found)"),
        ("x" * 5000, "missing image", "(no file name|not found)"),
        (".", "missing image", "is a folder"),
        (b"", "image", "an image has 0 bytes"),
        (b"abc", "image", r"image \(3 bytes\) is in no format"),
        ({"bytes": None, "path": None}, "media", "an image is None, expected a path"),
        (None, "media", "an image is None"),
        (17, "media", "an image is 17, expected a path, data URI or bytes"),
        ("", "media", "an image is ''"),
        ("data:image/png;base64,@@", "image", "expected 'data:image/...;base64,...'"),
        ("data:image/png,abc", "image", "it is not marked ';base64,'"),
        ("https://example.org/a.png", "remote image", "is a web address.*--allow_remote_images true"),
    ],
)
def test_images_that_cannot_be_used_are_named(value, kind, message, tmp_path):
    png, jpg = encode(photo((300, 200))), encode(photo((300, 200)), "JPEG")
    for name, data in {
        "empty.png": b"",
        "text.png": b"hello",
        "half.png": png[:150],
        "half.jpg": jpg[:700],
    }.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(RowError, match=message) as caught:
        open_one(value, tmp_path)
    assert caught.value.kind == kind


def test_huge_images_are_refused_by_their_header(tmp_path):
    data = encode(Image.new("1", (20_000, 10_000)))  # 200 million pixels in a few kilobytes
    with pytest.raises(
        RowError, match=r"20000 x 10000 pixels, expected at most 178956970.*--max_image_pixels"
    ):
        open_image(data, ImageOptions(folder=tmp_path))
    assert open_image(data, ImageOptions(folder=tmp_path, max_pixels=None)).sizes == ((20_000, 10_000),)


def test_remote_images_are_fetched_when_allowed(tmp_path):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    data = encode(photo())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert open_one(f"{address}/a.png", tmp_path, allow_remote=True).size == (40, 20)
        with pytest.raises(RowError, match="can't be fetched"):
            open_one(f"{address}/b.png", tmp_path, allow_remote=True)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_a_data_uri_that_is_no_base64_is_named_by_what_it_holds(kind):
    with pytest.raises(RowError, match=f"{kind} here: .*expected 'data:{kind}/...;base64,...'"):
        decode_data_uri(f"data:{kind}/x;base64,%%%", "here")
