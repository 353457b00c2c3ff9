-- Short streams of 16 events back to back on kept-alive connections: what a stream costs beside its events.
--   wrk -t1 -c50 -d5s --latency -s short.lua http://127.0.0.1:8000 -- [model=fake]
-- Without a `response` function wrk does not hand bodies to Lua, so this measures the server rather than wrk.

function init(args)
  local model = "fake"
  for _, argument in ipairs(args) do
    model = argument:match("^model=(.+)$") or error("unknown argument " .. argument .. ": give model=")
  end
  wrk.method = "POST"
  wrk.path = "/v1/chat/completions"
  wrk.headers["Content-Type"] = "application/json"
  wrk.headers["Accept"] = "text/event-stream"
  wrk.body = '{"model":"' .. model .. '","stream":true,"max_tokens":16,"metadata":{"fake":"events=16&rate=0"},' ..
    '"messages":[{"role":"user","content":"hello"}]}'
end

function done(summary, latency, requests)
  local seconds = summary.duration / 1e6
  print(string.format("short streams: %.0f/s, p50 %.0f us, p99 %.0f us",
    summary.requests / seconds, latency:percentile(50), latency:percentile(99)))
end
