"""Finding and loading the library of C++ kernels."""

import shutil

import pytest

from pdmd_kernels import available_backends, native


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler, and then no library")
def test_where_there_is_a_compiler_the_library_was_built():
    """Tests that need the library are skipped without it, so that it is there must be a test of its own."""
    assert "native" in available_backends("cpu")


def test_a_package_without_the_library_has_no_native_kernels(tmp_path):
    assert native.load([str(tmp_path)]) is False


def test_a_library_that_does_not_load_is_told_and_left(tmp_path):
    (tmp_path / native.LIBRARY_NAME).write_bytes(b"built for another torch")
    with pytest.warns(UserWarning, match="build it again"):
        assert native.load([str(tmp_path / "elsewhere"), str(tmp_path)]) is False
