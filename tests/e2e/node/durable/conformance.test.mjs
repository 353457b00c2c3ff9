// The public conformance suite of the Durable Streams protocol, against the server at DURABLE_URL.
// Its streams are under /v1/stream, and its long-poll tests last as long as a long-poll does.
import { runConformanceTests } from "@durable-streams/server-conformance-tests"

runConformanceTests({
  baseUrl: process.env.DURABLE_URL,
  longPollTimeoutMs: Number(process.env.DURABLE_LONG_POLL_MS),
})
