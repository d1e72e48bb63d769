"""The folder of a model by its name: a folder of yours, the embedded default, or a repository of the hub, downloaded.

Knows the hub's client and which files of a repository a run reads; must not know what is in them.
"""

from __future__ import annotations

from pathlib import Path

from qlora.errors import ModelError, disk_is_full, first_line, nearest
from qlora.files.strangers import shown
from qlora.machine.device import cache_folder, require_disk
from qlora.recipe import DEFAULT_MODEL

# What a run reads of a repository: the configuration, every kind of tokenizer file, the weights, and code with leave.
HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", "spiece.model", "*.tiktoken", "vocab.txt", "merges.txt"]
HUB_WEIGHTS = ["*.safetensors"]
HUB_CODE = ["*.py"]
# The same weights once more, as Mistral itself arranges them, and other models in folders below (``*`` matches ``/`` too).
HUB_IGNORED = ["consolidated*.safetensors", "*/*.safetensors"]


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
