"""Byte sequences for the HTTP edge: what two parsers are known to read differently, generated and by hand.

Each case is (name, bytes, requests): how many requests a backend sees of it; None where it may be refused or passed on.
Whatever looks like a request inside a body or behind a refused head asks for /smuggled, which no backend may see. (The
random ones, which change such bytes, are held only to being read alike.)
"""

import itertools
import random

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
JSON = b'{"content":"hello"}'
REFUSED, PASSED, EITHER = 0, 1, None


def post(fields, body=b"", line=b"POST /tokenize HTTP/1.1", host=b"Host: a\r\n"):
    return line + b"\r\n" + host + fields + b"\r\n" + body


def chunked(*chunks):
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def with_length(body, fields=b"", **how):
    return post(b"Content-Length: %d\r\n" % len(body) + fields, body, **how)


def framings():
    """Content-Length and Transfer-Encoding in every combination, over a body that ends differently under each reading."""
    lengths = {
        "none": b"",
        "zero": b"Content-Length: 0\r\n",
        "right": b"Content-Length: %d\r\n",
        "plus": b"Content-Length: +%d\r\n",
        "padded": b"Content-Length:  \t%d \t\r\n",
        "zeros": b"Content-Length: 000%d\r\n",
        "twice": b"Content-Length: %d\r\nContent-Length: %d\r\n",
        "two": b"Content-Length: 0\r\nContent-Length: %d\r\n",
        "list": b"Content-Length: %d, %d\r\n",
        "lists": b"Content-Length: 0, %d\r\n",
        "hex": b"Content-Length: 0x%x\r\n",
        "float": b"Content-Length: %d.0\r\n",
        "negative": b"Content-Length: -%d\r\n",
        "empty": b"Content-Length:\r\n",
        "underscore": b"Content_Length: %d\r\n",
        "quoted": b'Content-Length: "%d"\r\n',
        "inner-space": b"Content-Length: 1 %d\r\n",
        "exponent": b"Content-Length: %de0\r\n",
        "huge": b"Content-Length: 18446744073709551616\r\n",
        "wrapped": b"Content-Length: 1844674407370955161%d\r\n",
    }
    codings = {
        "none": b"",
        "chunked": b"Transfer-Encoding: chunked\r\n",
        "upper": b"TRANSFER-ENCODING: CHUNKED\r\n",
        "tab": b"Transfer-Encoding:\tchunked\r\n",
        "vtab": b"Transfer-Encoding: \x0bchunked\r\n",
        "space-before-colon": b"Transfer-Encoding : chunked\r\n",
        "nothing": b"Transfer-Encoding:\r\n",
        "identity": b"Transfer-Encoding: identity\r\n",
        "identity-chunked": b"Transfer-Encoding: identity, chunked\r\n",
        "gzip": b"Transfer-Encoding: gzip\r\n",
        "gzip-chunked": b"Transfer-Encoding: gzip, chunked\r\n",
        "chunked-gzip": b"Transfer-Encoding: chunked, gzip\r\n",
        "comma": b"Transfer-Encoding: ,chunked\r\n",
        "comma-behind": b"Transfer-Encoding: chunked,\r\n",
        "twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "two": b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n",
        "parameter": b"Transfer-Encoding: chunked;q=1\r\n",
        "quoted": b'Transfer-Encoding: "chunked"\r\n',
        "xchunked": b"Transfer-Encoding: xchunked\r\n",
        "underscore": b"Transfer_Encoding: chunked\r\n",
        "folded": b"Transfer-Encoding:\r\n chunked\r\n",
        "nul": b"Transfer-Encoding: chunked\x00\r\n",
        "cr": b"X: y\rTransfer-Encoding: chunked\r\n",
        "lf": b"X: y\nTransfer-Encoding: chunked\r\n",
        "high": b"Transfer-Encoding: chunked\xa0\r\n",
    }
    plain = {("right", "none"), ("zero", "none"), ("none", "none"), ("padded", "none"), ("zeros", "none")}
    whole = {("none", coding) for coding in ("chunked", "upper", "tab")}
    ignored = {("underscore", "none"), ("none", "underscore"), ("underscore", "underscore")}
    ignored |= {(length, "underscore") for length, coding in plain} | {
        ("underscore", coding) for _, coding in whole
    }
    body = chunked(JSON)
    for (length, a), (coding, b) in itertools.product(lengths.items(), codings.items()):
        a = a % ((len(body),) * a.count(b"%")) if b"%" in a else a
        pair = (length, coding)
        if pair in plain | whole:
            requests = PASSED
        elif pair in ignored:
            requests = EITHER
        else:
            requests = REFUSED
        # Where the body is read whole, what follows would rightly be the next request.
        is_read = requests != REFUSED and (
            length in ("right", "padded", "zeros") or coding in ("chunked", "upper", "tab")
        )
        yield f"{length}+{coding}", post(a + b, body + (b"" if is_read else SMUGGLED)), requests
        if length in ("right", "two", "list") and coding != "none" and pair not in ignored:
            yield f"{length}+{coding}-reversed", post(b + a, body + SMUGGLED), REFUSED


