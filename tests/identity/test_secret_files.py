import os
import threading

import pytest

from fedseek.errors import CustodyError, TooLarge
from fedseek.identity.secret_files import LOCK_FILE, exclusive, read_file


def test_a_file_that_anybody_may_open_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "申请.json"
    path.write_bytes(b"12345")
    path.chmod(0o644)
    (tmp_path / "link").symlink_to(path)
    assert read_file(path, limit=5) == read_file(tmp_path / "link", limit=5) == b"12345"
    with pytest.raises(TooLarge, match="more than 4"):
        read_file(path, limit=4)


def test_what_is_no_plain_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(CustodyError, match="not a plain file"):
            read_file(path, limit=5)
    with pytest.raises(CustodyError, match="cannot be read"):
        read_file(tmp_path / "missing", limit=5)


def test_one_at_a_time_changes_a_folder(tmp_path):
    order = []

    def second():
        with exclusive(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    with exclusive(tmp_path):
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_the_lock_is_let_go_of_after_an_error(tmp_path):
    with pytest.raises(KeyError), exclusive(tmp_path):
        raise KeyError
    with exclusive(tmp_path):
        assert (tmp_path / LOCK_FILE).stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_not_there_cannot_be_locked(tmp_path):
    with pytest.raises(CustodyError, match="cannot be opened"), exclusive(tmp_path / "missing"):
        pass
