"""A file on a web server as a stream that reconnects after a lost connection."""

import http.client
import io
import time
import urllib.error
import urllib.request
from typing import Any

from ldm.runtime.errors import MissingFile

__all__ = ["HTTPStream"]

MAX_ATTEMPTS = 6  # connections per read
TIMEOUT = 30  # seconds without a byte after which a connection counts as lost
RETRYABLE_STATUS_CODES = (408, 429)  # request timeout, too many requests


class HTTPStream(io.RawIOBase):
    """The file at an http(s) URL, as a raw binary stream that cannot seek.

    Reading raises MissingFile for a client error (HTTP 4xx), OSError for other failures.

    Args:
        retry_delay: Seconds before the second attempt, doubled for each later attempt.
    """

    def __init__(self, url: str, *, retry_delay: float = 1.0) -> None:
        self.url, self.retry_delay = url, retry_delay
        self.position = 0  # bytes read
        self.length = -1  # bytes in total; -1 = unknown
        self.response: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        for attempt in range(MAX_ATTEMPTS):
            try:
                if self.response is None:
                    self._connect()
                count: int = self.response.readinto(buffer)
                if not count and self.position < self.length:
                    raise OSError(f"response ended after {self.position} of {self.length} bytes")
                self.position += count
                return count
            except (OSError, http.client.HTTPException) as error:
                self._disconnect()
                code = error.code if isinstance(error, urllib.error.HTTPError) else 0
                if 400 <= code < 500 and code not in RETRYABLE_STATUS_CODES:
                    raise MissingFile(f"`{self.url}`: {error}") from error
                if attempt + 1 == MAX_ATTEMPTS:
                    raise OSError(f"`{self.url}`: {error}") from error
                time.sleep(self.retry_delay * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _connect(self) -> None:
        """Request the remaining bytes; if the server sends all, skip those read before."""
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self.position}-"})
        self.response = urllib.request.urlopen(request, timeout=TIMEOUT)
        start = self.position if self.response.status == 206 else 0
        if self.response.headers["Content-Length"]:
            self.length = start + int(self.response.headers["Content-Length"])
        while start < self.position:
            skipped = len(self.response.read(min(2**20, self.position - start)))
            if not skipped:
                raise OSError(f"response ended after {start} bytes")
            start += skipped

    def _disconnect(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None
