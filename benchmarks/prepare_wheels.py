"""Pack what gpu_session.sh needs on a machine with torch and CUDA, but without a network or our versions.

    python benchmarks/prepare_wheels.py wheels [--python 3.12] [--cuda 130]

Run it where pip reaches an index, in this project's environment (DeepSpeed's setup imports torch). Versions are those
of finetune/requirements.txt. The folder takes about 25 MB: DeepSpeed is built from its source without compiled
operators, and bitsandbytes keeps one CUDA library of its ten.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Of finetune/requirements.txt: what a machine with torch and an older transformers lacks or has too old.
REQUIRED = ("transformers", "peft", "bitsandbytes", "datasets")
BUILT = "deepspeed"
# What these need and torch does not bring, and the tests' own needs.
MORE = (
    "liger-kernel", "hjson", "pydantic", "annotated-types", "typing-inspection", "dill==0.4.1", "multiprocess<0.70.20",
    "xxhash",
)  # fmt: skip
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)


def required_versions() -> dict[str, str]:
    """Name -> the version of finetune/requirements.txt."""
    text = (ROOT / "finetune" / "requirements.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))


def download(folder: Path, names: list[str], python: str) -> None:
    """Fetch wheels of exactly these packages, for the other machine's Python."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    _pip(
        "download", "--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp",
        *platforms, "-d", str(folder), *names,
    )  # fmt: skip


def build(folder: Path, requirement: str) -> None:
    """Make a wheel of a source distribution without compiling anything."""
    # No isolation: DeepSpeed's setup looks at the installed torch.
    _pip(
        "wheel", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-w", str(folder), requirement,
        environment={"DS_BUILD_OPS": "0"},
    )  # fmt: skip


def _pip(*words: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, env=os.environ | (environment or {}))


def drop_libraries(wheel: Path, keep: str) -> None:
    """Rewrite a wheel without the compiled libraries whose names do not match, its RECORD included.

    Args:
        wheel: The file, replaced.
        keep: Regular expression of the names of ``.so`` files that stay.
    """
    with zipfile.ZipFile(wheel) as whole:
        kept = {
            name: whole.read(name)
            for name in whole.namelist()
            if not name.endswith(".so") or re.search(keep, name)
        }
    (record,) = (name for name in kept if name.endswith(".dist-info/RECORD"))
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    for name, content in kept.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow([name, "", ""] if name == record else [name, f"sha256={digest}", len(content)])
    kept[record] = lines.getvalue().encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as smaller:
        for name, content in kept.items():
            smaller.writestr(name, content)


def main() -> None:
    """Fill the folder, and print its size."""
    parser = argparse.ArgumentParser(description="Wheels for a GPU session without a network.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the other machine's Python")
    parser.add_argument("--cuda", default="130", help="CUDA version of its torch: 130 is 13.0")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    versions = required_versions()
    download(options.folder, [f"{name}=={versions[name]}" for name in REQUIRED] + list(MORE), options.python)
    # pydantic takes exactly one version of its compiled half.
    (pydantic,) = options.folder.glob("pydantic-*.whl")
    with zipfile.ZipFile(pydantic) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        (core,) = re.findall(r"^Requires-Dist: (pydantic-core==[\w.]+)", file.read(metadata).decode(), re.M)
    download(options.folder, [core], options.python)
    build(options.folder, f"{BUILT}=={versions[BUILT]}")
    (bitsandbytes,) = options.folder.glob("bitsandbytes-*.whl")
    drop_libraries(bitsandbytes, rf"_cpu\.so$|_cuda{options.cuda}\.so$")
    size = sum(path.stat().st_size for path in options.folder.glob("*.whl"))
    print(f"{len(list(options.folder.glob('*.whl')))} wheels, {size / 1e6:.0f} MB in {options.folder}")


if __name__ == "__main__":
    main()
