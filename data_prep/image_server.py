"""Images from a web server by plain HTTP(S): one connection kept open, every way to fail told by kind.

Python's own client in threads: httpx takes eight times the CPU for a file, and fsspec brings aiohttp and seven packages
more for the same speed. Proxies are those of the environment.
"""

import base64
import http.client
import time
from typing import NamedTuple, NoReturn
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

_MOST = 2**27  # bytes of one image
_REDIRECTS = (301, 302, 303, 307, 308)
_HOPS = 4
_LATER = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be another one later


class FetchError(Exception):
    """Why an image was not got: a kind to count by, a reason, and whether to ask again, not before `wait` seconds."""

    def __init__(self, kind: str, reason: str, *, again: bool = True, wait: float = 0.0) -> None:
        """`again`: another try may go better."""
        super().__init__(f"{kind}: {reason}")
        self.kind, self.reason, self.again, self.wait = kind, reason, again, wait


def check_address(address: str) -> str:
    """The address without a slash at its end; anything but http(s)://host[/path] is refused."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"--address must be http(s)://HOST[/PATH], got {address!r}")
    return address.rstrip("/")


class _Route(NamedTuple):
    """A connection to a host, perhaps through a proxy, which for plain HTTP is asked for whole addresses."""

    connection: http.client.HTTPConnection
    headers: dict[str, str]
    whole: bool


class ImageServer:
    """Connections of one thread; `get` gives the bytes at a URL or raises `FetchError`."""

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds that an answer may take in all."""
        self._timeout = timeout
        self._routes: dict[tuple[str, str], _Route] = {}

    def get(self, url: str) -> bytes:
        """The whole body of an answer with status 200."""
        deadline = time.monotonic() + self._timeout
        for _ in range(_HOPS):
            parts = urlsplit(url)
            try:
                body, moved = self._ask(parts, deadline)
            except BaseException:
                self._close(parts)
                raise
            if moved is None:
                return body
            self._close(parts)
            url = _followed(url, moved)
        raise FetchError("redirected", f"more than {_HOPS} times", again=False)

    def _ask(self, parts: SplitResult, deadline: float) -> tuple[bytes, str | None]:
        """The body, or where it has moved to."""
        place = parts.scheme, parts.netloc
        try:
            kept = place in self._routes
            route = self._routes.setdefault(place, self._routes.get(place) or self._route(parts))
            try:
                answer = self._answer(route, parts)
            except (http.client.RemoteDisconnected, ConnectionError):
                if not kept:
                    raise
                route.connection.close()  # the server had closed it after the last image
                answer = self._answer(route, parts)
            if answer.status in _REDIRECTS:
                return b"", answer.getheader("Location") or ""
            if answer.status != 200:
                _refuse(answer)
            return self._body(route.connection, answer, deadline), None
        except TimeoutError:
            raise FetchError("stalled", f"no whole answer in {self._timeout:g} s") from None
        except http.client.IncompleteRead:
            raise FetchError("cut short", "ended within a part of a body sent in parts") from None
        except OSError as error:
            raise FetchError("no connection", error.strerror or str(error) or type(error).__name__) from None
        except (http.client.HTTPException, ValueError) as error:
            raise FetchError("no answer", f"{type(error).__name__} {error}".strip()) from None

    def _route(self, parts: SplitResult) -> _Route:
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        headers = {"User-Agent": "geoaug", "Accept": "image/jpeg, */*"}
        proxy = _proxy(parts)
        if proxy is None:
            return _Route(kind(parts.hostname or "", parts.port, timeout=self._timeout), headers, False)
        secret = {}
        if proxy.username:
            text = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
            secret["Proxy-Authorization"] = f"Basic {base64.b64encode(text.encode()).decode()}"
        connection = kind(proxy.hostname or "", proxy.port or 80, timeout=self._timeout)
        if parts.scheme == "http":
            return _Route(connection, headers | secret, True)
        connection.set_tunnel(parts.hostname or "", parts.port or 443, secret)
        return _Route(connection, headers, False)

    def _answer(self, route: _Route, parts: SplitResult) -> http.client.HTTPResponse:
        route.connection.request("GET", parts.geturl() if route.whole else parts.path or "/", headers=route.headers)
        return route.connection.getresponse()

    def _body(self, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse, deadline: float) -> bytes:
        said = answer.length  # None where the body comes in parts or ends with the connection
        pieces, size = list[bytes](), 0
        while piece := answer.read1(2**18):
            pieces.append(piece)
            size += len(piece)
            if size > _MOST:
                raise FetchError("too large", f"more than {_MOST:,} bytes", again=False)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if connection.sock is not None:
                connection.sock.settimeout(left)
        if said is not None and size != said:
            raise FetchError("cut short", f"{size:,} of {said:,} bytes")
        answer.close()  # without which the connection would not be ready for the next
        if connection.sock is not None:
            connection.sock.settimeout(self._timeout)
        return b"".join(pieces)

    def _close(self, parts: SplitResult) -> None:
        if route := self._routes.pop((parts.scheme, parts.netloc), None):
            route.connection.close()

    def close(self) -> None:
        """Give all connections back."""
        for route in self._routes.values():
            route.connection.close()
        self._routes.clear()


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for an address."""
    found = getproxies().get(parts.scheme)
    if not found or proxy_bypass(parts.netloc):
        return None
    return urlsplit(found if "://" in found else f"http://{found}")


def _followed(url: str, moved: str) -> str:
    """The address that an answer sends us to, unless it leads to less safety."""
    to = urljoin(url, moved)
    if (
        not moved
        or urlsplit(to).scheme not in ("http", "https")
        or (url.startswith("https:") and to.startswith("http:"))
    ):
        raise FetchError("redirected", f"to {to[:80]!r}", again=False)
    return to


def _refuse(answer: http.client.HTTPResponse) -> NoReturn:
    """Raise what a status other than 200 means."""
    told = f"HTTP {answer.status} {answer.reason}".strip()
    if answer.status in (404, 410):
        raise FetchError("missing", told, again=False)
    text = answer.getheader("Retry-After") or ""
    wait = min(float(text), 60.0) if text.isascii() and text.isdigit() else 0.0
    raise FetchError(
        "server error" if answer.status >= 500 else "refused", told, again=answer.status in _LATER, wait=wait
    )
