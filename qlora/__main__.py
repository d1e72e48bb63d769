"""``python -m qlora``, as a launcher of several processes starts it: the command line."""

from __future__ import annotations

from qlora.cli import entry

entry()
