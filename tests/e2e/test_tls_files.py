"""Certificates and keys as an operator meets them: check, doctor, messages, new files. What goes over the wire is in test_tls.py."""

import re
import signal
import subprocess
from pathlib import Path

import pytest
from certificates import DAY, HOUR, Authority
from harness import EXIT_CONFIG, EXIT_OK, ROOT, Tokenring, find_binary, free_port, wait_until

pytestmark = pytest.mark.relay


def run(*arguments, environment=None):
    command = [find_binary(), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=15, env=environment)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def start_with_tls(logs):
    """Start tokenring with a TLS listener alone, and wait until it is ready."""
    own = []

    def start(*more, **settings):
        port = free_port()
        process = Tokenring(logs, listen=None, more=["--listen-tls", f"127.0.0.1:{port}", *map(str, more)], **settings)
        process.tls_port = port
        own.append(process)
        return process.ready()

    yield start
    for process in own:
        process.stop()


def serials(tokenring):
    listener = tokenring.status()["tls"]["listeners"][0]
    return [int(certificate["serial"], 16) for certificate in listener["certificates"]]


def metric(tokenring, name):
    """Value by labels."""
    found = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", tokenring.metrics().text, re.M)
    return {labels: float(value) for labels, value in found}


def test_check_lists_what_it_read(authority):
    one, other = authority.issue("a.example", "*.a.example"), authority.issue("b.example", end=20 * DAY - HOUR)
    done = run(
        "check", "--listen-tls", "127.0.0.1:8443", *one.flags(), *other.flags(), "--tls-client-ca", authority.ca,
        "--upstream", "https://model.example", "--upstream-ca", authority.ca, "--shards", 1,
    )
    assert done.returncode == EXIT_OK, done.stderr
    assert "# 127.0.0.1:8443: TLS 1.2 and 1.3\n" in done.stdout
    assert f"#   {one.certificate} (the default)\n#     for a.example, *.a.example\n" in done.stdout
    assert f"#   {other.certificate}\n#     for b.example\n" in done.stdout
    assert "(19 days left)" in done.stdout
    assert f"certificates of clients: required, vouched for by 1 authority: {authority.ca}" in done.stdout
    assert f"# https://model.example: must be model.example, vouched for by 1 authority: {authority.ca}" in done.stdout
    assert re.search(rf"# warning: certificate {one.certificate} .*: it expires in (59|60) min", done.stdout)
    assert f"{other.certificate} (b.example): it expires" not in done.stdout
    # It is a configuration itself.
    again = authority.folder / "again.toml"
    again.write_text(done.stdout)
    assert run("check", "--config", again).returncode == EXIT_OK


def test_check_warns_of_what_has_expired_and_does_not_refuse_it(authority):
    old = authority.issue("a.example", begin=-3 * DAY, end=-DAY)
    done = run("check", "--listen-tls", "127.0.0.1:8443", *old.flags())
    assert done.returncode == EXIT_OK, done.stderr
    assert "it expired on " in done.stdout


def encrypt(pair, way):
    password = ["-aes256", "-passout", "pass:secret"]
    subprocess.run(["openssl", *way, "-in", pair.key, "-out", f"{pair.key}.enc", *password], check=True, capture_output=True)
    return Path(f"{pair.key}.enc")


@pytest.mark.parametrize("command", ["check", "serve"])
def test_what_is_wrong_with_files_is_said(authority, command, tmp_path):
    good, other = authority.issue("a.example"), authority.issue("b.example")
    empty, text = tmp_path / "empty", tmp_path / "text"
    empty.write_text("")
    text.write_text("hello\n")
    (tmp_path / "cut").write_bytes(good.certificate.read_bytes()[:200])
    cases = [
        ([], "has no certificate: give --tls-cert and --tls-key"),
        (["--tls-cert", good.certificate], "1 certificate in tls_cert (flag --tls-cert) and 0 keys in tls_key"),
        (["--tls-cert", good.certificate, "--tls-key", other.key], f"{other.key}: this key is not that of the certificate in"),
        (["--tls-cert", tmp_path / "no", "--tls-key", good.key], f"{tmp_path}/no: there is no such file"),
        (["--tls-cert", tmp_path, "--tls-key", good.key], f"{tmp_path}: this is no regular file"),
        (["--tls-cert", good.key, "--tls-key", good.key], "no certificate (-----BEGIN CERTIFICATE-----): it holds PRIVATE KEY"),
        (["--tls-cert", good.certificate, "--tls-key", good.certificate], "no private key (-----BEGIN PRIVATE KEY-----)"),
        (["--tls-cert", tmp_path / "cut", "--tls-key", good.key], "not valid PEM: a section has no end"),
        (["--tls-cert", text, "--tls-key", good.key], "it is not PEM"),
        ([*good.flags(), "--tls-client-ca", empty], f"{empty}: no certificate"),
        ([*good.flags(), "--tls-client-auth", "required"], "nothing to check them with"),
        ([*good.flags(), "--upstream", "https://a", "--upstream-ca", text], f"{text}: no certificate"),
        ([*good.flags(), "--upstream", "https://a", "--upstream-cert", good.certificate], "needs upstream_key"),
        ([*good.flags(), "--upstream-ca", authority.ca], "no upstream is https://"),
    ]
    # What openssl makes today, and what it made once.
    for way in (["pkey"], ["ec"]):
        encrypted = encrypt(good, way)
        cases.append((["--tls-cert", good.certificate, "--tls-key", encrypted], "the key is encrypted"))
    for arguments, expected in cases:
        done = run(command, "--listen-tls", f"127.0.0.1:{free_port()}", "--admin", "off", *arguments)
        assert done.returncode == EXIT_CONFIG, (arguments, done)
        assert expected in done.stderr, (arguments, done.stderr)


