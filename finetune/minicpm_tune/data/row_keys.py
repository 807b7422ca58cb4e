"""Every key of a row, a message and a content part: used, refused with the form that works, or unknown.

A key that changes what a row means must not be passed over in silence: one that is neither used nor refused is
reported by the check of the rows and by ``inspect_data.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from minicpm_tune.errors import RowError

NOTHING: tuple[Any, ...] = (None, "", [], {}, ())  # Parquet fills in such values for keys that a row lacks

ROW_KEYS = {
    "conversations", "messages", "image", "images", "video", "videos", "id", "system", "system_prompt",
    "literal_control_tokens", "objects", "use_audio",
}  # fmt: skip
_MESSAGE_KEYS = {
    "role", "from", "content", "value", "loss", "train", "weight", "loss_scale", "reasoning_content", "reasoning",
    "thinking",
}  # fmt: skip
PART_SOURCES = {
    "image": ("image", "path", "url", "image_url", "data", "base64"),
    "video": ("video", "path", "url", "video_url"),
    "audio": ("audio", "input_audio", "audio_url", "path", "url", "data"),
}
_VIDEO_KEYS = {"fps", "video_fps", "max_frames", "max_num_frames", "use_audio"}

_TOOLS = "tool use can't be trained here. Write calls and results into the texts, or remove the row"
_PAIRS = "preference pairs can't be trained here. Keep the chosen answer alone"
_PIXELS = "the size of an image can't be set one by one. Use --max_slice_nums for all of them"
_REFUSED_ROW_KEYS = {
    "bbox": 'boxes stand in \'objects\', with a <bbox> in the text for each. Write "objects": {"bbox": [[x1, y1, x2, '
    "y2], ...]}",
    "tools": _TOOLS,
    "functions": _TOOLS,
    "history": "earlier turns belong into 'conversations' or 'messages', beside which it stands",
    "rejected": _PAIRS,
    "rejected_response": _PAIRS,
    "chosen": _PAIRS,
    "weight": 'a row can\'t be weighted. Put the "weight" on its answers (0: not learned)',
    "loss": "a row has no 'loss'. Put \"loss\": false on the answers not to learn",
    "loss_scale": 'a row can\'t be weighted. Put the "weight" on its answers (0: not learned)',
    "enable_thinking": "thinking can't be set row by row. Use --enable_thinking for all rows",
    "chat_template_kwargs": "the chat template takes no options from a row. Use --enable_thinking for all rows",
}
_REFUSED_MESSAGE_KEYS = {
    "tool_calls": _TOOLS,
    "function_call": _TOOLS,
    "train_detail": 'all of a message counts alike. Use "loss": true or false, or a "weight"',
}
_REFUSED_PART_KEYS = dict.fromkeys(
    ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "max_slice_nums"), _PIXELS
) | dict.fromkeys(
    ("nframes", "min_frames", "video_start", "video_end"),
    "frames are chosen by 'fps' and 'max_frames'. Use those, or cut the video",
)
# With 1 or true they change nothing.
_NEUTRAL = {"weight", "loss", "loss_scale"}
_AUDIO_KEYS = {"audio", "audios", "audio_path", "audio_paths", "audio_url", "sound", "wav"}
# Keys that name an image or a video elsewhere: image_path, image_1, img, video_file, pictures ...
_MEDIA_KEY = re.compile(r"(image|img|picture|pic|photo|video|clip|frame)s?([ _-]?(\d+|\w*))?", re.IGNORECASE)
_MEDIA_FILE = re.compile(
    r"data:(image|video)/.+|[^\n]{1,300}\.(jpe?g|png|webp|gif|bmp|tiff?|mp4|mkv|avi|mov|webm|m4v|mpe?g)",
    re.IGNORECASE | re.DOTALL,
)
# Facts about an image that stands under a key of its own.
_ABOUT_MEDIA = re.compile(
    r".*(_|\b)(id|ids|name|size|sizes|width|height|url|urls|source|sources|caption|captions|hash|sha256|md5|info)",
    re.IGNORECASE,
)


def read_row_keys(row: Mapping[str, Any], *, model: str, hears: bool = False) -> list[str]:
    """Check a row's keys.

    Args:
        row: The row.
        model: What messages call the model.
        hears: Whether the model takes audio.

    Returns:
        The keys that nothing reads.

    Raises:
        RowError: For a key that would change what the row means.
    """
    for key in _audio_keys(row, "the row", model=model, hears=hears):
        if key not in ("audio", "audios"):
            raise RowError(
                "audio",
                f"the row has {key!r}, expected its audio under 'audio' or 'audios', with an <audio> in the text for "
                "each. Rename the key.",
            )
    _refuse(row, _REFUSED_ROW_KEYS, "the row")
    unknown = _unknown(row, ROW_KEYS | {"audio", "audios"})
    has_media = _has_media(row)
    for key in unknown:
        facts = has_media and _ABOUT_MEDIA.fullmatch(key)
        # In a row without media a file's name under any key is one that was meant to be seen.
        if not facts and (_is_media(key, row[key]) or (not has_media and _names_media(row[key]))):
            raise RowError(
                "media",
                f"the row has {key!r}, expected its media under 'image', 'images', 'video' or 'videos'. Rename the key "
                '(several images: \'images\': ["a.png", "b.png"], with an <image> in the text for each), or have '
                f'--columns \'{{"{key}": "image"}}\' do so.',
            )
    return unknown


def read_message_keys(
    message: Mapping[str, Any], number: int, *, model: str, hears: bool = False
) -> list[str]:
    """The same for a message; ``number`` is that of its turn."""
    place = f"turn {number}"
    if _audio_keys(message, place, model=model, hears=hears):
        raise RowError(
            "audio",
            f"{place} has audio of its own, expected it in the row or in the content. Put it under the row's 'audios', "
            "with an <audio> in the text for each, or make the content a list of parts.",
        )
    _refuse(message, _REFUSED_MESSAGE_KEYS, place)
    unknown = _unknown(message, _MESSAGE_KEYS)
    if "objects" in unknown:
        raise RowError(
            "boxes", f"{place} has 'objects', expected them beside the messages. Move them into the row."
        )
    for key in unknown:
        if key in ("image", "images", "video", "videos") or _is_media(key, message[key]):
            raise RowError(
                "media",
                f"{place} has {key!r}, expected media in the row or in the content. Put them under the row's 'images' "
                "or 'videos', with an <image> or <video> in the text for each, or make the content a list of parts.",
            )
    return unknown


def read_part_keys(part: Mapping[str, Any], kind: str, number: int) -> list[str]:
    """The same for a part of a content list; ``kind`` is ``text``, ``image`` or ``video``."""
    place = f"turn {number}: a part of type {kind!r}"
    _refuse(part, _REFUSED_PART_KEYS, place)
    known = {"type", "text"} if kind == "text" else {"type", "index", *PART_SOURCES[kind]}
    unknown = _unknown(part, known | (_VIDEO_KEYS if kind == "video" else set()))
    for key in unknown:
        if key in _VIDEO_KEYS or _is_media(key, part[key]):
            raise RowError(
                "form", f"{place} has {key!r}, which belongs to another type. Give it a part of its own."
            )
    return unknown


def _unknown(values: Mapping[str, Any], known: set[str]) -> list[str]:
    known = known | _NEUTRAL
    return [str(key) for key, value in values.items() if key not in known and value not in NOTHING]


def _refuse(values: Mapping[str, Any], refused: Mapping[str, str], place: str) -> None:
    for key, advice in refused.items():
        value = values.get(key)
        if value not in NOTHING and not (key in _NEUTRAL and value == 1):  # true, too
            raise RowError("key", f"{place} has {key!r}: {advice}.")


def _audio_keys(values: Mapping[str, Any], place: str, *, model: str, hears: bool) -> list[str]:
    """The keys with audio; there may be none for a model that does not hear."""
    keys = [key for key, value in values.items() if key in _AUDIO_KEYS and value not in NOTHING]
    if keys and not hears:
        raise RowError("audio", f"{place} has {keys[0]!r}, but {model} takes no audio. Remove the row.")
    return keys


def _is_media(key: str, value: Any) -> bool:
    """Whether an unknown key names an image or a video."""
    found = _MEDIA_KEY.fullmatch(key)
    if not found:
        return False
    sure = found[1].lower() not in ("clip", "frame") and re.fullmatch(r"\d*|(path|file)\w*", found[3] or "")
    holding = (str, bytes, bytearray) if sure else (bytes, bytearray)
    return _names_media(value) or any(isinstance(each, holding) for each in _leaves(value))


def _names_media(value: Any) -> bool:
    """Whether a value is, or holds, the name of an image's or a video's file."""
    return any(isinstance(each, str) and _MEDIA_FILE.fullmatch(each) is not None for each in _leaves(value))


def _has_media(row: Mapping[str, Any]) -> bool:
    """Whether a row has media where they belong: under its own keys, or as parts of its messages."""
    if any(row.get(key) not in NOTHING for key in ("image", "images", "video", "videos")):
        return True
    messages = row.get("conversations") or row.get("messages")
    contents = [each.get("content") for each in _list(messages) if isinstance(each, Mapping)]
    parts = [part for content in contents for part in _list(content) if isinstance(part, Mapping)]
    return any(part.get("type") not in (None, "text") for part in parts)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _leaves(value: Any) -> Iterator[Any]:
    """What a value holds at the ends of its lists and objects, however deep they are."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, Mapping):
            left += each.values()
        elif isinstance(each, (list, tuple)):
            left += each
        else:
            yield each


def type_name(value: Any) -> str:
    """A value's type in words, for messages."""
    names = {"str": "a text", "int": "a number", "float": "a number", "list": "a list", "dict": "an object",
             "bool": "true or false", "NoneType": "missing (null)"}  # fmt: skip
    return names.get(type(value).__name__, f"a {type(value).__name__}")


def name_list(keys: Iterable[Any], *, most: int = 8) -> str:
    """Some keys, for messages."""
    return ", ".join(repr(str(key)) for key in list(keys)[:most]) or "(none)"
