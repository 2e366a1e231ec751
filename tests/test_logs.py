"""Messages: one logger, the console at its level, the run's folder with everything."""

import logging

import pytest

from medssl.platform import logs
from medssl.platform.errors import UsageError


@pytest.fixture(autouse=True)
def _as_before():
    kept = list(logs.LOGGER.handlers), logs.LOGGER.level, logs.LOGGER.propagate
    yield
    logs.LOGGER.handlers[:], logs.LOGGER.propagate = kept[0], kept[2]
    logs.LOGGER.setLevel(kept[1])


def test_the_console_shows_its_level_and_the_folder_has_all(tmp_path, capsys):
    logs.console("warning")
    with logs.written(tmp_path / "run"):
        logs.LOGGER.debug("quiet")
        logging.getLogger("medssl.methods.mine").warning("loud %d", 3)
    logs.LOGGER.warning("later")
    told = (tmp_path / "run" / "messages.log").read_text()
    assert [line.split()[2:] for line in told.splitlines()] == [["DEBUG", "quiet"], ["WARNING", "loud", "3"]]
    shown = capsys.readouterr().err
    assert "loud 3" in shown
    assert "later" in shown
    assert "quiet" not in shown


def test_a_level_can_be_set_again_and_must_be_one(capsys):
    logs.console("error")
    logs.console("info")
    logs.LOGGER.info("once")
    assert capsys.readouterr().err.count("once") == 1
    with pytest.raises(UsageError, match="--log loud: expected one of debug, info"):
        logs.console("loud")
