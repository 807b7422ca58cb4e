"""Talk to a MiniCPM-V model about pictures, with or without an adapter.

    python chat.py --model_name_or_path M [--adapter A] --image a.jpg [--image b.jpg] --question "What is it?"

Pictures stand in front of the question, or where it says ``<ImageHere>``. Without ``--question`` it is a
conversation: a line is a question, ``/image FILE`` and ``/video FILE`` show something with the next one,
``/reset`` starts over, ``/quit`` (or the end of the input) leaves. The module also offers the official
chat.py's ``MiniCPMVChat`` and ``img2base64``.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from minicpm_tune.settings.command_flags import (
    CommandParser,
    add_generation_flags,
    add_model_flags,
    check_generation_flags,
)
from minicpm_tune.training.process_lifecycle import run_command


def img2base64(file_name: str | Path) -> bytes:
    """Read a picture's file as base64, as ``MiniCPMVChat`` takes it."""
    return base64.b64encode(Path(file_name).read_bytes())


class MiniCPMVChat:
    """The official chat.py's interface: base64 pictures and JSON messages in, the answer out.

    Args:
        model_path: A checkpoint's folder or hub id, or an adapter's folder.
        **choice: Further fields of ``inference.ModelChoice``: ``adapter``, ``dtype``, ``device``, ...
    """

    def __init__(self, model_path: str, **choice: Any) -> None:
        from minicpm_tune.answering.load import ModelChoice, load_for_inference

        self.model, self.processing = load_for_inference(ModelChoice(str(model_path), **choice))
        self.tokenizer = self.processing.tokenizer

    def chat(self, input: dict[str, Any], **options: Any) -> str:
        """Answer.

        Args:
            input: ``{"image": base64, "question": JSON of the messages}``; the image may be left out. A
                message's content is a text, or a list of ``{"type": "text", "pairs": ...}`` and
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

    from minicpm_tune.answering.chat import MessageError

    try:
        return Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))).convert("RGB")
    except (binascii.Error, OSError) as error:
        raise MessageError(
            f"the image can't be read ({error}), expected a picture's file in base64. Use img2base64."
        ) from error


class Conversation:
    """One conversation on the screen: what was said, and what is shown with the next question.

    Args:
        values: The command line.
    """

    def __init__(self, values: argparse.Namespace) -> None:
        from minicpm_tune.answering.load import ModelChoice, find_model, load_for_inference

        self.values = values
        choice = ModelChoice.of(values)
        found = find_model(choice)
        self.processing = found.processing
        # Before the weights are loaded, which can take minutes.
        self.shown = [self._open("image", path) for path in values.image]
        self.shown += [self._open("video", path) for path in values.video]
        self.model, _ = load_for_inference(choice, found)
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        system = self.values.system_prompt
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def _open(self, kind: str, path: str) -> Any:
        """Open and decode a picture, which every further turn needs again."""
        from minicpm_tune.data.media.images import ImageOptions, open_image
        from minicpm_tune.data.media.videos import open_video
        from minicpm_tune.errors import RowError

        generation, rules = self.processing.generation, self.processing.media.video
        options = ImageOptions(Path(), upright=generation.upright_images)
        if kind == "image":
            picture = open_image(path, options)
        elif rules is not None:
            picture = open_video(path, options, rules)
        else:
            raise RowError(
                "video", f"{generation.title} was not trained on video, expected images. Use --image."
            )
        frames = list(picture.frames())
        return replace(picture, frames=lambda: frames)

    def show(self, kind: str, path: str) -> None:
        """Show a picture with the next question; ``kind`` is image or video."""
        self.shown.append(self._open(kind, path))

    def ask(self, question: str) -> None:
        """Ask, and write the answer to the screen while it is generated."""
        from minicpm_tune.answering.chat import place_pictures, read_messages
        from minicpm_tune.answering.generate import TextPieces, answer, generation_options, stop_ids

        content = place_pictures(question, self.shown)
        asked = [*self.messages, {"role": "user", "content": content}]
        turns, pictures = read_messages(asked, joined_by=self.processing.generation.image_end)
        sample = self.processing.encode_prompt(turns, pictures, thinking=self.values.enable_thinking)
        options = generation_options(self.values)
        streams = options.get("num_beams", 1) == 1
        streamer = TextPieces(self.processing.tokenizer, stop_ids(self.processing), _say) if streams else None
        [text] = answer(self.model, self.processing, [sample], streamer=streamer, **options)
        _say("\n" if streams else text + "\n")
        self.messages = [*asked, {"role": "assistant", "content": text}]
        self.shown = []


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(prog="chat.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--image", action="append", default=[], help="A picture; may be given several times.")
    parser.add_argument("--video", action="append", default=[], help="A video, or a folder of its frames.")
    parser.add_argument(
        "--question", action="append", default=[],
        help="A question; several are the turns of one conversation. Unset: questions are read line by line.",
    )  # fmt: skip
    add_model_flags(parser)
    add_generation_flags(parser, sampling=True, max_new_tokens=2048)
    values = parser.parse_args(argv)
    check_generation_flags(parser, values)
    return values


def main(argv: list[str]) -> int:
    """Run one conversation, and give the exit code: 0, or 1 with one message for a mistake of the user's."""
    return run_command(run, parse_flags(argv), interrupted="")


def run(values: argparse.Namespace) -> None:
    """Answer the questions of the command line, or those of the input."""
    from transformers import set_seed

    set_seed(values.seed)
    conversation = Conversation(values)
    if values.question:
        for question in values.question:
            conversation.ask(question)
        return
    for line in _lines():
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
            yield line.strip()


def _obey(conversation: Conversation, line: str) -> None:
    """Do what a line says; a mistake in it does not end the conversation."""
    from minicpm_tune.answering.chat import MessageError
    from minicpm_tune.errors import RowError

    try:
        if line == "/reset":
            conversation.reset()
        elif line.startswith(("/image ", "/video ")):
            kind, _, path = line[1:].partition(" ")
            conversation.show(kind, path.strip())
        else:
            conversation.ask(line)
    except (MessageError, RowError) as error:
        _say(f"error: {error}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
