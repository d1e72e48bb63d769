"""The files of a checkpoint: find its folder, check its configuration and headers, read one tensor at a time.

    model.name → folder → config.json, index, headers → one tensor, another, …

Knows which files belong together, and the hub's client; must not know a model's architecture or quantisation. Reads
safetensors alone: a pickle runs code when it is loaded, so none is ever opened. Everything in the folder was written by
strangers, and is bounded and checked before it is believed.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora.errors import ModelError, disk_is_full, first_line, listed, nearest
from qlora.files.strangers import MAX_JSON, Fault, json_object, read_bytes, shown
from qlora.machine.device import cache_folder, require_disk
from qlora.model.tensor_file import MAX_HEADER, Entry, read_header, read_tensor
from qlora.recipe import DEFAULT_MODEL

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What a run reads of a hub repository: the configuration, every kind of tokenizer file, the weights, and code with leave.
HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", "spiece.model", "*.tiktoken", "vocab.txt", "merges.txt"]
HUB_WEIGHTS = ["*.safetensors"]
HUB_CODE = ["*.py"]
# The same weights once more, as Mistral itself arranges them, and other models in folders below (``*`` matches ``/`` too).
HUB_IGNORED = ["consolidated*.safetensors", "*/*.safetensors"]
SAMPLES, SAMPLE = 64, 4096  # of a file's weights that its fingerprint covers: how many, and bytes each
MAX_INDEX = 24 * 1024**2  # bytes: some 200,000 tensors
MAX_SHARDS = 10_000
MAX_TOKENIZER = 256 * 1024**2  # bytes of a tokenizer's file; the largest that are published have 40 MB
# Numbers in a configuration by which transformers repeats something in Python: how their names end, and more than any
# model has of it.
MOST_REPEATED = {re.compile("(layers?|blocks|depth)$"): 1_000, re.compile("(labels|experts|heads)$"): 100_000}


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors whose headers were read and found sound."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    entries: dict[str, Entry]
    """Every tensor by its name in the checkpoint, file by file in the order on disk."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own. Raises ModelError when its file changed or went away."""
        entry = self.entries[name]
        try:
            return read_tensor(entry)
        except OSError as error:
            raise ModelError(f"'{entry.file}' cannot be read ({error}); fetch the checkpoint again.") from None
        except Fault as fault:
            raise ModelError(f"{shown(name)} in '{entry.file}': {fault}; fetch the checkpoint again.") from None


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the configuration and the headers of a checkpoint folder; no weight is read yet.

    Raises ModelError where there is no such folder or no config.json, where the weights are pickles only, where the
    index names files that are missing or lie outside of the folder, and where a file is truncated or damaged.
    """
    folder = Path(folder)
    config = read_model_config(folder)
    shards = _shards(folder)
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in _header(shard).items():
            if name in entries:
                raise ModelError(
                    f"'{entries[name].file.name}' and '{shard.name}' in '{folder}' both hold {shown(name)}."
                )
            entries[name] = entry
    return Checkpoint(folder, config, shards, entries)


def fingerprint(folder: Path) -> str:
    """A SHA-256 that tells one base from another without reading all of its weights, in milliseconds.

    Over config.json, tokenizer.json where there is one, and of every safetensors file of the checkpoint its name, size,
    header, and 64 samples of 4 KiB spread evenly over its weights. Notices another model, configuration or vocabulary,
    a tensor that was added, dropped, cast or has another shape, and weights that were trained on. Does not notice a
    change of a few numbers between the samples, nor the other tokenizer files, the chat template or the checkpoint's
    Python code. The same weights in other files have another fingerprint.

    Raises ModelError where a file is missing or cannot be read.
    """
    folder = Path(folder)
    read_model_config(folder)
    digest = hashlib.sha256()
    try:
        for path in (folder / "config.json", folder / "tokenizer.json"):
            if path.is_file():
                _digest(digest, path.name, path.stat().st_size, read_bytes(path, MAX_TOKENIZER))
        for path in _shards(folder):
            with path.open("rb") as file:
                length = file.read(8)
                header = file.read(min(int.from_bytes(length, "little"), MAX_HEADER))
                size = path.stat().st_size
                _digest(digest, path.name, size, header)
                for number in range(SAMPLES):
                    file.seek(max(file.tell(), size * number // SAMPLES))
                    digest.update(file.read(SAMPLE))
    except (OSError, Fault) as error:
        raise ModelError(
            f"'{folder}' cannot be read ({error}); make its files readable, or fetch them again."
        ) from None
    return digest.hexdigest()


def _digest(digest: Any, name: str, size: int, content: bytes) -> None:
    digest.update(f"{name} {size} {len(content)}\n".encode() + content)  # lengths, so that no bytes can change sides


def commit_of(folder: Path) -> str | None:
    """The commit of a folder that is a snapshot in the hub's cache, ``…/snapshots/<40 hex>``; None for any other."""
    place = Path(folder).resolve()
    return place.name if place.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", place.name) else None


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands there, with the fields that decide what is built of the kinds that they must have.

    Raises ModelError where it is missing or unreadable, where ``model_type`` or ``architectures`` are no names, and where it
    counts what no model has so many of: transformers would repeat it until the memory is full.
    """
    values = read_json(folder, "config.json", "a checkpoint folder with config.json and safetensors weights")
    kind, made = values.get("model_type"), values.get("architectures")
    if not isinstance(kind, str | None):
        raise ModelError(f"'{folder / 'config.json'}' has the model_type {shown(kind)}; expected a name.")
    if made is not None and not (isinstance(made, list) and all(isinstance(name, str) for name in made)):
        raise ModelError(f"'{folder / 'config.json'}' has the architectures {shown(made)}; expected a list of names.")
    inside: list[Any] = [values]
    while inside:
        part = inside.pop()
        if isinstance(part, list):
            inside += part
        elif isinstance(part, dict):
            for key, value in part.items():
                for name, most in MOST_REPEATED.items() if isinstance(value, int | float) else ():
                    if name.search(key) and not value <= most:
                        raise ModelError(
                            f"'{folder / 'config.json'}' has {shown(key)}: {shown(value)}; expected at most {most:,}."
                        )
                inside.append(value)
    return values


def read_json(folder: Path, name: str, expected: str, strict: bool = False, most: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object of at most ``most`` bytes from ``folder / name``; ``strict`` as in ``strangers.json_object``.

    Raises ModelError when it is missing, unreadable or no object.
    """
    path = folder / name
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ModelError(f"The model folder '{folder}' {what}; expected {expected}.")
    try:
        return json_object(read_bytes(path, most), strict)
    except FileNotFoundError:
        raise ModelError(f"'{folder}' has no {name}; expected {expected}.") from None
    except (OSError, Fault) as error:
        raise ModelError(f"'{path}' is not readable JSON ({error}); fetch it again.") from None


