"""Measure how well the demo model follows prompts, and write a table and a grid of images.

    python examples/emoji/make_emoji_data.py data/emoji --objects 300
    python examples/emoji/evaluate_demo.py --data data/emoji

Prompts name an object, a style and a random background, for trained and for held-out pairs of
object and style. The first run trains the classifiers on real images, which takes some minutes.
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

from judges import Gallery, Judges
from ldm.data.drawings import COLORS, EmojiTransform, format_caption
from ldm.data.folder import ImageFolder
from ldm.imaging import pixels
from ldm.loading.load import load
from ldm.model import LatentDiffusion
from ldm.pipelines import txt2img

# Styles with nearly the same drawings: a held-out one of them is easy to guess.
SIMILAR_STYLES = ("flat", "soft gradient", "3d")

Prompt = dict[str, Any]  # a row of the metadata, with `color` and `prompt`


@dataclass(frozen=True)
class Score:
    """Number of images, and the fractions (0 … 1) of them that are right in each respect."""

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
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="the dataset")
    parser.add_argument("--config", help="config (default: of the demo model)")
    parser.add_argument("--ckpt", help="weights (default: the demo model's)")
    parser.add_argument("--seen", type=int, default=400, help="prompts of trained pairs")
    parser.add_argument("--heldout", type=int, default=370, help="prompts of held-out pairs")
    parser.add_argument(
        "--objects", type=int, default=300, help="objects that the model was trained on"
    )
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale")
    parser.add_argument("--judges", type=Path, default=Path("logs/judges.pt"), help="classifiers")
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluation"), help="folder")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = ImageFolder(root=args.data, transform=EmojiTransform())
    objects = sorted({row["object"] for row in folder.rows if row["rank"] < args.objects})
    judges = Judges.load_or_train(folder, args.judges, objects=objects)
    model = load(args.config, args.ckpt)
    groups = {
        "seen pairs": choose_prompts(folder, "train", objects, args.seen),
        "held-out pairs": choose_prompts(folder, "heldout", objects, args.heldout),
    }
    with tqdm(total=sum(map(len, groups.values())), unit="image") as bar:
        options = {"steps": args.steps, "scale": args.scale, "on_batch": bar.update}
        scores, images = evaluate(model, folder, judges, groups, **options)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(format_table(scores) + "\n", encoding="utf-8")
    grid = pixels.make_grid(pixels.to_pil(images["held-out pairs"][:64]), 8)
    grid.save(args.out / "held-out.png")
    print(format_table(scores))


def evaluate(
    model: LatentDiffusion,
    folder: ImageFolder,
    judges: Judges,
    groups: dict[str, list[Prompt]],
    **options: Any,
) -> tuple[dict[str, Score], dict[str, Tensor]]:
    """Generate images of all prompts, and score them and three controls.

    The controls are real images, their reconstructions by the autoencoder (the score of a perfect
    UNet), and the generated images with shuffled prompts.

    Args:
        groups: Prompts by name of the group, see `choose_prompts`.
        options: Keywords of `generate`.

    Returns:
        Scores by name, and the generated images of each group.
    """
    scores, images = {}, {}
    score_images = partial(score, judges, Gallery(folder, judges.objects))
    for name, prompts in groups.items():
        real = load_real_images(folder, prompts)
        scores[f"{name}: real"] = score_images(real, prompts)
        decoded = _reconstruct(model, real)
        scores[f"{name}: real, through the autoencoder"] = score_images(decoded, prompts)
        images[name] = generate(model, prompts, **options)
        scores[f"{name}: generated"] = score_images(images[name], prompts)
        distinct = [k for k, row in enumerate(prompts) if row["style"] not in SIMILAR_STYLES]
        scores[f"{name}: generated, without {', '.join(SIMILAR_STYLES)}"] = score_images(
            images[name][distinct], [prompts[k] for k in distinct]
        )
        scores[f"{name}: generated, prompts shuffled"] = score_images(
            images[name], shuffle(prompts)
        )
    return scores, images


def choose_prompts(
    folder: ImageFolder,
    split: str,
    objects: Collection[str] | None = None,
    count: int | None = None,
    *,
    seed: int = 0,
) -> list[Prompt]:
    """Choose rows of a split, and add a random `color` and the `prompt` to each.

    Args:
        objects: Names of the objects; None = all.
        count: Number of random rows; None = all.
    """
    rng = Random(seed)
    rows = [row for row in folder.rows if row["split"] == split]
    rows = [row for row in rows if objects is None or row["object"] in objects]
    if count is not None and count < len(rows):
        rows = rng.sample(rows, count)
    prompts = []
    for row in rows:
        color = rng.choice(list(COLORS))
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
        on_batch: Called with the number of images in each batch when it is finished.
        options: Keywords of `txt2img`: steps, scale, sampler …
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
    """Load the real images of the prompts, with the transform of training: (N, 3, H, W)."""
    assert isinstance(folder.transform, EmojiTransform), "judges are trained on emoji only"
    index = {row["file_name"]: k for k, row in enumerate(folder.rows)}
    rng = Random(seed)
    images = []
    for row in prompts:
        image = folder.load(index[row["file_name"]])["image"]
        images.append(folder.transform.make_image_fields(image, rng, row["color"])["jpg"])
    return torch.stack(images)


def score(judges: Judges, gallery: Gallery, images: Tensor, prompts: Sequence[Prompt]) -> Score:
    """Measure how many of the images show what their prompts ask for."""
    color, style, objects = judges.check(images, prompts)
    top1, top5 = objects[:, 0], objects[:, :5].any(dim=1)
    nearest_object, nearest_style = gallery.match_nearest(images, prompts)
    checks = (color, style, top1, top5, color & style & top1, nearest_style, nearest_object)
    return Score(len(prompts), *(float(check.float().mean()) for check in checks))


def shuffle(prompts: Sequence[Prompt], *, seed: int = 0) -> list[Prompt]:
    """Return the prompts in a random order in which none stays at its position."""
    cycle = list(prompts)
    Random(seed).shuffle(cycle)
    position = {id(row): k for k, row in enumerate(cycle)}
    return [cycle[(position[id(row)] + 1) % len(cycle)] for row in prompts]


def format_table(scores: dict[str, Score]) -> str:
    """Format scores as a Markdown table."""
    lines = [
        "| images | n | background | style | object | object in top 5 | all three "
        "| nearest drawing: style | object |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, s in scores.items():
        cells = " | ".join(f"{100 * fraction:.1f} %" for fraction in astuple(s)[1:])
        lines.append(f"| {name} | {s.count} | {cells} |")
    return "\n".join(lines)


@torch.inference_mode()
def _reconstruct(model: LatentDiffusion, images: Tensor) -> Tensor:
    autoencoder = model.autoencoder
    decoded = [autoencoder.decode(autoencoder.encode(x).mode()) for x in images.split(16)]
    return torch.cat(decoded).clamp(-1, 1)


if __name__ == "__main__":
    main()
