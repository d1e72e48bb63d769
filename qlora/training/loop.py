"""The loop: one trainer for all methods, an iterator that the user drives.

    for step in trainer: ...

A step takes its rows by its number, puts them through the model in micro-batches, divides the summed loss once by the
step's target tokens, clips, and moves the parameters. The loss's denominator is the whole step's, so the split into
micro-batches, and a short last one, change nothing (transformers#34191 is what happens otherwise).

Random draws of a step come from (seed, step) alone: nothing to save, and an evaluation in between changes nothing.
Knows rows, losses and optimizers; must not know recipes' files, evaluation or reports.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from qlora.config import TrainingSection
from qlora.data import Data, Row, collate, step_rows, steps_per_epoch
from qlora.device import peak_memory_bytes
from qlora.errors import DataError, NonFiniteError, listed
from qlora.methods import AdaptedModel
from qlora.model.checks import check_boundary, check_loss_path, check_packing, check_rows
from qlora.model.layers import unwrap_layers, wrap_layers
from qlora.model.loss import batch_loss
from qlora.training import checkpoint
from qlora.training.optim import learning_rate, make_optimizer, quiet_paging

LARGEST_SCALE = 2.0**14  # what the loss is multiplied with under fp16, at first
SCALE_GROWTH = 500  # steps after which a scale that fell is doubled


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

    def metrics(self) -> dict[str, float]:
        """The line for ``metrics.jsonl``."""
        values = asdict(self)
        return {"step": values.pop("number"), **values}

    def __str__(self) -> str:
        return (
            f"step {self.number}  loss {self.loss:.4f}  lr {self.learning_rate:.2e}  grad {self.grad_norm:.3f}  "
            f"{self.tokens_per_second:.0f} tokens/s"
        )


class Trainer:
    """Trains an adapted model on rows; iterate over it for steps.

    ``folder`` is the run folder for ``save``; without one nothing is written.
    """

    def __init__(
        self,
        model: AdaptedModel,
        data: Data | Sequence[Row],
        training: TrainingSection | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.model = model
        self.rows: Sequence[Row] = data.train if isinstance(data, Data) else data
        self.held_out: Sequence[Row] = data.held_out if isinstance(data, Data) else ()
        """Looked at before training, so that measuring them afterwards cannot fail."""
        self.training = training or TrainingSection()
        self.folder = None if folder is None else Path(folder)
        if not self.rows:
            raise DataError("There are no rows to train on; give data with at least one example.")
        self.step_number = 0
        """Steps done."""
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
        self._check_rows()
        if self.training.gradient_checkpointing:
            wrap_layers(model.model, self.training.micro_batch_size)
        else:
            unwrap_layers(model.model)  # an earlier trainer may have left its boundary
        self._check()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """Do one optimizer step. Raises NonFiniteError, with no step taken, when the loss or a gradient is not finite."""
        if self.step_number >= self.total_steps:
            raise StopIteration
        begin = time.perf_counter()
        places = step_rows(len(self.rows), self.training.batch_size, self.step_number, self.training.seed)
        rows = [self.rows[place] for place in places]
        if not any(row.target_tokens for row in rows):
            raise DataError(
                f"Step {self.step_number + 1} would train on nothing: its rows {listed(places, 8)} hold no target token; "
                "leave such rows out."
            )
        loss, target_tokens = self._gradients(rows)
        norm = self._clip(loss, places)
        rate = learning_rate(self.training, self.step_number, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        self.step_number += 1
        self.model.after_step(self.step_number, self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
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
        )

    def save(self) -> Path:
        """Write a checkpoint of this moment into the run folder and return its place."""
        if self.folder is None:
            raise DataError("This trainer has no folder to save into; give one: Trainer(…, folder='runs/demo').")
        return checkpoint.save(self, self.folder / "checkpoints", self.training.keep_checkpoints)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The first epoch's micro-batches in the order of training, on the device: for methods that look at data first."""
        for step in range(self.steps_per_epoch):
            places = step_rows(len(self.rows), self.training.batch_size, step, self.training.seed)
            for start in range(0, len(places), self.training.micro_batch_size):
                rows = [self.rows[place] for place in places[start : start + self.training.micro_batch_size]]
                yield send_to_device(collate(rows, self.pad_id, self.model.virtual_tokens), self.model.device)

    def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint: adapter, optimizer, step. Raises RunError when it does not belong to this run."""
        checkpoint.load(self, Path(folder))

    def _micro_batches(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """How the rows enter the model: all at once when the boundary cuts them inside each layer, else one by one."""
        size = self.training.micro_batch_size
        if self.training.gradient_checkpointing and self.training.accumulation == "layer_major":
            return [rows]
        return [rows[start : start + size] for start in range(0, len(rows), size)]

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
            self.model.model.train()
            try:
                with _random_draws(self.training.seed, self.step_number, self.model.device):
                    for micro_batch in self._micro_batches(rows):
                        batch = collate(list(micro_batch), self.pad_id, self.model.virtual_tokens)
                        batch = send_to_device(batch, self.model.device)
                        loss, _ = batch_loss(self.model.model, batch, self.training.loss_chunk)
                        (loss * (self.loss_scale / target_tokens)).backward()
                        total += loss.item()
                    penalty = self.model.penalty()
                    if penalty is not None:
                        (penalty * self.loss_scale).backward()  # not part of the loss that is reported
            except BaseException:
                self.optimizer.zero_grad(set_to_none=True)
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

    def _clip(self, loss: float, places: list[int]) -> float:
        """Scale the gradients down to the recipe's norm; return the norm before. Refuses what is not finite."""
        limit = self.training.max_grad_norm
        parameters = [p for p in self.parameters.values() if p.grad is not None]
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            broken = [name for name, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
            self.optimizer.zero_grad(set_to_none=True)
            where = f"; the first gradients that are not finite: {listed(broken, 2)}" if broken else ""
            raise NonFiniteError(
                f"Step {self.step_number + 1} gave loss {loss:g} and gradient norm {norm:g} on rows {listed(places, 8)}"
                f"{where}. No step was taken; lower training.learning_rate or look at those rows."
            )
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(norm, device=self.model.device))
        return norm

    def _check_rows(self) -> None:
        """One look at every row: has each token an embedding, and each position a place in the model?"""
        network, first, virtual = self.model.model, self.model.first_position, self.model.virtual_tokens
        check_rows(network, self.rows, first, virtual)
        check_rows(network, self.held_out, first, virtual, "Held-out row")

    def _check(self) -> None:
        """A few short forwards before anything is spent: is the loss the model's own, are packed examples apart, and does
        the boundary change nothing?"""
        network, at_once = self.model.model, self.training.micro_batch_size
        longest = max(self.rows, key=lambda row: len(row.ids))  # a short one would tell too little
        ids = [int(token) for token in longest.ids[:16]]
        packed = any(len(row.examples) > 1 for row in self.rows)
        was_training = network.training
        network.eval()  # dropout would tell two equal forwards apart
        try:
            check_loss_path(network, ids)
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
        together = {len(self._micro_batches([self.rows[place] for place in places])[0]) for places in steps}
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
