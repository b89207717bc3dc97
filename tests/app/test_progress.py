"""Progress: a job in a thread says how far it is, stops when asked to, and never breaks."""

import threading

import pytest
import torch

from ldm.app.progress import Progress, follow
from ldm.pipelines import Stop

LATENT = torch.zeros(2, 4, 8, 8)


def finish(progress, work):
    for _ in follow(progress, work):
        pass
    return progress


def test_a_run_is_shown_while_it_goes_and_in_the_end():
    gate = threading.Event()

    def work(progress):
        progress.on_step(0, 2, LATENT, LATENT)
        gate.wait(10)
        progress.add_image({"seed": 1})
        return "finished"

    shown = follow(Progress(total=2), work)
    while (progress := next(shown)).step == 0:
        pass
    assert (progress.message, progress.fraction) == ("step 1 of 2", 0.5)
    gate.set()
    progress = [*shown][-1]
    assert (progress.message, progress.fraction, progress.has_failed) == ("finished", 0.5, False)


def test_a_run_stops_at_the_next_step():
    progress, steps = Progress(), []

    def work(progress):
        for step in range(100):
            steps.append(step)
            if step == 3:
                progress.stop.set()
            progress.on_step(step, 100, LATENT, LATENT)

    assert "stopped at step 4 of 100, 0 of 1 images" in finish(progress, work).message
    assert len(steps) == 4


def test_a_run_that_is_to_stop_does_not_begin():
    progress = Progress()
    progress.stop.set()
    assert "stopped" in finish(progress, lambda progress: progress.set_message("loading")).message


def test_whoever_closes_the_iterator_stops_the_run():
    ended = threading.Event()

    def work(progress):
        try:
            while True:
                progress.on_step(0, 1, LATENT, LATENT)
        except Stop:
            ended.set()
            raise

    shown = follow(Progress(), work)
    next(shown)
    shown.close()
    assert ended.is_set()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("bad\nhint: better"), "bad — hint: better"),
        (RuntimeError("CUDA out of memory"), "out of memory"),
        (ZeroDivisionError("by zero"), "by zero"),
    ],
)
def test_an_error_is_one_line(error, message):
    def work(progress):
        raise error

    progress = finish(Progress(), work)
    assert progress.has_failed
    assert progress.message.startswith(message)
    assert "\n" not in progress.message
