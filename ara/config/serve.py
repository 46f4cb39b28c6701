"""Config of ``ara serve``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ara.config.base import StageConfig


class ServeConfig(StageConfig):
    """``ara serve``: an OpenAI-compatible server."""

    server: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="whose server; auto: that of vLLM if it is installed, else that of transformers"
    )
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="address to listen on; 0.0.0.0 listens to the whole network, and the server asks for no password",
    )
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
