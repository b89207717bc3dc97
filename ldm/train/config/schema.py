"""The sections of a config that a run reads, as frozen pydantic models.

A value is read as it stands in YAML: `1.0e+6` is a whole number, `off` is 0, one name is a list of
it. `validate` says in one line what is wrong with it:

    lightning.callbacks.images: `-3` should be greater than or equal to 0
"""

from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict

from ldm.diffusion.names import LEGACY, SCHEDULERS
from ldm.diffusion.samplers import SAMPLERS
from ldm.nets.attention import BACKENDS
from ldm.runtime.errors import unknown_name
from ldm.runtime.types import JsonObject
from ldm.train.tasks.adaptation import TARGETS
from ldm.train.tasks.criterion import WEIGHTINGS
from ldm.train.tasks.diffusion import QUIRKS

__all__ = [
    "OPTIONS",
    "Batches",
    "CachedLatents",
    "CachedTexts",
    "Callbacks",
    "ClassImages",
    "Data",
    "Denoising",
    "Evaluation",
    "LightningTrainer",
    "Lora",
    "Model",
    "ModelParams",
    "Optimizer",
    "Reconstruction",
    "TextualInversion",
    "Trainer",
    "Weighting",
    "fields_of",
    "parse_duration",
    "validate",
]

T = TypeVar("T")

EXTRA = "extra_forbidden"
# Our texts for pydantic's errors that speak of types which YAML names differently.
EXPECTATIONS = {
    **dict.fromkeys(("dict_type", "model_type"), "should be a mapping of keys"),
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "string_pattern_mismatch": "should not be empty",
}

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
OPEN = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)  # others read the other keys


def parse_duration(value: object) -> float:
    """Return the seconds of "DD:HH:MM:SS" or a part of it from the right, or of {hours: 2, …}.

    Raises:
        ValueError: it is anything else.
    """
    parts = str(0 if value is False else value).split(":")
    try:
        if isinstance(value, dict):
            return timedelta(**value).total_seconds()
        units = (1, 60, 3600, 86400)[: len(parts)]
        return sum(float(p) * unit for p, unit in zip(reversed(parts), units, strict=True))
    except (TypeError, ValueError):
        raise ValueError("should be a time (DD:HH:MM:SS or seconds)") from None


def _read_whole(value: object) -> object:
    """`1.0e+6` and `off` as integers."""
    if value is False or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return value


def _check_whole(value: float) -> float:
    """Return an integer, or infinity."""
    if value.is_integer():
        return int(value)
    if value != float("inf"):
        raise ValueError("should be a whole number")
    return value


def _short_strategy(value: object) -> str:
    """`ddp` of a class …DDPStrategy or a name such as ddp_find_unused_parameters_false."""
    name = value.get("target") if isinstance(value, Mapping) else value
    short = str(name).rpartition(".")[2].lower().removesuffix("strategy").partition("_")[0]
    return short or "auto"


def _one_of(names: Collection[str]) -> AfterValidator:
    """Allow only these names."""

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"should be one of {', '.join(names)}")
        return value

    return AfterValidator(check)


PRECISIONS = {"32-true": "32", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's other names
PRECISION = BeforeValidator(lambda value: PRECISIONS.get(str(value), str(value)))
OFF = BeforeValidator(lambda value: 0 if value is False else value)
WHOLE = BeforeValidator(_read_whole)
SINGLE = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
PAIR = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)

Bool = Annotated[bool, BeforeValidator(lambda v: bool(v) if v is None or v in (0, 1) else v)]
Count = Annotated[int, Field(ge=1), WHOLE]
Number = Annotated[float, OFF]
Nonnegative = Annotated[float, Field(ge=0), OFF]
Positive = Annotated[float, Field(gt=0), OFF]
Probability = Annotated[float, Field(ge=0, le=1), OFF]
BelowOne = Annotated[float, Field(ge=0, lt=1), OFF]
Text = Annotated[str, Field(pattern=r"\S")]
Folder = Annotated[Path, Field(strict=False), AfterValidator(Path.expanduser)]
# Limits, which may be infinite; where 0 is allowed it means never.
Limit = Annotated[float, Field(ge=0, allow_inf_nan=True), OFF]
CountLimit = Annotated[float, Field(ge=1, allow_inf_nan=True), OFF, AfterValidator(_check_whole)]
Steps = Annotated[Limit, AfterValidator(_check_whole)]


