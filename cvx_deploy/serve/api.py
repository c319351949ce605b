"""The routes: OpenAI's video API, what this service adds to it, and what those ask who keep it running."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from cvx_deploy.serve.bodies import body_of
from cvx_deploy.serve.faults import ApiError
from cvx_deploy.serve.files import Variant
from cvx_deploy.serve.guard import Guard
from cvx_deploy.serve.jobs import ENDED, Job
from cvx_deploy.serve.keys import KeyRing
from cvx_deploy.serve.metrics import Metrics
from cvx_deploy.serve.schemas import Asked, Edited, Extended, Remixed, parsed
from cvx_deploy.serve.service import Service

PAGE = Path(__file__).parent / "page"
_BEAT = 15.0  # seconds between two signs of life of a stream of events
_LOOK = 1.0  # seconds between two looks whether a client is still there

router = APIRouter(prefix="/v1")


async def service_of(request: Request) -> Service:
    """Return what answers."""
    service: Service = request.app.state.service
    return service


async def owner_of(request: Request) -> str:
    """Return the name of the key that a request brings; empty where nobody is asked for one.

    Raises:
        ApiError: It brings none, or one of nobody.
    """
    keys: KeyRing | None = request.app.state.keys
    if keys is None:
        return ""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    owner = keys.owner_of(key.strip()) if kind.lower() == "bearer" else None
    if owner is None:
        raise ApiError(401, "no valid key. fix: send it as Authorization: Bearer KEY.", "invalid_api_key")
    return owner


Owner = Annotated[str, Depends(owner_of)]
Serves = Annotated[Service, Depends(service_of)]


async def _created(request: Request, service: Service, owner: str) -> Job:
    _check_open(request)
    body = await body_of(request, {"input_reference": "image"})
    asked = parsed(Asked, body.fields, texts=body.texts)
    idempotency = request.headers.get("idempotency-key")
    return await run_in_threadpool(service.create, owner, asked, body.upload, idempotency)


def _check_open(request: Request) -> None:
    if request.app.state.service.supervisor.stopping:
        raise ApiError(503, "the server is going down. fix: come again in a minute.", "going_down", retry_after=60)


@router.post("/videos")
async def create(request: Request, service: Serves, owner: Owner) -> JSONResponse:
    """Put a video into the queue."""
    return _shown(service, await _created(request, service, owner))


def _shown(service: Service, job: Job) -> JSONResponse:
    """Return a job, and when it makes sense to ask again; a look at the record is shorter than a turn of a thread."""
    return JSONResponse(service.shown(job), headers={"openai-poll-after-ms": str(service.poll_after(job))})


@router.post("/videos/sync")
async def create_and_wait(request: Request, service: Serves, owner: Owner) -> Response:
    """Make a video and answer with it; a client that goes ends it."""
    job = await _created(request, service, owner)
    with service.hub.listening(job.id) as happening:
        while (job := await run_in_threadpool(service.find, owner, job.id)).status not in ENDED:
            _check_open(request)
            try:
                await asyncio.wait_for(happening.get(), _LOOK)
            except TimeoutError:
                if await request.is_disconnected():
                    await run_in_threadpool(service.cancel, owner, job.id)
    if job.status != "completed":
        message = job.error_message or "the video was cancelled."
        raise ApiError(500 if job.status == "failed" else 400, message, job.error_code or "cancelled")
    path, kind = service.content(owner, job.id, "video")
    return FileResponse(path, media_type=kind, headers={"X-Video-Id": job.id})


@router.post("/videos/edits")
async def edit(request: Request, service: Serves, owner: Owner) -> JSONResponse:
    """Make a video from another one: one of the client's own, or one that it sends."""
    _check_open(request)
    body = await body_of(request, {"video": "video"})
    asked = parsed(Edited, body.fields, texts=body.texts)
    plain = parsed(Asked, {name: getattr(asked, name) for name in Asked.__struct_fields__}, texts=False)
    source: Job | None = None
    if body.upload is None:
        identifier = (asked.video or {}).get("id")
        if identifier is None:
            raise ApiError(400, 'video is missing. fix: send a file, or {"id": ...}.', "invalid_value", "video")
        source = await run_in_threadpool(service.find, owner, identifier)
        service.content(owner, identifier, "video")
    job = await run_in_threadpool(
        service.create, owner, plain, body.upload, request.headers.get("idempotency-key"), None, source
    )
    return _shown(service, job)


@router.post("/videos/extensions")
async def extend(request: Request, service: Serves, owner: Owner) -> JSONResponse:
    """Continue a video: one of the client's own, or one that it sends."""
    _check_open(request)
    body = await body_of(request, {"video": "video"})
    more = parsed(Extended, body.fields, texts=body.texts)
    job = await run_in_threadpool(service.extend, owner, more, body.upload, request.headers.get("idempotency-key"))
    return _shown(service, job)


