"""How well a model follows prompts that name an object, a style and a background colour."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from judges import Gallery, Judges, background
from ldm.data.folder import Folder
from ldm.data.transforms import COLOURS, Emoji, caption
from ldm.model import LatentDiffusion
from ldm.pipelines import txt2img

__all__ = ["Score", "evaluate", "generate", "prompts", "real", "score", "shuffled", "table"]

ALIKE = ("flat", "soft gradient", "3d")  # styles that share one drawing, so an easy composition


@dataclass(frozen=True)
class Score:
    """Shares of pictures that are right, 0 … 1."""

    count: int
    background: float
    style: float
    object: float
    object_top5: float
    all: float
    nearest_style: float
    nearest_object: float


def evaluate(
    model: LatentDiffusion,
    folder: Folder,
    judges: Judges,
    wanted: dict[str, list[dict]],
    **options: Any,
) -> tuple[dict[str, Score], dict[str, Tensor]]:
    """Scores by name, and the generated images of each group of prompts.

    wanted: groups of prompts by name, see `prompts`.
    options: those of `generate`.

    Beside generated pictures stand real ones, also through the autoencoder (what a perfect UNet
    would score), and as a control the generated ones against each other's prompts.
    """
    scores, made = {}, {}
    say = partial(score, judges, Gallery(folder, judges.objects))
    for name, group in wanted.items():
        pictures = real(folder, group)
        scores[f"{name}: real"] = say(pictures, group)
        scores[f"{name}: real, through the autoencoder"] = say(_through(model, pictures), group)
        made[name] = generate(model, group, **options)
        scores[f"{name}: generated"] = say(made[name], group)
        rest = [k for k, row in enumerate(group) if row["style"] not in ALIKE]
        scores[f"{name}: generated, without {', '.join(ALIKE)}"] = say(
            made[name][rest], [group[k] for k in rest]
        )
        scores[f"{name}: generated, prompts shuffled"] = say(made[name], shuffled(group))
    return scores, made


def prompts(
    folder: Folder,
    split: str,
    objects: Collection[str] | None = None,
    count: int | None = None,
    *,
    seed: int = 0,
) -> list[dict]:
    """Records of a split, each with a random `colour` and its `prompt`.

    objects: only these, None = all. count: so many at random, None = all.
    """
    rng = Random(seed)
    rows = [row for row in folder.rows if row["split"] == split]
    rows = [row for row in rows if objects is None or row["object"] in objects]
    if count is not None and count < len(rows):
        rows = rng.sample(rows, count)
    chosen = []
    for row in rows:
        colour = rng.choice(list(COLOURS))
        text = caption(row["object"], row["style"], colour)
        chosen.append({**row, "colour": colour, "prompt": text})
    return chosen


def generate(
    model: LatentDiffusion,
    wanted: Sequence[dict],
    *,
    batch: int = 25,
    advance: Callable[[int], Any] | None = None,
    **options: Any,
) -> Tensor:
    """One image per prompt, (N, 3, H, W); the seed of the k-th is k.

    advance: called with the number of images made.
    options: those of `txt2img`: steps, scale, sampler …
    """
    images = []
    for start in range(0, len(wanted), batch):
        texts = [row["prompt"] for row in wanted[start : start + batch]]
        seeds = list(range(start, start + len(texts)))
        images.append(txt2img(model, texts, seeds=seeds, **options).cpu())
        if advance:
            advance(len(texts))
    return torch.cat(images)


def real(folder: Folder, wanted: Sequence[dict], *, seed: int = 0) -> Tensor:
    """The real pictures that the prompts describe, placed as in training: (N, 3, H, W)."""
    assert isinstance(folder.transform, Emoji), "judges know emoji only"
    index = {row["file_name"]: k for k, row in enumerate(folder.rows)}
    rng = Random(seed)
    pictures = [folder.record(index[row["file_name"]])["picture"] for row in wanted]
    seen = [
        folder.transform.seen(p, row["colour"], rng)
        for p, row in zip(pictures, wanted, strict=True)
    ]
    return torch.stack([sample["jpg"] for sample in seen])


def score(judges: Judges, gallery: Gallery, images: Tensor, wanted: Sequence[dict]) -> Score:
    """How many of the images show what was wanted."""
    objects, styles = judges.judge(images)
    right_object, right_style = judges.labels(wanted)
    colour = torch.tensor(
        [seen == row["colour"] for seen, row in zip(background(images), wanted, strict=True)]
    )
    style = styles[:, 0] == right_style
    top1 = objects[:, 0] == right_object
    top5 = (objects[:, :5] == right_object[:, None]).any(dim=1)
    nearest_object, nearest_style = gallery.nearest(images, wanted)
    shares = (
        colour, style, top1, top5, colour & style & top1, nearest_style, nearest_object,
    )  # fmt: skip
    return Score(len(wanted), *(float(share.float().mean()) for share in shares))


def shuffled(wanted: Sequence[dict], *, seed: int = 0) -> list[dict]:
    """The same prompts in another order: no picture keeps its own."""
    order = list(wanted)
    Random(seed).shuffle(order)
    place = {id(row): k for k, row in enumerate(order)}
    return [order[(place[id(row)] + 1) % len(order)] for row in wanted]


def table(scores: dict[str, Score]) -> str:
    """The scores in Markdown, one line each."""
    lines = [
        "| pictures | n | background | style | object | object in top 5 | all three "
        "| nearest drawing: style | object |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, s in scores.items():
        shares = astuple(s)[1:]
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        lines.append(f"| {name} | {s.count} | {cells} |")
    return "\n".join(lines)


@torch.inference_mode()
def _through(model: LatentDiffusion, images: Tensor) -> Tensor:
    parts = [model.autoencoder.decode(model.autoencoder.encode(x).mode()) for x in images.split(16)]
    return torch.cat(parts).clamp(-1, 1)
