"""Groups of options, the fields of a `Request`: their flags, labels, defaults and checks.

An option is a field (`ldm.generate.options`). Each task has its own group of inputs
(`ldm.generate.tasks`); only some have the groups of SDXL and of the x2 latent upscaler.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ldm.diffusion.names import (
    FREEU_PRESETS,
    FREEU_VERSIONS,
    SAMPLERS,
    SCHEDULERS,
    SLD_PRESETS,
    TILINGS,
    check_guidance_options,
)
from ldm.diffusion.scheduler_options import SCHEDULERS_WITH_RHO, check_rho
from ldm.diffusion.step_noise import StepNoise
from ldm.generate.option_parsers import (
    QUIRKS,
    SCRIPT_QUIRKS,
    expand_file,
    parse_apg,
    parse_count,
    parse_fraction,
    parse_freeu,
    parse_integer,
    parse_legacy,
    parse_lora,
    parse_natural,
    parse_number,
    parse_positive,
    parse_sigma_interval,
    parse_sigmas,
    parse_size,
    parse_sld,
    parse_top_left,
)
from ldm.generate.options import option
from ldm.prompts import PLAIN, SYNTAXES
from ldm.runtime.errors import ArgumentError

__all__ = [
    "GROUP_HEADINGS", "SDXL", "Inputs", "ModelOptions", "Output", "Prompts", "Sampling",
    "UpscalerOptions",
]  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Base class of the input groups of tasks: what a task reads besides prompts."""

    def split_by_image(self) -> "Sequence[Inputs]":
        """Return one group of inputs for each image of a folder, or else only this one."""
        return [self]

    @property
    def is_folder(self) -> bool:
        """Whether the input is a folder, whose images are divided among the processes."""
        return False

    @property
    def output_name(self) -> str | None:
        """File name of the result, without extension; None = results are numbered."""
        return None


@dataclass(frozen=True)
class Prompts:
    """Prompt and negative prompt, or a file of prompts."""

    # fmt: off
    prompt: str = option("", "--prompt", metavar="TEXT", label="Prompt",
        help="the prompt (default: %(default)s)")
    negative_prompt: str = option("", "--negative-prompt", metavar="TEXT", label="Negative prompt",
        help="negative prompt: what to steer away from")
    syntax: str = option(PLAIN, "--syntax", choices=SYNTAXES, metavar="NAME",
        label="Prompt syntax",
        help=f"prompt syntax: {', '.join(SYNTAXES)} (default: %(default)s, in which brackets have"
        " no meaning)")
    from_file: str | None = option(None, "--from-file", metavar="FILE",
        help="file with one prompt per line, a blank line is an empty prompt; a line may end in"
        ' its own options: --seed N, --negative-prompt "TEXT", --steps, --W, --sampler …, or those'
        " of kohya's scripts (--n --w --h --d --s --l --t --ss) and of A1111")
    repeat: int = option(1, "--repeat", parse=parse_count, metavar="N",
        help="repeat each line of the file N times (default: %(default)s)")
    dynamic_prompts: bool = option(False, "--dynamic-prompts", label="Dynamic prompts",
        help="expand {a|b} in prompts to a random choice, by the seed of each image")
    wildcards: str | None = option(None, "--wildcards", metavar="DIR",
        help="like --dynamic-prompts; also replace __name__ by a random line of DIR/name.txt")
    # fmt: on


