"""Every kind of picture becomes upright 8-bit RGB, and what is no picture is refused in one sentence."""

import asyncio
import base64
import gzip
import io
import socket
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from modeling_ivtp.files import images
from modeling_ivtp.files.images import load_image


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def saved(path, image, kind="PNG", **options):
    path.write_bytes(encoded(image, kind, **options))
    return path


def colour(image):
    return tuple(np.asarray(image).reshape(-1, 3).mean(0).round().astype(int))


RED = Image.new("RGB", (6, 4), (200, 30, 40))


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (RED, "PNG", (200, 30, 40)),
        (RED.convert("CMYK"), "JPEG", (200, 30, 40)),
        (RED.convert("P", palette=Image.Palette.ADAPTIVE), "GIF", (200, 30, 40)),
        (Image.new("L", (6, 4), 90), "PNG", (90, 90, 90)),
        (Image.new("1", (6, 4), 1), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((4, 6), 128 * 257, np.uint16)), "PNG", (128, 128, 128)),
        (Image.fromarray(np.full((4, 6), 128 * 257, np.int32)), "TIFF", (128, 128, 128)),
        (Image.fromarray(np.full((4, 6), 0.5, np.float32)), "TIFF", (128, 128, 128)),
        (Image.new("RGBA", (6, 4), (200, 30, 40, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (6, 4), (200, 30, 40, 255)), "WEBP", (200, 30, 40)),
        (Image.new("LA", (6, 4), (0, 0)), "PNG", (255, 255, 255)),
    ],
    ids=[
        "rgb",
        "cmyk",
        "palette",
        "grey",
        "bilevel",
        "16 bit",
        "32 bit",
        "float",
        "transparent",
        "opaque",
        "grey alpha",
    ],
)
def test_modes_become_rgb(tmp_path, image, kind, expected):
    result = load_image(saved(tmp_path / "image", image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert (result.mode, result.size) == ("RGB", (6, 4))
    assert np.abs(np.array(colour(result)) - expected).max() <= 3


@pytest.mark.parametrize(("odd", "shade"), [(np.nan, 0), (np.inf, 255), (-np.inf, 0)])
def test_one_value_that_is_no_number_does_not_darken_the_others(tmp_path, odd, shade):
    values = np.full((4, 6), 0.5, np.float32)
    values[0, 0] = odd
    pixels = np.asarray(load_image(saved(tmp_path / "x.tiff", Image.fromarray(values), "TIFF")))
    assert pixels[0, 0].tolist() == [shade] * 3
    assert (pixels.reshape(-1, 3)[1:] == 128).all()


def test_a_picture_without_a_number_is_refused(tmp_path):
    path = saved(tmp_path / "x.tiff", Image.fromarray(np.full((4, 6), np.nan, np.float32)), "TIFF")
    with pytest.raises(ValueError, match="none of its values is a finite number"):
        load_image(path)


def test_a_transparent_palette_is_laid_over_white(tmp_path):
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30])
    assert colour(load_image(saved(tmp_path / "p.png", image, transparency=0))) == (255, 255, 255)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (6, 4), shade) for shade in ("red", "lime", "blue")]
    path = saved(tmp_path / "a.gif", frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert colour(load_image(path)) == (255, 0, 0)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(saved(tmp_path / "x.jpg", RED, "JPEG", exif=exif)).size == (4, 6)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 2)])
def test_odd_sizes_are_read(tmp_path, size):
    assert load_image(saved(tmp_path / "x.png", Image.new("RGB", size))).size == size


def test_an_open_picture_and_a_data_url_are_read():
    assert load_image(RED.convert("RGBA")).mode == "RGB"
    assert colour(load_image("data:image/png;base64," + base64.b64encode(encoded(RED)).decode())) == (200, 30, 40)


