"""Jobs: which pictures a run makes, which process makes them, and what becomes of each.

    flags -> plan -> batches of Job -> run(make) -> samples/00000.png …, grid-0000.png

`make` is the one call of a pipeline; everything around it (shares of several processes, progress,
a second try after NaN, watermark, metadata, grid) is the same for every task.
"""

import json
import logging
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.generate.provenance import Kept, describe, marked, method
from ldm.runtime.ranks import rank_and_world_size

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.imaging.output import OutputFolder
    from ldm.model import LatentDiffusion

FROM_NUMPY = ("inpaint", "upscale")  # tasks whose originals start from numpy's noise
GRID_LIMIT = 1024  # pictures; more would be kept in memory for a grid nobody can look at
LINE_OPTION = re.compile(r"(?:^|\s)--(?:seed|negative[-_]prompt)(?=[\s=]|$)")

log = logging.getLogger(__name__)


def _ignore(*_: Any) -> None: ...


@dataclass(frozen=True)
class Job:
    """One picture to make.

    index: place in the run, from 0, the same however many processes share the run.
    seed: of all its noise; start: of the noise it starts from (`--fixed_code` shares it).
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    start: int


Batch = list[Job]
Watch = Callable[..., None]  # the callback of `ldm.sample`
Make = Callable[[Batch, Watch], "Tensor"]


def plan(args: Namespace) -> list[Batch]:
    """This process' share of the run, as batches.

    The run is `n_iter` times all lines of the file, each `repeat` times (or `n_samples` times the
    prompt), in batches of `n_samples` that do not reach across iterations. Image k has seed + k;
    where a line has a seed of its own, its r-th picture has that seed + r.
    Raises ValueError naming file and line, or for a sequential run shared by several processes.
    """
    of_folder = getattr(args, "indir", None) is not None  # its pictures are shared instead
    rank, ranks = (0, 1) if of_folder else rank_and_world_size()
    if ranks > 1 and "noise" in args.legacy:
        raise ValueError("--legacy noise draws one picture after the other: run a single process")
    lines = read_lines(args) if args.from_file else [(args.prompt, {})] * args.n_samples
    if "noise" in args.legacy and any("seed" in options for _, options in lines):
        raise ValueError("--legacy noise knows one seed for the run, not one per line")
    batches: list[Batch] = []
    for iteration in range(args.n_iter):
        for first in range(0, len(lines), args.n_samples):
            places = range(first, min(first + args.n_samples, len(lines)))
            batches.append([_job(args, lines, iteration, place) for place in places])
    mine = batches[rank::ranks]
    if ranks > 1:
        log.info("process %d of %d: %d of %d batches", rank, ranks, len(mine), len(batches))
    return mine


def read_lines(args: Namespace) -> list[tuple[str, dict[str, Any]]]:
    """(prompt, options) for each line of the prompt file, each repeated.

    A blank line is an empty prompt, as it always was. Options stand at the end of a line.
    """
    text = Path(args.from_file).read_text("utf-8-sig")
    lines = [
        _line(line, f"{args.from_file}:{number}")
        for number, line in enumerate(text.splitlines(), start=1)
    ]
    if not lines:
        raise ValueError(f"{args.from_file} is empty")
    return [line for line in lines for _ in range(args.repeat)]


def keywords(batch: Batch, args: Namespace, model: "LatentDiffusion") -> dict[str, Any]:
    """What every pipeline is told about a batch, from the flags."""
    told = {
        "negative_prompt": [job.negative_prompt for job in batch],
        "steps": args.steps,
        "sampler": args.sampler,
        "grid": args.spacing,
        "eta": args.ddim_eta,
        "scale": args.scale,
        "seeds": [job.seed for job in batch],
        "legacy": args.legacy,
        "tile": args.tile and max(args.tile // model.downscale, 1),
    }
    from_numpy = args.task in FROM_NUMPY and "noise" in args.legacy
    if from_numpy or (
        args.fixed_code and ("noise" in args.legacy or any(j.start != j.seed for j in batch))
    ):
        told["x_T"] = _start_noise(batch, args, model)
    return told


def maker(
    pipeline: Callable[..., "Tensor"],
    model: "LatentDiffusion",
    args: Namespace,
    told: dict[str, Any] | None = None,
) -> Make:
    """A pipeline as the function of a batch that `run` wants.

    told: what the pipeline of a task takes beyond the common keywords (`inputs.read`).
    """
    from ldm.pipelines import latent_of, noise_source

    told = dict(told or {})
    if "image" not in told:
        told["size"] = args.size

    def make(batch: Batch, callback: Watch) -> "Tensor":
        prompts, own = [job.prompt for job in batch], dict(told)
        if args.task == "img2img" and "noise" in args.legacy:
            if "z" not in told:  # the original draws it once for all batches
                noise = noise_source(None, len(batch), args.legacy)
                told["z"] = latent_of(model, told["image"], len(batch), noise)
            own["z"] = told["z"][: len(batch)]
        options = keywords(batch, args, model) | own
        return pipeline(model, prompts, callback=callback, **options)

    return make


def again(
    info: dict[str, Any],
    args: Namespace,
    model: "LatentDiffusion",
    make: Make,
    keep: Kept | None = None,
    watch: Watch = _ignore,
) -> "Image.Image":
    """The picture of which `info` tells, in a batch of the same shape.

    args: as `provenance.flags` gives them.
    """
    from ldm.imaging.pixels import to_pil

    texts, seed = (info["prompt"], info["negative_prompt"]), info["seed"]
    job = Job(info["index"], *texts, seed=seed, start=info.get("start_seed", seed))
    seed_globally(args, model)
    for rows in info.get("earlier", ()):  # they drew from the same generator
        make([job] * rows, watch)
    image = make([job] * info["rows"], watch)
    row = slice(info["row"], info["row"] + 1)
    return marked(to_pil(image[row], truncate="truncate" in args.legacy)[0], info, keep)


def run(
    make: Make,
    batches: list[Batch],
    model: "LatentDiffusion",
    args: Namespace,
    keep: Kept | None = None,
    *,
    watch: Watch = _ignore,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Make every batch and save its pictures; paths (or JSON lines) go to stdout.

        make: (batch, callback) -> image (B, 3, H, W) in [-1, 1].
        keep: see `provenance.marked`.
        report: told the info of each picture, with its path, in place of stdout.
    What is finished stays, and gets its grid, however the run ends.
    Raises NonFinite if a picture is NaN even in float32.
    """
    from ldm.imaging.output import OutputFolder
    from ldm.imaging.pixels import to_pil

    of_folder = getattr(args, "indir", None) is not None
    folder = OutputFolder(args.outdir, Path(args.init_img).stem if of_folder else None)
    facts = describe(args, model)
    shown: list[tuple[Image.Image, dict[str, Any]]] = []
    if facts["watermark"] is None and not args.no_watermark:
        log.warning("pictures of %dx%d are too small for a watermark: saved without", *args.size)
    if sum(map(len, batches)) > GRID_LIMIT and not args.skip_grid:
        log.info("the grid will hold the first %d pictures", GRID_LIMIT)
    seed_globally(args, model)
    try:
        for number, (batch, callback) in enumerate(_progress(batches, args, watch)):
            image = _made(make, batch, callback, model)
            facts["dtype"] = str(model.dtype).removeprefix("torch.")
            for row, picture in enumerate(to_pil(image, truncate="truncate" in args.legacy)):
                info = facts | _own(batches, number, row, args)
                info["path"] = None if args.skip_save else _save(folder, picture, info, keep)
                report(info) if report else _report(info, args.json)
                if not args.skip_grid and len(shown) < GRID_LIMIT:
                    shown.append((picture, info))
    finally:
        if shown:
            _save_grid(folder, shown, args)
    log.info("Your samples are ready and waiting for you here: \n%s \n \nEnjoy.", args.outdir)


