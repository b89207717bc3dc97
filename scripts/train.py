"""Train a model from a config in the original's format.

    python scripts/train.py --base configs/demo/text2img.yaml -t data.params.batch_size=64
    python scripts/train.py --base configs/demo/text2img.yaml configs/train/lora.yaml -t
    python scripts/train.py --base mine.yaml -t --gpus 0,1,         two GPUs
    python scripts/train.py -t --resume logs/lora                   goes on where it ended
    torchrun --nnodes 2 --nproc-per-node 8 … scripts/train.py --base mine.yaml -t

Later files go over earlier ones, `key.sub=value` over all. A run lives in LOGDIR/TIME_NAME.
"""

import sys
from collections.abc import Sequence

from ldm.runtime.errors import explain
from ldm.train import command


def main(argv: Sequence[str] | None = None) -> None:
    name, debug = command.PARSER.prog, False
    try:
        args = command.parse(argv)
        debug = args.debug
        for line in command.work(args):
            print(line)
    except (ValueError, KeyError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if debug:
            raise
        sys.exit(f"{name}: error: {explain(error).replace('--verbose', '--debug')}")


if __name__ == "__main__":
    main()
