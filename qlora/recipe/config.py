"""The recipe's sections: everything a run needs to know, in one typed and frozen schema.

Each field is documented once, by the text under it, which reference.py prints. A recipe never changes after it is
validated: ``auto`` values are resolved into a *new* recipe, which is what runs and what the run folder keeps. Knows pydantic;
must not know torch, a model or a data set.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from qlora.errors import counted
from qlora.files.strangers import JsonObject, Lines, shown
from qlora.recipe.methods import AnyMethod, LoRA, labels_of, named, parts_of
from qlora.recipe.objectives import AnyObjective, TokensObjective
from qlora.recipe.reading import read_file, validated
from qlora.recipe.schema import Section, by_text
from qlora.recipe.tasks import TaskSection

DEFAULT_MODEL = "smollm2-135m-instruct"


class ModelSection(Section):
    """The base model: which checkpoint, and how its frozen weights are held."""

    name: str = Field(DEFAULT_MODEL, min_length=1)
    """A local folder with safetensors, a hub id (`org/name`), or `smollm2-135m-instruct`, the embedded default."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the newest when left out."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the frozen linears are stored. `none` keeps them in the compute dtype."""
    double_quant: bool = True
    """Quantise the 4-bit scales themselves to 8 bits (QLoRA paper, section 3): 0.37 bit a parameter saved."""
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """The dtype of activations and matrix products. `auto`: bf16 where the device has it, fp16 on older GPUs; on a
    CPU bf16 where a run's plan finds it clearly faster, else fp32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention kernel, by transformers' name. `auto` takes what the model supports, SDPA first, and keeps packed
    examples apart without a mask of pairs where it can; `sdpa` makes the mask."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Leave it off unless you have read that code."""

    @field_validator("revision")
    @classmethod
    def _a_name_in_git(cls, revision: str | None) -> str | None:
        # the hub's client looks it up as a file in its cache: ../../x would be another file than a revision's
        if revision is not None and (not re.fullmatch(r"\w[\w./+-]*", revision) or ".." in revision):
            raise ValueError(f"is {shown(revision)}; expected a branch, tag or commit")
        return revision


