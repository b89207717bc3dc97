"""All tasks in the browser, with live previews.

    python scripts/app.py                                  # then open http://127.0.0.1:7860
    python scripts/app.py --models /data/models --listen --auth me:secret

Pictures go to OUTDIR/samples with their metadata, so that scripts/replay.py can make them again.
"""

import html
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from ldm.app.form import CSS, PROMPTS, SAMPLING, TASKS, about, about_file, show, table, told
from ldm.app.progress import Live, follow
from ldm.app.studio import Limits, Studio
from ldm.generate import flags, load
from scripts import depth2img, img2img, inpaint, replay, txt2img, unclip, upscale

PARSER = flags.parser(__doc__)
add = PARSER.add_argument
add("--models", default="checkpoints", metavar="DIR", help="folder of checkpoints (%(default)s)")
add("--outdir", default="outputs/app", metavar="DIR", help="folder for pictures (%(default)s)")
add("--port", type=int, default=7860, help="port of the page (%(default)s)")
add("--listen", action="store_true", help="let other machines in; needs --auth")
add("--auth", metavar="USER:PASSWORD", help="who is let in")
flags.adapter_flags(add)
add("--device", metavar="NAME", help="cuda, cuda:1, mps or cpu (the first that is there)")
add("--precision", choices=["full", "autocast", "fp16", "bf16"], default="autocast")
add("--attention", choices=flags.ATTENTION, help="implementation of attention (the fastest)")
add("--memory", type=float, metavar="GIB", help="for models that stay loaded (half of all)")
add("--max-side", type=int, default=1024, metavar="N", help="of pictures (%(default)s)")
add("--max-steps", type=int, default=150, metavar="N", help="of a run (%(default)s)")
add("--max-batch", type=int, default=4, metavar="N", help="pictures made at once (%(default)s)")
add("--max-queue", type=int, default=16, metavar="N", help="runs that may wait (%(default)s)")
add("--verbose", action="store_true", help="say more, and show the traceback of an error")

SCRIPTS = (txt2img, img2img, inpaint, depth2img, upscale, unclip)
PARSERS = {script.PARSER.get_default("task"): script.PARSER for script in SCRIPTS}
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
log = logging.getLogger("ldm.generate.load")


