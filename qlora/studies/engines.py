"""Where cells run: in a process beside this one, one after the other, or on a Ray cluster.

    engine.submit(cell) ─► a Future of its Outcome

Both give the standard library's futures, so that nobody else asks which it is. A cell whose process is killed fails here, and goes
on where it was on Ray, which starts it again. Knows cells; must not know which comes next.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from qlora.errors import RunError, first_line
from qlora.runs.bases import Bases
from qlora.studies.cell import Outcome, run_cell
from qlora.studies.spec import Cell, StudySection

RETRIES = 3  # of a cell whose machine or process was lost


class Engine(Protocol):
    """What runs cells."""

    workers: int
    """How many it runs at the same time."""

    def submit(self, cell: Cell, study: StudySection, folder: Path, quiet: bool) -> Future[Outcome]:
        """Begin with a cell."""

    def stop(self) -> None:
        """Have what is running save its state and end."""

    def close(self) -> None:
        """Nothing more will be asked."""


def engine_of(study: StudySection) -> Engine:
    """The engine that a study names. Raises RunError where it is not installed."""
    return Local() if study.engine == "local" else OnRay(study.engine)


class Local:
    """One process that runs cell after cell and keeps the base; a new one when it is lost."""

    workers = 1

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, cell: Cell, study: StudySection, folder: Path, quiet: bool) -> Future[Outcome]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, initializer=_apart, initargs=(os.getpid(),))
        try:
            ran = self._pool.submit(_in_process, cell, study, folder, quiet)
        except BrokenProcessPool:  # it was lost between two cells
            self._pool = None
            return self.submit(cell, study, folder, quiet)
        found: Future[Outcome] = Future()
        ran.add_done_callback(lambda done: found.set_result(self._outcome(cell, done)))
        return found

    def _outcome(self, cell: Cell, done: Future[Outcome]) -> Outcome:
        try:
            return done.result()
        except BrokenProcessPool:
            self._pool = None
            return Outcome(cell.name, "its process was killed; perhaps the system was out of memory.")

    def stop(self) -> None:
        for process in multiprocessing.active_children():
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGTERM)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


_bases, _parent = Bases(), 0


def _in_process(cell: Cell, study: StudySection, folder: Path, quiet: bool) -> Outcome:
    """In the process of its own, whose base stays for the next cell."""
    outcome = run_cell(cell, study, folder, _bases, quiet)
    if os.getppid() != _parent:  # nobody is left to tell, or to ask for another one
        os._exit(1)
    return outcome


def _apart(parent: int) -> None:
    """Ctrl-C is the study's to hand on, once. Where the study itself is killed, the cell that runs is stopped as by a signal."""
    with suppress(OSError, AttributeError):  # Windows has no such groups
        os.setpgrp()

    global _parent
    _parent = parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class OnRay:
    """A Ray cluster, one GPU a cell where it has any. Cells whose worker is lost are begun again by Ray, and go on where they were."""

    def __init__(self, engine: str) -> None:
        try:
            import ray
        except ImportError:
            raise RunError("engine is ray, which is not installed; pip install ray, or set engine=local.") from None
        self._ray = ray
        address = engine if "://" in engine else os.environ.get("RAY_ADDRESS")
        if not ray.is_initialized():
            try:
                ray.init(address=address, include_dashboard=False)
            except Exception as error:
                raise RunError(
                    f"No Ray cluster was found or started ({first_line(error)}); give engine=ray://host:10001."
                ) from None
        found = ray.cluster_resources()
        self._gpus = 1 if found.get("GPU") else 0
        self.workers = max(1, int(found.get("GPU") or found.get("CPU", 1)))
        self._run = ray.remote(_on_worker)
        self._running: list[object] = []

    def submit(self, cell: Cell, study: StudySection, folder: Path, quiet: bool) -> Future[Outcome]:
        run = self._run.options(num_cpus=1, num_gpus=self._gpus, max_retries=RETRIES, name=cell.name)
        reference = run.remote(cell, study, folder.resolve(), quiet, os.getcwd())
        self._running.append(reference)
        found: Future[Outcome] = Future()

        def told(done: Future[Outcome]) -> None:
            try:
                found.set_result(done.result())
            except Exception as error:  # the worker was lost too often, or Ray itself
                found.set_result(Outcome(cell.name, f"Ray gave it up ({first_line(error)})."))

        reference.future().add_done_callback(told)
        return found

    def stop(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=False)  # KeyboardInterrupt in the worker: its state is saved

    def close(self) -> None:
        self._ray.shutdown()


def _on_worker(cell: Cell, study: StudySection, folder: Path, quiet: bool, where: str) -> Outcome:
    """On a machine of the cluster, in the folder that relative paths of data start at. A worker is used again, and so its base."""
    os.chdir(where)
    return run_cell(cell, study, folder, _bases, quiet)
