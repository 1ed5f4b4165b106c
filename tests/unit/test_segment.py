"""Segments: memory without a name, reserved before it is written, mapped until the last view is gone."""

import contextlib
import gc
import os
import threading

import numpy as np
import pytest

from shmdist.memory import limits, private_mappings
from shmdist.memory import segment as module
from shmdist.memory.mapping import PAGE
from shmdist.memory.segment import Segment
from tests.integration.helpers import until

MIB = 1 << 20


def run(job):
    """Run a job on another thread, and let it begin at once."""
    threading.Thread(target=job).start()


def never(job):
    """Stands for a helper that comes too late."""


def memory_files():
    """Return the unnamed files that are open; a cluster of other tests may close some meanwhile."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "shmdist" in os.readlink(f"/proc/self/fd/{fd}"):
                found.add((fd, os.stat(f"/proc/self/fd/{fd}").st_ino))
    return found


@pytest.fixture
def segment():
    return Segment.make(1, 1, 8 * MIB)


def other_side(segment):
    """Return the segment as another process would see it."""
    return Segment(segment.owner, segment.number, segment.size, os.dup(segment.fd))


class TestMemory:
    def test_has_no_name(self, segment):
        until(lambda: not [name for name in os.listdir("/dev/shm") if "shmdist" in name])
        assert os.fstat(segment.fd).st_nlink == 0

    def test_is_reserved(self, segment):
        assert os.fstat(segment.fd).st_blocks * 512 >= segment.size

    def test_what_one_writes_the_other_sees(self, segment):
        other = other_side(segment)
        segment.view[5:8] = b"abc"
        assert bytes(other.view[4:9]) == b"\0abc\0"

    def test_more_than_there_is_costs_an_error_and_nothing_else(self):
        before = memory_files()
        with pytest.raises(OSError, match="are asked for, and"):
            Segment.make(1, 1, 1 << 50)
        assert memory_files() <= before

    def test_given_back_and_reserved_again_it_is_zero(self, segment):
        segment.view[:4] = b"full"
        segment.give_back(0, segment.size)
        assert os.fstat(segment.fd).st_blocks == 0
        segment.reserve(0, PAGE)
        segment.touch(0, PAGE)
        assert bytes(segment.view[:4]) == bytes(4)

    def test_a_view_outlives_the_segment(self):
        segment = Segment.make(1, 1, MIB)
        view, array = segment.view[:3], segment.array[:3]
        view[:] = b"abc"
        inode = os.fstat(segment.fd).st_ino

        def descriptors():
            return sum(each == inode for _, each in memory_files())

        assert descriptors() == 2
        del segment
        gc.collect()
        assert bytes(view) == b"abc" and array.tobytes() == b"abc"
        assert descriptors() == 1  # the mapping keeps one
        del view, array
        gc.collect()
        assert descriptors() == 0

    def test_without_memfd(self, monkeypatch):
        monkeypatch.delattr(os, "memfd_create")
        before = set(os.listdir("/dev/shm"))
        segment = Segment.make(1, 1, MIB)
        segment.view[:3] = b"abc"
        assert bytes(other_side(segment).view[:3]) == b"abc"
        until(lambda: set(os.listdir("/dev/shm")) <= before)  # other tests may be making one


class TestWriting:
    @pytest.mark.parametrize("size", [0, 1, 1 << 16, MIB + 1])
    def test_sizes(self, segment, size):
        source = np.random.default_rng(0).integers(0, 256, size, "u1")
        segment.write(3, memoryview(source), never)
        assert segment.view[3 : 3 + size] == source.tobytes()
        assert segment.view[3 + size] == 0

    @pytest.mark.parametrize("start", [run, never])
    @pytest.mark.parametrize("size", [0, 1, 64, 1000, 1001])
    def test_together(self, monkeypatch, start, size):
        monkeypatch.setattr(module, "_COPY_BYTES", 10)
        source = np.random.default_rng(0).integers(0, 256, size, "u1")
        for _ in range(20):
            target = np.zeros(size, "u1")
            module._copy_together(target, source, start)
            assert (target == source).all()

    def test_a_late_helper_writes_nothing(self, monkeypatch):
        monkeypatch.setattr(module, "_COPY_BYTES", 10)
        jobs = []
        target = np.zeros(100, "u1")
        module._copy_together(target, np.ones(100, "u1"), jobs.append)
        target[:] = 7  # somebody else's by now
        jobs[0]()
        assert (target == 7).all()


class TestPrivateView:
    def as_array(self, view, offset=0, nbytes=None):
        import ctypes

        nbytes = view.size if nbytes is None else nbytes
        return np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(view.address + offset))

    def test_what_is_written_stays_its_own(self, segment):
        segment.view[PAGE : PAGE + 3] = b"abc"
        view, second = segment.private(PAGE + 1, 10), segment.private(PAGE + 1, 10)
        array = self.as_array(view)
        assert array[:3].tobytes() == b"abc"
        array[0] = 0
        assert bytes(segment.view[PAGE : PAGE + 1]) == b"a"
        assert self.as_array(second)[0] == ord("a")

    def test_a_used_one_shows_the_segment_again(self, segment):
        size = 4 * MIB
        view = segment.private(0, size)
        address = view.address
        array = self.as_array(view)
        for page in (0, 3, 4, 5, 1023):
            array[page * PAGE] = 1
        segment.spares.rest(view)
        segment.view[0], segment.view[7 * PAGE] = 9, 8
        view = segment.private(0, size)
        assert view.address == address, "large ones are kept"
        expected = np.zeros(size, "u1")
        expected[0], expected[7 * PAGE] = 9, 8
        assert (self.as_array(view) == expected).all()

    def test_the_written_parts_are_found(self, segment):
        view = segment.private(0, 2 * MIB)
        array = self.as_array(view)
        array.sum()
        assert private_mappings._written(view.address, view.size) == []
        for page in (1, 2, 3, 7, 511):
            array[page * PAGE] = 1
        runs = [
            (start // PAGE, size // PAGE)
            for start, size in private_mappings._written(view.address, view.size)
        ]
        assert runs == [(1, 3), (7, 1), (511, 1)]

    def test_without_a_page_map_all_is_forgotten(self, segment, monkeypatch):
        def refuse(address, size):
            raise OSError("no page map")

        view = segment.private(0, MIB)
        self.as_array(view)[5] = 1
        monkeypatch.setattr(private_mappings, "_written", refuse)
        view.clean()
        assert not self.as_array(view).any()

    def test_costs_no_descriptor(self, segment):
        before = memory_files()
        views = [segment.private(i * PAGE, PAGE) for i in range(100)]
        assert memory_files() <= before
        del views

    def test_what_cannot_be_mapped_is_an_error(self, segment):
        with pytest.raises(OSError):
            segment.private(0, 1 << 60)

    def test_as_many_are_made_ready_as_were_short(self, segment, monkeypatch):
        cleaned, clean = [], private_mappings.PrivateView.clean
        monkeypatch.setattr(
            private_mappings.PrivateView, "clean", lambda view: (cleaned.append(view), clean(view))
        )
        for size, kept in ((MIB, True), (PAGE, False)):
            first = segment.private(0, size)
            segment.spares.rest(first)
            assert len(segment.spares) == kept
            segment.private(0, size)
            assert cleaned == [first] * kept, "there was no quiet moment"
            cleaned.clear()
            del first
        segment.tidy_spares()
        assert len(segment.spares) == 1, "one was short"
        views = [segment.private(0, MIB), segment.private(0, MIB)]
        assert cleaned == []
        self.as_array(views[0])[0] = 1
        for view in views * 8:
            segment.spares.rest(view)
        assert len(segment.spares) == 8
        segment.spares.drop()
        assert len(segment.spares) == 0
        segment.spares.rest(views[0])
        segment.tidy_spares()
        assert cleaned == [views[0]]
        assert self.as_array(segment.private(0, MIB))[0] == 0

    def test_a_segment_goes_without_the_collector(self):
        import gc
        import weakref

        gc.disable()
        try:
            segment = Segment.make(1, 1, MIB)
            segment.spares.rest(segment.private(0, MIB))
            segment.tidy_spares()
            gone = weakref.ref(segment)
            del segment
            assert gone() is None
        finally:
            gc.enable()

    def test_no_room_for_another_is_no_harm(self, segment, monkeypatch):
        segment.spares.rest(segment.private(0, MIB))
        view = segment.private(0, MIB)

        def refuse(start, size):
            raise OSError("no room")

        segment._map_privately = refuse
        segment.tidy_spares()
        assert len(segment.spares) == 0
        segment.spares.rest(view)
        assert segment.private(0, MIB) is view

    def test_spares_are_dropped(self, segment):
        def mappings():
            with open("/proc/self/maps") as file:
                return sum("memfd:shmdist " in line and "w-p" in line for line in file)

        before = mappings()
        view = segment.private(0, MIB)
        segment.spares.rest(view)
        del view
        assert mappings() == before + 1
        segment.spares.drop()
        assert mappings() == before


class TestAvailableMemory:
    def test_is_what_the_system_says_at_most(self):
        assert 0 < limits.available_memory() <= limits.total_memory()

    @pytest.mark.parametrize("version", [1, 2])
    def test_a_groups_limit_counts(self, tmp_path, monkeypatch, version):
        root = tmp_path / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
        inner = root / "outer" / "inner"
        inner.mkdir(parents=True)
        names = {
            2: ("memory.max", "memory.current", "inactive_file 30\n"),
            1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file 30\n"),
        }
        limit, used, stat = names[version]
        for folder, text in ((root / "outer", "1000"), (inner, "max" if version == 2 else str(1 << 62))):
            (folder / limit).write_text(text + "\n")
            (folder / used).write_text("130\n")
            (folder / "memory.stat").write_text("anon 1\n" + stat)
        (tmp_path / "proc/self").mkdir(parents=True)
        controllers = "" if version == 2 else "cpu,memory"
        (tmp_path / "proc/self/cgroup").write_text(f"0:{controllers}:/outer/inner\n")
        real = open

        def opened(path, *args, **kwargs):
            moved = tmp_path / str(path).lstrip("/")
            return real(moved if moved.exists() or "cgroup" in str(path) else path, *args, **kwargs)

        monkeypatch.setattr("builtins.open", opened)
        assert limits.available_memory() == 900
        assert limits.total_memory() == 1000
