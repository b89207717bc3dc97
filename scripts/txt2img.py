"""Make pictures from text.

    python scripts/txt2img.py --prompt "a 3d emoji of a red apple on a blue background"
    python scripts/txt2img.py --ckpt v2-1_768-ema-pruned.ckpt --H 768 --W 768 --prompt "a fox"

Pictures go to OUTDIR/samples/00000.png …, all of them together to OUTDIR/grid-0000.png; paths are
written to stdout, everything else to stderr.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from ldm.generate import flags, load, run

PARSER = flags.parser(
    __doc__,
    flags.prompt_flags(),
    flags.model_flags(),
    flags.sampling_flags(),
    flags.output_flags(),
    task="txt2img",
    prompt="a professional photograph of an astronaut riding a triceratops",
    outdir="outputs/txt2img-samples",
)


def generate(args: Namespace) -> None:
    batches = run.plan(args)
    model = load.load(args)

    from ldm.pipelines import txt2img

    run.run(run.maker(txt2img, model, args), batches, model, args)


def main(argv: Sequence[str] | None = None) -> int:
    return load.run(generate, PARSER, argv)


if __name__ == "__main__":
    sys.exit(main())
