"""An adapter's two files: PEFT's layout, ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT reads what is written here with every key consumed. What a stranger's config means is read in ``peft_config.py``, and what
its tensors mean on a base in ``loading.py``. Knows the files; must not know formulas or training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn

from qlora.errors import MethodError, listed, redacted
from qlora.files.durable import file_written_aside, sync
from qlora.files.strangers import MAX_JSON, Fault, json_object, read_bytes
from qlora.methods.base import AdaptedModel
from qlora.methods.layout import PREFIX, Fields, padded
from qlora.methods.lora import any_transposed, plain_config
from qlora.methods.targets import linears_of, peft_targets
from qlora.model import anatomy
from qlora.model.base import Base
from qlora.model.checkpoint import commit_of
from qlora.model.names import OnLoad
from qlora.model.tensor_file import Header, read_header, read_tensors

Some = TypeVar("Some")

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
IN_MEMORY = re.compile(
    r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(\.(?!weight$|bias$)[^.]+)(?:\.weight)?$"
)
"""An adapter's name inside a tensor's, which PEFT leaves out of its files."""
PEFT_LAYOUT = "0.18.0"  # the PEFT release whose layout is written; later ones read it too

METHOD_STATE = "method.safetensors"  # what a resumed run needs beside the adapter; most methods need nothing
MAX_CONFIG_VALUES = 200_000  # in adapter_config.json: AdaLoRA's has one for every rank of every target
OURS = "QLORA"  # the peft_type of what PEFT has no method for; PEFT refuses it by name
SECTION = "qlora_method"  # the key under which such a config holds the recipe's method section
FINGERPRINT = "base_fingerprint"  # in the metadata of the weights: which base the adapter was trained on

EXTRAS = ("modules", "new_tokens")
"""Methods that PEFT's config of a LoRA has fields for."""
WITH_EXTRAS = ("LORA", "ADALORA")

# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_adapter(model: AdaptedModel, folder: str | Path) -> None:
    """Write the adapter into ``folder``; an adapter that is there already is replaced, other files are left alone.

    Each file is written aside, flushed to the disk and renamed, the config last: a crash leaves no half-written file.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for method in model.methods:
        method.layout.save_beside(Path(folder))
    _write(
        Path(folder),
        model.adapter_state(),
        adapter_config(model),
        known_base(model.base),
        model.method_state(),
        OnLoad(model.base.model),
    )


def why_not_portable(model: AdaptedModel) -> str | None:
    """Why the adapter is no plain LoRA that every server loads, and what to do; None where it is."""
    whys = [why for method in model.methods if (why := method.layout.why_not_portable()) is not None]
    if not whys and len(model.methods) > 1:
        return "Several methods together are no plain LoRA; export the run merged"
    names = OnLoad(model.base.model)
    if not whys and (lost := [path for path in model.planted if names.written(path) is None]):
        return f"PEFT takes {listed(lost, 2)} for other modules while it loads them, and leaves them out; export the run merged"
    return whys[0] if whys else None


def save_portable(
    model: AdaptedModel, folder: str | Path, renamed: Callable[[str], str] | None = None, onto: nn.Module | None = None
) -> str | None:
    """Write the adapter as what every server loads: plain LoRA of one rank, alpha = r, the scaling inside B, no extras.

    Smaller ranks are filled up with zeros. Returns None, or, where the method is no LoRA, why it is not and what to do;
    the adapter is written as ``save_adapter`` does then. For ``onto``, a model of another class than the base's, ``renamed`` gives
    a module's path there; MethodError where that is no LoRA.
    """
    if (why := why_not_portable(model)) is not None:
        if renamed is not None:
            raise MethodError(f"{why}; keys=text is for plain LoRA alone.")
        save_adapter(model, folder)
        return why
    method = model.methods[0]
    pairs = method.layout.pairs()
    if renamed is not None:
        pairs = {renamed(path): pair for path, pair in pairs.items()}
    paths = model.paths if onto is None else [path for path, _ in onto.named_modules()]
    save_pairs(
        folder,
        pairs,
        peft_targets(pairs, paths, mixture=anatomy.is_mixture(model.base.model)),
        about_base(model),
        known_base(model.base),
        method.section.dropout,
        any_transposed(method.planted),
        OnLoad(model.base.model if onto is None else onto),
    )
    return None


def portable_bytes(model: AdaptedModel) -> int:
    """What ``save_portable`` writes in tensors: fp32 and of one rank for plain LoRA, else the adapter with its state."""
    if why_not_portable(model) is not None:
        return sum(values.nbytes for values in (*model.adapter_state().values(), *model.method_state().values()))
    pairs = model.methods[0].layout.pairs().values()
    r = max((len(lora_A) for lora_A, _ in pairs), default=0)
    return sum(4 * r * (lora_A.shape[1] + lora_B.shape[0]) for lora_A, lora_B in pairs)


def save_pairs(
    folder: str | Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    targets: Fields,
    about: Fields,
    base_fingerprint: str | None,
    dropout: float = 0.0,
    transposed: bool = False,
    names: OnLoad | None = None,
) -> None:
    """Write ``pairs`` (A [r, in], B [out, r] by module path; ΔW = B A) as one plain LoRA of their largest rank.

    ``targets`` are PEFT's fields whose names reach exactly these paths; ``about`` are the config's fields that name the base,
    ``base_fingerprint`` is what ``known_base`` or ``recorded_base`` gave, ``transposed`` says that some of the base's
    weights are stored as [in, out] (GPT-2), and by ``names`` tensors are called what PEFT finds their place by.
    """
    r = max(len(lora_A) for lora_A, _ in pairs.values())
    tensors = {}
    for path, (lora_A, lora_B) in pairs.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = padded(lora_A, r, lora_A.shape[1])
        tensors[f"{PREFIX}{path}.lora_B.weight"] = padded(lora_B, lora_B.shape[0], r)
    values = {**about, "peft_type": "LORA", **plain_config(r, targets, dropout, transposed)}
    _write(Path(folder), tensors, values, base_fingerprint, {}, names)


def _write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    values: Fields,
    base_fingerprint: str | None,
    state: Mapping[str, Tensor],
    names: OnLoad | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if names is not None and values["peft_type"] == "LORA":
        tensors = {renamed_key(key, lambda path: names.written(path) or path): held for key, held in tensors.items()}
    known = {FINGERPRINT: base_fingerprint} if base_fingerprint is not None else {}
    with file_written_aside(folder / WEIGHTS) as aside:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, aside, metadata={"format": "pt", **known})
        _sort_metadata(aside)
    if state:
        with file_written_aside(folder / METHOD_STATE) as aside:
            save_file({k: v.cpu().contiguous() for k, v in state.items()}, aside)
    else:
        (folder / METHOD_STATE).unlink(missing_ok=True)
    with file_written_aside(folder / CONFIG) as aside:
        # PEFT sorts its keys; in a section of ours the order of a pattern's names counts
        text = json.dumps(values, indent=2, sort_keys=SECTION not in values)
        aside.write_text(text + "\n", encoding="utf-8")
    sync(folder)


def renamed_key(key: str, name: Callable[[str], str]) -> str:
    """A tensor's ``key`` with the path that ``name`` gives for its module's; only what belongs to LoRA is renamed by PEFT."""
    path, mark, rest = key.removeprefix(PREFIX).partition(".lora_")
    return f"{PREFIX}{name(path)}{mark}{rest}" if mark else key


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes it as it comes, and equal runs give equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def adapter_config(model: AdaptedModel) -> Fields:
    """What ``adapter_config.json`` says: PEFT's own fields where PEFT has the method, else ours."""
    extras = [method for method in model.methods if method.section.name in EXTRAS]
    mains = [method for method in model.methods if method not in extras]
    if len(mains) == 1 and mains[0].layout.peft_type in WITH_EXTRAS:
        together = [*mains, *sorted(extras, key=lambda method: EXTRAS.index(method.section.name))]
    elif len(model.methods) == 1 and model.methods[0].layout.peft_type is not None:
        together = model.methods
    else:
        return {
            **about_base(model),
            "peft_type": OURS,
            SECTION: model.section.model_dump(mode="json", exclude={"from_"}),
        }
    values = {**about_base(model), "peft_type": together[0].layout.peft_type}
    for method in together:
        values |= method.layout.peft_config(model.paths)
    return values


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def about_base(model: AdaptedModel) -> Fields:
    """The fields of PEFT's config that name the base and the task."""
    return {
        "peft_version": PEFT_LAYOUT,
        "task_type": "CAUSAL_LM" if model.base.tokenizer is not None else None,
        "base_model_name_or_path": redacted(_address(model.base)),
        "revision": model.base.revision,
        "inference_mode": True,
    }


