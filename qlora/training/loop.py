"""The loop: one trainer for all methods, an iterator that the user drives.

    for step in trainer: ...

A step takes its rows by its number, puts them through the model in micro-batches, divides the summed loss once by the
step's target tokens, clips, and moves the parameters. The loss's denominator is the whole step's, so the split into
micro-batches, and a short last one, change nothing (transformers#34191 is what happens otherwise).

Random draws of a step come from (seed, step) alone: nothing to save, and an evaluation in between changes nothing.

A step whose loss or gradients are not finite moves nothing: the run stops, or goes on without it (``not_finite.py`` finds
the rows and the module). Where memory runs out in a step, the same step is taken again in a smaller way (``smaller.py``), which is kept.
Knows rows, losses and optimizers; must not know recipes' files, evaluation or reports.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from qlora.data import Data, Row, collate, step_rows, steps_per_epoch
from qlora.errors import (
    DataError,
    DoesNotFitError,
    ModelError,
    NonFiniteError,
    RecipeError,
    RunError,
    first_line,
    listed,
)
from qlora.machine.device import peak_memory_bytes, ran_out_of_memory, release_memory
from qlora.methods import AdaptedModel
from qlora.model.checks import check_boundary, check_loss_path, check_packing, check_rows
from qlora.model.loss import batch_loss
from qlora.recipe import MemorySection, TrainingSection
from qlora.residence.cache import cache_folder_of, unwritable
from qlora.residence.layer_inputs import LayerInputs
from qlora.residence.layers import unwrap_layers, wrap_layers
from qlora.training import checkpoint
from qlora.training.in_backward import InBackward, NotFinite, stay_out
from qlora.training.not_finite import Blame, find_blame
from qlora.training.optim import learning_rate, make_optimizer, quiet_paging
from qlora.training.rehearsal import Rehearsal, rehearse
from qlora.training.smaller import Way

LARGEST_SCALE = 2.0**14  # what the loss is multiplied with under fp16, at first
SCALE_GROWTH = 500  # steps after which a scale that fell is doubled


Some = TypeVar("Some")


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. ``metrics.jsonl`` holds these fields."""

    number: int
    """Counted from 1."""
    epoch: float
    """Passes over the data done after this step."""
    loss: float
    """Cross-entropy in nats, summed over the step's target tokens and divided by them."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm before clipping."""
    target_tokens: int
    tokens: int
    """Tokens of the data that went through the model: neither padding nor virtual tokens."""
    tokens_per_second: float
    peak_memory_bytes: int
    seconds: float
    micro_batch_size: int = 1
    """Rows that went through the model at once."""
    skipped: bool = False
    """Whether nothing was moved, because the loss or a gradient was not finite (both are NaN here then)."""
    note: str = ""
    """What the user should know of this step: memory ran out, and what is smaller from here on."""

    def metrics(self) -> dict[str, Any]:
        """The line for ``metrics.jsonl``: a note only where there is one, and no loss of a step that was skipped."""
        values = asdict(self)
        left_out = ["loss", "grad_norm"] if self.skipped else ["skipped"]
        for name in [*left_out, *([] if self.note else ["note"])]:
            del values[name]
        return {"step": values.pop("number"), **values}

    def __str__(self) -> str:
        if self.skipped:
            return f"step {self.number}  skipped: {self.note}"
        return (
            f"step {self.number}  loss {self.loss:.4f}  lr {self.learning_rate:.2e}  grad {self.grad_norm:.3f}  "
            f"{self.tokens_per_second:.0f} tokens/s"
        )


