"""Measure how well the demo model follows prompts, and write a table and a grid of images.

    python examples/emoji/make_emoji_data.py data/emoji --objects 300
    python examples/emoji/evaluate_demo.py --data data/emoji

Prompts name an object, a style and a random background, for trained and for held-out pairs of
object and style. The first run trains the classifiers on real images, which takes a few minutes.
"""

import argparse
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from classifiers import WEIGHTS_PATH, EmojiClassifiers, Gallery
from ldm.data.drawings import BACKGROUND_COLORS, EmojiTransform, format_caption
from ldm.data.folder import ImageFolder
from ldm.imaging import pixels
from ldm.loading.load import load
from ldm.model import LatentDiffusion
from ldm.pipelines import txt2img

# Styles with nearly the same drawings: a held-out drawing is easy to guess from the others.
SIMILAR_STYLES = ("flat", "soft gradient", "3d")

Prompt = dict[str, Any]  # a row of the metadata, with `color` and `prompt`


@dataclass(frozen=True)
class Scores:
    """Number of images, and for each property the fraction (0 … 1) of images that have it right."""

    count: int
    background: float
    style: float
    object: float
    object_top5: float
    all_three: float
    nearest_style: float
    nearest_object: float


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="the dataset")
    parser.add_argument("--config", help="config (default: the demo model's)")
    parser.add_argument("--ckpt", help="weights (default: the demo model's)")
    parser.add_argument("--seen", type=int, default=400, help="prompts of trained pairs")
    parser.add_argument("--heldout", type=int, default=370, help="prompts of held-out pairs")
    parser.add_argument(
        "--objects", type=int, default=300, help="objects that the model was trained on"
    )
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale")
    parser.add_argument(
        "--classifiers", type=Path, default=WEIGHTS_PATH, help="weights of the classifiers"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluation"), help="folder")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = ImageFolder(root=args.data, transform=EmojiTransform())
    objects = sorted({row["object"] for row in folder.rows if row["rank"] < args.objects})
    classifiers = EmojiClassifiers.load_or_train(folder, args.classifiers, objects=objects)
    model = load(args.config, args.ckpt)
    groups = {
        "seen pairs": make_prompts(folder, "train", objects, args.seen),
        "held-out pairs": make_prompts(folder, "heldout", objects, args.heldout),
    }
    with tqdm(total=sum(map(len, groups.values())), unit="image") as bar:
        options = {"steps": args.steps, "scale": args.scale, "on_batch": bar.update}
        scores, images = evaluate(model, folder, classifiers, groups, **options)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(format_table(scores) + "\n", encoding="utf-8")
    grid = pixels.make_grid(pixels.to_pil(images["held-out pairs"][:64]), 8)
    grid.save(args.out / "held-out.png")
    print(format_table(scores))


def evaluate(
    model: LatentDiffusion,
    folder: ImageFolder,
    classifiers: EmojiClassifiers,
    groups: dict[str, list[Prompt]],
    **options: Any,
) -> tuple[dict[str, Scores], dict[str, Tensor]]:
    """Generate images of all prompts, and score them and three controls.

    The controls are real images, their reconstructions by the autoencoder (an upper bound for any
    UNet), and the generated images with shuffled prompts.

    Args:
        groups: Prompts by name of the group, see `make_prompts`.
        options: Keyword arguments of `generate`.

    Returns:
        Scores by name, and the generated images of each group.
    """
    scores, images = {}, {}
    score_images = partial(compute_scores, classifiers, Gallery(folder, classifiers.objects))
    for name, prompts in groups.items():
        real = load_real_images(folder, prompts)
        scores[f"{name}: real"] = score_images(real, prompts)
        reconstructions = _reconstruct(model, real)
        scores[f"{name}: real, through the autoencoder"] = score_images(reconstructions, prompts)
        images[name] = generate(model, prompts, **options)
        scores[f"{name}: generated"] = score_images(images[name], prompts)
        distinct = [k for k, row in enumerate(prompts) if row["style"] not in SIMILAR_STYLES]
        scores[f"{name}: generated, without {', '.join(SIMILAR_STYLES)}"] = score_images(
            images[name][distinct], [prompts[k] for k in distinct]
        )
        scores[f"{name}: generated, prompts shuffled"] = score_images(
            images[name], derange(prompts)
        )
    return scores, images


def make_prompts(
    folder: ImageFolder,
    split: str,
    objects: Collection[str] | None = None,
    count: int | None = None,
    *,
    seed: int = 0,
) -> list[Prompt]:
    """Return rows of a split, each with a random `color` and the `prompt` added.

    Args:
        objects: Names of the objects; None = all.
        count: Number of rows, which are drawn at random; None = all rows.
    """
    rng = Random(seed)
    rows = [row for row in folder.rows if row["split"] == split]
    rows = [row for row in rows if objects is None or row["object"] in objects]
    if count is not None and count < len(rows):
        rows = rng.sample(rows, count)
    prompts = []
    for row in rows:
        color = rng.choice(list(BACKGROUND_COLORS))
        text = format_caption(row["object"], row["style"], color)
        prompts.append({**row, "color": color, "prompt": text})
    return prompts


def generate(
    model: LatentDiffusion,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 25,
    on_batch: Callable[[int], Any] | None = None,
    **options: Any,
) -> Tensor:
    """Generate an image of each prompt, the k-th with seed k: (N, 3, H, W).

    Args:
        on_batch: Called after each batch with its number of images.
        options: Keyword arguments of `txt2img`: steps, scale, sampler …
    """
    images = []
    for start in range(0, len(prompts), batch_size):
        texts = [row["prompt"] for row in prompts[start : start + batch_size]]
        seeds = list(range(start, start + len(texts)))
        images.append(txt2img(model, texts, seeds=seeds, **options).cpu())
        if on_batch:
            on_batch(len(texts))
    return torch.cat(images)


def load_real_images(folder: ImageFolder, prompts: Sequence[Prompt], *, seed: int = 0) -> Tensor:
    """Load the real images of the prompts, transformed as in training: (N, 3, H, W)."""
    assert isinstance(folder.transform, EmojiTransform), "classifiers are trained on emoji only"
    indices = {row["file_name"]: k for k, row in enumerate(folder.rows)}
    rng = Random(seed)
    images = []
    for row in prompts:
        image = folder.load(indices[row["file_name"]])["image"]
        images.append(folder.transform.make_image_fields(image, rng, row["color"])["jpg"])
    return torch.stack(images)


def compute_scores(
    classifiers: EmojiClassifiers, gallery: Gallery, images: Tensor, prompts: Sequence[Prompt]
) -> Scores:
    """Measure how many of the images show what their prompts ask for."""
    has_color, has_style, matches = classifiers.compare_with_prompts(images, prompts)
    has_object, has_object_in_top5 = matches[:, 0], matches[:, :5].any(dim=1)
    nearest_has_object, nearest_has_style = gallery.match_nearest(images, prompts)
    has_all = has_color & has_style & has_object
    checks = (has_color, has_style, has_object, has_object_in_top5, has_all)
    checks += (nearest_has_style, nearest_has_object)
    return Scores(len(prompts), *(float(check.float().mean()) for check in checks))


def derange(prompts: Sequence[Prompt], *, seed: int = 0) -> list[Prompt]:
    """Return the prompts in a random order in which none stays at its position."""
    cycle = list(prompts)
    Random(seed).shuffle(cycle)
    positions = {id(row): k for k, row in enumerate(cycle)}
    return [cycle[(positions[id(row)] + 1) % len(cycle)] for row in prompts]


def format_table(scores: dict[str, Scores]) -> str:
    """Format scores as a Markdown table."""
    lines = [
        "| images | n | background | style | object | object in top 5 | all three "
        "| nearest drawing: style | object |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in scores.items():
        cells = " | ".join(f"{100 * fraction:.1f} %" for fraction in astuple(row)[1:])
        lines.append(f"| {name} | {row.count} | {cells} |")
    return "\n".join(lines)


@torch.inference_mode()
def _reconstruct(model: LatentDiffusion, images: Tensor) -> Tensor:
    autoencoder = model.autoencoder
    batches = [autoencoder.decode(autoencoder.encode(x).mode()) for x in images.split(16)]
    return torch.cat(batches).clamp(-1, 1)


if __name__ == "__main__":
    main()
