"""Files are whole or absent, folders have one owner, and the kernel cleans up after the dead."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from medssl.platform import atomic
from medssl.platform.errors import RunError


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    atomic.write_text(path, "old")

    def fail(file):
        file.write(b"half")
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        atomic.write(path, fail)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_full_device_is_one_sentence(tmp_path):
    def fill(file):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")

    with pytest.raises(RunError, match="no space left on the disk; free some"):
        atomic.write(tmp_path / "file", fill)
    assert not list(tmp_path.iterdir())


def hold(folder: Path, ready) -> None:
    with atomic.owned(folder) as mine:
        assert mine
        ready.set()
        signal.pause()


def test_a_folder_has_one_owner_until_that_process_dies(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    with atomic.owned(tmp_path) as mine:
        assert not mine
    process.kill()
    process.join()
    with atomic.owned(tmp_path) as mine:
        assert mine
