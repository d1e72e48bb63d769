"""Loading: an empty model is filled tensor by tensor, each quantised on the device as it comes from disk.

    assembled model ─► for each tensor: read → device → quantise → place → drop ─► tie ─► compute what no file holds
                                                                                     ─► nothing left on meta

Where layers do not stay on the device (``residence/``), each of their linears goes to where it waits as soon as it is packed.

The law: the logits are those of ``from_pretrained`` with the same ``BitsAndBytesConfig``. Extra memory is one tensor.
Knows checkpoints and modules; must not know where layers wait, adapters, data or training.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.errors import ModelError, counted, listed
from qlora.machine.device import trim_heap
from qlora.machine.disk import bytes_text
from qlora.model.base import Base
from qlora.model.checkpoint import Checkpoint, read_json
from qlora.model.experts import PackedExperts, is_packed
from qlora.model.names import Stack, packed_parts
from qlora.model.nf4 import FrozenLinear, Packed, away_of, dense_weight, is_transposed
from qlora.model.skeleton import Assembled

GENERATION = "generation_config.json"
WIDE = 80  # letters of a terminal that has room for a bar and a speed beside name and bytes
INITIALISED = "_is_hf_initialized"  # transformers' mark on tensors and modules that its initialisation must leave alone


def fill(
    empty: Assembled,
    names: Iterable[str],
    device: torch.device,
    advance: Callable[[int], None] = lambda count: None,
    on_host: Collection[nn.Module] = (),
    elsewhere: Collection[str] = (),
) -> None:
    """Read, place and drop one tensor of the checkpoint after the other, on ``device``; those of modules ``on_host`` in host
    memory, and of parameters that are ``elsewhere``, by their names in the model, nothing. ``advance`` is told the bytes of each.
    Raises ModelError where a tensor is not what the model expects."""
    done: set[str] = set()
    for name in names:
        target = empty.names[name]
        if target in elsewhere:
            owner, _, key = target.rpartition(".")
            module = empty.model.get_submodule(owner)
            _put(module, key, absent(getattr(module, key), device))
            advance(empty.checkpoint.entries[name].bytes)
            continue
        if target in empty.stacks:
            if target not in done:  # with its first part come all others, wherever in the files they are
                advance(_fill_stack(empty, target, device))
            done.add(target)
            continue
        owner, _, key = target.rpartition(".")
        module = empty.model.get_submodule(owner)
        if isinstance(module, FrozenLinear) and key == "weight":
            advance(read_packed(empty.checkpoint, name, module, device, empty.dtype))
            continue
        place = torch.device("cpu") if any(module is one for one in on_host) else device
        _put(module, key, empty.checkpoint.read(name).to(place))
        if key == "weight" and (away := away_of(module)) is not None:
            away.keep()
        trim_heap()
        advance(empty.checkpoint.entries[name].bytes)


def absent(values: Tensor, device: torch.device) -> Tensor:
    """What stands in the place of a parameter that another process has: its shape, and NaN for whoever reads it."""
    return torch.full((), math.nan, dtype=values.dtype, device=device).expand(values.shape)


def _fill_stack(empty: Assembled, target: str, device: torch.device) -> int:
    """Read the matrices of several experts one after the other, packed where they are to be; the bytes read."""
    stack, checkpoint, shape = empty.stacks[target], empty.checkpoint, empty.shapes[target]
    owner, _, key = target.rpartition(".")
    holder = getattr(empty.model.get_submodule(owner), key)
    whole = None if isinstance(holder, PackedExperts) else torch.empty(shape, dtype=holder.dtype, device=device)
    for expert in range(shape[0]):
        matrix = stack.matrix(expert, checkpoint.read)
        if whole is None:
            holder.place(expert, matrix.to(device, empty.dtype), device)
        else:
            whole[expert] = matrix.to(device, whole.dtype)
        trim_heap()
    if whole is not None:
        _put(empty.model.get_submodule(owner), key, whole)
    elif holder.away is not None:
        holder.away.keep()
    return sum(checkpoint.entries[one].bytes for one in stack.sources)


def split_expert(stack: Stack, expert: int, matrix: Tensor) -> dict[str, Tensor]:
    """What ``Stack.matrix`` made ``matrix`` from, by the names in the checkpoint; where one tensor holds all experts, its part."""
    tensors: dict[str, Any] = {stack.pattern: matrix[None]}
    patterns = list(stack.parts)
    for operation in reversed(stack.operations):
        tensors = operation.reverse_op.convert(tensors, source_patterns=[stack.pattern], target_patterns=patterns)
    if not stack.operations:
        tensors = {patterns[0]: matrix}
    found = {}
    for pattern, names in stack.parts.items():
        values = tensors.get(pattern.replace("*", "0"), tensors.get(pattern))
        assert isinstance(values, Tensor)
        found[names[expert] if len(names) > 1 else names[0]] = values[0] if values.dim() > matrix.dim() else values
    return found


def read_packed(
    checkpoint: Checkpoint, name: str, linear: FrozenLinear, device: torch.device, dtype: torch.dtype
) -> int:
    """Give ``linear`` the weight ``name``, quantised on ``device`` or as bitsandbytes packed it before; the bytes read."""
    if parts := packed_parts(name, checkpoint):
        every = [name, *parts]
        try:
            linear.place_quantised(packed_tensors(checkpoint, name), device)
        except ModelError as error:
            raise ModelError(f"'{name}' in '{checkpoint.folder}': {error}") from None
    else:
        every = [name]
        # from_pretrained casts before it quantises; the scales of a tensor depend on the dtype that they came from
        linear.place(turned(linear, checkpoint.read(name).to(device, dtype)), device)
        trim_heap()
    return sum(checkpoint.entries[one].bytes for one in every)


def turned(linear: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` from the checkpoint's layout to [out, in] or back: two names of one, but for GPT-2's."""
    return weight.t() if is_transposed(linear) else weight