def test_a_certificate_without_a_tls_listener_is_a_mistake(authority):
    done = run("check", *authority.issue("a.example").flags())
    assert done.returncode == EXIT_CONFIG
    assert "no listener speaks TLS" in done.stderr


def test_doctor_tells_of_the_systems_authorities(authority):
    done = run("doctor")
    assert re.search(r"ok +certificate authorities +\d+, the system's \(/", done.stdout), done.stdout
    done = run("doctor", environment={"SSL_CERT_FILE": str(authority.ca)})
    assert f"certificate authorities             1, the system's ({authority.ca})" in done.stdout, done.stdout
    done = run("doctor", environment={"SSL_CERT_FILE": "/no/such/file"})
    assert "no certificates of authorities on this system (/no/such/file): install ca-certificates" in done.stdout
    # An https backend needs them.
    done = run("check", "--upstream", "https://a", environment={"SSL_CERT_FILE": "/no/such/file"})
    assert done.returncode == EXIT_CONFIG
    assert "install ca-certificates" in done.stderr


def test_the_block_says_https_and_only_what_is_there(start_with_tls, authority):
    tokenring = start_with_tls(*authority.issue("chat.example").flags())
    assert f"listening  https://127.0.0.1:{tokenring.tls_port}\n" in tokenring.log()
    assert f"curl -N --connect-to ::127.0.0.1:{tokenring.tls_port} https://chat.example/v1/chat/completions" in tokenring.log()
    assert tokenring.status()["listen"] == [f"127.0.0.1:{tokenring.tls_port}"]


def test_no_verification_is_said_loudly(start_with_tls, authority):
    upstreams = ["https://127.0.0.1:9", "http://127.0.0.1:9"]
    more = ["--upstream-tls-insecure", "on", *authority.issue("a.example").flags()]
    tokenring = start_with_tls(*more, upstreams=upstreams)
    assert "WARN" in tokenring.log() and "THE CERTIFICATE OF https://127.0.0.1:9 IS NOT VERIFIED" in tokenring.log()
    [upstream] = tokenring.status()["tls"]["upstreams"]
    assert (upstream["url"], upstream["tls_verification"]) == ("https://127.0.0.1:9", "off")
    assert metric(tokenring, "tokenring_tls_verification_off") == {'upstream="https://127.0.0.1:9"': 1.0}


def test_status_and_metrics_tell_of_certificates(start_with_tls, authority):
    pair = authority.issue("a.example", "10.0.0.1", end=20 * DAY)
    tokenring = start_with_tls(*pair.flags(), "--tls-client-ca", authority.ca, "--tls-min", "1.3")
    tls = tokenring.status()["tls"]
    [listener] = tls["listeners"]
    [certificate] = listener["certificates"]
    assert listener["address"] == f"127.0.0.1:{tokenring.tls_port}"
    assert (listener["versions"], listener["client_auth"]) == ("1.3", "required")
    assert certificate["names"] == ["a.example", "10.0.0.1"]
    assert certificate["not_after_unix_s"] == pair.not_after
    assert int(certificate["serial"], 16) == pair.serial
    shown = ["openssl", "x509", "-in", pair.certificate, "-noout", "-fingerprint", "-sha256"]
    fingerprint = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.split("=")[1].strip()
    assert certificate["sha256"] == fingerprint.replace(":", "").lower()
    labels = f'listener="127.0.0.1:{tokenring.tls_port}",name="a.example"'
    assert metric(tokenring, "tokenring_tls_certificate_expiry_timestamp_seconds") == {labels: pair.not_after}
    assert "expires" not in tokenring.log()


