#!/usr/bin/env python3
"""A fake OpenAI- and Anthropic-compatible backend on uvicorn, Starlette and sse-starlette (CRLF lines, its own pings).

usage: uvicorn_backend.py PORT [CERTIFICATE KEY]
needs: pip install uvicorn starlette sse-starlette

What it says depends on the prompt alone, so the bytes repeat. How it behaves is asked for per request, by query
(?tokens=5) or by header (x-fake-tokens: 5, which wins); see `Behaviour` for the names. What became of a request
is told afterwards at GET /seen/{tag} to whoever sent that tag.
"""

import asyncio
import base64
import dataclasses
import hashlib
import json
import logging
import struct
import sys
import time
import zlib
from pathlib import Path

import uvicorn
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

CREATED_S = 1_700_000_000
MODEL = "fake-model"
PAGES = Path(__file__).resolve().parent.parent / "e2e" / "pages"
# Includes what a careless relay trips over: framing as content, line ends, and characters of two to four bytes.
WORDS = (
    "The", " ring", " turns", ",", " and", " each", " token", " leaves", " once", ".", "\n\n", "data: [DONE]", "\r\n",
    " é", " 日本語", " 🚀", "\u2028", "event: error\ndata: {}\n\n", ' "quoted"', "\\",
)  # fmt: skip

SEEN = {}
RESULTS = {}


class BackendGone(Exception):
    """Raised in mid-answer: uvicorn then closes the connection without ending the body."""


@dataclasses.dataclass
class Behaviour:
    """What a request may ask of the backend. The first three names are also those of tokenring's demo model."""

    tokens: int = 16
    tokens_per_s: float = 0.0  # 0: as fast as it goes
    first_token_ms: int = 0  # silence after the response head, before the first event
    head_ms: int = 0  # silence before the response head
    status: int = 200  # another one: an error with a body, instead of an answer
    stall_after: int = -1  # after so many tokens: silence for ever
    drop_after: int = -1  # after so many tokens: the connection is closed, with the body unfinished
    error_after: int = -1  # after so many tokens: an error event in the dialect, and the end
    end_mark: int = 1  # 0: the body ends properly, but without [DONE], message_stop or response.completed
    stamp: int = 0  # 1: chat chunks carry `sent_s`, the monotonic clock when they were made
    tag: str = ""  # the name under which /seen tells what became of this request


def behaviour_of(request):
    chosen = Behaviour()
    for field in dataclasses.fields(Behaviour):
        value = request.headers.get("x-fake-" + field.name.replace("_", "-"), request.query_params.get(field.name))
        if value is not None:
            setattr(chosen, field.name, field.type(value))
    return chosen


class Record:
    """One request as the backend saw it; `ended` is one of finished, disconnected, dropped, or None while it lasts."""

    def __init__(self, tag):
        self.told = {"started_s": time.monotonic(), "tokens": 0, "ended": None, "ended_s": None}
        if tag:
            SEEN[tag] = self.told

    def token(self):
        self.told["tokens"] += 1

    def end(self, reason):
        if self.told["ended"] is None:
            self.told.update(ended=reason, ended_s=time.monotonic())


async def silence(request, milliseconds):
    """Wait; true when the client was still there at the end."""
    if milliseconds <= 0:
        return True
    try:
        async with asyncio.timeout(milliseconds / 1000):
            while (await request.receive())["type"] != "http.disconnect":
                pass
            return False
    except TimeoutError:
        return True


async def words(prompt, behaviour, record):
    """The tokens of the answer, at their pace."""
    start = zlib.crc32(prompt.encode())
    await asyncio.sleep(behaviour.first_token_ms / 1000)
    for index in range(behaviour.tokens):
        if index and behaviour.tokens_per_s:
            await asyncio.sleep(1 / behaviour.tokens_per_s)
        if index == behaviour.stall_after:
            await asyncio.sleep(3600)
        if index == behaviour.drop_after:
            raise BackendGone
        if index == behaviour.error_after:
            raise RuntimeError("the fake model failed, as asked")
        record.token()
        yield WORDS[(start + index * 7) % len(WORDS)]


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def data(value):
    return ServerSentEvent(data=compact(value))


def named(value):
    return ServerSentEvent(event=value["type"], data=compact(value))


def error_body(dialect, message, kind="server_error"):
    if dialect is Messages:
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_fake"}
    return {"error": {"message": message, "type": kind, "param": None, "code": "fake_code"}}


