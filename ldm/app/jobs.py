"""Queue the jobs of all visitors; one runs at a time, even if its page is closed."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ldm.app.progress import Progress
from ldm.generate.info import Info
from ldm.runtime.errors import ArgumentError, Stop, describe_error

__all__ = ["Job", "Jobs", "Work"]

MAX_GALLERY_IMAGES = 60  # per visitor

Work = Callable[[Progress], str]  # of a job: makes images, and returns the final message

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A job of a visitor.

    Args:
        visitor: Id of the visitor.
        title: Text shown in the queue.
    """

    visitor: str
    title: str
    work: Work
    progress: Progress
    state: Literal["queued", "running", "done", "removed"] = "queued"

    @property
    def has_ended(self) -> bool:
        """Whether it is done, or was removed from the queue."""
        return self.state in ("done", "removed")


class Jobs:
    """The job queue, and the newest images of each visitor.

    Args:
        max_waiting: Maximum number of waiting jobs.
        explain: Returns the message for an error.
        list_initial_infos: Returns the infos of the images that a visitor sees at first.
    """

    def __init__(
        self,
        max_waiting: int,
        explain: Callable[[BaseException], str] = describe_error,
        list_initial_infos: Callable[[], list[Info]] = list,
    ) -> None:
        self.max_waiting = max_waiting
        self.explain = explain
        self.list_initial_infos = list_initial_infos
        self._jobs: list[Job] = []  # the running one first
        self._galleries: dict[str, list[Info]] = {}
        self._lock = threading.Lock()

    def list_infos(self, visitor: str) -> list[Info]:
        """Return the infos of a visitor's images: the newest run first, each run in its order."""
        if visitor not in self._galleries:
            self._galleries.setdefault(visitor, self.list_initial_infos())
        return self._galleries[visitor]

    def submit(self, visitor: str, title: str, work: Work) -> Job:
        """Add a job to the queue.

        Raises:
            ArgumentError: The queue is full.
        """
        job = Job(visitor, title, work, Progress(on_image=partial(self._add_image, visitor)))
        with self._lock:
            if len(self._jobs) > self.max_waiting:
                raise ArgumentError(f"the queue is full: {self.max_waiting} jobs are waiting")
            self._jobs.append(job)
            if len(self._jobs) == 1:
                job.state = "running"
                threading.Thread(target=self._run_queue, daemon=True).start()
        return job

    def list_jobs(self, visitor: str) -> list[Job]:
        """Return the jobs of a visitor that have not ended."""
        jobs = list(self._jobs)  # a copy, as the worker thread changes the list
        return [job for job in jobs if job.visitor == visitor]

    def count_ahead(self, job: Job) -> int:
        """Return the number of jobs before this one in the queue."""
        jobs = list(self._jobs)
        return jobs.index(job) if job in jobs else 0

    def stop(self, visitor: str) -> None:
        """Stop the visitor's running job; if none is running, remove the first from the queue."""
        for job in self.list_jobs(visitor)[:1]:
            if job.state == "running":
                job.progress.stop_event.set()
                job.progress.message = "stopping after this step"
            else:
                self._remove([job])

    def clear(self, visitor: str) -> None:
        """Remove all waiting jobs of a visitor from the queue."""
        self._remove([job for job in self.list_jobs(visitor) if job.state == "queued"])

    def _remove(self, jobs: list[Job]) -> None:
        with self._lock:
            for job in jobs:
                if job.state == "queued":
                    job.state = "removed"
                    self._jobs.remove(job)

    def _add_image(self, visitor: str, index: int, info: Info) -> None:
        gallery = self.list_infos(visitor)
        gallery.insert(index, info)
        del gallery[MAX_GALLERY_IMAGES:]

    def _run_queue(self) -> None:
        while True:
            job = self._jobs[0]
            _run_job(job, self.explain)
            with self._lock:
                job.state = "done"
                self._jobs.remove(job)
                if not self._jobs:
                    return
                self._jobs[0].state = "running"


def _run_job(job: Job, explain: Callable[[BaseException], str]) -> None:
    progress = job.progress
    try:
        progress.message = "; ".join([job.work(progress), *progress.warnings])
    except Stop:
        progress.message = progress.describe_stop()
    except Exception as error:  # top level: any error becomes the message
        log.debug("a job failed", exc_info=True)
        progress.message = explain(error).replace("\n", " — ")
        progress.has_failed = True
    progress.preview = None
