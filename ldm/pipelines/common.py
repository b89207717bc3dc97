"""Parts that tasks share: check the keywords, encode prompts, sample, decode."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import ParamSpec, TypedDict, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ldm.conditioning import AnyCond, Composition, Cond, ScheduledCond
from ldm.diffusion.guidance import Guidance, Scale
from ldm.diffusion.names import SAMPLERS
from ldm.diffusion.samplers.common import Constrain
from ldm.diffusion.step_noise import StepNoise
from ldm.encoders.text import TextEncoder, clip_skip
from ldm.imaging.rgbd import join_depth
from ldm.model import LatentDiffusion
from ldm.nets.circular import circular_padding
from ldm.pipelines.families import check_family, file_name
from ldm.pipelines.guidance import GuidanceOptions, check_guidance, make_guidance
from ldm.pipelines.latent_upscaling import Upscaling, check_sides, double_latent
from ldm.pipelines.prompts import (
    PromptOptions,
    PromptPair,
    StepPrompts,
    TextPair,
    encode_steps,
    has_composition,
    pair_of,
    parse_constant,
    parse_pair,
    warn_about_prompts,
)
from ldm.pipelines.quirks import Noise, Quirks, noise_source
from ldm.pipelines.sampling import (
    Callback,
    SamplingOptions,
    check_sampling,
    default_scale,
    latent_size,
    run_sigmas,
    sample,
)
from ldm.pipelines.sdxl import (
    Handover,
    SDXLOptions,
    Sizes,
    check_sdxl,
    check_size,
    size_conditions,
)
from ldm.prompts import PLAIN, check_syntax
from ldm.runtime.errors import (
    ArgumentError,
    MissingArgument,
    NonFinite,
    Stop,
    unknown_name,
)

__all__ = [
    "GuidedOptions",
    "PromptOptions",
    "TaskOptions",
    "TextOptions",
    "check_clip_skip",
    "decode_latent",
    "encode_image",
    "generate",
    "pipeline",
]


class DecodingOptions(TypedDict, total=False):
    """Keywords of tasks about decoding.

    Attributes:
        on_latent: called with the final latents (B, C, h, w) of the batch before they are decoded,
            in the UNet's scale: see `LatentDiffusion.denormalize`.
    """

    on_latent: Callable[[Tensor], object] | None


class GuidedOptions(SamplingOptions, GuidanceOptions, PromptOptions, DecodingOptions):
    """Keywords of tasks whose models read prompts."""


class TaskOptions(GuidedOptions):
    """The keywords that all tasks take, for a batch of several prompts."""

    negative_prompt: Sequence[str]
    scale: float | None
    tile: int | None


class TextOptions(GuidedOptions, SDXLOptions):
    """Keywords of tasks that also work with SDXL."""


class SampleOptions(SamplingOptions, total=False):
    """Keywords of `sample` that tasks set themselves, besides those of the caller."""

    scale: Scale | None
    noise: Noise
    constrain: Constrain | None
    z: Tensor | None
    z_t: Tensor | None
    strength: float
    size: tuple[int, int] | None
    end: int
    first_step: int
    guidance: Guidance | None
    further: Sequence[Cond]


Conds = tuple[AnyCond, Cond | ScheduledCond | None, list[Cond]]  # cond, uncond, guidance.texts
P = ParamSpec("P")
TensorOrCond = TypeVar("TensorOrCond", Tensor, Cond)
FORMER_KEYWORDS = {"grid": "scheduler"}


def pipeline(*families: str) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Decorate a task to check model and keywords first, and to run without gradients.

    The decorated function raises WrongFamily for a model of another family, and UnknownName for an
    unknown keyword.

    Args:
        families: names in FAMILIES of the models that the task works with.
    """

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        signature = inspect.signature(function)
        parameters = signature.parameters.values()
        allowed = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        takes_sdxl, takes_text = "text" in families, families != ("variation",)
        allowed += (TextOptions if takes_sdxl else SamplingOptions).__annotations__
        allowed += DecodingOptions.__annotations__
        of_text = GuidanceOptions.__annotations__ | PromptOptions.__annotations__
        if takes_text:
            allowed += of_text

        @wraps(function)
        @torch.no_grad()
        def call(*args: P.args, **keywords: P.kwargs) -> Tensor:
            for former, name in FORMER_KEYWORDS.items():
                if former in keywords:
                    keywords[name] = keywords.pop(former)
            for keyword in keywords:
                if keyword in of_text and not takes_text:
                    raise ArgumentError(f"{keyword} needs a model that reads prompts", keyword)
                if keyword not in allowed:
                    kind = f"keyword of {function.__name__}"
                    raise unknown_name(kind, keyword, allowed[1:], argument=keyword)
            tiling, skip = keywords.pop("tiling", "none"), keywords.pop("clip_skip", 1)
            arguments = signature.bind(*args, **keywords).arguments
            model = arguments["model"]
            check_family(model, *families)
            check_guidance(model, cast(Scale | None, arguments.get("scale")), keywords)
            if (reason := check_clip_skip(model, skip)) is not None:
                warnings.warn(reason, stacklevel=2)
            try:
                with circular_padding(str(tiling)), clip_skip(cast(int, skip)):
                    return function(*args, **keywords)
            except NonFinite as error:
                for one in (model, keywords.get("refiner")):
                    check_weights(one, error)
                raise

        return call

    return decorate


