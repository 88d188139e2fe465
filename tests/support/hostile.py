"""Requests that no server may follow, as `inputs` of the endpoint handler, with what the handler says of each."""

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def tiled_tiff() -> str:
    """A TIFF of 100 x 100 pixels in one tile of 46,000 x 46,000, a kilobyte in all."""
    tags = [
        (256, 4, 100), (257, 4, 100), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 4, 46000),
        (323, 4, 46000), (324, 4, 8), (325, 4, 10),
    ]  # fmt: skip
    body = b"II*\0" + struct.pack("<I", 32) + zlib.compress(b"\0" * 100)[:24].ljust(24, b"\0")
    body += struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags
    )
    return base64.b64encode(body + struct.pack("<I", 0)).decode()


def many_scans() -> str:
    """A progressive JPEG with its last scan again and again: few bytes, much work."""
    file = io.BytesIO()
    Image.new("L", (900, 900)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    return base64.b64encode(content[:-2] + content[last:-2] * 300 + b"\xff\xd9").decode()


_BOMB = "bomb"
HOSTILE: dict[str, tuple[Any, str]] = {
    "path": ({"image": "/etc/passwd", "text": "x"}, "files are not read"),
    "relative path": ({"image": "../config.json", "text": "x"}, "files are not read"),
    "file address": ({"image": "file:///etc/passwd", "text": "x"}, "not supported"),
    "ftp": ({"image": "ftp://example.com/x.png", "text": "x"}, "not supported"),
    "loopback": ({"image": "http://127.0.0.1:1/x.png", "text": "x"}, "not a public address"),
    "localhost": ({"image": "http://localhost/x.png", "text": "x"}, "not a public address"),
    "private": ({"image": "http://10.0.0.1/x.png", "text": "x"}, "not a public address"),
    "link-local": ({"image": "http://169.254.169.254/latest/meta-data/", "text": "x"}, "not a public address"),
    "IPv6 loopback": ({"image": "http://[::1]/x.png", "text": "x"}, "not a public address"),
    "IPv4 inside IPv6": ({"image": "https://[::ffff:192.168.0.1]/x.png", "text": "x"}, "not a public address"),
    "IPv4 behind NAT64": ({"image": "http://[64:ff9b::7f00:1]/x.png", "text": "x"}, "not a public address"),
    "a number for an address": ({"image": "http://2130706433/x.png", "text": "x"}, "not a public address"),
    "no base64": ({"image": "???", "text": "x"}, "files are not read"),
    "no picture": ({"image": base64.b64encode(b"hello there").decode(), "text": "x"}, "not an image"),
    "too many pixels": (_BOMB, "pixels"),
    "too many bytes": ({"image": "A" * 27_000_000, "text": "x"}, "larger than 20,000,000 bytes"),
    "a tile larger than its picture": ({"image": tiled_tiff(), "text": "x"}, "not an image in a known format"),
    "an icon": ({"image": encoded(Image.new("RGB", (16, 16)), "ICO"), "text": "x"}, "not an image in a known format"),
    "many scans": ({"image": many_scans(), "text": "x"}, "more than 100 scans"),
    "many images": ({"images": ["AAAA"] * 40, "text": "x"}, "more than 32 images"),
    "half a character": ({"text": "a\ud800b"}, "surrogates not allowed"),
    "a port that is none": ({"image": "http://8.8.8.8:99999999999999999999999/x", "text": "x"}, "cannot be reached"),
    "a cloud's metadata": ({"image": "http://168.63.129.16/x.png", "text": "x"}, "not a public address"),
    "another cloud's": ({"image": "http://192.0.0.192/x.png", "text": "x"}, "not a public address"),
    "site-local": ({"image": "http://[fec0::1]/x.png", "text": "x"}, "not a public address"),
    "IPv4 under an old IPv6": ({"image": "http://[::127.0.0.1]/x.png", "text": "x"}, "not a public address"),
    "local NAT64": ({"image": "http://[64:ff9b:1::7f00:1]/x.png", "text": "x"}, "not a public address"),
    "more than the context": ({"text": "word " * 3000}, "the model takes 2048 in all"),
    "no text": ({"image": "AAAA"}, "text is missing"),
    "a number": (7, "an entry of inputs is"),
    "an image in the text": ({"text": "<image> what is this?"}, "must not be in a text"),
    "an image in another message": (
        [{"role": "user", "content": "<image>"}, {"role": "user", "content": [{"type": "image", "image": "AAAA"}]}],
        "must not be in a text",
    ),
    "too much text": ({"text": "x" * 30_000}, "at most 20,000"),
    "an unknown field": ({"text": "x", "path": "y"}, "unknown field(s) path; allowed: image"),
    "an unknown role": ([{"role": "root", "content": "x"}], "none of those allowed: system, user, assistant"),
    "an unknown part": ([{"role": "user", "content": [{"type": "video"}]}], "a part is"),
    "the answer is there": ([{"role": "assistant", "content": "x"}], "the last message is not the user's"),
}


def hostile_request(name: str) -> Any:
    """Return the handler's `inputs`; the largest picture is drawn only when it is asked for."""
    request, _ = HOSTILE[name]
    if request != _BOMB:
        return request
    return {"image": encoded(Image.new("1", (30_000, 30_000))), "text": "x"}
