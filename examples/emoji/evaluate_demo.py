"""Measure how well the demo model follows prompts; write a table and a grid of images.

    python examples/emoji/make_emoji_data.py data/emoji --objects 300
    python examples/emoji/evaluate_demo.py --data data/emoji

Prompts name an object, a style and a random background: pairs that were trained on, and pairs that
were held out. The judges are trained on real images first, once, which takes some minutes.
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

from judges import Gallery, Judges, background
from ldm.data.drawings import COLORS, EmojiTransform, format_caption
from ldm.data.folder import Folder
from ldm.imaging import pixels
from ldm.loading.load import load
from ldm.model import LatentDiffusion
from ldm.pipelines import txt2img

ALIKE = ("flat", "soft gradient", "3d")  # styles that share one drawing, so an easy composition

Prompt = dict[str, Any]  # a row of the metadata with `colour` and `prompt`


@dataclass(frozen=True)
class Score:
    """Fractions of the images that are right, 0 to 1, and their number."""

    count: int
    background: float
    style: float
    object: float
    object_top5: float
    all: float
    nearest_style: float
    nearest_object: float


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="the data set")
    parser.add_argument("--config", help="config (default: of the demo model)")
    parser.add_argument("--ckpt", help="weights (default: the demo model's)")
    parser.add_argument("--seen", type=int, default=400, help="prompts of trained pairs")
    parser.add_argument("--heldout", type=int, default=370, help="prompts of held-out pairs")
    parser.add_argument("--objects", type=int, default=300, help="the model knows the first N")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--scale", type=float, default=3.0, help="guidance")
    parser.add_argument("--judges", type=Path, default=Path("logs/judges.pt"), help="kept here")
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluation"), help="folder")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Folder(root=args.data, transform=EmojiTransform())
    objects = sorted({row["object"] for row in folder.rows if row["rank"] < args.objects})
    judges = Judges.load_or_train(folder, args.judges, objects=objects)
    model = load(args.config, args.ckpt)
    groups = {
        "seen pairs": choose_prompts(folder, "train", objects, args.seen),
        "held-out pairs": choose_prompts(folder, "heldout", objects, args.heldout),
    }
    with tqdm(total=sum(map(len, groups.values())), unit="image") as bar:
        options = {"steps": args.steps, "scale": args.scale, "advance": bar.update}
        scores, images = evaluate(model, folder, judges, groups, **options)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(format_table(scores) + "\n", encoding="utf-8")
    pixels.make_grid(pixels.to_pil(images["held-out pairs"][:64]), 8).save(
        args.out / "held-out.png"
    )
    print(format_table(scores))


def evaluate(
    model: LatentDiffusion,
    folder: Folder,
    judges: Judges,
    groups: dict[str, list[Prompt]],
    **options: Any,
) -> tuple[dict[str, Score], dict[str, Tensor]]:
    """Generate images of all prompts and score them beside three controls.

    The controls are real images, real ones through the autoencoder (what a perfect UNet would
    score), and the generated ones against each other's prompts.

    Args:
        groups: prompts by name of the group, see `choose_prompts`.
        options: of `generate`.
    Returns:
        Scores by name, and the generated images of each group.
    """
    scores, images = {}, {}
    score_of = partial(score, judges, Gallery(folder, judges.objects))
    for name, prompts in groups.items():
        real = real_images(folder, prompts)
        scores[f"{name}: real"] = score_of(real, prompts)
        scores[f"{name}: real, through the autoencoder"] = score_of(
            _reconstruct(model, real), prompts
        )
        images[name] = generate(model, prompts, **options)
        scores[f"{name}: generated"] = score_of(images[name], prompts)
        rest = [k for k, row in enumerate(prompts) if row["style"] not in ALIKE]
        scores[f"{name}: generated, without {', '.join(ALIKE)}"] = score_of(
            images[name][rest], [prompts[k] for k in rest]
        )
        scores[f"{name}: generated, prompts shuffled"] = score_of(images[name], shuffle(prompts))
    return scores, images


def choose_prompts(
    folder: Folder,
    split: str,
    objects: Collection[str] | None = None,
    count: int | None = None,
    *,
    seed: int = 0,
) -> list[Prompt]:
    """Rows of a split, each with a random `colour` and its `prompt`.

    Args:
        objects: only these; None = all.
        count: so many at random; None = all.
    """
    rng = Random(seed)
    rows = [row for row in folder.rows if row["split"] == split]
    rows = [row for row in rows if objects is None or row["object"] in objects]
    if count is not None and count < len(rows):
        rows = rng.sample(rows, count)
    prompts = []
    for row in rows:
        colour = rng.choice(list(COLORS))
        text = format_caption(row["object"], row["style"], colour)
        prompts.append({**row, "colour": colour, "prompt": text})
    return prompts


def generate(
    model: LatentDiffusion,
    prompts: Sequence[Prompt],
    *,
    batch: int = 25,
    advance: Callable[[int], Any] | None = None,
    **options: Any,
) -> Tensor:
    """One image per prompt, (N, 3, H, W); the seed of the k-th is k.

    Args:
        advance: called with the number of images of each batch.
        options: of `txt2img`: steps, scale, sampler …
    """
    images = []
    for start in range(0, len(prompts), batch):
        texts = [row["prompt"] for row in prompts[start : start + batch]]
        seeds = list(range(start, start + len(texts)))
        images.append(txt2img(model, texts, seeds=seeds, **options).cpu())
        if advance:
            advance(len(texts))
    return torch.cat(images)


def real_images(folder: Folder, prompts: Sequence[Prompt], *, seed: int = 0) -> Tensor:
    """The real images that the prompts describe, placed as in training: (N, 3, H, W)."""
    assert isinstance(folder.transform, EmojiTransform), "judges know emoji only"
    index = {row["file_name"]: k for k, row in enumerate(folder.rows)}
    rng = Random(seed)
    images = []
    for row in prompts:
        image = folder.load(index[row["file_name"]])["image"]
        images.append(folder.transform.image_fields(image, rng, row["colour"])["jpg"])
    return torch.stack(images)


def score(judges: Judges, gallery: Gallery, images: Tensor, prompts: Sequence[Prompt]) -> Score:
    """How many of the images show what their prompts ask for."""
    objects, styles = judges.judge(images)
    object_labels, style_labels = judges.labels(prompts)
    colours = zip(background(images), prompts, strict=True)
    colour = torch.tensor([name == row["colour"] for name, row in colours])
    style = styles[:, 0] == style_labels
    top1 = objects[:, 0] == object_labels
    top5 = (objects[:, :5] == object_labels[:, None]).any(dim=1)
    nearest_object, nearest_style = gallery.nearest(images, prompts)
    all_three = colour & style & top1
    checks = (colour, style, top1, top5, all_three, nearest_style, nearest_object)
    return Score(len(prompts), *(float(check.float().mean()) for check in checks))


def shuffle(prompts: Sequence[Prompt], *, seed: int = 0) -> list[Prompt]:
    """The same prompts in another order, none in its own place."""
    order = list(prompts)
    Random(seed).shuffle(order)
    position = {id(row): k for k, row in enumerate(order)}
    return [order[(position[id(row)] + 1) % len(order)] for row in prompts]


def format_table(scores: dict[str, Score]) -> str:
    """The scores as a Markdown table."""
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
    parts = [model.autoencoder.decode(model.autoencoder.encode(x).mode()) for x in images.split(16)]
    return torch.cat(parts).clamp(-1, 1)


if __name__ == "__main__":
    main()
