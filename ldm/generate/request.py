"""Request: all options of one run as a frozen value. `command_line` parses and prints flags.

    argv | form | PNG metadata  ->  Request  ->  images, PNG metadata, the command to repeat them

Options (`ldm.generate.options`) are the fields of five groups; the group of inputs is the task's
own (`ldm.generate.tasks`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

from ldm.diffusion.names import SAMPLERS, SCHEDULERS
from ldm.generate.options import (
    QUIRKS,
    Value,
    decode_option,
    option,
    parse_count,
    parse_fraction,
    parse_integer,
    parse_interval,
    parse_legacy,
    parse_number,
    parse_weighted_file,
)
from ldm.runtime.errors import ArgumentError, unknown_name

if TYPE_CHECKING:
    from ldm.generate.tasks.base import Task

__all__ = ["GROUPS", "Inputs", "ModelChoice", "Output", "Prompts", "Request", "Sampling"]


class ModelFiles(TypedDict, total=False):
    """Keywords of `ldm.load` that belong to some tasks only."""

    clip_stats: str | None
    midas: str | None


@dataclass(frozen=True)
class Inputs:
    """What a task reads in addition to prompts; the base of each task's own group."""

    def per_image(self) -> "Sequence[Inputs]":
        """Return the inputs of each image to work on: one, or all of a folder."""
        return [self]

    def model_files(self) -> "ModelFiles":
        """Return files that the model is loaded with, besides the checkpoint."""
        return {}

    @property
    def is_folder(self) -> bool:
        """Whether this is a folder, whose images are divided among the processes."""
        return False

    @property
    def output_name(self) -> str | None:
        """Name of the result files, if they are named after their input; None = numbered."""
        return None


InputsType = TypeVar("InputsType", bound=Inputs)


@dataclass(frozen=True)
class Prompts:
    """Prompts, or a file of them."""

    # fmt: off
    prompt: str = option("", "--prompt", metavar="TEXT", label="Prompt",
        help="the prompt (default: %(default)s)")
    negative_prompt: str = option("", "--negative-prompt", metavar="TEXT", label="Negative prompt",
        help="negative prompt: what to steer away from")
    from_file: str | None = option(None, "--from-file", metavar="FILE",
        help="one prompt per line, a blank line is an empty one; a line may end"
        ' in --seed N and --negative-prompt "TEXT"')
    repeat: int = option(1, "--repeat", parse=parse_count, metavar="N",
        help="repeat each line of the file N times (default: %(default)s)")
    # fmt: on


@dataclass(frozen=True)
class ModelChoice:
    """Which model, where and how precisely it runs; `key=value` changes the YAML."""

    # fmt: off
    ckpt: str | None = option(None, "--ckpt", metavar="FILE", label="Checkpoint",
        help="checkpoint: .ckpt, .safetensors, a diffusers folder, a name that `ldm download`"
        " lists, or hf:OWNER/NAME[/FILE] (default: the small demo model)")
    config: str | None = option(None, "--config", metavar="FILE",
        help="YAML of the model (default: recognised from the checkpoint)")
    ema: bool = option(False, "--ema", help="use the EMA weights of the checkpoint")
    vae: str | None = option(None, "--vae", metavar="FILE", label="VAE",
        help="take the autoencoder from this file")
    allow_module: tuple[str, ...] = option((), "--allow-module", is_list=True, metavar="M",
        help="allow classes of package M as `target` in the YAML")
    lora: tuple[tuple[str, float], ...] = option((), "--lora", parse=parse_weighted_file,
        separator=":", is_list=True, metavar="FILE[:WEIGHT]", label="LoRA",
        help="add a LoRA, in the format of kohya, diffusers, peft or ComfyUI; may be given several"
        " times")
    embedding: tuple[str, ...] = option((), "--embedding", is_list=True, metavar="FILE",
        help="a textual inversion, or a folder of them: tokens to use in prompts")
    device: str | None = option(None, "--device", metavar="NAME",
        help="cuda, cuda:1, mps or cpu (default: the first that is available)")
    precision: str = option("autocast", "--precision",
        choices=("full", "autocast", "fp16", "bf16"), shortcuts={"--bf16": "bf16"},
        help="full is fp32; autocast what suits device and model (default: %(default)s)")
    attention: str | None = option(None, "--attention", choices=("xformers", "sdpa", "math"),
        help="implementation of attention (default: the fastest available)")
    channels: int | None = option(None, "--C", parse=parse_integer, metavar="N",
        help="accepted and ignored: latent channels")
    factor: int | None = option(None, "--f", parse=parse_integer, metavar="N",
        help="accepted and ignored: downsampling factor")
    torchscript: bool = option(False, "--torchscript", help="accepted and ignored")
    ipex: bool = option(False, "--ipex", help="accepted and ignored")
    laion400m: bool = option(False, "--laion400m", help="accepted and ignored")
    overrides: tuple[str, ...] = option((), is_list=True)
    # fmt: on


