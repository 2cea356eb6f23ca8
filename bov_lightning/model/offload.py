"""Value tables that stay out of the device's memory: only the rows of a batch's tokens come to it.

This is how decoding reads them; how they are trained is in `bov_lightning.distributed.host_tables`.

Which rows these are is known before the first layer runs, so that a thread fetches the new ones
while earlier layers compute; on CUDA the copy runs on a stream of its own. The rows live with the
cache, in the order in which they were first needed: a row's *slot*.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

MIN_SLOTS = 256
"""Room for rows is doubled from here on."""

_threads = ThreadPoolExecutor(1, thread_name_prefix="value-rows")


def moved(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's, on ``device``; the host waits for no GPU, as it would unpinned."""
    if device.type != "cuda" or host.device.type == "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class HostTable:
    """A table outside of the device's memory."""

    n_row: int
    width: int
    nbytes: int
    collective = False
    """Whether ranks take rows together, all of them, even where one needs none."""

    def take(self, ids_N: Tensor) -> Tensor:
        """Those rows, (N, width), in the host's memory."""
        raise NotImplementedError

    def look_up(self, row_ids: Tensor, like: Tensor) -> Tensor:
        """The rows of ``row_ids`` (...), (..., width), on ``like``'s device and in its dtype."""
        return self.take(row_ids.flatten().cpu()).to(like).unflatten(0, row_ids.shape)


class MemoryTable(HostTable):
    """A table in the host's memory; pinned where a CUDA device will copy from it."""

    def __init__(self, table: Tensor, device: torch.device):
        self.pinned = device.type == "cuda"
        self.table = table.pin_memory() if self.pinned else table
        (self.n_row, self.width), self.nbytes = table.shape, table.nbytes

    def take(self, ids_N: Tensor) -> Tensor:
        """Those rows; in pinned memory if the table is."""
        rows = torch.empty(len(ids_N), self.width, dtype=self.table.dtype, pin_memory=self.pinned)
        return torch.index_select(self.table, 0, ids_N, out=rows)


class FileTable(HostTable):
    """A table inside of a file, whose rows are read when they are asked for."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, int], dtype: torch.dtype):
        """``offset`` in bytes from the start of the file."""
        self._file = os.open(path, os.O_RDONLY)
        self._offset, self._dtype = offset, dtype
        self.n_row, self.width = shape
        self._row_bytes = self.width * dtype.itemsize
        self.nbytes = self.n_row * self._row_bytes

    def take(self, ids_N: Tensor) -> Tensor:
        """Those rows, through the system's page cache."""
        rows = torch.empty(len(ids_N), self.width, dtype=self._dtype)
        buffers = rows.view(torch.uint8).numpy()
        for buffer, row in zip(buffers, ids_N.tolist(), strict=True):
            at = self._offset + row * self._row_bytes
            if os.preadv(self._file, [buffer], at) != self._row_bytes:
                raise OSError(f"the file of a value table ends before its row {row}")
        return rows

    def __del__(self):
        os.close(self._file)


class Slots:
    """Which rows a cache has needed, and the slot of each; shared by its banks."""

    def __init__(self, n_row: int, device: torch.device):
        self.slot_of_row = torch.full((n_row,), -1)
        self.device = device
        self.on_device = self.slot_of_row.to(device, copy=True)
        self.n_used = 0

    def admit(self, row_ids: Tensor) -> Tensor:
        """Gives new rows a slot each; returns them, in the order of their slots, on the CPU."""
        rows = row_ids.cpu().unique()
        new = rows[self.slot_of_row[rows] < 0]
        slots = torch.arange(self.n_used, self.n_used + len(new))
        self.slot_of_row[new] = slots
        if len(new):
            self.on_device[moved(new, self.device)] = moved(slots, self.device)
        self.n_used += len(new)
        return new

    def copy(self) -> "Slots":
        """An independent copy."""
        other = Slots(0, self.device)
        other.slot_of_row, other.on_device = self.slot_of_row.clone(), self.on_device.clone()
        other.n_used = self.n_used
        return other


class BankRows:
    """The rows of one table by slot, on the cache's device."""

    def __init__(self, table: HostTable, dtype: torch.dtype, device: torch.device):
        self.table, self.dtype, self.device = table, dtype, device
        self._rows = torch.empty(0, table.width, dtype=dtype, device=device)
        self._n_used = 0
        self._pending: Future | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def prefetch(self, ids_N: Tensor) -> None:
        """Starts to fetch rows that were just admitted."""
        self.wait()
        if len(ids_N) or self.table.collective:
            self._pending = _threads.submit(self._fetch, ids_N)

    @torch.no_grad()
    def _fetch(self, ids_N: Tensor) -> Tensor:
        """Appends rows; the host's copy must live until the device has it."""
        rows, end = self.table.take(ids_N), self._n_used + len(ids_N)
        with torch.cuda.stream(self._stream):
            if end > len(self._rows):
                room = max(MIN_SLOTS, 2 * len(self._rows), end)
                grown = torch.empty(room, self.table.width, dtype=self.dtype, device=self.device)
                grown[: self._n_used] = self._rows[: self._n_used]
                self._rows = grown
            self._rows[self._n_used : end] = rows.to(self.device, self.dtype, non_blocking=True)
        self._n_used = end
        return rows

    def wait(self) -> Tensor:
        """All rows that were asked for, (slots, width)."""
        if self._pending is not None:
            # Kept until the next call: the device may still be copying from it.
            self._sent, self._pending = self._pending.result(), None
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
                self._rows.record_stream(torch.cuda.current_stream(self.device))
        return self._rows[: self._n_used]

    def copy(self) -> "BankRows":
        """An independent copy."""
        other = BankRows(self.table, self.dtype, self.device)
        other._rows = self.wait().clone()
        other._n_used = self._n_used
        if other._stream is not None:
            # The copy's own stream reads these rows next, and may be the last that does.
            other._stream.wait_stream(torch.cuda.current_stream(self.device))
            other._rows.record_stream(other._stream)
        return other

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        self.wait()
        return self._rows.nbytes