def check_clip_skip(model: LatentDiffusion, number: object) -> str | None:
    """Return a warning if a clip skip has no effect on a model, else None.

    Raises:
        ArgumentError: it is not in 1 … number of layers of the text encoder.
    """
    if not isinstance(number, int) or number < 1:
        raise ArgumentError(f"clip_skip must be 1 or more, got {number}", "clip_skip")
    encoders = model.conditioner.find_all(TextEncoder)
    if number == 1:
        return None
    layers = [encoder.num_blocks for encoder in encoders if encoder.takes_clip_skip]
    if not layers:
        return (
            f"clip_skip {number} is ignored: it is for Stable Diffusion 1, which "
            f"{file_name(model)} is not"
        )
    if number > min(layers):
        message = f"clip_skip {number}: the text encoder has {min(layers)} layers"
        raise ArgumentError(message, "clip_skip")
    return None


@dataclass(frozen=True)
class Conditions:
    """Everything that the models of a call are conditioned on."""

    # of each image, texts for the first and the second text encoder; parsed, unless plain
    prompts: Sequence[StepPrompts | TextPair]
    negatives: Sequence[StepPrompts | TextPair]
    inputs: Mapping[str, object]  # values of batch keys besides text, a row per image
    unconditional_inputs: Mapping[str, object]  # those that differ for the unconditional one
    options: SDXLOptions  # sizes and scores of SDXL
    size: tuple[int, int]  # (height, width) of the images in pixels
    scale: Scale | None  # guidance scale; None = the default of each model
    guidance: Guidance | None  # None = classifier-free; texts of another method are encoded, too
    sampler: str | None = None  # a name in SAMPLERS; None = the default of each model
    # those of `guidance` that are not empty, as they are read
    texts: Mapping[str, PromptPair] = field(default_factory=dict)

    def encode(self, model: LatentDiffusion, quirks: Quirks, *, after_base: bool = False) -> Conds:
        """Encode prompts, negative prompts and `guidance.texts`, as a model reads them.

        An empty negative prompt, or text of guidance, is the model's unconditional one.
        """
        sizes, negative_sizes = size_conditions(model, self.options, self.size, quirks)
        keys = model.conditioner.keys
        inputs = {key: value for key, value in self.inputs.items() if key in keys}

        def encode(
            pairs: Sequence[PromptPair], numbers: Sequence[int], sizes: Sizes | None = sizes
        ) -> Cond:
            rows = {key: _select(value, numbers) for key, value in inputs.items()}
            return check_finite(encode_prompts(model, pairs, rows, sizes), "the text encoder")

        cond = encode_steps(self.prompts, encode)
        if model.guidance_embed_dim is not None:
            if any(isinstance(pair, StepPrompts) or any(pair) for pair in self.negatives):
                name = file_name(model)
                warnings.warn(f"{name} does not read a negative prompt: ignored", stacklevel=3)
            return cond, None, []
        scale = default_scale(model, self.sampler) if self.scale is None else self.scale
        takes_uncond = SAMPLERS[self.sampler or model.defaults.sampler].takes_uncond
        if scale == 1 and not takes_uncond and not has_composition(cond):
            return cond, None, []
        texts = self.guidance.texts if self.guidance else ()
        text = model.conditioner.text
        null = None if text is not None and text.null is None else ""
        further = {
            text: encode_prompts(model, [pair] * len(self.prompts), inputs, sizes)
            for text, pair in self.texts.items()
        }
        negatives = [
            pair if isinstance(pair, StepPrompts) or any(pair) else (null, null)
            for pair in self.negatives
        ]
        if quirks.ignores_negative(after_base=after_base):
            negatives = [(null, null)] * len(negatives)
        inputs |= self.unconditional_inputs
        if "" in texts:
            pairs = [(null, null)] * len(self.prompts)
            further[""] = encode_prompts(model, pairs, inputs, negative_sizes)
        uncond = encode_steps(negatives, partial(encode, sizes=negative_sizes))
        assert not isinstance(uncond, Composition)
        return cond, uncond, [further[text] for text in texts]


