"""Ask a model about pictures and videos, with or without an adapter.

    python chat.py --model_name_or_path M [--adapter A] --image a.jpg [--image b.jpg] --question "What is it?"

Pictures stand in front of the question, or where it says ``<ImageHere>``. Without ``--question`` the questions are read
line by line, and ``/help`` lists the commands. The module also offers ``MiniCPMVChat`` and ``img2base64`` of the
official chat.py.

Imports that take seconds stand where they are used, so that ``--help`` and messages come at once.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from minicpm_tune.errors import MessageError, RowError, UserError
from minicpm_tune.settings.command_flags import CommandParser, read_answering_flags
from minicpm_tune.training.process_lifecycle import run_command

# torch and transformers take seconds that --help need not wait for: what needs them is imported in the functions below.

HELP = """\
/image FILE   show a picture with the next question; a line with nothing but its path does the same
/video FILE   show a video, or a folder of its frames
/audio FILE   play a sound with the next question (MiniCPM-o)
/clear        show nothing with the next question after all
/reset        forget the conversation
/quit         leave
A line that starts with a space is a question, whatever it holds.
"""
_SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "video": (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg"),
    "audio": (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac"),
}


def img2base64(file_name: str | Path) -> bytes:
    """Read a picture's file as base64, as ``MiniCPMVChat`` takes it."""
    return base64.b64encode(Path(file_name).read_bytes())


class MiniCPMVChat:
    """The official chat.py's interface: base64 pictures and JSON messages in, the answer out.

    Args:
        model_path: A checkpoint's folder or Hub id, or an adapter's folder.
        **choice: Further fields of ``answering.load.ModelChoice``: ``adapter``, ``dtype``, ``device``, ...
    """

    def __init__(self, model_path: str, **choice: Any) -> None:
        from minicpm_tune.answering.load import ModelChoice, load_for_inference

        self.model, self.processing = load_for_inference(ModelChoice(str(model_path), **choice))
        self.tokenizer = self.processing.tokenizer

    def chat(self, input: dict[str, Any], **options: Any) -> str:
        """Answer a conversation.

        Args:
            input: ``{"image": base64, "question": JSON of the messages}``; the image may be left out. The content of
                a message is a text, or a list of ``{"type": "text", "pairs": ...}`` and
                ``{"type": "image", "pairs": base64}``.
            **options: As for the model's ``chat``; by default it samples, as the official one does.

        Raises:
            MessageError: When the messages or a picture can't be read.
        """
        image = _picture(input["image"]) if input.get("image") else None
        msgs = json.loads(input["question"])
        msgs = [{**message, "content": _content(message["content"])} for message in msgs]
        return self.model.chat(image=image, msgs=msgs, processor=self.processing, **options)


def _content(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    read = {"text": lambda value: value, "image": _picture}
    return [read[item["type"]](item["pairs"]) if isinstance(item, dict) else item for item in content]


def _picture(encoded: str | bytes) -> Any:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))).convert("RGB")
    except (binascii.Error, OSError) as error:
        raise MessageError(
            f"the image can't be read ({error}), expected an image file in base64. Use img2base64."
        ) from error


