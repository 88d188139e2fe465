"""Pictures from files, URLs and data URLs, as upright 8-bit RGB.

The file needs nothing of this package: it also goes to the Hub beside `handler.py`, as `handler_images.py`.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

# Pillow's own limit before it speaks of a decompression bomb: 13,377 x 13,377.
MAX_PIXELS = 178_956_970
MAX_DOWNLOAD = 100_000_000
# Addresses of IPv6 that stand for one of IPv4 (RFC 6052): what counts is the address inside.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Beyond what Python calls private, which differs between its releases: metadata services of clouds, and networks of
# IPv6 that stand for addresses of IPv4 or for a site's own.
_NOT_PUBLIC = [
    ipaddress.ip_network(name)
    for name in (
        "100.64.0.0/10",
        "168.63.129.16/32",
        "192.0.0.0/24",
        "198.18.0.0/15",
        "::/96",
        "::ffff:0:0:0/96",
        "64:ff9b:1::/48",
        "fec0::/10",
    )
]
# Formats that hold pixels and nothing else; Pillow would also open some by running other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "TGA")


# What strangers may send: formats whose size is known before anything is decoded, and that are cheap to decode.
STRANGERS_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_SCANS = 100
"""Scans of a progressive JPEG from a stranger; each of them is work over the whole picture, however few its bytes."""


def load_image(
    source: str | os.PathLike[str] | bytes | Image.Image,
    *,
    timeout: float = 30.0,
    max_bytes: int = MAX_DOWNLOAD,
    max_pixels: int = MAX_PIXELS,
    from_stranger: bool = False,
) -> Image.Image:
    """One picture in RGB, ready for the processor.

    EXIF orientation is applied, transparency is laid over white, 16-bit and floating-point values are scaled to 8 bits
    (floating-point ones from 0…1), of an animation the first frame is taken.

    Parameters
    ----------
    source : str, path, bytes or PIL image
        A file, an `http(s)://` address, a `data:` URL, a file's content, or a picture that is open already.
    timeout : float
        Seconds a download may take, all in all.
    max_bytes : int
        Largest download or data URL.
    max_pixels : int
        Largest picture, at most `MAX_PIXELS`.
    from_stranger : bool, default False
        Whether `source` was named by somebody who must not reach what this machine reaches: files are refused then, and
        so are addresses that are not public, by whatever name, after whatever redirect, and formats that take more to
        read than they weigh.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, at least 1 x 1.

    Raises
    ------
    ValueError
        If there is no readable picture after `source`, one that is too large, or a source that a stranger may not
        name.
    OSError
        If the file cannot be opened or the address does not answer.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the image", max_pixels)
    formats = STRANGERS_FORMATS if from_stranger else FORMATS
    if isinstance(source, bytes) or (isinstance(source, str) and (source.startswith("data:") or "://" in source)):
        if isinstance(source, bytes):
            content, label = source, "the image"
        elif source.startswith("data:"):
            content, label = _data_url(source, max_bytes), "the data URL"
        else:
            content, label = _download(source, timeout, max_bytes, from_stranger), source
        if from_stranger and content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > MAX_SCANS:
            raise ValueError(f"{label} is a JPEG of more than {MAX_SCANS} scans")
        return _decode(io.BytesIO(content), label, max_pixels, formats)
    if from_stranger:
        raise ValueError(f"{str(source)[:80]!r} is not an http, https or data URL; files of this machine are not read")
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no image {str(source)!r}")
    if not path.is_file():
        raise ValueError(f"{source} is not a file")
    with open(path, "rb") as file:
        return _decode(file, str(source), max_pixels)


def _decode(file: BinaryIO, label: str, max_pixels: int = MAX_PIXELS, allowed: Sequence[str] = FORMATS) -> Image.Image:
    if not file.read(1):
        raise ValueError(f"{label} is empty")
    file.seek(0)
    Image.init()
    formats = [name for name in allowed if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{label} is too large: at most {max_pixels:,} pixels are read") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{label} is not an image in a known format ({', '.join(formats)})") from error
    except Exception as error:
        raise ValueError(f"{label} is not a readable image: {error}") from error
    with image:
        return _to_rgb(image, label, max_pixels)