def generate(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str],
    inputs: Mapping[str, Tensor],
    scale: Scale | None,
    tile: int | None,
    *,
    noise: Noise,
    unconditional_inputs: Mapping[str, object] | None = None,
    z: Tensor | None = None,
    strength: float = 1.0,
    size: tuple[int, int] | None = None,
    constrain: Constrain | None = None,
    constrain_refiner: Constrain | None = None,
    upscaling: Upscaling | None = None,
    **options: Unpack[TextOptions],
) -> Tensor:
    """Encode prompts, sample and decode; a refiner continues where the model stops.

    Args:
        inputs: values of the batch keys that the model reads besides text, a row per prompt.
        unconditional_inputs: those that differ for the unconditional prediction.
        tile: side in latent pixels of the decoder's tiles; None = decode whole.
        scale, noise, z, strength, size, constrain: see `sample`.
        constrain_refiner: `constrain` for the steps of a refiner.
        upscaling: upscaler that doubles the latents before they are decoded; None = none.
        options: see `sample` and `SDXLOptions`.
    Returns:
        (B, 3, H, W) float32 in [-1, 1].
    Raises:
        NonFinite: a part of the model returned NaN or infinity.
    """
    sampling, sdxl = split_options(options)
    quirks = Quirks.of(model, sampling.get("legacy", ()))
    guidance = make_guidance(options, quirks)
    height, width = latent_size(model, size, sampling.get("x_T") if z is None else z)
    size_in_pixels = (height * model.downscale, width * model.downscale)
    check_size(model, size_in_pixels, sdxl)
    if upscaling is not None:
        upscaling.check(model)
        check_sides(upscaling.model, height, width)
    n, second_negative = len(as_list(prompts)), sdxl.get("negative_prompt_2")
    syntax = options.get("syntax", PLAIN)
    steps = _count_steps(model, quirks, sampling, None if z is None else strength)
    pairs = [
        parse_pair(pair, syntax, steps)
        for pair in pair_texts(prompts, sdxl.get("prompt_2"), n, "prompt")
    ]
    negatives = [
        parse_pair(pair, syntax, steps, is_negative=True) if any(pair) else pair
        for pair in pair_texts(negative_prompt, second_negative, n, "negative_prompt")
    ]
    if syntax != PLAIN and upscaling is not None:
        raise ArgumentError("an x2 latent upscaler takes prompts of syntax plain only", "syntax")
    concepts = [text for text in (guidance.texts if guidance else ()) if text]
    constants = {text: parse_constant(text, syntax, "sld_concept") for text in concepts}
    # The caller of a task.
    warn_about_prompts(model, [*pairs, *negatives, *constants.values()], stacklevel=5)
    conditions = Conditions(
        pairs,
        negatives,
        inputs,
        unconditional_inputs or {},
        sdxl,
        size_in_pixels,
        scale,
        guidance,
        sampling.get("sampler"),
        {text: pair_of(constant) for text, constant in constants.items()},
    )
    refiner = sdxl.get("refiner")
    start = {"z": z, "strength": strength, "size": size, "noise": noise, "constrain": constrain}
    run = cast(SampleOptions, {**sampling, "scale": scale, "guidance": guidance, **start})
    cond, uncond, further = conditions.encode(model, quirks)
    try:
        if refiner is None:
            run["further"] = further
        if upscaling is not None:
            columns = (as_list(prompts), negative_prompt)
            texts, negative_texts = (
                [text or "" for text, _ in pair_texts(column, None, n, "prompt")]
                for column in columns
            )
            latent = _sample_and_double(
                model, upscaling, (cond, uncond), (texts, negative_texts), run
            )
        elif refiner is None:
            latent = sample(model, cond, uncond, **run)
        else:
            refiner_conds = conditions.encode(refiner, quirks, after_base=True)
            base_conds = (cond, uncond, further)
            latent = _sample_with_refiner(
                model, refiner, base_conds, refiner_conds, sdxl, run, constrain_refiner
            )
        if guidance is not None and (reason := guidance.explain_idle()):
            warnings.warn(reason, stacklevel=3)
    except Stop as stop:
        if stop.latent is None:
            raise
        latent = stop.latent
    return decode_latent(model, latent, tile, options.get("on_latent"))