def seed_globally(args: Namespace, model: "LatentDiffusion") -> None:
    """Under `--legacy noise`, where the original's generator stands when sampling begins."""
    import torch

    if "noise" in args.legacy:
        torch.manual_seed(args.seed)
        if args.fixed_code:
            torch.randn(_latent_shape(args, model, args.n_samples), device=model.device)


def _job(
    args: Namespace, lines: Sequence[tuple[str, dict[str, Any]]], iteration: int, place: int
) -> Job:
    prompt, options = lines[place]
    index = iteration * len(lines) + place
    seed = args.seed + index
    if "seed" in options:
        repetition = place % args.repeat if args.from_file else 0
        seed = options["seed"] + iteration * args.repeat + repetition
    return Job(
        index=index,
        prompt=prompt,
        negative_prompt=options.get("negative_prompt", args.negative_prompt),
        seed=seed,
        start=args.seed + place % args.n_samples if args.fixed_code else seed,
    )


def _line(text: str, where: str) -> tuple[str, dict[str, Any]]:
    """A line taken apart: its prompt, and the options behind it."""
    match = LINE_OPTION.search(text)
    if match is None:
        return text, {}
    try:
        words = shlex.split(text[match.start() :])
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).lower()} in `{text.strip()}`") from error
    options: dict[str, Any] = {}
    while words:
        name, equals, value = words.pop(0).partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or key not in ("seed", "negative_prompt"):
            raise ValueError(
                f"{where}: `{name}` is not an option of a line, "
                'it may end in --seed N and --negative-prompt "TEXT"'
            )
        if not equals and not words:
            raise ValueError(f"{where}: {name} needs a value")
        options[key] = value if equals else words.pop(0)
    try:
        return text[: match.start()], options | {"seed": int(options["seed"])}
    except KeyError:
        return text[: match.start()], options
    except ValueError as error:
        raise ValueError(f"{where}: seed `{options['seed']}` is not a number") from error


