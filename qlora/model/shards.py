"""The files of a checkpoint: find its folder, check its safetensors headers, read one tensor at a time.

    model.name → folder → headers → one tensor, another, …

Knows the safetensors format and the hub's client; must not know a model's architecture or quantisation. Reads
safetensors alone: a pickle runs code when it is loaded, so none is ever opened.

The files are read and not mapped. Mapped pages count as this process's memory until the file is closed, which would make
"one tensor at a time" untrue, and a file that is replaced under a mapping ends the process with SIGBUS.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.config import DEFAULT_MODEL
from qlora.device import require_disk
from qlora.errors import ModelError, disk_is_full, first_line, listed, nearest

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What a run reads of a hub repository: the configuration, every kind of tokenizer file, the weights, and code with leave.
HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", "spiece.model", "*.tiktoken", "vocab.txt", "merges.txt"]
HUB_WEIGHTS = ["*.safetensors"]
HUB_CODE = ["*.py"]
# The same weights once more, as Mistral itself arranges them, and other models in folders below (``*`` matches ``/`` too).
HUB_IGNORED = ["consolidated*.safetensors", "*/*.safetensors"]
SAMPLES, SAMPLE = 64, 4096  # of a file's weights that its fingerprint covers: how many, and bytes each
MAX_HEADER = 100 * 1000**2  # the bound that the safetensors library itself sets
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor in a header: what it is without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    """Where its bytes begin in the file."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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
        raw = torch.empty(entry.bytes, dtype=torch.uint8)
        try:
            with entry.file.open("rb") as file:
                file.seek(entry.start)
                count = file.readinto(raw.numpy().data)
        except OSError as error:
            raise ModelError(f"'{entry.file}' cannot be read ({error}); fetch the checkpoint again.") from None
        if count != entry.bytes:
            raise ModelError(f"'{entry.file}' became shorter while '{name}' was read; fetch the checkpoint again.")
        return raw.view(entry.dtype).reshape(entry.shape)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the configuration and the headers of a checkpoint folder; no weight is read yet.

    Raises ModelError where there is no such folder or no config.json, where the weights are pickles only, where the
    index names files that are missing or lie outside of the folder, and where a file is truncated or damaged.
    """
    folder = Path(folder)
    config = read_json(folder, "config.json", "a checkpoint folder with config.json and safetensors weights")
    shards = _shards(folder)
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in _header(shard).items():
            if name in entries:
                raise ModelError(f"'{entries[name].file.name}' and '{shard.name}' in '{folder}' both hold '{name}'.")
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
    read_json(folder, "config.json", "a checkpoint folder with config.json and safetensors weights")
    digest = hashlib.sha256()
    try:
        for path in (folder / "config.json", folder / "tokenizer.json"):
            if path.is_file():
                _digest(digest, path.name, path.stat().st_size, path.read_bytes())
        for path in _shards(folder):
            with path.open("rb") as file:
                length = file.read(8)
                header = file.read(min(int.from_bytes(length, "little"), MAX_HEADER))
                size = path.stat().st_size
                _digest(digest, path.name, size, header)
                for number in range(SAMPLES):
                    file.seek(max(file.tell(), size * number // SAMPLES))
                    digest.update(file.read(SAMPLE))
    except OSError as error:
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


def read_json(folder: Path, name: str, expected: str) -> dict[str, Any]:
    """A JSON object from ``folder / name``. Raises ModelError when it is missing, unreadable or no object."""
    path = folder / name
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ModelError(f"The model folder '{folder}' {what}; expected {expected}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"'{folder}' has no {name}; expected {expected}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"'{path}' is not readable JSON ({error}); fetch it again.") from None
    if not isinstance(values, dict):
        raise ModelError(f"'{path}' holds {type(values).__name__}; expected a JSON object.")
    return values


def _shards(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint: those that the index names, or model.safetensors, or the only one there."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder, INDEX, "an index").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ModelError(f"'{folder / INDEX}' has no 'weight_map' of tensor names to file names; fetch it again.")
        names = sorted(set(weight_map.values()))
        # an index is data from elsewhere: it must not make us open /etc/… or ../…
        if outside := [name for name in names if Path(name).name != name]:
            raise ModelError(f"'{folder / INDEX}' names files outside of its folder: {listed(outside)}.")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(
                f"'{folder}' lacks {listed(missing)}, which its index names; the download is incomplete, fetch it again."
            )
        return tuple(folder / name for name in names)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
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


def _header(path: Path) -> dict[str, Entry]:
    """Read and check one file's header: 8 bytes of length, that much JSON, then the tensors without gap or overlap."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= MAX_HEADER:
                raise ValueError("it does not begin with a safetensors header")
            if 8 + length > size:
                raise ValueError(f"it ends inside its header, at {size:,} bytes")
            header = json.loads(file.read(length))
        entries, end = _entries(header, path, 8 + length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise ModelError(f"'{path}' is damaged: {error}; fetch it again.") from None
    if size != 8 + length + end:
        raise ModelError(
            f"'{path}' is {'truncated' if size < 8 + length + end else 'too long'}: its header promises "
            f"{8 + length + end:,} bytes and it has {size:,}; fetch it again."
        )
    return entries


def _entries(header: Any, path: Path, data: int) -> tuple[dict[str, Entry], int]:
    """The tensors of a header whose data begins at byte ``data``, in their order on disk, and how many bytes they take.

    Raises ValueError where the header contradicts itself.
    """
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int]] = []
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        dtype = DTYPES.get(fields["dtype"])
        if dtype is None:
            raise ValueError(f"'{name}' has the dtype {fields['dtype']}, which is not supported")
        start, end = fields["data_offsets"]
        entry = Entry(dtype, tuple(int(size) for size in fields["shape"]), path, data + start)
        if end - start != entry.bytes:
            raise ValueError(f"'{name}' takes {end - start:,} bytes where its shape needs {entry.bytes:,}")
        entries[name] = entry
        spans.append((start, end))
    reached = 0
    for start, end in sorted(spans):
        if start != reached:
            raise ValueError(f"its tensors leave a gap or overlap at byte {start:,}")
        reached = end
    return dict(sorted(entries.items(), key=lambda item: item[1].start)), reached


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
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name == DEFAULT_MODEL:
        from qlora.model.default import default_model_folder

        return default_model_folder(progress)
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
