"""OpenAI's and DeepSeek's dialect: chats, completions, models; below /v1, /beta and bare."""

import hashlib
import time

from fastapi import APIRouter

from fathom.server import openai_chat, openai_completions
from fathom.server.openai_chat import ERRORS, check_model
from fathom.server.openai_objects import Model, ModelList
from fathom.server.service import Generates
from fathom.server.tasks import Context


def router(context: Context) -> APIRouter:
    """The routes."""
    routes, fingerprint = APIRouter(), _fingerprint(context.service.engine)
    routes.include_router(openai_chat.router(context, fingerprint))
    routes.include_router(openai_completions.router(context, fingerprint))
    model = Model(id=context.settings.model_name, created=int(time.time()), max_model_len=context.service.engine.max_tokens)

    async def list_models() -> ModelList:
        """The models that are served: one."""
        return ModelList(data=[model])

    async def retrieve_model(name: str) -> Model:
        """A model by its name."""
        check_model(name, context.settings)
        return model

    for root in ("/v1", "", "/beta", "/beta/v1"):
        shown = {"methods": ["GET"], "include_in_schema": root == "/v1", "tags": ["openai"]}
        own = {status: ERRORS[status] for status in (400, 401, 404, 408, 413)}
        routes.add_api_route(f"{root}/models", list_models, response_model=ModelList, operation_id="list_models",
                             responses={status: own[status] for status in (400, 401, 408, 413)}, **shown)
        routes.add_api_route(f"{root}/models/{{name:path}}", retrieve_model, response_model=Model, operation_id="retrieve_model",
                             responses=own, **shown)
    return routes


def _fingerprint(engine: Generates) -> str:
    """Tells configurations of a server apart, as far as they can change an answer."""
    return "fp_" + hashlib.sha256(f"{engine.config.to_json()}{engine.tokenizer.fingerprint}{engine.settings.drafts}".encode()).hexdigest()[:10]
