"""Kernels that are built where they run."""

from pathlib import Path

import pytest

from gristmill.core.native import build_library


def test_a_library_is_built_once_and_only_with_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "double.cpp"
    source.write_text('extern "C" int twice(int x) { return 2 * x; }')
    library = build_library([source], "double")
    if library is None:
        pytest.skip("no compiler")
    assert library.twice(21) == 42
    (kept,) = (tmp_path / "cache" / "gristmill").iterdir()
    written = kept.stat().st_mtime_ns
    assert build_library([source], "double") is not None and kept.stat().st_mtime_ns == written
    source.write_text("this is no program")
    assert build_library([source], "double") is None
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert build_library([source], "double") is None
    monkeypatch.setenv("GRISTMILL_KERNELS", "0")
    assert build_library([source], "double") is None


def test_a_changed_header_makes_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, header = tmp_path / "answer.cpp", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\n#include "vectors.h"\nextern "C" int answer() { return ANSWER; }')
    for number in (41, 42):
        header.write_text(f"#define ANSWER {number}")
        library = build_library([source], "answer")
        if library is None:
            pytest.skip("no compiler")
        assert library.answer() == number
