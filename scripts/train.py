"""Train a model from a config in the original's format.

    python scripts/train.py --base configs/demo/autoencoder.yaml -t
    python scripts/train.py --base configs/demo/text2img.yaml -t data.params.batch_size=64
    python scripts/train.py --base configs/demo/text2img.yaml -t --resume   # goes on where it ended
    python scripts/train.py --base configs/demo/text2img.yaml --resume      # only exports

Every key of the config can be given as `key.sub=value`. The run lives in LOGDIR/NAME.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from ldm import cli
from ldm.loading import config
from ldm.train.loop import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-b", "--base", required=True, help="config file (YAML)")
    parser.add_argument("-t", "--train", action="store_true", help="train (else: export, or check)")
    parser.add_argument("-n", "--name", help="name of the run (default: name of the config)")
    parser.add_argument("-l", "--logdir", type=Path, default=Path("logs"), help="folder of runs")
    parser.add_argument("-r", "--resume", action="store_true", help="continue the run of this name")
    parser.add_argument("-s", "--seed", type=int, help="of weights, order and noise")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    args = parser.parse_intermixed_args()
    try:
        work(args, parser)
    except (ValueError, KeyError, OSError) as error:
        sys.exit(f"{parser.prog}: error: {cli.explain(error)}")


def work(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    raw = config.read(args.base, args.overrides)
    if args.seed is not None:
        raw.setdefault("lightning", {}).setdefault("trainer", {})["seed"] = args.seed
    folder = args.logdir / (args.name or Path(args.base).stem)
    if not args.resume and (folder / "checkpoints" / "last.pt").exists():
        parser.error(f"`{folder}` holds a run already\nhint: --resume, or another --name")
    run = Run(raw, folder, text=config.find(args.base).read_text(encoding="utf-8"))
    if args.resume:
        run.state.load(run.last)
    if args.train:
        run.train()
    elif args.resume:
        run.export()
    print(run.last.with_suffix(".safetensors") if args.train or args.resume else "the config fits")


if __name__ == "__main__":
    main()
