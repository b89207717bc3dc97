"""Measure how well the shipped models inpaint and upscale images that they were not trained on.

    python examples/emoji/evaluate_tasks.py inpaint --data data/emoji
    python examples/emoji/evaluate_tasks.py upscale --data data/emoji-512

Held-out images are masked, or downscaled by 4, and restored by a model and by simple baselines. A
table is printed; OUT/TASK.png shows inputs, results and originals.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.data.drawings import EmojiTransform
from ldm.data.folder import ImageFolder
from ldm.encoders.concat_images import mask_image
from ldm.imaging import pixels
from ldm.loading.load import load
from ldm.model import LatentDiffusion
from ldm.pipelines import inpaint, upscale
from ldm.runtime.files import find_file

NUM_GRID_ROWS = 12  # of OUT/TASK.png

Sample = dict[str, Any]
Images = dict[str, Tensor]  # by name, (1, 3, H, W) each


@dataclass(frozen=True)
class Task:
    """Settings of a task: checkpoint, guidance scale, and keyword arguments of EmojiTransform."""

    checkpoint: str
    scale: float
    transform_options: dict[str, Any]


TASKS = {
    "inpaint": Task(
        "checkpoints/demo-inpainting.safetensors",
        3.0,
        {"conditions": {"mask": {"full_probability": 0.0}}},
    ),
    "upscale": Task(
        "checkpoints/demo-upscaler.safetensors",
        1.0,
        {"size": 512, "conditions": {"lr": {"factor": 4}}},
    ),
}


@dataclass(frozen=True)
class Quality:
    """Mean quality of the images of one method.

    Attributes:
        count: Number of images.
        psnr: PSNR of the pixels to restore, in decibels.
        edge_error: Mean error of the differences between neighboring pixels, relative to the mean
            difference in the original.
        contrast: Mean difference between neighboring pixels, relative to the original's.
    """

    count: int
    psnr: float
    edge_error: float
    contrast: float


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="the dataset")
    parser.add_argument("--ckpt", help="weights (default: the shipped model's)")
    parser.add_argument("--count", type=int, default=100, help="largest number of images")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--scale", type=float, help="guidance scale (default: by task)")
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluation"), help="folder")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count must be 1 or more, got {args.count}")
    task = TASKS[args.task]
    transform = EmojiTransform(**task.transform_options)
    folder = ImageFolder(root=args.data, split="heldout", transform=transform)
    step = max(1, len(folder) // args.count)
    indices = range(0, step * min(args.count, len(folder)), step)
    samples = (folder[0, index] for index in tqdm(indices, unit="image"))
    model = load(ckpt=args.ckpt or find_file(task.checkpoint))
    scale = task.scale if args.scale is None else args.scale
    options = {"steps": args.steps, "scale": scale, "seeds": 42}
    if args.task == "inpaint":
        qualities, images = compare_inpainting(model, load(), samples, **options)
    else:
        qualities, images = compare_upscaling(model, samples, **options)
    rows = [torch.cat(list(by_name.values())) for by_name in images[:NUM_GRID_ROWS]]
    args.out.mkdir(parents=True, exist_ok=True)
    grid = pixels.make_grid(pixels.to_pil(torch.cat(rows)), len(rows[0]))
    grid.save(args.out / f"{args.task}.png")
    print(format_table(qualities))


def compare_inpainting(
    model: LatentDiffusion, text_model: LatentDiffusion, samples: Iterable[Sample], **options: Any
) -> tuple[dict[str, Quality], list[Images]]:
    """Inpaint by `model`, by a text-to-image model, and by the mean of the unmasked pixels.

    Args:
        samples: Samples with `jpg`, `mask` and `txt`.
        options: Keyword arguments of `inpaint`.

    Returns:
        Quality by method, and the images of each sample by name.
    """

    def restore(sample: Sample) -> Images:
        image, mask = sample["jpg"][None], sample["mask"][None]  # (1, 3, H, W), (1, 1, H, W)
        mean = (image * (1 - mask)).sum((2, 3), keepdim=True) / (1 - mask).sum().clamp(min=1)
        return {
            "input": mask_image(image, mask),
            "mean of the rest": torch.lerp(image, mean.expand_as(image), mask),
            "inpainting model": inpaint(model, [sample["txt"]], image, mask, **options),
            "text-to-image model": inpaint(text_model, [sample["txt"]], image, mask, **options),
        }

    return _compare(restore, samples)


def compare_upscaling(
    model: LatentDiffusion, samples: Iterable[Sample], **options: Any
) -> tuple[dict[str, Quality], list[Images]]:
    """Upscale `lr` of the samples by 4, by `model` and by bicubic interpolation.

    Args:
        samples: Samples with `jpg`, `lr` and `txt`.
        options: Keyword arguments of `upscale`.

    Returns:
        See `compare_inpainting`.
    """

    def restore(sample: Sample) -> Images:
        low_res, size = sample["lr"][None], sample["jpg"].shape[-2:]
        return {
            "input": F.interpolate(low_res, size),
            "bicubic": F.interpolate(low_res, size, mode="bicubic").clamp(-1, 1),
            "upscaler": upscale(model, [sample["txt"]], low_res, **options),
        }

    return _compare(restore, samples)


def format_table(qualities: dict[str, Quality]) -> str:
    """Format qualities as a Markdown table."""
    lines = ["| method | n | PSNR | edge error | contrast |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {q.count} | {q.psnr:.1f} dB | {q.edge_error:.2f} | {q.contrast:.2f} |"
        for name, q in qualities.items()
    ]
    return "\n".join(lines)


def _compare(
    restore: Callable[[Sample], Images], samples: Iterable[Sample]
) -> tuple[dict[str, Quality], list[Images]]:
    """Restore all samples, and measure the quality of each method; see `compare_inpainting`."""
    all_images: list[Images] = []
    sums: dict[str, Tensor] = {}
    for sample in samples:
        original = sample["jpg"][None]  # (1, 3, H, W)
        mask = sample.get("mask", torch.ones_like(original[0, :1]))[None]
        images = restore(sample)
        all_images.append({**images, "original": original})
        for name, image in images.items():
            if name != "input":
                terms = _compute_quality_terms(image, original, mask)
                sums[name] = sums.get(name, torch.zeros(5)) + terms
    return {name: _compute_quality(total) for name, total in sums.items()}, all_images


def _compute_quality_terms(image: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Return what `_compute_quality` needs of an image, as five numbers to sum over images.

    These are 1, the mean squared error, and for edges (differences of neighboring pixels) the sums
    of absolute errors, of absolute values, and of absolute values in the original.
    """
    mse = ((image - original).square() * mask).sum() / (3 * mask.sum())
    edges, original_edges = ([x.diff(dim=d) for d in (2, 3)] for x in (image, original))
    edge_pairs = zip(edges, original_edges, strict=True)
    edge_error = sum(float((a - b).abs().sum()) for a, b in edge_pairs)
    sums = (sum(float(x.abs().sum()) for x in tensors) for tensors in (edges, original_edges))
    return torch.tensor([1.0, float(mse), edge_error, *sums])


def _compute_quality(sums: Tensor) -> Quality:
    count, mse, edge_error, edges, original_edges = sums.tolist()
    psnr = 10 * torch.log10(torch.tensor(4 * count / mse))  # the range of values is 2
    return Quality(int(count), float(psnr), edge_error / original_edges, edges / original_edges)


if __name__ == "__main__":
    main()
