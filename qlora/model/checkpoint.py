"""The opened checkpoint: one folder of files, found once, checked, and handed on to whoever needs something of it.

    recipe's model section ─► folder ─┬─ config.json ─► raw values, transformers' configuration
                                      ├─ index, headers ─► entries: every tensor, read one at a time
                                      ├─ a fingerprint
                                      └─ the tokenizer

Knows which files belong together; must not know a model's architecture or quantisation. Reads safetensors alone: a pickle
runs code when it is loaded, so none is ever opened. Everything in the folder was written by strangers, and is bounded and
checked before it is believed.
"""

from __future__ import annotations

import copy
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora.errors import ModelError, listed
from qlora.files.strangers import MAX_JSON, Fault, json_object, read_bytes, shown
from qlora.model.hub import find_model
from qlora.model.tensor_file import MAX_HEADER, Entry, read_header, read_tensor
from qlora.recipe import ModelSection

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SCALES, BLOCK = "_scale_inv", (128, 128)  # of a weight in FP8, and what they are of where config.json does not say
INDEX = "model.safetensors.index.json"
MERGE = "qlora_merge.json"
"""What a merged model's folder says of how it was made."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SAMPLES, SAMPLE = 64, 4096  # of a file's weights that its fingerprint covers: how many, and bytes each
MAX_INDEX = 24 * 1024**2  # bytes: some 200,000 tensors
MAX_SHARDS = 10_000
MAX_TOKENIZER = 256 * 1024**2  # bytes of a tokenizer's file; the largest that are published have 40 MB
# Numbers in a configuration by which transformers repeats something in Python: how their names end, and more than any
# model has of it.
MOST_REPEATED = {re.compile("(layers?|blocks|depth)$"): 1_000, re.compile("(labels|experts|heads)$"): 100_000}


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder. Each part is read when it is first asked for, and once; ``open_checkpoint`` makes it.

    Every part raises ModelError where its files are missing, damaged, or are not what they should be.
    """

    folder: Path
    name: str
    """What the recipe calls it."""
    revision: str | None = None
    trust_remote_code: bool = False

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it stands there."""
        return read_model_config(self.folder)

    @cached_property
    def merge(self) -> dict[str, Any]:
        """How it was merged by this program (``export/merged.py``); empty for every other model."""
        return read_json(self.folder, MERGE, "how a model was merged") if (self.folder / MERGE).is_file() else {}

    @cached_property
    def _model_config(self) -> PretrainedConfig:
        from qlora.model.config import parse_config

        return parse_config(self)

    def model_config(self) -> PretrainedConfig:
        """A copy of transformers' configuration, for a model of its own to hold and change."""
        return copy.deepcopy(self._model_config)

    @cached_property
    def shards(self) -> tuple[Path, ...]:
        """The safetensors files that hold its weights."""
        return _shards(self.folder)

    @property
    def is_whole(self) -> bool:
        """Whether its weights are here: a plan needs none, and of the hub's they come once they are needed."""
        try:
            return bool(self.shards)
        except ModelError:
            return False

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every tensor by its name in the checkpoint, file by file in the order on disk; no weight is read for it."""
        entries: dict[str, Entry] = {}
        for shard in self.shards:
            for name, entry in _header(shard).items():
                if name in entries:
                    raise ModelError(
                        f"'{entries[name].file.name}' and '{shard.name}' in '{self.folder}' both hold {shown(name)}."
                    )
                entries[name] = entry
        return entries

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 that tells one base from another without reading all of its weights, in milliseconds.

        Over config.json, tokenizer.json where there is one, and of every safetensors file of the checkpoint its name, size,
        header, and 64 samples of 4 KiB spread evenly over its weights. Notices another model, configuration or vocabulary,
        a tensor that was added, dropped, cast or has another shape, and weights that were trained on. Does not notice a
        change of a few numbers between the samples, nor the other tokenizer files, the chat template or the checkpoint's
        Python code. The same weights in other files have another fingerprint.
        """
        return _fingerprint(self)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, always with a padding token."""
        from qlora.model.tokenizer import load_tokenizer

        return load_tokenizer(self.folder, self.trust_remote_code)

    def with_weights(self) -> Checkpoint:
        """The same one with its weights here, the hub's downloaded now, and their headers checked. Raises as ``find_model``."""
        if commit := commit_of(self.folder):
            find_model(self.name, commit, trust_remote_code=self.trust_remote_code)
        self.entries  # noqa: B018 (read now, so that what is wrong is said now)
        return self

    @cached_property
    def scales(self) -> dict[str, str]:
        """Of each weight that is stored in FP8, the name of the tensor with a scale for each of its blocks."""
        return {
            name: f"{name}{SCALES}"
            for name, entry in self.entries.items()
            if entry.dtype == torch.float8_e4m3fn and f"{name}{SCALES}" in self.entries
        }

    def read(self, name: str, part: int | None = None) -> Tensor:
        """One tensor, or the ``part`` of it along its first dimension, on the CPU, in memory of its own; of FP8 in blocks what it
        stands for, in fp32.

        Raises ModelError when its file changed or went away.
        """
        tensor = self._stored(name, part)
        if name not in self.scales:
            return tensor
        return self._scaled(name, tensor, self._stored(self.scales[name], part))

    def _scaled(self, name: str, weight: Tensor, scales: Tensor) -> Tensor:
        """W · s, block by block: the weights of a block of ``weight_block_size`` share a scale (DeepSeek-V3, section 3.3)."""
        block = (self.config.get("quantization_config") or {}).get("weight_block_size") or BLOCK
        if tuple(scales.shape) != tuple(-(-side // size) for side, size in zip(weight.shape, block, strict=True)):
            raise ModelError(
                f"'{name}' in '{self.folder}' has the shape {list(weight.shape)} and scales {list(scales.shape)}; in blocks of "
                f"{list(block)} they do not fit together. Fetch the checkpoint again."
            )
        whole = weight.float()
        for rows, scale in zip(whole.split(block[0]), scales.float(), strict=True):
            rows.mul_(scale.repeat_interleave(block[1])[: rows.shape[1]])
        return whole

    def _stored(self, name: str, part: int | None) -> Tensor:
        entry = self.entries[name] if part is None else self.entries[name].part(part)
        try:
            return read_tensor(entry)
        except OSError as error:
            raise ModelError(f"'{entry.file}' cannot be read ({error}); fetch the checkpoint again.") from None
        except Fault as fault:
            raise ModelError(f"{shown(name)} in '{entry.file}': {fault}; fetch the checkpoint again.") from None


def open_checkpoint(source: ModelSection | Path | str, weights: bool = True) -> Checkpoint:
    """Find the model of a recipe's section, or take a folder, and check its configuration and headers; read no weight yet.

    ``weights`` off, none are downloaded or looked at: for whoever wants the configuration or the tokenizer. Raises ModelError
    where there is no such model or no config.json, where the weights are pickles only, where the index names files that are
    missing or lie outside of the folder, and where a file is truncated or damaged; and whatever ``find_model`` raises.
    """
    if isinstance(source, ModelSection):
        name, revision, code = source.name, source.revision, source.trust_remote_code
        folder = find_model(name, revision, weights, code)
        found = Checkpoint(folder, name, commit_of(folder) or revision, code)
    else:
        found = Checkpoint(Path(source), str(source))
    found.config  # noqa: B018 (read now, so that what is wrong is said now)
    if weights:
        found.entries  # noqa: B018
    return found


def _fingerprint(checkpoint: Checkpoint) -> str:
    folder = checkpoint.folder
    checkpoint.config  # noqa: B018 (a folder that is no checkpoint has no fingerprint)
    digest = hashlib.sha256()
    try:
        for path in (folder / "config.json", folder / "tokenizer.json"):
            if path.is_file():
                _digest(digest, path.name, path.stat().st_size, read_bytes(path, MAX_TOKENIZER))
        for path in checkpoint.shards:
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


def _digest(digest: hashlib._Hash, name: str, size: int, content: bytes) -> None:
    digest.update(f"{name} {size} {len(content)}\n".encode() + content)  # lengths, so that no bytes can change sides


def commit_of(folder: Path) -> str | None:
    """The commit of a folder that is a snapshot in the hub's cache, ``…/snapshots/<40 hex>``; None for any other."""
    place = Path(folder).resolve()
    return place.name if place.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", place.name) else None


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands there, with the fields that decide what is built of the kinds that they must have.

    Raises ModelError where it is missing or unreadable, where ``model_type`` or ``architectures`` are not names, and where it
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
        again = "export the merged model" if name == MERGE else "fetch it"
        raise ModelError(f"'{path}' is not readable JSON ({error}); {again} again.") from None


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
