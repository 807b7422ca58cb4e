"""Python imports this at its start, in every process that a test starts: SIGUSR2 writes the stacks of all threads.

``support/processes.py`` puts this folder on PYTHONPATH, sends the signal and reads the files.
"""

import faulthandler
import os
import signal

_path = os.path.join(os.environ["STACKS_FOLDER"], f"{os.getpid()}.txt")
# No stream of Python's own: it would be closed, with a warning, when the interpreter ends.
faulthandler.register(
    signal.SIGUSR2, file=os.open(_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), all_threads=True
)
