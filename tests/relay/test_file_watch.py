"""A file change is seen once it has settled, and once only."""

from __future__ import annotations

from pathlib import Path

from relay.file_watch import FileWatch


def test_a_change_counts_at_the_second_look(tmp_path: Path) -> None:
    """An editor that is still writing is left in peace."""
    path = tmp_path / "list"
    path.write_text("one")
    watch = FileWatch([str(path), ""])
    assert not watch.poll()
    path.write_text("one two")
    assert not watch.poll()
    path.write_text("one two three")
    assert not watch.poll()
    assert watch.poll()
    assert not watch.poll()


def test_a_file_may_come_and_go(tmp_path: Path) -> None:
    """Replacing by rename, and removing, are changes too."""
    path = tmp_path / "list"
    watch = FileWatch([str(path)])
    path.write_text("here")
    assert [watch.poll(), watch.poll()] == [False, True]
    path.unlink()
    assert [watch.poll(), watch.poll()] == [False, True]


def test_what_was_undone_is_no_change(tmp_path: Path) -> None:
    """A file that flickers and comes back as it was needs no reading."""
    path = tmp_path / "list"
    path.write_text("one")
    watch = FileWatch([str(path)])
    moved = path.rename(tmp_path / "moved")
    assert not watch.poll()
    moved.rename(path)
    assert [watch.poll(), watch.poll()] == [False, False]