@dataclass(frozen=True)
class Sampling:
    """How latents are sampled and decoded."""

    # fmt: off
    steps: int = option(50, "--steps", "--ddim_steps", parse=parse_count, metavar="N",
        label="Sampling steps", help="sampling steps (default: %(default)s)")
    sampler: str = option("ddim", "--sampler", choices=tuple(SAMPLERS), metavar="NAME",
        shortcuts={"--plms": "plms", "--dpm": "dpm", "--dpm_solver": "dpm"},
        label="Sampling method", help=f"{', '.join(SAMPLERS)} (default: %(default)s)")
    scheduler: str | None = option(None, "--scheduler", "--spacing", "--grid-spacing",
        choices=tuple(SCHEDULERS), metavar="NAME", label="Schedule type",
        help=f"spacing of the timesteps: {', '.join(SCHEDULERS)} (default: the sampler's own)")
    eta: float = option(0.0, "--ddim_eta", "--eta", parse=parse_number, metavar="ETA",
        label="Eta (DDIM)", help="DDIM eta (default: %(default)s)")
    scale: float | None = option(None, "--scale", parse=parse_number, metavar="S",
        label="CFG scale", help="guidance scale, 1 = no guidance (default: 9, demo model 3)")
    rescale: float = option(0.0, "--guidance-rescale", parse=parse_fraction, metavar="R",
        label="Guidance rescale",
        help="0 … 1, against over-exposure at high scales (default: %(default)s)")
    guidance_interval: tuple[float, float] | None = option(None, "--guidance-interval",
        parse=parse_interval, metavar="LOW,HIGH", label="Guidance interval",
        help="guide only between these two sigmas (default: everywhere)")
    seed: int = option(42, "--seed", parse=parse_integer, metavar="N", label="Seed",
        help="image k of the run has seed + k (default: %(default)s)")
    fixed_code: bool = option(False, "--fixed_code", help="the same start noise for every batch")
    height: int | None = option(None, "--H", parse=parse_integer, metavar="N", label="Height",
        help="height in pixels, a multiple of 8 (default: the model's, or 512)")
    width: int | None = option(None, "--W", parse=parse_integer, metavar="N", label="Width",
        help="width in pixels, a multiple of 8 (default: the model's, or 512)")
    vae_tile: int | None = option(None, "--vae-tile", "--tile", parse=parse_count, const=512,
        metavar="PIXELS", label="VAE tile size",
        help="decode in tiles of this many pixels, to save memory; 512 without a value"
        " (default: no tiles)")
    unet_tile: int | None = option(None, "--unet-tile", parse=parse_count, const=512,
        metavar="PIXELS", label="UNet tile size",
        help="run the network in tiles of this many pixels, to save memory; 512 without a value"
        " (default: no tiles)")
    legacy: tuple[str, ...] = option((), "--legacy", parse=parse_legacy, const=QUIRKS,
        metavar="NAMES", help="reproduce quirks of the original scripts: all or some of "
        + ",".join(QUIRKS))
    # fmt: on

    @property
    def size(self) -> tuple[int | None, int | None]:
        """(height, width) in pixels, rounded down to multiples of 8 under the quirk "size"."""
        height, width = self.height, self.width
        if "size" in self.legacy:
            height = height and height - height % 8
            width = width and width - width % 8
        return height, width


