"""TLS over the wire, with other people's implementations on the other end: OpenSSL, curl, the SDKs, uvicorn, HAProxy."""

import http.client
import re
import selectors
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time

import anthropic
import httpx
import httpx2
import openai
import pytest
from certificates import DAY, Authority
from harness import Process, Tokenring, UvicornBackend, durable_home, free_port, run_node, wait_until
from responses import ScriptedBackend
from sse import PATHS, PROMPT, body_of, is_end, stream

pytestmark = pytest.mark.relay

NAMES = ("chat.example", "localhost", "127.0.0.1")
DEMO = {"demo_tokens": 30, "demo_first_token_ms": 0, "demo_tokens_per_s": 200}
BODY = '{"model":"demo","stream":true,"messages":[{"role":"user","content":"Hello"}]}'
JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def served(authority):
    return authority.issue(*NAMES, file="served")


@pytest.fixture(scope="module")
def trust(authority):
    return ssl.create_default_context(cafile=str(authority.ca))


def tls_tokenring(logs, pair, *more, upstreams=(), **settings):
    """tokenring with a TLS listener beside its plain one; `url` is the TLS one's."""
    port = free_port()
    flags = ["--listen-tls", f"127.0.0.1:{port}", *pair.flags(), *more]
    process = Tokenring(logs, upstreams, more=[str(flag) for flag in flags], **{**DEMO, **settings})
    process.plain_url, process.plain_port, process.tls_port = process.url, process.port, port
    process.url = f"https://localhost:{port}"
    return process


@pytest.fixture(scope="module")
def demo(logs, served):
    process = tls_tokenring(logs, served).ready()
    yield process
    process.stop()


@pytest.fixture
def start(logs, served):
    own = []

    def start(*more, pair=None, **settings):
        process = tls_tokenring(logs, pair or served, *more, **settings)
        own.append(process)
        return process.ready()

    yield start
    for process in own:
        process.stop()


def run(*command, given="", seconds=20, environment=None):
    command = [str(part) for part in command]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds, env=environment)


def s_client(port, *more, given="", seconds=20):
    return run("openssl", "s_client", "-connect", f"127.0.0.1:{port}", *more, given=given, seconds=seconds)


def counter(tokenring, name):
    """The sum over shards."""
    found = re.findall(rf"^tokenring_{name}_total(?:{{.*}})? (\S+)$", tokenring.metrics().text, re.M)
    assert found, f"no counter {name}"
    return sum(map(float, found))


# ---- clients


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_curl_gets_a_stream(demo, authority, version):
    done = run(
        "curl", "-sSN", "--fail-with-body", "--cacert", authority.ca, f"--tlsv{version}", "--tls-max", version,
        f"{demo.url}/v1/chat/completions", "-H", JSON, "-d", BODY, "-w", "%{http_version} %{ssl_verify_result}",
    )  # fmt: skip
    assert done.returncode == 0, done
    assert done.stdout.count("data: ") > 30
    assert "data: [DONE]\n\n" in done.stdout
    assert done.stdout.endswith("1.1 0")


