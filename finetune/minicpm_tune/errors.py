"""Mistakes of the user's, shown as messages: in one row, in a file or a whole data set, in what is asked."""

from __future__ import annotations

OVER_LONG = "over-long"
_BEGINNING, _END = 3000, 1000  # characters of a message that are shown when a row's value has made it longer


class UserError(ValueError):
    """A mistake of the user's: shown as one message, without a traceback.

    Its text says where, what was found, what was expected and what to do.
    """

    def clean_up(self) -> None:
        """Undo what the mistake left behind; called when the message is out."""


class MessageError(UserError):
    """Messages that can't be put to a model."""


class RowError(UserError):
    """A row that can't be used.

    Attributes:
        kind: A short name of the problem, the same for all rows with it; reports count by it.
    """

    def __init__(self, kind: str, message: str) -> None:
        if len(message) > _BEGINNING + _END:
            message = f"{message[:_BEGINNING]} ... {message[-_END:]}"
        super().__init__(message)
        self.kind = kind

    def __reduce__(
        self,
    ) -> tuple[type[RowError], tuple[str, str]]:  # so that it survives the way out of a worker process
        return type(self), (self.kind, str(self))


def check_unicode(text: str, place: str) -> None:
    """See that a text can be written as UTF-8.

    Raises:
        RowError: When it holds half of a character, such as an emoji cut in two.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start : error.end].encode("ascii", "backslashreplace").decode()
        raise RowError(
            "text",
            f"{place} has {found}, which is half of a character (an emoji that was cut?), expected whole ones. Write "
            "the text again, or remove the row.",
        ) from error


class DroppedRowError(RowError):
    """A row that the user asked to leave out (``--overlength drop``)."""


class DataError(UserError):
    """A data file, or rows of it, that can't be trained on."""
