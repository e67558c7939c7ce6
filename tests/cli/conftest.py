"""Shared by the tests of the command line."""

import pytest
from perdure_shell import Shell


@pytest.fixture
def bare(tmp_path):
    return Shell(tmp_path)


@pytest.fixture
def shell(bare):
    bare("init")
    return bare


@pytest.fixture
def worded(tmp_path):
    """Of a repository that a passphrase unlocks."""
    made = Shell(tmp_path, "correct horse")
    made("init")
    return made