@pytest.mark.parametrize("option, version", [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")])
def test_s_client_verifies_and_is_told_http_1_1(demo, authority, option, version):
    request = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    done = s_client(
        demo.tls_port, option, "-CAfile", authority.ca, "-verify_return_error", "-verify_hostname", "chat.example",
        "-servername", "chat.example", "-alpn", "h2,http/1.1", "-ign_eof", given=request,
    )  # fmt: skip
    assert done.returncode == 0, done
    assert "Verify return code: 0 (ok)" in done.stdout
    assert "ALPN protocol: http/1.1" in done.stdout
    assert f"New, {version}" in done.stdout
    assert "Compression: NONE" in done.stdout
    assert "HTTP/1.1 " in done.stdout
    # Ended by close_notify; without it OpenSSL 3 complains of an unexpected end.
    assert "closed" in done.stdout and "unexpected eof" not in done.stderr, done.stderr


def test_what_is_old_or_another_protocol_is_refused_with_an_alert(demo):
    before = counter(demo, "tls_handshake_failures")
    old = s_client(demo.tls_port, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0")
    # A hello of TLS 1.1 lacks what 1.2 demands, and it depends on what is missed first.
    assert old.returncode != 0 and re.search("alert (protocol version|handshake failure)", old.stderr), old.stderr
    other = s_client(demo.tls_port, "-alpn", "h2")
    assert other.returncode != 0 and "alert no application protocol" in other.stderr, other.stderr
    weak = s_client(demo.tls_port, "-tls1_2", "-cipher", "AES128-SHA:@SECLEVEL=0")
    assert weak.returncode != 0 and "alert handshake failure" in weak.stderr, weak.stderr
    assert counter(demo, "tls_handshake_failures") == before + 3


@pytest.mark.parametrize("option", ["-tls1_2", "-tls1_3"])
def test_a_session_is_resumed(demo, tmp_path, option):
    session = tmp_path / "session"
    request = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    before = counter(demo, "tls_resumptions")
    ask = (demo.tls_port, option, "-servername", "localhost", "-ign_eof")
    first = s_client(*ask, "-sess_out", session, given=request)
    assert "\nNew, TLS" in first.stdout, first
    # On any shard.
    for _ in range(4):
        again = s_client(*ask, "-sess_in", session, given=request)
        assert "\nReused, TLS" in again.stdout, again
        assert "HTTP/1.1 " in again.stdout
    assert counter(demo, "tls_resumptions") == before + 4


def test_no_early_data_and_no_renegotiation(demo, tmp_path):
    session, early = tmp_path / "session", tmp_path / "early"
    request = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    early.write_text(request)
    s_client(demo.tls_port, "-tls1_3", "-ign_eof", "-sess_out", session, given=request)
    done = s_client(demo.tls_port, "-tls1_3", "-sess_in", session, "-early_data", early, given="Q\n")
    assert "Early data was not sent" in done.stdout or "Early data was rejected" in done.stdout, done.stdout
    done = s_client(demo.tls_port, "-tls1_2", given="R\n")
    assert "no renegotiation" in done.stderr or done.returncode != 0, done


def test_each_name_has_its_certificate(start, authority):
    other = authority.issue("*.other.example", file="other")
    tokenring = start(*other.flags())

    def shown(*more):
        done = s_client(tokenring.tls_port, *more)
        return re.search(r"subject=CN ?= ?(\S+)", done.stdout)[1]

    assert shown("-servername", "a.other.example") == "*.other.example"
    assert shown("-servername", "a.b.other.example") == "chat.example"
    assert shown("-servername", "chat.example") == "chat.example"
    assert shown("-noservername") == "chat.example"


@pytest.mark.parametrize("dialect", PATHS)
def test_every_dialect_over_tls(demo, trust, dialect):
    with httpx.Client(verify=trust, timeout=20) as client:
        answer = stream(demo.url, dialect, client=client)
        assert is_end(dialect, answer.events[-1]) and not answer.cut and not answer.unfinished
        # On the same connection.
        again = stream(demo.url, dialect, client=client)
        assert is_end(dialect, again.events[-1])


def test_the_python_sdks(demo, trust):
    with httpx.Client(verify=trust) as http_client:
        client = openai.OpenAI(base_url=f"{demo.url}/v1", api_key="k", max_retries=0, http_client=http_client)
        said = [{"role": "user", "content": PROMPT}]
        chunks = list(client.chat.completions.create(model="demo", messages=said, stream=True))
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    # It has its own httpx.
    with httpx2.Client(verify=trust) as http_client:
        client = anthropic.Anthropic(base_url=demo.url, api_key="k", max_retries=0, http_client=http_client)
        with client.messages.stream(model="demo", max_tokens=100, messages=said) as answer:
            assert len("".join(answer.text_stream)) > 10
    with pytest.raises(openai.APIConnectionError):
        client = openai.OpenAI(base_url=f"{demo.url}/v1", api_key="k", max_retries=0)
        client.chat.completions.create(model="demo", messages=said)


@pytest.mark.parametrize("script", ["openai.mjs", "anthropic.mjs"])
def test_the_npm_sdks(demo, authority, script, monkeypatch):
    monkeypatch.setenv("NODE_EXTRA_CA_CERTS", str(authority.ca))
    found = run_node(script, demo.url, 24, '{"query":{},"body":{},"refuses":false}')
    part = found["chat" if script == "openai.mjs" else "messages"]
    assert len(part["streamed"]) > 10


def test_large_bodies_both_ways(logs, served, trust, uvicorn):
    tokenring = tls_tokenring(logs, served, upstreams=[uvicorn.url]).ready()
    try:
        sent = bytes(range(256)) * 20_000
        with httpx.Client(verify=trust, timeout=30) as client:
            answer = client.get(f"{tokenring.url}/bytes/{len(sent)}")
            direct = httpx.get(f"{uvicorn.url}/bytes/{len(sent)}")
            assert answer.content == direct.content
            answer = client.post(f"{tokenring.url}/echo", content=sent)
            direct = httpx.post(f"{uvicorn.url}/echo", content=sent)
            assert answer.status_code == direct.status_code == 200
    finally:
        tokenring.stop()


def test_a_client_takes_its_tls_along_to_another_shard(logs, served, trust):
    tokenring = tls_tokenring(logs, served, shards=2).ready()
    try:
        text, as_json = {"Content-Type": "text/plain"}, {"Content-Type": "application/json"}
        url = f"{tokenring.url}/v1/durable/a"
        created = httpx.put(url, headers=text, verify=trust)
        assert created.headers["location"].startswith("https://")
        clients = [httpx.Client(verify=trust) for _ in range(30)]
        for number, client in enumerate(clients):
            # The first request is served where the client was accepted, the second where the stream is.
            assert client.post(f"{tokenring.url}/v1/chat/completions", content=BODY, headers=as_json).status_code == 200
            assert client.post(url, headers=text, content=f"{number};").status_code == 204
        expected = "".join(f"{number};" for number in range(len(clients)))
        for client in clients:
            assert client.get(url).text == expected
            client.close()
        counters = [shard["counters"] for shard in tokenring.status()["shards"]]
        assert counters[1 - durable_home("/v1/durable/a", 2)]["moves"] > 0
        assert sum(each["tls_failures"] + each["tls_handshake_failures"] for each in counters) == 0
    finally:
        tokenring.stop()


# ---- client certificates


@pytest.fixture(scope="module")
def known(authority):
    return authority.issue("team-a", client=True)


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("strangers"), "strangers").issue("team-b", client=True)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("auth", ["required", "optional"])
def test_clients_with_and_without_certificates(start, authority, known, strange, auth, version):
    tokenring = start("--tls-client-ca", authority.ca, "--tls-client-auth", auth, "--access-log", "on")

    def ask(*more):
        return run(
            "curl", "-sS", "--cacert", authority.ca, f"--tlsv{version}", "--tls-max", version, *more,
            f"{tokenring.url}/v1/chat/completions", "-H", JSON, "-d", BODY,
        )  # fmt: skip

    assert "[DONE]" in ask("--cert", known.certificate, "--key", known.key).stdout
    wait_until(lambda: re.search(r'tenant="?CN=', tokenring.log()), 5, "whose stream it was, in the access log")
    without = ask()
    assert ("[DONE]" in without.stdout) == (auth == "optional"), without
    stranger = ask("--cert", strange.certificate, "--key", strange.key)
    assert stranger.returncode != 0 and "[DONE]" not in stranger.stdout
    wait_until(lambda: "UnknownIssuer" in tokenring.log(), 5, "why the stranger was refused, in the log")
    assert re.search(r"INFO .*TLS with a client failed: .*UnknownIssuer.* peer=127\.0\.0\.1:\d+", tokenring.log())


# ---- the wrong protocol, and no protocol


def talk(port, sent, seconds=5):
    """What comes back, and how long it took until the end."""
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), seconds) as peer:
        received = b""
        try:
            peer.sendall(sent)
            while part := peer.recv(65536):
                received += part
        except ConnectionResetError:
            pass
    return received, time.monotonic() - begin