def png_of(width, height):
    """A valid header for a picture of that size; nobody has to have the memory for its pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, world", "not an image in a known format"),
        (encoded(RED)[:50], "not a readable image"),
        (encoded(RED.resize((200, 200)), "JPEG")[:400], "not a readable image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image in a known format"),
        (png_of(20_000, 20_000), "too large: at most 178,956,970 pixels"),
        (png_of(0, 5), "image"),
    ],
    ids=["empty", "text", "truncated png", "truncated jpeg", "postscript", "20,000 x 20,000", "no width"],
)
def test_what_is_no_picture_is_refused(tmp_path, content, message):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_image(path)
    assert "picture.png" in str(caught.value)


def test_the_limit_holds_without_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "x.png").write_bytes(png_of(20_000, 20_000))
    with pytest.raises(ValueError, match="20,000 x 20,000 pixels"):
        load_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no/such/file.png", FileNotFoundError, "no image 'no/such/file.png'"),
        (".", ValueError, "the image '.' is not a file"),
        ("ftp://host/x.png", ValueError, "http, https and data URLs"),
        ("file:///etc/hosts", ValueError, "http, https and data URLs"),
        ("data:image/png;base64", ValueError, "no comma"),
        ("data:image/png;base64,###", ValueError, "not valid base64"),
        ("http://127.0.0.1:9/x.png", OSError, "cannot be reached"),
    ],
)
def test_sources_that_lead_nowhere_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        load_image(source)


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/missing":
                self.send_error(404)
                return
            if self.path in ("/away", "/to-a-file"):
                self.send_response(302)
                self.send_header("Location", "/image" if self.path == "/away" else "file:///etc/hosts")
                self.end_headers()
                return
            if self.path == "/away-endless":
                self.send_response(302)
                self.send_header("Location", "/image")
                self.end_headers()
                while True:  # until the client hangs up
                    self.wfile.write(bytes(10_000))
            self.send_response(200)
            if self.path == "/compressed":
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            if self.path == "/host" and not self.headers["Host"].startswith("two.test:"):
                self.wfile.write(b"another host")
            elif self.path == "/compressed":
                self.wfile.write(gzip.compress(bytes(50_000_000)))
            elif self.path == "/slow":
                time.sleep(1)
            elif self.path == "/endless":
                for _ in range(200):
                    self.wfile.write(bytes(10_000))
            else:
                self.wfile.write(encoded(RED))

        def log_message(self, *_):
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.handle_error = lambda *_: None
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_urls_are_read_through_redirects(server):
    assert colour(load_image(f"{server}/image")) == (200, 30, 40)
    assert colour(load_image(f"{server}/away")) == (200, 30, 40)


@pytest.mark.parametrize(
    ("path", "timeout", "error", "message"),
    [
        ("/missing", 20, OSError, "answered 404"),
        ("/to-a-file", 20, OSError, "not allowed|answered 302"),
        ("/slow", 0.2, TimeoutError, "longer than 0.2 seconds"),
        ("/endless", 20, ValueError, "larger than 100,000 bytes"),
    ],
)
def test_urls_that_go_wrong_are_refused(server, path, timeout, error, message):
    with pytest.raises(error, match=message):
        load_image(server + path, timeout=timeout, max_bytes=100_000)


@pytest.fixture
def names(monkeypatch):
    """Names that the resolver knows, each with a list of addresses for every lookup; the machine's own is public."""
    known, original, is_public = {}, socket.getaddrinfo, images._is_public

    def look_up(host, port, *args, **kwargs):
        host = host.decode() if isinstance(host, bytes) else host
        if host not in known:
            return original(host, port, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0)) for address in known[host].pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(images, "_is_public", lambda address: address == "127.0.0.1" or is_public(address))
    return known


def stranger(url, **options):
    return load_image(url, from_stranger=True, **{"timeout": 20} | options)


def test_a_name_is_looked_up_once_and_the_checked_address_is_connected_to(server, names):
    port = server.rpartition(":")[2]
    names["pictures.test"] = [["127.0.0.1"], ["10.0.0.1"]]
    assert colour(stranger(f"http://pictures.test:{port}/image")) == (200, 30, 40)
    assert len(names["pictures.test"]) == 1
    with pytest.raises(ValueError, match=r"pictures\.test is not a public address"):
        stranger(f"http://pictures.test:{port}/image")


def test_one_private_address_among_public_ones_is_enough_to_refuse(server, names):
    names["mixed.test"] = [["127.0.0.1", "169.254.169.254"]]
    with pytest.raises(ValueError, match=r"mixed\.test is not a public address"):
        stranger(f"http://mixed.test:{server.rpartition(':')[2]}/image")


def test_the_next_address_of_a_name_is_tried(server, names, monkeypatch):
    known = images._is_public
    monkeypatch.setattr(images, "_is_public", lambda address: address == "127.0.0.9" or known(address))
    names["two.test"] = [["127.0.0.9", "127.0.0.1"]]
    assert colour(stranger(f"http://two.test:{server.rpartition(':')[2]}/host")) == (200, 30, 40)


