"""One session on a real GPU: is it correct there, how fast is it, and what takes the time?

    bash benchmarks/gpu_session.sh                      # everything, in at most eight minutes
    bash benchmarks/gpu_session.sh --rows "+ liger" QLoRA   # only the rows whose names hold a word
    bash benchmarks/gpu_session.sh --small              # the same with tiny models on the CPU, as a rehearsal

The rows run in their order, correctness first, each in a process of its own with a limit of --row_seconds. The
report, --json, is written anew after every row, so that whatever ends the session leaves what was measured.

The rows of speed are the same run, LoRA of a model with MiniCPM-V 4.5's released sizes on packed rows of 4096
tokens, with one thing more per row. Weights are random and made on the device; gpu.py says how a row is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu import METHODS, ROOT, draw_data, run_command, run_row

SMALLEST_LIMIT = 15  # seconds; a row is not begun with less
GIB = 1024**3
WITHOUT = ["--use_liger_kernel", "false", "--fp32_residual_connection", "true"]
LIGER = ["--use_liger_kernel", "true", "--fp32_residual_connection", "true"]
ALL = ["--use_liger_kernel", "true", "--fp32_residual_connection", "false"]
NEEDED = (
    "torch", "triton", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "liger_kernel", "datasets",
    "tokenizers", "sentencepiece", "safetensors", "numpy", "PIL", "pyarrow", "pytest", "hypothesis",
)  # fmt: skip
ONLY_ON_A_GPU = {"triton", "liger_kernel"}


@dataclass(frozen=True)
class Row:
    """One row of the report.

    Attributes:
        name: What it is called, and chosen by.
        kind: ``here`` for a function of this file, ``tests``, or ``training``.
        words: Of ``here``: the function's name. Of ``tests``: arguments of pytest.
        wish: Of ``training``: what differs from ``TRAINING``, in the terms of ``gpu_run.measure``.
    """

    name: str
    kind: str
    words: tuple[str, ...] = ()
    wish: dict[str, Any] = field(default_factory=dict)


def _tests(name: str, file: str, *words: str) -> Row:
    return Row(name, "tests", (f"tests/gpu/{file}", *words))


def _training(name: str, method: str, flags: list[str], **wish: Any) -> Row:
    return Row(name, "training", wish={"method": method, "flags": METHODS[method] + flags, **wish})


TRAINING = {
    "model": "v4_5", "length": 4096, "batch": 1, "packing": True, "checkpointing": True, "steps": 5, "warmup": 3,
}  # fmt: skip
OFFICIAL = {"model": "v2_6", "length": 2048, "packing": False, "data": "full.json", "plan": True}
ROWS = (
    Row("versions", "here", ("versions",)),
    _tests("kernels as on the CPU", "test_kernels.py"),
    _tests("models as on the CPU", "test_steps.py", "-k", "not trains"),
    _tests("runs as on the CPU, LoRA", "test_steps.py", "-k", "trains and lora and not qlora"),
    _tests("runs as on the CPU, QLoRA", "test_steps.py", "-k", "trains and qlora"),
    _tests("runs as on the CPU, full", "test_steps.py", "-k", "trains and full"),
    Row("ceilings", "here", ("ceilings",)),
    _training("LoRA 4096 packed, dense mask", "lora", WITHOUT, dense_mask=True),
    _training("+ varlen", "lora", WITHOUT),
    _training("+ liger", "lora", LIGER),
    _training("+ bf16 residual", "lora", ALL),
    _training("+ no checkpointing", "lora", ALL, checkpointing=False),
    _training("QLoRA 4096 packed", "qlora", ALL),
    _training("V-2.6 LoRA 2048 x 1, official", "official-lora", [], **OFFICIAL),
    _training("V-4 full, frozen vision, 8-bit Adam", "full", [], model="v4", length=2048),
)


def versions() -> dict[str, Any]:
    """Versions of everything a session needs, what can't be imported, and the device."""
    import importlib
    import platform

    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count(), "packages": {}}
    missing = []
    for name in NEEDED:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  (whatever it is belongs into the report)
            found["packages"][name] = f"{type(error).__name__}: {error}"[:300]
            if torch.cuda.is_available() or name not in ONLY_ON_A_GPU:
                missing.append(name)
        else:
            found["packages"][name] = getattr(module, "__version__", "no version")
    if missing:
        found["error"] = f"can't import {', '.join(missing)}"
    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {
            "device": card.name, "capability": [card.major, card.minor], "memory_gib": card.total_memory / GIB,
            "multiprocessors": card.multi_processor_count,
        }  # fmt: skip
    return found


