-- Streams of a chat completion, whole: a request counts when its last byte is there. Counts the events of all answers.
--   wrk -t1 -c50 -d5s -s stream.lua http://127.0.0.1:8000 -- [events=100] [rate=0] [model=fake] [path=/v1/chat/completions]
-- `events` and `rate` are read by the fake backend (rate 0: as fast as the socket takes them); other backends get max_tokens.

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  local given = { events = "100", rate = "0", model = "fake", path = "/v1/chat/completions" }
  for _, argument in ipairs(args) do
    local name, value = argument:match("^(%w+)=(.+)$")
    assert(name and given[name], "unknown argument " .. argument .. ": give events=, rate=, model=, path=")
    given[name] = value
  end
  expected = tonumber(given.events)
  events, whole, cut, failed = 0, 0, 0, 0
  wrk.method = "POST"
  wrk.path = given.path
  wrk.headers["Content-Type"] = "application/json"
  wrk.headers["Accept"] = "text/event-stream"
  wrk.body = string.format(
    '{"model":"%s","stream":true,"max_tokens":%d,"metadata":{"fake":"events=%d&rate=%s"},' ..
    '"messages":[{"role":"user","content":"hello"}]}',
    given.model, expected, expected, given.rate)
end

function response(status, headers, body)
  if status ~= 200 then
    failed = failed + 1
    return
  end
  local _, count = body:gsub("data: {", "")
  events = events + count
  -- Only a whole line counts: the text may occur in what a model says.
  if body:find("\ndata: [DONE]", 1, true) or body:find("\ndata: {\"type\":\"message_stop\"", 1, true) then
    whole = whole + 1
  else
    cut = cut + 1
  end
end

function done(summary, latency, requests)
  local sum = { events = 0, whole = 0, cut = 0, failed = 0 }
  for _, thread in ipairs(threads) do
    for name in pairs(sum) do
      sum[name] = sum[name] + thread:get(name)
    end
  end
  local seconds = summary.duration / 1e6
  print(string.format("streams: %d whole, %d cut, %d failed; events: %d (%.0f/s)",
    sum.whole, sum.cut, sum.failed, sum.events, sum.events / seconds))
  local errors = summary.errors
  if sum.cut + sum.failed + errors.connect + errors.read + errors.write + errors.timeout > 0 then
    print("NOT CLEAN")
  end
end
