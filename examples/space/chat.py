"""A chat in the browser in front of an OpenAI-shaped server: vLLM with the plug-in, or `ivtp serve`.

    SERVER_URL=http://127.0.0.1:8000/v1 SERVED_MODEL=OWNER/ivtp-llava-1.5-7b python examples/space/chat.py

SERVER_KEY is the server's key, if it asks for one. Visitors see neither the key nor the server's address.
"""

import os

import gradio as gr


def build(server: str, model: str, key: str | None = None) -> gr.ChatInterface:
    """Make the page.

    Parameters
    ----------
    server : str
        Address of the API, with `/v1`.
    model : str
        The model's name there.
    key : str, optional
    """
    return gr.load_chat(
        server,
        model,
        key,
        file_types="image",
        title="Ask about a picture",
        description="Attach a picture and ask. The server keeps the visual tokens that your question needs.",
        analytics_enabled=False,
    )


if __name__ == "__main__":
    missing = [name for name in ("SERVER_URL", "SERVED_MODEL") if not os.environ.get(name)]
    if missing:
        raise SystemExit(f"{' and '.join(missing)}: not set; give the server's address with /v1 and the model's name.")
    build(os.environ["SERVER_URL"], os.environ["SERVED_MODEL"], os.environ.get("SERVER_KEY")).launch()
