"""Measure how well the shipped models inpaint and enlarge pictures that they have not seen.

    python scripts/evaluate_tasks.py inpaint --data data/emoji
    python scripts/evaluate_tasks.py upscale --data data/emoji-512

A table goes to stdout; OUT/TASK.png shows input, results and original of the first pictures.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

import comparison
from ldm.data.folder import Folder
from ldm.data.transforms import Emoji
from ldm.generate import flags
from ldm.imaging import pixels
from ldm.loading.load import load
from ldm.runtime.files import find_file

TRANSFORMS = {
    "inpaint": {"records": {"mask": {"whole": 0.0}}},
    "upscale": {"size": 512, "records": {"lr": {"factor": 4}}},
}


def main() -> None:
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    parser.add_argument("task", choices=list(TRANSFORMS))
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="the data set")
    parser.add_argument("--ckpt", help="weights (default: of the shipped model)")
    parser.add_argument("--count", type=int, default=100, help="pictures, at most")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--scale", type=float, help="guidance (default: what suits the model)")
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluation"), help="folder")
    args = parser.parse_args()
    folder = Folder(root=args.data, split="heldout", transform=Emoji(**TRANSFORMS[args.task]))
    step = max(1, len(folder) // args.count)
    chosen = range(0, step * min(args.count, len(folder)), step)
    samples = (folder[0, index] for index in tqdm(chosen, unit="picture"))
    model = load(ckpt=args.ckpt or find_file(flags.DEMOS[args.task]))
    usual = flags.DEMO_SCALES.get(args.task, flags.DEMO_SCALE)
    options = {"steps": args.steps, "scale": args.scale or usual, "seeds": 42}
    if args.task == "inpaint":
        result, shown = comparison.inpainting(model, load(), samples, **options)
    else:
        result, shown = comparison.upscaling(model, samples, **options)
    rows = [torch.cat(list(mended.values())) for mended in shown[:12]]
    args.out.mkdir(parents=True, exist_ok=True)
    grid = pixels.grid(pixels.to_pil(torch.cat(rows)), len(rows[0]))
    grid.save(args.out / f"{args.task}.png")
    print(comparison.table(result))


if __name__ == "__main__":
    main()
