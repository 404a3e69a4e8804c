"""GPT-4 and other chat models as a peer: captions over any endpoint with OpenAI's protocol."""

from __future__ import annotations

import base64
import io
import os

from qvision_lab.captioning.images import Picture, open_image

PROMPT = "Describe this picture in one short sentence."


class EndpointError(OSError):
    """The endpoint gave no caption: it timed out, failed, or answered without text."""


def caption_by_gpt4(
    image: Picture, max_new_tokens: int = 20, model: str = "gpt-4o", timeout: float = 60.0
) -> str:
    """Caption an image with a chat model; needs the extra `qvision-lab[gpt4]`.

    The key is read from `OPENAI_API_KEY`, an endpoint other than OpenAI's from `OPENAI_BASE_URL`.
    No request is repeated; `timeout` is in seconds. EndpointError where there is no caption.
    """
    from openai import OpenAI, OpenAIError

    if not os.environ.get("OPENAI_API_KEY"):
        raise EndpointError("no endpoint: set OPENAI_API_KEY (and perhaps OPENAI_BASE_URL).")
    png = io.BytesIO()
    open_image(image).save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    parts = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": parts}]
    try:
        chat = OpenAI(timeout=timeout, max_retries=0).chat.completions
        answer = chat.create(model=model, messages=messages, max_tokens=max_new_tokens)
    except OpenAIError as error:  # a time-out too
        raise EndpointError(f"{model} could not be asked: {error}") from error
    text = answer.choices[0].message.content if answer.choices else None
    if not (text or "").strip():
        raise EndpointError(f"{model} answered without text; try another model.")
    return text.strip()
