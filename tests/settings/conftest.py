"""A folder in which a command line can be tried."""

import pytest


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model (its config), rows and nothing else, as the current folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return tmp_path
