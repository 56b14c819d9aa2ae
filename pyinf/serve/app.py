"""The application: ``POST /search``, ``GET /info``, ``/health``, the search page, the description of the interface."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pyinf._version import __version__
from pyinf.errors import ConfigError, DataError

try:
    from fastapi import APIRouter, Depends, FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from fastapi.security import HTTPBearer
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise ConfigError("pyinf serve needs fastapi and uvicorn; install them: pip install 'pyinf[serve]'") from error

from pyinf.serve.engine import Busy, Engine, Finished, Query, Refused, Searcher, Stopped
from pyinf.serve.guard import Guard, error_body, internal_error, new_incident
from pyinf.serve.limits import Limits
from pyinf.serve.pages import docs_page, search_page
from pyinf.serve.schemas import (
    ErrorResponse,
    HealthResponse,
    InfoResponse,
    QueryFacts,
    RecallStatement,
    SearchRequest,
    SearchResponse,
    SearchResult,
    Timing,
)
from pyinf.serve.security import Secret

__all__ = ["create_app"]

log = logging.getLogger("pyinf.serve")

_DESCRIPTION = (
    "Which training documents made the model say this? Send what it said, read the documents that influenced it most. "
    "An error is an object with a code for programs and a message for people."
)
_ERRORS = {
    400: "not JSON, or a malformed Host header",
    401: "no token, or a wrong one",
    403: "asked by another site's page",
    408: "the body did not arrive in time",
    413: "the body is too long",
    415: "the body is not application/json",
    421: "the service does not answer to this host name",
    422: "JSON, but no query that can be answered: the error names the field",
    500: "a fault of the server; its log has more",
    503: "too much to do, or stopping; Retry-After says when to try again",
    504: "no answer in time",
}


class _Problem(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class _Service:
    """What the endpoints share."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.searcher = engine.searcher
        self.tokens = min(limits.tokens, self.searcher.positions or limits.tokens)
        self.k = min(limits.k, self.searcher.count)
        self._encoder = ThreadPoolExecutor(1, "pyinf-encode")  # a tokenizer is for one thread at a time

    async def search(self, asked: SearchRequest) -> SearchResponse:
        """Answer within the time limit, or say why not."""
        try:
            return await asyncio.wait_for(self._search(asked), self.limits.seconds)
        except asyncio.TimeoutError:
            raise _Problem(504, "too_slow", f"no answer within {self.limits.seconds:g} s") from None

    async def _search(self, asked: SearchRequest) -> SearchResponse:
        if asked.k > self.k:
            raise _Problem(422, "k_too_large", f"k is {asked.k}, and {self.k} is the most")
        query = await self._query(asked)
        try:
            future = self.engine.submit(query, asked.k)
        except Busy as error:
            raise _Problem(503, "busy", str(error), {"retry-after": str(error.retry_after)}) from None
        try:
            done = await asyncio.wrap_future(future)
        except Refused as error:
            raise _Problem(422, error.code, str(error)) from None
        except DataError as error:
            log.warning("a query was refused: %s", error)
            raise _Problem(422, "unanswerable", "this query cannot be answered") from None
        return self._response(query, done, asked.documents)

    async def _query(self, asked: SearchRequest) -> Query:
        record = asked.record()
        if record is None:
            assert asked.input_ids is not None
            query = Query(tuple(asked.input_ids), None if asked.labels is None else tuple(asked.labels))
        elif not self.searcher.reads_text:
            raise _Problem(422, "no_tokenizer", "this service has no tokenizer; send input_ids")
        else:
            loop = asyncio.get_running_loop()
            try:
                query = await loop.run_in_executor(self._encoder, self.searcher.encode, record)
            except DataError as error:
                log.warning("a text was refused: %s", error)
                raise _Problem(422, "unanswerable", "this text has no tokens that could be asked about") from None
        if len(query.input_ids) > self.tokens:
            raise _Problem(
                422, "too_many_tokens", f"the query has {len(query.input_ids)} tokens, and {self.tokens} are the most"
            )
        vocabulary = self.searcher.vocabulary
        if vocabulary is not None:
            largest = max((*query.input_ids, *(query.labels or ())), default=0)
            if largest >= vocabulary:
                raise _Problem(
                    422, "outside_vocabulary", f"token id {largest} is outside the vocabulary of {vocabulary}"
                )
        if query.counted < 1:
            raise _Problem(422, "nothing_counts", "no token counts: nothing predicts the first, and −100 leaves out")
        return query

    def _response(self, query: Query, done: Finished, documents: bool) -> SearchResponse:
        answer = done.answer
        results = []
        for rank, hit in enumerate(answer.hits, 1):
            result = SearchResult(
                rank=rank, id=hit.id, position=hit.position, score=hit.score, first_stage=hit.first_stage
            )
            if documents:
                result.text, result.metadata = _document(hit.document)
                if result.text is not None and len(result.text) > self.limits.document_characters:
                    result.text, result.cut = result.text[: self.limits.document_characters], True
            results.append(result)
        recall, prefilter = (None if r is None else RecallStatement(**r) for r in (answer.recall, answer.prefilter))
        return SearchResponse(
            results=results,
            exact=answer.exact,
            recall=recall,
            prefilter_recall=prefilter,
            certificate=_wire(answer.certificate),
            note=_note(answer.exact, recall, self.searcher.count),
            query=QueryFacts(tokens=len(query.input_ids), counted=query.counted),
            timing=Timing(waited=round(done.waited, 4), search=round(done.seconds, 4), batch=done.batch),
            documents_searched=self.searcher.count,
        )

    def info(self) -> InfoResponse:
        """What is searched, and the limits."""
        return InfoResponse(
            pyinf=__version__,
            documents=self.searcher.count,
            reads_text=self.searcher.reads_text,
            max_tokens=self.tokens,
            max_k=self.k,
            max_body_bytes=self.limits.body_bytes,
            vocabulary=self.searcher.vocabulary,
            searcher=_wire(self.searcher.describe()),
            queue=self.engine.state(),
        )

    def close(self) -> None:
        """Stop the worker and the tokenizer's thread."""
        self.engine.close(self.limits.grace_seconds)
        self._encoder.shutdown(wait=False, cancel_futures=True)