class Chat:
    """POST /v1/chat/completions"""

    path, prefix = "/v1/chat/completions", "chatcmpl"

    def __init__(self, body, behaviour):
        self.behaviour, self.tokens = behaviour, behaviour.tokens
        self.model = body.get("model", MODEL)
        self.usage_chunk = (body.get("stream_options") or {}).get("include_usage", False)

    @staticmethod
    def prompt(body):
        return compact(body.get("messages", []))

    def usage(self):
        return {"prompt_tokens": 3, "completion_tokens": self.tokens, "total_tokens": self.tokens + 3}

    def chunk(self, delta, finish=None):
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
        value = {
            "id": "chatcmpl-fake",
            "object": "chat.completion.chunk",
            "created": CREATED_S,
            "model": self.model,
            "choices": choices,
        }
        if self.behaviour.stamp:
            value["sent_s"] = time.monotonic()
        return value

    def opening(self):
        yield data(self.chunk({"role": "assistant", "content": ""}))

    def delta(self, text):
        yield data(self.chunk({"content": text}))

    def closing(self, text):
        yield data(self.chunk({}, "stop"))
        if self.usage_chunk:
            yield data({**self.chunk({}), "choices": [], "usage": self.usage()})
        if self.behaviour.end_mark:
            yield ServerSentEvent(data="[DONE]")

    def failure(self, message):
        yield data(error_body(Chat, message))

    def whole(self, text):
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return {
            "id": "chatcmpl-fake",
            "object": "chat.completion",
            "created": CREATED_S,
            "model": self.model,
            "choices": [choice],
            "usage": self.usage(),
        }


class Completions(Chat):
    """POST /v1/completions"""

    path, prefix = "/v1/completions", "cmpl"

    @staticmethod
    def prompt(body):
        return compact(body.get("prompt", ""))

    def chunk(self, delta, finish=None):
        return {
            "id": "cmpl-fake",
            "object": "text_completion",
            "created": CREATED_S,
            "model": self.model,
            "choices": [
                {"index": 0, "text": delta.get("content", ""), "logprobs": None, "finish_reason": finish}
            ],
        }

    def opening(self):
        return ()

    def whole(self, text):
        return {**self.chunk({"content": text}, "stop"), "usage": self.usage()}


class Responses(Chat):
    """POST /v1/responses"""

    path, prefix = "/v1/responses", "resp"

    def __init__(self, body, behaviour):
        super().__init__(body, behaviour)
        self.sequence = -1

    @staticmethod
    def prompt(body):
        return compact(body.get("input", ""))

    def response(self, status, output):
        usage = {
            "input_tokens": 3,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.tokens + 3,
        }
        return {
            "id": "resp_fake",
            "object": "response",
            "created_at": CREATED_S,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": usage if status == "completed" else None,
        }

    @staticmethod
    def part(text):
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def item(self, status, content):
        return {"id": "msg_fake", "type": "message", "role": "assistant", "status": status, "content": content}

    def event(self, kind, **fields):
        self.sequence += 1
        return named({"type": f"response.{kind}", "sequence_number": self.sequence, **fields})

    def opening(self):
        place = {"item_id": "msg_fake", "output_index": 0, "content_index": 0}
        yield self.event("created", response=self.response("in_progress", []))
        yield self.event("in_progress", response=self.response("in_progress", []))
        yield self.event("output_item.added", output_index=0, item=self.item("in_progress", []))
        yield self.event("content_part.added", part=self.part(""), **place)

    def delta(self, text):
        place = {"item_id": "msg_fake", "output_index": 0, "content_index": 0}
        yield self.event("output_text.delta", delta=text, logprobs=[], **place)

    def closing(self, text):
        place = {"item_id": "msg_fake", "output_index": 0, "content_index": 0}
        item = self.item("completed", [self.part(text)])
        yield self.event("output_text.done", text=text, logprobs=[], **place)
        yield self.event("content_part.done", part=self.part(text), **place)
        yield self.event("output_item.done", output_index=0, item=item)
        if self.behaviour.end_mark:
            yield self.event("completed", response=self.response("completed", [item]))

    def failure(self, message):
        self.sequence += 1
        yield named(
            {
                "type": "error",
                "sequence_number": self.sequence,
                "code": "fake_code",
                "message": message,
                "param": None,
            }
        )

    def whole(self, text):
        return self.response("completed", [self.item("completed", [self.part(text)])])


