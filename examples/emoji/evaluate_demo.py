"""Measure how well the demo model follows prompts, and write a table and a grid of pictures.

    python scripts/make_emoji_data.py data/emoji --objects 300
    python scripts/evaluate_demo.py --data data/emoji

Prompts name an object, a style and a random background: pairs that were trained on, and pairs that
were held out. The judges are trained on real pictures first, once, which takes some minutes.
"""

import argparse
import logging
from pathlib import Path


def main() -> None:
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
    measure(parser.parse_args())


def measure(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    import evaluation as ev
    from judges import Judges
    from ldm.data.folder import Folder
    from ldm.data.transforms import Emoji
    from ldm.imaging import pixels
    from ldm.loading.load import load

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Folder(root=args.data, transform=Emoji())
    known = sorted({row["object"] for row in folder.rows if row["rank"] < args.objects})
    judges = Judges.load_or_train(folder, args.judges, objects=known)
    model = load(args.config, args.ckpt)
    wanted = {
        "seen pairs": ev.prompts(folder, "train", known, args.seen),
        "held-out pairs": ev.prompts(folder, "heldout", known, args.heldout),
    }
    with tqdm(total=sum(map(len, wanted.values())), unit="picture") as bar:
        options = {"steps": args.steps, "scale": args.scale, "advance": bar.update}
        scores, made = ev.evaluate(model, folder, judges, wanted, **options)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(ev.table(scores) + "\n", encoding="utf-8")
    pixels.grid(pixels.to_pil(made["held-out pairs"][:64]), 8).save(args.out / "held-out.png")
    print(ev.table(scores))


if __name__ == "__main__":
    main()
