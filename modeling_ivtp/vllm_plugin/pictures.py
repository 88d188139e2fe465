"""Pictures that requests to a vLLM server name: fetched from public addresses alone, and decoded within limits.

vLLM's own reader fetches from every address that the machine reaches. A server that strangers ask must not.
"""

import asyncio
import os
from typing import Any

from PIL import Image
from urllib3.util import parse_url
from vllm import envs
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.connector import global_thread_pool

from ..files.images import load_image, shortened

NAME = "ivtp"
"""The reader's name, which the environment variable `VLLM_MEDIA_CONNECTOR` may hold."""

MAX_BYTES, MAX_PIXELS = 20_000_000, 16_000_000
"""Largest file and largest picture, as in the endpoint handler."""


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class PublicPictures(MediaConnector):
    """vLLM's reader of media with other pictures: as strangers may name them, by `files.images.load_image`.

    `--allowed-media-domains` and `--allowed-local-media-path` hold as ever. Other media are refused unread.
    """

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        """Load a picture from an http(s) address or a data URL, in RGB whatever `image_mode` says.

        Raises
        ------
        ValueError
            For what is no readable picture, is too large, or must not be fetched; the server answers with 400.
        """
        if image_url[:5].lower() == "file:":
            if self.allowed_local_media_path is None:
                raise ValueError(f"{shortened(image_url)} is a file; allowed: http, https and data URLs.")
            return super().fetch_image(image_url, image_mode=image_mode)
        try:
            if "://" in image_url and self.allowed_media_domains:
                self._assert_url_in_allowed_media_domains(parse_url(image_url))
            return load_image(
                image_url,
                timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT,
                max_bytes=MAX_BYTES,
                max_pixels=MAX_PIXELS,
                from_stranger=True,
            )
        except OSError as error:
            # The address does not answer: vLLM would say that the server failed.
            raise ValueError(str(error)) from error

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        """Load a picture as `fetch_image` does, on a thread of vLLM's."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            global_thread_pool, lambda: self.fetch_image(image_url, image_mode=image_mode)
        )

    def load_from_url(self, url: str, media_io: Any, **options: Any) -> Any:
        """Load a file that the server allows, and refuse sound and video unread."""
        if url[:5].lower() == "file:":
            return super().load_from_url(url, media_io, **options)
        raise ValueError("sound and video are not read; allowed: pictures.")

    async def load_from_url_async(self, url: str, media_io: Any, **options: Any) -> Any:
        """Refuse sound and video as `load_from_url` does."""
        return self.load_from_url(url, media_io, **options)


def guard() -> None:
    """Let this process read pictures so, unless its environment names a reader."""
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", NAME)