def _document(document: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Text and the rest of what a store keeps beside a row."""
    rest = _wire(dict(document))
    for names in (("text",), ("prompt", "response")):
        if all(isinstance(rest.get(name), str) for name in names):
            return " ".join(rest.pop(name) for name in names), rest
    return None, rest


def _wire(value: Any) -> Any:
    """The value as strict JSON can hold it: no NaN, no half surrogate pairs."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_wire(str(key)): _wire(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_wire(inner) for inner in value]
    return _wire(str(value))


def _note(exact: bool, recall: RecallStatement | None, count: int) -> str:
    """What the scores are, and what is known of what was missed."""
    if not exact:
        return (
            f"All {count} documents were ranked by the compressed rows of the store. Scores are those of the rows, not "
            f"computed again; how many of the best documents by exact scores are among these was not measured."
        )
    if recall is None:
        return (
            "The candidates' scores were computed exactly. How many of the best documents the first stage left out was "
            "not measured."
        )
    mean = f", a mean over the {recall.queries} queries that shared this search" if recall.queries > 1 else ""
    return (
        f"The scores of {recall.cut} candidates of {count} documents were computed exactly. Of the exact top "
        f"{recall.k}, an estimated {recall.value:.1%} are among them ({recall.level:.0%} interval {recall.low:.1%} to "
        f"{recall.high:.1%}, from a random sample of {recall.sample} documents{mean})."
    )


# ------------------------------------------------------------------------------------------ the application


def create_app(
    searcher: Searcher,
    limits: Limits | None = None,
    secret: Secret | None = None,
    names: Iterable[str] = (),
    title: str = "pyinf",
) -> Guard:
    """The service as an ASGI application.

    Args:
        searcher: what answers; runs in one thread.
        limits: bounds of requests; the default ones if None.
        secret: the token to ask for; None: everybody who reaches the port may ask.
        names: host names that it answers to, besides addresses and ``localhost``.
        title: what the search page is called.
    """
    limits = limits or Limits()
    engine = Engine(searcher, limits.queue, limits.batch)
    service = _Service(engine, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPI(
        title="pyinf serve",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # theirs loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(_router(service, secret is not None))
    _handle_errors(app)
    _add_pages(app, service, secret is not None, title)
    guard = Guard(app, limits, secret, names)
    guard.api, guard.engine = app, engine
    return guard


def _router(service: _Service, token: bool) -> APIRouter:
    router = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False))] if token else [])
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": text}
        for status, text in _ERRORS.items()
        if token or status != 401
    }

    @router.post("/search", responses=errors, summary="The documents behind what a model said")
    async def search(asked: SearchRequest, request: Request) -> SearchResponse:
        """Ranks the training documents by their influence on the completion, best first."""
        return await service.search(asked)

    @router.get("/info", summary="What is searched, and the limits")
    async def info() -> InfoResponse:
        """What this service searches, and how large a request may be."""
        return service.info()

    return router