def _sample_with_refiner(
    model: LatentDiffusion,
    refiner: LatentDiffusion,
    conds: Conds,
    refiner_conds: Conds,
    options: SDXLOptions,
    run: SampleOptions,
    constrain_refiner: Constrain | None,
) -> Tensor:
    """Sample with the base until the handover, then with the refiner, without new noise."""
    quirks = Quirks.of(model, run.get("legacy", ()))
    sigmas = run_sigmas(model, quirks, run)
    steps, first = len(sigmas) - 1, 0
    if run["z"] is not None:
        first, _ = quirks.first_step(run["strength"], steps, steps)
    end = max(Handover.of(options).index(model.schedule, sigmas, quirks), first)
    on_step = partial(_count_on, run.get("callback"), steps - first)
    cond, uncond, further = conds
    base_run: SampleOptions = {
        **run, "sigmas": sigmas, "end": end, "callback": on_step(0), "further": further,
    }  # fmt: skip
    z_t = sample(model, cond, uncond, **base_run)
    if "unused-draws" in quirks:
        run["noise"](z_t)
    cond, uncond, further = refiner_conds
    refiner_run: SampleOptions = {
        **run, "sigmas": sigmas[end:], "z_t": z_t, "z": None, "x_T": None,
        "callback": on_step(end - first), "further": further, "constrain": constrain_refiner,
        "first_step": end - first,
        "freeu": None,
    }  # fmt: skip
    return sample(refiner, cond, uncond, **refiner_run)


def _sample_and_double(
    model: LatentDiffusion,
    upscaling: Upscaling,
    conds: tuple[AnyCond, Cond | ScheduledCond | None],
    texts: tuple[list[str], list[str]],
    run: SampleOptions,
) -> Tensor:
    """Sample a latent, then double its size with the x2 latent upscaler.

    Args:
        texts: (prompts, negative prompts) for the upscaler.
    """
    legacy = run.get("legacy", ())
    sigmas = run_sigmas(model, Quirks.of(model, legacy), run)
    first, total = 0, len(sigmas) - 1
    if run["z"] is not None:
        first, _ = Quirks.of(model, legacy).first_step(run["strength"], total, total)
    steps: SamplingOptions = {"steps": upscaling.steps}
    total += len(run_sigmas(upscaling.model, Quirks(), steps)) - 1 - first
    on_step = partial(_count_on, run.get("callback"), total)
    base_run: SampleOptions = {**run, "callback": on_step(0)}
    return double_latent(
        upscaling.model,
        texts[0],
        texts[1],
        check_finite(sample(model, *conds, **base_run), "the UNet"),
        noise=run["noise"],
        scale=upscaling.scale,
        steps=upscaling.steps,
        callback=on_step(len(sigmas) - 1 - first),
        unet_tile=run.get("unet_tile"),
        legacy=legacy,
    )


def _count_on(callback: Callback | None, total: int, offset: int) -> Callback | None:
    """Return a callback whose steps are counted in those of two models."""
    return callback and (lambda step, _, *latents: callback(step + offset, total, *latents))


