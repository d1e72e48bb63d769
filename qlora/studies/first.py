"""First: what can be wrong with a study and costs nothing to find, as ``runs/first.py`` finds it of one run.

Knows what a study asks; must not know torch, nor import what does.
"""

from __future__ import annotations

from qlora.errors import InputError
from qlora.files.durable import expanded, require_writable
from qlora.runs.first import look_at_recipe
from qlora.studies.spec import StudySection, settings_of


def look_at_study(path: str, *overrides: str) -> None:
    """Raise InputError for what a study would be refused for, naming the setting."""
    section = StudySection.from_yaml(path, *overrides)
    folder = expanded(section.folder or "studies/study")
    require_writable(folder, "choose another folder (folder=studies/…)")
    seen = set()
    for setting in settings_of(section):
        recipe = setting.first.in_folder(folder, section.data_root)
        what = repr(
            (recipe.model, recipe.data, recipe.method.from_, recipe.evaluation.tasks, recipe.training.batch_size)
        )
        if what not in seen:
            seen.add(what)
            try:
                look_at_recipe(recipe)
            except InputError as error:
                raise type(error)(f"{setting.name}: {error}") from None