class Page:
    """The page: a tab for each task, and beside them the run and its pictures.

    Whatever takes the model is one of `runs`: one at a time, watched and stopped alike.
    """

    def __init__(self, studio: Studio) -> None:
        import gradio

        self.gr, self.studio = gradio, studio
        self.table = table(studio.limits, studio.offered)
        self.models: dict[str, Any] = {}  # the drop-down of each task
        self.first: dict[str, Any] = {}  # the field of each task that pictures are sent to
        self.runs: list[tuple[Any, Callable[..., str], list[Any], Any]] = []

    def build(self) -> Any:
        gr = self.gr
        with gr.Blocks(title="ldm", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            self.live, self.shots, self.chosen = gr.State(None), gr.State([]), gr.State(0)
            with gr.Row():
                with gr.Column(scale=5, min_width=320), gr.Tabs() as self.tabs:
                    for task in TASKS:
                        self._task(task)
                    self._inspect()
                    self._replay()
                with gr.Column(scale=4, min_width=320):
                    self._results()
            for run in self.runs:
                self._run(*run)
            page.load(self.found, None, [*self.models.values(), self.file, self.skipped],
                      show_progress="hidden")  # fmt: skip
        return page

    def _task(self, task: str) -> None:
        gr, (label, names) = self.gr, TASKS[task]
        with gr.Tab(label, id=task, elem_id=f"tab-{task}"):
            self.models[task] = model = self._choice(task)
            pictures, words, rest = names.partition(PROMPTS)
            with gr.Row(visible=bool(pictures)):
                fields = {name: self._field(name, task) for name in pictures.split()}
            fields |= {name: self._field(name, task) for name in (words + rest).split()}
            with gr.Accordion("Sampling", open=False), gr.Row():
                fields |= {name: self._field(name, task) for name in SAMPLING.split()}
            inputs = [model, *fields.values()]
            if "depth_map" in fields:
                button = gr.Button("Estimate the depth", elem_id="estimate")
                work = partial(self.work, task, list(fields), self.studio.depth)
                self.runs.append((button, work, inputs, fields["depth_map"]))
                fields["init_img"].change(lambda: None, None, fields["depth_map"])
            button = gr.Button("Generate", variant="primary", elem_id=f"go-{task}")
            work = partial(self.work, task, list(fields), self.studio.generate)
            self.runs.append((button, work, inputs, None))
            if pictures:
                self.first[task] = next(iter(fields.values()))

    def _field(self, name: str, task: str) -> Any:
        kind, settings = self.table[name]
        settings = {"value": PARSERS[task].get_default(name)} | settings
        settings |= {"value": []} if (task, name) == ("upscale", "lora") else {}  # few would fit
        pink = {"brush": self.gr.Brush(colors=["#ff40ff"])} if kind == "ImageEditor" else {}
        field = getattr(self.gr, kind)(**settings, **pink)
        if kind == "Image":  # the file as it is: our loader says better what is wrong with it
            field.preprocess = lambda data: data and data.path
        return field

    def _inspect(self) -> None:
        gr = self.gr
        with gr.Tab("Inspect", id="inspect", elem_id="tab-inspect"):
            self.file = self._choice(None)
            button = gr.Button("Inspect", variant="primary", elem_id="go-inspect")
            report = gr.Textbox(label="Report", lines=18, elem_id="report", buttons=["copy"])
            self.skipped = gr.Markdown()
            button.click(self.studio.inspect, self.file, report, concurrency_id="model")

    def _replay(self) -> None:
        with self.gr.Tab("Replay", id="replay", elem_id="tab-replay"):
            self.first["replay"] = box = self._field("made", "txt2img")
            self.facts = self.gr.Textbox(label="What it says", lines=4, elem_id="facts")
            button = self.gr.Button("Make it again", variant="primary", elem_id="go-replay")
            box.upload(about_file, box, self.facts, queue=False)
            self.runs.append((button, self.replay, [box], None))

    def _results(self) -> None:
        gr = self.gr
        self.stop = gr.Button("Cancel", size="sm", interactive=False, elem_id="cancel")
        self.shown = gr.HTML(show(Live(message="")), elem_id="live")
        self.gallery = gr.Gallery(label="Pictures", columns=4, height=420, object_fit="contain",
                                  buttons=["download", "fullscreen"], elem_id="gallery",
                                  interactive=False)  # fmt: skip
        self.about = gr.Textbox(label="About the picture", lines=3, elem_id="about")
        with gr.Row():
            for task, field in self.first.items():
                label = TASKS[task][0] if task in TASKS else "Replay"
                button = gr.Button(f"→ {label}", size="sm", min_width=140, elem_id=f"send-{task}")
                chosen = [self.shots, self.chosen]
                event = button.click(partial(self.send, task), chosen, [self.tabs, field])
                if task == "replay":
                    event.then(about_file, field, self.facts, queue=False)

        def choose(shots: list[Any], event: gr.SelectData) -> list[Any]:
            return [event.index, about(shots[event.index])]

        self.gallery.select(choose, self.shots, [self.chosen, self.about], queue=False)
        self.stop.click(self.cancel, self.live, queue=False)

    def _run(self, button: Any, work: Callable[..., str], inputs: list[Any], found: Any) -> None:
        """A button that begins a run; while that goes, no other can be begun.

        found: where the path of what it finds goes, if that is no picture for the gallery.
        """
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        switches = [self.stop, *(run[0] for run in self.runs)]
        outputs = [self.shown, self.gallery, self.shots, self.chosen, self.about]
        event = button.click(self.begin, None, [self.live, self.shown, *switches], queue=False)
        event = event.then(partial(self.go, work), [self.live, self.shots, *inputs], outputs,
                           concurrency_id="model", concurrency_limit=1, **quiet)  # fmt: skip
        event = event.then(self.end, None, switches, queue=False, **quiet)
        if found is not None:
            event.then(lambda live: live.made[-1]["path"] if live.made else None, self.live, found)

    def _choice(self, task: str | None) -> Any:
        label, names = "Model" if task else "Checkpoint", self.studio.names(task)
        return self.gr.Dropdown(names, value=next(iter(names), None), label=label)

    def found(self) -> list[Any]:
        """What is in the folder now: for every drop-down, and what cannot be used."""
        lines = self.studio.skipped()
        for line in lines:
            log.warning("skipped: %s", line)
        text = "".join(f"\n* skipped: {html.escape(line)}" for line in lines)
        return [*map(self._choice, self.models), self._choice(None), text]

    def begin(self) -> list[Any]:
        live, off = Live(), self.gr.Button(interactive=False)
        return [live, show(live), self.gr.Button(interactive=True), *[off for _ in self.runs]]

    def end(self) -> list[Any]:
        on = self.gr.Button(interactive=True)
        return [self.gr.Button(interactive=False), *[on for _ in self.runs]]

    def go(self, work: Callable[..., str], live: Live | None, shots: list[Any],
           *answers: Any) -> Iterator[list[Any]]:  # fmt: skip
        """Begins the run and shows it till it ends; pictures come when they are finished."""
        seen, live = 0, live or Live()
        for live in follow(live, lambda live: work(live, *answers)):
            more = [self.gr.skip()] * 4
            if fresh := [info for info in live.made[seen:] if "seed" in info]:
                shots = [*fresh[::-1], *shots][:60]
                pictures = [(info["path"], f"seed {info['seed']}") for info in shots]
                more = [self.gr.Gallery(pictures, selected_index=0), shots, 0, about(shots[0])]
            seen = len(live.made)
            yield [show(live), *more]

    def work(self, task: str, names: list[str], make: Callable[[Namespace, Live], str],
             live: Live, model: str | None, *answers: Any) -> str:  # fmt: skip
        """A run of a task."""
        values = told(dict(zip(names, answers, strict=True)), self.studio.uploads)
        return make(self.studio.flags(flags.parse(PARSERS[task], []), model, values), live)

    def replay(self, live: Live, path: str | None) -> str:
        if path is None:
            raise ValueError("there is no picture: put one in, or send one from the results")
        return self.studio.replay(flags.parse(replay.PARSER, [path]), live)

    def cancel(self, live: Live | None) -> None:
        if live is not None:
            live.stop.set()

    def send(self, task: str, shots: list[Any], chosen: int) -> list[Any]:
        """The chosen picture in the field of another tab."""
        if not shots:
            return [self.gr.skip(), self.gr.skip()]
        path = shots[min(chosen, len(shots) - 1)]["path"]
        values = {"inpaint": {"background": path, "layers": [], "composite": None},
                  "unclip": [path]}  # fmt: skip
        return [self.gr.Tabs(selected=task), values.get(task, path)]


def serve(args: Namespace) -> None:
    """Opens the page and stays until it is interrupted."""
    if args.listen and ":" not in (args.auth or ""):
        raise ValueError("--listen lets everybody in: say who may with --auth USER:PASSWORD")
    limits = Limits(side=args.max_side, steps=args.max_steps, batch=args.max_batch)
    memory = args.memory and args.memory * 2**30
    studio = Studio(args.models, args.outdir, args, limits, memory, args.lora)
    os.environ["GRADIO_TEMP_DIR"] = str(studio.outdir / "served")  # or it would be in /tmp
    page = Page(studio)
    log.info("open http://127.0.0.1:%d", args.port)
    page.build().queue(max_size=args.max_queue, api_open=False).launch(
        server_name="0.0.0.0" if args.listen else "127.0.0.1",
        server_port=args.port,
        auth=tuple(args.auth.split(":", 1)) if args.auth else None,
        allowed_paths=[str(studio.outdir / name) for name in ("samples", "replays", "uploads")],
        max_file_size="64mb",
        show_error=True,
        quiet=True,
        share=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        theme=page.gr.themes.Default(**FONTS),
        css=CSS,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return load.run(serve, PARSER, argv)


if __name__ == "__main__":
    sys.exit(main())