@router.get("/videos")
def page(
    service: Serves,
    owner: Owner,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> JSONResponse:
    """List some videos."""
    return JSONResponse(service.page(owner, after, limit, ascending=order == "asc"))


@router.get("/videos/{identifier}")
async def retrieve(identifier: str, service: Serves, owner: Owner) -> JSONResponse:
    """Show one video."""
    return _shown(service, service.find(owner, identifier))


@router.delete("/videos/{identifier}")
def delete(identifier: str, service: Serves, owner: Owner) -> JSONResponse:
    """Forget a video."""
    service.delete(owner, identifier)
    return JSONResponse({"id": identifier, "object": "video.deleted", "deleted": True})


@router.get("/videos/{identifier}/content")
def content(identifier: str, service: Serves, owner: Owner, variant: Variant = "video") -> FileResponse:
    """Give the file, or a part of it."""
    path, kind = service.content(owner, identifier, variant)
    return FileResponse(path, media_type=kind)


@router.post("/videos/{identifier}/cancel")
def cancel(identifier: str, service: Serves, owner: Owner) -> JSONResponse:
    """End a video's making."""
    return JSONResponse(service.shown(service.cancel(owner, identifier)))


@router.post("/videos/{identifier}/remix")
async def remix(identifier: str, request: Request, service: Serves, owner: Owner) -> JSONResponse:
    """Make a video again with another prompt, or another seed."""
    _check_open(request)
    body = await body_of(request, {})
    remixed = parsed(Remixed, body.fields, texts=body.texts)
    idempotency = request.headers.get("idempotency-key")
    job = await run_in_threadpool(service.remix, owner, identifier, remixed, idempotency)
    return _shown(service, job)


@router.get("/videos/{identifier}/events")
async def events(identifier: str, request: Request, service: Serves, owner: Owner) -> StreamingResponse:
    """Tell what happens to a video, as server-sent events, until it has ended."""
    job = await run_in_threadpool(service.find, owner, identifier)
    return StreamingResponse(_told(request, service, job), media_type="text/event-stream")


async def _told(request: Request, service: Service, job: Job) -> AsyncIterator[str]:
    with service.hub.listening(job.id) as happening:
        last: str | None = None
        while not request.app.state.service.supervisor.stopping:
            found = await run_in_threadpool(service.store.find, job.id, job.owner)
            if found is None:
                yield _event("deleted", {"id": job.id})
                return
            if found.status != last:
                yield _event(found.status, service.shown(found))
                last = found.status
            if found.status in ENDED:
                return
            while True:
                try:
                    told = await asyncio.wait_for(happening.get(), _BEAT)
                except TimeoutError:
                    yield ": still there\n\n"
                    break
                if told["event"] in ("ended", "changed"):
                    break
                yield _event(told["event"], {key: value for key, value in told.items() if key != "event"})


def _event(kind: str, values: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(values)}\n\n"


@router.get("/models")
def models(service: Serves, owner: Owner) -> JSONResponse:
    """List the models, with the sizes that each can make."""
    return JSONResponse({"object": "list", "data": service.models()})


@router.get("/models/{name}")
def model(name: str, service: Serves, owner: Owner) -> JSONResponse:
    """Show one model."""
    found = next((one for one in service.models() if one["id"] == name), None)
    if found is None:
        raise ApiError(404, "there is no model of that name. fix: see /v1/models.", "model_not_found", "model")
    return JSONResponse(found)


def application(service: Service, keys: KeyRing | None, metrics: Metrics) -> Guard:
    """Return the whole server as an ASGI application."""
    app = FastAPI(title="cvx-deploy", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service, app.state.keys = service, keys
    app.include_router(router)

    @app.get("/healthz")
    def healthz() -> JSONResponse:
        """Say that the server is there."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz")
    def readyz() -> JSONResponse:
        """Say whether a worker has warmed up, and so whether jobs are made now."""
        ready = service.supervisor.is_ready and not service.supervisor.stopping
        workers = [slot.state for slot in service.supervisor.slots]
        return JSONResponse({"status": "ready" if ready else "starting", "workers": workers}, 200 if ready else 503)

    @app.get("/metrics")
    def all_metrics(owner: Owner) -> Response:
        """Give Prometheus what it asks for."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    _state_failures(app)
    if PAGE.is_dir():
        app.mount("/", StaticFiles(directory=PAGE, html=True))
    loopback = keys is None and not service.settings.open_to_all
    return Guard(app, service.settings.limits.body, metrics.answered, only_loopback=loopback)


def _state_failures(app: FastAPI) -> None:
    """Answer every failure in OpenAI's form."""

    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return answer(ApiError(400, f"{name}: {first['msg']}. fix: see docs/serving.md.", "invalid_value", name))

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = f"{error.detail}. fix: see docs/serving.md."
        return answer(ApiError(error.status_code, message, codes.get(error.status_code, "invalid_request")))

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        return answer(ApiError(500, f"a fault of cvx-deploy: {type(error).__name__}.", "internal_error"))
