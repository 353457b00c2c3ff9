-- Plain requests: GET /v1/models, no stream at all. The cost of a request and an answer.
--   wrk -t1 -c50 -d5s --latency -s models.lua http://127.0.0.1:8000

function init(args)
  wrk.method = "GET"
  wrk.path = "/v1/models"
  wrk.headers["Accept"] = "application/json"
end

function done(summary, latency, requests)
  local seconds = summary.duration / 1e6
  print(string.format("requests: %.0f/s, p50 %.0f us, p99 %.0f us, not 2xx: %d",
    summary.requests / seconds, latency:percentile(50), latency:percentile(99), summary.errors.status))
end
