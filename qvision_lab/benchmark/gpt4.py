"""GPT-4 and other chat models as a peer: a captioner over any endpoint with OpenAI's protocol."""

from __future__ import annotations

import base64
import io
import os

from qvision_lab.captioning.images import Picture, open_image

PROMPT = "Describe this picture in one short sentence."


class EndpointError(OSError):
    """The endpoint gave no caption: it timed out, failed, or answered without text."""


class Gpt4Captioner:
    """Captions from a chat model that takes images; needs the extra `qvision-lab[gpt4]`.

    The key is read from `OPENAI_API_KEY` (EndpointError if it is not set), an endpoint other than
    OpenAI's from `OPENAI_BASE_URL`. No request is repeated; `timeout` is in seconds for each.
    """

    def __init__(self, model: str = "gpt-4o", timeout: float = 60.0):
        from openai import OpenAI

        if not os.environ.get("OPENAI_API_KEY"):
            raise EndpointError("no endpoint: set OPENAI_API_KEY (and perhaps OPENAI_BASE_URL).")
        self.model, self.timeout = model, timeout
        self.client = OpenAI(timeout=timeout, max_retries=0)

    def caption(self, image: Picture, max_new_tokens: int = 20) -> str:
        """Caption one image, sent as a PNG; EndpointError where the endpoint gives no caption."""
        from openai import APITimeoutError, OpenAIError

        buffer = io.BytesIO()
        open_image(image).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": parts}]
        try:
            answer = self.client.chat.completions.create(
                model=self.model, messages=messages, max_tokens=max_new_tokens
            )
        except APITimeoutError as error:
            raise EndpointError(f"{self.model} gave no answer in {self.timeout:g} s.") from error
        except OpenAIError as error:
            raise EndpointError(f"{self.model} could not be asked: {error}") from error
        text = answer.choices[0].message.content if answer.choices else None
        if not (text or "").strip():
            raise EndpointError(f"{self.model} answered without text; try another model.")
        return text.strip()
