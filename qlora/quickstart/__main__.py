"""``python -m qlora.quickstart``: put the quickstart's model, data and recipe in place, and say what to do next.

The model goes into the cache, the rest into the current folder. What is there already and whole is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qlora.errors import InputError, QloraError, visible
from qlora.quickstart import data, docstrings

RECIPE = Path(__file__).with_name("quickstart.yaml")


def main(arguments: list[str]) -> int:
    """Prepare everything; the exit status is qlora's: 0 done, 2 input, 3 does not fit."""
    try:
        if arguments:
            raise InputError(
                f"Found {len(arguments)} arguments; 'python -m qlora.quickstart' takes none. It fetches the model, and "
                f"writes the data and {RECIPE.name} into the current folder."
            )
        # before torch is imported, which adds to the standard library that the docstrings describe
        made = [(source, source.write_data()) for source in (data, docstrings)]
        recipe = write_recipe()
        from qlora.quickstart.model import make_model

        print(f"model   {make_model()}")
        for source, counts in made:
            print(f"data    {source.TRAIN} ({counts[0]:,} pairs), {source.HELD_OUT} ({counts[1]:,})")
        print(f"recipe  {recipe}\n")
        print(f"Next:\n  qlora train {RECIPE.name}\n  qlora export runs/{RECIPE.stem} merged")
    except (QloraError, OSError) as error:
        print(f"qlora: {visible(error)}", file=sys.stderr)
        return getattr(error, "exit_status", 2)
    return 0


def write_recipe() -> str:
    """Copy the recipe into the current folder, unless one of that name is there. Its name, and what is to be known."""
    here, text = Path(RECIPE.name), RECIPE.read_text(encoding="utf-8")
    if not here.exists():
        here.write_text(text, encoding="utf-8")
    elif here.read_text(encoding="utf-8") != text:
        return f"{here}, kept as you changed it; delete it to get the original back"
    return str(here)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
