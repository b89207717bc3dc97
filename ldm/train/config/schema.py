"""The sections of a config that training reads, validated by pydantic.

Values may be written as is usual in YAML: `1.0e+6` for an integer, `off` for 0, a single name for a
list. `validate_section` reports an error in one line:

    lightning.callbacks.max_images: `-3` should be greater than or equal to 0
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

from ldm.data.transforms import CROP_POSITIONS
from ldm.diffusion.names import LEGACY, SCHEDULERS
from ldm.diffusion.samplers import SAMPLERS
from ldm.nets.attention import BACKENDS
from ldm.runtime.errors import make_unknown_name_error
from ldm.runtime.types import JsonObject
from ldm.train.tasks.adaptation import TARGET_PATTERNS
from ldm.train.tasks.criterion import WEIGHTINGS
from ldm.train.tasks.diffusion import LEGACY_TRAINING

__all__ = [
    "OPTIMIZER_OPTIONS", "AutoencoderObjective", "CallbackOptions", "ClassImageOptions",
    "CriterionOptions", "DataOptions", "DiffusionObjective", "EmojiOptions", "EvaluationOptions",
    "FolderOptions", "HubOptions", "LatentCacheOptions", "LightningTrainerArguments",
    "LoaderOptions", "LoraOptions", "ModelConfig", "ModelParams", "OptimizerOptions",
    "PhotoOptions", "TextCacheOptions", "TextualInversionOptions", "TrainerOptions",
    "WebDatasetOptions", "list_keys", "parse_duration", "validate_section",
]  # fmt: skip

T = TypeVar("T")

UNKNOWN_KEY = "extra_forbidden"  # pydantic's error type
# Our messages by pydantic's error type, instead of its own, which name Python types.
MESSAGES = {
    **dict.fromkeys(("dict_type", "model_type"), "should be a mapping of keys"),
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "path_type": "should be a path",
    "tuple_type": "should be a list",
    **dict.fromkeys(("missing", "too_short"), "has too few values"),
    "too_long": "has too many values",
    "string_pattern_mismatch": "should not be empty",
}

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
ALLOW_EXTRA = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def parse_duration(value: object) -> float:
    """Return seconds from "DD:HH:MM:SS", its last fields ("MM:SS"), or {hours: 2, …}.

    Raises:
        ValueError: The value has another form.
    """
    fields = str(0 if value is False else value).split(":")  # false: `off`
    try:
        if isinstance(value, dict):
            return timedelta(**value).total_seconds()
        units = (1, 60, 3600, 86400)[: len(fields)]
        return sum(float(f) * unit for f, unit in zip(reversed(fields), units, strict=True))
    except (TypeError, ValueError):
        raise ValueError("should be a time (DD:HH:MM:SS or seconds)") from None


def _convert_integral(value: object) -> object:
    """Convert `1.0e+6` and `off` to integers; return other values unchanged."""
    if value is False or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return value


def _check_integral_or_inf(value: float) -> float:
    """Return a whole number as int, infinity unchanged; raise for others."""
    if value.is_integer():
        return int(value)
    if value != float("inf"):
        raise ValueError("should be a whole number")
    return value


def _normalize_strategy(value: object) -> str:
    """Return `ddp` for a class …DDPStrategy or a name such as ddp_find_unused_parameters_false."""
    name = value.get("target") if isinstance(value, Mapping) else value
    short = str(name).rpartition(".")[2].lower().removesuffix("strategy").partition("_")[0]
    return short or "auto"


def _one_of(names: Collection[str]) -> AfterValidator:
    """Return a validator that allows only these names."""

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"should be one of {', '.join(names)}")
        return value

    return AfterValidator(check)


PRECISION_ALIASES = {"32-true": "32", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's
NORMALIZE_PRECISION = BeforeValidator(lambda value: PRECISION_ALIASES.get(str(value), str(value)))
OFF_AS_ZERO = BeforeValidator(lambda value: 0 if value is False else value)
TO_INTEGER = BeforeValidator(_convert_integral)
BOOL_TO_INTEGER = BeforeValidator(lambda value: int(value) if isinstance(value, bool) else value)
TO_LIST = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
TO_TUPLE = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)

Bool = Annotated[bool, BeforeValidator(lambda v: bool(v) if v is None or v in (0, 1) else v)]
PositiveInt = Annotated[int, Field(ge=1), TO_INTEGER]
Number = Annotated[float, OFF_AS_ZERO]
Nonnegative = Annotated[float, Field(ge=0), OFF_AS_ZERO]
Positive = Annotated[float, Field(gt=0), OFF_AS_ZERO]
Probability = Annotated[float, Field(ge=0, le=1), OFF_AS_ZERO]
NonnegativeBelowOne = Annotated[float, Field(ge=0, lt=1), OFF_AS_ZERO]
NonEmptyStr = Annotated[str, Field(pattern=r"\S")]
ExpandedPath = Annotated[Path, Field(strict=False), AfterValidator(Path.expanduser)]
NonnegativeOrInf = Annotated[float, Field(ge=0, allow_inf_nan=True), OFF_AS_ZERO]
PositiveIntOrInf = Annotated[
    float, Field(ge=1, allow_inf_nan=True), OFF_AS_ZERO, AfterValidator(_check_integral_or_inf)
]
# As an interval, 0 or infinity means never.
StepCount = Annotated[NonnegativeOrInf, AfterValidator(_check_integral_or_inf)]


# Lightning's, with the strategies of its version 1; only cpu, gpu and cuda have an effect.
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "dp", "ddp", "ddp2", "ddp_spawn")


class Section(BaseModel):
    """Base of the frozen sections, which reject unknown keys."""

    model_config = STRICT


class TrainerOptions(Section):
    """Length of a run, precision, parallelism and memory."""

    # The run ends after this many steps, epochs, or seconds of training (including those before it
    # was resumed), whichever comes first; null: no limit.
    max_steps: StepCount | None = None
    max_epochs: Positive | None = None
    max_time: Annotated[Nonnegative, BeforeValidator(parse_duration)] | None = None
    # maximum norm of the gradients; null or 0: no gradient clipping
    gradient_clip_val: Annotated[NonnegativeOrInf | None, BeforeValidator(lambda v: v or None)] = (
        1.0
    )
    accumulate_grad_batches: PositiveInt = 1
    scale_lr: Bool = False  # lr = accumulate_grad_batches x ranks x batch_size x base_learning_rate
    precision: Annotated[Literal["32", "bf16-mixed", "16-mixed"], NORMALIZE_PRECISION] = "32"
    strategy: Annotated[
        Literal["auto", "ddp", "fsdp", "hsdp"], BeforeValidator(_normalize_strategy)
    ] = "auto"
    shard_size: PositiveInt | None = None  # ranks that share one copy of the weights; for hsdp only
    attention: Annotated[str, _one_of(["auto", *BACKENDS])] | None = None  # see nets.attention
    seed: Annotated[int, Field(ge=-(10**12), le=10**12), TO_INTEGER] = (
        23  # within these bounds `ldm.data.source.derive_seed` fits 64 bits
    )
    benchmark: Bool = False  # torch.backends.cudnn.benchmark
    compile: Bool = False  # torch.compile of the UNet, or of the autoencoder
    channels_last: Bool = False
    gradient_checkpointing: Bool | None = None  # null: the model's `use_checkpoint`
    ema_device: Literal["cpu"] | None = None  # null: the device of the weights
    keep_states: PositiveInt = 2  # number of newest resume states to keep
    nan_limit: PositiveIntOrInf = 10  # number of consecutive non-finite steps that ends the run
    max_unreadable_fraction: Probability = 0.01  # of the samples; above, the run ends
    timeout: Positive = 45  # seconds without a heartbeat after which a rank counts as lost
    check_initial_loss: Bool = True  # of a fine-tune


class OptimizerOptions(Section):
    """Optimizer, learning rate schedule and EMA; `options` are keywords of the optimizer."""

    name: Literal["adamw", "adamw8bit", "adafactor", "muon"] = "adamw"
    lr_warmup_steps: Nonnegative = 100
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    scheduler_config: JsonObject | None = None  # the original's, replaces the two above
    ema_decay: NonnegativeBelowOne = 0.9999  # 0: no EMA
    options: JsonObject = {}


@with_config(STRICT)
class AdamOptions(TypedDict, total=False):
    """Keywords of AdamW, in 32 or 8 bits."""

    betas: Annotated[tuple[NonnegativeBelowOne, NonnegativeBelowOne], TO_TUPLE]
    eps: Nonnegative
    weight_decay: Nonnegative


@with_config(STRICT)
class AdafactorOptions(TypedDict, total=False):
    """Keywords of Adafactor."""

    beta2_decay: Annotated[float, Field(le=0), OFF_AS_ZERO]
    eps: Annotated[tuple[Nonnegative | None, Nonnegative], TO_TUPLE]
    d: Annotated[float, Field(ge=1), OFF_AS_ZERO]
    weight_decay: Nonnegative


@with_config(STRICT)
class MuonOptions(TypedDict, total=False):
    """Keywords of Muon."""

    momentum: NonnegativeBelowOne
    betas: Annotated[tuple[NonnegativeBelowOne, NonnegativeBelowOne], TO_TUPLE]
    weight_decay: Nonnegative


OPTIMIZER_OPTIONS: dict[str, type] = {
    "adamw": AdamOptions,
    "adamw8bit": AdamOptions,
    "adafactor": AdafactorOptions,
    "muon": MuonOptions,
}


@with_config(STRICT)
class GridSamplingOptions(TypedDict, total=False):
    """Sampling options of the image grids."""

    steps: PositiveInt
    scale: Number
    eta: Nonnegative
    s_churn: Nonnegative
    s_tmin: Nonnegative
    s_tmax: Nonnegative
    s_noise: Nonnegative
    brownian: bool
    sampler: Annotated[str, _one_of(SAMPLERS)]
    scheduler: Annotated[str, _one_of(SCHEDULERS)] | None
    rho: Positive
    guidance_rescale: Probability
    unet_tile: PositiveInt | None
    legacy: Annotated[list[Annotated[str, _one_of(LEGACY)]], TO_LIST]


class EvaluationOptions(Section):
    """Metrics of images that are generated with the EMA weights; see docs/evaluation.md."""

    every_n_steps: StepCount
    prompts: NonEmptyStr  # a file, as for `ldm evaluate`
    count: PositiveInt | None = None  # number of prompts, drawn at random; null: all
    # guidance scales
    scales: Annotated[list[Number], TO_LIST] = [3.0]
    reference: NonEmptyStr | None = None  # folder of real images
    inception: NonEmptyStr | None = None  # file; null: `fid-inception`, if it is on this machine
    resize: Literal["clean", "pytorch-fid"] = "clean"
    clip: NonEmptyStr | None = None  # file; null: `open-clip-g`, if it is on this machine


class CallbackOptions(Section):
    """What a run logs, saves, samples, validates and exports, and how often."""

    log_steps: PositiveIntOrInf = 20  # interval of log lines
    loggers: Annotated[list[Literal["csv", "tensorboard", "wandb"]], TO_LIST] = [
        "csv",
        "tensorboard",
    ]
    wandb: JsonObject = {}  # project, name, entity, tags, mode
    save_minutes: NonnegativeOrInf | None = 3
    save_steps: StepCount | None = None
    save_epochs: Positive | None = None
    image_minutes: NonnegativeOrInf | None = 10
    image_steps: StepCount | None = None
    image_early: Bool = False  # also at steps 1, 2, 4, 8 …
    max_images: Annotated[int, Field(ge=0), TO_INTEGER] = 16
    # prompts of the image grids; null: the first captions of the data
    prompts: Annotated[list[str], TO_LIST] | None = None
    sampling: GridSamplingOptions = {}
    validate_steps: StepCount | None = None
    validate_epochs: Positive | None = None
    validate_batches: PositiveInt = 8
    # number of exports with the lowest validation loss to keep; -1: all
    save_top_k: Annotated[int, Field(ge=-1), TO_INTEGER] = 0
    # validation loss; null: val/loss_ema, or val/loss without EMA
    monitor: NonEmptyStr | None = None
    evaluation: EvaluationOptions | None = None
    export: Annotated[list[Literal["safetensors", "ckpt"]], TO_LIST] = ["safetensors"]
    # interval of checkpoints/trainstep_checkpoints/*, all kept
    export_steps: StepCount | None = None
    export_weights: Literal["ema", "raw", "both"] = "ema"
    export_dtype: Literal["half", "full"] = "half"


class CriterionOptions(TypedDict, total=False):
    """Loss options that the original reads from `model.params`; most are keywords of Criterion."""

    loss_type: Literal["l2", "l1"]
    l_simple_weight: Nonnegative
    original_elbo_weight: Nonnegative
    learn_logvar: Bool
    logvar_init: Number
    scale_by_std: Bool
    disable_first_stage_autocast: Bool


@with_config(STRICT)
class LogNormalOptions(TypedDict, total=False):
    """Keywords of `LogNormal`: mean and standard deviation of ln sigma."""

    mean: float
    std: Positive


@with_config(STRICT)
class DiffusionObjective(CriterionOptions, total=False):
    """`lightning.objective` of a latent diffusion model: keywords of `DiffusionTask`."""

    # for the caption, or by batch key; null: each encoder's `ucg_rate`
    conditioning_dropout_prob: Probability | dict[str, Probability] | None
    prior_loss_weight: Nonnegative
    weighting: Annotated[str, _one_of(WEIGHTINGS)] | None
    sigma_data: Positive
    noise_levels: LogNormalOptions | None
    timestep_range: Annotated[tuple[int, int], TO_TUPLE] | None
    timestep_bias: Positive
    noise_offset: Nonnegative
    noise_offset_by: Literal["channel", "sample"]
    input_perturbation: Nonnegative
    legacy: Annotated[list[Annotated[str, _one_of(LEGACY_TRAINING)]], TO_LIST]
    min_snr_gamma: Annotated[float, Field(gt=0, allow_inf_nan=True), OFF_AS_ZERO] | None


@with_config(STRICT)
class AutoencoderObjective(TypedDict, total=False):
    """`lightning.objective` of an autoencoder: arguments of the tasks in `tasks.autoencoder`."""

    l1_weight: Nonnegative
    l2_weight: Nonnegative
    image_gradient_weight: Nonnegative
    kl_weight: Nonnegative
    codebook_weight: Nonnegative
    top_errors_weight: Nonnegative
    outlier_weight: Nonnegative
    trainable_part: Literal["all", "decoder"]
    learn_logvar: Bool
    export_losses: Bool
    perceptual: JsonObject | None


class LoraOptions(Section):
    """A LoRA to train for a frozen model."""

    rank: PositiveInt = 8
    alpha: Positive | None = None  # null: the rank
    targets: Annotated[
        list[Annotated[str, _one_of(TARGET_PATTERNS)]], Field(min_length=1), TO_LIST
    ] = ["transformer"]


class TextualInversionOptions(Section):
    """A token embedding to train for a frozen model."""

    token: NonEmptyStr
    num_vectors: PositiveInt = 1
    # words whose embeddings are the initial vectors; null: the mean of all tokens
    initializer_words: NonEmptyStr | None = None


class UcgTrainingOptions(BaseModel):
    """An entry of the original's `ucg_training`: probability of dropping a condition.

    `val`, which replaces the condition, can only be the empty text.
    """

    model_config = ALLOW_EXTRA
    p: Probability
    val: Literal[""] | None = None


@with_config(ALLOW_EXTRA)
class ModelParams(CriterionOptions, total=False):
    """Training options that the original reads from `model.params`."""

    embedding_dropout: Probability
    ucg_training: dict[str, UcgTrainingOptions]
    use_ema: Bool
    scheduler_config: JsonObject
    # The original's other values are not supported.
    num_timesteps_cond: Literal[1]
    unet_trainable: Literal["all", True]


AUTOENCODER_CLASSES = ("AutoencoderKL", "AutoencoderVQ", "VQModel", "VQModelInterface")


class ModelConfig(Section):
    """`model:` of a config."""

    base_learning_rate: Nonnegative | None = None
    target: str = ""
    params: JsonObject = {}

    @property
    def is_autoencoder(self) -> bool:
        return self.target.rpartition(".")[2] in AUTOENCODER_CLASSES


class LoaderOptions(BaseModel):
    """The keys of `data.params` that apply without a dataset, too."""

    model_config = ALLOW_EXTRA
    batch_size: PositiveInt = 1
    num_workers: Annotated[int, Field(ge=0), TO_INTEGER] = 0


class LatentCacheOptions(Section):
    """Latents of images, encoded once before training."""

    cache_dir: ExpandedPath
    # null: all named variants of the transform, 1 if it has none
    variants_per_image: PositiveInt | None = None
    batch_size: PositiveInt = 32  # images encoded at once
    precision: Annotated[Literal["16", "32"], BeforeValidator(str)] = "16"


class TextCacheOptions(Section):
    """Contexts (text embeddings) of captions, encoded once before training."""

    cache_dir: ExpandedPath
    batch_size: PositiveInt = 64  # captions encoded at once


@with_config(STRICT)
class BucketOptions(TypedDict, total=False):
    """`buckets` of the transform `photo`: keywords of `Buckets`."""

    step: PositiveInt
    shortest: PositiveInt | None
    longest: PositiveInt | None


@with_config(STRICT)
class TagOptions(TypedDict, total=False):
    """`tags` of the transform `photo`: keywords of `TagShuffle`."""

    shuffle: Bool
    drop: Probability
    keep: Annotated[int, Field(ge=0), TO_INTEGER]


@with_config(STRICT)
class PhotoOptions(TypedDict, total=False):
    """`transform: {name: photo}`: keywords of `PhotoTransform`."""

    name: str
    size: PositiveInt
    crop: Annotated[str, _one_of(CROP_POSITIONS)]
    flip: Probability
    buckets: BucketOptions
    tags: TagOptions
    conditions: dict[str, JsonObject | None]
    original_size_keys: Annotated[list[str], Field(min_length=2, max_length=2)]


@with_config(STRICT)
class EmojiOptions(TypedDict, total=False):
    """`transform: {name: emoji}`: keywords of `EmojiTransform`."""

    name: str
    size: PositiveInt
    scale: Annotated[tuple[Positive, Positive], TO_TUPLE]
    shift: Annotated[int, Field(ge=0), TO_INTEGER]
    flip: Probability
    crop: PositiveInt
    random_color_probability: Probability
    drop: Probability
    drop_object: Probability
    keyword_probability: Probability
    conditions: dict[str, JsonObject | None]


@with_config(STRICT)
class FolderOptions(TypedDict, total=False):
    """`train` or `validation` with `root`: keywords of `ImageFolder`."""

    root: Annotated[NonEmptyStr, BeforeValidator(lambda v: str(v) if isinstance(v, Path) else v)]
    transform: JsonObject
    split: str
    where: JsonObject
    fields: JsonObject
    text: str
    metadata: NonEmptyStr
    class_folders: Bool


@with_config(STRICT)
class HubOptions(TypedDict, total=False):
    """`train` or `validation` with `hub`: keywords of `HubDataset`."""

    hub: NonEmptyStr
    transform: JsonObject
    name: str
    split: str
    image: str
    text: str
    fields: JsonObject
    cache_dir: str


@with_config(STRICT)
class WebDatasetOptions(TypedDict, total=False):
    """`train` or `validation` with `shards`: keywords of `Shards`."""

    shards: Annotated[list[str], TO_LIST]
    transform: JsonObject
    streams: PositiveInt
    shuffle: Annotated[int, Field(ge=0), TO_INTEGER]
    minimum: dict[str, Number]
    maximum: dict[str, Number]
    length: PositiveInt


class ClassImageOptions(Section):
    """Class images of DreamBooth; missing ones are sampled from the model before training."""

    root: ExpandedPath
    prompt: NonEmptyStr
    count: PositiveInt
    transform: JsonObject


class DataOptions(LoaderOptions):
    """`data.params`; `train`, `validation`: FolderOptions, HubOptions or WebDatasetOptions."""

    model_config = STRICT
    batch_size: PositiveInt
    train: JsonObject
    validation: JsonObject | None = None
    latents: LatentCacheOptions | None = None
    texts: TextCacheOptions | None = None
    prior: ClassImageOptions | None = None


@with_config(ALLOW_EXTRA)
class LightningTrainerArguments(TypedDict, total=False):
    """Arguments of Lightning's Trainer that are translated to ours."""

    accelerator: Annotated[str, _one_of(ACCELERATORS)]
    gpus: object
    devices: object
    num_nodes: PositiveInt
    val_check_interval: Positive
    check_val_every_n_epoch: Positive
    limit_val_batches: Nonnegative
    log_every_n_steps: PositiveIntOrInf
    terminate_on_nan: Bool
    fast_dev_run: Annotated[int, Field(ge=0), BOOL_TO_INTEGER]  # batches; true is 1
    gradient_clip_algorithm: Literal["norm"]