class Trainer:
    """Trains an adapted model on rows; iterate over it for steps.

    ``folder`` is the run folder for ``save``; without one nothing is written. ``memory`` says where layer inputs wait and how
    an MLP is tiled; where the base's weights are was settled when it was loaded.
    """

    def __init__(
        self,
        model: AdaptedModel,
        data: Data | Sequence[Row],
        training: TrainingSection | None = None,
        folder: str | Path | None = None,
        memory: MemorySection | None = None,
    ) -> None:
        self.model = model
        self.rows: Sequence[Row] = data.train if isinstance(data, Data) else data
        self.held_out: Sequence[Row] = data.held_out if isinstance(data, Data) else ()
        """Looked at before training, so that measuring them afterwards cannot fail."""
        self.training = training or TrainingSection()
        self.memory = memory or MemorySection()
        self.folder = None if folder is None else Path(folder)
        if not self.rows:
            raise DataError("There are no rows to train on; give data with at least one example.")
        self.step_number = 0
        """Steps done."""
        self.torn = False
        """Whether a step was broken off in the middle of moving the parameters; only ``load`` mends that."""
        self.skipped = 0
        """Steps that moved nothing because a number was not finite."""
        self.saved: Path | None = None
        """The checkpoint that holds this trainer's newest saved state."""
        self.steps_per_epoch = steps_per_epoch(len(self.rows), self.training.batch_size)
        self.total_steps = self.training.steps or self.training.epochs * self.steps_per_epoch
        self.scaled = model.base.compute_dtype == torch.float16
        self.loss_scale = LARGEST_SCALE if self.scaled else 1.0
        pad = getattr(model.tokenizer, "pad_token_id", None)
        self.pad_id = 0 if pad is None else int(pad)
        self.parameters = model.trainable_parameters()
        quiet_paging()
        self.optimizer = make_optimizer(self.parameters, self.training, model.learning_rate_ratios())
        self.in_backward: InBackward | None = None
        self._check_recipe()
        self._check_rows()
        self.way = Way.of(self.training)
        """How steps go through the model now; smaller than the recipe's after memory ran out."""
        place = self.memory.layer_inputs
        self.inputs = None if place == "device" else LayerInputs(place, model.device, self._disk_folder())
        if self.training.gradient_checkpointing:
            self._arrange(self.way)
            stay_out(model.model)
            if self.training.optimizer_in_backward:
                self.in_backward = InBackward(model.model, self.parameters, self.optimizer)
        else:
            unwrap_layers(model.model)  # an earlier trainer may have left its boundary
        self._check()

    @property
    def micro_batch_size(self) -> int:
        """Rows that go through the model at once, now."""
        return self.way.micro_batch_size

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """Do one optimizer step. Raises NonFiniteError, with no step taken, when the loss or a gradient is not finite and
        the recipe does not skip such steps; what was done until then is saved.

        Raises DoesNotFitError when memory runs out in the smallest way there is; what was done until then is saved.
        """
        if self.step_number >= self.total_steps:
            raise StopIteration
        self._require_whole()
        begin = time.perf_counter()
        places = step_rows(len(self.rows), self.training.batch_size, self.step_number, self.training.seed)
        rows = [self.rows[place] for place in places]
        if not any(row.target_tokens for row in rows):
            raise DataError(
                f"Step {self.step_number + 1} would train on nothing: its rows {listed(places, 8)} hold no target token; "
                "leave such rows out."
            )
        rate = learning_rate(self.training, self.step_number, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        skipped, scale = False, self.loss_scale
        try:
            loss, target_tokens, note = self._fitting(rows)
            norm = self._clip(loss) if self.in_backward is None else math.nan
            norm = self._take_step(norm)
        except NotFinite as error:
            note, skipped, loss, norm = self._skip(error, rows, places), True, math.nan, math.nan
            target_tokens = sum(row.target_tokens for row in rows)
            self.loss_scale = scale  # what no scale cured says nothing of the next step's
        self.step_number += 1
        if not skipped:
            self.model.after_step(self.step_number, self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
        self.torn = False
        tokens = sum(len(row.ids) for row in rows)
        seconds = time.perf_counter() - begin
        return Step(
            number=self.step_number,
            epoch=self.step_number / self.steps_per_epoch,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            target_tokens=target_tokens,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            peak_memory_bytes=peak_memory_bytes(self.model.device),
            seconds=seconds,
            micro_batch_size=self.micro_batch_size,
            skipped=skipped,
            note=note,
        )

    def rehearse(self) -> Rehearsal:
        """Take the most expensive step that the data can give, and take it back: does it fit, and what does it take?

        Where it does not fit, the smaller ways are tried, and the one that does is kept. Raises DoesNotFitError when none
        does; nothing is written either way.
        """
        self._require_whole()
        return rehearse(self)

    def save(self) -> Path:
        """Write a checkpoint of this moment into the run folder and return its place."""
        if self.folder is None:
            raise DataError("This trainer has no folder to save into; give one: Trainer(…, folder='runs/demo').")
        self._require_whole()
        return checkpoint.save(self, self.folder / "checkpoints", self.training.keep_checkpoints)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The first epoch's micro-batches in the order of training, on the device: for methods that look at data first."""
        for step in range(self.steps_per_epoch):
            places = step_rows(len(self.rows), self.training.batch_size, step, self.training.seed)
            for start in range(0, len(places), self.micro_batch_size):
                rows = [self.rows[place] for place in places[start : start + self.micro_batch_size]]
                yield send_to_device(collate(rows, self.pad_id, self.model.virtual_tokens), self.model.device)

    def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint: adapter, optimizer, step. Raises RunError when it does not belong to this run."""
        checkpoint.load(self, Path(folder))

    def _arrange(self, way: Way) -> None:
        """Go this way from now on."""
        self.way = way
        if self.training.gradient_checkpointing:
            wrap_layers(self.model.model, way.micro_batch_size, self.inputs, self.memory.mlp_tile)

    def _micro_batches(self, rows: Sequence[Some]) -> list[Sequence[Some]]:
        """How the rows enter the model: all at once when the boundary cuts them inside each layer, else one by one."""
        if self.way.layer_major:
            return [rows]
        size = self.micro_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _fitting(self, rows: Sequence[Row]) -> tuple[float, int, str]:
        """``_gradients`` in the first way that fits, and what there is to say of it.

        A step that is taken again has the same rows, random draws, loss scale and denominator.
        """
        step, scale, way = f"Step {self.step_number + 1}", self.loss_scale, self.way
        notes: list[str] = []
        while True:
            try:
                return *self._gradients(rows), " ".join(notes)
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
                reason = first_line(error)
            # only here are the frames gone that the exception went through, and with them the tensors of the failed try
            release_memory(self.model.device)
            if self.torn:
                raise DoesNotFitError(
                    f"{step} did not fit into memory ({reason}), and some layers had moved already "
                    "(training.optimizer_in_backward), so it cannot be taken again. The newest checkpoint is whole: go on "
                    f"from it with a training.micro_batch_size below {self.micro_batch_size}."
                )
            self.loss_scale = scale
            try:
                notes.append(self._shrink(len(rows), step, reason))
            except DoesNotFitError as error:
                self._arrange(way)  # where there is more memory the run goes on as it was
                if self.folder is None or not self.step_number:
                    raise
                place = self.save()
                raise DoesNotFitError(f"{error} The state after step {self.step_number} is in '{place}'.") from None

    def _shrink(self, rows: int, what: str, reason: str) -> str:
        """Take the next smaller way for ``what``, a step of ``rows`` rows; return a sentence that says so.

        Raises DoesNotFitError when there is none, and leaves the way as it was.
        """
        before, way = self.way, self.way
        while smaller := way.smaller(rows, layer_major_only=self.in_backward is not None):
            way = smaller
            self._arrange(way)
            try:
                self._check(again=True)
            except Exception as error:
                if not (isinstance(error, ModelError) or ran_out_of_memory(error)):
                    raise
                continue  # layers that cannot be cut so, or not even a few tokens fit
            return (
                f"{what} did not fit into memory ({reason}): from here on {way.beside(before)}, same rows and result."
            )
        self._arrange(before)
        raise DoesNotFitError(
            f"{what} did not fit into memory ({reason}) with {before.micro_batch_size} at once and a loss chunk of "
            f"{before.loss_chunk}, and no smaller way is left. Lower data.max_length, let memory.budget=auto choose where "
            "weights and layer inputs wait, or ask 'qlora plan' for what fits."
        )

    def _gradients(self, rows: Sequence[Row]) -> tuple[float, int]:
        """Fill ``.grad`` with the step's mean gradient; return (mean loss, target tokens).

        Under fp16 the loss is scaled up so that small gradients do not vanish. When that overflows, the scale is halved
        and the same rows are run again with the same random draws: no data is skipped. Now and then it is doubled again.
        """
        target_tokens = sum(row.target_tokens for row in rows)
        if self.scaled and self.step_number % SCALE_GROWTH == SCALE_GROWTH - 1:
            self.loss_scale = min(2 * self.loss_scale, LARGEST_SCALE)
        while True:
            total = 0.0
            if self.in_backward is not None:
                self.in_backward.begin()
            self.model.model.train()
            try:
                with _random_draws(self.training.seed, self.step_number, self.model.device):
                    for micro_batch in self._micro_batches(rows):
                        loss = self._loss(micro_batch)
                        if self.in_backward is not None:
                            self.in_backward.look_at(loss)
                        (loss * (self.loss_scale / target_tokens)).backward()
                        total += loss.item()
                    penalty = self.model.penalty()
                    if penalty is not None:
                        (penalty * self.loss_scale).backward()  # not part of the loss that is reported
            except BaseException:
                self.optimizer.zero_grad(set_to_none=True)
                if self.in_backward is not None:
                    self.in_backward.end()
                    self.torn = bool(self.in_backward.moved)
                raise
            finally:
                self.model.model.eval()
            if self.loss_scale == 1.0:
                return total / target_tokens, target_tokens
            grads = [p.grad for p in self.parameters.values() if p.grad is not None]
            torch._foreach_div_(grads, self.loss_scale)
            finite = math.isfinite(total_norm(grads))
            if finite or not math.isfinite(total) or self.loss_scale <= 1.0:
                return total / target_tokens, target_tokens
            self.loss_scale = max(1.0, self.loss_scale / 2)
            self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, rows: Sequence[Row]) -> Tensor:
        """The summed loss of rows that enter the model together."""
        batch = collate(list(rows), self.pad_id, self.model.virtual_tokens)
        loss, _ = batch_loss(self.model.model, send_to_device(batch, self.model.device), self.way.loss_chunk)
        return loss

    def _clip(self, loss: float) -> float:
        """Scale the gradients down to the recipe's norm; return the norm before. Raises NotFinite."""
        limit = self.training.max_grad_norm
        parameters = [p for p in self.parameters.values() if p.grad is not None]
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            broken = [name for name, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
            raise NotFinite(f"loss {loss:g} and gradient norm {norm:g}", broken)
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(norm, device=self.model.device))
        return norm

    def _take_step(self, norm: float) -> float:
        """``_move`` the parameters, for good; return the norm of all gradients, ``norm`` unless backward had it."""
        self.torn = True
        try:
            return norm if (found := self._move()) is None else found
        except Exception as error:
            self.optimizer.zero_grad(set_to_none=True)
            if not ran_out_of_memory(error):
                raise
            raise DoesNotFitError(
                f"Memory ran out while step {self.step_number + 1} moved the parameters ({first_line(error)}), so part of it "
                "was taken. The newest checkpoint is whole: go on from it where there is more memory, or begin anew with "
                "training.optimizer=paged_adamw_8bit."
            ) from None

    def _move(self) -> float | None:
        """Take the optimizer's step, or what backward has left of it, whose norm of all gradients is returned."""
        if self.in_backward is not None:
            return self.in_backward.finish()
        self.optimizer.step()
        return None

    def _skip(self, error: NotFinite, rows: Sequence[Row], places: Sequence[int]) -> str:
        """Skip the step that ``error`` broke off, if the recipe says so; return a sentence that names what was wrong.

        Raises NonFiniteError with the same sentence otherwise, and what was done until then is saved.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.torn = self.in_backward is not None and bool(self.in_backward.moved)
        blame = self._blame(rows, places)
        found = f"; the first bad value is {blame.where}" if blame.where else ""
        if error.names:
            found += f"; the first gradients that are not finite: {listed(error.names, 2)}"
        what = f"Step {self.step_number + 1} gave {error.what} on rows {listed(blame.rows or places, 8)}{found}"
        limit = self.training.skip_limit
        if self.torn:
            raise NonFiniteError(
                f"{what}. Part of the step was taken (training.optimizer_in_backward), but the newest checkpoint is whole; "
                "lower training.learning_rate or look at those rows."
            )
        if self.training.not_finite == "skip" and self.skipped < limit:
            self.skipped += 1
            return f"{what}. No step was taken; it is skipped ({self.skipped} of at most {limit})."
        advice = (
            "lower training.learning_rate, look at those rows, or set training.not_finite=skip to go on without them"
        )
        if self.training.not_finite == "skip":
            advice = f"training.skip_limit={limit} steps were skipped before; look at those rows"
        kept = ""
        if broken := checkpoint.not_finite(self):
            advice = (
                f"{listed(broken, 3)} hold values that are not finite: go back to the newest checkpoint, which is whole"
            )
        elif self.folder is not None and self.step_number:
            kept = f" The state after step {self.step_number} is in '{self.save()}'."
        raise NonFiniteError(f"{what}. No step was taken; {advice}.{kept}")

    def _blame(self, rows: Sequence[Row], places: Sequence[int]) -> Blame:
        """Which of the step's rows, and which module; nothing where memory does not suffice to look."""
        network = self.model.model
        draws = (self.training.seed, self.step_number, self.model.device)

        def loss_of(row: Row) -> Tensor:
            with _random_draws(*draws):
                return self._loss([row]) * (self.loss_scale / max(1, sum(row.target_tokens for row in rows)))

        network.train()
        try:
            return find_blame(network, rows, places, loss_of, backward=self.in_backward is None)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            return Blame()
        finally:
            network.eval()
            self.optimizer.zero_grad(set_to_none=True)

    def _require_whole(self) -> None:
        if self.torn:
            raise RunError(
                f"Step {self.step_number + 1} was broken off while it moved the parameters; load the newest checkpoint, which "
                "is whole."
            )

    def _check_recipe(self) -> None:
        """Settings that need one another."""
        training, memory = self.training, self.memory
        if not training.gradient_checkpointing:
            asked = [
                text
                for text, wanted in (
                    (
                        "layers that are streamed (memory.layers)",
                        getattr(self.model.base, "placement", None) is not None,
                    ),
                    (f"memory.layer_inputs={memory.layer_inputs}", memory.layer_inputs != "device"),
                    ("memory.mlp_tile", memory.mlp_tile is not None),
                    ("training.optimizer_in_backward", training.optimizer_in_backward),
                )
                if wanted
            ]
            if asked:
                raise RecipeError(
                    f"The recipe asks for {listed(asked)}, which works at the recompute boundary of the layers, but has "
                    "training.gradient_checkpointing=false; set it to true."
                )
        if not training.optimizer_in_backward:
            return
        reads = [
            method.section.name
            for method in self.model.methods
            if method.section.name == "adalora" or method.penalty() is not None
        ]
        for wrong, why in (
            (
                training.accumulation != "layer_major",
                f"training.accumulation is {training.accumulation}, with which a layer's gradients are whole only at the end; "
                "set it to layer_major",
            ),
            (
                training.max_grad_norm is not None,
                f"training.max_grad_norm is {training.max_grad_norm}, and the norm of all gradients is known only at the end; "
                "set it to null",
            ),
            (
                self.scaled,
                "the model computes in fp16, whose loss scale may turn out too large only at the end; set "
                "model.compute_dtype to bf16 or fp32",
            ),
            (
                bool(reads),
                f"{listed(reads)} needs all gradients after the step; leave training.optimizer_in_backward out",
            ),
        ):
            if wrong:
                raise RecipeError(
                    f"training.optimizer_in_backward moves a layer and frees its gradients at once, but {why}."
                )

    def _disk_folder(self) -> Path:
        """Where layer inputs wait: on the disk that the plan looked at."""
        folder = cache_folder_of(self.memory)
        if self.memory.layer_inputs == "disk":
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable(folder, error) from error
        return folder

    def _check_rows(self) -> None:
        """One look at every row: has each token an embedding, and each position a place in the model?"""
        network, first, virtual = self.model.model, self.model.first_position, self.model.virtual_tokens
        check_rows(network, self.rows, first, virtual)
        check_rows(network, self.held_out, first, virtual, "Held-out row")

    def _check(self, again: bool = False) -> None:
        """A few short forwards before anything is spent: is the loss the model's own, are packed examples apart, and does
        the boundary change nothing? ``again``: only what depends on how many rows there are at once."""
        network, at_once = self.model.model, self.micro_batch_size
        longest = max(self.rows, key=lambda row: len(row.ids))  # a short one would tell too little
        ids = [int(token) for token in longest.ids[:16]]
        packed = any(len(row.examples) > 1 for row in self.rows)
        was_training = network.training
        network.eval()  # dropout would tell two equal forwards apart
        try:
            if not again:
                try:
                    check_loss_path(network, ids)
                except NonFiniteError as error:
                    blame = self._blame([longest], [0])
                    raise NonFiniteError(
                        f"{error}{f': the first bad value is {blame.where}' if blame.where else ''}. Fetch the checkpoint again, "
                        "or take another model.compute_dtype."
                    ) from None
            if packed:
                check_packing(network, ids, at_once)
            if self.training.gradient_checkpointing:
                for rows in self._rows_together():
                    check_boundary(network, ids, rows, at_once, packed)
        finally:
            network.train(was_training)

    def _rows_together(self) -> list[int]:
        """How many rows enter the model together: in a whole step, and in the one that ends an epoch and may be short."""
        ends = {0, min(self.total_steps, self.steps_per_epoch) - 1}
        batch_size, seed = self.training.batch_size, self.training.seed
        steps = [step_rows(len(self.rows), batch_size, step, seed) for step in ends]
        together = {len(self._micro_batches(places)[0]) for places in steps}
        return sorted(together, reverse=True)


def total_norm(gradients: list[Tensor]) -> float:
    """The L2 norm of all gradients together, in fp32: torch's own is rounded to the gradients' dtype, bf16's three digits."""
    if not gradients:
        return 0.0
    norms = torch._foreach_norm(gradients, 2, torch.float32)
    return float(torch.linalg.vector_norm(torch.stack(norms)))


@contextmanager
def _random_draws(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from (seed, step); outside, as if nothing had been drawn."""
    devices: list[Any] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 1) % 2**63)
        yield
