"""The processes that share each request: rank 0 has the engine, the others do as it says.

Either all are started by `torchrun`, or rank 0 starts the others, each in a fresh interpreter on
this host. Tensors travel through NCCL, or gloo on the CPU; calls and votes, which are a few hundred
bytes, through gloo. A follower only ever acts on a call, so that whatever ends a request on rank 0
(a cancel, a deadline, an error) ends it everywhere: the next call does not come.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from magihuman.kernels.parallel import exchange
from magihuman.runtime.device import PeerLost, is_out_of_memory
from magihuman.runtime.errors import DeviceError, InvalidRequestError

if TYPE_CHECKING:
    from magihuman.kernels.parallel.peers import Peers

log = logging.getLogger("magihuman")

Result = TypeVar("Result")
Call = tuple[str, tuple[Any, ...]]  # what to do, with which arguments

HOST = "127.0.0.1"
START_S = 120  # for a fresh interpreter to import torch, on a busy machine
MEET_S = 300  # for processes that have started to connect, and for one to wait amid an exchange
VOTE_S = 1800  # for every process to read weights, or to compile
CALL_S = 365 * 86400  # a follower waits for requests; that rank 0 has gone, its connection says
END_S = 20
LOOK_S = 0.02
CLOSE = "close"

# Run by each process that is started: its path, then its part of `Team.start`, come on stdin.
BOOT = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer);"
    " from magihuman.runtime.parallel.team import serve; serve()"
)


class PeerFailed(RuntimeError):  # noqa: N818 - as PeerLost
    """Another process could not do its part, which all have agreed on."""


class Team:
    """This process's end of the team. There is one in a process at a time.

    Attributes:
        rank: of this process; 0 leads.
        ranks: processes.
        device: of this process.
        lost: what became of the team where it is no longer whole.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int | None = None,
        ranks: int | None = None,
        store: Store | None = None,
        workers: Sequence[subprocess.Popen[bytes]] = (),
        by_stores: bool = True,
    ) -> None:
        """Wait for the other processes, and connect to them.

        rank, ranks, store: by default as torchrun's environment variables say. workers: processes
        that this one has started, which `close` ends. by_stores: exchange by stores to the other
        GPUs' memory where all can; in every process alike.
        """
        self.device = device
        self.lost: str | None = None
        self._store, self._workers, self._is_closing = store, list(workers), False
        self._changing = threading.Lock()
        is_gpu = device.type == "cuda"
        # PyTorch would end this process once another's end shows in NCCL; `_watch` sees to that.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        # NCCL would map what a captured exchange reads and writes into the other processes. They
        # would keep the memory of graphs that are given up, a buffer at an address used before
        # would be taken for the one that was there, and captured exchanges are known to hang.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_gpu else "gloo",
            rank=-1 if rank is None else rank,
            world_size=-1 if ranks is None else ranks,
            store=store,
            timeout=timedelta(seconds=MEET_S),
        )
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._calls = dist.new_group(backend="gloo", timeout=timedelta(seconds=CALL_S))
        if is_gpu:
            with torch.cuda.device(device):
                # Connects every pair of GPUs, which a capture could not wait for.
                rows = torch.zeros(self.ranks, 8, dtype=torch.float32, device=device)
                exchange.heads_to_rows(rows, self.ranks)
                torch.cuda.synchronize()
        self._peers: Peers | None = None
        if is_gpu and by_stores:
            self._connect_peers()
        for number, worker in enumerate(self._workers, 1):
            threading.Thread(target=self._watch, args=(number, worker), daemon=True).start()

    @classmethod
    def join(cls, ranks: int, device: torch.device) -> Self:
        """The team of processes that torchrun has started.

        Raises:
            InvalidRequestError: there are not as many as `ranks`, or torch.distributed is in use.
        """
        refuse_second()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what loading launches goes there, as in `serve`
        team = cls(device)
        if team.ranks != ranks:
            team.close()
            raise InvalidRequestError(
                f"context_parallel must be the number of processes, {team.ranks}, got {ranks};"
                f" start it with torchrun --nproc-per-node {ranks}"
            )
        return team

    @classmethod
    def start(
        cls,
        devices: Sequence[torch.device],
        target: str,
        payload: object,
        by_stores: bool = True,
    ) -> Self:
        """Start a team on these devices, the first of which is this process's.

        target: "module:function", called in each other process with its team and `payload`, which
        must be what pickle takes. by_stores: as of `Team`.

        Raises:
            DeviceError: a process has ended before it has come here.
            InvalidRequestError: torch.distributed is in use.
        """
        refuse_second()
        store = _listening_store()
        workers = []
        try:
            for rank, device in enumerate(devices[1:], 1):
                worker = subprocess.Popen(  # noqa: S603 - of constants
                    [sys.executable, "-c", BOOT],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # an interrupt from the terminal is rank 0's to handle
                )
                workers.append(worker)
                part = (rank, len(devices), str(device), store.port, by_stores, target, payload)
                assert worker.stdin is not None
                with suppress(BrokenPipeError):  # it has ended, which is seen below
                    worker.stdin.write(pickle.dumps(sys.path) + pickle.dumps(part))
                    worker.stdin.flush()
            _wait_for(store, workers)
            return cls(devices[0], 0, len(devices), store, workers, by_stores)
        except BaseException:
            _end(workers)
            raise

    @property
    def exchange(self) -> str:
        """How rows travel: "stores" to the memory of other GPUs, "nccl" or "gloo"."""
        if self._peers is not None:
            return "stores"
        return "nccl" if self.device.type == "cuda" else "gloo"

    def reserve(self, heads_bytes: int, rows_bytes: int) -> None:
        """Have room for exchanges of so many bytes a process; all processes call it alike.

        Raises as `agree` does, where a GPU has no room.
        """
        peers = self._peers
        if peers is None or peers.has_room(heads_bytes, rows_bytes):
            return
        made = False

        def allocate() -> None:
            nonlocal made
            peers.allocate(heads_bytes, rows_bytes)
            made = True

        try:
            self.agree(allocate)
        except Exception:
            if made:
                peers.forget()
            raise
        with self.together():
            peers.meet(self.gather)

    def call(self, name: str, *arguments: object) -> None:
        """On rank 0: have every other process do this next."""
        with self.together():
            dist.broadcast_object_list([(name, arguments)], 0, self._calls, torch.device("cpu"))

    def listen(self) -> Call:
        """On the others: wait for the next call."""
        box: list[Any] = [None]
        dist.broadcast_object_list(box, 0, self._calls, torch.device("cpu"))
        call: Call = box[0]
        return call

    def agree(self, work: Callable[[], Result]) -> Result:
        """Do work in every process, and return its result once all of them have done it.

        work: must not wait for another process.

        Raises:
            Exception: what the work raised in this process.
            PeerFailed: the work failed in another process only; of a lack of memory,
                `torch.OutOfMemoryError`.
            PeerLost: a process has ended.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        except BaseException as raised:
            self.lose(f"rank {self.rank} was stopped: {raised!r}")
            raise
        failed = torch.tensor(int(error is not None), device="cpu")
        told: list[Any] = [None] * self.ranks
        with self.together():
            vote = dist.all_reduce(failed, dist.ReduceOp.MAX, self._calls, async_op=True)
            vote.wait(timedelta(seconds=VOTE_S))
            if failed:
                failure = None if error is None else (is_out_of_memory(error), str(error))
                dist.all_gather_object(told, failure, self._calls)
        if error is not None:
            raise error
        for rank, other in enumerate(told):
            if other is not None:
                kind = torch.OutOfMemoryError if other[0] else PeerFailed
                raise kind(f"rank {rank}: {other[1]}")
        return result

    def gather(self, value: Result) -> list[Result]:
        """The value of every process, in the order of ranks; each is what pickle takes."""
        every: list[Any] = [None] * self.ranks
        with self.together():
            dist.all_gather_object(every, value, self._calls)
        return every

    def check(self) -> None:
        """Raise `PeerLost` where the team is lost: what a GPU has computed since means nothing."""
        if self.lost is not None:
            raise PeerLost(self.lost)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context for what all processes do or none: an error within leaves the team lost."""
        self.check()
        try:
            yield
        except BaseException as error:
            self._wait_for_end()
            self.lose(f"rank {self.rank} failed amid an exchange: {error}")
            raise PeerLost(self.lost) from error

    def lose(self, why: str) -> None:
        """Give the team up: end what waits for an exchange that will not come.

        why: becomes `lost`. The first reason stays.
        """
        with self._changing:
            if self.lost is not None or self._is_closing:
                return
            self.lost = why
        if self._peers is not None:
            self._peers.give_up()
        _end(self._workers)
        if self.device.type == "cuda":
            # Stops the kernels that wait for another GPU; returns once the last captured graph with
            # such kernels is given up, hence in a thread of its own.
            backend = dist.group.WORLD._get_backend(self.device)  # type: ignore[union-attr]
            threading.Thread(target=backend.abort, daemon=True).start()

    def close(self, tell: bool = True) -> None:
        """Leave the team; rank 0 has the others leave too, and waits for those it has started.

        Graphs that were captured with exchanges must be given up before. tell: unless the others
        leave by themselves.
        """
        with self._changing:
            self._is_closing = True
        if tell and self.rank == 0:
            with suppress(PeerLost):
                self.call(CLOSE)
        exchange.connect(None)
        if self._peers is not None and self.lost is None:
            self._peers.close()
        self._peers = None
        if self.lost is None or self.device.type != "cuda":  # NCCL's end is an exchange, too
            dist.destroy_process_group()
        _end(self._workers, 0 if self.lost else END_S)

    def _connect_peers(self) -> None:
        """Exchange by stores if every process can: a first, small room is met in."""
        from magihuman.kernels.parallel.peers import Peers

        def make() -> Peers:
            peers = Peers(self.rank, self.ranks, self.device)
            peers.allocate(1, 1)
            return peers

        def meet() -> None:
            if failure is not None:
                raise failure

        failure: Exception | None = None
        try:
            peers = self.agree(make)
            try:
                peers.meet(self.gather)
            except Exception as error:  # in this process perhaps alone, so all are asked
                failure = error
            self.agree(meet)
        except PeerLost:
            raise
        except Exception as error:
            log.info("GPUs exchange through NCCL, since stores are not possible: %s", error)
            return
        self._peers = peers
        exchange.connect(peers)

    def _watch(self, rank: int, worker: subprocess.Popen[bytes]) -> None:
        self.lose(f"the process of rank {rank} ended with code {worker.wait()}")

    def _wait_for_end(self) -> None:
        """An error may be the first sign of another's end: give that time to show."""
        end = time.monotonic() + 1
        while self._workers and self.lost is None and time.monotonic() < end:
            time.sleep(LOOK_S)