@dataclass(frozen=True)
class ModelOptions:
    """The model, its files, device and precision; `overrides` (`key=value`) change the YAML."""

    # fmt: off
    ckpt: str | None = option(None, "--ckpt", metavar="FILE", label="Checkpoint",
        help="checkpoint: .ckpt, .safetensors, a diffusers folder, a name that `ldm download`"
        " lists, or hf:OWNER/NAME[/FILE] (default: the small demo model)")
    config: str | None = option(None, "--config", metavar="FILE",
        help="YAML of the model (default: recognized from the checkpoint)")
    ema: bool | None = option(None, "--ema", is_negatable=True,
        help="use the EMA weights of the checkpoint, or the raw ones (default: EMA weights if the"
        " YAML sets use_ema and the checkpoint contains them)")
    vae: str | None = option(None, "--vae", metavar="FILE", label="VAE",
        help="use the autoencoder in this file; TAESD is a smaller and faster one")
    text_encoder: str | None = option(None, "--text-encoder", metavar="FILE",
        help="use the text encoder in this file; for the x2 latent upscaler a checkpoint of Stable"
        " Diffusion 1, whose autoencoder is used, too")
    allow_module: tuple[str, ...] = option((), "--allow-module", is_list=True, metavar="M",
        help="allow classes of package M as `target` in the YAML")
    variant: str | None = option(None, "--variant", "--file-variant", metavar="NAME",
        help="kind of few-step (distilled) model or LoRA, if not recognized by its name: lcm, tcd,"
        " hyper, hyper-cfg, hyper-1step, lightning, lightning-x0, turbo, or base for an ordinary"
        " model; --file-variant: in the file names of a diffusers folder, fp16")
    lora: tuple[tuple[str, float | str], ...] = option((), "--lora", parse=parse_lora,
        separator=":", is_list=True, metavar="FILE[:WEIGHT]", label="LoRA",
        help="add a LoRA, in the format of kohya, diffusers, peft or ComfyUI; WEIGHT is a number,"
        " TEXT:UNET for text encoders and UNet, or te=N:unet=N:dyn=RANK:lbw=BLOCKS; may be given"
        " several times")
    lora_dir: str | None = option(None, "--lora-dir", metavar="DIR",
        help="folder of the LoRAs that prompts name as <lora:NAME:WEIGHT> (default: lora or loras"
        " beside the checkpoint, beside its folder, or in the current folder)")
    embedding: tuple[str, ...] = option((), "--embedding", is_list=True, metavar="FILE",
        help="textual inversion, or a folder of them: tokens to use in prompts")
    device: str | None = option(None, "--device", metavar="NAME",
        help="cuda, cuda:1, mps or cpu (default: the first that is available)")
    precision: str = option("autocast", "--precision",
        choices=("full", "autocast", "fp16", "bf16"), shortcuts={"--bf16": "bf16"},
        help="full: fp32; autocast: mixed precision where device and model support it; fp16, bf16:"
        " all weights (default: %(default)s)")
    attention: str | None = option(None, "--attention", choices=("xformers", "sdpa", "math"),
        help="implementation of attention (default: the fastest available)")
    offload: bool = option(False, "--offload",
        help="keep text encoders, UNet and VAE in main memory until needed, to save GPU memory")
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
    steps: int | None = option(None, "--steps", "--ddim_steps", parse=parse_count, metavar="N",
        label="Sampling steps",
        help="sampling steps (default: 50, LDM3D 49, LDM3D-SR 75, unCLIP and the x2 latent upscaler"
        " 20, few-step models 1 … 8)")
    sampler: str | None = option(None, "--sampler", choices=tuple(SAMPLERS), metavar="NAME",
        shortcuts={"--plms": "plms", "--dpm": "dpm", "--dpm_solver": "dpm"},
        label="Sampling method",
        help=f"{', '.join(SAMPLERS)} (default: ddim, or the sampler of a few-step model)")
    scheduler: str | None = option(None, "--scheduler", "--spacing", "--grid-spacing",
        choices=tuple(SCHEDULERS), metavar="NAME", label="Schedule type",
        help=f"spacing of the noise levels: {', '.join(SCHEDULERS)} (default: the sampler's own)")
    rho: float | None = option(None, "--rho", parse=parse_number, metavar="RHO",
        label="Schedule rho", help="exponent of the scheduler (default:"
        f" {', '.join(f'{name} {SCHEDULERS[name].rho:g}' for name in SCHEDULERS_WITH_RHO)})")
    sigmas: tuple[float, ...] | None = option(None, "--sigmas", parse=parse_sigmas,
        expand=expand_file, metavar="LIST", label="Sigmas",
        help="custom noise levels, descending, such as 14.6,3.9,1.9,0.96,0.4,0, or @FILE with them,"
        " instead of steps and scheduler")
    eta: float | None = option(None, "--ddim_eta", "--eta", parse=parse_number, metavar="ETA",
        label="Eta", help="amount of noise between steps, 0 (deterministic) … 1; the gamma of tcd"
        " (default: ddim 0, tcd 0.3, others 1)")
    s_churn: float = option(0.0, "--s-churn", "--s_churn", parse=parse_number, metavar="S",
        label="Sigma churn", slider_max=100,
        help="amount of noise before the steps of euler, heun and dpm2: s_churn of Karras et al.,"
        " 0 … number of steps (default: %(default)s)")
    s_tmin: float = option(0.0, "--s-tmin", "--s_tmin", parse=parse_number, metavar="SIGMA",
        label="Sigma tmin", help="no churn below this sigma (default: %(default)s)")
    s_tmax: float | None = option(None, "--s-tmax", "--s_tmax", parse=parse_number,
        metavar="SIGMA", label="Sigma tmax", help="no churn above this sigma (default: no limit)")
    s_noise: float = option(1.0, "--s-noise", "--s_noise", parse=parse_number, metavar="S",
        label="Sigma noise",
        help="standard deviation of the noise of eta and churn (default: %(default)s)")
    brownian: bool = option(False, "--brownian", label="Brownian noise",
        help="noise between steps from a Brownian path over sigma, as in k-diffusion and A1111, so"
        " that images change little with the number of steps: for dpmpp_sde, dpmpp_2m_sde, its heun"
        " form and dpmpp_3m_sde")
    scale: float | None = option(None, "--scale", parse=parse_number, metavar="S",
        label="CFG scale",
        help="guidance scale, 1 = no guidance (default: 9, inpaint and unCLIP 10, SDXL and LDM3D 5,"
        " image variations 3, x2 latent upscaler, most few-step models and CFG++ samplers 1, demo"
        " models 1 … 3)")
    rescale: float = option(0.0, "--guidance-rescale", parse=parse_fraction, metavar="R",
        label="Guidance rescale",
        help="rescale the contrast of guided predictions, against over-exposure at high scales:"
        " 0 (off) … 1 (default: %(default)s)")
    guidance_interval: tuple[float, float] | None = option(None, "--guidance-interval",
        parse=parse_sigma_interval, metavar="LOW,HIGH", label="Guidance interval",
        help="use guidance only between these two sigmas (default: everywhere)")
    sld: str | tuple[float, ...] | None = option(None, "--sld", parse=parse_sld,
        metavar="PRESET", label="Safe latent diffusion",
        help=f"guide away from unsafe content: {', '.join(SLD_PRESETS)}, or"
        " WARMUP,SCALE,THRESHOLD,MOMENTUM,BETA (default: off)")
    sld_concept: str | None = option(None, "--sld-concept", expand=expand_file, metavar="TEXT",
        label="Unsafe concept",
        help="what --sld guides away from: a text, @FILE with one, or a predefined text: original"
        " (the authors') or diffusers (default: original)")
    apg: tuple[float, ...] | None = option(None, "--apg", parse=parse_apg, const=(0.0, 15.0, -0.5),
        metavar="ETA,NORM,MOMENTUM", label="APG (eta, norm, momentum)",
        help="adaptive projected guidance, against over-saturation at high scales: factor of the"
        " update's component parallel to the estimate, largest norm of the update (0: no limit),"
        " momentum; 0,15,-0.5 without a value (default: off)")
    perp_neg: float | None = option(None, "--perp-neg", parse=parse_positive, const=1.0,
        metavar="W", label="Perp-neg weight",
        help="perp-neg: use only the component of the negative prompt that is perpendicular to the"
        " prompt, with weight W; 1 without a value (default: off)")
    pag: float | None = option(None, "--pag", "--pag-scale", parse=parse_positive, const=3.0,
        metavar="S", label="PAG scale",
        help="perturbed-attention guidance, which sharpens structure; works with or without other"
        " guidance (--scale 1); scale 3 without a value (default: off)")
    freeu: str | tuple[float, ...] | None = option(None, "--freeu", parse=parse_freeu,
        const="auto", metavar="B1,B2,S1,S2", label="FreeU",
        help="FreeU: factors of the UNet's backbone and skip connections, or a preset:"
        f" {', '.join(FREEU_PRESETS)}, or auto (also without a value): the model's preset"
        " (default: off)")
    freeu_version: str | None = option(None, "--freeu-version", choices=tuple(FREEU_VERSIONS),
        label="FreeU version", help="; ".join(f"{k}: {text}" for k, text in FREEU_VERSIONS.items())
        + " (default: 1)")
    clip_skip: int = option(1, "--clip-skip", parse=parse_count, metavar="N", label="Clip skip",
        slider_max=12, help="layer of Stable Diffusion 1's text encoder to use, from the end: 1 the"
        " last, 2 the penultimate (default: %(default)s)")
    seed: int = option(42, "--seed", parse=parse_integer, metavar="N", label="Seed",
        help="image k of the run has seed + k (default: %(default)s)")
    fixed_code: bool = option(False, "--fixed_code", help="use the same initial noise for all"
        " batches")
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
        help="run the UNet in tiles of this many pixels, to save memory; 512 without a value"
        " (default: no tiles)")
    tiling: str = option("none", "--tiling", choices=TILINGS, const="xy", metavar="AXES",
        label="Tiling", help="make images seamless (tileable) by circular padding: x joins left"
        " and right, for panoramas, y top and bottom, xy both, for textures; xy without a value"
        " (default: %(default)s)")
    legacy: tuple[str, ...] = option((), "--legacy", parse=parse_legacy, const=SCRIPT_QUIRKS,
        metavar="NAMES", help="reproduce quirks of the original: names of "
        + ",".join(QUIRKS) + "; without a value the quirks of its scripts")
    # fmt: on

    def __post_init__(self) -> None:
        step_noise = StepNoise(  # which checks its values
            self.effective_eta, self.s_churn, self.s_tmin, self.s_tmax, self.s_noise, self.brownian
        )
        if self.sampler is not None:
            step_noise.check(self.sampler)
        if self.sigmas is not None:
            for name, value in (("scheduler", self.scheduler), ("rho", self.rho)):
                if value is not None:
                    raise ArgumentError(f"sigmas are given, leave out {name}", name)
        if self.scheduler is not None:
            check_rho(self.rho, self.scheduler)
        if self.sld_concept is not None and self.sld is None:
            raise ArgumentError("sld_concept needs sld", "sld_concept")
        check_guidance_options(
            [name for name, value in vars(self).items() if value is not None], self.scale
        )

    @property
    def effective_eta(self) -> float | None:
        """Eta; None for `dpm`, which ignores it as the original does."""
        return None if self.sampler == "dpm" else self.eta

    @property
    def size(self) -> tuple[int | None, int | None]:
        """(height, width) in pixels; with legacy `size`, rounded down to multiples of 8."""
        height, width = self.height, self.width
        if "size" in self.legacy:
            height = height and height - height % 8
            width = width and width - width % 8
        return height, width


