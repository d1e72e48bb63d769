"""``qlora export RUN WHAT``: what each of these takes, makes and says, and the model card that goes with it.

Everything heavy is imported inside, as for the other verbs: see ``cli.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from qlora.errors import DiffersError, InputError, QloraError, RunError
from qlora.export.gguf_types import BY_QUANTISER, TYPES
from qlora.export.hub import publish
from qlora.files.durable import from_here, keep_apart, require_new, require_writable
from qlora.machine.disk import bytes_text
from qlora.runs.first import look_at_run
from qlora.runs.folder import EXPORTS, export_folder, lying_at, to_publish

PURPOSES = {"serving": "dequantized", "quantising": "original"}
"""What a merged model is for → the base that it is merged into."""
YES = ("true", "false")
BASES = ("dequantized", "original")
ANY: tuple[str, ...] = ()


class Target(NamedTuple):
    """One word behind the run: what it is, its options with their values (``ANY``: all), and what makes it."""

    what: str
    options: Mapping[str, tuple[str, ...]]
    make: Callable[[Path, dict[str, Any]], None]


def merged(folder: Path, options: dict[str, Any]) -> None:
    from qlora.runs.export import merge, reread, write_card_of

    if purpose := options.pop("for", None):
        options["base"] = PURPOSES[purpose]
    said = _base(folder, options)
    made = merge(folder, options.pop("out", None), **options)
    size = f"{made.tensors} tensors, {bytes_text(made.bytes)}, {made.adapted} adapted"
    print(f"Merged model: {made.folder} ({size})")
    if made.new_ends:
        print(
            f"Its generation_config.json ends answers with {', '.join(made.new_ends)} too, as the chat template does."
        )
    if made.for_serving:
        said.append(
            "It is the trained model in 16 bits, or 8. To quantise it to 4 bits again or to train on it, export with for=quantising: "
            "on the weights that were quantised before, most of what was learned would be rounded away."
        )
        print(said[-1])
    compared = _compared(lambda: _in_transformers(folder, made.folder))
    # a model that is too large to be opened whole is read again a tensor, and a layer, at a time
    said += compared + _compared(
        lambda: [reread(folder, made.folder)] if compared else _read_again(folder, made.folder)
    )
    write_card_of(folder, made.folder, "merged", said)


def _in_transformers(folder: Path, place: Path) -> list[str]:
    """How near a model is to the trained one, opened as anyone would; nothing where it is too large for that."""
    from qlora.runs.export import in_transformers

    found = in_transformers(folder, place)
    return [found.told("plain transformers")] if found else []


def _read_again(folder: Path, place: str | Path, program: str | None = None) -> list[str]:
    """What an export that lies there is, held against the run. Raises DiffersError where it is not what was trained."""
    from qlora.runs.export import check
    from qlora.runs.measured import judged, table

    found = check(folder, place, program)
    said = [f"Read again: its {found.tensors} tensors are those of the run."]
    if found.forms:
        said += [table(found.forms), judged(found.forms[-1])]
    if found.unmeasured:
        said.append(f"What it answers was not measured: {found.unmeasured}")
    if found.opened:
        said.append(found.opened.told("llama.cpp"))
    return said


def _compared(compare: Callable[[], list[str]]) -> list[str]:
    """What ``compare`` finds, printed; or why nothing could be: the export is done and whole, only the comparison is not."""
    try:
        said = compare()
    except DiffersError:
        raise
    except QloraError as error:
        said = [f"It was not compared with the trained model: {error}"]
    print(*said, sep="\n", end="\n" if said else "")
    return said


def _base(folder: Path, options: dict[str, Any], type: str | None = None) -> list[str]:
    """Have ``options`` name the base to merge into: the better one, measured, and why, where they do not."""
    from qlora.runs.measured import best_base

    if "base" in options:
        return []
    options["base"], why = best_base(folder, type)
    print(why, end="\n" if why else "")
    return [why] if why else []


def nf4(folder: Path, options: dict[str, Any]) -> None:
    from qlora.runs.export import export_nf4, hold, reread, write_card_of
    from qlora.runs.measured import judged, table

    packed, forms = export_nf4(folder, options.pop("out", None), **options)
    print(f"Model in NF4: {packed.folder} ({packed.tensors} tensors, {bytes_text(packed.bytes)})")
    said = f"{table(forms)}\n{judged(forms[-1])}" if forms else "Nothing is held out, so what it lost was not measured."
    again = reread(folder, packed.folder)
    print(again, said, sep="\n")
    write_card_of(folder, packed.folder, "nf4", [again, said])
    if forms:
        hold(packed.folder, False, forms[-1].found.divergence, forms[-1].found.difference[0])


def adapter(folder: Path, options: dict[str, Any]) -> None:
    from qlora.export.programs import told
    from qlora.runs.export import base_of, export_adapter, foreign_ends, loaded_by, stands_apart, write_card_of

    place = export_folder(folder, "adapter", options.pop("out", None))
    why = export_adapter(folder, place, **options)
    print(f"Adapter: {place} ({why or 'plain LoRA in the layout of PEFT'})")
    verdicts = loaded_by(folder, place)
    said = [told(verdicts)]
    if Path(base := base_of(place)).is_absolute():
        said.append(f"It names its base by the folder it has here, '{base}'; elsewhere, give the base yourself.")
    if apart := stands_apart(folder):
        said.append(apart)
    if ends := foreign_ends(folder):
        said.append(
            f"Its answers end with {', '.join(ends)}, which the base's own files do not name as an end: whatever generates "
            "with it has to be told (eos_token_id, or stop_token_ids)."
        )
    print(*said, sep="\n")
    said += _compared(lambda: _read_again(folder, place))
    write_card_of(folder, place, "adapter", said, verdicts)


def gguf(folder: Path, options: dict[str, Any], alone: bool = False) -> None:
    from qlora.runs.export import export_gguf, require_gguf, write_card_of

    require_gguf(folder)
    kind = options.get("type", "q8_0")
    # of llama-quantize's types the nearest that can be tried here
    nearest = kind if kind in TYPES else "q8_0" if kind == "q6_k" else "q4_0"
    said = [] if alone else _base(folder, options, nearest)
    written = export_gguf(folder, options.pop("out", None), adapter=alone, **options)
    print(f"GGUF: {written.file} ({written.tensors} tensors, {bytes_text(written.bytes)}, {written.type})")
    if written.command:
        print(
            f"llama.cpp's quantiser is not on PATH; where it is, this makes the type that was asked for:\n{written.command}"
        )
    said += _compared(lambda: _read_again(folder, written.file))
    write_card_of(folder, written.file.parent, "gguf-adapter" if alone else "gguf", said)


def check(folder: Path, options: dict[str, Any]) -> None:
    place = lying_at(folder, options.get("from", EXPORTS["merged"]))
    print(*_read_again(folder, place, options.get("program")), sep="\n")


def hub(folder: Path, options: dict[str, Any]) -> None:

    private = options.get("private", True)
    source = to_publish(folder, options.get("from"))
    found = publish(source, options["repo"], private=private, dry_run=options.get("dry_run", False))
    for name, size in found.files.items():
        print(f"{bytes_text(size):>10}  {name}")
    total = f"{len(found.files)} files, {bytes_text(sum(found.files.values()))}"
    where = f"the {'private' if private else 'public'} repository '{found.repo}'"
    print(f"{total}, would go to {where}; nothing was sent." if found.url is None else f"{total}, are in {found.url}")


COMMON = {"out": ANY, "overwrite": YES}
TARGETS = {
    "merged": Target(
        "a plain 16-bit model",
        {"for": tuple(PURPOSES), "base": BASES, "dtype": ("bf16", "fp16", "fp32"), **COMMON},
        merged,
    ),
    "nf4": Target("one in 4 bits", COMMON, nf4),
    "adapter": Target("a plain LoRA adapter", {"keys": ("whole", "text"), **COMMON}, adapter),
    "gguf": Target(
        "the merged model for llama.cpp and Ollama", {"base": BASES, "type": (*TYPES, *BY_QUANTISER), **COMMON}, gguf
    ),
    "gguf-adapter": Target("the adapter for them", COMMON, partial(gguf, alone=True)),
    "check": Target("an export compared with the run", {"from": ANY, "program": ("llama.cpp",)}, check),
    "hub": Target("an export to the hub", {"repo": ANY, "from": ANY, "private": YES, "dry_run": YES}, hub),
}


def export(folder: Path, target: str, options: dict[str, str]) -> None:
    """Make ``target`` of the run in ``folder``. Raises InputError for an option that it does not take."""
    takes = TARGETS[target].options
    for name, value in options.items():
        if name not in takes:
            *known, last = takes
            known_text = f"{', '.join(known)} and {last}" if known else last
            raise InputError(f"qlora export RUN {target} takes {known_text}, but found '{name}={value}'.")
        if takes[name] and value not in takes[name]:
            raise InputError(f"{name} is '{value}'; expected {' or '.join(takes[name])}.")
    given: dict[str, Any] = {name: value == "true" if takes[name] == YES else value for name, value in options.items()}
    _look_first(folder, target, given)
    TARGETS[target].make(folder, given)


def _look_first(folder: Path, target: str, options: dict[str, Any]) -> None:
    """Raise InputError for what can be wrong with an export and costs nothing to find."""
    if target == "hub":
        if "repo" not in options:
            raise InputError("qlora export RUN hub expects repo=NAME or repo=OWNER/NAME, the repository on the hub.")
        to_publish(folder, options.get("from"))
    if "for" in options and "base" in options:
        raise InputError("for and base say the same; expected one of them.")
    if target != "hub":
        look_at_run(folder, reads=False)
    if target == "check" and not (place := lying_at(folder, options.get("from", EXPORTS["merged"]))).exists():
        raise RunError(
            f"There is no export '{place}'; make it first, or say where it is: from=FOLDER.{from_here(place)}"
        )
    if target in EXPORTS:
        if options.get("out") == "":
            raise InputError("out is empty; expected the name of a folder, as in out=models/mine.")
        place = export_folder(folder, target, options.get("out"), options.get("type", "q8_0"))
        keep_apart(place, folder / "adapter", folder / "checkpoints")
        require_new(place, options.get("overwrite", False))
        require_writable(place, "choose another folder (out=…)")
