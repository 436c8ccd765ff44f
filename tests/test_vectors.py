"""The vectors are what the library makes today, and a reader without any of its code reads them the same way."""

import ast
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "vectors"
sys.path.insert(0, str(FOLDER))  # the two programs there are scripts, not part of a package

import make_vectors  # noqa: E402
import reader  # noqa: E402

MAX_BYTES = 200_000
ALLOWED = {"cryptography", *sys.stdlib_module_names, "plain", "round_reader", "wire"}
# what the reader has to find by itself; everything else of a refused case may change and still be refused
OUTPUTS = {"first", "sha256", "neighbours", "min_survivors", "secret", "tags", "pads", "refused", "read"}
SAMPLE = {"round.json": 12}


def load(name):
    return json.loads((FOLDER / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def made():
    return make_vectors.make_all()


@pytest.mark.parametrize("name", reader.CHECKS)
def test_the_library_makes_the_same_bytes_again(made, name):
    assert made[name] == (FOLDER / name).read_text("utf-8"), "run tests/vectors/make_vectors.py and read the difference"


def test_every_file_is_made_and_read(made):
    assert set(made) == set(reader.CHECKS) == {path.name for path in FOLDER.glob("*.json")}
    assert sum(len(text.encode()) for text in made.values()) < MAX_BYTES


def test_the_vectors_do_not_depend_on_the_moment_they_are_made(made):
    assert make_vectors.make_all() == made


@pytest.mark.parametrize("name", reader.CHECKS)
def test_the_independent_reader_agrees(name):
    assert reader.check_file(FOLDER / name) >= 10


@pytest.mark.parametrize("name", ["reader.py", "round_reader.py", "plain.py", "wire.py"])
def test_the_reader_has_nothing_of_ours_and_no_numpy(name):
    tree = ast.parse((FOLDER / name).read_text("utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in imported} <= ALLOWED


def test_the_reader_runs_by_itself():
    script = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); print('fedseek' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", script, FOLDER / "reader.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(("name", "part"), [("round.json", "refused"), ("messages.json", "refused")])
def test_half_of_the_work_is_what_must_be_refused(name, part):
    assert len(load(name)[part]) > 30
    assert all("efused" in str(case) for case in load(name)[part])


def leaves(value, path=()):
    """Every place in a document that holds a value, as a path of keys."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*path, key))
    else:
        yield path


def altered(value):
    if isinstance(value, int):
        return value + 1
    return (value[:-1] + {"0": "1"}.get(value[-1], "0")) if value else "00"


def agrees(path):
    try:
        return reader.check_file(path) > 0
    except reader.Mismatch:
        return False


def is_output(name, path):
    if name == "round.json" and path[0] != "refused":
        return path[-1] not in ("name", "source")
    return any(key in OUTPUTS for key in path[2:])


@pytest.mark.parametrize("name", reader.CHECKS)
def test_the_reader_finds_every_altered_output(name, tmp_path):
    document = load(name)
    outputs = [path for path in leaves(document) if is_output(name, path)]
    for path in random.Random(1).sample(outputs, min(len(outputs), SAMPLE.get(name, 60))):
        changed = json.loads(json.dumps(document))
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = altered(inner[path[-1]])
        (tmp_path / name).write_text(json.dumps(changed), "utf-8")
        assert not agrees(tmp_path / name), f"{name}: {path} may be anything"
