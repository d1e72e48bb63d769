"""Mistakes that people make, each made with a real process: how long until it is said, with which status, in which words.

    python benchmarks/mistakes.py [--only WORD]     prints a Markdown table
    python benchmarks/mistakes.py --together        makes them in this one process and prints JSON, for tests/test_mistakes.py

Everything is made here: a folder with data, a folder that looks like a model, run folders as training leaves them (without
weights: none is read), and a stand-in for the hub on this machine. ``torch`` in the table says whether torch was imported.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from qlora.cli import main
status = main(sys.argv[1:])
print("torch" if "torch" in sys.modules else "no torch")
sys.exit(status)
"""
HUB = {"unknown": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "nothing": (404, "EntryNotFound")}
"""By owner, how the stand-in answers: status and the hub's own code for it. It hangs up on others, and keeps ``silent`` waiting."""


class Mistake(NamedTuple):
    """What is typed, and words of the sentence that follows."""

    name: str
    words: str
    says: str
    status: int = 2


TRAIN = "train mine.yaml"
MISTAKES = (
    Mistake("a verb that is misspelt", "trian mine.yaml", "Did you mean 'train'?"),
    Mistake("a form of export that is misspelt", "export done mergd", "Did you mean 'merged'?"),
    Mistake("a study's word that is misspelt", "study study.yaml plna", "Did you mean 'plan'?"),
    Mistake("an option of init that is misspelt", "init --modle model --data my.jsonl", "Did you mean 'model'?"),
    Mistake("data in a recipe's place", "preview my.jsonl", "qlora init --model MODEL --data my.jsonl"),
    Mistake("a study in a recipe's place", f"{TRAIN.replace('mine', 'study')}", "is a study, which qlora study takes"),
    Mistake("a recipe in a study's place", "study mine.yaml", "is a recipe, which qlora train takes"),
    Mistake("an option of preview that is misspelt", "preview mine.yaml cuont=1", "Did you mean 'count'?"),
    Mistake("an option of plan that is misspelt", "plan mine.yaml --tabel=true", "Did you mean 'table'?"),
    Mistake("data given twice", "init --model model --data my.jsonl --data pairs.jsonl", "data is given 2 times"),
    Mistake("a device by another name", f"{TRAIN} device.name=gpu", "expected auto, cpu, cuda, or a GPU's number"),
    Mistake("a packed file that is none", f"{TRAIN} data.train=text.jsonl.gz", "does not begin as a .gz file does"),
    Mistake("a Parquet file that is none", f"{TRAIN} data.train=text.parquet", "does not begin as a .parquet file does"),
    Mistake("a packed file that was cut off", f"{TRAIN} data.train=cut.jsonl.gz", "cannot be unpacked"),
    Mistake("a key given twice", f"{TRAIN} method.r=8 method.r=16", "'method.r' is given 2 times"),
    Mistake("a key without its value", f"{TRAIN} folder=", "gives no value"),
    Mistake("resume of a run whose checkpoints are gone", "resume kept", "The checkpoints of 'kept' are gone"),
    Mistake("a run whose base is gone", "export moved merged", "The model of this run is gone"),
    Mistake("an export without a name", "export done nf4 out=", "out is empty"),
    Mistake("an export in the place of its run", "export done merged out=done overwrite=true", "which is being read"),
    Mistake("a study that is not there", "study nine.yaml", "There is no study at 'nine.yaml'"),
    Mistake("a folder of other files for a run", f"{TRAIN} folder=full", "holds other files and is no run folder"),
    Mistake("a card for a CPU", "plan mine.yaml device.name=cpu device.memory=4090", "set device.name=auto"),
    Mistake("host memory of no amount", "init --model model --data my.jsonl --host-memory=lots", "not an amount of memory"),
    Mistake("a tracker that is not installed", f"{TRAIN} tracking=[mlflow]", "tracking names mlflow, not installed here"),
    Mistake("a kernel that is not installed", f"{TRAIN} model.attention=flash_attention_2", "flash-attn is not installed"),
    Mistake("a task that is misspelt", f"{TRAIN} 'evaluation.tasks=[{{name: helaswag}}]'", "Did you mean 'hellaswag'?"),
    Mistake("a key of a recipe that is asked by another name", "recipe lr", "Did you mean 'training.learning_rate'?"),
    Mistake("a page with a name of another kind", "report done stopped out=both.txt", "expected the name of a page"),
    Mistake("data whose ending is misspelt", f"{TRAIN} data.train=my.jsnl", "Did you mean 'my.jsonl'?"),
    Mistake("resume of a finished run with a value that may change", "resume done training.micro_batch_size=1", "there is nothing to resume", 0),
    Mistake("a list that is too short", f"{TRAIN} training.betas=[0.9]", "'training.betas' has no value number 2"),
    Mistake("a list that is too long", f"{TRAIN} training.betas=[0.9,0.99,0]", "has 3 values; expected at most 2"),
    Mistake("a recipe that is not there", "train nine.yaml", "Relative paths start at the working directory, '"),
    Mistake("a key by its name elsewhere", f"{TRAIN} training.lr=1e-4", "Did you mean 'learning_rate'?"),
    Mistake("a key of Hugging Face's Trainer", f"{TRAIN} num_train_epochs=3", "Did you mean 'training.epochs'?"),
    Mistake("a value of another kind", f"{TRAIN} training.epochs=many", "expected a whole number"),
    Mistake("data that is not there", f"{TRAIN} data.train=data/my.jsnl", "There is no data file 'data/my.jsnl'"),
    Mistake("data whose name is misspelt", f"{TRAIN} data.train=mi.jsonl", "Did you mean 'my.jsonl'?"),
    Mistake("a pattern that fits nothing", f"{TRAIN} data.train='data/*.csv'", "No data file matches"),
    Mistake("a spreadsheet as data", f"{TRAIN} data.train=table.xlsx", "Save the table as CSV"),
    Mistake("a Git-LFS pointer as data", f"{TRAIN} data.train=pointer.jsonl", "Git-LFS pointer"),
    Mistake("a broken line of data", f"{TRAIN} data.train=broken.jsonl", "has broken JSON"),
    Mistake("data of no known form", f"{TRAIN} data.train=other.jsonl", "no known form"),
    Mistake("an empty file of data", f"{TRAIN} data.train=empty.jsonl", "is empty"),
    Mistake("held-out data that is not there", f"{TRAIN} data.held_out=test.jsonl", "There is no data file 'test.jsonl'"),
    Mistake("preview of data that is not there", "preview mine.yaml data.train=no.jsonl", "There is no data file"),
    Mistake("a chat template that is not there", f"{TRAIN} data.chat_template=my.jinja", "There is no chat template"),
    Mistake(
        "a task's data that is not there",
        f"{TRAIN} 'evaluation.tasks=[{{name: mine, kind: text, prompt: \"{{text}}\", data: no.jsonl}}]'",
        "The task 'mine' cannot be read",
    ),
    Mistake("a model folder that is misspelt", f"{TRAIN} model.name=./modle", "Did you mean 'model'?"),
    Mistake("the same, as it might be on the hub", f"{TRAIN} model.name=models/qwn3", "Did you mean 'models/qwen3'?"),
    Mistake("plan for such a model", "plan mine.yaml model.name=./modle", "Did you mean 'model'?"),
    Mistake("a name of Ollama's", f"{TRAIN} model.name=llama3.1:8b", "is a name of Ollama's"),
    Mistake("a repository of GGUF", f"{TRAIN} model.name=bartowski/Llama-3.2-1B-GGUF", "as org/Llama-3.2-1B on the hub"),
    Mistake("a GGUF file as model", f"{TRAIN} model.name=llama-q4_k_m.gguf", "as org/llama on the hub"),
    Mistake("an adapter as model", f"{TRAIN} model.name=some-adapter", "name the model that it was trained on"),
    Mistake("an address as model", f"{TRAIN} model.name=https://huggingface.co/org/name", "model.name=org/name"),
    Mistake("a hub id that nobody has", f"{TRAIN} model.name=unknown/model", "nor a public repository of the hub"),
    Mistake("a model with terms to accept", f"{TRAIN} model.name=gated/model", "hf auth login"),
    Mistake("a repository without a model", f"{TRAIN} model.name=nothing/here", "has no config.json on the hub"),
    Mistake("a hub id without a network", f"{TRAIN} model.name=dropped/model", "the hub cannot be reached"),
    Mistake("a hub that does not answer", f"{TRAIN} model.name=silent/model", "the hub cannot be reached"),
    Mistake("a data set that nobody has", f"{TRAIN} data.train=unknown/set", "The data set 'unknown/set' is neither a file"),
    Mistake("an adapter to go on from that is not there", f"{TRAIN} method.from=runs/first", "method.from is 'runs/first'"),
    Mistake("a card that is unknown", "plan mine.yaml device.memory=4080-Max", "is not a card that is known here"),
    Mistake("a run folder with other files in it", f"{TRAIN} folder=full overwrite=true", "is not a run folder"),
    Mistake("a run folder that has a run", f"{TRAIN} folder=done", "replace it (overwrite=true)"),
    Mistake("a run folder that is a file", f"{TRAIN} folder=my.jsonl", "is a file"),
    Mistake("a run folder that cannot be made", f"{TRAIN} folder=/proc/runs/mine", "Nothing can be written in"),
    Mistake("a run that another process trains", f"{TRAIN} folder=held overwrite=true", "is training in 'held'"),
    Mistake("resume of such a run", "resume held", "is training in 'held'"),
    Mistake("resume with a value that may not change", "resume stopped training.learning_rate=1", "cannot change within a run"),
    Mistake("resume of a folder that is no run", "resume full", "is no run folder"),
    Mistake("resume of a run whose data is gone", "resume stopped", "There is no data file 'gone.jsonl'"),
    Mistake("resume of a run that is finished", "resume done", "there is nothing to resume", 0),
    Mistake("chat with a run that never began", "chat begun", "Nothing was trained"),
    Mistake("evaluate a run whose data is gone", "evaluate stopped", "There is no data file 'gone.jsonl'"),
    Mistake("export into a folder that is full", "export done merged", "is there already and not empty"),
    Mistake("the same in NF4", "export done nf4 out=full", "is there already and not empty"),
    Mistake("the same, the adapter", "export done adapter out=full", "is there already and not empty"),
    Mistake("the same as GGUF", "export done gguf out=full", "is there already and not empty"),
    Mistake("the same, the adapter as GGUF", "export done gguf-adapter out=full", "is there already and not empty"),
    Mistake("export to where nothing can be written", "export done merged out=/proc/merged", "Nothing can be written in"),
    Mistake("a type of GGUF that there is not", "export done gguf type=q9", "type is 'q9'"),
    Mistake("check of an export that is not there", "export done check from=elsewhere", "There is no export 'elsewhere'"),
    Mistake("publishing without a name", "export done hub", "expects repo=NAME"),
    Mistake("publishing what is not there", "export done hub repo=me/mine from=elsewhere", "There is no folder 'elsewhere'"),
    Mistake("a study of data that is not there", "study study.yaml", "There is no data file 'no.jsonl'"),
)  # fmt: skip
if version("torch").endswith("+cpu"):
    MISTAKES += (Mistake("a GPU for a torch without CUDA", f"{TRAIN} device.name=cuda", "the build without CUDA"),)