@dataclass(frozen=True)
class SDXL:
    """Options of Stable Diffusion XL: a second prompt, micro-conditioning and the refiner."""

    # fmt: off
    refiner: str | None = option(None, "--refiner", metavar="FILE", label="Refiner",
        help="refiner: a second model, which does the last sampling steps")
    refiner_strength: float | None = option(None, "--refiner-strength", parse=parse_fraction,
        metavar="S", help="fraction of the steps for the refiner (default: 0.15)")
    refiner_start: float | None = option(None, "--refiner-start", parse=parse_fraction,
        metavar="F", label="Refiner start",
        help="fraction of the timesteps before the refiner starts, such as 0.8 (denoising_end of"
        " diffusers); not with --refiner-strength")
    prompt_2: str | None = option(None, "--prompt-2", metavar="TEXT", label="Prompt 2",
        help="prompt of the second text encoder (default: the prompt)")
    negative_prompt_2: str | None = option(None, "--negative-prompt-2", metavar="TEXT",
        label="Negative prompt 2",
        help="negative prompt of the second text encoder (default: the negative prompt)")
    original_size: tuple[int, int] | None = option(None, "--original-size", parse=parse_size,
        metavar="H,W", label="Original size (H,W)",
        help="micro-conditioning: size of a training image before resizing (default: the image's"
        " size)")
    crop: tuple[int, int] | None = option(None, "--crop", parse=parse_top_left,
        metavar="TOP,LEFT", label="Crop (top,left)",
        help="micro-conditioning: top left corner of a training image's crop, in pixels (default:"
        " 0,0)")
    target_size: tuple[int, int] | None = option(None, "--target-size", parse=parse_size,
        metavar="H,W", label="Target size (H,W)",
        help="micro-conditioning: size of a training image after resizing (default: the image's"
        " size)")
    aesthetic_score: float | None = option(None, "--aesthetic-score", parse=parse_number,
        metavar="S", label="Aesthetic score",
        help="micro-conditioning of the refiner, 1 … 10 (default: 6)")
    negative_original_size: tuple[int, int] | None = option(None, "--negative-original-size",
        parse=parse_size, metavar="H,W", label="Negative original size (H,W)",
        help="for the negative prompt (default: as for the prompt)")
    negative_crop: tuple[int, int] | None = option(None, "--negative-crop", parse=parse_top_left,
        metavar="TOP,LEFT", label="Negative crop (top,left)",
        help="for the negative prompt (default: as for the prompt)")
    negative_target_size: tuple[int, int] | None = option(None, "--negative-target-size",
        parse=parse_size, metavar="H,W", label="Negative target size (H,W)",
        help="for the negative prompt (default: as for the prompt)")
    negative_aesthetic_score: float | None = option(None, "--negative-aesthetic-score",
        parse=parse_number, metavar="S", label="Negative aesthetic score",
        help="for the negative prompt (default: 2.5)")
    # fmt: on

    def __post_init__(self) -> None:
        if self.refiner_strength is not None and self.refiner_start is not None:
            message = "give refiner_strength or refiner_start, not both"
            raise ArgumentError(message, "refiner_strength")
        for name in ("refiner_strength", "refiner_start"):
            if self.refiner is None and vars(self)[name] is not None:
                raise ArgumentError(f"{name} needs a refiner", name)


