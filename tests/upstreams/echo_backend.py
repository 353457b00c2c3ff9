#!/usr/bin/env python3
"""An ASGI application on uvicorn that says how it read each request: in its answer, and to whoever asks later.

usage: echo_backend.py PORT
needs: pip install uvicorn

GET /.read?from=N, asked of it directly, lists the requests read since the N-th: method, target, headers, and length and
SHA-256 of the body; `complete` is false where the client left before the body's end.
"""

import hashlib
import json
import sys

import uvicorn

READ = []


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise RuntimeError(f"not a request: {scope['type']}")
    target = scope["raw_path"]
    if target == b"/.read":
        start = int(scope["query_string"].removeprefix(b"from="))
        return await answer(send, READ[start:])
    if scope["query_string"]:
        target += b"?" + scope["query_string"]
    told = {
        "method": scope["method"],
        "target": target.decode("latin-1"),
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
        "complete": False,
    }
    READ.append(told)
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    told |= {"length": len(body), "sha256": hashlib.sha256(body).hexdigest(), "complete": True}
    await answer(send, told)


async def answer(send, value):
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", lifespan="off")