class DataSection(Section):
    """The training data and how it becomes rows of tokens."""

    instead = {"held_out": "held_out_fraction", "held_out_fraction": "held_out"}  # noqa: RUF012 (a ClassVar in Section)

    train: str | tuple[str, ...] = Field(min_length=1)
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder or pattern of files, several of these, or a hub id."""
    held_out: str | None = None
    """A file, folder, pattern or hub id that is never trained on; loss and answers are measured on it."""
    held_out_fraction: float = Field(0.0, ge=0, lt=1)
    """Part of `train` to hold out when there is no `held_out` file, drawn by `training.seed`: whole records, or, of raw
    text in too few documents for that (fewer than 1 / held_out_fraction, as a single .txt is), pieces of at most
    `max_length` tokens. No token is in both parts."""
    subset: str | None = None
    """A hub data set's configuration name."""
    split: str = "train"
    """A hub data set's split to train on."""
    held_out_split: str = "test"
    """A hub data set's split for `held_out`."""
    form: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "kto"] = "auto"
    """The form of a record. `auto` detects it from the fields, and says what it found. Unless `objective` compares answers,
    `preference` trains the chosen ones alone, and `kto` the desirable ones; both have to be asked for."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Other names for a form's fields, as `{prompt: question, completion: answer}`, or texts with fields in them, as
    `{prompt: "Review: {review}\\nSentiment:", completion: label}`."""
    labels: dict[str, dict[str, str]] = Field(default_factory=dict)
    """What stands for a field's values, as `{label: {0: negative, 1: positive}}`."""
    train_on: Literal["auto", "assistant", "completion", "all"] = "auto"
    """Which tokens carry loss. `auto`: the assistant's turns of a conversation, the completion of a pair, all of a text."""
    chat_template: str | None = None
    """A file with a Jinja chat template that replaces the tokenizer's own."""
    dropped_content: Literal["keep", "drop", "refuse"] = "keep"
    """What happens to reasoning, text and function calls of an answer that the chat template would leave out. `keep` trains
    on them as text where that is possible, `drop` without them; both say of how many records. `refuse` stops at the first.
    A user's turn, a later system text, a result or a speaker's name that it leaves out is said, or refused, the same way."""
    max_length: int = Field(1024, ge=8, le=1_048_576)
    """The length of a row in tokens; also the longest example. Of pairs, the longest side, and a row is twice as long."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to an example above `max_length`. Raw text is never cut off: it is split into rows."""
    packing: Literal["auto", "by_length"] | bool = "auto"
    """Put several examples into one row (best fit), each with its own positions and unable to see the others; or each into a row
    of its own: `by_length` gives a step rows of like length, with little padding, `false` any. `auto` packs where the model can,
    and says where it cannot."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """What happens when records cannot be read: a broken line, an empty answer, turns that the chat template refuses. `stop`
    shows the first five. `skip` leaves them out and counts them by kind, up to a tenth of all."""
    limit: int | None = Field(None, ge=1)
    """Use only the first N records."""

    @field_validator("labels", mode="before")
    @classmethod
    def _by_text(cls, labels: Any) -> Any:
        return {name: by_text(texts) for name, texts in labels.items()} if isinstance(labels, dict) else labels

    @property
    def sources(self) -> tuple[str, ...]:
        """What ``train`` names, one or several."""
        return (self.train,) if isinstance(self.train, str) else tuple(self.train)

    @property
    def held_out_sources(self) -> tuple[str, ...]:
        """What ``held_out`` names, if anything."""
        return () if self.held_out is None else (self.held_out,)

    @property
    def packs(self) -> bool:
        """Whether examples share rows; with ``auto``, as long as nobody knows the model."""
        return self.packing in (True, "auto")

    @model_validator(mode="after")
    def _one_held_out(self) -> Self:
        if self.held_out is not None and self.held_out_fraction > 0:
            raise ValueError("has both held_out and held_out_fraction; expected one of them")
        return self


class TrainingSection(Section):
    """The optimizer and the loop."""

    former = {  # noqa: RUF012 (a ClassVar in Section)
        "gradient_checkpointing": (
            "recompute",
            # without checkpointing there was one order
            {True: {"recompute": "all"}, False: {"recompute": "none", "accumulation": "micro_batch_major"}},
        )
    }

    instead = {"epochs": "steps"}  # noqa: RUF012 (a ClassVar in Section)

    epochs: int = Field(1, ge=1)
    """Passes over the training rows; ignored where `steps` is given, whose place it takes as an override."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps in all."""
    batch_size: int = Field(16, ge=1)
    """Rows an optimizer step. The last step of an epoch takes what is left."""
    micro_batch_size: int = Field(1, ge=1)
    """Rows that go through the model at once. Changes memory and speed, never the result."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW with 32-bit state (torch's fused one), or bitsandbytes' 8-bit and paged ones (paged: the state may leave a full GPU
    for host memory)."""
    learning_rate: float = Field(2e-4, gt=0, le=10)
    """The peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up: to zero along a line or a half cosine, or not at all."""
    warmup_fraction: float = Field(0.03, ge=0, le=1)
    """Part of all steps over which the learning rate rises from zero."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay, on matrices only."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm; `null` for no clipping."""
    recompute: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)] = "auto"
    """How many layers keep only their input and are computed again in backward: fewer are faster, and take more memory.
    `auto`: as many as memory asks for, which the plan decides. Same result, bit for bit. Formerly `gradient_checkpointing`:
    true for `all`, false for `none`."""
    accumulation: Literal["auto", "layer_major", "micro_batch_major"] = "auto"
    """`layer_major` sends a step's micro-batches through one layer before the next, so that each layer is dequantised once
    a visit; it keeps the layer inputs of the whole step. `micro_batch_major` keeps those of one micro-batch. `auto`: the
    plan takes the faster one, beside what `recompute` keeps. Same result."""
    loss_chunk: int = Field(256, ge=1)
    """Target positions whose logits exist at the same time; with the head on the host, as many bytes of them."""
    not_finite: Literal["stop", "skip"] = "stop"
    """What happens when a step's loss or a gradient is not finite (NaN, infinity). Either way no parameter moves, and the
    step, its rows and the first bad module are named. `skip` then goes on with the next step."""
    skip_limit: int = Field(10, ge=1)
    """How many steps `not_finite: skip` may skip before the run stops all the same."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seeds the adapter's initial values, the order of the rows and dropout."""
    save_every: int = Field(100, ge=0)
    """Steps between checkpoints, which is what a killed run loses at most; 0 saves the last step only."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""

    @property
    def layer_major(self) -> bool:
        """The order of accumulation. Where nobody decided: layer-major, unless activations are kept, which then would be
        those of a whole step."""
        if self.accumulation == "auto":
            return self.recompute not in ("none", 0)
        return self.accumulation == "layer_major"

    @property
    def slower(self) -> float:
        """A lower learning rate to try: a tenth; in place of one that no method takes, the usual one."""
        usual: float = type(self).model_fields["learning_rate"].default
        return self.learning_rate / 10 if self.learning_rate <= 1 else usual

    def recomputed(self, layers: int) -> int:
        """How many of ``layers`` are recomputed; all of them where nobody decided, since that takes the least memory."""
        if isinstance(self.recompute, int):
            return min(self.recompute, layers)
        return 0 if self.recompute == "none" else layers


class MemorySection(Section):
    """Where weights and layer inputs are kept. Changes memory and speed, never the result."""

    budget: str | None = Field(
        None,
        pattern=r"^(auto|\d+(\.\d+)?\s*([KMGT]i?B|B))$",
        json_schema_extra={"expected": "auto, or an amount such as 6GiB"},
    )
    """`auto` (what is free) or an amount such as `6GiB`: the plan then chooses the fastest arrangement that fits, and writes
    it into the resolved recipe: every field below, and `training.micro_batch_size`, `recompute`, `accumulation` and `loss_chunk`. The rows
    of a step never change. Left out: what the recipe says is taken as it stands, and refused if it does not fit."""
    layers: Literal["resident", "streamed"] | Annotated[int, Field(ge=0)] = "resident"
    """How many of the frozen decoder layers stay on the device: all, none, or so many, evenly spread. The rest are fetched
    for each visit, the next one while this one computes."""
    tier: Literal["host", "disk", "processes"] = "host"
    """Where layers that do not stay are kept: in (pinned) host memory, in the NF4 file cache on disk, or spread over the
    devices of a run's `processes`, a part on each, as FSDP does, which alone is for full fine-tuning too. On a CPU only the last
    two save memory."""
    slots: int = Field(2, ge=2, le=64)
    """Places on the device for layers that do not stay: one computes, the others are being filled."""
    embedding: Literal["device", "host"] = "device"
    """`host` keeps the input embedding in host memory; only the rows of the tokens at hand travel."""
    head: Literal["device", "host"] = "device"
    """`host` keeps the output head in host memory; slices of the vocabulary travel, and the loss is summed over them."""
    layer_inputs: Literal["device", "host"] = "device"
    """Where the inputs of the layers wait for backward (of those layers that are recomputed)."""
    mlp_tile: int | None = Field(None, ge=1)
    """Tokens that go through a layer's MLP at once, where a long row would not fit; all of them when left out."""
    cache: str | None = None
    """The folder of the NF4 file cache; `nf4` in qlora's cache folder when left out. Runs share it."""
    rehearse: bool = True
    """Run the worst batch that the data can give once before the first step, and show the peak it took."""

    @property
    def spread(self) -> bool:
        """Whether layers are spread over the processes of a run."""
        return self.tier == "processes" and self.layers != "resident"


