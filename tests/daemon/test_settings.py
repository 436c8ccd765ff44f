"""A configuration file is taken whole or refused with all that is wrong in it."""

import pytest
from pydantic import Field

from fedseek.daemon.settings import MAX_SETTINGS_BYTES, Settings, load_settings
from fedseek.errors import InvalidConfig


class Door(Settings):
    name: str
    port: int = Field(ge=1, le=65_535)


def problems_of(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidConfig) as refused:
        load_settings(path, Door)
    assert str(path) in str(refused.value)
    return refused.value.problems


def test_what_is_right_is_taken(tmp_path):
    path = tmp_path / "门.toml"
    path.write_text('name = "北岸"\nport = 8443\n', "utf-8")
    assert load_settings(path, Door) == Door(name="北岸", port=8443)


def test_all_problems_are_told_at_once(tmp_path):
    told = problems_of(tmp_path / "door.toml", 'name = 3\nport = 0\ncolour = "red"\n')
    assert len(told) == 3
    assert {problem.split(":")[0] for problem in told} == {"name", "port", "colour"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        ("name = ", "not TOML"),
        ("#" * (MAX_SETTINGS_BYTES + 1), f"wanted at most {MAX_SETTINGS_BYTES}"),
        ('name = "a"\nport = "8443"\n', "port"),
        ('name = "a"\nport = 1e999\n', "port"),
        ("port = " + "[" * 20_000, "not TOML"),
        ("port = " + "9" * 5000, "not TOML"),
        ("port = 0x" + "f" * 9000, "not TOML"),
    ],
    ids=["bytes", "broken", "long", "text for a number", "infinite", "nested", "digits", "hexadecimal digits"],
)
def test_what_cannot_be_read_is_refused(tmp_path, text, said):
    assert said in problems_of(tmp_path / "door.toml", text)[0]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidConfig, match="No such file"):
        load_settings(tmp_path / "none.toml", Door)