def list_keys(section: type) -> list[str]:
    """Return the keys of a section."""
    if issubclass(section, BaseModel):
        return list(section.model_fields)
    return list(get_type_hints(section))


def validate_section(
    section: type[T],
    values: object,
    where: str,
    *,
    kind: str = "key",
    suggested_keys: Collection[str] = (),
) -> T:
    """Validate the values of a section.

    Args:
        where: Dotted name of the section, for messages.
        kind: What a key is called in messages.
        suggested_keys: More keys that messages may suggest instead of an unknown one.
    Raises:
        ValueError: A key is unknown or a value is not allowed; the message, one line, is about the
            first such key.
    """
    try:
        return TypeAdapter(section).validate_python(values)
    except ValidationError as error:
        # Of the errors of a union, prefer those about values to those about types, and inner ones.
        problem = min(
            error.errors(),
            key=lambda p: (p["type"] != UNKNOWN_KEY, p["type"].endswith("_type"), -len(p["loc"])),
        )
    names = [str(name) for name in problem["loc"] if str(name).isidentifier()]
    if problem["type"] == UNKNOWN_KEY:
        parent = section
        for name in names[:-1]:
            type_hint = get_type_hints(parent)[name]
            parent = next(iter(get_args(type_hint)), type_hint)  # X of `X | None`
        section_name = ".".join([where, *names[:-1]])
        known = [*list_keys(parent), *(suggested_keys if parent is section else ())]
        raise make_unknown_name_error(kind, names[-1], known, section_name)
    if problem["type"] == "missing" and problem["loc"][-1] == names[-1]:
        raise ValueError(f"{'.'.join([where, *names[:-1]])} needs `{names[-1]}`")
    message = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    message = MESSAGES.get(problem["type"], message)
    if len(names) == 1 and type(None) in get_args(get_type_hints(section)[names[0]]):
        message += " or null"
    raise ValueError(f"{'.'.join([where, *names])}: `{problem['input']}` {message}")