class Section(BaseModel):
    """A section of `lightning:`, every key filled in."""

    model_config = STRICT


class Trainer(Section):
    """How long, how and on what a run trains."""

    max_steps: Steps | None = None  # the run ends after so many steps …
    max_epochs: Positive | None = None  # … or so many passes over the data …
    # … or so many seconds over all sessions, whichever comes first
    max_time: Annotated[Nonnegative, BeforeValidator(parse_duration)] | None = None
    # largest norm of the gradients; null or 0: any
    gradient_clip_val: Annotated[Limit | None, BeforeValidator(lambda v: v or None)] = 1.0
    accumulate_grad_batches: Count = 1
    scale_lr: Bool = False  # learning rate = accumulate x ranks x batch x base_learning_rate
    precision: Annotated[Literal["32", "bf16-mixed", "16-mixed"], PRECISION] = "32"
    strategy: Annotated[
        Literal["auto", "ddp", "fsdp", "hsdp"], BeforeValidator(_short_strategy)
    ] = "auto"
    shard: Count | None = None  # ranks that share one copy of the weights in hsdp
    attention: Annotated[str, _one_of(["auto", *BACKENDS])] | None = None  # see nets.attention
    seed: Annotated[int, Field(ge=-(10**12), le=10**12), WHOLE] = 23  # torch's end at 64 bits
    benchmark: Bool = False  # cuDNN tries its algorithms
    compile: Bool = False
    channels_last: Bool = False
    checkpoint_gradients: Bool | None = None  # null: as `use_checkpoint` in the model's config
    ema_device: Literal["cpu"] | None = None  # null: with the weights
    keep: Count = 2  # states to resume from
    nan_limit: CountLimit = 10  # losses in a row that are not finite end the run
    broken_share: Probability = 0.01  # fraction of unreadable files that ends the run
    timeout: Positive = 45  # seconds of silence after which a rank counts as lost
    sanity: Bool = True  # check the loss of the initial model before step 1


class Optimizer(Section):
    """The optimizer and its learning rate; `options` are the keywords of the optimizer itself."""

    name: Literal["adamw", "adamw8bit", "adafactor", "muon"] = "adamw"
    warm_up: Nonnegative = 100
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    schedule: JsonObject | None = None  # a `scheduler_config` of the original
    ema_decay: BelowOne = 0.9999
    options: JsonObject = {}


@with_config(STRICT)
class AdamOptions(TypedDict, total=False):
    """Keywords of AdamW, in 32 or 8 bits."""

    betas: Annotated[tuple[BelowOne, BelowOne], PAIR]
    eps: Nonnegative
    weight_decay: Nonnegative


@with_config(STRICT)
class AdafactorOptions(TypedDict, total=False):
    """Keywords of Adafactor."""

    beta2_decay: Annotated[float, Field(le=0), OFF]
    eps: Annotated[tuple[Nonnegative | None, Nonnegative], PAIR]
    d: Annotated[float, Field(ge=1), OFF]
    weight_decay: Nonnegative


@with_config(STRICT)
class MuonOptions(TypedDict, total=False):
    """Keywords of Muon."""

    momentum: BelowOne
    betas: Annotated[tuple[BelowOne, BelowOne], PAIR]
    weight_decay: Nonnegative


OPTIONS: dict[str, type] = {
    "adamw": AdamOptions,
    "adamw8bit": AdamOptions,
    "adafactor": AdafactorOptions,
    "muon": MuonOptions,
}


@with_config(STRICT)
class Sampling(TypedDict, total=False):
    """Keywords of the sampling of image grids."""

    steps: Count
    scale: Number
    eta: Nonnegative
    s_churn: Nonnegative
    s_tmin: Nonnegative
    s_tmax: Nonnegative
    s_noise: Nonnegative
    sampler: Annotated[str, _one_of(SAMPLERS)]
    scheduler: Annotated[str, _one_of(SCHEDULERS)] | None
    grid: Annotated[str, _one_of(SCHEDULERS)] | None  # former name of scheduler
    rescale: Probability
    unet_tile: Count | None
    legacy: Annotated[list[Annotated[str, _one_of(LEGACY)]], SINGLE]


