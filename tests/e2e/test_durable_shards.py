"""Durable streams on several shards: each is on the shard of its path, a fork with its source, and nothing is lost or found twice when
a server comes back with another number of shards."""

import random
import signal
import ssl
import subprocess
import threading

import httpx
import pytest
from harness import EXIT_OK, durable_home, find_binary, wait_until

TEXT = {"Content-Type": "text/plain"}
# Every request has a connection of its own, so that it comes to any shard; making this for each takes longer than the request.
TLS = ssl.create_default_context()


def path_of(name):
    return f"/v1/durable/{name}"


def ask(method, url, **more):
    return httpx.request(method, url, verify=TLS, **more)


def url_of(server, name):
    return f"{server.url}{path_of(name)}"


def fork_of(name):
    return {"Stream-Forked-From": path_of(name)}


def names_of(shard, shards, count):
    """So many names whose paths belong to that shard."""
    found = (f"n{number}" for number in range(100_000) if durable_home(path_of(f"n{number}"), shards) == shard)
    return [next(found) for _ in range(count)]


def placed(server):
    """Names of streams by shard."""
    streams = ask("GET", f"{server.admin_url}/streams?limit=1000").json()["streams"]
    durable = [stream for stream in streams if stream["kind"] == "durable"]
    return {stream["path"].removeprefix(path_of("")): stream["shard"] for stream in durable}