def packed_tensors(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """What the checkpoint has for a packed weight, by the keys that ``place_quantised`` expects."""
    stem = name.removesuffix("weight")
    return {one.removeprefix(stem): checkpoint.read(one) for one in [name, *packed_parts(name, checkpoint)]}


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer on meta by a real tensor, in the dtype that the skeleton has for it."""
    old = getattr(module, key)
    value = tensor.to(old.dtype) if tensor.is_floating_point() else tensor
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(value, INITIALISED, True)
    setattr(module, key, value)


def finish(model: PreTrainedModel, missing: set[str], device: torch.device, name: str) -> None:
    """Tie what is tied, compute what no file holds (rotary frequencies, scales), and check that nothing was left out.

    ``missing`` are the tensors that no file holds. Raises ModelError where one of them has no values then.
    """
    # transformers changes the set: a tied weight that it filled is no longer missing
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    blank: list[tuple[str, nn.Module, str]] = []
    for owner, module in model.named_modules():
        waiting = away_of(module)
        elsewhere = () if waiting is None else waiting.names
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.is_meta and key not in elsewhere:
                # poisoned, so that what transformers' initialisation then does not fill is found below
                poison = torch.full_like(value, float("nan") if value.is_floating_point() else -1, device=device)
                setattr(module, key, nn.Parameter(poison, False) if isinstance(value, nn.Parameter) else poison)
                blank.append((f"{owner}.{key}", module, key))
    for module in model.modules():
        if isinstance(module, Packed) or away_of(module) is not None or is_packed(module):
            setattr(module, INITIALISED, True)
            # what stands around a linear may begin its weight too, as Mamba 2's mixer does, and that looks at tensors
            for value in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                setattr(value, INITIALISED, True)
    model.initialize_weights()
    empty = [name for name, module, key in blank if _is_poison(getattr(module, key))]
    if empty:
        raise ModelError(f"'{name}' was read, but {listed(empty)} got no values; this model cannot be loaded.")
    for _, module, key in blank:
        value = getattr(module, key)
        if value.device != device:
            setattr(module, key, value.to(device))


def _is_poison(tensor: Tensor) -> bool:
    return bool(tensor.isnan().any() if tensor.is_floating_point() else (tensor == -1).all()) and tensor.numel() > 0


@contextmanager
def progress_of(empty: Assembled, names: Iterable[str], progress: bool) -> Iterator[Callable[[int], None]]:
    """Yields ``advance(bytes)``, which moves a bar on a terminal, while the tensors ``names`` are read."""
    checkpoint, name, quantization = empty.checkpoint, empty.checkpoint.name, empty.scheme.quantization
    every = [part for source in names for part in (source, *packed_parts(source, checkpoint))]
    total = sum(checkpoint.entries[part].bytes for part in every)
    how = "unquantised" if quantization == "none" else f"to {quantization}"
    if not progress:
        yield lambda count: None
        return
    begun, left = time.perf_counter(), sum(checkpoint.entries[other].bytes for other in empty.left)
    if not sys.stderr.isatty():
        print(
            f"Loading {name} {how}: {bytes_text(total)} in {counted(len(checkpoint.shards), 'file')}", file=sys.stderr
        )
        yield lambda count: None
    else:
        with _bar(f"Loading {name.rstrip('/').rpartition('/')[2]} {how}", total) as advance:  # of a long path its end
            yield advance
    seconds = time.perf_counter() - begun
    spared = (
        f"; its towers ({bytes_text(left)}) are left in their files, at this pace {seconds * left / total:.1f} s less"
    )
    absent = [path for path, numbers in empty.towers.items() if not numbers]
    lacks = f"; it holds nothing of {listed(absent)}, so a merged model will not either"
    print(
        f"Loaded {name} in {seconds:.1f} s{spared if left and total else ''}{lacks if absent else ''}", file=sys.stderr
    )


@contextmanager
def _bar(task: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    from rich.table import Column

    console = Console(stderr=True)
    name = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=2))
    done = DownloadColumn(binary_units=True, table_column=Column(no_wrap=True))
    wide = console.width >= WIDE  # a narrower terminal would show it in two lines
    more = (BarColumn(None, table_column=Column(ratio=1)), TransferSpeedColumn(Column(no_wrap=True))) if wide else ()
    with Progress(name, done, *more, console=console, expand=True, transient=True) as bar:
        number = bar.add_task(task, total=total)
        yield lambda count: bar.advance(number, count)


def checkpoint_weight(base: Base, path: str, linear: nn.Module | None = None) -> Tensor:
    """The weight of the linear at ``path`` as the checkpoint has it, [out, in] in the compute dtype, on the base's device.

    A prequantised checkpoint, or a model that came from no folder, has no other weight than the one in use. ``linear`` is
    the one that stood at ``path``, where something was planted or wrapped there since.
    """
    name = (base.names or {}).get(f"{path}.weight")
    linear = base.model.get_submodule(path) if linear is None else linear
    held = base.checkpoint
    if held is None or name is None or packed_parts(name, held) or not isinstance(linear, FrozenLinear):
        return dense_weight(linear, base.compute_dtype)
    return turned(linear, held.read(name).to(base.device, base.compute_dtype))


def quantised_names(model: nn.Module) -> set[str]:
    """The names of the weights that are held quantised, as ``model.layers.0.mlp.up_proj.weight``, or of a mixture's experts
    ``model.layers.0.mlp.experts.down_proj``."""
    return {
        f"{name}.weight" if isinstance(module, FrozenLinear) else name
        for name, module in model.named_modules()
        if isinstance(module, Packed)
    }


def end_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Every token that ends an answer: by the tokenizer, by config.json and by generation_config.json, where Gemma's end of a
    turn, for example, stands alone."""
    folder, ends = checkpoint.folder, {checkpoint.tokenizer.eos_token_id}
    for name in ("config.json", GENERATION):
        if not (folder / name).exists():
            continue
        values = read_json(folder, name, "a configuration")
        inside = values.get("text_config")
        found = values.get("eos_token_id")
        if found is None and isinstance(inside, dict):
            found = inside.get("eos_token_id")
        named = found if isinstance(found, list) else [found]
        if any(end is not None and type(end) is not int for end in named):
            raise ModelError(
                f"'{folder / name}' has the eos_token_id {found!r}; expected a token's number or a list of them. Correct "
                "it, or fetch it again."
            )
        ends |= set(named)
    return tuple(sorted(end for end in ends if end is not None))
