"""Serve a patched model with transformers' own server, which speaks OpenAI's API (`transformers serve`).

Its model manager loads the model and ours patches what it loads. Its requests run one after the other, each with a cache of
its own that follows the policy. Added here: a line and figures on what each request's cache held, an end to requests whose
client has gone away, and a refusal of those that are longer than the context.
"""

import asyncio
import importlib
import inspect
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from kvpress.compat import TESTED
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.models import ModelLoadError, check_model, chosen_device, chosen_dtype, local_source
from kvpress.patching import handle_of, patch
from kvpress.policy import Policy
from kvpress.report import Report, size

INSTALL = "pip install 'kvpress-toolkit[serve]'"
log = logging.getLogger("uvicorn.kvpress")  # below uvicorn's, so that its lines look like the server's other ones


try:
    import uvicorn
    from fastapi import HTTPException, Request, Response
    from fastapi.responses import JSONResponse
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Summary, generate_latest
    from transformers.cli.serving import server as their_server
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import GenerateManager, GenerationState
except ModuleNotFoundError as error:
    if str(error.name).startswith("transformers"):
        raise ImportError(
            f"transformers {transformers.__version__} has no server that kvpress knows ({error.name} is missing); {TESTED}"
        ) from error
    raise ImportError(f"serving needs the package {error.name}; run: {INSTALL}") from error
except ImportError as error:
    raise ImportError(
        f"the server of transformers {transformers.__version__} is not as kvpress knows it ({error}); {TESTED}"
    ) from error


class ServeError(RuntimeError):
    """A server that cannot be started; the message says why and what to do."""


# The handlers that `build_server` may ask for, in whichever version.
HANDLERS = {
    "chat_handler": "chat_completion.ChatCompletionHandler",
    "completion_handler": "completion.CompletionHandler",
    "response_handler": "response.ResponseHandler",
    "systemone_handler": "systemone.SystemOneHandler",
    "transcription_handler": "transcription.TranscriptionHandler",
}


@dataclass
class Visit:
    """One HTTP request: whether its client has gone away meanwhile."""

    gone: threading.Event = field(default_factory=threading.Event)


_visit: ContextVar[Visit | None] = ContextVar("kvpress_visit", default=None)


class Figures:
    """What `/metrics` shows, in Prometheus' text format: sums and counts over requests, and those that are waiting."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("kvpress_requests", "Requests that have ended, by how they did.", ["outcome"], **known)
        self.waiting = Gauge("kvpress_requests_open", "Requests that wait or run.", **known)
        self.new_tokens = Counter("kvpress_generated_tokens", "Tokens generated.", **known)
        self.seen = Summary("kvpress_seen_tokens", "Tokens that a finished request's cache has seen.", **known)
        self.kept = Summary("kvpress_kept_entries", "Entries held of them, mean over layers and kv heads.", **known)
        self.bytes = Summary("kvpress_cache_bytes", "Bytes that a finished request's cache held.", **known)
        self.full_bytes = Summary("kvpress_full_cache_bytes", "Bytes that it would be without a policy.", **known)

    def ended(self, outcome: str, tokens: int, report: Report | None) -> None:
        """Count a request that has "finished", was "cancelled" or "failed"."""
        self.requests.labels(outcome).inc()
        self.new_tokens.inc(tokens)
        if report is not None:
            for name in ("seen", "kept", "bytes", "full_bytes"):
                getattr(self, name).observe(getattr(report.total, name))


class Model(ModelManager):
    """transformers' model manager for a single model, which it patches as soon as it has loaded it.

    Args:
        name: a hub name, a folder, or "smollm2"; clients name the model so.
        policy: what is put on it.
    """

    def __init__(self, name: str, policy: Policy | list[Policy], device: str, dtype: str) -> None:
        self.policy = policy
        self.key, self.source = map(self.process_model_name, (name, local_source(name)))
        super().__init__(device=device, dtype=dtype, force_model=name)

    def _load_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        if model_id_and_revision != self.key:
            raise HTTPException(400, f"this server has one model, {self.force_model!r}, not {model_id_and_revision!r}")
        return super()._load_processor(self.source, *args, **kwargs)

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        model = super()._load_model(self.source, *args, **kwargs)
        patch(model, self.policy)
        return model


class PatchedModel:
    """A loaded model as one request sees it: `generate` ends when the client has gone, and reports on its cache."""

    def __init__(self, model: Any, request_id: str, visit: Visit, figures: Figures) -> None:
        self._model, self._id, self._visit, self._figures = model, request_id, visit, figures
        self._figures.waiting.inc()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **inputs: Any) -> Any:
        """As the model's own; runs in the server's thread for inference, where no other request runs meanwhile."""
        prompt, streamer = inputs["input_ids"], inputs.get("streamer")
        started, outcome, report = time.perf_counter(), "failed", None
        tokens = prompt
        try:
            if self._visit.gone.is_set():
                outcome = "cancelled"
                if streamer is not None:
                    streamer.end()
                return prompt
            tokens = self._model.generate(**inputs, stopping_criteria=[self._stop])
            outcome = "cancelled" if self._visit.gone.is_set() else "finished"
            report = handle_of(self._model).report()  # type: ignore[union-attr]
            return tokens
        except Exception:
            if self._visit.gone.is_set():
                outcome = "cancelled"
            raise
        finally:
            made = tokens.shape[-1] - prompt.shape[-1] or getattr(streamer, "total_tokens", 0)
            self._figures.ended(outcome, made, report)
            self._figures.waiting.dec()
            log.info(_line(self._id, outcome, prompt.shape[-1], made, time.perf_counter() - started, report))

    def _stop(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Whether to end each sequence, bool [batch]: a stopping criterion of `generate`."""
        return torch.full((len(input_ids),), self._visit.gone.is_set(), device=input_ids.device)


