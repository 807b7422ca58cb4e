"""Places that are written to are checked before the work, and written whole or not at all."""

import pytest
from safetensors import SafetensorError

from minicpm_tune.files import OutputError, check_new_folder, checked_size, whole_folder


def test_sizes_of_shards_are_checked():
    assert checked_size("2.5gb") == "2.5gb"
    for text in ("5", "5GX", "GB", "0GB", "-1GB"):
        with pytest.raises(OutputError, match=r"expected a number with KB, MB, GB or TB"):
            checked_size(text)


def test_a_new_folder_is_checked_before_the_work(tmp_path):
    assert check_new_folder(str(tmp_path / "a/b")) == tmp_path / "a/b"
    assert not (tmp_path / "a/b").exists()
    (tmp_path / "full").mkdir()
    assert check_new_folder(str(tmp_path / "full")) == tmp_path / "full"
    (tmp_path / "full/x").write_text("")
    with pytest.raises(OutputError, match="the folder exists and is not empty"):
        check_new_folder(str(tmp_path / "full"))
    with pytest.raises(OutputError, match="the folder exists and is not empty"):
        check_new_folder(str(tmp_path / "full/x"))
    with pytest.raises(
        OutputError, match=r"--output_dir /proc/1/out: it can't be written: .* GiB are free there"
    ):
        check_new_folder("/proc/1/out")


def stopped_by(error, folder):
    with whole_folder(folder) as partial:
        partial.mkdir()
        raise error


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path):
    folder = check_new_folder(str(tmp_path / "out"))
    with whole_folder(folder) as partial:
        partial.mkdir()
        (partial / "x").write_text("1")
        assert not folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for error, kind in (
        (OSError(28, "No space left on device"), OutputError),
        (SafetensorError("I/O error: No space left on device"), OutputError),
        (RuntimeError("shapes differ: no space left on device"), RuntimeError),
    ):
        with pytest.raises(kind, match=r"(?i)no space left on device"):
            stopped_by(error, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
