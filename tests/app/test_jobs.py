"""Jobs: one runs at a time and reports its progress; others wait in the queue or are removed."""

import threading
import time
from functools import partial

import pytest
import torch

from ldm.app.jobs import Jobs
from ldm.app.progress import Progress
from ldm.pipelines import Stop
from ldm.runtime.errors import ArgumentError

LATENT = torch.zeros(2, 4, 8, 8)


@pytest.fixture
def jobs():
    return Jobs(max_waiting=2)


def wait_for(job):
    deadline = time.monotonic() + 20
    while not job.has_ended:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return job.progress


@pytest.fixture
def gate():
    """An event that a running job waits for, so that others queue behind it."""
    gate = threading.Event()
    yield gate
    gate.set()


def make_waiting_job(gate):
    def work(progress):
        while not gate.wait(0.01):
            progress.set_message("waiting")
        return "done"

    return work


def test_jobs_run_in_the_order_of_submission(jobs, gate):
    order = []
    first = jobs.submit("me", "1", make_waiting_job(gate))
    second = jobs.submit("you", "2", lambda progress: order.append(2) or "done")
    assert (jobs.count_ahead(first), jobs.count_ahead(second)) == (0, 1)
    assert order == []
    gate.set()
    assert wait_for(second).message == "done"
    assert first.has_ended


def test_a_queued_job_is_removed_at_once_and_a_running_one_stops_at_its_next_step(jobs, gate):
    running = jobs.submit("me", "1", make_waiting_job(gate))
    queued = jobs.submit("you", "2", lambda progress: "done")
    jobs.stop("you")
    assert queued.state == "removed"
    jobs.stop("me")
    assert "0 of 1 images are finished" in wait_for(running).message


def test_a_visitor_removes_only_their_own_jobs_from_the_queue(jobs, gate):
    running = jobs.submit("me", "1", make_waiting_job(gate))
    mine = jobs.submit("me", "2", lambda progress: "done")
    yours = jobs.submit("you", "3", lambda progress: "done")
    with pytest.raises(ArgumentError, match="the queue is full"):
        jobs.submit("you", "4", lambda progress: "done")
    jobs.clear("me")
    assert [job.state for job in (running, mine, yours)] == ["running", "removed", "queued"]


def test_images_of_a_run_stay_in_the_order_of_its_seeds_before_older_ones(jobs):
    def work(progress, seeds):
        for seed in seeds:
            progress.add_image({"seed": seed})
        return "done"

    for visitor, seeds in (("me", [1, 2]), ("me", [3, 4]), ("you", [5])):
        wait_for(jobs.submit(visitor, "", partial(work, seeds=seeds)))
    assert [info["seed"] for info in jobs.list_infos("me")] == [3, 4, 1, 2]


def test_the_first_images_of_a_visitor_are_read_once():
    reads = []
    jobs = Jobs(1, list_initial_infos=lambda: reads.append(1) or [])
    assert jobs.list_infos("me") is jobs.list_infos("me")
    assert len(reads) == 1


def test_progress_counts_images_and_steps_and_estimates_the_time_left():
    progress = Progress(total=6)
    progress.add_image({"seed": 1})
    progress.add_image({"seed": 2})
    progress.on_step(29, 60, LATENT, LATENT)
    assert (progress.message, progress.fraction) == ("image 3–4 of 6, step 30 of 60", 0.5)
    progress.on_step(59, 60, LATENT, LATENT)
    assert progress.fraction == pytest.approx(4 / 6)
    progress._start_time -= 100
    progress.on_step(59, 60, LATENT, LATENT)
    assert progress.message.endswith("step 60 of 60, 50 s left")


def test_a_stopped_run_keeps_its_unfinished_image():
    progress = Progress(total=2)
    progress.stop_event.set()
    with pytest.raises(Stop) as stop_error:
        progress.on_step(3, 10, LATENT, LATENT)
    assert stop_error.value.latent is LATENT
    progress.add_image({"seed": 1, "unfinished": 4})
    expected = "stopped at step 4 of 10, 0 of 2 images are finished, 1 unfinished"
    assert progress.describe_stop() == expected


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("bad\nhint: better"), "bad — hint: better"),
        (RuntimeError("CUDA out of memory"), "out of memory"),
        (ZeroDivisionError("by zero"), "by zero"),
    ],
)
def test_an_error_is_one_line(jobs, error, message):
    def work(progress):
        raise error

    progress = wait_for(jobs.submit("me", "", work))
    assert progress.has_failed
    assert progress.message.startswith(message)
    assert "\n" not in progress.message
