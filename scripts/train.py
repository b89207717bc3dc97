"""Train a model from a config in the original's format.

    python scripts/train.py --base configs/demo/text2img.yaml -t data.params.batch_size=64
    python scripts/train.py --base configs/demo/text2img.yaml configs/train/lora.yaml -t

Later files go over earlier ones, `key.sub=value` over all. The run lives in LOGDIR/NAME.
"""

import argparse
import logging
import sys
from pathlib import Path

from ldm import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-b", "--base", required=True, nargs="+", help="config files (YAML)")
    parser.add_argument("-t", "--train", action="store_true", help="train (else: export, or check)")
    parser.add_argument("-n", "--name", help="name of the run (default: the last config's)")
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
    import torch

    from ldm.loading import config
    from ldm.train.loop import Run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    files = [word for word in args.base if "=" not in word]  # the others are overrides
    overrides = [word for word in args.base + args.overrides if word not in files]
    overrides += [] if args.seed is None else [f"lightning.trainer.seed={args.seed}"]
    raw = config.read(files[0], overrides, *files[1:])
    folder = args.logdir / (args.name or Path(files[-1]).stem)
    if not args.resume and (folder / "checkpoints" / "last.pt").exists():
        parser.error(f"`{folder}` holds a run already\nhint: --resume, or another --name")
    run = Run(raw, folder, text=config.text(raw))
    if args.resume:
        run.state.load(run.last)
    if args.train:
        run.train()
    elif args.resume:
        run.export()
    print(run.last.with_suffix(".safetensors") if args.train or args.resume else "the config fits")


if __name__ == "__main__":
    main()