def _made(make: Make, batch: Batch, callback: Watch, model: Any) -> "Tensor":
    """The images of a batch; if NaN appears in half precision, once more in float32."""
    import torch

    from ldm.pipelines import NonFinite

    try:
        return make(batch, callback)
    except NonFinite as error:
        if model.dtype == torch.float32:
            raise
        dtype = str(model.dtype).removeprefix("torch.")
        log.warning("%s in %s: going on in float32, as --precision full", error, dtype)
    model.float()
    return make(batch, callback)


def _progress(batches: list[Batch], args: Namespace, watch: Watch) -> Iterator[tuple[Batch, Watch]]:
    """Each batch with the callback that moves its bar; bars show on a terminal only."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty() or rank_and_world_size()[0] > 0
    for batch in tqdm(batches, "Sampling", disable=hidden):
        with tqdm(desc=args.sampler, total=args.steps, leave=False, disable=hidden) as bar:

            def advance(step: int, steps: int, *state: Any, bar: tqdm = bar) -> None:
                bar.total = steps
                bar.update()
                watch(step, steps, *state)

            yield batch, advance


def _own(batches: list[Batch], number: int, row: int, args: Namespace) -> dict[str, Any]:
    """What is a picture's own; enough to draw its noise again."""
    batch = batches[number]
    job = batch[row]
    own = {
        "index": job.index,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        "row": row,
        "rows": len(batch),
    }
    if args.fixed_code:
        own |= {"fixed_code": True, "start_seed": job.start, "n_samples": args.n_samples}
    if "noise" in args.legacy:
        own |= {"seed": args.seed, "earlier": [len(before) for before in batches[:number]]}
    return own


def _save(
    folder: "OutputFolder", picture: "Image.Image", info: dict[str, Any], keep: Kept | None
) -> str:
    from ldm.imaging.metadata import fingerprint

    unmarked = {"sha256_unmarked": fingerprint(picture)}
    return str(folder.save_sample(marked(picture, info, keep), info | unmarked))


def _save_grid(
    folder: "OutputFolder", shown: list[tuple["Image.Image", dict[str, Any]]], args: Namespace
) -> None:
    """All pictures of the run on one sheet, marked as a whole."""
    from ldm.imaging.pixels import make_grid
    from ldm.imaging.watermark import can_hold

    sheet = make_grid([picture for picture, _ in shown], args.n_rows or args.n_samples)
    keys = ("prompt", "negative_prompt", "seed")
    images = [{key: info[key] for key in keys} | {"file": _name(info)} for _, info in shown]
    own = {
        "task": "grid",
        "watermark": method(args) if can_hold(sheet) else None,
        "images": images,
    }
    info = {key: value for key, value in shown[0][1].items() if key != "path"} | own
    path = folder.save_grid(marked(sheet, info), info)
    if not args.json:
        _say(str(path))


def _name(info: dict[str, Any]) -> str | None:
    return info["path"] and Path(info["path"]).name


def _report(info: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _say(json.dumps(info, ensure_ascii=False))
    elif info["path"] is not None:
        _say(info["path"])


def _say(line: str) -> None:
    """A line of results, between the bars if there are any."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def _start_noise(batch: Batch, args: Namespace, model: "LatentDiffusion") -> "Tensor":
    """What `--fixed_code` starts every batch from, (B, C, h, w)."""
    import numpy as np
    import torch

    from ldm.pipelines import seeded_noise

    if args.task in FROM_NUMPY and "noise" in args.legacy:
        shape = _latent_shape(args, model, len(batch))
        return torch.from_numpy(np.random.RandomState(args.seed).randn(*shape)).float()
    if "noise" in args.legacy:
        generator = torch.Generator(model.device).manual_seed(args.seed)
        shape = _latent_shape(args, model, args.n_samples)
        return torch.randn(shape, generator=generator, device=model.device)[: len(batch)]
    like = torch.empty(_latent_shape(args, model, len(batch)), device=model.device)
    return seeded_noise([job.start for job in batch])(like)


def _latent_shape(args: Namespace, model: "LatentDiffusion", n: int) -> tuple[int, int, int, int]:
    height, width = (-(-side // model.downscale) for side in args.size)
    return n, model.channels, height, width
