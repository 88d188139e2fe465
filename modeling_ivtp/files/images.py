"""Read pictures from files, addresses and data URLs, as upright 8-bit RGB.

The file imports nothing of this package: it also goes to the Hub beside `handler.py`, as `handler_images.py`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import os
import re
import socket
import threading
import urllib.parse
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import BinaryIO

import httpx
import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970
"""Pillow's own limit, 13,377 x 13,377, above which it warns of a decompression bomb."""
MAX_DOWNLOAD = 100_000_000
MAX_REDIRECTS = 10
# IPv6 addresses that contain an IPv4 address (RFC 6052); the rules hold for the address inside.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Networks that not every release of Python calls private: metadata services of clouds, and networks of IPv6 that stand
# for addresses of IPv4 or for a site's own.
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
# Formats that hold nothing but pixels; to open others, Pillow may run other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "TGA")
# Formats that strangers may send: they are cheap to decode, and their size is known before anything is decoded.
STRANGERS_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_SCANS = 100
"""Most scans of a stranger's progressive JPEG; each is work over the whole picture, however few bytes it has."""


# Markers that begin a segment, or end the picture. Zeros and restart marks among a scan's data do neither; what the
# standard reserves is skipped by decoders.
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")

LONGEST_SHOWN = 250
"""Characters of a source that an error repeats."""
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
# JPEG, PNG, GIF, WEBP, and TIFF of either byte order.
_BASE64_BEGINNINGS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK")


def load_image(
    source: str | os.PathLike[str] | bytes | Image.Image,
    *,
    timeout: float = 30.0,
    max_bytes: int = MAX_DOWNLOAD,
    max_pixels: int = MAX_PIXELS,
    from_stranger: bool = False,
    label: str = "the image",
) -> Image.Image:
    """Load one picture in RGB, ready for the processor.

    EXIF orientation is applied, transparency is laid over white, 16-bit and floating-point values are scaled to 8 bits
    (floating-point ones from 0…1), and the first frame of an animation is taken.

    Parameters
    ----------
    source : str, path, bytes or PIL image
        A file, an `http(s)://` address, a `data:` URL, the base64 of a file, a file's content, or an open picture.
    timeout : float
        Seconds that a download may take, from the first lookup to the last byte.
    max_bytes : int
        Largest download or data URL.
    max_pixels : int
        Largest picture, at most `MAX_PIXELS`.
    from_stranger : bool, default False
        Whether `source` comes from somebody who must not reach what this machine reaches. If so, files are refused, and
        addresses that are not public, by any name and after any redirect, and formats that are costly to decode.
    label : str
        What errors call a picture that has no name: content, or an open picture.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, at least 1 x 1.

    Raises
    ------
    ValueError
        If `source` holds no readable picture or one that is too large, or if a stranger may not name it.
    OSError
        If the file cannot be opened or the address does not answer.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, label, max_pixels)
    text = source.strip() if isinstance(source, str) else ""
    if isinstance(source, bytes):
        content = source
    elif text[:5].lower() == "data:":
        content, label = _data_url(text, max_bytes), "the data URL"
    elif "://" in text:
        content, label = download(text, timeout, max_bytes, public_only=from_stranger), shortened(text)
    elif from_stranger:
        raise ValueError(f"{str(source)[:80]!r} is not an http, https or data URL; files of this machine are not read")
    elif is_base64(text):
        content, label = _data_url(f"data:;base64,{text}", max_bytes), "the base64 text"
    else:
        return _from_file(source, max_pixels)
    if from_stranger and content.startswith(b"\xff\xd8") and _scans(content) > MAX_SCANS:
        raise ValueError(f"{label} is a JPEG of more than {MAX_SCANS} scans")
    return _decode(io.BytesIO(content), label, max_pixels, STRANGERS_FORMATS if from_stranger else FORMATS)


def _scans(content: bytes) -> int:
    """Count the scans of a JPEG up to its end, after which may come anything, such as the video of a motion photo."""
    count, place = 0, 2
    while (marker := _SEGMENT.search(content, place)) is not None and marker[0] != b"\xff\xd9":
        count += marker[0] == b"\xff\xda"
        # A segment begins with its length; a scan's data, which end at the next marker, come after its segment.
        place = marker.end() + max(2, int.from_bytes(content[marker.end() : marker.end() + 2], "big"))
    return count


def _from_file(source: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    path = Path(source).expanduser()
    if not os.path.exists(path):  # False also for a name that is too long, for which pathlib raises
        raise FileNotFoundError(f"there is no image {shortened(repr(str(source)))}")
    if not path.is_file():
        raise ValueError(f"the image {shortened(repr(str(source)))} is not a file")
    with open(path, "rb") as file:
        return _decode(file, str(source), max_pixels, FORMATS)


def is_base64(text: str) -> bool:
    """Tell whether a text is the base64 of a picture's file, as some data sets hold them, and no path."""
    return len(text) >= 64 and text.startswith(_BASE64_BEGINNINGS) and _BASE64.fullmatch(text) is not None