def chunks():
    """Bodies in chunks, legal and not."""
    te = b"Transfer-Encoding: chunked\r\n"
    good = {
        "one": chunked(JSON),
        "many": chunked(*(JSON[at : at + 1] for at in range(len(JSON)))),
        "empty": b"0\r\n\r\n",
        "zeros": b"000013\r\n" + JSON + b"\r\n00000\r\n\r\n",
        "upper": b"1A\r\n" + b'{"content":"abcdefghijklm"' + b"\r\n1\r\n}\r\n0\r\n\r\n",
        "extension": b"13;name=value\r\n" + JSON + b"\r\n0;x\r\n\r\n",
        "extension-quoted": b'13;n="v;\\"w"\r\n' + JSON + b"\r\n0\r\n\r\n",
        "extension-empty": b"13;\r\n" + JSON + b"\r\n0\r\n\r\n",
        "trailer": b"13\r\n" + JSON + b"\r\n0\r\nX-Sum: 1\r\n\r\n",
        "trailer-framing": b"13\r\n" + JSON + b"\r\n0\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        "trailer-host": b"13\r\n" + JSON + b"\r\n0\r\nHost: b\r\nConnection: close\r\n\r\n",
        "request-inside": chunked(SMUGGLED),
        "chunks-inside": chunked(b"0\r\n\r\n" + SMUGGLED),
    }
    bad = {
        "lf": b"13\n" + JSON + b"\n0\n\n",
        "lf-size": b"13\n" + JSON + b"\r\n0\r\n\r\n",
        "lf-data": b"13\r\n" + JSON + b"\n0\r\n\r\n",
        "lf-end": b"13\r\n" + JSON + b"\r\n0\n\n",
        "lf-last": b"13\r\n" + JSON + b"\r\n0\r\n\n",
        "cr": b"13\r" + JSON + b"\r\n0\r\n\r\n",
        "cr-cr-lf": b"13\r\r\n" + JSON + b"\r\n0\r\n\r\n",
        "prefix": b"0x13\r\n" + JSON + b"\r\n0\r\n\r\n",
        "plus": b"+13\r\n" + JSON + b"\r\n0\r\n\r\n",
        "minus": b"-13\r\n" + JSON + b"\r\n0\r\n\r\n",
        "space-before": b" 13\r\n" + JSON + b"\r\n0\r\n\r\n",
        "space-behind": b"13 \r\n" + JSON + b"\r\n0\r\n\r\n",
        "tab-behind": b"13\t\r\n" + JSON + b"\r\n0\r\n\r\n",
        "space-extension": b"13 ;x=y\r\n" + JSON + b"\r\n0\r\n\r\n",
        "extension-lf": b"13;x\n" + JSON + b"\r\n0\r\n\r\n",
        "extension-cr": b"13;\rx\r\n" + JSON + b"\r\n0\r\n\r\n",
        "extension-quoted-crlf": b'13;n="\r\n"\r\n' + JSON + b"\r\n0\r\n\r\n",
        "extension-nul": b"13;\x00\r\n" + JSON + b"\r\n0\r\n\r\n",
        "extension-long": b"13;" + b"x" * 5000 + b"\r\n" + JSON + b"\r\n0\r\n\r\n",
        "no-size": b"\r\n" + JSON + b"\r\n0\r\n\r\n",
        "not-hex": b"1g\r\n" + JSON + b"\r\n0\r\n\r\n",
        "underscore": b"1_3\r\n" + JSON + b"\r\n0\r\n\r\n",
        "unicode-digit": b"\xd9\xa1\xd9\xa3\r\n" + JSON + b"\r\n0\r\n\r\n",
        "overflow-32": b"100000013\r\n" + JSON + b"\r\n0\r\n\r\n",
        "overflow-64": b"10000000000000013\r\n" + JSON + b"\r\n0\r\n\r\n",
        "largest": b"ffffffffffffffff\r\n" + JSON + b"\r\n0\r\n\r\n",
        "signed": b"8000000000000013\r\n" + JSON + b"\r\n0\r\n\r\n",
        "too-short": b"12\r\n" + JSON + b"\r\n0\r\n\r\n",
        "too-long": b"14\r\n" + JSON + b"\r\n0\r\n\r\n",
        "no-end": b"13\r\n" + JSON + b"0\r\n\r\n",
        "trailer-fold": b"13\r\n" + JSON + b"\r\n0\r\nX: y\r\n z\r\n\r\n",
        "trailer-lf": b"13\r\n" + JSON + b"\r\n0\r\nX: y\n\r\n",
        "trailer-no-colon": b"13\r\n" + JSON + b"\r\n0\r\nX\r\n\r\n",
        "trailer-space": b"13\r\n" + JSON + b"\r\n0\r\nX : y\r\n\r\n",
        "request-for-trailer": b"13\r\n" + JSON + b"\r\n0\r\n" + SMUGGLED,
    }
    for name, body in good.items():
        yield f"chunks-{name}", post(te, body), PASSED
    for name, body in bad.items():
        # A head that was passed on before its body broke is not a whole request to anyone.
        yield f"chunks-{name}", post(te, body + SMUGGLED), REFUSED