def test_plain_http_on_the_tls_port_is_told_so(demo):
    before = counter(demo, "tls_plain_refused")
    answer = httpx.get(f"http://127.0.0.1:{demo.tls_port}/v1/models")
    assert answer.status_code == 400
    assert "https" in answer.text.lower() or "tls" in answer.text.lower(), answer.text
    answer = httpx.post(f"http://127.0.0.1:{demo.tls_port}/v1/chat/completions", content=BODY)
    assert answer.status_code == 400
    assert counter(demo, "tls_plain_refused") == before + 2


def test_tls_on_the_plain_port_ends_at_once(demo):
    before = counter(demo, "tls_hello_refused")
    begin = time.monotonic()
    done = s_client(demo.plain_port)
    assert done.returncode != 0 and time.monotonic() - begin < 3
    assert counter(demo, "tls_hello_refused") == before + 1


def test_garbage_and_silence_end(start):
    tokenring = start("--tls-handshake-ms", "1000")
    # A record of no known type; a hello that says it is longer than any may be; a hello that breaks off.
    for sent in (b"\x99" * 100, b"\x16\x03\x01\xff\xff" + b"\x00" * 2000):
        received, took = talk(tokenring.tls_port, sent)
        assert took < 3, took
    before = counter(tokenring, "tls_handshake_timeouts")
    for sent in (b"", b"\x16\x03\x01\x02\x00\x01"):
        _, took = talk(tokenring.tls_port, sent)
        assert 0.5 < took < 4, took
    assert counter(tokenring, "tls_handshake_timeouts") >= before + 1
    assert tokenring.alive()


