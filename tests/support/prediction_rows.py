"""Rows for predictions, and what the small model answers them."""

from minicpm_tune.answering.generate import GREEDY
from support.paths import IMAGES
from support.rows import picture
from support.tiny_checkpoints import checkpoint, loaded

TOKENS = 6


def rows():
    """Five rows: one image, none, several turns, no answer to compare, a system turn and two images."""

    def turns(*texts):
        return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]

    small, wide = str(IMAGES / "small.png"), str(IMAGES / "wide.png")
    return [
        {"id": "a", "image": small, "conversations": turns("<image>\nWhat is it?", "A cat.")},
        {"id": "b", "conversations": turns("How many cats are there?", "Two.")},
        {
            "id": "c",
            "image": small,
            "conversations": turns("<image>\nWhat is it?", "A cat.", "Why?", "It has fur."),
        },
        {"id": "d", "image": small, "conversations": turns("<image>\nAnd the color?")},
        {
            "image": {"<image_00>": small, "<image_01>": wide},
            "conversations": [
                {"role": "system", "content": "Be brief."},
                *turns("<image_00>\n<image_01>\nDescribe the picture.", "Cats."),
            ],
        },
    ]


def expected_predictions(name="v2_6"):
    model = loaded(checkpoint(name), name)
    small, wide = picture(), picture("wide")
    messages = [
        [{"role": "user", "content": [small, "What is it?"]}],
        [{"role": "user", "content": "How many cats are there?"}],
        [
            {"role": "user", "content": [small, "What is it?"]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Why?"},
        ],
        [{"role": "user", "content": [small, "And the color?"]}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [small, wide, "Describe the picture."]},
        ],
    ]
    return [model.chat(msgs=msgs, sampling=False, max_new_tokens=TOKENS, **GREEDY) for msgs in messages]
