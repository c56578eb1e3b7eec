"""What there is to take, against the machine's own word and a synthetic container's."""

import os
from unittest.mock import Mock

import torch

from pharmacist.nn import memory
from pharmacist.nn.memory import PeakMemory, available_memory


def test_what_can_be_taken_is_less_than_there_is(monkeypatch):
    monkeypatch.setattr(memory, "_LIMITS", ())
    assert 0 < available_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_container_sets_the_limit(tmp_path, monkeypatch):
    free = available_memory()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_LIMITS", (str(limit), str(tmp_path / "no such file")))
    limit.write_text("max\n")
    assert available_memory() > free / 2
    limit.write_text(f"{2**30 * 2}\n")
    assert 0 < available_memory() < 2**31, "what the process has already is taken off"
    limit.write_text("1000\n")
    assert available_memory() == 0


def test_the_peak_is_of_the_work_alone():
    block = bytearray(200_000_000)
    del block
    peak = PeakMemory(torch.device("cpu"))
    before = peak.megabytes()
    block = bytearray(100_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert 90 < peak.megabytes() - before < 150


def test_the_peak_is_in_bytes_on_macos_and_in_kilobytes_elsewhere(monkeypatch):
    peak = PeakMemory(torch.device("cpu"))
    from_proc = peak.megabytes()
    monkeypatch.setattr("pathlib.Path.read_text", Mock(side_effect=FileNotFoundError))
    assert 0.9 * from_proc < peak.megabytes()
    elsewhere = peak.megabytes()
    monkeypatch.setattr("sys.platform", "darwin")
    assert elsewhere / 1100 < peak.megabytes() < elsewhere / 900
