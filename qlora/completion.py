"""Completion in a shell: what may follow the words that are typed.

    qlora completion bash ─► a script for the shell ─► at each Tab: qlora completion words train mine.yaml training.ep ─► lines

Verbs, recipes and run folders, sections and keys of a recipe, and the values of a key where they are few. Knows names and files;
must not know what a verb does, nor import torch: a Tab waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from glob import escape
from pathlib import Path

from qlora.errors import InputError

SCRIPTS = {
    "bash": """_qlora() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}" typed
    IFS=' ' read -r -a typed <<< "${line#* }"
    [[ $line == *' ' ]] && typed+=("")
    local last="${typed[-1]}"
    COMPREPLY=($(qlora completion words "${typed[@]}" 2>/dev/null))
    [[ ${#COMPREPLY[@]} -eq 0 ]] && compopt -o default
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace
    [[ $last == *=* ]] && COMPREPLY=("${COMPREPLY[@]#*=}")
    return 0
}
complete -F _qlora qlora
""",
    "zsh": """#compdef qlora
_qlora() {
    local -a found
    found=("${(@f)$(qlora completion words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=("${(@)found:#}")
    (( ${#found} )) && compadd -S '' -- "${found[@]}" || _files
}
compdef _qlora qlora
""",
    "fish": """function __qlora_words
    set -l typed (commandline -opc) (commandline -ct)
    qlora completion words $typed[2..] 2>/dev/null
end
complete -c qlora -f -a '(__qlora_words)'
""",
}
WHERE = {
    "bash": 'eval "$(qlora completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(qlora completion zsh)"   # in ~/.zshrc, after compinit',
    "fish": "qlora completion fish | source   # in ~/.config/fish/config.fish",
}


def script(shell: str) -> str:
    """What a shell is to run so that it completes ``qlora``. Raises InputError for a shell that is not known."""
    if shell not in SCRIPTS:
        raise InputError(f"There is no completion for '{shell}'; expected {', '.join(SCRIPTS)}.")
    return f"# {WHERE[shell]}\n{SCRIPTS[shell]}"


def complete(typed: Sequence[str], takes: dict[str, str]) -> list[str]:
    """What the last of the ``typed`` words may become. ``takes``: what each verb takes first, as ``RECIPE`` or ``RUN``."""
    *before, last = typed or [""]
    if not before:
        return _beginning(last, [*takes, "--help", "--version"])
    verb, first = before[0], takes.get(before[0], "").partition(" ")[0].strip("[]")
    if verb == "init" and before[-1].startswith("--") and "=" not in before[-1]:  # --card 4090
        return _beginning(last, _keys(verb).get(before[-1][2:].replace("-", "_"), []))
    if verb == "report" and "=" not in last and (runs := _places(last, first)):  # it takes several
        return runs
    if len(before) == 1 and verb != "init":
        return [
            *_places(last, first),
            *_beginning(last, _words(verb, 1)),
            *_beginning(last, ["--help"] if last else []),
        ]
    dashes = "--" if last.startswith("--") else ""
    return [dashes + word for word in _key_or_value(last.removeprefix("--"), before)]


def _words(verb: str, place: int) -> list[str]:
    """The fixed words of a verb at that place after it."""
    from qlora.exporting import TARGETS

    there = {
        ("export", 2): list(TARGETS),
        ("completion", 1): list(SCRIPTS),
        ("recipe", 1): sorted({key.partition(".")[0] for key in _keys("recipe")}),
        ("study", 2): ["plan"],
    }
    return there.get((verb, place), [])


def _keys(verb: str) -> dict[str, list[str]]:
    """The keys that may follow a verb's first word, and their values where they are few."""
    from qlora.machine.cards import CARDS
    from qlora.recipe import choices
    from qlora.runs.folder import CHANGEABLE, LENGTH

    cards = {"device.memory": list(CARDS)}
    if verb == "init":
        return {
            "model": [],
            "data": [],
            "card": list(CARDS),
            "epochs": [],
            "out": [],
            "host_memory": [],
            **choices(),
            **cards,
        }
    if verb in ("plan", "train", "preview", "recipe"):
        return {**choices(), **cards, **({"count": []} if verb == "preview" else {})}
    return {key: values for key, values in choices().items() if key in CHANGEABLE + LENGTH} if verb == "resume" else {}


def _key_or_value(last: str, before: Sequence[str]) -> list[str]:
    verb, place = before[0], len(before)
    key, equals, value = last.partition("=")
    options = _options(before[2:3]) if verb == "export" else _keys(verb)
    if equals:
        return [f"{key}={word}" for word in _beginning(value, options.get(key, []))]
    whole = _beginning(last, [f"{name}=" for name in options])
    sections = list(dict.fromkeys(f"{name.partition('.')[0]}." if "." in name else name for name in whole))
    return [*_beginning(last, _words(verb, place)), *(sections if "." not in last and len(sections) > 1 else whole)]


def _options(form: Sequence[str]) -> dict[str, list[str]]:
    """What an export in that form takes, and the values of each where they are few."""
    from qlora.exporting import TARGETS

    return (
        {name: list(values) for name, values in TARGETS[form[0]].options.items()} if form and form[0] in TARGETS else {}
    )


def _places(last: str, kind: str) -> list[str]:
    """Recipes or run folders whose path begins so, and the folders on the way to them."""
    if kind not in ("RECIPE", "RUN", "STUDY"):
        return []
    found = []
    for path in sorted(
        Path().glob(f"{escape(last)}*") if not Path(last).is_absolute() else Path("/").glob(f"{escape(last[1:])}*")
    ):
        if path.name.startswith(".") and not Path(last).name.startswith("."):
            continue
        run = (path / "recipe.yaml").is_file()
        if path.is_dir() and not (run and kind == "RUN"):
            found.append(f"{path}/")
        elif run if kind == "RUN" else path.suffix in (".yaml", ".yml"):
            found.append(str(path))
    return found


def _beginning(last: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(last)]