def heads():
    """First lines and fields."""
    get = b"GET /health HTTP/1.1\r\nHost: a\r\n"
    for name, head, requests in [
        ("get", get + b"\r\n", PASSED),
        ("lf", b"GET /health HTTP/1.1\nHost: a\n\n", REFUSED),
        ("lf-line", b"GET /health HTTP/1.1\nHost: a\r\n\r\n", REFUSED),
        ("lf-field", b"GET /health HTTP/1.1\r\nHost: a\n\r\n", REFUSED),
        ("lf-end", get + b"\n", REFUSED),
        ("cr", b"GET /health HTTP/1.1\rHost: a\r\r", REFUSED),
        ("cr-inside", get + b"X: a\rb\r\n\r\n", REFUSED),
        ("cr-cr-lf", get + b"X: a\r\r\n\r\n", REFUSED),
        ("empty-lines", b"\r\n\r\n" + get + b"\r\n", PASSED),
        ("empty-lf", b"\n" + get + b"\r\n", REFUSED),
        ("many-empty-lines", b"\r\n" * 9 + get + b"\r\n", REFUSED),
        ("fold", get + b"X: a\r\n b\r\n\r\n", REFUSED),
        ("fold-tab", get + b"X: a\r\n\tb\r\n\r\n", REFUSED),
        ("fold-empty", get + b"X:\r\n \r\n\r\n", REFUSED),
        ("fold-first", b"GET /health HTTP/1.1\r\n Host: a\r\nHost: a\r\n\r\n", REFUSED),
        ("space-before-colon", get + b"X : a\r\n\r\n", REFUSED),
        ("tab-before-colon", get + b"X\t: a\r\n\r\n", REFUSED),
        ("no-colon", get + b"X\r\n\r\n", REFUSED),
        ("no-name", get + b": a\r\n\r\n", REFUSED),
        ("empty-value", get + b"X:\r\n\r\n", PASSED),
        ("no-space", get + b"X:a\r\n\r\n", PASSED),
        ("spaces", get + b"X: \t a\t \r\n\r\n", PASSED),
        ("nul", get + b"X: a\x00b\r\n\r\n", REFUSED),
        ("del", get + b"X: a\x7fb\r\n\r\n", REFUSED),
        ("vtab", get + b"X: \x0ba\r\n\r\n", REFUSED),
        ("high", get + b"X: \xe9\xff\r\n\r\n", PASSED),
        ("long-field", get + b"X: " + b"a" * 8000 + b"\r\n\r\n", PASSED),
        ("long-head", get + b"X: " + b"a" * 40000 + b"\r\n\r\n", REFUSED),
        ("many-fields", get + b"X: a\r\n" * 200 + b"\r\n", REFUSED),
        ("no-host", b"GET /health HTTP/1.1\r\n\r\n", REFUSED),
        ("no-host-1.0", b"GET /health HTTP/1.0\r\n\r\n", PASSED),
        ("two-hosts", get + b"Host: b\r\n\r\n", REFUSED),
        ("host-twice", get + b"Host: a\r\n\r\n", REFUSED),
        ("host-list", b"GET /health HTTP/1.1\r\nHost: a, b\r\n\r\n", REFUSED),
        ("host-empty", b"GET /health HTTP/1.1\r\nHost:\r\n\r\n", REFUSED),
        ("host-user", b"GET /health HTTP/1.1\r\nHost: u@a\r\n\r\n", REFUSED),
        ("host-path", b"GET /health HTTP/1.1\r\nHost: a/b\r\n\r\n", REFUSED),
        ("host-port", b"GET /health HTTP/1.1\r\nHost: a:80\r\n\r\n", PASSED),
        ("host-bad-port", b"GET /health HTTP/1.1\r\nHost: a:99999\r\n\r\n", REFUSED),
        ("host-space", b"GET /health HTTP/1.1\r\nHost: a b\r\n\r\n", REFUSED),
        ("host-upper", b"GET /health HTTP/1.1\r\nHOST: A\r\n\r\n", PASSED),
        ("expect", with_length(JSON, b"Expect: 100-continue\r\n"), PASSED),
        ("expect-upper", with_length(JSON, b"expect: 100-CONTINUE\r\n"), PASSED),
        ("expect-unknown", with_length(JSON, b"Expect: 200-ok\r\n"), REFUSED),
        ("expect-list", with_length(JSON, b"Expect: 100-continue, x\r\n"), REFUSED),
        ("expect-bodiless", get + b"Expect: 100-continue\r\n\r\n", PASSED),
        (
            "upgrade",
            get + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n",
            PASSED,
        ),
        (
            "h2c",
            get
            + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
            PASSED,
        ),
        (
            "h2c-body",
            with_length(
                SMUGGLED, b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
            ),
            PASSED,
        ),
        ("te", get + b"TE: trailers\r\nConnection: TE\r\n\r\n", PASSED),
        ("trailer", get + b"Trailer: Content-Length\r\n\r\n", PASSED),
        ("connection-many", get + b"Connection: " + b"a," * 40 + b"b\r\n\r\n", REFUSED),
        ("connection-commas", get + b"Connection: , ,close,\r\n\r\n", PASSED),
        ("proxy-connection", get + b"Proxy-Connection: keep-alive\r\n\r\n", PASSED),
        (
            "forwarded",
            get + b"X-Forwarded-Host: b\r\nX-Original-URL: /smuggled\r\nX-HTTP-Method-Override: PUT\r\n\r\n",
            PASSED,
        ),
        ("range", get + b"Range: bytes=0-2\r\n\r\n", PASSED),
        ("close", get + b"Connection: close\r\n\r\n" + SMUGGLED, PASSED),
        ("old", b"GET /health HTTP/1.0\r\n\r\n" + SMUGGLED, PASSED),
        (
            "old-chunks",
            post(b"Transfer-Encoding: chunked\r\n", chunked(JSON) + SMUGGLED, b"POST /tokenize HTTP/1.0"),
            REFUSED,
        ),
        ("old-kept", b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + get + b"\r\n", 2),
        ("garbage-behind", get + b"\r\n\x00\x01\x02", PASSED),
        ("short-body", post(b"Content-Length: 100\r\n", JSON), REFUSED),
        ("compressed", with_length(JSON, b"Content-Encoding: gzip\r\n"), PASSED),
        ("form", with_length(b"a=b", b"Content-Type: application/x-www-form-urlencoded\r\n"), PASSED),
        ("multipart", with_length(SMUGGLED, b"Content-Type: multipart/form-data; boundary=x\r\n"), PASSED),
        (
            "multipart-whole",
            with_length(
                b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\nv\r\n--x--\r\n' + SMUGGLED,
                b"Content-Type: multipart/form-data; boundary=x\r\n",
            ),
            PASSED,
        ),
        (
            "large-form",
            with_length(b"a=" + b"b" * 20000 + SMUGGLED, b"Content-Type: application/x-www-form-urlencoded\r\n"),
            PASSED,
        ),
        ("large", with_length(b'{"content":"' + b"x" * 100000 + b'"}'), PASSED),
    ]:
        yield f"head-{name}", head, requests
    for option in (
        b"Host",
        b"Content-Length",
        b"Transfer-Encoding",
        b"Content-Type",
        b"X-Key",
        b"Via",
        b"Connection",
        b"Accept-Encoding",
    ):
        yield (
            f"connection-names-{option.decode().lower()}",
            with_length(SMUGGLED, b"Connection: close, %b\r\nX-Key: 1\r\n" % option),
            PASSED,
        )
    for byte in range(256):
        name = bytes([byte])
        token = name.isalnum() and byte < 128 or name in b"!#$%&'*+-.^_`|~"
        yield f"name-{byte:02x}", get + b"X" + name + b"Y: a\r\n\r\n", PASSED if token or name == b":" else REFUSED
    for byte in (*range(0x21), 0x7F, 0x80, 0xA0, 0xFF):
        value = bytes([byte])
        legal = byte in (0x09, 0x20) or byte >= 0x80
        yield f"value-{byte:02x}", get + b"X: a" + value + b"b\r\n\r\n", PASSED if legal else REFUSED


