"""Downloads from a server on the loopback address: whole and checked, or nothing."""

import gzip
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import NAMES, PUBLISHED, assert_is_tiny, contents, fill, tiny

from truestep import TruestepError
from truestep.lab.datasets import get, load_images
from truestep.lab.download import has_checksum


@pytest.mark.parametrize("checksum", ["sha256", "md5", "git"])
def test_downloads_once(server, cache, monkeypatch, checksum):
    server.publish(PUBLISHED)
    tiny(monkeypatch, server.address, checksum=checksum)
    assert_is_tiny(load_images("tiny"))
    assert contents(cache) == sorted(NAMES)
    assert_is_tiny(load_images("tiny"))
    assert sorted(server.asked) == sorted(NAMES)


def test_get_downloads_into_a_given_folder(server, cache, tmp_path, monkeypatch):
    server.publish(PUBLISHED)
    tiny(monkeypatch, server.address)
    (tmp_path / "data").mkdir()
    assert get("tiny", tmp_path / "data", progress=False) == tmp_path / "data" / "tiny"
    assert contents(tmp_path / "data") == sorted(NAMES)
    assert not cache.exists()
    assert_is_tiny(load_images("tiny", tmp_path / "data"))


def test_get_finds_a_local_copy(server, cache, tmp_path, monkeypatch):
    tiny(monkeypatch, server.address)
    folder = fill(tmp_path / "data" / "tiny")
    monkeypatch.setenv("TRUESTEP_DATA", str(tmp_path / "data"))
    assert get("tiny", progress=False) == folder
    assert server.asked == []


def test_progress_names_each_file(server, cache, monkeypatch, capsys):
    server.publish(PUBLISHED)
    tiny(monkeypatch, server.address)
    get("tiny", progress=True)
    shown = capsys.readouterr()
    assert all(name in shown.err for name in NAMES)
    assert not shown.out


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, b"something else", 14), "wrong checksum"),
        ((200, PUBLISHED[NAMES[2]][:-9], len(PUBLISHED[NAMES[2]]) - 9), "wrong checksum"),
        ((200, PUBLISHED[NAMES[2]][:100], len(PUBLISHED[NAMES[2]])), "the transfer broke off"),
        ((404, b"", 0), "HTTP 404"),
        ((500, b"", 0), "HTTP 500"),
    ],
    ids=["other file", "short file", "broken transfer", "not found", "server error"],
)
def test_a_bad_download_leaves_nothing_behind(server, cache, monkeypatch, answer, reason):
    server.publish(PUBLISHED)
    server.answers[f"/{NAMES[2]}"] = answer
    tiny(monkeypatch, server.address)
    with pytest.raises(TruestepError) as error:
        load_images("tiny")
    message = str(error.value)
    assert f"{NAMES[2]} could not be downloaded" in message
    assert reason in message
    assert str(cache / "tiny") in message
    assert all(name in message for name in NAMES)
    assert contents(cache) == sorted(NAMES[:2])
    # and the next attempt goes on with the missing files only
    server.publish(PUBLISHED)
    del server.asked[:]
    assert_is_tiny(load_images("tiny"))
    assert server.asked == list(NAMES[2:])


def test_without_a_network(cache, monkeypatch, server):
    free = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    address = f"http://127.0.0.1:{free.server_port}/"
    free.server_close()
    tiny(monkeypatch, address)
    with pytest.raises(TruestepError) as error:
        load_images("tiny")
    message = str(error.value)
    assert "no connection" in message
    assert f"put these files by hand into {cache / 'tiny'}: {', '.join(NAMES)}" in message
    assert contents(cache) == []
    # following the message is enough
    fill(cache / "tiny")
    assert_is_tiny(load_images("tiny"))


def test_the_error_names_the_users_own_data_folder(server, cache, tmp_path, monkeypatch):
    tiny(monkeypatch, server.address)
    (tmp_path / "data").mkdir()
    with pytest.raises(TruestepError, match="by hand into") as error:
        load_images("tiny", tmp_path / "data")
    assert f"by hand into {tmp_path / 'data' / 'tiny'}" in str(error.value)


def test_the_second_address_is_tried(server, cache, monkeypatch):
    server.publish({f"mirror/{name}": data for name, data in PUBLISHED.items()})
    tiny(monkeypatch, server.address, f"{server.address}mirror/")
    assert_is_tiny(load_images("tiny"))
    assert server.asked == [path for name in NAMES for path in (name, f"mirror/{name}")]


@pytest.mark.parametrize("checksum", ["sha256", "git"])
def test_a_damaged_file_in_the_cache_is_fetched_again(server, cache, monkeypatch, checksum):
    server.publish(PUBLISHED)
    dataset = tiny(monkeypatch, server.address, checksum=checksum)
    damaged = fill(cache / "tiny") / NAMES[0]
    damaged.write_bytes(PUBLISHED[NAMES[0]][:50])
    with pytest.raises(TruestepError, match=r"; run `truestep data get tiny`\.$"):
        load_images("tiny")
    assert get("tiny", progress=False) == cache / "tiny"
    assert server.asked == [NAMES[0]]
    assert has_checksum(damaged, dataset.files[0].checksum)


def test_what_is_there_stays_until_the_right_file_has_arrived(server, cache, monkeypatch):
    tiny(monkeypatch, server.address)
    by_hand = {name: gzip.compress(gzip.decompress(PUBLISHED[name]), 1) for name in NAMES}
    fill(cache / "tiny", by_hand)
    with pytest.raises(TruestepError, match="HTTP 404"):
        get("tiny", progress=False)
    assert_is_tiny(load_images("tiny"))
    assert contents(cache) == sorted(NAMES)


def test_a_cache_that_cannot_be_written(server, cache, monkeypatch):
    server.publish(PUBLISHED)
    tiny(monkeypatch, server.address)
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(TruestepError, match="cannot be written") as error:
        load_images("tiny")
    assert str(cache / "tiny") in str(error.value)
    assert "--data-dir" in str(error.value)


def test_git_blob_identifiers(tmp_path):
    # git hash-object of these contents
    (tmp_path / "hello").write_bytes(b"hello\n")
    (tmp_path / "empty").write_bytes(b"")
    assert has_checksum(tmp_path / "hello", "git:ce013625030ba8dba906f756967f9e9ca394464a")
    assert has_checksum(tmp_path / "empty", "git:e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
    assert not has_checksum(tmp_path / "empty", "git:ce013625030ba8dba906f756967f9e9ca394464a")


def test_get_completes_a_folder(server, cache, tmp_path, monkeypatch):
    server.publish(PUBLISHED)
    tiny(monkeypatch, server.address)
    fill(tmp_path / "tiny", {NAMES[0]: PUBLISHED[NAMES[0]]})
    get("tiny", tmp_path, progress=False)
    assert server.asked == list(NAMES[1:])
    assert_is_tiny(load_images("tiny", tmp_path))
