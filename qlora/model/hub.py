"""The folder of a model by its name: a folder of yours, the embedded default, or a repository of the hub, downloaded.

    name ─┬─ a folder ─► itself               require_model: the same without a download, and without torch: what can be
          ├─ the default ─► its folder        wrong with a name is found, and the hub is asked one question
          └─ org/name ─► the hub's cache

Knows the hub's client and which files of a repository a run reads; must not know what is in them.
"""

from __future__ import annotations

import re
from pathlib import Path
from threading import Thread

from qlora.errors import ModelError, disk_is_full, first_line, nearest
from qlora.files.durable import from_here
from qlora.files.strangers import shown
from qlora.machine.disk import cache_folder, require_disk
from qlora.recipe import DEFAULT_MODEL

# What a run reads of a repository: the configuration, every kind of tokenizer file, the weights, and code with leave.
HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", "spiece.model", "*.tiktoken", "vocab.txt", "merges.txt"]
HUB_WEIGHTS = ["*.safetensors"]
HUB_CODE = ["*.py"]
# The same weights once more, as Mistral itself arranges them, and other models in folders below (``*`` matches ``/`` too).
HUB_IGNORED = ["consolidated*.safetensors", "*/*.safetensors"]
SHORT, SHORTER = 2.5, 1.0
"""Seconds that the hub has to say whether it has a model; and where a folder here is called alike."""
HERE = {"model": "a local folder", "dataset": "a file here"}
"""What the hub's kinds of repositories are on this machine."""
OLLAMA = re.compile(r"[\w.-]+(/[\w.-]+)*:[\w.-]+")
GGUF = re.compile(r"([-_.](i?q[2-8]\w*|b?f16|f32))?[-_.]?gguf(?![a-z])", re.IGNORECASE)
ADDRESS = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")


def find_model(
    name: str,
    revision: str | None = None,
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
    if (folder := local_model(name)) is not None:
        return folder
    patterns = HUB_FILES + (HUB_WEIGHTS if weights else []) + (HUB_CODE if trust_remote_code else [])
    if weights:
        _require_room(name, revision, patterns)
    return _download(name, revision, patterns)


def local_model(name: str) -> Path | None:
    """The folder of a model that is not on the hub, and None for what may be a hub id. Raises ModelError for neither."""
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        file = folder.is_file()
    except (OSError, RuntimeError) as error:  # longer than names may be; ~someone who has no home here
        raise ModelError(f"There is no model {shown(name)} ({getattr(error, 'strerror', None) or error}).") from None
    if name == DEFAULT_MODEL:
        folder = cache_folder() / "models" / DEFAULT_MODEL
        if not folder.is_dir():
            raise ModelError(
                f"The model '{name}' is not in '{folder.parent}' yet; run 'python -m qlora.quickstart' once."
            )
        return folder
    if (end := GGUF.search(Path(name).name)) and (file or not _cached(name, None)):
        made_of = Path(name).name[: end.start()]
        raise ModelError(
            f"'{name}' holds GGUF, which is quantised for inference and cannot be trained on; name the checkpoint in "
            f"safetensors that it was made from, as org/{made_of or 'name'} on the hub."
        )
    if file:
        raise ModelError(
            f"'{name}' is a file; expected the folder of a model, with config.json and safetensors weights."
        )
    if address := ADDRESS.match(name):
        raise ModelError(f"'{name}' is an address; expected the hub id in it: model.name={address[1]}")
    if OLLAMA.fullmatch(name):
        raise ModelError(
            f"'{name}' is a name of Ollama's, whose models are GGUF and cannot be trained on; name the checkpoint in safetensors "
            "that it was made from, as org/name on the hub, or a local folder."
        )
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or "\\" in name:
        raise ModelError(
            f"There is no model folder '{name}'.{_near(folder)} Expected an existing folder, a hub id such as org/name, "
            f"or '{DEFAULT_MODEL}'.{from_here(name)}"
        )
    return None


def _near(folder: Path) -> str:
    """Which folder beside it, or whether the default, may have been meant."""
    beside = folder.parent
    known = [str(beside / one.name) for one in beside.iterdir() if one.is_dir()] if beside.is_dir() else []
    return nearest(str(folder), [DEFAULT_MODEL, *known])


def require_model(name: str, revision: str | None = None) -> None:
    """Raise ModelError where a run would find no model by this name. Of one that is not here the hub is asked, once and for seconds."""
    if (folder := local_model(name)) is not None:
        if not (folder / "config.json").is_file():
            raise ModelError(f"'{folder}' has no config.json{_instead(folder)}; expected a model in safetensors.")
    elif not _cached(name, revision):
        near = _near(Path(name))
        if problem := ask_hub(name, "model", "config.json", revision, SHORTER if near else SHORT):
            at = f" at revision '{revision}'" if revision else ""
            raise ModelError(
                f"The model '{name}'{at} {problem}.{near}{from_here(name) if Path(name).parent.is_dir() else ''}"
            )


def _instead(folder: Path) -> str:
    """What is in a folder that is no checkpoint."""
    if (folder / "adapter_config.json").is_file():
        return " and is an adapter: name the model that it was trained on"
    if any(folder.glob("*.gguf")):
        return ", but GGUF, which cannot be trained on: name the checkpoint that it was made from"
    inside = sorted(one.name for one in folder.iterdir() if (one / "config.json").is_file())
    return f", but '{folder / inside[0]}' has" if inside else ""


def _cached(name: str, revision: str | None) -> bool:
    """Whether the configuration of a hub id is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:
        return False


def data_set_cached(name: str) -> bool:
    """Whether something of a data set of the hub is in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}").is_dir()


