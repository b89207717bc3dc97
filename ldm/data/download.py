"""A file on a web server, read from beginning to end; a lost connection is taken up again."""

import http.client
import io
import time
import urllib.error
import urllib.request
from typing import Any

__all__ = ["Download"]

SILENCE = 30  # seconds without a byte after which a connection counts as lost


class Download(io.RawIOBase):
    """What lies at an http(s) address, as a stream of bytes.

    tries: how often to connect before the next byte comes; pause: seconds before the second time,
        twice as long before each further one.
    Reading raises FileNotFoundError for what is not there, else OSError.
    """

    def __init__(self, url: str, *, tries: int = 6, pause: float = 1.0) -> None:
        self.url, self.tries, self.pause = url, tries, pause
        self.at, self.length = 0, -1  # bytes read, and in all if the server has said so
        self.answer: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        for attempt in range(self.tries):
            try:
                if self.answer is None:
                    self._connect()
                count: int = self.answer.readinto(buffer)
                if not count and self.at < self.length:
                    raise OSError(f"it ended after {self.at} of {self.length} bytes")
                self.at += count
                return count
            except (OSError, http.client.HTTPException) as error:
                self._disconnect()
                code = error.code if isinstance(error, urllib.error.HTTPError) else 0
                if 400 <= code < 500 and code not in (408, 429):
                    raise FileNotFoundError(f"`{self.url}`: {error}") from error
                if attempt + 1 == self.tries:
                    raise OSError(f"`{self.url}`: {error}") from error
                time.sleep(self.pause * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _connect(self) -> None:
        """Asks for what has not been read yet; a server that sends everything is read up to it."""
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self.at}-"})
        self.answer = urllib.request.urlopen(request, timeout=SILENCE)
        begins = self.at if self.answer.status == 206 else 0
        if self.answer.headers["Content-Length"]:
            self.length = begins + int(self.answer.headers["Content-Length"])
        while begins < self.at:
            skipped = len(self.answer.read(min(2**20, self.at - begins)))
            if not skipped:
                raise OSError(f"it ended after {begins} bytes")
            begins += skipped

    def _disconnect(self) -> None:
        if self.answer is not None:
            self.answer.close()
            self.answer = None
