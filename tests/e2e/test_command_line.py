"""The binary as an operator meets it: the block it prints, flags, environment, file, exit codes."""

import socket
import subprocess

import pytest
from harness import (
    EXIT_CANNOT_BIND,
    EXIT_CONFIG,
    EXIT_OK,
    EXIT_USAGE,
    Tokenring,
    find_binary,
    free_port,
)

pytestmark = pytest.mark.relay


def run(*arguments, environment=None):
    command = [find_binary(), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=15, env=environment)


def test_the_block_says_where_it_is(via_uvicorn):
    log = via_uvicorn.tokenring.log()
    assert f"127.0.0.1:{via_uvicorn.tokenring.port}" in log
    assert f"127.0.0.1:{via_uvicorn.tokenring.admin_port}" in log
    assert f"127.0.0.1:{via_uvicorn.backend.port}" in log
    assert "curl" in log


def test_settings_from_the_environment(logs):
    """TOKENRING_<NAME> for every flag."""
    port, admin = free_port(), free_port()
    environment = {"TOKENRING_LISTEN": f"127.0.0.1:{port}", "TOKENRING_ADMIN": f"127.0.0.1:{admin}"}
    tokenring = Tokenring(logs, listen=None, admin=None, shards=None, environment=environment)
    try:
        tokenring.wait_ready(f"http://127.0.0.1:{admin}/ready", 10)
        assert socket.create_connection(("127.0.0.1", port), 2)
    finally:
        tokenring.stop()


def test_flags_win_over_environment_over_file(logs, tmp_path):
    listen, admin = free_port(), free_port()
    file = tmp_path / "tokenring.toml"
    file.write_text(f'listen = "127.0.0.1:{free_port()}"\nadmin = "127.0.0.1:{free_port()}"\nshards = 1\n')
    environment = {"TOKENRING_ADMIN": f"127.0.0.1:{admin}", "TOKENRING_LISTEN": f"127.0.0.1:{free_port()}"}
    settings = {"listen": f"127.0.0.1:{listen}", "admin": None, "shards": None, "config": file}
    tokenring = Tokenring(logs, environment=environment, **settings)
    try:
        tokenring.wait_ready(f"http://127.0.0.1:{admin}/ready", 10)
        assert socket.create_connection(("127.0.0.1", listen), 2)
        assert run("check", "--config", file).returncode == EXIT_OK
    finally:
        tokenring.stop()


def test_an_unknown_key_is_an_error_with_place_and_guess(tmp_path):
    file = tmp_path / "tokenring.toml"
    file.write_text('listen = "127.0.0.1:1"\n\n  lisen = "127.0.0.1:2"\n')
    for command in ("check", "serve"):
        done = run(command, "--config", file)
        assert done.returncode == EXIT_CONFIG, done
        assert "3:3" in done.stderr or ("line 3" in done.stderr and "column 3" in done.stderr), done.stderr
        assert "lisen" in done.stderr and "`listen`" in done.stderr.replace('"', "`").replace("'", "`"), done.stderr


def test_exit_codes():
    assert run("serve", "--no-such-flag").returncode == EXIT_USAGE
    assert run("no-such-command").returncode == EXIT_USAGE
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("serve", "--listen", place, "--admin", "off")
    assert done.returncode == EXIT_CANNOT_BIND, done
    assert place in done.stderr


def test_help_and_doctor():
    for arguments in (["--help"], ["serve", "--help"]):
        done = run(*arguments)
        assert done.returncode == EXIT_OK and "listen" in done.stdout
    done = run("doctor")
    assert done.returncode == EXIT_OK, done.stdout + done.stderr
    for word in ("io_uring", "memlock", "descriptors"):
        assert word in done.stdout.lower(), done.stdout
