"""Files and values of strangers: bounds, bare names, printable forms."""

import os
from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.core.untrusted import MAX_QUOTED, is_bare_name, quoted, read_untrusted_json


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe{\0}\0", "not valid JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": [1, -Infinity]}', "-Infinity is no number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "no JSON object"),
        (b'{"a": "' + b"x" * 200 + b'"}', "larger than 100 bytes"),
    ],
    ids=["lists", "objects", "utf-16", "nan", "infinity", "digits", "empty", "list", "large"],
)
def test_what_is_no_json_object_of_use_is_told_in_one_sentence(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match=said) as caught:
        read_untrusted_json(tmp_path / "a.json", 100 if said.startswith("larger") else 1 << 20)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_pipes_devices_and_loops_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, said in (("pipe", "no regular file"), ("zero", "no regular file"), ("loop", "does not exist"), ("x" * 300, "does not")):
        with pytest.raises(InputError, match=said):
            read_untrusted_json(tmp_path / name)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1f2e").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to("blobs/1f2e")
    assert read_untrusted_json(tmp_path / "config.json") == {"a": 1}


def test_a_bare_name_has_no_way_out_of_its_folder() -> None:
    assert is_bare_name("model-00001-of-00002.safetensors") and is_bare_name("..a") and is_bare_name("a b")
    for name in ("", ".", "..", "../a", "/a", "a/b", "a\\b", "a\0b", "x" * 256, 5, None, ["a"]):
        assert not is_bare_name(name), name


def test_what_is_quoted_can_be_printed() -> None:
    for value in ("\x1b[2Jgone", "a\nb", "\u202e", "x" * 10**6, list(range(10**6)), {"k": "\x07" * 500}, 10**300, "\ud800"):
        text = quoted(value)
        assert text.isascii() and text.isprintable() and len(text) <= MAX_QUOTED
    assert quoted("gelu") == "'gelu'" and quoted(0.5) == "0.5"
