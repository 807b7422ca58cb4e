"""``model.chat``, in the calling form of the released models."""

from __future__ import annotations

from typing import Any


class ChatMixin:
    """Gives a model class ``chat``."""

    processing: Any = None  # the checkpoint's ``Processing``, once ``chat`` has loaded it

    def chat(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a conversation; see ``minicpm_tune.answering.chat.chat`` for the arguments."""
        # The one import of a higher room: users call ``chat`` on the model, but prompts are the data side's.
        from minicpm_tune.answering.chat import chat

        return chat(self, *args, **kwargs)