def _shards(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint: those that the index names, or model.safetensors, or the only one there."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder, INDEX, "an index", strict=True, most=MAX_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ModelError(f"'{folder / INDEX}' has no 'weight_map' of tensor names to file names; fetch it again.")
        names = sorted(set(weight_map.values()))
        if not 0 < len(names) <= MAX_SHARDS:
            raise ModelError(f"'{folder / INDEX}' names {len(names):,} files; expected 1 to {MAX_SHARDS:,}.")
        # an index is data from elsewhere: it must not make us open /etc/… or ../… A file there may be a symbolic link: the
        # hub's cache is made of them, and nobody but who may write into this folder can have made one.
        if outside := [shown(name) for name in names if Path(name).name != name or "\\" in name or ":" in name]:
            raise ModelError(f"'{folder / INDEX}' names files outside of its folder: {listed(outside)}.")
        if others := [shown(name) for name in names if not name.endswith(".safetensors")]:
            raise ModelError(f"'{folder / INDEX}' names files that are no safetensors: {listed(others)}.")
        if missing := [shown(name) for name in names if not _is_file(folder / name)]:
            raise ModelError(
                f"'{folder}' lacks {listed(missing)}, which its index names; the download is incomplete, fetch it again."
            )
        return tuple(folder / name for name in names)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    every = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    found = [path for path in every if not path.name.startswith("adapter_")]
    if len(found) == 1:
        return tuple(found)
    if found:
        raise ModelError(
            f"'{folder}' has {len(found)} safetensors files but no {INDEX} that says which belong together."
        )
    if (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"'{folder}' is an adapter and not a model; name the model that it was trained on.")
    if pickles := [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]:
        raise ModelError(
            f"'{folder}' has pickled weights only ({listed(pickles)}), and unpickling runs whatever code they hold. Use a "
            "revision with safetensors, or convert a checkpoint you trust: load it with transformers' from_pretrained "
            "and call save_pretrained, which writes safetensors."
        )
    raise ModelError(f"'{folder}' has no weights; expected model.safetensors, or shards with {INDEX}.")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is longer than names may be
        return False


def _header(path: Path) -> dict[str, Entry]:
    """The tensors of one file, by name, whose header is found sound."""
    try:
        return read_header(path).entries
    except (Fault, OSError) as error:
        raise ModelError(f"'{path}' is damaged: {error}; fetch it again.") from None


def find_model(
    name: str,
    revision: str | None = None,
    progress: bool = False,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """The folder of ``model.name``: a local folder, the embedded default, or a hub id, downloaded into the hub's cache.

    Only safetensors, configuration and tokenizer files are downloaded: no safetensors when ``weights`` is off, and the
    repository's Python files too with ``trust_remote_code``.

    Raises ModelError, in a sentence, when there is no such folder or repository, when access to it is not granted, or
    when the download fails; DoesNotFitError when the disk is too small for the weights, and OSError when it is full
    before they have arrived.
    """
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError) as error:  # longer than names may be; ~someone who has no home here
        raise ModelError(f"There is no model {shown(name)} ({getattr(error, 'strerror', None) or error}).") from None
    if name == DEFAULT_MODEL:
        folder = cache_folder() / "models" / DEFAULT_MODEL
        if not folder.is_dir():
            raise ModelError(
                f"The model '{name}' is not in '{folder.parent}' yet; run 'python -m qlora.quickstart' once."
            )
        return folder
    looks_like_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name
    if folder.is_file():
        raise ModelError(
            f"'{name}' is a file; expected the folder of a model, with config.json and safetensors weights."
        )
    if looks_like_path or "/" not in name:
        hint = nearest(name, [DEFAULT_MODEL])
        raise ModelError(
            f"There is no model folder '{name}'.{hint} Expected an existing folder, a hub id such as org/name, "
            f"or '{DEFAULT_MODEL}'."
        )
    patterns = HUB_FILES + (HUB_WEIGHTS if weights else []) + (HUB_CODE if trust_remote_code else [])
    if weights:
        _require_room(name, revision, patterns)
    return _download(name, revision, patterns)


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision '{revision}'" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_IGNORED))
    except GatedRepoError:
        problem = (
            "asks for its terms to be accepted first: do so on its page on the hub and log in with `hf auth login`"
        )
    except RepositoryNotFoundError:
        problem = (
            "is neither a local folder nor a public repository of the hub; check the name, or log in if it is private"
        )
    except RevisionNotFoundError:
        problem = "has no such revision; expected a branch, tag or commit of it"
    except HFValidationError:
        problem = "is neither a local folder nor a valid hub id (org/name)"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        problem = "is not wholly in the local cache, and the hub cannot be reached; connect, or name a local folder"
    except Exception as error:  # those of the HTTP and storage clients are of every kind, few of them an OSError
        if disk_is_full(error):
            raise
        problem = f"could not be downloaded: {first_line(error)}; try again, or name a local folder"
    raise ModelError(f"The model '{name}'{at} {problem}.")


def _require_room(name: str, revision: str | None, patterns: list[str]) -> None:
    """Raise DoesNotFitError when what is still to be downloaded is more than the disk of the hub's cache has free.

    Where the hub does not tell sizes nothing is checked; the download itself then says what is wrong.
    """
    from huggingface_hub import model_info
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import filter_repo_objects

    try:
        info = model_info(name, revision=revision, files_metadata=True, timeout=10)  # seconds
    except Exception:
        return
    cache = Path(HF_HUB_CACHE)
    kept = cache / repo_folder_name(repo_id=name, repo_type="model")
    files = filter_repo_objects(
        info.siblings or [], allow_patterns=patterns, ignore_patterns=HUB_IGNORED, key=lambda file: file.rfilename
    )
    missing = 0
    for file in files:
        # a blob, which commits share, is called by its SHA-256 or git's own hash; without symbolic links there is none
        blob = kept / "blobs" / str(file.lfs.sha256 if file.lfs else file.blob_id)
        if not blob.exists() and not (kept / "snapshots" / str(info.sha) / file.rfilename).exists():
            missing += file.size or 0
    require_disk(cache, missing, f"The model '{name}'")