def refuse_second() -> None:
    """Raise `InvalidRequestError` where this process has a team, or uses torch.distributed."""
    if dist.is_initialized():
        raise InvalidRequestError(
            "context_parallel must be the only use of torch.distributed in a process, and its"
            " default group is there already; close the other engine first, or destroy the group"
        )


def _listening_store() -> TCPStore:
    """A store for the processes of this machine.

    One that opens its port itself would listen on every address, and it asks for no password.
    """
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        return TCPStore(
            HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def _wait_for(store: TCPStore, workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Return once every worker has come to the store."""
    keys = [f"here {rank}" for rank in range(1, len(workers) + 1)]
    end = time.monotonic() + START_S
    while not store.check(keys):
        codes = {rank: worker.poll() for rank, worker in enumerate(workers, 1)}
        ended = [rank for rank, code in codes.items() if code is not None]
        if ended or time.monotonic() > end:
            what = (
                f"that of rank {ended[0]} ended with code {codes[ended[0]]}, see its error output"
                if ended
                else "they did not, see their error output"
            )
            raise DeviceError(
                f"the {len(workers)} other processes must start within {START_S} s, and {what}"
            )
        time.sleep(LOOK_S)


def _end(workers: Sequence[subprocess.Popen[bytes]], patience_s: float = 0) -> None:
    """Wait for these processes to end, and then end them."""
    end = time.monotonic() + patience_s
    for worker in workers:
        try:
            worker.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
        if worker.stdin is not None:
            with suppress(BrokenPipeError):  # of what it has not read
                worker.stdin.close()
        worker.wait()


def serve() -> None:
    """Entry of a process that `Team.start` has started."""
    part = pickle.load(sys.stdin.buffer)  # noqa: S301 - ours
    rank, ranks, device, port, by_stores, target, payload = part
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    else:
        torch.cuda.set_device(device)
    store = TCPStore(HOST, port, is_master=False)
    store.set(f"here {rank}", "")
    team = Team(torch.device(device), rank, ranks, store, by_stores=by_stores)
    module, function = target.split(":")
    try:
        getattr(import_module(module), function)(team, payload)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # At once: an orderly end may wait for a GPU that waits for another, while rank 0 waits for
        # this process to end.
        os._exit(1)


def _end_with_parent() -> None:
    while os.read(0, 1):  # nothing comes until rank 0 has gone, or has closed its end
        pass
    os._exit(1)