def _add_pages(app: FastAPI, service: _Service, token: bool, title: str) -> None:
    @app.get("/health", summary="Whether queries are taken", responses={503: {"model": HealthResponse}})
    async def health() -> HealthResponse:
        """For a load balancer or a supervisor; needs no token."""
        if not service.engine.healthy:
            return JSONResponse({"status": "stopping"}, 503)  # type: ignore[return-value]
        return HealthResponse(status="ok")

    @functools.cache
    def front() -> tuple[str, str]:
        facts = {
            "token": token,
            "text": service.searcher.reads_text,
            "k": service.k,
            "documents": service.searcher.count,
        }
        return search_page(title, facts)

    @functools.cache
    def docs() -> tuple[str, str]:
        return docs_page(app.openapi(), token)

    for path, page in (("/", front), ("/docs", docs)):

        def show(page: Any = page) -> HTMLResponse:
            text, policy = page()
            return HTMLResponse(text, headers={"content-security-policy": policy})

        app.add_route(path, lambda request, show=show: show(), methods=["GET"], include_in_schema=False)


def _handle_errors(app: FastAPI) -> None:
    def answer(status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(body, status, headers=dict(headers or {}))

    @app.exception_handler(_Problem)
    async def problem(_: Request, error: _Problem) -> JSONResponse:
        return answer(error.status, error_body(error.code, str(error)), error.headers)

    @app.exception_handler(Stopped)
    async def stopped(_: Request, error: Stopped) -> JSONResponse:
        return answer(503, error_body("stopping", str(error)), {"retry-after": "5"})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return answer(415, error_body("not_json", "send the query as application/json"))
        found = error.errors()
        if any(item["type"] == "json_invalid" for item in found):
            return answer(400, error_body("malformed_json", "the body is not JSON"))
        # What was sent is not repeated: it may be long, and it may be secret.
        fields = [
            {"field": _printable(".".join(map(str, item["loc"][1:])) or "body"), "problem": _printable(item["msg"])}
            for item in found[:20]
        ]
        return answer(422, error_body("invalid", "the request does not fit; see fields", fields=fields))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        codes = {400: "malformed_json", 404: "unknown_path", 405: "unknown_method"}
        texts = {400: "the body is not JSON", 404: "there is nothing here; see /docs", 405: "not with this method"}
        code = codes.get(error.status_code, "refused")
        text = texts.get(error.status_code, "the request was refused")
        return answer(error.status_code, error_body(code, text), error.headers)

    @app.exception_handler(Exception)
    async def internal(_: Request, error: Exception) -> JSONResponse:
        incident = new_incident()
        log.error("incident %s", incident, exc_info=error)
        return answer(500, internal_error(incident))


def _printable(text: str) -> str:
    return text.removeprefix("Value error, ").encode("utf-8", "replace").decode()[:300]
