"""How well the small models of inpainting and upscaling do, beside what needs no such model.

Held-out pictures are damaged (a hole, a quarter of the size), mended in several ways and compared
with what they were.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.encoders.lowres import hole
from ldm.model import LatentDiffusion
from ldm.pipelines import inpaint, upscale

__all__ = ["Quality", "inpainting", "table", "upscaling"]

Samples = Iterable[dict[str, Any]]
Mended = dict[str, Tensor]


@dataclass(frozen=True)
class Quality:
    """Of one way of mending, over all pictures.

    psnr: of what was damaged, decibels. edges: mean error of differences between neighbouring
    pixels, as a share of their mean size. contrast: mean size of those differences, 1 = as it was.
    """

    count: int
    psnr: float
    edges: float
    contrast: float


def inpainting(
    model: LatentDiffusion, text_model: LatentDiffusion, samples: Samples, **options: Any
) -> tuple[dict[str, Quality], list[Mended]]:
    """The hole filled by `model`, by a text-to-image model, and with the mean of what is known.

    samples: with `jpg`, `mask` and `txt`. options: those of `inpaint`.
    """

    def mend(sample: dict[str, Any]) -> Mended:
        image, mask = sample["jpg"][None], sample["mask"][None]  # (1, 3, H, W), (1, 1, H, W)
        made = {
            name: inpaint(m, [sample["txt"]], image, mask, **options)
            for name, m in (("inpainting model", model), ("text-to-image model", text_model))
        }
        mean = (image * (1 - mask)).sum((2, 3), keepdim=True) / (1 - mask).sum().clamp(min=1)
        plain = torch.lerp(image, mean.expand_as(image), mask)
        return {"input": hole(image, mask), "mean of the rest": plain, **made}

    return _compared(mend, samples)


def upscaling(
    model: LatentDiffusion, samples: Samples, **options: Any
) -> tuple[dict[str, Quality], list[Mended]]:
    """The small picture enlarged four times by `model`, and by bicubic interpolation.

    samples: with `jpg`, `lr` and `txt`. options: those of `upscale`.
    """

    def mend(sample: dict[str, Any]) -> Mended:
        small, size = sample["lr"][None], sample["jpg"].shape[-2:]
        bicubic = F.interpolate(small, size, mode="bicubic").clamp(-1, 1)
        nearest = F.interpolate(small, size)
        made = upscale(model, [sample["txt"]], small, **options)
        return {"input": nearest, "bicubic": bicubic, "upscaler": made}

    return _compared(mend, samples)


def table(qualities: dict[str, Quality]) -> str:
    """A Markdown table."""
    lines = ["| mended by | n | PSNR | edge error | contrast |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {q.count} | {q.psnr:.1f} dB | {q.edges:.2f} | {q.contrast:.2f} |"
        for name, q in qualities.items()
    ]
    return "\n".join(lines)


def _compared(
    mend: Callable[[dict[str, Any]], Mended], samples: Samples
) -> tuple[dict[str, Quality], list[Mended]]:
    shown: list[Mended] = []
    sums: dict[str, Tensor] = {}
    for sample in samples:
        image = sample["jpg"][None]  # (1, 3, H, W)
        where = sample.get("mask", torch.ones_like(image[0, :1]))[None]
        mended = mend(sample)
        shown.append({**mended, "original": image})
        for name, made in list(mended.items())[1:]:
            sums[name] = sums.get(name, torch.zeros(5)) + _errors(made, image, where)
    return {name: _quality(total) for name, total in sums.items()}, shown


def _errors(made: Tensor, image: Tensor, where: Tensor) -> Tensor:
    """Of one picture: 1, mean squared error, error of edges, edges made, edges that were."""
    square = ((made - image).square() * where).sum() / (3 * where.sum())
    wrong = sum((made.diff(dim=d) - image.diff(dim=d)).abs().sum() for d in (2, 3))
    made_size, size = (sum(x.diff(dim=d).abs().sum() for d in (2, 3)) for x in (made, image))
    return torch.tensor([1.0, float(square), float(wrong), float(made_size), float(size)])


def _quality(total: Tensor) -> Quality:
    count, square, wrong, made_size, size = total.tolist()
    psnr = 10 * torch.log10(torch.tensor(4 * count / square))
    return Quality(int(count), float(psnr), wrong / size, made_size / size)