class EvaluationSection(Section):
    """What is measured before, during and after training."""

    every: int = Field(0, ge=0)
    """Steps between held-out evaluations; 0 evaluates before and after only."""
    held_out_rows: int | None = Field(None, ge=1)
    """Use only the first N held-out rows."""
    prompts: int = Field(3, ge=0)
    """Held-out prompts that are answered before and after training."""
    max_new_tokens: int = Field(64, ge=1)
    """The longest answer in tokens."""
    tasks: tuple[TaskSection, ...] = ()
    """[Tasks](evaluation.md) that the base and the trained model are scored on, as `[{name: hellaswag, data: hellaswag.jsonl}]`."""

    @field_validator("tasks", mode="after")
    @classmethod
    def _each_name_once(cls, tasks: tuple[TaskSection, ...]) -> tuple[TaskSection, ...]:
        names = [task.name for task in tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"has two tasks named {', '.join(map(shown, twice))}; give each a name of its own")
        return tasks


class DeviceSection(Section):
    """Where it runs."""

    name: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        json_schema_extra={"expected": "auto, cpu, cuda, or a GPU's number as cuda:1"},
    )
    """`auto` (the first CUDA device, else the CPU), `cpu`, `cuda` or `cuda:N`."""
    threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads; when left out all cores, in a container those that its limit leaves. Where other programs keep some of them busy
    as training begins, as many as have a core for themselves."""
    memory: str | None = None
    """The memory to plan for, as `24GiB` or a card's name (`T4`, `3090`, `4090`, …), of a card that need not be here; `2x4090`
    for two processes on two of them. In training it is a limit: what needs more by the plan is refused, and a GPU gives this process no more;
    on a CPU nothing else holds it."""
    deterministic: bool = False
    """Use only kernels that give the same bits every time, where a GPU has faster ones; an operation without such a kernel
    is refused. A CPU gives the same bits anyway, for the same number of threads."""
    host_memory: str | None = None
    """The host memory to plan for, as `64GiB`; this machine's free memory when left out."""

    @field_validator("memory", mode="before")
    @classmethod
    def _a_card_may_be_a_number(cls, value: object) -> object:
        return str(value) if type(value) is int else value  # YAML reads 4090 as one


