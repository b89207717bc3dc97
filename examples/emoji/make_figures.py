"""Make the figures of the documentation: docs/demo.jpg, docs/tasks.jpg, docs/adapters.jpg.

    python examples/emoji/make_figures.py demo tasks adapters

`demo` needs the demo model only, `tasks` the datasets and the training runs `depth` and
`variation` of README.md, `adapters` the runs `lora`, `textual-inversion` and `dreambooth`.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.data.drawings import EmojiTransform, format_caption
from ldm.data.folder import ImageFolder
from ldm.imaging import pixels
from ldm.loading.load import load
from ldm.pipelines import depth2img, inpaint, txt2img, upscale, vary
from ldm.runtime.files import find_file

SAMPLING_OPTIONS: dict[str, Any] = {"steps": 50, "scale": 3.0}
# In pixels
TITLE_HEIGHT = 22
FONT_SIZE = 14  # of the titles
GAP = 10  # between panels

# (object, style, background) of each image in docs/demo.jpg; seeds are 0, 1, 2 …
DEMO_IMAGES = (
    ("automobile", "black line", "white"),
    ("eggplant", "flat", "pink"),
    ("cocktail glass", "emojione", "red"),
    ("bell", "3d", "red"),
    ("mobile phone", "twemoji", "green"),
    ("red apple", "noto", "white"),
    ("soccer ball", "noto", "sky blue"),
    ("lemon", "3d", "blue"),
    ("banana", "noto", "purple"),
    ("mushroom", "flat", "green"),
    ("anchor", "black line", "yellow"),
    ("red heart", "soft gradient", "white"),
    ("cactus", "flat", "orange"),
    ("rocket", "android", "purple"),
    ("sun", "emojione", "blue"),
    ("key", "android", "gray"),
    ("tiger face", "twemoji", "sky blue"),
    ("crown", "emojione", "purple"),
    ("carrot", "3d", "blue"),
    ("cat face", "noto", "yellow"),
    ("pizza", "twemoji", "green"),
    ("umbrella", "flat", "pink"),
    ("wine glass", "noto", "yellow"),
    ("crescent moon", "soft gradient", "blue"),
)
# (method, object, run folder) of each row in docs/adapters.jpg
ADAPTER_ROWS = (
    ("LoRA", "robot", "logs/lora"),
    ("textual inversion", "polar bear", "logs/textual-inversion"),
    ("DreamBooth", "zebra", "logs/dreambooth"),
)


@dataclass(frozen=True)
class Panel:
    """A row of images (B, 3, H, W) in [-1, 1] under a title."""

    title: str
    images: Tensor


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("names", nargs="+", choices=list(FIGURES), metavar="NAME",
                        help=", ".join(FIGURES))  # fmt: skip
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder with emoji and emoji-512"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to")
    args = parser.parse_args(argv)
    for name in args.names:
        figure = FIGURES[name](args.data)
        figure.save(args.out / f"{name}.jpg", quality=90, optimize=True)
        print(args.out / f"{name}.jpg")


def make_demo(data: Path) -> Image.Image:
    """Draw a grid of DEMO_IMAGES, made by the demo model."""
    prompts = [format_caption(*words) for words in DEMO_IMAGES]
    images = txt2img(load(), prompts, seeds=list(range(len(prompts))), **SAMPLING_OPTIONS)
    return pixels.make_grid(pixels.to_pil(images), 8)


def make_tasks(data: Path) -> Image.Image:
    """Draw a row of inputs and results for each task."""
    model = load()
    prompts = [format_caption("panda", "flat", "pink"), format_caption("tomato", "noto", "yellow")]
    images = [
        txt2img(model, [prompt] * 3, seeds=[0, 1, 2], **SAMPLING_OPTIONS) for prompt in prompts
    ]
    rows = [[Panel(f"text to image: {' | '.join(prompts)}", torch.cat(images))]]
    for make_row in (_make_inpainting, _make_upscaling, _make_depth, _make_variations):
        title, images = make_row(data)
        rows.append([Panel(title, torch.cat(images))])
    return draw_figure(rows)


def make_adapters(data: Path) -> Image.Image:
    """Draw objects that are new to the demo model, before and after training by three methods."""
    base = load()
    lora, embedding, dreambooth = (_find_checkpoint(run) for _, _, run in ADAPTER_ROWS)
    trained = (load(loras=[(lora, 1.0)]), load(embeddings=[embedding]), load(ckpt=dreambooth))
    rows = []
    for (method, name, _), model in zip(ADAPTER_ROWS, trained, strict=True):
        token = "<polar-bear>" if method == "textual inversion" else name
        panels = []
        for title, panel_model, object_name in (
            (f"{name}: before", base, name),
            (f"after: {method}", model, token),
        ):
            prompts = [format_caption(object_name, "3d", "blue")] * 4
            images = txt2img(panel_model, prompts, seeds=[0, 1, 2, 3], **SAMPLING_OPTIONS)
            panels.append(Panel(title, images))
        rows.append(panels)
    return draw_figure(rows)


FIGURES: dict[str, Callable[[Path], Image.Image]] = {
    "demo": make_demo,
    "tasks": make_tasks,
    "adapters": make_adapters,
}


def draw_figure(rows: Sequence[Sequence[Panel]]) -> Image.Image:
    """Draw rows of panels on white; all panels of a row must have the same height."""
    panels = [[_draw_panel(panel) for panel in row] for row in rows]
    width = max(sum(panel.width + GAP for panel in row) - GAP for row in panels)
    height = sum(row[0].height for row in panels)
    image = Image.new("RGB", (width, height), "white")
    top = 0
    for row in panels:
        left = 0
        for panel in row:
            image.paste(panel, (left, top))
            left += panel.width + GAP
        top += row[0].height
    return image


def _draw_panel(panel: Panel) -> Image.Image:
    images = pixels.to_pil(panel.images)
    grid = pixels.make_grid(images, len(images))
    image = Image.new("RGB", (grid.width, grid.height + TITLE_HEIGHT), "white")
    font = ImageFont.load_default(FONT_SIZE)
    ImageDraw.Draw(image).text((2, 2), panel.title, fill="black", font=font)
    image.paste(grid, (0, TITLE_HEIGHT))
    return image


def _make_inpainting(data: Path) -> tuple[str, list[Tensor]]:
    model = load(ckpt=find_file("checkpoints/demo-inpainting.safetensors"))
    transform = EmojiTransform(conditions={"mask": {"full_probability": 0.0}})
    images = []
    for sample in _load_samples(data / "emoji", transform, ("duck", "violin", "strawberry")):
        image, mask = sample["jpg"][None], sample["mask"][None]
        result = inpaint(model, [sample["txt"]], image, mask, seeds=0, **SAMPLING_OPTIONS)
        images += [torch.where(mask > 0, -0.5, image), result]
    return "inpainting: input, result", images


def _make_upscaling(data: Path) -> tuple[str, list[Tensor]]:
    model = load(ckpt=find_file("checkpoints/demo-upscaler.safetensors"))
    transform = EmojiTransform(size=512, conditions={"lr": {"factor": 4}})
    images = []
    for sample in _load_samples(data / "emoji-512", transform, ("rabbit face", "bus", "dog face")):
        low_res = sample["lr"][None]
        result = upscale(model, [sample["txt"]], low_res, seeds=0, steps=25, scale=1.0)
        bicubic = F.interpolate(low_res, scale_factor=4.0, mode="bicubic").clamp(-1, 1)
        images += [image[..., 128:256, 128:256] for image in (bicubic, result)]
    return "4x upscaling: bicubic, result (a sixteenth of the image)", images


def _make_depth(data: Path) -> tuple[str, list[Tensor]]:
    model = load(ckpt=_find_checkpoint("logs/depth"))
    images = []
    for sample in _load_samples(data / "emoji", EmojiTransform(conditions={"depth": {}}),
                           ("duck", "cat face")):  # fmt: skip
        image, depth = sample["jpg"][None], sample["depth"][None]
        prompts = [format_caption(sample["object"], "noto", "blue")] * 2
        options = {"depth": depth, "strength": 1.0, "seeds": [0, 1], **SAMPLING_OPTIONS}
        results = depth2img(model, prompts, image, **options)
        images += [(2 * depth - 1).expand(1, 3, -1, -1), results]
    return "depth to image (recipe): depth map, results", images


def _make_variations(data: Path) -> tuple[str, list[Tensor]]:
    model = load(ckpt=_find_checkpoint("logs/variation"))
    images = []
    for sample in _load_samples(data / "emoji", EmojiTransform(), ("ear of corn", "cyclone")):
        image = sample["jpg"][None]
        images += [image, vary(model, [""] * 2, [image], seeds=[0, 1], **SAMPLING_OPTIONS)]
    return "variations (recipe): image, results", images


def _load_samples(
    root: Path, transform: EmojiTransform, objects: Sequence[str]
) -> list[dict[str, Any]]:
    """Load the held-out drawing of each object, or its first drawing if none is held out."""
    folder = ImageFolder(root=root, transform=transform)
    samples = []
    for name in objects:
        indices = [k for k, row in enumerate(folder.rows) if row["object"] == name]
        indices.sort(key=lambda k: folder.rows[k]["split"] != "heldout")
        samples.append({**folder[0, indices[0]], "object": name})
    return samples


def _find_checkpoint(run: str) -> Path:
    path = Path(run) / "checkpoints/last.safetensors"
    if not path.exists():
        raise SystemExit(f"{path} is missing: see examples/emoji/README.md for its training")
    return path


if __name__ == "__main__":
    main()