def test_a_slow_resolver_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"longer than 0\.2 seconds"):
        stranger("http://pictures.test/x.png", timeout=0.2)
    assert time.monotonic() - start < 1


def test_bodies_of_redirects_and_compressed_bodies_are_not_read(server, names):
    assert colour(stranger(f"{server}/away-endless")) == (200, 30, 40)
    with pytest.raises(ValueError, match="not an image"):
        stranger(f"{server}/compressed", max_bytes=100_000)


def test_an_address_is_fetched_where_an_event_loop_runs(server):
    async def fetch():
        return load_image(f"{server}/image")

    assert colour(asyncio.run(fetch())) == (200, 30, 40)


@pytest.mark.parametrize("path", ["/wörld map.png", "/w%C3%B6rld%20map.png", "/image?name=a b|c"])
def test_addresses_may_hold_any_letters_and_blanks(server, names, path):
    assert colour(load_image(f" {server}{path}\n")) == (200, 30, 40)
    names["xn--bcher-kva.test"] = [["127.0.0.1"]]
    assert colour(stranger(f"HTTP://bücher.test:{server.rpartition(':')[2]}{path}")) == (200, 30, 40)


def test_data_urls_may_have_line_breaks():
    broken = base64.encodebytes(encoded(RED)).decode()
    assert "\n" in broken.strip()
    for url in (f"data:image/png;base64,{broken}", f" DATA:image/png;BASE64,\n{broken}", f"data:;base64,{broken}"):
        for from_stranger in (False, True):
            assert colour(load_image(url, from_stranger=from_stranger)) == (200, 30, 40)


def test_data_urls_may_be_written_for_addresses():
    """With - and _ for + and /, and without padding."""
    noisy = Image.effect_noise((40, 40), 90).convert("RGB")
    endings = set()
    for length in range(3):
        letters = base64.urlsafe_b64encode(encoded(noisy) + b"x" * length).decode()
        assert set("-_") & set(letters)
        endings.add(letters.count("="))
        for text in (letters, letters.rstrip("=")):
            assert np.array_equal(load_image(f"data:image/png;base64,{text}"), noisy)
    assert endings == {0, 1, 2}


@pytest.mark.parametrize(
    "source",
    [
        "A" * 500_000,
        "http://127.0.0.1:9/" + "x" * 500_000,
        "ftp://" + "x" * 500_000,
        "data:image/png;base64," + "#" * 500_000,
    ],
)
@pytest.mark.parametrize("from_stranger", [False, True])
def test_no_error_repeats_a_long_source(source, from_stranger):
    with pytest.raises((ValueError, OSError)) as caught:
        load_image(source, from_stranger=from_stranger)
    assert len(str(caught.value)) < 600


def photo(**options):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise), "JPEG", **options)


def scanned(times):
    """A progressive JPEG whose last scan comes so often."""
    content = photo(progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * times + b"\xff\xd9"


@pytest.mark.parametrize(
    "content",
    [
        photo() + b"\0\0\0\x18ftypmp42" + b"\xff\xda" * 1000,  # a motion photo
        photo(exif=b"Exif\0\0" + b"\xff\xda" * 1000),
        photo(comment=b"\xff\xda" * 1000),
        photo(quality=100, restart_marker_blocks=1),
        scanned(80),
    ],
    ids=["video", "thumbnail", "comment", "restarts", "many scans"],
)
def test_strangers_photographs_may_bring_more_than_pixels(content):
    assert load_image(content, from_stranger=True).size == (64, 64)


@pytest.mark.parametrize(
    "hidden",
    [
        b"\xff\x02",  # a reserved mark, after which comes no length
        b"\xff\xd0",  # a restart
        b"\xff\x00\xff\xff\xff",  # an escaped byte, and what fills up
        b"\xff\xfe\x00\x00",  # a comment that is shorter than its length
        b"\xff\xfe\x00\x04ab",
    ],
)
def test_scans_are_counted_whatever_stands_between(hidden):
    content = scanned(101)
    last = content.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match="a JPEG of more than 100 scans"):
        load_image(content.replace(content[last:-2], content[last:-2] + hidden), from_stranger=True)


def test_every_format_named_is_one_of_pillows():
    Image.init()
    optional = {"AVIF", "WEBP", "JPEG2000"}
    assert set(images.FORMATS) - optional <= set(Image.OPEN)