def streams_of(data, *arguments):
    command = [find_binary(), "streams", *arguments, "--data-dir", str(data)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("shards", [2, 3])
def test_streams_are_spread_and_forks_are_with_their_sources(start_tokenring, shards):
    server = start_tokenring(shards=shards)
    for number in range(40):
        assert ask("PUT", url_of(server, f"s{number}"), headers=TEXT, content=f"{number}").status_code == 201
    assert placed(server) == {f"s{number}": durable_home(path_of(f"s{number}"), shards) for number in range(40)}
    with httpx.Client() as one:
        for number in range(40):
            assert one.get(url_of(server, f"s{number}")).text == str(number)
    # Forks of all of them, and forks of these, at paths of every shard.
    for number in range(40):
        headers = {**TEXT, **fork_of(f"s{number}")}
        assert ask("PUT", url_of(server, f"fork-{number}"), headers=headers).status_code == 201
        assert ask("PUT", url_of(server, f"fork-{number}"), headers=headers).status_code == 200
        assert ask("POST", url_of(server, f"fork-{number}"), headers=TEXT, content="+").status_code == 204
        second = ask("PUT", url_of(server, f"fork2-{number}"), headers=fork_of(f"fork-{number}"), content="!")
        assert second.status_code == 201 and second.headers["Location"].endswith(path_of(f"fork2-{number}"))
        assert ask("GET", url_of(server, f"fork2-{number}")).text == f"{number}+!"
    where = placed(server)
    for number in range(40):
        homes = {where[f"{kind}{number}"] for kind in ("s", "fork-", "fork2-")}
        assert homes == {durable_home(path_of(f"s{number}"), shards)}, "a fork is where its source is"
    away = [name for name, shard in where.items() if durable_home(path_of(name), shards) != shard]
    assert len(away) > 20
    # A source that is deleted is kept for them; with the last fork all paths are free again, on every shard.
    for number in range(40):
        assert ask("DELETE", url_of(server, f"s{number}")).status_code == 204
        assert ask("GET", url_of(server, f"s{number}")).status_code == 410
        assert ask("DELETE", url_of(server, f"fork-{number}")).status_code == 204
        assert ask("PUT", url_of(server, f"fork-{number}"), headers=TEXT).status_code == 409
        assert ask("GET", url_of(server, f"fork2-{number}")).text == f"{number}+!"
        assert ask("DELETE", url_of(server, f"fork2-{number}")).status_code == 204
        for name in (f"s{number}", f"fork-{number}", f"fork2-{number}"):
            assert ask("GET", url_of(server, name)).status_code == 404
            assert ask("PUT", url_of(server, name), headers=TEXT, content="anew").status_code == 201
            assert ask("GET", url_of(server, name)).text == "anew"
    assert placed(server) == {name: durable_home(path_of(name), shards) for name in where}
    entry = ask("GET", f"{server.admin_url}/streams{path_of('fork-7')}").json()
    assert entry["shard"] == durable_home(path_of("fork-7"), shards)


def test_of_many_who_want_a_path_one_makes_the_fork(start_tokenring):
    server = start_tokenring(shards=3)
    sources = [names_of(shard, 3, 1)[0] for shard in range(3)]
    for source in sources:
        ask("PUT", url_of(server, source), headers=TEXT, content=source)
    for round in range(20):
        told, name = [], f"wanted-{round}"

        def want(number, name=name, told=told):
            headers = TEXT if number % 4 == 3 else {**TEXT, **fork_of(sources[number % 4])}
            answer = ask("PUT", url_of(server, name), headers=headers)
            told.append((number % 4, answer.status_code))

        threads = [threading.Thread(target=want, args=[number]) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        [made] = [kind for kind, status in told if status == 201]
        assert all(status in (200, 201) if kind == made else status == 409 for kind, status in told), told
        assert ask("GET", url_of(server, name)).text == ("" if made == 3 else sources[made])


@pytest.mark.parametrize("interval", ["0", "50"])
def test_a_server_killed_and_started_with_another_number_of_shards_has_all(start_tokenring, tmp_path, interval):
    data = tmp_path / "data"
    rng = random.Random(interval)
    flags = ["--data-dir", data, "--fsync-interval", interval]
    server = start_tokenring(shards=1, more=flags)
    known, deleted, made = {}, set(), 0
    for shards in [3, 2, 4, 1, 3]:
        for _ in range(25):
            name, made = f"s{made}", made + 1
            if known and rng.random() < 0.6:
                source = rng.choice(sorted(known))
                assert ask("PUT", url_of(server, name), headers=fork_of(source)).status_code == 201
                known[name] = known[source]
            else:
                assert ask("PUT", url_of(server, name), headers=TEXT).status_code == 201
                known[name] = ""
            for name in rng.sample(sorted(known), min(3, len(known))):
                text = f"{rng.random()};"
                assert ask("POST", url_of(server, name), headers=TEXT, content=text).status_code == 204
                known[name] += text
        for name in rng.sample(sorted(known), 5):
            assert ask("DELETE", url_of(server, name)).status_code == 204
            del known[name]
            deleted.add(name)
        server.signal(signal.SIGKILL)
        server.child.wait(10)
        verified = streams_of(data, "verify")
        assert verified.returncode == EXIT_OK, verified.stdout
        for name in rng.sample(sorted(known), 3):
            assert streams_of(data, "export", path_of(name)).stdout == known[name]
        server = start_tokenring(shards=shards, more=flags)
        folders = sorted(folder.name for folder in data.iterdir() if folder.name.startswith("durable-"))
        assert folders == [f"durable-{shard}" for shard in range(1, shards)]
        for name, text in known.items():
            assert ask("GET", url_of(server, name)).text == text, name
        for name in deleted:
            # Kept for its forks, or gone.
            assert ask("GET", url_of(server, name)).status_code in (404, 410)
        where = placed(server)
        assert where.keys() >= known.keys() and where.keys() - known.keys() <= deleted
    # Whose path is free may be made anew at home, wherever its fork was.
    free = [name for name in sorted(deleted) if ask("GET", url_of(server, name)).status_code == 404]
    for name in free:
        assert ask("PUT", url_of(server, name), headers=TEXT, content="anew").status_code == 201
    server.drain()
    assert server.wait(10) == EXIT_OK
    server = start_tokenring(shards=2, more=flags)
    assert free and all(ask("GET", url_of(server, name)).text == "anew" for name in free)


def test_a_fork_outlives_its_maker_and_a_drain_answers_all(start_tokenring):
    """Clients that leave while their forks are made, and a drain in the middle: whoever is answered is told what is so."""
    server = start_tokenring(shards=3)
    ask("PUT", url_of(server, "source"), headers=TEXT, content="of the source")
    told, over = [], threading.Event()

    def make(worker):
        number = 0
        while not over.is_set():
            number += 1
            name = f"f{worker}-{number}"
            try:
                with httpx.Client(timeout=0.5 if worker else 20) as client:
                    status = client.put(url_of(server, name), headers=fork_of("source")).status_code
                    told.append(status)
                    if status == 503:
                        return
            except httpx.HTTPError:
                if over.is_set():
                    return

    threads = [threading.Thread(target=make, args=[worker]) for worker in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: told.count(201) > 300, 60, "forks")
    server.drain()
    over.set()
    for thread in threads:
        thread.join(20)
    assert server.wait(15) == EXIT_OK
    assert set(told) <= {201, 503}