class Evaluation(Section):
    """Scores of images of many prompts, of the averaged weights; see docs/evaluation.md."""

    steps: Steps  # between evaluations
    prompts: Text  # a file, as for `ldm evaluate`
    count: Count | None = None  # prompts, drawn at random; null: all
    scales: Annotated[list[Number], SINGLE] = [3.0]
    reference: Text | None = None  # folder of real images
    inception: Text | None = None  # a file; null: `fid-inception`, if it is on this machine
    resize: Literal["clean", "pytorch-fid"] = "clean"
    clip: Text | None = None  # a file; null: `open-clip-g`, if it is on this machine


class Callbacks(Section):
    """What a run logs, saves, draws, validates and exports, and how often."""

    log_every: CountLimit = 20  # steps between lines of the log
    loggers: Annotated[list[Literal["csv", "tensorboard", "wandb"]], SINGLE] = [
        "csv",
        "tensorboard",
    ]
    wandb: JsonObject = {}  # project, name, entity, tags, mode
    save_minutes: Limit | None = 3
    save_steps: Steps | None = None
    save_epochs: Positive | None = None
    image_minutes: Limit | None = 10
    image_steps: Steps | None = None
    image_early: Bool = False  # also at steps 1, 2, 4, 8 …
    images: Annotated[int, Field(ge=0), WHOLE] = 16
    # of the grids; null: the first captions of the data
    prompts: Annotated[list[str], SINGLE] | None = None
    sampling: Sampling = {}
    validate_steps: Steps | None = None
    validate_epochs: Positive | None = None
    validate_batches: Count = 8
    # exports that stay, those with the lowest loss on held-out data; -1: all
    best: Annotated[int, Field(ge=-1), WHOLE] = 0
    monitor: Text | None = None  # that loss; null: val/loss_ema, or val/loss without EMA
    evaluation: Evaluation | None = None
    export: Annotated[list[Literal["safetensors", "ckpt"]], SINGLE] = ["safetensors"]
    export_steps: Steps | None = None  # also to checkpoints/trainstep_checkpoints, all are kept
    weights: Literal["ema", "raw", "both"] = "ema"
    dtype: Literal["half", "full"] = "half"  # of exports


class Weighting(TypedDict, total=False):
    """Keywords of `Criterion`, which the original has among the parameters of the model."""

    loss_type: Literal["l2", "l1"]
    l_simple_weight: Nonnegative
    original_elbo_weight: Nonnegative
    learn_logvar: Bool
    logvar_init: Number
    scale_by_std: Bool
    disable_first_stage_autocast: Bool


@with_config(STRICT)
class NoiseLevels(TypedDict, total=False):
    """Keywords of `LogNormal`."""

    mean: float
    std: Positive


@with_config(STRICT)
class Denoising(Weighting, total=False):
    """`lightning.objective` of a latent diffusion model: keywords of its task."""

    drop: Probability | dict[str, Probability] | None  # null: the `ucg_rate` of each encoder
    prior_weight: Nonnegative
    weighting: Annotated[str, _one_of(WEIGHTINGS)] | None
    sigma_data: Positive
    noise_levels: NoiseLevels | None
    timesteps: Annotated[tuple[int, int], PAIR] | None
    noise_bias: Positive
    offset_noise: Nonnegative
    offset_noise_by: Literal["channel", "sample"]
    input_perturbation: Nonnegative
    legacy: Annotated[list[Annotated[str, _one_of(QUIRKS)]], SINGLE]
    min_snr_gamma: Annotated[float, Field(gt=0, allow_inf_nan=True), OFF] | None


@with_config(STRICT)
class Reconstruction(TypedDict, total=False):
    """`lightning.objective` of an autoencoder: keywords of its tasks."""

    l1: Nonnegative
    l2: Nonnegative
    gradient: Nonnegative
    kl: Nonnegative
    peak: Nonnegative
    outlier: Nonnegative
    trained: Literal["all", "decoder"]
    learn_logvar: Bool
    export_losses: Bool
    perceptual: JsonObject | None


class Lora(Section):
    """A LoRA that is trained beside a frozen model."""

    rank: Count = 8
    alpha: Positive | None = None  # null: the rank
    targets: Annotated[list[Annotated[str, _one_of(TARGETS)]], SINGLE] = ["transformer"]


