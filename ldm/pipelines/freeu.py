"""FreeU for a model: assign its factors to the output blocks of the UNet."""

from collections.abc import Sequence

from ldm.diffusion.names import FREEU_VERSIONS, FreeUFactors
from ldm.model import LatentDiffusion
from ldm.nets.freeu import FreeU
from ldm.nets.unet import UNet
from ldm.pipelines.families import is_sdxl, quote_name
from ldm.runtime.errors import ArgumentError, check_name

__all__ = ["make_freeu", "resolve_freeu_factors"]


def resolve_freeu_factors(
    model: LatentDiffusion, freeu: str | Sequence[float] | FreeUFactors
) -> FreeUFactors:
    """Return the factors, or those of a preset; "auto" is the preset of the model's family."""
    text = model.conditioner.text
    sd_version = 1 if text is None else text.sd_version or 1
    return FreeUFactors.parse(freeu, "sdxl" if is_sdxl(model) else f"sd{sd_version}")


def make_freeu(
    model: LatentDiffusion,
    freeu: str | Sequence[float] | FreeUFactors,
    version: str | None = None,
) -> FreeU:
    """Build FreeU with the factors of each output block of the model's UNet.

    Args:
        version: A name in FREEU_VERSIONS; None = "1".
    """
    factors, version = resolve_freeu_factors(model, freeu), version or "1"
    check_name("version of freeu", version, FREEU_VERSIONS, argument="freeu_version")
    unet = model.unet
    if not isinstance(unet, UNet):
        raise ArgumentError("freeu is not for the x2 latent upscaler", "freeu")
    first, second = (factors.b1, factors.s1), (factors.b2, factors.s2)
    if version == "diffusers":
        keys = [level for level, _ in unet.output_block_inputs]
        factors_by_key = {0: first, 1: second}
    else:
        keys = [channels for _, channels in unet.output_block_inputs]
        factors_by_key = {4 * unet.model_channels: first, 2 * unet.model_channels: second}
    factors_by_block = [factors_by_key.get(key) for key in keys]
    if not any(factors_by_block):
        raise ArgumentError(
            f"freeu has no effect on the UNet of {quote_name(model)}, whose output blocks take "
            f"{sorted(set(keys))} channels: it changes those with {sorted(factors_by_key)}",
            "freeu",
        )
    return FreeU(factors_by_block, is_version_2=version == "2")