def test_a_certificate_about_to_expire_is_warned_of(start_with_tls, authority):
    tokenring = start_with_tls(*authority.issue("a.example", end=3 * DAY - HOUR).flags())
    assert re.search(r"WARN .*a\.example\.pem \(a\.example\): it expires in 2 days, on ", tokenring.log())


@pytest.mark.parametrize("how", ["SIGHUP", "by itself"])
def test_a_new_pair_is_taken_and_a_bad_one_is_not(start_with_tls, authority, how):
    first = authority.issue("a.example", end=20 * DAY)
    tokenring = start_with_tls(*first.flags())

    def renew():
        if how == "SIGHUP":
            tokenring.signal(signal.SIGHUP)

    second = authority.issue("a.example", end=40 * DAY)
    assert second.certificate == first.certificate
    renew()
    wait_until(lambda: serials(tokenring) == [second.serial], 15, "the new certificate in /status")
    assert re.search(rf"INFO .*new connections from now on: certificate {first.certificate} for a\.example, ", tokenring.log())
    tls = tokenring.status()["tls"]
    assert (tls["epoch"], tls["reloads"], tls["reload_failures"], tls["last_error"]) == (2, 1, 0, None)

    # A key that does not fit.
    authority.issue("other", file="a.example", end=60 * DAY)
    second_key = first.key.read_bytes()
    authority.issue("a.example", end=50 * DAY)
    first.key.write_bytes(second_key)
    renew()
    wait_until(lambda: tokenring.status()["tls"]["reload_failures"] >= 1, 15, "the failure in /status")
    tls = tokenring.status()["tls"]
    assert serials(tokenring) == [second.serial]
    assert tls["epoch"] == 2
    [refused] = tls["refused"]
    assert refused == tls["last_error"]["error"]
    assert f"{first.key}: this key is not that of the certificate in {first.certificate}" in refused
    assert f"what was read before stays in use: {refused}" in tokenring.log()
    assert metric(tokenring, "tokenring_tls_reload_failures_total")[""] >= 1
    assert metric(tokenring, "tokenring_tls_files_refused") == {"": 1.0}

    # And it comes right.
    third = authority.issue("a.example", end=60 * DAY)
    renew()
    wait_until(lambda: serials(tokenring) == [third.serial], 15, "the third certificate in /status")
    assert tokenring.status()["tls"]["refused"] == []
    assert metric(tokenring, "tokenring_tls_files_refused") == {"": 0.0}
    assert metric(tokenring, "tokenring_tls_epoch") == {"": 3.0}


def test_swapped_links_are_noticed(start_with_tls, authority, tmp_path):
    """As certbot does it: live/NAME.pem is a link to archive/NAME1.pem, then to archive/NAME2.pem."""
    old, new = authority.issue("a.example", file="a1"), authority.issue("a.example", file="a2")
    certificate, key = tmp_path / "live.pem", tmp_path / "live.key"

    def link(pair):
        for path, target in ((certificate, pair.certificate), (key, pair.key)):
            aside = path.with_suffix(".new")
            aside.symlink_to(target)
            aside.rename(path)

    link(old)
    tokenring = start_with_tls("--tls-cert", certificate, "--tls-key", key)
    assert serials(tokenring) == [old.serial]
    link(new)
    wait_until(lambda: serials(tokenring) == [new.serial], 15, "the new certificate in /status")


def test_the_recipe_of_a_private_authority_works(tmp_path):
    """The commands in docs/tls.md, and tokenring with what they made."""
    text = (ROOT / "docs" / "tls.md").read_text()
    recipe = text.split("### A private authority")[1].split("```sh\n")[1].split("\ntokenring --listen-tls")[0]
    subprocess.run(["bash", "-euc", recipe], cwd=tmp_path, check=True, capture_output=True)
    for part in ("server", "client"):
        verify = ["openssl", "verify", "-CAfile", tmp_path / "ca.pem", tmp_path / f"{part}.pem"]
        subprocess.run(verify, check=True, capture_output=True)
    pair = ["--tls-cert", tmp_path / "server.pem", "--tls-key", tmp_path / "server.key"]
    done = run("check", "--listen-tls", "127.0.0.1:8443", *pair, "--tls-client-ca", tmp_path / "ca.pem")
    assert done.returncode == EXIT_OK, done.stderr
    assert "#     for model.internal, localhost, 127.0.0.1\n" in done.stdout
    assert "# warning" not in done.stdout