class TextualInversion(Section):
    """An embedding that is trained beside a frozen model."""

    token: Text
    vectors: Count = 1
    init: Text | None = None  # words whose vectors it starts from; null: the mean of all words


class Dropout(BaseModel):
    """How often the original's `ucg_training` drops a condition."""

    model_config = OPEN
    p: Probability


@with_config(OPEN)
class ModelParams(Weighting, total=False):
    """What the original decides about training among the parameters of a model."""

    embedding_dropout: Probability
    ucg_training: dict[str, Dropout]
    use_ema: Bool
    scheduler_config: JsonObject


class Model(Section):
    """`model:` of a config."""

    base_learning_rate: Nonnegative | None = None
    target: str = ""
    params: JsonObject = {}


class Batches(BaseModel):
    """The numbers of `data.params`, which a config without data has as well."""

    model_config = OPEN
    batch_size: Count = 1
    num_workers: Annotated[int, Field(ge=0), WHOLE] = 0


class CachedLatents(Section):
    """Latents of images, encoded once before training."""

    cache: Folder
    variants: Count | None = None  # of each image; null: all named variants of the transform, or 1
    batch: Count = 32  # images encoded at once
    precision: Annotated[Literal["16", "32"], BeforeValidator(str)] = "16"


class CachedTexts(Section):
    """Contexts of captions, encoded once before training."""

    cache: Folder
    batch: Count = 64  # captions encoded at once


class ClassImages(BaseModel):
    """Class images of DreamBooth; other keys as for a folder."""

    model_config = OPEN
    root: Folder
    prompt: Text
    count: Count
    transform: JsonObject


class Data(Batches):
    """`data.params` with our keys; see `open_images` for the keys of `train` and `validation`."""

    model_config = STRICT
    batch_size: Count
    train: JsonObject
    validation: JsonObject | None = None
    latents: CachedLatents | None = None
    texts: CachedTexts | None = None
    prior: ClassImages | None = None


@with_config(OPEN)
class LightningTrainer(TypedDict, total=False):
    """Arguments of Lightning's Trainer that are translated."""

    accelerator: object
    gpus: object
    devices: object
    num_nodes: Count
    val_check_interval: Positive
    check_val_every_n_epoch: Positive
    limit_val_batches: Nonnegative
    log_every_n_steps: CountLimit
    terminate_on_nan: Bool
    fast_dev_run: bool | int
    gradient_clip_algorithm: Literal["norm"]


def fields_of(section: type) -> list[str]:
    """Return the keys of a section."""
    if issubclass(section, BaseModel):
        return list(section.model_fields)
    return list(get_type_hints(section))


def validate(
    section: type[T], values: object, where: str, *, kind: str = "key", also: Collection[str] = ()
) -> T:
    """Read the values of a section.

    Args:
        where: dotted name of the section, for messages.
        kind: what the message calls a key.
        also: keys that the message about an unknown one may propose in addition.
    Raises:
        ValueError: a key is unknown or a value is not allowed; in one line, the first one.
    """
    try:
        return TypeAdapter(section).validate_python(values)
    except ValidationError as error:
        # A number that may also be a mapping has two errors: the one about its type says less.
        problem = min(
            error.errors(), key=lambda p: (p["type"] != EXTRA, p["type"].endswith("_type"))
        )
    names = [str(name) for name in problem["loc"] if str(name).isidentifier()]
    if problem["type"] == EXTRA:
        parent = section
        for name in names[:-1]:
            kind_of_value = get_type_hints(parent)[name]
            parent = next(iter(get_args(kind_of_value)), kind_of_value)  # of `Section | None`
        place = ".".join([where, *names[:-1]])
        raise unknown_name(kind, names[-1], [*fields_of(parent), *also], place)
    if problem["type"] == "missing":
        raise ValueError(f"{'.'.join([where, *names[:-1]])} needs `{names[-1]}`")
    text = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    text = EXPECTATIONS.get(problem["type"], text)
    if len(names) == 1 and type(None) in get_args(get_type_hints(section)[names[0]]):
        text += " or null"
    raise ValueError(f"{'.'.join([where, *names])}: `{problem['input']}` {text}")