def split_options(
    options: SamplingOptions | GuidedOptions | TextOptions,
) -> tuple[SamplingOptions, SDXLOptions]:
    """Return the keywords of `sample` and those of SDXL; others are dropped."""
    names = SDXLOptions.__annotations__
    others = names | GuidanceOptions.__annotations__ | PromptOptions.__annotations__
    others |= DecodingOptions.__annotations__
    sampling = {name: value for name, value in options.items() if name not in others}
    sdxl = {name: value for name, value in options.items() if name in names}
    return cast(SamplingOptions, sampling), cast(SDXLOptions, sdxl)


def make_noise(
    model: LatentDiffusion,
    prompts: Sequence[str],
    options: SamplingOptions | GuidedOptions | TextOptions,
    strength: float = 1.0,
) -> Noise:
    """Check the options of a call, and return its noise source, a row per prompt.

    Raises:
        ArgumentError: an option is invalid; no network has run yet.
    """
    sampling, sdxl = split_options(options)
    legacy = options.get("legacy", ())
    check_sampling(
        options.get("sampler") or model.defaults.sampler,
        options.get("scheduler"),
        StepNoise(
            options.get("eta"),
            options.get("s_churn", 0.0),
            options.get("s_tmin", 0.0),
            options.get("s_tmax"),
            options.get("s_noise", 1.0),
            options.get("brownian", False),
        ),
        strength,
        options.get("rescale", 0.0),
        legacy,
    )
    run_sigmas(model, Quirks(), sampling)  # raises ArgumentError
    check_sdxl(model, sdxl)
    _check_prompts(prompts, cast(PromptOptions, options).get("syntax", PLAIN))
    return noise_source(options.get("seeds"), len(as_list(prompts)), legacy)


def _check_prompts(prompts: Sequence[str], syntax: str) -> None:
    """Raise ArgumentError for an unknown syntax, or prompts that are invalid in it."""
    check_syntax(syntax)
    for prompt in as_list(prompts):
        parse_pair((prompt, prompt), syntax, steps=1)


def _count_steps(
    model: LatentDiffusion, quirks: Quirks, options: SamplingOptions, strength: float | None
) -> int:
    """Return the number of steps of a run, at this strength if it starts from an image."""
    steps = len(run_sigmas(model, quirks, options)) - 1
    if strength is None:
        return steps
    default = model.defaults.steps if options.get("sigmas") is None else steps
    requested = options.get("steps") or default
    first, _ = quirks.first_step(strength, requested, steps)
    return steps - first


def _select(value: object, numbers: Sequence[int]) -> object:
    """Return rows of a tensor or list, in this order and possibly repeated; others as they are."""
    if isinstance(value, Tensor):
        is_whole = len(value) == len(numbers) and list(numbers) == list(range(len(numbers)))
        return value if is_whole else value[list(numbers)]
    return [value[number] for number in numbers] if isinstance(value, list) else value


def encode_prompts(
    model: LatentDiffusion,
    prompts: Sequence[PromptPair],
    inputs: Mapping[str, object],
    sizes: Sizes | None = None,
) -> Cond:
    """Encode prompts and inputs as a condition, a row per prompt; equal prompts are encoded once.

    Args:
        inputs: values of other batch keys, a row per prompt.
        sizes: values of SDXL's batch keys, the same for all rows.
    """
    distinct = list(dict.fromkeys(prompts))
    numbers = {key: [value] * len(distinct) for key, value in (sizes or {}).items()}
    batch = {"txt": [first for first, _ in distinct], **numbers, **inputs}
    if any(first != second for first, second in distinct):
        batch["txt_2"] = [second for _, second in distinct]
    cond = model.condition(batch)
    if len(distinct) == len(prompts):
        return cond
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
    slots = cond.tensors()
    for name in ("crossattn", "vector") if sizes else ("crossattn",):
        if name in slots:
            slots[name] = slots[name][rows.to(slots[name].device)]
    return Cond(**slots)