def ceilings() -> dict[str, Any]:
    """What the device does at most: bf16 matrix products of the model's shapes, and a copy within its memory."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    shapes = [(8192, 8192, 8192), (4096, 4096, 12288), (4096, 12288, 4096), (4096, 4096, 64)]
    found: dict[str, Any] = {"tflops": {}}
    for rows, inner, columns in shapes if on_gpu else [(64, 64, 64)]:
        left = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        right = torch.randn(inner, columns, device=device, dtype=torch.bfloat16)
        seconds = _median_seconds(lambda left=left, right=right: left @ right, on_gpu=on_gpu)
        found["tflops"][f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / seconds / 1e12
    source = torch.randn(2**30 if on_gpu else 2**16, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), on_gpu=on_gpu)
    found["copy_gb_per_second"] = 2 * source.nbytes / seconds / 1e9
    host = torch.randn(2**28 if on_gpu else 2**16, pin_memory=on_gpu)
    seconds = _median_seconds(lambda: source[: host.numel()].copy_(host), on_gpu=on_gpu)
    found["host_to_device_gb_per_second"] = host.nbytes / seconds / 1e9
    return found


def _median_seconds(work: Callable[[], Any], *, on_gpu: bool, repeats: int = 20) -> float:
    import torch

    seconds = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


HERE = {"versions": versions, "ceilings": ceilings}


def run_tests(words: tuple[str, ...], folder: Path, limit: float, *, small: bool) -> dict[str, Any]:
    """Run tests marked gpu; give how many passed, and what failed."""
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}",
        f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), str(ROOT / words[0]), *words[1:],
    ]  # fmt: skip
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "MINICPMV_CACHE": str(folder),
    }
    if small:
        environment["REHEARSE_GPU_TESTS"] = "1"
    done = run_command(command, limit=limit, environment=environment)
    if not report.exists():
        return {"error": done.get("error", "no test ran"), "output": done["output"][-3000:]}
    cases = list(ElementTree.parse(report).iter("testcase"))
    wrong = {
        f"{case.get('classname')}::{case.get('name')}": (part.get("message") or "")[:500]
        + "\n"
        + (part.text or "")[-1500:]
        for case in cases
        for part in case
        if part.tag in ("failure", "error")
    }
    skipped = {
        str(case.get("name")): str(part.get("message")) for case in cases for part in case.iter("skipped")
    }
    found: dict[str, Any] = {"passed": len(cases) - len(wrong) - len(skipped), "skipped": skipped}
    return found | ({"error": f"{len(wrong)} of {len(cases)} tests failed", "failed": wrong} if wrong else {})


def run_one(row: Row, folder: Path, limit: float, *, small: bool) -> dict[str, Any]:
    """Run one row within its limit."""
    if row.kind == "here":
        command = [sys.executable, __file__, "--one", row.words[0]]
        done = run_command(command, limit=limit)
        return done if "error" in done else json.loads(done["output"].splitlines()[-1])
    if row.kind == "tests":
        return run_tests(row.words, folder, limit, small=small)
    wish = {**TRAINING, **row.wish, "small": small, "folder": str(folder)}
    if small:
        wish |= {"steps": 2, "warmup": 1, "length": 512, "bf16": True, "flags": _for_a_cpu(wish["flags"])}
    return {"wish": wish} | run_row(wish, limit=limit)


def _for_a_cpu(flags: list[str]) -> list[str]:
    """The flags without liger, which a CPU can't run."""
    return ["false" if flags[index - 1] == "--use_liger_kernel" else word for index, word in enumerate(flags)]


def line_of(row: Row, found: dict[str, Any]) -> str:
    """A line for the reader; the report has the rest."""
    if "error" in found:
        return found["error"]
    if row.kind == "training":
        figures = {"tokens/s": found["tokens_per_second"], "MFU": found["mfu"], "peak GiB": found["peak_gib"]}
        if "plan_gib" in found:
            figures["planned GiB"] = found["plan_gib"]["total"]
        return ", ".join(f"{name} {'-' if cell is None else f'{cell:.4g}'}" for name, cell in figures.items())
    if row.kind == "tests":
        return f"{found['passed']} passed, {len(found['skipped'])} skipped"
    return json.dumps(found)


def main() -> int:
    """Run the rows; the exit code is 0 if none of them failed."""
    options = _flags()
    if options.one:
        print(json.dumps(HERE[options.one]()))
        return 0
    end = time.monotonic() + options.seconds
    chosen = [row for row in ROWS if not options.rows or any(word in row.name for word in options.rows)]
    report: dict[str, Any] = {"small": options.small, "begun": time.strftime("%Y-%m-%d %H:%M"), "rows": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if any(row.kind == "training" for row in chosen):
            draw_data(folder)
        for row in chosen:
            limit = min(options.row_seconds, end - time.monotonic())
            begun = time.monotonic()
            if limit < SMALLEST_LIMIT:
                found: dict[str, Any] = {"error": "not begun: the session's time is over"}
            else:
                found = run_one(row, folder, limit, small=options.small)
            report["rows"][row.name] = {"wall": time.monotonic() - begun, **found}
            write(Path(options.json), report)
            print(f"{row.name:<38}{line_of(row, found)}", flush=True)
    return int(any("error" in found for found in report["rows"].values()))


def write(path: Path, report: dict[str, Any]) -> None:
    """Replace the report, so that a reader never sees half of one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One session on a GPU: correctness, speed, memory.")
    parser.add_argument("--json", default="gpu_session.json", help="the report")
    parser.add_argument("--rows", nargs="+", default=[], help="only rows whose names hold one of these")
    parser.add_argument("--seconds", type=float, default=460, help="of the whole session")
    parser.add_argument("--row_seconds", type=float, default=75, help="limit of each row")
    parser.add_argument("--small", action="store_true", help="tiny models, on whatever device there is")
    parser.add_argument("--one", choices=list(HERE), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