def test_sslscan_finds_nothing_weak(demo):
    assert shutil.which("sslscan"), "sslscan is missing (tests/run installs it)"
    done = run("sslscan", "--no-colour", "--show-certificate", f"localhost:{demo.tls_port}", seconds=50)
    assert done.returncode == 0, done
    text = done.stdout
    for protocol in ("SSLv2", "SSLv3", "TLSv1.0", "TLSv1.1"):
        assert re.search(rf"^{protocol}\s+disabled$", text, re.M), text
    for protocol in ("TLSv1.2", "TLSv1.3"):
        assert re.search(rf"^{protocol}\s+enabled$", text, re.M), text
    assert "not vulnerable to heartbleed" in text
    assert "Session renegotiation not supported" in text or "Secure session renegotiation supported" in text, text
    ciphers = re.findall(r"^(?:Preferred|Accepted)\s+(\S+)\s+(\d+) bits\s+(\S+)", text, re.M)
    assert ciphers, text
    for protocol, bits, cipher in ciphers:
        assert int(bits) >= 128
        assert protocol == "TLSv1.3" or cipher.startswith("ECDHE-"), cipher
        assert "GCM" in cipher or "CHACHA20" in cipher, cipher


# ---- backends


class TlsBackend(ScriptedBackend):
    """Answers every request over TLS with `script`, and ends as told: with close_notify, or without."""

    def __init__(self, pair, client_ca=None, version=None, notify=True):
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(pair.certificate, pair.key)
        if client_ca:
            self.context.load_verify_locations(client_ca)
            self.context.verify_mode = ssl.CERT_REQUIRED
        if version:
            self.context.minimum_version = self.context.maximum_version = version
        self.notify, self.seen = notify, []
        super().__init__()
        self.url = self.url.replace("http:", "https:")
        self.script = SCRIPT

    def _serve(self):
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            try:
                plain.settimeout(5)
                with self.context.wrap_socket(plain, server_side=True, suppress_ragged_eofs=True) as peer:
                    self.seen.append((peer.version(), peer.getpeercert(), peer.session_reused))
                    asked = b""
                    while b"\r\n\r\n" not in asked and (part := peer.recv(65536)):
                        asked += part
                    if asked:
                        peer.sendall(self.script)
                        if self.notify:
                            peer.unwrap()
                        else:
                            # Without it `close` would not end the connection while this object lives.
                            peer.shutdown(socket.SHUT_RDWR)
            except OSError:
                # Refused, or gone in the middle.
                plain.close()


SCRIPT = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nhello, and this is all"