class Conversation:
    """One conversation on the screen: what was said, and what is shown with the next question."""

    def __init__(self, values: argparse.Namespace) -> None:
        from minicpm_tune.answering.load import ModelChoice, find_model, load_for_inference
        from minicpm_tune.data.media.images import ImageOptions

        self.values = values
        choice = ModelChoice.of(values)
        found = find_model(choice)
        self.processing = found.processing
        self.options = ImageOptions.of(found.processing.arguments, found.processing.generation, folder=Path())
        self.reset()
        self.shown: list[Any] = []
        self.failed: str | None = None  # what could not be shown with the next question
        self.known: set[Path] = set()  # every file that was shown
        # Before the weights are loaded, which can take minutes.
        for kind in ("image", "video", "audio"):
            for path in getattr(values, kind):
                self.show(kind, path)
        self.model, _ = load_for_inference(choice, found)

    def reset(self) -> None:
        """Forget what was said."""
        self.seen: Any = None  # the last picture that was shown, on which --draw draws
        system = self.values.system_prompt
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def clear(self) -> None:
        """Show nothing with the next question."""
        self.shown, self.failed = [], None

    def find(self, path: str) -> Path | None:
        """The file that a path names, if there is one."""
        from minicpm_tune.data.media.sources import find_file

        try:
            file = find_file(path, self.options.folder)
            return file.resolve() if file.is_file() else None
        except (OSError, ValueError):  # a name too long, or with a null character
            return None

    def show(self, kind: str, path: str) -> None:
        """Show a picture or a video with the next question.

        Args:
            kind: ``image``, ``video`` or ``audio``.
            path: Its file, or a folder of frames.

        Raises:
            RowError: When it can't be opened; the next question is then not asked.
        """
        self.failed = path
        self.shown.append(self._decoded(kind, path))
        if kind == "image":
            self.seen = self.shown[-1]
        self.failed = None
        if file := self.find(path):
            self.known.add(file)

    def _decoded(self, kind: str, path: str) -> Any:
        """Open a picture or a sound and decode it once, since every further turn needs it again."""
        from minicpm_tune.data.media.audio import Clip, open_audio
        from minicpm_tune.data.media.films import open_film
        from minicpm_tune.data.media.images import open_image
        from minicpm_tune.data.media.videos import open_video

        media, title = self.processing.media, self.processing.generation.title
        if kind == "audio":
            if media.audio is None:
                raise RowError("audio", f"{title} takes no audio. Ask without it.")
            clip = open_audio(path, self.options.folder, allow_remote=self.options.allow_remote)
            return Clip.of(clip.decode(), clip.name)
        if kind == "image":
            picture = open_image(path, self.options)
        elif media.film is not None and self.processing.arguments.video_sound:
            picture = open_film(path, self.options, media.film)
        elif media.video is not None:
            picture = open_video(path, self.options, media.video)
        else:
            raise RowError("video", f"{title} was not trained on video, expected images. Show single frames.")
        frames = list(picture.frames())
        return replace(picture, frames=lambda: frames)

    def ask(self, question: str) -> None:
        """Ask, and write the answer to the screen while it is generated.

        Raises:
            UserError: When the question can't be asked; the conversation is then as before.
        """
        from minicpm_tune.answering.chat import IMAGE_MARK, place_pictures, read_messages
        from minicpm_tune.answering.generate import TextPieces, answer, generation_options, stop_ids

        if self.failed is not None:
            raise MessageError(
                f"the question was not asked, because {self.failed!r} could not be shown. Show it with /image FILE, or "
                "enter /clear to go on without it."
            )
        if IMAGE_MARK not in question:
            self._show_named_files(question)
        content = place_pictures(question, self.shown)
        asked = [*self.messages, {"role": "user", "content": content}]
        processing = self.processing
        literal = processing.arguments.literal_control_tokens
        turns, pictures = read_messages(asked, joined_by=processing.generation.image_end, literal=literal)
        prompt = processing.encode_prompt(turns, pictures, thinking=self.values.enable_thinking)
        options = generation_options(self.values)
        streams = options.get("num_beams", 1) == 1
        streamer = TextPieces(processing.tokenizer, stop_ids(processing), _say) if streams else None
        [text] = answer(self.model, processing, [prompt], streamer=streamer, **options)
        _say("\n" if streams else text + "\n")
        self.messages = [*asked, {"role": "assistant", "content": text}]
        self.clear()
        if self.values.draw:
            self._draw(text)

    def _draw(self, text: str) -> None:
        """Draw the boxes of an answer on the last picture."""
        from minicpm_tune.answering.metrics import without_thoughts
        from minicpm_tune.data.grounding import draw_boxes, pixel_boxes

        if self.seen is None:
            _note("No picture was shown, so nothing is drawn.")
            return
        [picture] = self.seen.frames()
        boxes = pixel_boxes(without_thoughts(text), picture.size, self.processing.generation.box_form)
        if not boxes:
            _note("The answer has no box, so nothing is drawn.")
            return
        try:
            draw_boxes(picture, boxes).save(self.values.draw)
        except OSError as error:
            raise MessageError(
                f"--draw {self.values.draw}: it can't be written ({error.strerror}). Name a file where you may write."
            ) from error
        _note(f"boxes drawn: {self.values.draw}")

    def _show_named_files(self, question: str) -> None:
        """Show the pictures whose paths a question mentions, unless they were shown before."""
        for path in _paths_in(question):
            file, kind = self.find(path), _kind_of(path)
            if file is None:
                _note(f"{path!r} is not a file, so the model only reads its name.")
            elif file not in self.known and kind is not None:
                self.show(kind, path)
                _note(f"{path} is shown with the question.")


def _kind_of(path: str) -> str | None:
    """image, video or audio, by the ending of a file's name."""
    suffix = Path(path).suffix.lower()
    return next((kind for kind, suffixes in _SUFFIXES.items() if suffix in suffixes), None)