@dataclass(frozen=True)
class Output:
    """How many images to make, and where to save them."""

    # fmt: off
    outdir: str = option("outputs", "--outdir", metavar="DIR",
        help="folder for samples/ and the grid (default: %(default)s)")
    n_samples: int = option(3, "--n_samples", parse=parse_count, metavar="N", label="Batch size",
        help="batch size (default: %(default)s)")
    n_iter: int = option(3, "--n_iter", parse=parse_count, metavar="N", label="Batch count",
        help="number of batches, or repetitions of all prompts of a file (default: %(default)s)")
    n_rows: int = option(0, "--n_rows", parse=parse_integer, metavar="N",
        help="images per row of the grid (default: the batch size)")
    skip_grid: bool = option(False, "--skip_grid", help="do not save the grid")
    skip_save: bool = option(False, "--skip_save", help="do not save single images")
    no_watermark: bool = option(False, "--no-watermark", help="do not add the invisible watermark")
    json: bool = option(False, "--json", help="write one JSON object per image to stdout")
    # fmt: on


# Headings of `--help`, in its order; the inputs of a task come first.
GROUPS = {
    "inputs": "inputs",
    "prompts": "prompt",
    "model": "model (key=value changes the YAML: model.params.x=1)",
    "sampling": "sampling",
    "output": "output",
}


@dataclass(frozen=True)
class Request:
    """All options of one run.

    Args:
        inputs: the task's own group.
    Raises:
        ArgumentError: a size or eta that is not allowed.
    """

    task: "Task"
    inputs: Inputs
    prompts: Prompts = Prompts()
    model: ModelChoice = ModelChoice()
    sampling: Sampling = Sampling()
    output: Output = Output()

    def __post_init__(self) -> None:
        sampler, eta = self.sampling.sampler, self.eta
        if eta and not SAMPLERS[sampler].takes_eta:
            raise ArgumentError(
                f"eta is DDIM's: sampler `{sampler}` takes none, got {eta:g}", "eta"
            )
        for name, side in zip(("height", "width"), self.sampling.size, strict=True):
            if side is not None and (side < 8 or side % 8):
                raise ArgumentError(f"{name} {side} is not a positive multiple of 8", name)

    @property
    def eta(self) -> float:
        """DDIM's eta; 0 for `dpm`, with which the original ignored it."""
        return 0.0 if self.sampling.sampler == "dpm" else self.sampling.eta

    @property
    def scale(self) -> float:
        """The guidance scale: the given one, else the default of task and model."""
        if self.sampling.scale is not None:
            return self.sampling.scale
        return self.task.demo_scale if self.uses_demo_model else self.task.scale

    @property
    def uses_demo_model(self) -> bool:
        """Whether no model is given, so that the one that ships with ldm is used."""
        return self.model.ckpt is None and self.model.config is None

    def inputs_as(self, kind: type[InputsType]) -> InputsType:
        """Return the inputs, narrowed to this type."""
        assert isinstance(self.inputs, kind), f"{self.task.name} has no {kind.__name__}"
        return self.inputs

    def values(self) -> dict[str, Value]:
        """Return the value of each option, by name."""
        return {name: value for group in self._groups() for name, value in vars(group).items()}

    def with_values(self, values: Mapping[str, object]) -> "Request":
        """Copy the request with some options set, each checked as on the command line.

        Raises:
            UnknownName: the task does not have the option.
            ArgumentError: the option does not allow the value.
        """
        options = self.task.options()
        for name in values:
            if name not in options:
                kind = f"option of {self.task.name}"
                raise unknown_name(kind, name, options, argument=name)
        decoded = {name: decode_option(name, *options[name], v) for name, v in values.items()}
        return Request(self.task, *(_replace_fields(group, decoded) for group in self._groups()))

    def to_json(self, without_folders: bool = False) -> dict[str, Value]:
        """Return `values` with tuples as lists, as JSON has them.

        Args:
            without_folders: reduce paths to file names, except `config`, which a replay must find.
        """
        values = self.values()
        if without_folders:
            options = self.task.options()
            paths = {name for name in values if options[name][0].is_path} - {"config"}
            values |= {name: _file_names(values[name]) for name in paths}
        json_values: dict[str, Value] = json.loads(json.dumps(values))
        return json_values

    def _groups(self) -> tuple[Inputs | Prompts | ModelChoice | Sampling | Output, ...]:
        return self.inputs, self.prompts, self.model, self.sampling, self.output


def _file_names(value: Value) -> Value:
    if isinstance(value, tuple):
        return tuple(map(_file_names, value))
    return Path(value).name if isinstance(value, str) else value


def _replace_fields(group: Value, values: Mapping[str, Value]) -> Value:
    own = {f.name: values[f.name] for f in fields(group) if f.name in values}
    return replace(group, **own)
