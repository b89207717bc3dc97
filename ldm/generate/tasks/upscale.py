"""Upscaling: by four, by two in latents, or to any size for images with depth."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.generate.option_parsers import parse_fraction, parse_natural, parse_size
from ldm.generate.options import option
from ldm.generate.request import Request
from ldm.generate.tasks.base import PreparedTask, Task, drop_prompt_options
from ldm.generate.tasks.images import FolderInputs, PreparedImageTask
from ldm.runtime.errors import ArgumentError
from ldm.runtime.ranks import get_rank_and_world_size

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import LatentDiffusion
    from ldm.pipelines.options import TaskOptions


@dataclass(frozen=True)
class UpscaleInputs(FolderInputs):
    """A small image or latent, or a folder of them, and the noise to add to it."""

    # fmt: off
    init_img: str | None = option(None, "--init-img", "--image", metavar="FILE", is_input_file=True,
        label="Image", help="input image, resized to --H x --W; for the x2 latent upscaler also a"
        " latent of --save-latents, or a folder of them, each to OUTDIR/NAME.png")
    noise_level: int = option(20, "--noise-level", parse=parse_natural, metavar="N", slider_max=350,
        label="Noise level (0 – 350)",
        help="timestep of the noise on the image, 0 to 350: more noise, more invented detail"
        " (default: %(default)s)")
    noise_sigma: float = option(0.0, "--noise-sigma", parse=parse_fraction, metavar="SIGMA",
        label="Noise on the latent (for x2)",
        help="for the x2 latent upscaler: noise on the small latent, 0 to 0.6: more noise, more"
        " invented detail (default: %(default)s)")
    noise_kind: str = option("gaussian", "--noise-kind", choices=("gaussian", "fake"),
        help="for the x2 latent upscaler: gaussian adds noise; fake only gives --noise-sigma to the"
        " network (default: %(default)s)")
    target_size: tuple[int, int] | None = option(None, "--target-size", parse=parse_size,
        metavar="H,W", label="Target size (H,W; for LDM3D-SR)",
        help="for LDM3D-SR: size of the result (default: twice that of the image)")
    # fmt: on

    @property
    def is_folder(self) -> bool:
        return super().is_folder or (self.init_img is not None and Path(self.init_img).is_dir())

    @property
    def is_latent(self) -> bool:
        """Whether the input is a latent file, or a folder, which must then contain latents."""
        from ldm.loading.files.latents import LATENT_SUFFIX

        path = None if self.init_img is None else Path(self.init_img)
        return path is not None and (path.suffix == LATENT_SUFFIX or path.is_dir())

    def split_by_image(self) -> Sequence[FolderInputs]:
        if self.indir is not None or self.init_img is None or not Path(self.init_img).is_dir():
            return super().split_by_image()
        from ldm.loading.files.latents import list_latents

        rank, world_size = get_rank_and_world_size()
        paths = list_latents(self.init_img)[rank::world_size]
        return [replace(self, init_img=str(path), indir=self.init_img) for path in paths]


class UpscaleTask(PreparedImageTask):
    """Upscaling of an image by four or two, or of an image with depth to any size."""

    def get_output_size(self, model: "LatentDiffusion") -> tuple[int, int]:
        from ldm.pipelines.families import find_family

        height, width = super().get_output_size(model)
        size = self.request.get_inputs(UpscaleInputs).target_size
        family = find_family(model.conditioner)
        if family == "rgbd-upscaling":
            return size or (2 * height, 2 * width)
        if size is not None:
            raise ArgumentError("only LDM3D-SR takes a target size", "target_size")
        if family == "latent-upscaling":
            return 2 * height, 2 * width
        return height * model.downscale_factor, width * model.downscale_factor

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        from ldm import pipelines
        from ldm.pipelines.families import find_family

        inputs, family = self.request.get_inputs(UpscaleInputs), find_family(model.conditioner)
        level = inputs.noise_level
        if family == "latent-upscaling":
            return pipelines.upscale_latent(
                model,
                prompts,
                self.image,
                noise_sigma=inputs.noise_sigma,
                noise_kind=inputs.noise_kind,
                **options,
            )
        if family == "rgbd-upscaling":
            image, depth = resize_with_depth(self.image, self.depth, self.get_output_size(model))
            return pipelines.upscale_rgbd(
                model, prompts, image, depth, noise_level=level, **options
            )
        if family == "super-resolution":
            unguided = drop_prompt_options(options)
            return pipelines.super_resolve(model, self.image, len(prompts), **unguided)
        return pipelines.upscale(model, prompts, self.image, noise_level=level, **options)


class UpscaleLatentTask(PreparedTask):
    """Upscaling of a latent file by two, without decoding it first."""

    def __init__(self, request: Request) -> None:
        from ldm.loading.files.latents import load_latent

        super().__init__(request)
        self.inputs = request.get_inputs(UpscaleInputs)
        values = request.get_values()
        for name in ("height", "width", "target_size", "depth"):
            if values[name] is not None:
                raise ArgumentError(f"a latent is doubled as it is, leave {name} out", name)
        self.latent = load_latent(self.inputs.init_img or "")

    def get_output_size(self, model: "LatentDiffusion") -> tuple[int, int]:
        from ldm.pipelines.families import find_family, quote_name

        if find_family(model.conditioner) != "latent-upscaling":
            raise ArgumentError(
                f"{quote_name(model)} upscales images: only the x2 latent upscaler takes latents",
                "init_img",
            )
        self.latent.normalize(model)  # raises ArgumentError
        height, width = self.latent.latent.shape[-2:]
        return 2 * height * model.downscale_factor, 2 * width * model.downscale_factor

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        from ldm import pipelines

        return pipelines.upscale_latent(
            model,
            prompts,
            latent=self.latent.normalize(model),
            noise_sigma=self.inputs.noise_sigma,
            noise_kind=self.inputs.noise_kind,
            **options,
        )


def prepare_task(request: Request) -> PreparedTask:
    """Prepare the task for the input: an image or a latent."""
    if request.get_inputs(UpscaleInputs).is_latent:
        return UpscaleLatentTask(request)
    return UpscaleTask(request)


def resize_with_depth(
    image: "Tensor", depth: "Tensor | None", size: tuple[int, int]
) -> "tuple[Tensor, Tensor | None]":
    """Resize an image, in 8 bits, and its depth to (height, width) by Lanczos."""
    import numpy as np
    import torch
    from PIL import Image

    from ldm.imaging.pixels import resize_to, to_pil, to_tensor

    resized = to_tensor(resize_to(to_pil(image)[0], size, "stretch"))
    if depth is None:
        return resized, None
    resized_depth = resize_to(Image.fromarray(depth[0, 0].numpy()), size, "stretch")
    return resized, torch.tensor(np.asarray(resized_depth))[None, None].clamp(0, 1)


TASK = Task(
    name="upscale",
    title="Upscale",
    summary="""Upscale an image by four, or latents by two.

    ldm upscale --ckpt x4-upscaler-ema.safetensors --init-img small.png --prompt "a white cat"