def lines():
    """Methods, targets and versions."""
    host = b"\r\nHost: a\r\n\r\n"
    for method in (
        b"GET",
        b"HEAD",
        b"POST",
        b"PUT",
        b"PATCH",
        b"DELETE",
        b"OPTIONS",
        b"TRACE",
        b"PROPFIND",
        b"FOO",
        b"get",
        b"G!T",
        b"PRI",
    ):
        requests = REFUSED if method == b"TRACE" else PASSED
        yield f"method-{method.decode()}", method + b" /health HTTP/1.1" + host, requests
        with_body = with_length(SMUGGLED, line=method + b" /health HTTP/1.1")
        yield f"method-{method.decode()}-body", with_body, requests
        in_chunks = post(b"Transfer-Encoding: chunked\r\n", chunked(SMUGGLED), method + b" /health HTTP/1.1")
        yield f"method-{method.decode()}-chunks", in_chunks, requests
    for name, line, requests in [
        ("connect", b"CONNECT a:80 HTTP/1.1", REFUSED),
        ("pri", b"PRI * HTTP/2.0", REFUSED),
        ("method-space", b"GET  /health HTTP/1.1", REFUSED),
        ("method-tab", b"GET\t/health HTTP/1.1", REFUSED),
        ("method-none", b" /health HTTP/1.1", REFUSED),
        ("method-colon", b"GET: /health HTTP/1.1", REFUSED),
        ("method-nul", b"GE\x00T /health HTTP/1.1", REFUSED),
        ("method-long", b"G" * 60 + b" /health HTTP/1.1", REFUSED),
        ("leading-space", b" GET /health HTTP/1.1", REFUSED),
        ("version-space", b"GET /health  HTTP/1.1", REFUSED),
        ("version-behind", b"GET /health HTTP/1.1 ", REFUSED),
        ("version-none", b"GET /health", REFUSED),
        ("version-0.9", b"GET /health HTTP/0.9", REFUSED),
        ("version-1.2", b"GET /health HTTP/1.2", REFUSED),
        ("version-2", b"GET /health HTTP/2", REFUSED),
        ("version-2.0", b"GET /health HTTP/2.0", REFUSED),
        ("version-lower", b"GET /health http/1.1", REFUSED),
        ("version-long", b"GET /health HTTP/1.10", REFUSED),
        ("version-zeros", b"GET /health HTTP/01.1", REFUSED),
        ("version-letters", b"GET /health HTTP/1.x", REFUSED),
        ("version-https", b"GET /health HTTPS/1.1", REFUSED),
        ("two-versions", b"GET /health HTTP/1.1 HTTP/1.1", REFUSED),
        ("target-absolute", b"GET http://a/health HTTP/1.1", PASSED),
        ("target-absolute-other", b"GET http://b:81/health?x HTTP/1.1", PASSED),
        ("target-absolute-upper", b"GET HTTP://A/health HTTP/1.1", PASSED),
        ("target-absolute-bare", b"GET http://a HTTP/1.1", PASSED),
        ("target-absolute-query", b"GET http://a?x HTTP/1.1", REFUSED),
        ("target-absolute-user", b"GET http://u@a/health HTTP/1.1", REFUSED),
        ("target-absolute-none", b"GET http:///health HTTP/1.1", REFUSED),
        ("target-absolute-ftp", b"GET ftp://a/health HTTP/1.1", REFUSED),
        ("target-authority", b"GET a:80 HTTP/1.1", REFUSED),
        ("target-asterisk", b"GET * HTTP/1.1", REFUSED),
        ("target-options", b"OPTIONS * HTTP/1.1", PASSED),
        ("target-relative", b"GET health HTTP/1.1", REFUSED),
        ("target-query", b"GET ?x HTTP/1.1", REFUSED),
        ("target-fragment", b"GET /health#x HTTP/1.1", REFUSED),
        ("target-space", b"GET /he alth HTTP/1.1", REFUSED),
        ("target-tab", b"GET /he\talth HTTP/1.1", REFUSED),
        ("target-nul", b"GET /he\x00alth HTTP/1.1", REFUSED),
        ("target-high", b"GET /h\xc3\xa9alth HTTP/1.1", REFUSED),
        ("target-del", b"GET /h\x7f HTTP/1.1", REFUSED),
        ("target-lf", b"GET /health\nX HTTP/1.1", REFUSED),
        ("target-cr", b"GET /health\rX HTTP/1.1", REFUSED),
        ("target-long", b"GET /" + b"a" * 8100 + b" HTTP/1.1", PASSED),
        ("target-too-long", b"GET /" + b"a" * 9000 + b" HTTP/1.1", REFUSED),
        ("target-double-slash", b"GET //a/health HTTP/1.1", PASSED),
        ("target-backslash", b"GET /\\health HTTP/1.1", PASSED),
        ("target-dots", b"GET /x/../health HTTP/1.1", EITHER),
        ("target-dots-encoded", b"GET /x/%2e%2e/health HTTP/1.1", EITHER),
        ("target-encoded", b"GET /%68ealth HTTP/1.1", PASSED),
        ("target-encoded-slash", b"GET /x%2fhealth HTTP/1.1", PASSED),
        ("target-encoded-nul", b"GET /health%00 HTTP/1.1", PASSED),
        ("target-encoded-crlf", b"GET /health%0d%0aX:%20y HTTP/1.1", PASSED),
        ("target-encoded-percent", b"GET /%2568ealth HTTP/1.1", PASSED),
        ("target-bad-encoding", b"GET /%zz%1 HTTP/1.1", PASSED),
        ("target-signs", b"GET /health?a=[1]{2}|^`\"<>;,'!$()+*~ HTTP/1.1", PASSED),
        ("target-two-queries", b"GET /health?a?b HTTP/1.1", PASSED),
        ("target-plus", b"GET /health?a+b=%20&c HTTP/1.1", PASSED),
    ]:
        yield f"line-{name}", line + host, requests


