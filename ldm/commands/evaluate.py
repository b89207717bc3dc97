"""Make images for many prompts and guidance scales, score them, and plot FID against CLIP score.

    ldm evaluate --generate --ckpt sd-v2-1-base --prompts captions_val2017.json --count 10000 \\
        --reference val2017 --inception fid-inception --clip open-clip-g --outdir outputs/sd2
    torchrun --nproc-per-node 8 -m ldm.commands.evaluate --generate …      # the same on 8 GPUs
    ldm evaluate --outdir outputs/sd2 --reference val2017 …                # score existing images
    ldm evaluate --images mine --images theirs --reference photos --inception fid-inception

Several --ckpt, --samplers and --steps are compared. The same command continues after an
interruption: finished images are kept. Results are OUTDIR/*.json, table.md, figure.svg and
figure.png; the table is printed, too.
"""

import logging
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ldm.diffusion.names import SAMPLERS
from ldm.generate.command_line import add_options
from ldm.generate.groups import GROUP_HEADINGS, SDXL, ModelOptions, Sampling
from ldm.generate.option_parsers import parse_count, parse_natural, parse_number
from ldm.generate.options import get_options
from ldm.generate.tasks import TASKS
from ldm.runtime.command import CommandParser
from ldm.runtime.errors import ArgumentError, check_name, errors_about
from ldm.runtime.ranks import get_rank_and_world_size

if TYPE_CHECKING:
    from ldm.evaluation.generate import Setting
    from ldm.evaluation.prompts import EvaluationPrompt
    from ldm.evaluation.score import ImageSet

__all__ = ["main"]

log = logging.getLogger(__name__)