@dataclass(frozen=True)
class UpscalerOptions:
    """An x2 latent upscaler, which doubles the sides of latents before they are decoded."""

    # fmt: off
    upscaler: str | None = option(None, "--upscaler", metavar="FILE", label="x2 latent upscaler",
        help="x2 latent upscaler, a diffusers folder or a file: makes images of twice the size;"
        " components missing from its file come from the model")
    upscaler_steps: int | None = option(None, "--upscaler-steps", parse=parse_count, metavar="N",
        label="Upscaler steps", help="its sampling steps (default: 20)")
    upscaler_scale: float | None = option(None, "--upscaler-scale", parse=parse_number,
        metavar="S", label="Upscaler CFG scale",
        help="its guidance scale: 1 = no guidance, 0 = the negative prompt only (default: 1)")
    # fmt: on

    def __post_init__(self) -> None:
        for name in ("upscaler_steps", "upscaler_scale"):
            if self.upscaler is None and vars(self)[name] is not None:
                raise ArgumentError(f"{name} needs upscaler", name)


@dataclass(frozen=True)
class Output:
    """How many images to make, and where to save them."""

    # fmt: off
    outdir: str = option("outputs", "--outdir", metavar="DIR",
        help="folder for samples/ and the grid (default: %(default)s)")
    n_samples: int = option(3, "--n_samples", parse=parse_count, metavar="N", label="Batch size",
        help="batch size (default: %(default)s)")
    n_iter: int = option(3, "--n_iter", parse=parse_count, metavar="N", label="Batch count",
        help="number of batches, or of runs through the prompt file (default: %(default)s)")
    n_rows: int = option(0, "--n_rows", parse=parse_natural, metavar="N",
        help="images per row of the grid (default: the batch size)")
    skip_grid: bool = option(False, "--skip_grid", help="do not save the grid")
    skip_save: bool = option(False, "--skip_save", help="do not save single images")
    safety_checker: str | None = option(None, "--safety-checker", metavar="FILE",
        label="Safety checker",
        help="check images with the safety checker of Stable Diffusion 1: its file or folder, a"
        " name of `ldm download`, or `own`: the one in the --ckpt folder; scores go into PNGs and"
        " the log (default: none)")
    unsafe: str | None = option(None, "--unsafe", choices=("black", "blur", "drop"),
        label="Flagged images",
        help="what to do with flagged images: save a black or blurred image instead, or drop them"
        " (default: keep them)")
    no_watermark: bool = option(False, "--no-watermark", help="do not add the invisible watermark")
    save_latents: bool = option(False, "--save-latents",
        help="also save the latent of each image, NNNNN.latent, for `ldm upscale` and ComfyUI")
    glb: bool = option(False, "--glb",
        help="also save images with depth (LDM3D) as a textured 3D mesh, NNNNN.glb (needs trimesh)")
    json: bool = option(False, "--json", help="write one JSON object per image to stdout")
    # fmt: on

    def __post_init__(self) -> None:
        if self.save_latents and self.skip_save:
            raise ArgumentError(
                "latents are saved beside images, which skip_save does not save", "save_latents"
            )
        if self.unsafe is not None and self.safety_checker is None:
            raise ArgumentError("unsafe needs safety_checker", "unsafe")


# Headings of `--help` by field of `Request`, in this order.
GROUP_HEADINGS = {
    "inputs": "inputs",
    "prompts": "prompt",
    "model": "model (key=value changes the YAML: model.params.x=1)",
    "sampling": "sampling",
    "sdxl": "Stable Diffusion XL",
    "upscaling": "x2 latent upscaler",
    "output": "output",
}