def _line(request_id: str, outcome: str, prompt: int, made: int, seconds: float, report: Report | None) -> str:
    line = f"request {request_id} {outcome}: {prompt} tokens of prompt, {made} generated in {seconds:.1f} s"
    if report is None:
        return line
    total = report.total
    held = f"{total.kept:g} of {total.seen:g} entries kept, {size(total.bytes)} of {size(total.full_bytes)} held"
    return f"{line}; {held}, {total.read_share:.0%} read"


class Generations(GenerateManager):
    """transformers' queue of calls of `generate`, which gives each of them the model as its own request sees it."""

    def __init__(self, context: int | None, figures: Figures) -> None:
        super().__init__()
        self.context, self.figures = context, figures

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **kwargs: Any
    ) -> Any:
        """As theirs."""
        seen = self._seen(model, inputs, gen_config, request_id)
        return super().generate_streaming(seen, processor, inputs, gen_config, request_id=request_id, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **kwargs: Any
    ) -> Any:
        """As theirs."""
        seen = self._seen(model, inputs, gen_config, request_id)
        return await super().generate_non_streaming(
            seen, processor, inputs, gen_config, request_id=request_id, **kwargs
        )

    def _seen(self, model: Any, inputs: Any, gen_config: Any, request_id: str) -> PatchedModel:
        prompt = inputs["input_ids"].shape[-1]
        if self.context is not None:
            if prompt >= self.context:
                raise HTTPException(
                    400,
                    f"the prompt has {prompt} tokens, and the context of this server is {self.context}, answer included; send a "
                    "shorter one, or start the server with --context N under a policy that reaches beyond the trained length",
                )
            for name, room in (("max_new_tokens", self.context - prompt), ("max_length", self.context)):
                asked = getattr(gen_config, name, None)
                if isinstance(asked, int) and asked > room:
                    setattr(gen_config, name, room)
        return PatchedModel(model, request_id, _visit.get() or Visit(), self.figures)


class OneQueue(GenerationState):
    """The server's state with one queue, that of its one model."""

    def __init__(self, generations: Generations) -> None:
        super().__init__()
        self.generations = generations

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generations:
        """The queue."""
        return self.generations


class Visits:
    """ASGI middleware: makes a `Visit` for each POST request, and marks it when the client goes away."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        visit = Visit()
        _visit.set(visit)

        async def watch() -> Any:
            while (message := await receive())["type"] != "http.disconnect":
                pass
            visit.gone.set()
            return message

        watching = asyncio.create_task(watch())

        async def again() -> Any:
            return messages.pop(0) if messages else await asyncio.shield(watching)

        try:
            await self.app(scope, again, send)
        finally:
            watching.cancel()


def build(name: str, policy: Policy | list[Policy], context: int | None, device: str, dtype: str) -> Any:
    """The ASGI application, its model loaded and patched.

    Args:
        name: a hub name, a folder, or "smollm2".
        policy: one, or several of different kinds.
        context: the most tokens of a request, its answer included; None for the length that the model was trained for.
        device, dtype: as for `kvpress.models.load_model`.

    Raises:
        ServeError: the server of the installed transformers has parts that kvpress does not know.
        ModelLoadError: the model cannot be loaded, or not by that server.
        PolicyError, UnsupportedModelError: it cannot be patched.
    """
    asked = inspect.signature(their_server.build_server).parameters
    known = {*HANDLERS, "model_manager", "generation_state"}
    new = [key for key, value in asked.items() if value.default is inspect.Parameter.empty and key not in known]
    if new:
        raise ServeError(
            f"the server of transformers {transformers.__version__} has parts that kvpress does not know ({', '.join(new)}); "
            f"{TESTED}"
        )
    place = chosen_device(device)
    kind = chosen_dtype(dtype, place)
    check_model(name)
    try:
        model = Model(name, policy, str(place), kind if isinstance(kind, str) else str(kind).removeprefix("torch."))
        loaded, _ = model.load_model_and_processor(model.process_model_name(name))
    except (ModelLoadError, PolicyError, UnsupportedModelError):
        raise
    except Exception as error:  # whatever a checkpoint can be wrong in
        raise ModelLoadError(f"transformers' server cannot load {name!r}: {error}") from error
    if context is None:
        context = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
    figures = Figures()
    state = OneQueue(Generations(context, figures))
    parts: dict[str, Any] = {"model_manager": model, "generation_state": state}
    for key in asked:
        if key in HANDLERS:
            module, _, handler = HANDLERS[key].partition(".")
            kinds = importlib.import_module(f"transformers.cli.serving.{module}")
            parts[key] = getattr(kinds, handler)(model_manager=model, generation_state=state)
    app = their_server.build_server(**{key: parts[key] for key in asked if key in parts})
    app.add_middleware(Visits)

    @app.exception_handler(HTTPException)
    @app.exception_handler(PolicyError)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        """As OpenAI's clients read it, who show `message`."""
        status = getattr(error, "status_code", 400)
        message = str(getattr(error, "detail", error))
        return JSONResponse({"error": {"message": message, "code": status}, "detail": message}, status_code=status)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(figures.registry), media_type=CONTENT_TYPE_LATEST)

    app.state.context = context
    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that the server can use.

    Raises:
        ServeError: the address is in use, or is none of this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ServeError(
            f"cannot listen at {host}, port {port}: {error.strerror}; give another --port (0 takes a free one) or --host"
        ) from error


def server(app: Any) -> "uvicorn.Server":
    """A server of the application: `run(sockets=[...])` until it is interrupted, or its `should_exit` is set."""
    return uvicorn.Server(uvicorn.Config(app, log_level="info"))
