"""What a lock does where another process, or the file system, is in its way; two runs in one folder are `test_evaluate.py`'s."""

import errno
import fcntl

import dataset.lock
from dataset.lock import hold


def test_a_lock_that_its_last_owner_has_just_removed_is_taken_anew(tmp_path, monkeypatch):
    """Else a third process could make the file again, and hold it, too."""
    take, taken = dataset.lock._lock, []

    def take_late(path):
        taken.append(take(path))
        if len(taken) == 1:
            path.unlink()
        return taken[-1]

    monkeypatch.setattr(dataset.lock, "_lock", take_late)
    with hold(tmp_path / "lock"):
        assert len(taken) == 2 and (tmp_path / "lock").read_text().startswith("process ")
    assert not (tmp_path / "lock").exists()


def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()