class Recipe(Section):
    """One run, whole."""

    mistaken = dict.fromkeys(("recipe", "arms", "grid"), "a study, which qlora study takes")

    model: ModelSection = ModelSection()
    method: AnyMethod = LoRA()
    data: DataSection
    objective: AnyObjective = TokensObjective()
    training: TrainingSection = TrainingSection()
    memory: MemorySection = MemorySection()
    evaluation: EvaluationSection = EvaluationSection()
    device: DeviceSection = DeviceSection()
    tracking: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Where the numbers of `metrics.jsonl` go besides, as `[tensorboard]`; each library has to be installed. A failing one stops no run."""
    folder: str | None = None
    """The run folder; `runs/` and the recipe file's name when left out."""
    overwrite: bool = False
    """Delete an existing run folder first; without it an existing one is refused."""

    @property
    def row_length(self) -> int:
        """The most tokens in a row: those of an example, or of the two sides of a pair."""
        return self.data.max_length * (1 + self.objective.pairs)

    @field_validator("method", mode="before")
    @classmethod
    def _lora_by_default(cls, value: object) -> object:
        return named(value)

    @field_validator("objective", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @property
    def trains_every_weight(self) -> bool:
        """Whether it is full fine-tuning, where no weight stays as it is."""
        return any(part.name == "full" for part in parts_of(self.method))

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels of a classifier, once they are known."""
        return labels_of(self.method)

    @model_validator(mode="after")
    def _a_head_has_its_objective(self) -> Self:
        names = [part.name for part in parts_of(self.method)]
        if self.classes and not self.objective.classifies:
            raise ValueError(
                f"has a method with labels, those of a classifier's head, and objective.name={self.objective.name}; expected "
                "objective.name=classification"
            )
        if not self.objective.classifies:
            return self
        if names not in (["lora"], ["dora"], ["adalora"]) and not self.classes:
            raise ValueError(
                f"has objective.name=classification and the method {' and '.join(names)}; expected lora, dora or adalora alone, to "
                "which the head is added. Other classifiers, and regression, are left to the API: qlora.apply_method on a transformers "
                "model"
            )
        if self.evaluation.tasks:
            raise ValueError(
                "has objective.name=classification and evaluation.tasks, which ask a language model; expected none, a classifier is "
                "measured on what is held out"
            )
        targets = [getattr(part, "target_modules", ()) for part in parts_of(self.method)]
        if any("lm_head" in names for names in targets if isinstance(names, tuple)):
            raise ValueError("has lm_head in method.target_modules; expected none, a classifier does not use it")
        if self.data.form != "auto" or self.data.train_on != "auto" or self.data.chat_template is not None:
            raise ValueError(
                "has objective.name=classification and data.form, data.train_on or data.chat_template; expected none of them, its "
                "records have a text and a label, read as they are"
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, *overrides: str) -> Recipe:
        """Read a recipe file; each override is ``section.key=value`` with a YAML value, with or without ``--`` before it.

        Raises RecipeError naming every mistake: the key, its place, and the nearest valid key.
        """
        path = Path(path)
        values, lines = read_file(path)
        if values.get("folder") is None:
            values["folder"] = str(Path("runs") / path.stem)
        return cls.from_dict(values, *overrides, source=str(path), lines=lines)

    @classmethod
    def from_dict(
        cls, values: JsonObject, *overrides: str, source: str = "the recipe", lines: Lines | None = None
    ) -> Recipe:
        """Validate plain values. ``lines`` maps a key's path to its line in ``source``, for the messages."""
        return validated(cls, values, overrides, source, lines or {})

    def to_yaml(self) -> str:
        """The recipe as YAML, every value written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def __repr__(self) -> str:
        data, training = self.data, self.training
        out = data.held_out or (f"{data.held_out_fraction:.2%}" if data.held_out_fraction else "nothing")
        length = counted(training.epochs, "epoch") if training.steps is None else counted(training.steps, "step")
        methods = " + ".join(part.in_short() for part in parts_of(self.method))
        return (
            f"Recipe({self.model.name} in {self.model.quantization}, {methods},\n"
            f"       {', '.join(data.sources)} ({out} held out), {length} of {training.batch_size} rows a step, folder {self.folder})"
        )

    __str__ = __repr__