The x4 upscaler samples and decodes large images in overlapping tiles of --vae-tile pixels of the
result (--unet-tile for the UNet alone). The x2 latent upscaler takes autoencoder and text encoder
from its diffusers folder, or from a checkpoint of Stable Diffusion 1:

    ldm upscale --ckpt sd-x2-latent-upscaler --text-encoder sd-v1-5 --init-img photo.png

It also takes latents of `ldm txt2img --save-latents`, a file or a folder of them:

    ldm upscale --ckpt sd-x2-latent-upscaler --text-encoder sd-v1-5 \\
        --init-img outputs/txt2img-samples/samples

LDM3D-SR upscales an image with its depth:

    ldm upscale --ckpt hf:Intel/ldm3d-sr --init-img a.png --depth a_depth.png \\
        --target-size 1024,1024

The super-resolution model of latent-diffusion enlarges by four without a prompt:

    ldm upscale --ckpt models/ldm/bsr_sr --init-img small.png
""",
    inputs=UpscaleInputs,
    prepare=prepare_task,
    families=("upscaling", "latent-upscaling", "rgbd-upscaling", "super-resolution"),
    defaults={
        "prompt": "a high quality professional photograph",
        "outdir": "outputs/upscale-samples",
        "n_samples": 1,
        "n_iter": 1,
    },
    demo_model="checkpoints/demo-upscaler.safetensors",
    example_flags="--ckpt sd-x4-upscaler",
    uses_numpy_noise=True,
    upscales=True,
)