def _paths_in(text: str) -> list[str]:
    """Words of a text, or quoted parts of it, that are named like pictures or videos.

    Example:
        >>> _paths_in('Is cats/1.jpg older than "my dog.PNG"?')
        ['cats/1.jpg', 'my dog.PNG']
    """
    words = (quoted or word for _, quoted, word in re.findall(r"""(["'])(.+?)\1|(\S+)""", text))
    return [word for word in (word.strip(".,;:!?()") for word in words) if _kind_of(word)]


def _unquoted(path: str) -> str:
    """A path as it was typed, or dragged into the terminal: without quotes or backslashes before spaces.

    Example:
        >>> _unquoted('"a b.jpg"'), _unquoted(r"a\\ b.jpg")
        ('a b.jpg', 'a b.jpg')
    """
    path = path.strip()
    if len(path) > 1 and path[0] == path[-1] and path[0] in "\"'":
        return path[1:-1]
    return path.replace("\\ ", " ")


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(prog="chat.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--image", action="append", default=[], help="A picture; may be given several times.")
    parser.add_argument("--video", action="append", default=[], help="A video, or a folder of its frames.")
    parser.add_argument("--audio", action="append", default=[], help="A sound file, for MiniCPM-o.")
    parser.add_argument(
        "--question", action="append", default=[],
        help="A question; several are the turns of one conversation. Unset: questions are read line by line.",
    )  # fmt: skip
    parser.add_argument(
        "--draw",
        help="Draw the boxes and points of every answer on the last picture shown, and write it to this file.",
    )
    values = read_answering_flags(parser, argv, sampling=True, max_new_tokens=2048)
    if values.draw and _kind_of(values.draw) != "image":
        parser.error(f"--draw {values.draw}: expected the name of a picture, such as found.png")
    return values


def main(argv: list[str]) -> int:
    """Run one conversation; the exit code is 0, or 1 after a message for a user's mistake."""
    return run_command(run, parse_flags(argv), interrupted="Interrupted.")


def run(values: argparse.Namespace) -> None:
    """Answer the questions of the command line, or those of the input."""
    import torch

    # A character that can't be read or shown does not end the conversation.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    torch.manual_seed(values.seed)
    conversation = Conversation(values)
    for question in values.question:
        _check_text(question)
        conversation.ask(question)
    for line in () if values.question else _lines():
        _obey(conversation, line)


def _lines() -> Iterator[str]:
    """The lines of the input, with a prompt where a person types them."""
    while True:
        if sys.stdin.isatty():
            _say("> ")
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.rstrip()


def _obey(conversation: Conversation, line: str) -> None:
    """Do what a line says. A mistake in it does not end the conversation, and Ctrl-C only ends the answer."""
    try:
        _check_text(line)
        if line.startswith(" ") or not _command(conversation, line):
            conversation.ask(line.strip())
    except UserError as error:
        _say(f"error: {error}\n")
    except KeyboardInterrupt:
        _say("\n(stopped; the question does not count)\n")


def _command(conversation: Conversation, line: str) -> bool:
    """Carry out a line that is a command or a path; False when it is a question."""
    word, _, rest = line.partition(" ")
    path = _unquoted(line)
    kind = _kind_of(path)
    if word in ("/image", "/video", "/audio"):
        if not rest.strip():
            raise MessageError(f"{word} needs a file. Enter {word} FILE.")
        conversation.show(word[1:], _unquoted(rest))
    elif word in ("/reset", "/clear"):
        getattr(conversation, word[1:])()
    elif word == "/help":
        _say(HELP)
    elif kind and conversation.find(path):
        conversation.show(kind, path)
        _note(f"{path} is shown with the next question.")
    elif kind and not re.search(r"\s", line):
        raise MessageError(
            f"{path!r} is named like a picture, a video or a sound, but there is no such file. Fix the path, or start "
            "the line with a space to ask it as a question."
        )
    elif re.fullmatch(r"/\w+", word):
        raise MessageError(
            f"there is no command {word}. /help lists them; start the line with a space to ask it as a question."
        )
    else:
        return False
    return True


def _check_text(text: str) -> None:
    """See that a text was valid in the encoding of the terminal.

    Raises:
        MessageError: With the first byte that was not.
    """
    if found := re.search("[\ud800-\udfff]", text):
        raise MessageError(
            f"character {found.start() + 1} of the line is the byte 0x{ord(found[0]) & 0xFF:02x}, which is not "
            f"{sys.stdin.encoding or 'utf-8'}. Set the terminal or the file to that encoding, and enter the line again."
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
