"""How a process starts and ends: messages, exit codes, and a screen that goes away."""

import errno
import io
import logging
import os
import sys

import pytest

from minicpm_tune import logs, processes
from minicpm_tune.errors import UserError
from minicpm_tune.settings.arguments import TrainingArguments
from minicpm_tune.training.process_lifecycle import ProcessLifecycle, run_command


@pytest.fixture
def lifecycle(monkeypatch):
    """What sets up the rest of its process sets up nothing."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr("minicpm_tune.training.process_lifecycle.log_to_screen", lambda **_: None)
    return ProcessLifecycle


def test_a_mistake_is_one_message_and_cleans_up(lifecycle, capsys):
    class LeftError(UserError):
        def clean_up(self):
            sys.stderr.write("cleaned up")

    process = lifecycle()
    with process.user_errors_as_messages():
        raise LeftError("a.json: row 3: no answer.")
    assert process.exit_code == 1
    assert capsys.readouterr().err == "\nerror: a.json: row 3: no answer.\ncleaned up"


def test_a_fault_of_the_program_is_no_message(lifecycle):
    with pytest.raises(KeyError, match="x"), lifecycle().user_errors_as_messages():
        raise KeyError("x")


def test_processes_started_again_need_a_store_of_their_own(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    processes.check_restart()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match=r"can't find each other\. Use the launchers with MAX_RESTARTS"):
        TrainingArguments(output_dir="out")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    processes.check_restart()


def test_a_command_gives_its_own_exit_code(lifecycle):
    assert run_command(lambda values: values, 3, interrupted="") == 3
    assert run_command(lambda values: None, None, interrupted="") == 0


def test_what_a_lost_screen_can_not_show_is_dropped(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as broken:
        stream = logs._LastingStream.around(broken)
        assert logs._LastingStream.around(stream) is stream
        assert stream.write("lost\n") == 5
        assert stream.write("dropped\n") == 8
        stream.flush()
        os.write(writer, b"by a library in C")
    with pytest.raises(OSError, match="Bad file"):
        os.write(writer, b"x")


def test_a_stream_without_a_number_is_dropped_too():
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    assert logs._LastingStream.around(Gone()).write("lost") == 4


def test_only_the_first_process_shows_more_than_warnings(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    for first in (True, False):
        shown = io.StringIO()
        monkeypatch.setattr(sys, "stderr", shown)
        logs.log_to_screen(first=first)
        logging.getLogger("minicpm_tune.x").info("a line")
        logging.getLogger("minicpm_tune.x").warning("a warning")
        logging.getLogger(logs.LOG_ONLY).info("a number")
        assert shown.getvalue() == ("a line\n" if first else "") + "a warning\n"
