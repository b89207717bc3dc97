"""The frame of every task: is the model made for it, condition, sample, decode.

A task says which records it provides, an encoder which one it reads; so a model of another family
is told by comparing two sets, and the error names the script to use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion.guidance import Scale
from ldm.model import LatentDiffusion
from ldm.pipelines.sampling import Noise, noise_source, sample

__all__ = ["READS", "NonFinite", "WrongFamily", "check_family", "latent_of", "made", "reads"]

# The records that each task provides; what a model reads says which task it is for.
READS = {
    "txt2img": frozenset({"txt"}),
    "inpaint": frozenset({"txt", "masked"}),
    "depth2img": frozenset({"txt", "depth"}),
    "upscale": frozenset({"txt", "lowres", "noise_level"}),
    "unclip": frozenset({"txt", "embedding"}),
    "vary": frozenset({"jpg"}),
}
TITLES = {
    "txt2img": "a text-to-image model",
    "inpaint": "the inpainting model",
    "depth2img": "the depth model",
    "upscale": "the upscaling model",
    "unclip": "the unCLIP model",
    "vary": "the image variation model",
}
SCRIPTS = {"vary": "unclip"}
Checked = TypeVar("Checked", Tensor, Cond)


class NonFinite(ArithmeticError):
    """NaN or infinity came out of a stage of the model."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"{stage} gave values that are not finite")
        self.stage = stage


class WrongFamily(ValueError):
    """A model that another task is for."""


def check_family(model: LatentDiffusion, *tasks: str) -> None:
    """Raises WrongFamily, naming the script to use, unless one of the tasks feeds the model."""
    read = reads(model)
    if any(READS[task] == read for task in tasks):
        return
    fitting = next((task for task in READS if READS[task] == read), None)
    if fitting is None:
        names = ", ".join(f"`{key}`" for key in sorted(read)) or "nothing"
        raise WrongFamily(f"this model reads {names}, and no task here provides that")
    script = SCRIPTS.get(fitting, fitting)
    raise WrongFamily(f"this is {TITLES[fitting]}: use scripts/{script}.py")


def reads(model: LatentDiffusion) -> frozenset[str]:
    return model.conditioner.keys


def made(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative: str | Sequence[str],
    records: Mapping[str, Any],
    scale: Scale,
    tile: int | None,
    *,
    without: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Conditions, sampling, decoding: what all tasks that read text share.

    records: what the model reads beside text, for every row.
    without: what of that differs where guidance steers away from.
    """
    prompts = listed(prompts)
    uncond = None
    if scale != 1:
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
            n, m = len(negatives), len(prompts)
            raise ValueError(f"{n} negative prompts were given for {m} images")
        uncond = condition(model, negatives, {**records, **(without or {})})
    cond = finite(condition(model, prompts, records), "the text encoder")
    z = sample(model, cond, uncond, scale=scale, **options)
    return decoded(model, z, tile)


def condition(model: LatentDiffusion, texts: Sequence[str], records: Mapping[str, Any]) -> Cond:
    """The condition of the rows; a text that several share is encoded once."""
    different = list(dict.fromkeys(texts))
    cond = model.condition({"txt": different, **records})
    if cond.crossattn is None or len(different) == len(texts):
        return cond
    rows = torch.tensor([different.index(text) for text in texts], device=cond.crossattn.device)
    return replace(cond, crossattn=cond.crossattn[rows])


def decoded(model: LatentDiffusion, z: Tensor, tile: int | None) -> Tensor:
    return finite(model.decode(finite(z, "the UNet"), tile=tile), "the VAE").clamp(-1, 1)


@torch.no_grad()
def latent_of(model: LatentDiffusion, image: Tensor, n: int, noise: Noise) -> Tensor:
    """n draws of the latent of one picture (1, 3, H, W), padded to whole latent pixels."""
    image = padded(image.to(model.device), model.downscale)
    posterior = model.autoencoder.encode(image)
    mean = posterior.mean.float().expand(n, -1, -1, -1)
    drawn = noise(torch.empty(mean.shape, device=mean.device))
    return finite((mean + posterior.std.float() * drawn) * model.scale_factor, "the VAE")


def seeded(options: dict[str, Any], prompts: Sequence[str]) -> Noise:
    """The source of all noise of a task, which `sample` then goes on with."""
    n, legacy = len(listed(prompts)), options.get("legacy", ())
    options["seeds"] = noise = noise_source(options.get("seeds"), n, legacy)
    return noise


def listed(prompts: Sequence[str]) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts)


def padded(image: Tensor, multiple: int) -> Tensor:
    """The image (B, C, H, W) with its last row and column repeated up to multiples."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def cropped(wide: Tensor, image: Tensor) -> Tensor:
    """What `padded` added is cut off again."""
    return wide[..., : image.shape[-2], : image.shape[-1]]


def finite(value: Checked, stage: str) -> Checked:
    tensors = [value] if isinstance(value, Tensor) else value.filled().values()
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise NonFinite(stage)
    return value
