"""The examples of the documentation: rows load, and code runs."""

import json
import re

import pytest

from minicpm_tune.data.row_parsing import parse_row
from support.pages import PAGES, fenced, name_of

EXAMPLES = [(name_of(page), text) for page in PAGES for text in fenced(page, "json")]


@pytest.mark.parametrize(
    ("page", "text"), EXAMPLES, ids=[f"{page}-{at}" for at, (page, _) in enumerate(EXAMPLES)]
)
def test_rows_are_used_as_they_stand(page, text):
    for row in json.loads(text):
        conversation = parse_row(row)
        assert conversation.turns[-1].role == "assistant"
        paths = re.findall(r'"([\w/]+\.(?:jpg|png))"', json.dumps(row))
        assert [source.value for source in conversation.sources] == paths