GOES_ON = Mistake(
    "a batch that is no multiple of the micro-batch: said, as it changes no result",
    f"{TRAIN} training.batch_size=10 training.micro_batch_size=4",
    "is no multiple of training.micro_batch_size=4",
)


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the hub."""

    def do_HEAD(self) -> None:
        owner = self.path.replace("/datasets/", "/").split("/")[1]
        if owner == "silent":
            time.sleep(20)
        if owner in HUB:
            status, code = HUB[owner]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def scene() -> Iterator[Path]:
    """A folder in which the mistakes are made, with a hub; the run in ``held`` is held by this process."""
    from qlora.files.lock import run_lock

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ.pop("HF_HUB_OFFLINE", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(folder / "hub")
        _make(folder)
        with run_lock(folder / "held"):
            yield folder
    server.shutdown()


def _make(folder: Path) -> None:
    """All that the commands name."""
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    files = {
        "my.jsonl": json.dumps({"messages": turns}) + "\n",
        "mine.yaml": "model: {name: model}\ndata: {train: my.jsonl}\n",
        "moved.yaml": f"model: {{name: {folder}/gone-base}}\ndata: {{train: my.jsonl}}\n",
        "gone.yaml": "model: {name: model}\ndata: {train: gone.jsonl}\n",
        "study.yaml": "recipe: {model: {name: model}, data: {train: no.jsonl}}\n",
        "table.xlsx": "PK",
        "pointer.jsonl": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "broken.jsonl": '{"messages": [}\n',
        "other.jsonl": '{"a": "b"}\n',
        "empty.jsonl": "",
        "text.jsonl.gz": '{"text": "not packed"}\n',
        "text.parquet": "not a table",
        "llama-q4_k_m.gguf": "GGUF",
        "model/config.json": "{}",
        "models/qwen3/config.json": "{}",
        "some-adapter/adapter_config.json": "{}",
        "full/thesis.txt": "dear",
        "data/notes.txt": "none",
    }
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    _run(folder, "kept", "mine.yaml", whole=True)
    shutil.rmtree(folder / "kept/checkpoints")
    _run(folder, "moved", "moved.yaml", whole=True)
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress((folder / "my.jsonl").read_bytes())[:-9])
    _run(folder, "done", "mine.yaml", whole=True)
    (folder / "done/merged").mkdir()
    (folder / "done/merged/config.json").write_text("{}")
    _run(folder, "held", "mine.yaml", whole=False)
    _run(folder, "stopped", "gone.yaml", whole=False)
    _run(folder, "begun", "mine.yaml", whole=False)
    (folder / "begun/checkpoints/000002/state.json").unlink()
    (folder / "begun/checkpoints/000002/checksums.json").unlink()
    (folder / "begun/checkpoints/000002").rmdir()


def _run(folder: Path, name: str, recipe: str, whole: bool) -> None:
    """A run folder as training leaves it, without weights."""
    from qlora.files.durable import seal, sha256_of, write_json
    from qlora.recipe import Recipe

    run = folder / name
    parts = ["checkpoints/000002", *(["adapter"] if whole else [])]
    for part in parts:
        (run / part).mkdir(parents=True)
        (run / part / "state.json").write_text("{}")
        seal(run / part)
    (run / "recipe.yaml").write_text(Recipe.from_yaml(folder / recipe, f"folder={name}").to_yaml(), encoding="utf-8")
    write_json(run / "environment.json", {"recipe_sha256": sha256_of(run / "recipe.yaml")})
    write_json(run / "plan.json", {"steps": 2 if whole else 4, "steps_per_epoch": 2 if whole else 4})
    if whole:
        (run / "report.html").write_text("<p>")


def words_of(mistake: Mistake) -> list[str]:
    """As a shell would take them apart."""
    import shlex

    return shlex.split(mistake.words)


def together() -> None:
    """All but the one that waits for a hub, in this process: of each its status, what it printed, and whether torch is here."""
    from qlora.cli import main

    told = []
    with scene() as folder:
        os.chdir(folder)
        for mistake in MISTAKES:
            if "silent" in mistake.words:
                continue
            out, errors = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
                status = main(words_of(mistake))
            told.append([status, out.getvalue(), errors.getvalue(), "torch" in sys.modules])
        os.chdir(ROOT)
    print(json.dumps(told))


def table(only: str) -> None:
    """Every mistake in a process of its own."""
    print("| mistake | `qlora …` | s | CPU s | status | torch | what is said |\n|---|---|--:|--:|--:|---|---|")
    with scene() as folder:
        for mistake in (*MISTAKES, GOES_ON):
            if only not in mistake.name and only not in mistake.words:
                continue
            begun, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            child = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *words_of(mistake)],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            if mistake is GOES_ON:
                assert child.stderr is not None
                errors, out = child.stderr.readline(), "no torch"
                seconds = time.perf_counter() - begun
                child.kill()
                child.communicate()
            else:
                out, errors = child.communicate()
                seconds = time.perf_counter() - begun
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
            *printed, torch = out.strip().splitlines()
            said = " ".join((errors or "\n".join(printed)).split()).replace(str(folder), "…").removeprefix("qlora: ")
            wrong = "" if mistake.says in said and torch == "no torch" else " WRONG"
            status = "goes on" if mistake is GOES_ON else str(child.returncode)
            print(
                f"| {mistake.name}{wrong} | `{mistake.words.replace('|', chr(92) + '|')}` | {seconds:.1f} | {cpu:.2f} | {status} | "
                f"{'no' if torch == 'no torch' else 'yes'} | {said.replace('|', chr(92) + '|')} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those with this word in their name or command")
    parser.add_argument("--together", action="store_true", help="in one process, as JSON")
    options = parser.parse_args()
    if options.together:
        together()
    else:
        table(options.only)
        print(
            f"\nPython {platform.python_version()}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end."
        )


if __name__ == "__main__":
    main()
