"""OpenAI's and DeepSeek's dialect."""

from fastapi import APIRouter

from fathom.server.tasks import Context


def router(context: Context) -> APIRouter:
    """The routes."""
    return APIRouter()
