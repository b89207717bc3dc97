"""Tasks of latent-diffusion's models other than text to image and inpainting.

class2img         class labels            class-conditional models
uncond2img        nothing                 unconditional models
semantic2img      segmentation map        semantic synthesis models
layout2img        boxes of objects        layout models
super_resolve     low-res image           super-resolution models
knn2img           CLIP embeddings         retrieval-augmented models
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ldm.conditioning import Cond
from ldm.diffusion.guidance import GuidanceScale
from ldm.encoders.bert import BERTText
from ldm.encoders.boxes import NUM_TOKENS, tokenize_boxes
from ldm.encoders.concat_images import SpatialRescaler
from ldm.encoders.labels import ClassEmbedder
from ldm.model import LatentDiffusion
from ldm.nets.unet import UNet
from ldm.pipelines.families import quote_name
from ldm.pipelines.images import decode_latent
from ldm.pipelines.options import UnguidedOptions, select_sampling_options
from ldm.pipelines.quirks import make_noise_source
from ldm.pipelines.sampling import sample
from ldm.pipelines.sampling_options import get_default_scale, get_latent_shape, needs_uncond
from ldm.pipelines.task import task
from ldm.runtime.errors import ArgumentError
from ldm.runtime.warn import warn_caller

__all__ = ["class2img", "knn2img", "layout2img", "semantic2img", "super_resolve", "uncond2img"]

DEFAULT_TILE_SIDE = 128  # latent pixels in a tile of the original's super-resolution


@task("class")
def class2img(
    model: LatentDiffusion,
    classes: Sequence[int],
    *,
    unconditional_class: int | None = None,
    scale: GuidanceScale | None = None,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    **options: Unpack[UnguidedOptions],
) -> Tensor:
    """Make one image per class.

    Args:
        classes: The class label of each image, from 0.
        unconditional_class: The class label of the unconditional prediction, for guidance; None =
            that of the model, which models with 1,001 classes have.
        scale: Guidance scale; 1 = no guidance, None = the model's default.
        size, tile, options: See `txt2img`.
    """
    embedder = model.conditioner.get(ClassEmbedder)
    scale = get_default_scale(model, options.get("sampler")) if scale is None else scale
    _check_classes(model, embedder, classes, "classes")
    if unconditional_class is not None:
        _check_classes(model, embedder, [unconditional_class], "unconditional_class")
    uncond = None
    if needs_uncond(model, options.get("sampler"), scale):
        label = embedder.null if unconditional_class is None else unconditional_class
        if not isinstance(label, int):
            raise ArgumentError(
                f"{quote_name(model)} has no unconditional class: guidance needs "
                "unconditional_class, or scale 1",
                "unconditional_class",
            )
        uncond = _embed_classes(model, embedder, [label] * len(classes))
    elif unconditional_class is not None:
        warn_caller("unconditional_class has no effect without guidance")
    cond = _embed_classes(model, embedder, classes)
    return _sample_and_decode(model, cond, uncond, len(classes), scale, size, tile, options)


@task("unconditional")
def uncond2img(
    model: LatentDiffusion,
    n: int = 1,
    *,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    **options: Unpack[UnguidedOptions],
) -> Tensor:
    """Make n images.

    Args:
        n: Number of images.
        size, tile, options: See `txt2img`.
    """
    return _sample_and_decode(model, model.condition({}), None, n, 1.0, size, tile, options)


@task("semantic")
def semantic2img(
    model: LatentDiffusion,
    segmentation: Tensor,
    n: int = 1,
    *,
    tile: int | None = None,
    **options: Unpack[UnguidedOptions],
) -> Tensor:
    """Make n images from a segmentation map.

    Args:
        segmentation: The class of each pixel, from 0, (1, 1, H, W) int64; the images have its size.
        n: Number of images.
        tile, options: See `txt2img`.
    """
    encoder = model.conditioner.get(SpatialRescaler)
    num_classes, multiple = encoder.in_channels, model.size_multiple
    height, width = segmentation.shape[-2:]
    is_map = segmentation.shape[:2] == (1, 1) and not segmentation.is_floating_point()
    if not is_map or height % multiple or width % multiple:
        allowed = f"a tensor (1, 1, H, W) of integers, H and W multiples of {multiple}"
        message = f"segmentation must be {allowed}, got a tensor {tuple(segmentation.shape)}"
        raise ArgumentError(message, "segmentation")
    lowest, highest = (int(value) for value in segmentation.aminmax())
    if lowest < 0 or highest >= num_classes:
        message = f"classes of {quote_name(model)} are 0 … {num_classes - 1}"
        raise ArgumentError(f"{message}, got {lowest} … {highest}", "segmentation")
    one_hot = F.one_hot(segmentation[:, 0].long(), num_classes).movedim(-1, 1)  # (1, K, H, W)
    cond = model.condition({encoder.key: one_hot.to(model.device, model.dtype)}).repeat(n)
    return _sample_and_decode(model, cond, None, n, 1.0, (height, width), tile, options)


@task("layout")
def layout2img(
    model: LatentDiffusion,
    boxes: Sequence[Sequence[float]],
    n: int = 1,
    *,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    **options: Unpack[UnguidedOptions],
) -> Tensor:
    """Make n images with objects in boxes.

    Args:
        boxes: (category, left, top, width, height) of each object, the last four as fractions of
            the image's sides; at most 30 in published models.
        n: Number of images.
        size, tile, options: See `txt2img`.
    """
    encoder = model.conditioner.get(BERTText)
    vocab_size = encoder.transformer.token_emb.num_embeddings
    if vocab_size < NUM_TOKENS:
        message = f"{quote_name(model)} has {vocab_size} tokens, boxes need {NUM_TOKENS}"
        raise ArgumentError(message, "model")
    tokens = tokenize_boxes(boxes, encoder.length)
    cond = model.condition({encoder.key: tokens}).repeat(n)
    return _sample_and_decode(model, cond, None, n, 1.0, size, tile, options)


@task("super-resolution")
def super_resolve(
    model: LatentDiffusion,
    image: Tensor,
    n: int = 1,
    *,
    tile: int | None = None,
    **options: Unpack[UnguidedOptions],
) -> Tensor:
    """Enlarge an image by the factor of the autoencoder (4), n times with different noise.

    Args:
        image: (1, 3, h, w) in [-1, 1].
        n: Number of images.
        tile: Side of overlapping tiles in pixels of the input: the decoder's, and the UNet's
            unless `unet_tile` is given; None = 128.
        options: See `txt2img`.
    """
    (key,) = model.conditioner.keys
    tile = DEFAULT_TILE_SIDE if tile is None else tile
    if options.get("unet_tile") is None:
        options["unet_tile"] = tile
    cond = model.condition({key: image.to(model.device, model.dtype)}).repeat(n)
    height, width = (side * model.downscale_factor for side in image.shape[-2:])
    return _sample_and_decode(model, cond, None, n, 1.0, (height, width), tile, options)


@task("retrieval")
def knn2img(
    model: LatentDiffusion,
    embeddings: Sequence[Tensor],
    *,
    scale: GuidanceScale | None = None,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    **options: Unpack[UnguidedOptions],
) -> Tensor:
    """Make one image per set of CLIP embeddings.

    Args:
        embeddings: Of each image, (N, D): embeddings of the prompt and of its neighbors, see
            `ldm.pipelines.retrieval`; a tensor (B, N, D). They are normalized here.
        scale: Guidance scale; the unconditional context is all zeros; 1 = no guidance, None = the
            model's default.
        size, tile, options: See `txt2img`.
    """
    scale = get_default_scale(model, options.get("sampler")) if scale is None else scale
    context = F.normalize(torch.stack([*embeddings]).to(model.device, torch.float32), dim=-1)
    assert isinstance(model.unet, UNet)
    if context.dim() != 3 or context.shape[-1] != model.unet.context_dim:
        message = f"embeddings must be tensors (N, {model.unet.context_dim}) for each image"
        raise ArgumentError(f"{message}, got {tuple(context.shape)}", "embeddings")
    (key,) = model.conditioner.keys
    cond = model.condition({key: context})  # (B, N, D)
    is_guided = needs_uncond(model, options.get("sampler"), scale)
    uncond = Cond(crossattn=torch.zeros_like(context)) if is_guided else None
    return _sample_and_decode(model, cond, uncond, len(context), scale, size, tile, options)


def _check_classes(
    model: LatentDiffusion, embedder: ClassEmbedder, classes: Sequence[int], argument: str
) -> None:
    """Raise ArgumentError for labels that a class-conditional model does not have."""
    num_classes = embedder.embedding.num_embeddings
    for label in classes:
        if not 0 <= label < num_classes:
            message = f"classes of {quote_name(model)} are 0 … {num_classes - 1}, got {label}"
            raise ArgumentError(message, argument)


def _embed_classes(model: LatentDiffusion, embedder: ClassEmbedder, classes: Sequence[int]) -> Cond:
    return model.condition({embedder.key: torch.tensor([*classes], device=model.device)})


def _sample_and_decode(
    model: LatentDiffusion,
    cond: Cond,
    uncond: Cond | None,
    n: int,
    scale: GuidanceScale,
    size: tuple[int, int] | None,
    tile: int | None,
    options: UnguidedOptions,
) -> Tensor:
    sampling = select_sampling_options(options)
    noise_source = make_noise_source(options.get("seeds"), n, options.get("legacy", ()))
    if sampling.get("x_T") is None:
        shape = get_latent_shape(model, n, size)
        sampling["x_T"] = noise_source(torch.empty(shape, device=model.device))
    z = sample(model, cond, uncond, scale=scale, size=size, noise_source=noise_source, **sampling)
    return decode_latent(model, z, tile, options.get("on_latent"))