def pipelines():
    """More than one request at once."""
    get, named = b"GET /health?n=%d HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /named HTTP/1.1\r\nHost: a\r\n\r\n"
    yield "pipeline-2", get % 1 + get % 2, 2
    yield "pipeline-5", b"".join(get % n for n in range(5)), 5
    yield (
        "pipeline-body",
        with_length(JSON) + get % 1 + post(b"Transfer-Encoding: chunked\r\n", chunked(JSON)) + get % 2,
        4,
    )
    yield "pipeline-empty-line", with_length(JSON) + b"\r\n" + get % 1, 2
    yield "pipeline-then-refused", get % 1 + b"GET /smuggled HTTP/1.1\r\nHost : a\r\n\r\n" + SMUGGLED, 1
    yield (
        "pipeline-then-smuggler",
        get % 1 + post(b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + SMUGGLED),
        1,
    )
    yield "pipeline-head", b"HEAD /health HTTP/1.1\r\nHost: a\r\n\r\n" + get % 1, 2
    yield "pipeline-close", get % 1 + b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + SMUGGLED, 2
    yield "pipeline-expect", post(b"Content-Length: 19\r\nExpect: 100-continue\r\n", JSON) + named, 2
    yield "body-is-request", with_length(SMUGGLED), 1
    yield "body-is-requests", with_length(SMUGGLED * 3) + get % 1, 2
    yield "length-one-short", post(b"Content-Length: %d\r\n" % (len(JSON) - 1), JSON), EITHER


def mutations(cases, count, seed=1):
    """Random changes to the others."""
    chosen = random.Random(seed)
    words = [
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b":",
        b",",
        b";",
        b"0",
        b"\x00",
        b"Content-Length: 5\r\n",
        b"Host: a\r\n",
        b"chunked",
        SMUGGLED,
    ]
    words += [
        b"Transfer-Encoding: chunked\r\n",
        b"HTTP/1.1\r\n",
        b"Connection: close\r\n",
        b"0\r\n\r\n",
        b"Expect: 100-continue\r\n",
        b"5\r\n",
    ]
    for _ in range(count):
        data = bytearray(chosen.choice(cases)[1][:600])
        for _ in range(chosen.randint(1, 3)):
            at = chosen.randrange(len(data) + 1)
            until = at + chosen.choice((0, 0, 1, 2))
            data[at:until] = chosen.choice([b"", *words])
        yield "random", bytes(data), EITHER


CASES = [*framings(), *chunks(), *heads(), *lines(), *pipelines()]
RANDOM = list(mutations(CASES, 1000))