@pytest.fixture
def backend():
    made = []

    def make(*arguments, **settings):
        made.append(TlsBackend(*arguments, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(tokenring):
    return httpx.post(f"{tokenring.plain_url}/v1/chat/completions", json=body_of("chat", stream=False), timeout=20)


@pytest.mark.parametrize("version", [None, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["any", "1.2", "1.3"])
def test_a_backend_is_reached_and_its_sessions_resumed(start, authority, backend, version):
    one = backend(authority.issue("localhost", file="backend"), version=version)
    url = one.url.replace("127.0.0.1", "localhost")
    tokenring = start("--upstream-ca", authority.ca, upstreams=[url], shards=1)
    for _ in range(3):
        answer = ask(tokenring)
        assert (answer.status_code, answer.text) == (200, "{}")
    assert [reused for _, _, reused in one.seen] == [False, True, True]
    assert {spoken for spoken, _, _ in one.seen} == {"TLSv1.2" if version == ssl.TLSVersion.TLSv1_2 else "TLSv1.3"}
    assert counter(tokenring, "upstream_tls_handshakes") == 3
    assert counter(tokenring, "upstream_tls_resumptions") == 2


def untrusted(authority, tmp_path):
    """Name, certificate, what the log says of it."""
    stranger = Authority(tmp_path, "stranger")
    old = {"begin": -3 * DAY, "end": -DAY}
    return [
        ("expired", authority.issue("localhost", file="old", **old), "it has expired"),
        ("future", authority.issue("localhost", file="new", begin=DAY, end=2 * DAY), "it is not valid yet"),
        ("name", authority.issue("other.example", file="name"), 'it is not for the name "localhost"'),
        ("self", authority.issue("localhost", file="self", signer="self"), "it is self-signed"),
        ("stranger", stranger.issue("localhost", file="strange"), "its issuer is unknown"),
        ("client", authority.issue("localhost", file="purpose", client=True), "it is not for servers"),
    ]


def test_a_backend_that_is_not_to_be_trusted_is_not(start, authority, backend, tmp_path):
    for name, pair, expected in untrusted(authority, tmp_path):
        one = backend(pair)
        url = one.url.replace("127.0.0.1", "localhost")
        tokenring = start("--upstream-ca", authority.ca, upstreams=[url], shards=1)
        answer = ask(tokenring)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_tls"), (name, answer.text)
        assert one.seen == [] or all(not certificate for _, certificate, _ in one.seen)

        def told(tokenring=tokenring):
            return tokenring.status()["tls"]["upstreams"][0]["last_error"]

        error = wait_until(told, 5, "the reason in /status")["error"]
        assert 'the certificate of "localhost" is not trusted: ' in error and expected in error, (name, error)
        assert int(re.search(r"serial ([0-9a-f]+),", error)[1], 16) == pair.serial
        assert "OtherError" not in error and "\\" not in error, error
        assert re.search(rf"WARN .*TLS with upstream {re.escape(url)} failed: .*{re.escape(expected)}", tokenring.log())
        assert counter(tokenring, "upstream_tls_handshake_failures") >= 1
        tokenring.stop()
        # Whoever trusts everybody takes it all the same.
        tokenring = start("--upstream-tls-insecure", "on", upstreams=[url], shards=1)
        assert ask(tokenring).status_code == 200, name
        tokenring.stop()


def test_the_systems_authorities_do_not_vouch_for_a_private_one(start, authority, backend):
    one = backend(authority.issue("localhost", file="backend"))
    url = one.url.replace("127.0.0.1", "localhost")
    assert ask(start(upstreams=[url])).status_code == 502
    # Unless it is made one of them.
    environment = {"SSL_CERT_FILE": str(authority.ca)}
    assert ask(start(upstreams=[url], environment=environment)).status_code == 200


def test_the_name_of_a_backend_can_be_said(start, authority, backend):
    one = backend(authority.issue("model.internal", file="named"))
    trusting = ["--upstream-ca", authority.ca]
    assert ask(start(*trusting, upstreams=[one.url])).status_code == 502
    assert ask(start(*trusting, "--upstream-server-name", "model.internal", upstreams=[one.url])).status_code == 200


def test_an_address_is_a_name_too(start, authority, backend):
    one = backend(authority.issue("127.0.0.1", file="address"))
    assert ask(start("--upstream-ca", authority.ca, upstreams=[one.url])).status_code == 200


def test_a_backend_that_wants_a_certificate_gets_it(start, authority, known, strange, backend):
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        one = backend(authority.issue("127.0.0.1", file="wanting"), client_ca=authority.ca, version=version)
        trusting = ["--upstream-ca", authority.ca]
        with_one = [*trusting, "--upstream-cert", known.certificate, "--upstream-key", known.key]
        assert ask(start(*with_one, upstreams=[one.url])).status_code == 200
        assert one.seen[-1][1]["subject"] == ((("commonName", "team-a"),),)
        assert ask(start(*trusting, upstreams=[one.url])).status_code == 502
        with_other = [*trusting, "--upstream-cert", strange.certificate, "--upstream-key", strange.key]
        assert ask(start(*with_other, upstreams=[one.url])).status_code == 502


def test_an_answer_that_only_the_end_ends_must_end_with_close_notify(start, authority, backend):
    one = backend(authority.issue("127.0.0.1", file="ending"))
    one.script = UNTIL_CLOSE
    tokenring = start("--upstream-ca", authority.ca, upstreams=[one.url], shards=1)
    assert httpx.get(f"{tokenring.plain_url}/x").text == "hello, and this is all"
    one.notify = False
    before = counter(tokenring, "upstream_tls_truncations")
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{tokenring.plain_url}/x")
    assert counter(tokenring, "upstream_tls_truncations") == before + 1
    # Where the length is told, nothing is missing.
    one.script = SCRIPT
    assert ask(tokenring).text == "{}"


def test_a_backend_that_speaks_no_tls(start, authority, uvicorn):
    tokenring = start("--upstream-ca", authority.ca, upstreams=[uvicorn.url.replace("http:", "https:")])
    answer = ask(tokenring)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_tls"), answer.text


@pytest.fixture(scope="module")
def tls_uvicorn(logs, authority):
    pair = authority.issue("localhost", "127.0.0.1", file="uvicorn")
    return UvicornBackend(logs, pair, authority.ca)


@pytest.fixture(scope="module")
def haproxy(logs, authority, uvicorn, tmp_path_factory):
    """HAProxy that ends TLS before the plain uvicorn."""
    folder = tmp_path_factory.mktemp("haproxy")
    pair, port = authority.issue("localhost", file="haproxy"), free_port()
    (folder / "both.pem").write_bytes(pair.certificate.read_bytes() + pair.key.read_bytes())
    (folder / "haproxy.cfg").write_text(
        "defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n option http-no-delay\n"
        f"frontend tls\n bind 127.0.0.1:{port} ssl crt {folder}/both.pem alpn h2,http/1.1\n default_backend model\n"
        f"backend model\n server uvicorn 127.0.0.1:{uvicorn.port}\n"
    )
    process = Process("haproxy", ["haproxy", "-db", "-f", folder / "haproxy.cfg"], logs)
    process.url = f"https://localhost:{port}"
    context = ssl.create_default_context(cafile=str(authority.ca))

    def answers():
        try:
            return httpx.get(f"{process.url}/health", verify=context).status_code == 200
        except httpx.HTTPError:
            return False

    wait_until(answers, 10, "HAProxy answers")
    yield process
    process.stop()


@pytest.mark.parametrize("kind", ["uvicorn", "haproxy"])
@pytest.mark.parametrize("dialect", PATHS)
def test_streams_over_tls_on_both_sides(start, request, authority, trust, uvicorn, kind, dialect):
    upstream = request.getfixturevalue("tls_uvicorn" if kind == "uvicorn" else kind)
    tokenring = start("--upstream-ca", authority.ca, upstreams=[upstream.url])
    ask = {"tokens": 60, "tokens_per_s": 200}
    with httpx.Client(verify=trust, timeout=20) as client:
        through = stream(tokenring.url, dialect, client=client, params=ask)
    direct = stream(uvicorn.url, dialect, params=ask)
    assert through.data() == direct.data()
    assert not through.cut and is_end(dialect, through.events[-1])


def test_a_backend_that_drops_inside_a_stream_is_told_of(start, authority, trust, tls_uvicorn):
    tokenring = start("--upstream-ca", authority.ca, upstreams=[tls_uvicorn.url])
    with httpx.Client(verify=trust, timeout=20) as client:
        answer = stream(tokenring.url, "chat", client=client, params={"tokens": 20, "drop_after": 5})
    assert not is_end("chat", answer.events[-1])
    assert answer.events[-1].json()["error"]["code"].startswith("upstream_")


# ---- new certificates


class Streams(threading.Thread):
    """Many streams over TLS at once, read by one thread from sockets of its own."""

    def __init__(self, port, number, context, tokens, tokens_per_s):
        super().__init__(daemon=True)
        self.counts, self.ends, self.failures = [0] * number, [False] * number, []
        path = f"/v1/chat/completions?tokens={tokens}&tokens_per_s={tokens_per_s}&first_token_ms=0"
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\nContent-Length: {len(BODY)}\r\n\r\n"
        self.peers = []
        for _ in range(number):
            peer = socket.create_connection(("127.0.0.1", port), 10)
            peer = context.wrap_socket(peer, server_hostname="localhost")
            peer.sendall((head + BODY).encode())
            peer.setblocking(False)
            self.peers.append(peer)

    def run(self):
        with selectors.DefaultSelector() as selector:
            tails = [b""] * len(self.peers)
            for index, peer in enumerate(self.peers):
                selector.register(peer, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select(30) or [(None, None)]:
                    if key is None:
                        self.failures.append("nothing came for 30 s")
                        return
                    index, peer = key.data, key.fileobj
                    try:
                        while True:
                            part = peer.recv(65536)
                            # The end of the body is the end of the answer; whatever is cut by a piece's edge is in the tail.
                            text = tails[index] + part
                            self.counts[index] += text.count(b"\ndata: ") - tails[index].count(b"\ndata: ")
                            tails[index] = text[-16:]
                            if b"0\r\n\r\n" in text[-5:] or not part:
                                self.ends[index] = bool(part)
                                selector.unregister(peer)
                                break
                    except ssl.SSLWantReadError:
                        pass
                    except OSError as error:
                        self.failures.append(f"{index}: {error}")
                        selector.unregister(peer)

    def close(self):
        for peer in self.peers:
            peer.close()


@pytest.mark.timeout(180)
def test_certificates_are_replaced_under_a_thousand_streams(start, authority, trust):
    pair = authority.issue(*NAMES, file="rotated")
    tokenring = start(pair=pair)
    streams = Streams(tokenring.tls_port, 1000, trust, tokens=100, tokens_per_s=5)
    streams.start()

    def serial():
        with socket.create_connection(("127.0.0.1", tokenring.tls_port), 10) as plain:
            with trust.wrap_socket(plain, server_hostname="localhost") as peer:
                return int(peer.getpeercert()["serialNumber"], 16)

    try:
        wait_until(lambda: all(streams.counts) or streams.failures, 60, "all streams flow")
        assert serial() == pair.serial
        for number in range(3):
            renewed = authority.issue(*NAMES, file="rotated")
            if number == 0:
                tokenring.signal(signal.SIGHUP)
            wait_until(lambda renewed=renewed: serial() == renewed.serial, 15, "new connections see the new certificate")
        assert streams.is_alive(), "the streams were over before the certificates had changed"
        streams.join(100)
        assert not streams.is_alive() and not streams.failures, streams.failures[:5]
        assert all(streams.ends), streams.ends.count(False)
        # Every stream is the same length: a role, 100 tokens, a finish and an end mark, or so.
        assert len(set(streams.counts)) == 1 and streams.counts[0] >= 100, set(streams.counts)
        assert tokenring.status()["tls"]["reload_failures"] == 0
    finally:
        streams.close()


def test_a_keyed_connection_goes_on_when_its_authority_is_taken_away(start, tmp_path, authority, known):
    """New rules hold for new connections; what stands is not touched."""
    clients = tmp_path / "clients.pem"
    clients.write_bytes(authority.ca.read_bytes())
    tokenring = start("--tls-client-ca", clients)
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.load_cert_chain(known.certificate, known.key)
    connection = http.client.HTTPSConnection("localhost", tokenring.tls_port, context=context, timeout=10)

    def post():
        connection.request("POST", "/v1/chat/completions", BODY, {"Content-Type": "application/json"})
        return connection.getresponse().read()

    assert b"[DONE]" in post()
    clients.write_bytes(Authority(tmp_path, "others").ca.read_bytes())
    tokenring.signal(signal.SIGHUP)
    wait_until(lambda: tokenring.status()["tls"]["epoch"] == 2, 10, "the new authorities")
    assert b"[DONE]" in post()
    connection.close()
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
        post()
