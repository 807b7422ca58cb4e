"""The package: one version, the pinned requirements, and an installation of nothing but minicpm_tune."""

import json
import shutil
import sys
import tomllib

import pytest

import minicpm_tune
from support import processes
from support.paths import FINETUNE, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(path):
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package, built from a copy of what it is made of, offline, and installed into a folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("finetune", "demo"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("output", "runs", "__pycache__")
        )
    flags = "--quiet --no-deps --no-index --no-build-isolation --disable-pip-version-check".split()
    words = [sys.executable, "-m", "pip", "install", *flags, "--target", target, source]
    done = processes.run(words, limit=200)
    assert done.returncode == 0, done.stderr
    return target


def test_the_package_alone_is_installed(installed):
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == [
        "minicpm_tune"
    ]
    for form in ("*.py", "*.html", "*.css", "*.js"):
        expected = {path.relative_to(FINETUNE) for path in (FINETUNE / "minicpm_tune").rglob(form)}
        assert {path.relative_to(installed) for path in installed.rglob(form)} == expected != set()


def test_it_says_the_version_that_the_source_says(installed):
    code = "import importlib.metadata as m, json; import minicpm_tune as t; "
    code += "print(json.dumps([t.__file__, t.__version__, m.version('minicpm-tune'), m.requires('minicpm-tune')]))"
    words = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(installed)!r}); {code}"]
    done = processes.run(words, limit=100)
    assert done.returncode == 0, done.stderr
    file, version, declared, requires = json.loads(done.stdout)
    assert file.startswith(str(installed))
    assert version == declared == minicpm_tune.__version__
    assert [name for name in requires if "extra" not in name] == pins(FINETUNE / "requirements.txt")


def test_the_extra_for_developers_is_what_the_tests_need():
    extras = PROJECT["optional-dependencies"]
    assert extras["dev"] == pins(ROOT / "tests" / "requirements.txt")
    assert {*extras["video"], *extras["audio"]} <= set(extras["dev"])


def test_the_newest_version_of_the_changelog_is_the_package_s():
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest == f"## {minicpm_tune.__version__}"
