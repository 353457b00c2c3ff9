#!/usr/bin/env python3
"""Run llama.cpp's own HTTP server (from the xllamacpp wheel) on 127.0.0.1 until killed.

usage: llama_server.py MODEL.gguf PORT [SLOTS=4] [CONTEXT=8192]
needs: pip install xllamacpp

Serves chat completions, completions, responses, Anthropic messages, /v1/models, /health, /slots and /metrics.
"""

import signal
import sys

import xllamacpp

# One thread per connection, and an idle keep-alive connection holds its thread: with the small default a few
# idle connections starve every other one.
HTTP_THREADS = 64
BATCH_TOKENS = 64


def serve(model, port, slots=4, context=8192):
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_parallel, params.n_ctx = int(slots), int(context)
    params.cpuparams.n_threads = 1
    params.n_threads_http = HTTP_THREADS
    # It looks for clients that left between two batches, so small ones make a long prefill leave soon.
    params.n_batch = params.n_ubatch = BATCH_TOKENS
    params.warmup = False
    params.endpoint_slots = params.endpoint_metrics = True
    server = xllamacpp.Server(params)
    print("listening", getattr(server, "listening_address", port), flush=True)
    # Its threads are not Python's and do not stop for a signal handler: the default action ends the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pause()


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 5:
        sys.exit(__doc__)
    serve(*sys.argv[1:])