def pair_texts(
    texts: str | Sequence[str], second: str | Sequence[str] | None, n: int, name: str
) -> list[TextPair]:
    """Pair n texts with those for the second text encoder, by default the same.

    Args:
        texts, second: one for all, or n.
        name: argument that `texts` comes from, for errors.
    """
    columns = []
    for suffix, column in (("", texts), ("_2", texts if second is None else second)):
        column = [column] * n if isinstance(column, str) else list(column)
        if len(column) != n:
            what = name.replace("_", " ") + "s"
            raise ArgumentError(f"{len(column)} {what} were given for {n} images", name + suffix)
        columns.append(column)
    return list(zip(*columns, strict=True))


def decode_latent(
    model: LatentDiffusion,
    z: Tensor,
    tile: int | None,
    on_latent: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Decode z (B, C, h, w) to images (B, 3, H, W), or more channels with depth, in [-1, 1].

    Raises:
        NonFinite: latents or images contain NaN or infinity.
    """
    check_finite(z, "the UNet")
    if on_latent is not None:
        on_latent(z)
    images = model.decode(z, tile=tile)
    return check_finite(images, "the VAE").clamp(-1, 1)


@torch.no_grad()
def encode_image(model: LatentDiffusion, image: Tensor, n: int, noise: Noise) -> Tensor:
    """Sample n latents (n, C, h, w) from the posterior of one image, padded to whole latent pixels.

    Args:
        image: (1, 3, H, W) in [-1, 1].
        noise: (like) -> standard normal noise.
    """
    image = pad_to_multiple(image.to(model.device), model.downscale)
    posterior = model.autoencoder.encode(image)
    mean = posterior.mean.float().expand(n, -1, -1, -1)
    z = mean + posterior.std.float() * noise(torch.empty(mean.shape, device=mean.device))
    return check_finite(model.normalize(z), "the VAE")


def add_depth(model: LatentDiffusion, image: Tensor, depth: Tensor | None) -> Tensor:
    """Append the depth to an input image for a model that reads it, see `ldm.imaging.rgbd`.

    Args:
        image: (1, 3, H, W), or with the channels of depth already.
        depth: (1, 1, H, W) in [0, 1], larger is nearer.
    Raises:
        ArgumentError: the model needs the depth or does not read it, or it differs in size from the
            image.
    """
    channels = model.autoencoder.in_channels
    if depth is None and image.shape[1] == channels:
        return image
    if channels == 3:
        raise ArgumentError(f"{file_name(model)} makes images without depth, leave it out", "depth")
    if depth is None:
        raise MissingArgument(f"{file_name(model)} also needs the depth of the image", "depth")
    if depth.shape[-2:] != image.shape[-2:]:
        sizes = ("{1}x{0}".format(*value.shape[-2:]) for value in (depth, image))
        raise ArgumentError("the depth is {}, the image {}".format(*sizes), "depth")
    return join_depth(image, depth.to(image), channels)


def as_list(prompts: str | Sequence[str]) -> list[str]:
    """Return one prompt or several as a list."""
    return [prompts] if isinstance(prompts, str) else list(prompts)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad an image (B, C, H, W) to multiples by repeating its last row and column."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def crop_like(padded: Tensor, image: Tensor, factor: int = 1) -> Tensor:
    """Crop a result to the size of the image before `pad_to_multiple`, times a factor."""
    return padded[..., : factor * image.shape[-2], : factor * image.shape[-1]]


def check_weights(model: object, error: NonFinite) -> None:
    """Raise a NonFinite that names the weights, if these are what is not finite."""
    if not isinstance(model, LatentDiffusion):
        return
    weights = {name: w for name, w in model.named_parameters() if w.is_floating_point()}
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        dtype = weights[broken[0]].dtype
        remedy = "download it again" if dtype == torch.float32 else "try float32"
        cause = f"{len(broken)} of its weights in {file_name(model)} are not"
        raise NonFinite(error.stage, f"{cause}, such as `{broken[0]}`: {remedy}") from error


def check_finite(value: TensorOrCond, stage: str) -> TensorOrCond:
    """Return the value; raise NonFinite if it contains NaN or infinity.

    Args:
        stage: part of the model that it comes from, for the error.
    """
    tensors = [value] if isinstance(value, Tensor) else value.tensors().values()
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise NonFinite(stage)
    return value