class Messages(Chat):
    """POST /v1/messages (Anthropic)"""

    path, prefix = "/v1/messages", "msg"

    def message(self, content, stop):
        return {
            "id": "msg_fake",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": {"input_tokens": 3, "output_tokens": self.tokens if stop else 1},
        }

    def opening(self):
        yield named({"type": "message_start", "message": self.message([], None)})
        block = {"type": "text", "text": ""}
        yield named({"type": "content_block_start", "index": 0, "content_block": block})
        yield named({"type": "ping"})

    def delta(self, text):
        delta = {"type": "text_delta", "text": text}
        yield named({"type": "content_block_delta", "index": 0, "delta": delta})

    def closing(self, text):
        yield named({"type": "content_block_stop", "index": 0})
        yield named(
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": {"output_tokens": self.tokens},
            }
        )
        # Unknown events must pass a relay unharmed.
        yield named({"type": "future_event", "note": "unknown to every client"})
        if self.behaviour.end_mark:
            yield named({"type": "message_stop"})

    def failure(self, message):
        yield named(error_body(Messages, message, "overloaded_error"))

    def whole(self, text):
        return self.message([{"type": "text", "text": text}], "end_turn")


async def events(dialect, prompt, behaviour, record):
    text = ""
    try:
        opened = False
        async for word in words(prompt, behaviour, record):
            if not opened:
                for event in dialect.opening():
                    yield event
                opened = True
            text += word
            for event in dialect.delta(word):
                yield event
        for event in dialect.closing(text):
            yield event
        record.end("finished")
    except RuntimeError as error:
        for event in dialect.failure(str(error)):
            yield event
        record.end("finished")
    except BackendGone:
        record.end("dropped")
        raise
    finally:
        record.end("disconnected")


def generator_route(kind):
    async def answer(request: Request):
        behaviour = behaviour_of(request)
        record = Record(behaviour.tag)
        body = await request.json()
        if body.get("background"):
            record.end("finished")
            value = error_body(kind, "background is not known here", "invalid_request_error")
            return Response(compact(value), 400, media_type="application/json")
        if not await silence(request, behaviour.head_ms):
            record.end("disconnected")
            return Response(status_code=499)
        if behaviour.status != 200:
            record.end("finished")
            value = error_body(kind, f"refused with {behaviour.status}, as asked", "fake_error")
            headers = {"retry-after": "7", "x-request-id": "req_fake", "x-ratelimit-remaining-requests": "0"}
            return Response(compact(value), behaviour.status, headers, "application/json")
        dialect, prompt = kind(body, behaviour), kind.prompt(body)
        if body.get("stream"):
            # sse-starlette cancels the generator when it sees the client leave.
            headers = {"x-request-id": "req_fake"}
            return EventSourceResponse(events(dialect, prompt, behaviour, record), headers=headers)
        if not await silence(request, behaviour.first_token_ms):
            record.end("disconnected")
            return Response(status_code=499)
        behaviour.first_token_ms = 0
        text = "".join([word async for word in words(prompt, behaviour, record)])
        record.end("finished")
        return Response(compact(dialect.whole(text)), media_type="application/json")

    return Route(kind.path, answer, methods=["POST"])


async def models(request):
    entry = {"id": MODEL, "object": "model", "created": CREATED_S, "owned_by": "tokenring-tests"}
    return JSONResponse({"object": "list", "data": [entry, {**entry, "id": MODEL + "-2"}]})


async def embeddings(request):
    body = await request.json()
    texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
    rows = []
    for index, text in enumerate(texts):
        vector = [byte / 256 for byte in hashlib.sha256(str(text).encode()).digest()]
        if body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        rows.append({"object": "embedding", "index": index, "embedding": vector})
    usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
    return JSONResponse({"object": "list", "model": body["model"], "data": rows, "usage": usage})


async def files(request):
    """An upload as the OpenAI SDK makes it: multipart, answered with a file object."""
    length = 0
    async for part in request.stream():
        length += len(part)
    return JSONResponse(
        {
            "id": "file-fake",
            "object": "file",
            "bytes": length,
            "created_at": CREATED_S,
            "filename": "upload.bin",
            "purpose": "assistants",
            "status": "processed",
        }
    )


