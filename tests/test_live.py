"""ldm.live: a run in a thread tells how far it is, stops when asked to, and never breaks."""

import threading

import pytest
import torch

from ldm.app.progress import Live, follow
from ldm.pipelines import Stop

LATENT = torch.zeros(2, 4, 8, 8)


def finish(live, work):
    for _ in follow(live, work):
        pass
    return live


def test_a_run_is_shown_while_it_goes_and_in_the_end():
    gate = threading.Event()

    def work(live):
        live.watch(0, 2, LATENT, LATENT)
        gate.wait(10)
        live.report({"seed": 1})
        return "finished"

    shown = follow(Live(total=2), work)
    while (live := next(shown)).step == 0:
        pass
    assert (live.message, live.share) == ("step 1 of 2", 0.25)
    gate.set()
    live = [*shown][-1]
    assert (live.message, live.share, live.failed) == ("finished", 0.5, False)


def test_a_run_stops_at_the_next_step():
    live, steps = Live(), []

    def work(live):
        for step in range(100):
            steps.append(step)
            if step == 3:
                live.stop.set()
            live.watch(step, 100, LATENT, LATENT)

    assert "stopped at step 4 of 100, 0 of 1 pictures" in finish(live, work).message
    assert len(steps) == 4


def test_a_run_that_is_to_stop_does_not_begin():
    live = Live()
    live.stop.set()
    assert "stopped" in finish(live, lambda live: live.say("loading")).message


def test_whoever_closes_the_iterator_stops_the_run():
    ended = threading.Event()

    def work(live):
        try:
            while True:
                live.watch(0, 1, LATENT, LATENT)
        except Stop:
            ended.set()
            raise

    shown = follow(Live(), work)
    next(shown)
    shown.close()
    assert ended.is_set()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("bad\nhint: better"), "bad — hint: better"),
        (RuntimeError("CUDA out of memory"), "out of memory; these help"),
        (ZeroDivisionError("by zero"), "by zero"),
    ],
)
def test_an_error_is_one_line(error, message):
    def work(live):
        raise error

    live = finish(Live(), work)
    assert live.failed
    assert live.message.startswith(message)
    assert "\n" not in live.message
