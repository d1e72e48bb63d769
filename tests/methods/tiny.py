"""Another name for what ``tests/tiny.py`` makes."""

from tests.tiny import *  # noqa: F403
