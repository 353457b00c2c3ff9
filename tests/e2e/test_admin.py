"""The admin listener: /live, /ready, /metrics, /status."""

import math
import re

import collections

import httpx
import pytest
import sse
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from sse import Background

pytestmark = pytest.mark.relay


def families_of(tokenring):
    answer = tokenring.metrics()
    assert answer.status_code == 200
    kind = answer.headers["content-type"]
    assert kind.startswith(("text/plain", "application/openmetrics-text")), kind
    parse = parse_openmetrics if "openmetrics" in kind else parse_text
    return list(parse(answer.text))


def total(families, pattern):
    """The sum of all samples whose name matches."""
    return sum(sample.value for family in families for sample in family.samples if re.search(pattern, sample.name))


@pytest.fixture(scope="module")
def used(via_uvicorn):
    """A tokenring that has served a little of everything."""
    for dialect in sse.PATHS:
        sse.stream(via_uvicorn.url, dialect, params={"tokens": 20, "tokens_per_s": 200})
    sse.stream(via_uvicorn.url, "chat", params={"drop_after": 3})
    httpx.get(via_uvicorn.url + "/v1/models")
    httpx.post(via_uvicorn.url + sse.PATHS["chat"], json=sse.body_of("chat"), params={"status": 500})
    return via_uvicorn.tokenring


def test_live_and_ready(used):
    assert httpx.get(f"{used.admin_url}/live").status_code == 200
    assert httpx.get(f"{used.admin_url}/ready").status_code == 200
    assert httpx.get(f"{used.admin_url}/no-such-page").status_code == 404


def test_metrics_are_what_prometheus_takes(used):
    """What `promtool check metrics` would complain about, and what its parser does not check."""
    families = families_of(used)
    assert len(families) > 10
    seen = set()
    for family in families:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name), family.name
        assert family.documentation, f"{family.name} has no HELP"
        assert family.type not in ("unknown", "untyped"), f"{family.name} has no TYPE"
        assert not re.search(r"_(ms|us|milliseconds|microseconds|kb|mb)(_|$)", family.name), (
            f"{family.name}: base units are seconds and bytes"
        )
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in seen, f"{key} is there twice"
            seen.add(key)
            if family.type == "counter" and not sample.name.endswith("_created"):
                assert sample.name.endswith("_total") and sample.value >= 0, sample
            if family.type == "gauge":
                assert not sample.name.endswith("_total"), sample
    assert any(family.name.startswith("tokenring_") for family in families)


def test_histograms_add_up(used):
    histograms = [family for family in families_of(used) if family.type == "histogram"]
    assert histograms, "first token, between tokens, turn length: none of them is a histogram"
    for family in histograms:
        series = {}
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "le"}
            one = series.setdefault(tuple(sorted(labels.items())), {"buckets": []})
            if sample.name.endswith("_bucket"):
                one["buckets"].append((float(sample.labels["le"]), sample.value))
            else:
                one[sample.name.rsplit("_", 1)[1]] = sample.value
        for labels, one in series.items():
            bounds = [bound for bound, _ in one["buckets"]]
            counts = [count for _, count in one["buckets"]]
            assert bounds == sorted(set(bounds)) and bounds[-1] == math.inf, (family.name, labels)
            assert counts == sorted(counts), f"{family.name} {labels}: buckets are cumulative"
            assert counts[-1] == one["count"] and one["sum"] >= 0, (family.name, labels)


def test_ends_are_counted_by_reason(used):
    """Each finished stream moves a counter that is labelled with the reason of its end; a truncated one another."""

    def by_reason():
        sums = collections.Counter()
        for family in families_of(used):
            for sample in family.samples:
                if family.type == "counter" and "reason" in sample.labels and "end" in family.name:
                    sums[sample.labels["reason"]] += sample.value
        return sums

    before = by_reason()
    for _ in range(3):
        sse.stream(used.url, "chat", params={"tokens": 3})
    well = {reason for reason, count in by_reason().items() if count - before.get(reason, 0) >= 3}
    assert len(well) == 1, f"no reason rose by three: {before} {by_reason()}"
    before = by_reason()
    sse.stream(used.url, "chat", params={"drop_after": 3})
    badly = {reason for reason, count in by_reason().items() if count > before.get(reason, 0)}
    assert len(badly) == 1 and badly != well


def test_labels_do_not_explode(used):
    def samples():
        return sum(len(family.samples) for family in families_of(used))

    before = samples()
    with httpx.Client() as client:
        for number in range(100):
            client.get(f"{used.url}/echo/{number}", headers={"user-agent": f"agent-{number}"})
            body = sse.body_of("chat", stream=False, model=f"model-{number}")
            client.post(used.url + sse.PATHS["chat"], json=body, params={"tokens": 1})
    assert samples() < before + 50


def test_status_tells_of_streams_under_way(used):
    answer = httpx.get(f"{used.admin_url}/status")
    assert answer.headers["content-type"].startswith("application/json")
    assert isinstance(answer.json(), dict)
    for word in ("shards", "upstreams"):
        assert word in answer.text
    assert used_backend_port(used) in answer.text
    stream = Background(used.url, "chat", tokens=40, tokens_per_s=40).wait_streaming()
    during = used.status()
    stream.result()
    assert during != used.status()


def used_backend_port(tokenring):
    """The port of the backend, from tokenring's own command line."""
    return tokenring.arguments[-1].rsplit(":", 1)[1]


def test_admin_can_be_off(start_tokenring, uvicorn):
    tokenring = start_tokenring([uvicorn.url], ready=False, admin="off")
    tokenring.wait_ready(f"{tokenring.url}/health", 10)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{tokenring.admin_url}/live")
