"""benchmarks/gpu_session.sh without a GPU: what is measured survives, limits hold, and every row runs when small."""

import base64
import csv
import hashlib
import json
import sys
import zipfile

import pytest

import gpu_session
import prepare_wheels
from gpu import run_command
from gpu_run import longest_kernels
from support import processes
from support.paths import BENCHMARKS, ROOT


def session(folder, *words, limit=100):
    """The report of a session, and how it ended."""
    path = folder / "report.json"
    command = ["bash", BENCHMARKS / "gpu_session.sh", "--small", "--json", path, *words]
    environment = {**processes.environment(), "PYTHON": sys.executable}
    done = processes.run(command, env=environment, limit=limit)
    return json.loads(path.read_text()), done


def test_the_report_is_written_after_every_row(tmp_path, monkeypatch):
    rows = [gpu_session.Row(name, "here", ("versions",)) for name in ("first", "second")]
    path = tmp_path / "report.json"
    seen = []

    def one(row, folder, limit, *, small):
        seen.append(list(json.loads(path.read_text())["rows"]) if path.exists() else [])
        return {"error": "wrong"} if row.name == "second" else {}

    monkeypatch.setattr(gpu_session, "ROWS", rows)
    monkeypatch.setattr(gpu_session, "run_one", one)
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--json", str(path)])
    assert gpu_session.main() == 1
    assert seen == [[], ["first"]]
    assert json.loads(path.read_text())["rows"]["second"]["error"] == "wrong"


def test_a_row_that_the_time_no_longer_allows_is_not_begun(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    monkeypatch.setattr(gpu_session, "run_one", lambda *_, **__: pytest.fail("begun"))
    monkeypatch.setattr(sys, "argv", ["s", "--json", str(path), "--seconds", "5", "--rows", "versions"])
    assert gpu_session.main() == 1
    assert "time is over" in json.loads(path.read_text())["rows"]["versions"]["error"]


def test_a_command_ends_at_its_limit_with_the_processes_that_it_started(tmp_path):
    marker = tmp_path / "still there"
    done = run_command(["sh", "-c", f"(sleep 3; touch '{marker}') & echo begun; wait"], limit=0.5)
    assert "limit" in done["error"]
    assert "begun" in done["output"]
    with pytest.raises(processes.TookTooLongError):
        processes.run(["sh", "-c", f"until [ -e '{marker}' ]; do sleep 0.2; done"], limit=4)


def test_every_row_is_one_of_the_tests_or_trains_as_flags_say():
    names = [row.name for row in gpu_session.ROWS]
    assert len(set(names)) == len(names)
    for row in gpu_session.ROWS:
        if row.kind == "tests":
            assert (ROOT / row.words[0]).is_file()
        elif row.kind == "here":
            assert row.words[0] in gpu_session.HERE
        else:
            assert row.wish["flags"][::2] == [word for word in row.wish["flags"] if word.startswith("--")]


def test_a_wheel_loses_the_libraries_of_other_devices_and_stays_whole(tmp_path):
    wheel = tmp_path / "some-1-py3-none-any.whl"
    contents = {
        "some/lib_cuda130.so": b"kept", "some/lib_cuda128.so": b"dropped", "some/lib_rocm.so": b"dropped",
        "some/lib_cpu.so": b"kept too", "some/code.py": b"x = 1", "some-1.dist-info/RECORD": b"old",
    }  # fmt: skip
    with zipfile.ZipFile(wheel, "w") as file:
        for name, content in contents.items():
            file.writestr(name, content)
    prepare_wheels.drop_libraries(wheel, r"_cpu\.so$|_cuda130\.so$")
    with zipfile.ZipFile(wheel) as file:
        kept = {name: file.read(name) for name in file.namelist()}
    assert sorted(kept) == sorted(name for name, content in contents.items() if content != b"dropped")
    record = kept.pop("some-1.dist-info/RECORD").decode()
    listed = {row[0]: row[1:] for row in csv.reader(record.splitlines())}
    assert listed.pop("some-1.dist-info/RECORD") == ["", ""]
    for name, (digest, size) in listed.items():
        expected = base64.urlsafe_b64encode(hashlib.sha256(kept[name]).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={expected}", len(kept[name]))
    assert listed.keys() == kept.keys()


def test_the_versions_that_travel_are_those_of_the_requirements():
    versions = prepare_wheels.required_versions()
    assert {*prepare_wheels.REQUIRED, prepare_wheels.BUILT} <= versions.keys()
    assert f"transformers=={versions['transformers']} " in (ROOT / "finetune/requirements.txt").read_text()


def test_the_longest_kernels_are_named_with_their_share():
    import torch

    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    class Event:
        def __init__(self, name, start, end, kind):
            self.name, self.device_type = name, kind
            self.time_range = type("Span", (), {"start": start, "end": end})

    events = [
        Event("a", 0, 10, cuda),
        Event("b", 10, 40, cuda),
        Event("a", 40, 50, cuda),
        Event("c", 0, 9, cpu),
    ]
    found = longest_kernels(events, on_gpu=True, count=1)
    assert found == [{"name": "b", "seconds": pytest.approx(30e-6), "share": pytest.approx(0.6), "calls": 1}]


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_every_row_runs_when_small(tmp_path):
    report, done = session(tmp_path, "--seconds", "1200", "--row_seconds", "300", limit=1250)
    wrong = {name: row["error"] for name, row in report["rows"].items() if "error" in row}
    assert not wrong, f"{wrong}\n{done.stderr[-2000:]}"
    assert list(report["rows"]) == [row.name for row in gpu_session.ROWS]
    assert report["rows"]["kernels as on the CPU"]["passed"] > 20
    official = report["rows"]["V-2.6 LoRA 2048 x 1, official"]
    assert official["plan_gib"]["total"] > 0
    assert len(official["kernels"]) == 15
