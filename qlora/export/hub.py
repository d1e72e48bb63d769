"""What was exported, into a repository of the hub: the files of one folder, listed before any of them leaves the machine.

Knows files and the hub's client; must not know what is in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from qlora.errors import RunError, first_line


class Published(NamedTuple):
    """What goes, or went, into a repository: each file's path and bytes; ``url`` is None where nothing was sent."""

    repo: str
    files: dict[str, int]
    url: str | None


def publish(folder: str | Path, repo: str, *, private: bool = True, dry_run: bool = False) -> Published:
    """Send the files of ``folder`` to the model repository ``repo`` (NAME or OWNER/NAME), which is made if it is not there.

    ``dry_run``: list them, ask nobody. A repository that is there stays as ``private`` as it is, and its other files stay too.
    Raises RunError where the folder is empty, the name is none, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if not files:
        raise RunError(
            f"'{folder}' holds no files to publish; export the run first, or name another folder: from=FOLDER."
        )
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RunError(
            f"repo is '{repo}', which is no name of a repository ({first_line(error)}); expected NAME or OWNER/NAME."
        ) from None
    if dry_run:
        return Published(repo, files, None)
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=made.repo_id, allow_patterns=list(files), commit_message="Published by qlora"
        )
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise RunError(
            f"Nothing was sent to '{repo}': {first_line(error)}; log in with `hf auth login`, with a network."
        ) from None
    except Exception as error:  # those of the HTTP and storage clients are of every kind, few of them an OSError
        raise RunError(
            f"Sending to '{repo}' ended with {first_line(error)}; log in with a token that may write there (`hf auth login`), "
            "and repeat the command: what arrived is not sent twice."
        ) from None
    return Published(made.repo_id, files, str(made))