async def echo(request):
    """What arrived: method, target, headers, and the body's length and SHA-256."""
    digest, length = hashlib.sha256(), 0
    try:
        async for part in request.stream():
            digest.update(part)
            length += len(part)
    except ClientDisconnect:
        return Response(status_code=499)
    return JSONResponse(
        {
            "method": request.method,
            "path": request.url.path,
            "query": request.url.query,
            "headers": request.headers.items(),
            "length": length,
            "sha256": digest.hexdigest(),
        }
    )


def pattern(length, block=65536):
    """`length` bytes in which every aligned 32-byte group is different, so that a lost or doubled part shows."""
    for start in range(0, length, block):
        count = min(block, length - start)
        whole = (start.to_bytes(8, "big") * 4096)[:block]
        index = b"".join(offset.to_bytes(4, "big") * 8 for offset in range(block // 32))
        number = int.from_bytes(whole, "big") ^ int.from_bytes(index, "big")
        yield number.to_bytes(block, "big")[:count]


async def download(request):
    """GET /bytes/N: N bytes; ?chunked=1 leaves out Content-Length. The ETag is the SHA-256 when asked with ?digest=1."""
    length, record = request.path_params["length"], Record(behaviour_of(request).tag)
    headers = {"x-fake": "download"}
    if "chunked" not in request.query_params:
        headers["content-length"] = str(length)
    if "digest" in request.query_params:
        digest = hashlib.sha256()
        for part in pattern(length):
            digest.update(part)
        headers["etag"] = f'"{digest.hexdigest()}"'
    if request.method == "HEAD":
        return Response(headers=headers, media_type="application/octet-stream")

    async def parts():
        try:
            for part in pattern(length):
                record.token()
                yield part
            record.end("finished")
        finally:
            record.end("disconnected")

    return StreamingResponse(parts(), headers=headers, media_type="application/octet-stream")


async def plain_events(request):
    """GET /events: server-sent events in no model's dialect, as a browser's EventSource would ask for."""
    behaviour = behaviour_of(request)
    record = Record(behaviour.tag)

    async def produce():
        try:
            index = 0
            async for word in words("plain", behaviour, record):
                yield ServerSentEvent(event="word", data=compact({"index": index, "text": word}))
                index += 1
            yield ServerSentEvent(event="end", data="{}")
            record.end("finished")
        finally:
            record.end("disconnected")

    return EventSourceResponse(produce())


async def status(request):
    """ANY /status/N: an answer with that status, and a body where HTTP allows one."""
    code = request.path_params["code"]
    body = b"" if code in (204, 304) else compact({"status": code}).encode()
    return Response(body, code, {"x-fake": "status"}, "application/json" if body else None)


async def page(request):
    return FileResponse(PAGES / request.path_params["name"], media_type="text/html; charset=utf-8")


async def seen(request):
    told = SEEN.get(request.path_params["tag"])
    return JSONResponse(told, 404 if told is None else 200)


async def results(request):
    """Where a browser's page leaves what it found, and the test picks it up."""
    tag = request.path_params["tag"]
    if request.method == "POST":
        RESULTS[tag] = await request.json()
        return JSONResponse({"kept": tag})
    return JSONResponse(RESULTS.get(tag), 200 if tag in RESULTS else 404)


def not_as_asked(record):
    """Keeps the traceback of a connection that was dropped on request out of the log."""
    return record.exc_info is None or not isinstance(record.exc_info[1], BackendGone)


async def health(request):
    return JSONResponse({"status": "ok"})


EVERY_METHOD = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
app = Starlette(
    routes=[
        *map(generator_route, (Chat, Completions, Responses, Messages)),
        Route("/v1/models", models),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/files", files, methods=["POST"]),
        Route("/echo{rest:path}", echo, methods=EVERY_METHOD),
        Route("/bytes/{length:int}", download),
        Route("/events", plain_events),
        Route("/status/{code:int}", status, methods=EVERY_METHOD),
        Route("/pages/{name:str}", page),
        Route("/seen/{tag:str}", seen),
        Route("/results/{tag:str}", results, methods=["GET", "POST"]),
        Route("/health", health),
    ]
)

if __name__ == "__main__":
    if len(sys.argv) not in (2, 4):
        sys.exit(__doc__)
    tls = dict(zip(("ssl_certfile", "ssl_keyfile"), sys.argv[2:], strict=False))
    logging.getLogger("uvicorn.error").addFilter(not_as_asked)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", lifespan="off", **tls)
