"""The routes. Each takes a checked body, asks the scheduler, and tells the answer in OpenAI's form."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.responses import Response

import luthier
from luthier.serve import prepare
from luthier.serve.answers import Answer, ChatForm, Form, TextForm, document, usage
from luthier.serve.limits import Limits
from luthier.serve.metrics import Metrics
from luthier.serve.models import Served, find
from luthier.serve.pieces import Pieces
from luthier.serve.prepare import Wanted
from luthier.serve.refusals import Refusal, json_response, of_validation, stopping
from luthier.serve.scheduler import Scheduler
from luthier.serve.schema import Asked, ChatAsked, TextAsked
from luthier.serve.streaming import Envelope, EventStream, watched

__all__ = ["Serving", "make_app"]


@dataclass
class Serving:
    """What the routes share. `stopping` is set when the server is to end."""

    models: Mapping[str, Served]
    limits: Limits
    metrics: Metrics
    scheduler: Scheduler
    stopping: bool = False
    under_way: set[Answer] = field(default_factory=set)
    began: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.pieces = {name: Pieces(model.template.tokenizer) for name, model in self.models.items()}

    async def answer(self, asked: Asked, wanted: Wanted, form: Form, request: Request) -> Response:
        """The answers to a request, whole or as a stream. Raises Refusal where they cannot be begun, or have failed."""
        name, limits = asked.model, self.limits
        if self.stopping:  # it began while the request was being tokenised
            raise stopping()
        answer = Answer(self.scheduler, name, wanted.requests, limits.seconds, self.under_way, whole=not asked.stream)
        self.metrics.prompt_tokens.labels(name).inc(wanted.prompt_tokens)
        head: dict[str, object] = {
            "id": f"{form.prefix}-{secrets.token_hex(12)}",
            "object": form.chunk_kind if asked.stream else form.whole_kind,
            "created": int(time.time()),
            "model": name,
        }
        if asked.stream:
            count = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            return EventStream(answer, form, Envelope(head, wanted.prompt_tokens, count=count))
        with watched(answer, request.receive):
            told, choices = await document(answer, form)
        return json_response({**head, "choices": told, "usage": usage(wanted.prompt_tokens, choices)})

    def end_all(self) -> int:
        """End every answer that is still being made; how many there were."""
        left = [answer for answer in self.under_way if not answer.through]
        for answer in left:
            answer.end(stopping())
        return len(left)

    def about(self, model: Served) -> dict[str, object]:
        """What /v1/models says of one; `max_model_len` is its context in tokens."""
        return {
            "id": model.name,
            "object": "model",
            "created": self.began,
            "owned_by": "luthier",
            "parent": model.parent,
            "max_model_len": model.decoder.config.max_positions,
        }


def make_app(serving: Serving) -> FastAPI:
    """The application, with its description at /openapi.json."""
    app = FastAPI(title="Luthier", version=luthier.__version__, docs_url=None, redoc_url=None, strict_content_type=True)
    _add_answers(app, serving)
    _add_rest(app, serving)
    _add_errors(app)
    return app


def _add_answers(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/chat/completions", response_class=Response)
    async def chat(asked: ChatAsked, request: Request) -> Response:
        """Answer a conversation."""
        model = find(serving.models, asked.model)
        wanted = await run_in_threadpool(prepare.chat, asked, model, serving.limits)
        return await serving.answer(asked, wanted, ChatForm(serving.pieces[model.name]), request)

    @app.post("/v1/completions", response_class=Response)
    async def completion(asked: TextAsked, request: Request) -> Response:
        """Continue texts."""
        model = find(serving.models, asked.model)
        wanted = await run_in_threadpool(prepare.completion, asked, model, serving.limits)
        return await serving.answer(asked, wanted, TextForm(serving.pieces[model.name]), request)


def _add_rest(app: FastAPI, serving: Serving) -> None:
    @app.get("/v1/models", response_class=Response)
    async def models() -> Response:
        """The models there are."""
        return json_response({"object": "list", "data": [serving.about(model) for model in serving.models.values()]})

    @app.get("/v1/models/{name:path}", response_class=Response)
    async def model(name: str) -> Response:
        """One of them."""
        return json_response(serving.about(find(serving.models, name)))

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """Whether it works: 503 where it has to be started again."""
        why = serving.scheduler.unwell
        return json_response(
            {"status": "ok"} if why is None else {"status": "failing", "why": why}, 503 if why else 200
        )

    @app.get("/ready", response_class=Response)
    async def ready() -> Response:
        """Whether it should be sent more requests."""
        why = "stopping" if serving.stopping else serving.scheduler.unwell
        return json_response({"ready": why is None, "why": why}, 503 if why else 200)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """What it counts, for Prometheus."""
        return Response(serving.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return refusal.response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        asked = ChatAsked if "chat" in request.url.path else TextAsked
        return of_validation(error.errors(), tuple(asked.model_fields)).response

    @app.exception_handler(StarletteHTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return Refusal(404, f"There is no {request.method} {request.url.path}.", code="unknown_url").response
        if error.status_code == 405:
            said = f"{request.url.path} does not take {request.method}."
            return Refusal(405, said, code="method_not_allowed", headers=error.headers).response
        status = error.status_code if error.status_code < 500 else 400
        return Refusal(status, "The body cannot be read.", code="invalid_json").response

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> Response:
        said = f"A defect of the server ({type(error).__name__}); its log says more."
        return Refusal(500, said, code="internal_error").response