def _address(base: Base) -> str:
    """What other programs find the base by: its name on the hub, or the whole path of a folder on this machine."""
    here = base.folder != Path() and commit_of(base.folder) is None
    return str(base.folder.absolute()) if here else base.name


def read_about_base(folder: str | Path) -> Fields:
    """The fields of the adapter's ``adapter_config.json`` that name the base and the task, as ``about_base`` gives them."""
    values = read_config(Path(folder))
    named = {key: values.get(key) for key in ("base_model_name_or_path", "revision", "task_type")}
    return {**named, "peft_version": PEFT_LAYOUT, "inference_mode": True}


def read_linears(folder: str | Path) -> tuple[str, ...]:
    """The linears that the adapter's ``adapter_config.json`` names by their weights: see ``peft_targets``."""
    return linears_of(read_config(Path(folder)).get("target_parameters") or ())


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        return json_object(read_bytes(path, MAX_JSON), most=MAX_CONFIG_VALUES)
    except FileNotFoundError:
        raise MethodError(f"There is no {CONFIG} in '{folder}'; expected an adapter folder in PEFT's layout.") from None
    except (OSError, Fault) as error:
        raise MethodError(f"'{path}' cannot be read ({error}); expected an adapter folder in PEFT's layout.") from None


def read_adapter_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, by PEFT's keys. Raises MethodError when they are missing or damaged."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        pickle = " (adapter_model.bin is a pickle, which is never read)" if path.with_suffix(".bin").is_file() else ""
        raise MethodError(f"There is no {WEIGHTS} in '{folder}'{pickle}; expected an adapter folder in PEFT's layout.")
    tensors = _whole(path, read_tensors, "save the adapter again or use an earlier checkpoint")
    _refuse_renamed(tensors, path)
    return tensors


def _refuse_renamed(names: Iterable[str], path: Path) -> None:
    """Raise MethodError for tensors under other names than PEFT writes: a model's own, or those that it has while it is trained."""
    for name in names:
        if ".lora_" in name and not name.startswith(PREFIX):
            raise MethodError(
                f"'{path}' holds '{name}'; expected PEFT's names, which begin with '{PREFIX}'. Another program wrote it, or it was renamed: "
                "save it with PEFT's save_pretrained."
            )
        if inside := IN_MEMORY.search(name):
            raise MethodError(
                f"'{path}' holds '{name}', as PEFT calls it in memory; in files it has no '{inside[1]}'. Save it with PEFT's "
                "save_pretrained instead of the model's state_dict, or take that out of the names."
            )


def read_method_state(folder: str | Path) -> dict[str, Tensor]:
    """What a checkpoint holds beside the adapter; empty for most methods. Raises MethodError when it is damaged."""
    path = Path(folder) / METHOD_STATE
    if not path.is_file():
        return {}
    return _whole(path, read_tensors, "use an earlier checkpoint")


def known_base(base: Base) -> str | None:
    """The base's fingerprint; None for a model that came from no folder."""
    return base.checkpoint.fingerprint if base.checkpoint is not None and base.names is not None else None


def recorded_base(folder: str | Path) -> str | None:
    """The fingerprint of the base that the adapter in ``folder`` was trained on; None where other software wrote it."""
    return header_of(Path(folder)).metadata.get(FINGERPRINT)


def header_of(folder: Path) -> Header:
    """What the tensors' file says of itself. Raises MethodError when it is damaged."""
    return _whole(folder / WEIGHTS, read_header, "save the adapter again or use an earlier checkpoint")


def _whole(path: Path, read: Callable[[Path], Some], do: str) -> Some:
    try:
        return read(path)
    except (Fault, OSError) as error:
        raise MethodError(f"'{path}' is damaged ({error}); {do}.") from None