def _to_rgb(image: Image.Image, label: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"{label} is {width:,} x {height:,} pixels; the largest picture that is read has {max_pixels:,}"
        )
    if width < 1 or height < 1:
        raise ValueError(f"{label} is {width} x {height} pixels")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return _from_values(np.asarray(image).astype(np.float64) / 257)
        if image.mode == "I":
            # A picture of 16 bits in a 32-bit mode; one that stays below 256 has 8.
            values = np.asarray(image).astype(np.float64)
            return _from_values(values / 257 if values.max() > 255 else values)
        if image.mode == "F":
            values = np.nan_to_num(np.asarray(image).astype(np.float64))
            return _from_values(values * 255 if values.max() <= 1 else values)
        if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
            layered = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, layered).convert("RGB")
        return image.convert("RGB")
    except Exception as error:
        # Decoders raise whatever the damage makes them stumble over: OSError, SyntaxError, struct.error, EOFError...
        raise ValueError(f"{label} is not a readable image: {error}") from error


def _from_values(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _data_url(url: str, max_bytes: int) -> bytes:
    header, comma, payload = url.partition(",")
    # Base64 takes four characters for three bytes.
    if len(payload) > max_bytes // 3 * 4 + 4:
        raise ValueError(f"the data URL is larger than {max_bytes:,} bytes")
    if not comma:
        raise ValueError("the data URL has no comma before its data")
    if not header.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(payload)
    try:
        return base64.b64decode(urllib.parse.unquote_to_bytes(payload), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data URL is not valid base64: {error}") from error


def _download(url: str, timeout: float, max_bytes: int, public_only: bool) -> bytes:
    scheme = url.split("://", 1)[0].lower()
    if scheme not in ("http", "https"):
        raise ValueError(f"{url} is not supported; images come from files and from http, https and data URLs")
    request = urllib.request.Request(url, headers={"User-Agent": "ivtp-llava", "Accept": "image/*"})
    with _Clock(timeout) as clock:
        try:
            return _fetch(request, clock, max_bytes, public_only)
        except ValueError as error:
            # Also what http.client says of addresses with a port or letters that no address has.
            raise ValueError(str(error) if url in str(error) or public_only else f"{url}: {error}") from error
        except urllib.error.HTTPError as error:
            raise OSError(f"{url} answered {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException, OverflowError) as error:
            if clock.over or isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", 0), TimeoutError):
                raise TimeoutError(f"{url} took longer than {timeout:g} seconds") from error
            if isinstance(error, urllib.error.URLError):
                if isinstance(error.reason, ValueError):
                    raise error.reason from None
                raise OSError(f"{url} cannot be reached: {error.reason}") from error
            if isinstance(error, http.client.HTTPException):
                raise OSError(f"{url} gave no proper answer: {type(error).__name__} {error}") from error
            raise OSError(f"{url} cannot be reached: {error}") from error


def _fetch(request: urllib.request.Request, clock: _Clock, max_bytes: int, public_only: bool) -> bytes:
    url = request.full_url
    with _opener(clock, public_only).open(request, timeout=clock.left) as answer:
        announced = answer.headers.get("Content-Length", "")
        content = io.BytesIO()
        if announced.isdigit() and int(announced) > max_bytes:
            raise ValueError(f"{url} is {int(announced):,} bytes; at most {max_bytes:,} are downloaded")
        while piece := answer.read1(1 << 16):
            content.write(piece)
            if content.tell() > max_bytes:
                raise ValueError(f"{url} is larger than {max_bytes:,} bytes")
        if clock.over:
            # What was closed in time looks like what has ended.
            raise TimeoutError(url)
        return content.getvalue()


class _Clock:
    """One deadline from the first lookup of a name to the last byte; when it is over, whatever is open is closed."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        self._open: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._close)
        self._timer.daemon = True

    def __enter__(self) -> _Clock:
        self._timer.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._timer.cancel()

    @property
    def left(self) -> float:
        """Seconds; never quite none, which sockets would take for no limit."""
        return max(0.01, self._ends - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether time is up."""
        return time.monotonic() >= self._ends

    def watch(self, connection: Any) -> None:
        """Have a connection closed in time."""
        connection.settimeout(self.left)
        self._open.append(connection)

    def _close(self) -> None:
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def resolve(self, host: str, port: int) -> list[Any]:
        """What a name stands for; the system's own resolver knows no limit."""
        found: list[Any] = []

        def look_up() -> None:
            try:
                found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError, OverflowError) as error:
                found.append(error)

        worker = threading.Thread(target=look_up, daemon=True)
        worker.start()
        worker.join(self.left)
        if not found:
            raise TimeoutError(f"{host} was not found in time")
        if isinstance(found[0], Exception):
            raise OSError(f"{host} is not known: {found[0]}")
        return list(found[0])


def _opener(clock: _Clock, public_only: bool) -> urllib.request.OpenerDirector:
    """urllib's own without the handlers for files and FTP, to which a server must not be able to redirect."""
    context = ssl.create_default_context()
    with suppress(ImportError):
        import certifi

        # Some installations of Python come without any certificates of their own.
        context.load_verify_locations(certifi.where())
    opener = urllib.request.OpenerDirector()
    for handler in (
        # A proxy would look names up where nobody here can check what they stand for.
        urllib.request.ProxyHandler({} if public_only else None),
        _HTTP(clock, public_only),
        _HTTPS(clock, public_only, context),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _connect_public(host: str, port: int, clock: _Clock) -> socket.socket:
    """A connection to the very address that was checked, so that a name cannot change its mind in between."""
    found = clock.resolve(host, port)
    for *_, address in found:
        if not _is_public(str(address[0])):
            raise ValueError(f"{host} is not a public address; images are not fetched from there")
    error: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in found:
        if clock.over:
            break
        connection = socket.socket(family, kind, protocol)
        try:
            clock.watch(connection)
            connection.connect(address)
            return connection
        except OSError as failed:
            connection.close()
            error = failed
    raise error


def _is_public(address: str) -> bool:
    # A scope, as in fe80::1%eth0, belongs to a link-local address.
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip.version == network.version and ip in network for network in _NOT_PUBLIC):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inside is not None:
            return _is_public(str(inside))
    return ip.is_global and not ip.is_multicast


class _Clocked:
    """Mixin for connections that keep to a clock and, if told so, to public addresses."""

    host: str
    port: int

    def __init__(self, *args: Any, clock: _Clock, public_only: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock, self.public_only = clock, public_only

    def connect(self) -> None:
        if self.public_only:
            self.sock = self.secured(_connect_public(self.host, self.port, self.clock))
        else:
            super().connect()  # type: ignore[misc]
        self.clock.watch(self.sock)

    def secured(self, connection: socket.socket) -> socket.socket:
        return connection


class _Connection(_Clocked, http.client.HTTPConnection):
    """HTTP."""


class _TLSConnection(_Clocked, http.client.HTTPSConnection):
    """HTTPS."""

    def secured(self, connection: socket.socket) -> socket.socket:
        context: ssl.SSLContext = self._context  # type: ignore[attr-defined]
        return context.wrap_socket(connection, server_hostname=self.host)


class _HTTP(urllib.request.HTTPHandler):
    def __init__(self, clock: _Clock, public_only: bool) -> None:
        super().__init__()
        self.connection: Any = partial(_Connection, clock=clock, public_only=public_only)

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self.connection, req)


class _HTTPS(urllib.request.HTTPSHandler):
    def __init__(self, clock: _Clock, public_only: bool, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self.connection: Any = partial(_TLSConnection, clock=clock, public_only=public_only)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self.connection, req, context=self._context)  # type: ignore[attr-defined]
