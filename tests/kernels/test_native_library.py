"""Finding and loading the library of C++ kernels."""

import pytest

from pdmd_kernels import native


def test_a_package_without_the_library_has_no_native_kernels(tmp_path):
    assert native.load([str(tmp_path)]) is False


def test_a_library_that_does_not_load_is_told_and_left(tmp_path):
    (tmp_path / native.LIBRARY_NAME).write_bytes(b"built for another torch")
    with pytest.warns(UserWarning, match="build it again"):
        assert native.load([str(tmp_path / "elsewhere"), str(tmp_path)]) is False
