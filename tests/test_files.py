import pytest

from truestep.files import replacing, write_whole


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    write_whole(path, b"old")
    with replacing(path) as part:
        part.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert part.parent == tmp_path
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_is_not_finished_leaves_nothing(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as part:
            part.write_text("half of it")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path):
    place, link = tmp_path / "elsewhere" / "file.txt", tmp_path / "file.txt"
    place.parent.mkdir()
    link.symlink_to(place)
    write_whole(link, b"content")
    assert link.is_symlink()
    assert place.read_bytes() == b"content"
