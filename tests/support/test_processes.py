"""A process that a test starts ends at its limit, with all it started, and shows where everything stood."""

import re
import sys
import time

import psutil
import pytest

from support.processes import Started, TookTooLongError, end_what_runs, run

WAITS = "import time\ndef waits_in_here():\n    time.sleep(600)\n"
# A child in a session of its own that keeps the output open, as torchrun's do.
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WAITS + "waits_in_here()"!r}], start_new_session=True)
print("child", child.pid, flush=True)
"""


def child_runs(text):
    """Whether the child runs; one that has ended may wait for a parent that reads its exit code."""
    try:
        return (
            psutil.Process(int(re.search(r"^child (\d+)$", text, re.MULTILINE)[1])).status()
            != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return False


def test_at_the_limit_all_end_and_their_stacks_are_shown():
    started = Started([sys.executable, "-c", PARENT + "child.wait()"])
    started.wait_for(lambda: "child" in started.printed(), limit=60)
    with pytest.raises(TookTooLongError, match="did not end in 2 s") as caught:
        started.end(limit=2)
    text = str(caught.value)
    assert "in waits_in_here" in text
    assert "subprocess.py" in text
    assert not child_runs(text)


def test_a_child_that_outlives_its_parent_is_waited_for_and_ended():
    with pytest.raises(TookTooLongError, match="in waits_in_here") as caught:
        run([sys.executable, "-c", PARENT], limit=5)
    assert not child_runs(str(caught.value))


def test_an_end_gives_the_exit_code_and_both_streams():
    code = "import sys; print(sys.stdin.read()); sys.stderr.write('b'); sys.exit(3)"
    done = run([sys.executable, "-c", code], limit=60, stdin="a")
    assert (done.returncode, done.stdout, done.stderr) == (3, "a\n", "b")
    done = run([sys.executable, "-c", code], limit=60, stdin="a", merged=True)
    assert (sorted(done.stdout), done.stderr) == (["\n", "a", "b"], "")


def test_waiting_for_something_ends_with_the_process_or_the_limit():
    ended = Started([sys.executable, "-c", "print('nothing to wait for')"])
    with pytest.raises(AssertionError, match=r"it has ended:\nnothing to wait for"):
        ended.wait_for(lambda: False, limit=60)
    ended.end(limit=1)
    waits = Started([sys.executable, "-c", f"{WAITS}print('x', flush=True)\nwaits_in_here()"])
    waits.wait_for(lambda: waits.printed(), limit=60)
    with pytest.raises(TookTooLongError, match=r"(?s)still waiting after 0.2 s:\nx\n.*in waits_in_here"):
        waits.wait_for(lambda: False, limit=0.2)


def test_what_a_test_leaves_running_is_ended():
    left = Started([sys.executable, "-c", WAITS + "waits_in_here()"])
    time.sleep(1)
    assert f"process {left.process.pid}" in end_what_runs()
    assert end_what_runs() == ""
    assert not psutil.pid_exists(left.process.pid)
