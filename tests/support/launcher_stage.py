"""A launcher called with a torchrun and a python that only record how they are called."""

import json
import os
import sys

from support import processes
from support.paths import FINETUNE

VARIABLES = (
    "GPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT MODEL DATA EVAL_DATA LLM_TYPE MODEL_MAX_Length "
    "OUTPUT_DIR PRECISION DEEPSPEED MAX_STEPS OMP_NUM_THREADS DS_ACCELERATOR MAX_RESTARTS RDZV IMG_SIZE HD_NUM "
    "EPOCHS LEARNING_RATE SAVE_STEPS EVAL_STEPS FSDP LAUNCHER LAUNCHER_FLAGS PYTORCH_ALLOC_CONF "
    "PYTORCH_CUDA_ALLOC_CONF"
).split()


class Stage:
    """A folder of recorded programs in front of PATH, and the call of a launcher."""

    def __init__(self, folder):
        self.folder = folder
        self.record = folder / "called.json"
        self.bin = folder / "bin with space"
        self.bin.mkdir()
        self.program("torchrun", "raise SystemExit('not this one')")
        self.hardware("cpu 1 fp32 8 6001")

    def program(self, name, *lines):
        path = self.bin / name
        path.write_text("\n".join([f"#!{sys.executable}", *lines]) + "\n")
        path.chmod(0o755)

    def recorder(self):
        """Lines of a program that writes down its arguments, environment and folder."""
        return (
            "import json, os, sys",
            "call = {'argv': sys.argv[1:], 'env': dict(os.environ), 'cwd': os.getcwd()}",
            f"json.dump(call, open({str(self.record)!r}, 'w'))",
        )

    def hardware(self, answer):
        """Let the python beside torchrun answer for the machine, and record how processes are started."""
        question = "sys.argv[1].endswith('hardware.py')"
        self.program("python", "import sys", f"if {question}: sys.exit(print({answer!r}))", *self.recorder())

    def start(self, launcher, *words, shell="bash", cwd=None, script=None, **variables):
        env = {key: value for key, value in os.environ.items() if key not in VARIABLES}
        env["PATH"] = f"{self.bin}:{env['PATH']}"
        command = [*shell.split(), script or FINETUNE / launcher, *words]
        done = processes.run(command, cwd=cwd or self.folder, env={**env, **variables}, limit=60)
        return done, None if done.returncode else self.call()

    def call(self):
        """The last recorded start of processes."""
        call = json.loads(self.record.read_text())
        return Call(call["argv"], call["env"], call["cwd"])


class Call:
    """What torchrun was given: its own flags, the program, and the program's flags."""

    def __init__(self, argv, env, cwd):
        program = next(index for index, word in enumerate(argv) if word.endswith("finetune.py"))
        self.torchrun, self.program, self.argv = argv[:program], argv[program], argv[program + 1 :]
        self.env, self.cwd = env, cwd

    def value(self, flag):
        """The value that wins: the last one."""
        words = self.torchrun + self.argv
        return words[max(index for index, word in enumerate(words) if word == flag) + 1]