T = TypeVar("T")
DEFAULT_SCALES = "1.5,2,3,4,5,6,7,8"  # of the figures in the READMEs of Stable Diffusion 1 and 2
TASK = TASKS["txt2img"]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return the exit status."""
    return _build_parser(prog).run(_evaluate, argv)


def _build_parser(prog: str | None) -> CommandParser:
    usage = "%(prog)s [flags] [key=value ...]"
    parser = CommandParser(prog=prog, description=__doc__, usage=usage, takes_overrides=True)
    add = parser.add_group("images")
    # fmt: off
    add("--generate", action="store_true", help="make the images that do not exist yet")
    add("--prompts", metavar="FILE",
        help="file with one prompt per line, or COCO's captions (.json)")
    add("--count", type=parse_count, metavar="N",
        help="number of prompts, drawn at random; without --generate, score the first N images"
        " (default: all)")
    add("--repeat", type=parse_count, default=1, metavar="N",
        help="images per prompt, with different seeds (default: %(default)s)")
    add("--ckpt", action="append", metavar="FILE",
        help="checkpoint, as --ckpt of txt2img; may be given several times (default: the demo)")
    add("--scales", type=_make_list_parser(parse_number), default=DEFAULT_SCALES, metavar="S,S,…",
        help="guidance scales (default: %(default)s)")
    add("--samplers", type=_make_list_parser(_parse_sampler), default="ddim", metavar="NAME,…",
        help="as --sampler of txt2img (default: %(default)s)")
    add("--steps", type=_make_list_parser(parse_count), default="50", metavar="N,N,…",
        help="sampling steps (default: %(default)s)")
    add("--images", action="append", metavar="DIR",
        help="score the images in this folder; may be given several times")
    add("--outdir", default="outputs/evaluation", metavar="DIR",
        help="folder for images and results (default: %(default)s)")
    add = parser.add_group("scores")
    add("--reference", metavar="DIR", help="real images, for FID")
    add("--reference-size", type=parse_natural, metavar="PIXELS",
        help="resize the reference images' shorter side to this and crop the center; 0 = do not"
        " (default: the size of the generated images)")
    add("--inception", metavar="FILE",
        help="Inception network for FID (default: `fid-inception`, if it is on this machine)")
    add("--resize", default="clean", metavar="NAME",
        help="how images are resized for Inception: clean (clean-fid) or pytorch-fid (default:"
        " %(default)s)")
    add("--clip", metavar="FILE",
        help="CLIP for CLIP score: a file of open_clip, OpenAI or transformers, a transformers"
        " folder, or an unCLIP checkpoint (default: `open-clip-g`, if it is on this machine)")
    add("--title", metavar="TEXT", help="title of the figure")
    # fmt: on
    names: dict[str, Iterable[str]] = {
        "model": get_options(ModelOptions),
        "sampling": ("negative_prompt", "n_samples", *get_options(Sampling)),
        "sdxl": get_options(SDXL),
    }
    compared = ("ckpt", "scale", "sampler", "steps")  # the flags above take several values
    for group, group_names in names.items():
        options = {name: TASK.options[name] for name in group_names if name not in compared}
        add_options(parser.add_group(GROUP_HEADINGS[group]), options)
    return parser


def _evaluate(args: Namespace) -> None:
    from ldm.evaluation.generate import generate_images, wait_for_images
    from ldm.evaluation.load import find_clip_weights, load_clip_scorer, load_inception_extractor
    from ldm.evaluation.report import format_score_settings, format_table, save_figure, save_results
    from ldm.evaluation.score import ImageSet, find_image_sets, score_sets
    from ldm.imaging.output import check_outdir
    from ldm.runtime.device import pick_device

    check_outdir(args.outdir)
    logging.getLogger("ldm.evaluation").setLevel(logging.INFO)
    outdir, rank = Path(args.outdir), get_rank_and_world_size()[0]
    if args.generate and args.images:
        raise ArgumentError("images cannot be combined with generate", "images")
    prompts = _read_prompts(args)
    settings: list[Setting] = []
    if args.generate:
        settings = _make_settings(args, outdir, prompts)
    reference = _find_reference(args, prompts)
    device = pick_device(args.device)
    extractor = None
    if reference is not None:
        with errors_about("inception"):
            extractor = load_inception_extractor(args.inception, args.resize, device)
    with errors_about("clip"):
        clip = find_clip_weights(args.clip)
    if args.generate:
        generate_images(settings, outdir)
        if rank > 0:
            return
        wait_for_images(settings, outdir)
        sets = [
            ImageSet(setting.series, setting.list_files(outdir), setting.request.sampling.scale)
            for setting in settings
        ]
    else:
        sets = _make_image_sets(args, prompts) if args.images else find_image_sets(outdir)
    if not args.generate and args.count is not None:
        sets = [image_set.select_first(args.count) for image_set in sets]
    if reference is not None and args.reference_size is None:
        reference = replace(reference, side=min(sets[0].load(0).size))
    prompt_scorer = None if clip is None else load_clip_scorer(clip, device)
    results = score_sets(sets, reference, extractor, prompt_scorer)
    paths = save_results(results, outdir)
    paths += save_figure(results, outdir, title=args.title)
    print("\n".join([format_table(results), "", *format_score_settings(results[0]), ""]))
    print("\n".join(map(str, paths)))


def _read_prompts(args: Namespace) -> "list[EvaluationPrompt]":
    from ldm.evaluation.prompts import draw_prompts, read_prompts

    if args.prompts is None:
        if args.generate:
            raise ArgumentError("prompts are missing", "prompts")
        return []
    with errors_about("prompts"):
        prompts = read_prompts(args.prompts)
    return draw_prompts(prompts, args.count if args.generate else None, args.seed)


def _make_settings(
    args: Namespace, outdir: Path, prompts: "list[EvaluationPrompt]"
) -> "list[Setting]":
    from ldm.evaluation.generate import Setting, write_prompts
    from ldm.generate.load import find_existing_checkpoint

    for ckpt in args.ckpt or ():
        find_existing_checkpoint(ckpt, "ckpt", args.variant)  # before anything is written
    values = {name: value for name, value in vars(args).items() if name in TASK.options}
    values |= {"no_watermark": True, "repeat": args.repeat, "steps": None, "ckpt": None}
    values["from_file"] = str(write_prompts(outdir, [prompt.text for prompt in prompts]))
    base = TASK.build_request(values)
    settings = []
    models = _label_paths(args.ckpt or [None]).items()
    for (label, ckpt), sampler, steps, scale in product(
        models, args.samplers, args.steps, args.scales
    ):
        sampling = replace(base.sampling, sampler=sampler, steps=steps, scale=scale)
        model = replace(base.model, ckpt=ckpt)
        settings.append(Setting(label, replace(base, model=model, sampling=sampling)))
    return settings


def _find_reference(args: Namespace, prompts: "list[EvaluationPrompt]") -> "ImageSet | None":
    """Return the reference images: those that the prompt file has captions for, else all."""
    from ldm.evaluation.score import ImageSet
    from ldm.imaging.reading import list_images

    if args.reference is None:
        log.warning("no reference images: FID, KID, precision and recall are not computed")
        return None
    files = list_images(args.reference, "reference")
    names = dict.fromkeys(prompt.image_name for prompt in prompts if prompt.image_name is not None)
    if names:
        by_name = {file.name: file for file in files}
        missing = [name for name in names if name not in by_name]
        if missing:
            message = f"`{args.reference}` has no `{missing[0]}`, which a caption describes"
            raise ArgumentError(message, "reference")
        files = [by_name[name] for name in names]
    return ImageSet("reference", files, side=args.reference_size or None)


def _make_image_sets(args: Namespace, prompts: "list[EvaluationPrompt]") -> "list[ImageSet]":
    """Return an image set for each folder, with the prompts of the prompt file, if there is one."""
    from ldm.evaluation.score import ImageSet
    from ldm.imaging.reading import list_images

    texts = [prompt.text for prompt in prompts] or None
    sets = []
    for label, folder in _label_paths(args.images).items():
        files = list_images(folder or ".", "images")
        if texts is not None and len(texts) != len(files):
            message = f"{len(texts)} prompts for the {len(files)} images of `{folder}`"
            raise ArgumentError(message, "prompts")
        sets.append(ImageSet(label, files, prompts=texts))
    return sets


def _label_paths(paths: Sequence[str | None]) -> dict[str, str | None]:
    """Return paths by unique labels: the file names, or "demo" for the demo model (None)."""
    path_by_label: dict[str, str | None] = {}
    for path in paths:
        stem = "demo" if path is None else Path(path).name
        for suffix in (".safetensors", ".ckpt"):
            stem = stem.removesuffix(suffix)
        label, number = stem, 2
        while label in path_by_label:
            label, number = f"{stem}-{number}", number + 1
        path_by_label[label] = path
    return path_by_label


def _make_list_parser(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Return a parser of values separated by commas, without duplicates."""

    def parse_list(text: str) -> list[T]:
        items = [item.strip() for item in text.split(",") if item.strip()]
        if not items:
            raise ArgumentError(f"`{text}` is not a list of values separated by commas")
        return list(dict.fromkeys(map(parse, items)))

    return parse_list


def _parse_sampler(name: str) -> str:
    check_name("sampler", name, SAMPLERS)
    return name


if __name__ == "__main__":
    raise SystemExit(main())