def ask_hub(name: str, kind: str, file: str | None, revision: str | None = None, seconds: float = SHORT) -> str | None:
    """Whether the hub would give ``file`` of a ``model`` or ``dataset``, or anything where it is None: None, or the end of a sentence
    that begins with the name. It is asked once, and has ``seconds`` to answer."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    said: list[str | None] = []

    def ask() -> None:
        try:
            url = hf_hub_url(name, file or "README.md", repo_type=kind, revision=revision)
            get_hf_file_metadata(url, timeout=seconds)
            said.append(None)
        except Exception as error:  # those of the HTTP client are of every kind
            absent = isinstance(error, EntryNotFoundError) and file is None
            answered = f"cannot be had now ({first_line(error)}); try again, or name {HERE[kind]}"
            unnamed = answered if isinstance(error, HfHubHTTPError) else _unreachable(kind)
            said.append(None if absent else _problem(error, kind) or unnamed)

    asking = Thread(target=ask, daemon=True)  # a name server that does not answer knows no time limit
    asking.start()
    asking.join(seconds)
    return said[0] if said else _unreachable(kind)


def _unreachable(kind: str) -> str:
    return f"is not wholly in the local cache, and the hub cannot be reached; connect, or name {HERE[kind]}"


def _problem(error: Exception, kind: str = "model") -> str | None:
    """What the hub's client complains of, as the end of a sentence that begins with a name; None for what it does not name."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "asks for its terms to be accepted first: do so on its page on the hub and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"is neither {HERE[kind]} nor a public repository of the hub; check the name, or log in if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such revision; expected a branch, tag or commit of it"
    if isinstance(error, errors.HFValidationError):
        return f"is neither {HERE[kind]} nor a valid hub id (org/name)"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return _unreachable(kind)
    if isinstance(error, errors.EntryNotFoundError):
        return "has no config.json on the hub, so it is no model in safetensors; name the one that it was made from"
    return None


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    at = f" at revision '{revision}'" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_IGNORED))
    except Exception as error:  # those of the HTTP and storage clients are of every kind, few of them an OSError
        if disk_is_full(error):
            raise
        problem = _problem(error) or f"could not be downloaded: {first_line(error)}; try again, or name a local folder"
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