def shortened(text: str) -> str:
    """Return a text for an error, cut if it is longer than a path or an address would be."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:100]}…{text[-60:]} ({len(text):,} characters)"


def _decode(file: BinaryIO, label: str, max_pixels: int, allowed: Sequence[str]) -> Image.Image:
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


def _to_rgb(image: Image.Image, label: str, max_pixels: int) -> Image.Image:
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
            # The 32-bit mode holds pictures of 16 bits, and of 8 bits if no value is above 255.
            values = np.asarray(image).astype(np.float64)
            return _from_values(values / 257 if values.max() > 255 else values)
        if image.mode == "F":
            values = np.asarray(image).astype(np.float64)
            finite = values[np.isfinite(values)]
            if not finite.size:
                raise ValueError("none of its values is a finite number")
            # Infinities and NaN, which becomes black, say nothing about the range of the others.
            return _from_values(np.nan_to_num(values * 255 if finite.max() <= 1 else values))
        if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
            layered = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, layered).convert("RGB")
        return image.convert("RGB")
    except Exception as error:
        # On a damaged file a decoder may raise OSError, SyntaxError, struct.error, EOFError and more.
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
    if not header.strip().lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(payload)
    try:
        letters = b"".join(urllib.parse.unquote_to_bytes(payload).split())
        # Some clients write the alphabet that is made for addresses, and leave out the padding.
        letters = letters.translate(_URL_SAFE).rstrip(b"=")
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data URL is not valid base64: {error}") from error


def download(url: str, timeout: float, max_bytes: int, *, public_only: bool) -> bytes:
    """Download the content of an http(s) address, with one deadline for lookup, handshake, headers and body.

    Parameters
    ----------
    url : str
    timeout : float
        Seconds.
    max_bytes : int
    public_only : bool
        Whether to refuse addresses that are not public, by any name and after any redirect.

    Raises
    ------
    ValueError
        If the address is none, is not public, or holds more.
    OSError
        If it does not answer in time, or not with a file.
    """
    label = shortened(url)
    if url.split("://", 1)[0].lower() not in ("http", "https"):
        raise ValueError(f"{label} is not supported; images come from files and from http, https and data URLs")
    content: Future[bytes] = Future()

    def work() -> None:
        try:
            content.set_result(asyncio.run(asyncio.wait_for(_fetch(url, max_bytes, public_only), timeout)))
        except BaseException as error:
            content.set_exception(error)

    # A caller may have an event loop of its own, and the system's resolver cannot be interrupted.
    threading.Thread(target=work, daemon=True).start()
    try:
        return content.result(timeout)
    except (TimeoutError, FutureTimeoutError, asyncio.TimeoutError, httpx.TimeoutException) as error:
        raise TimeoutError(f"{label} took longer than {timeout:g} seconds") from error
    except httpx.RemoteProtocolError as error:
        raise OSError(f"{label} gave no proper answer: {error}") from error
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, OverflowError, socket.gaierror) as error:
        raise OSError(f"{label} cannot be reached: {error}") from error


async def _fetch(url: str, max_bytes: int, public_only: bool) -> bytes:
    """Follow an address to its content."""
    label = shortened(url)
    context = httpx.create_ssl_context()
    context.load_default_certs()  # those of the system, beside the ones httpx brings
    # Compressed, a few bytes could become gigabytes. A proxy would look names up where they cannot be checked.
    async with httpx.AsyncClient(
        headers={"User-Agent": "ivtp-llava", "Accept": "image/*", "Accept-Encoding": "identity"},
        transport=_PublicTransport(verify=context) if public_only else None,
        verify=context,
        trust_env=not public_only,
        timeout=None,
    ) as client:
        request = client.build_request("GET", url)
        for _ in range(MAX_REDIRECTS + 1):
            answer = await client.send(request, stream=True)
            if answer.next_request is None:
                return await _body(answer, label, max_bytes)
            # A redirect's own body may be endless; nobody reads it.
            await answer.aclose()
            request = answer.next_request
            if request.url.scheme not in ("http", "https"):
                raise OSError(
                    f"{label} answered {answer.status_code} with {shortened(str(request.url))}, which is not allowed"
                )
        raise OSError(f"{label} answered {answer.status_code} more than {MAX_REDIRECTS} times")


async def _body(answer: httpx.Response, label: str, max_bytes: int) -> bytes:
    """Read an answer piece by piece, up to the limit."""
    if not answer.is_success:
        raise OSError(f"{label} answered {answer.status_code} {answer.reason_phrase}")
    announced = answer.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise ValueError(f"{label} is {int(announced):,} bytes; at most {max_bytes:,} are downloaded")
    content = bytearray()
    async for piece in answer.aiter_raw():
        content += piece
        if len(content) > max_bytes:
            raise ValueError(f"{label} is larger than {max_bytes:,} bytes")
    return bytes(content)


class _PublicTransport(httpx.AsyncHTTPTransport):
    """A transport that connects to public addresses only, and to the very address that was checked."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; raises ValueError if a name stands for any address that is not public."""
        host = request.url.raw_host.decode("ascii")
        # A second lookup could find another address, so the connection is made to the result of this one.
        addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, request.url.port, type=socket.SOCK_STREAM)]
        if not all(map(_is_public, addresses)):
            raise ValueError(f"{host} is not a public address; images are not fetched from there")
        error: Exception = OSError(f"{host} has no address")
        for address in addresses:
            checked = httpx.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return await super().handle_async_request(checked)
            except httpx.ConnectError as failure:
                error = failure
        raise error


def _is_public(address: str) -> bool:
    """Tell whether everybody may reach a numeric address."""
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
