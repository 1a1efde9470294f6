"""KV events with libzmq and msgspec, as vLLM and its readers use them: our publisher is read, our router is fed."""

import json
import socket
import struct
import threading
import time
import urllib.request
from typing import Any

import msgspec
import pytest
import zmq

PATIENCE_SECONDS = 120
PROMPT = list(range(300, 364))
BLOCK = 16


def structs(array_like: bool):
    """The types of vllm/distributed/kv_events.py: newer versions write maps, older ones arrays."""

    class Event(msgspec.Struct, omit_defaults=True, gc=False, tag=True, array_like=array_like):
        pass

    class BlockStored(Event):
        block_hashes: list[bytes | int]
        parent_block_hash: bytes | int | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None
        lora_name: str | None = None
        extra_keys: list[tuple[Any, ...] | None] | None = None
        group_idx: int | None = None

    class BlockRemoved(Event):
        block_hashes: list[bytes | int]
        medium: str | None
        group_idx: int | None = None

    class AllBlocksCleared(Event):
        pass

    class Batch(msgspec.Struct, omit_defaults=True, gc=False, array_like=array_like):
        ts: float
        events: list[BlockStored | BlockRemoved | AllBlocksCleared]
        data_parallel_rank: int | None = None

    return Batch, BlockStored, BlockRemoved, AllBlocksCleared


ENCODINGS = {"map": structs(False), "array": structs(True)}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


def post(base: str, path: str, body, headers={}):
    data = json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, {"content-type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
        return answer.headers, json.load(answer)


def complete(base: str, prompt: list[int]) -> str:
    """Sends a completion; gives what a router says of its choice."""
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    return post(base, "/v1/completions", body, {"x-servelab-decision": "1"})[0].get("x-servelab-decision")


def replicas(router) -> list:
    with urllib.request.urlopen(f"{router.base}/replicas", timeout=PATIENCE_SECONDS) as answer:
        return json.load(answer)["replicas"]


def until(what: str, holds):
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, f"never {what}"
        time.sleep(0.02)


@pytest.fixture
def context():
    with zmq.Context() as context:
        context.linger = 0
        yield context


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_our_publisher_is_read(start, context, encoding):
    Batch, BlockStored, _, AllBlocksCleared = ENCODINGS[encoding]
    decode = msgspec.msgpack.Decoder(Batch).decode
    publish, replay = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
    flags = ("--kv-events-zmq", publish, "--kv-events-replay", replay, "--kv-events-encoding", encoding)
    with start(*flags) as server:
        complete(server.base, PROMPT)
        dealer = context.socket(zmq.DEALER)
        dealer.connect(replay)
        dealer.send_multipart([b"", struct.pack(">Q", 0)])
        replayed = []
        while True:
            assert dealer.poll(PATIENCE_SECONDS * 1000)
            _, seq, payload = dealer.recv_multipart()
            if not payload:
                assert seq == (-1).to_bytes(8, "big", signed=True)
                break
            replayed.append((int.from_bytes(seq, "big"), decode(payload)))
        assert [seq for seq, _ in replayed] == list(range(len(replayed)))
        stored = [event for _, batch in replayed for event in batch.events if isinstance(event, BlockStored)]
        assert stored[0].token_ids == PROMPT and stored[0].block_size == BLOCK
        assert stored[0].parent_block_hash is None and stored[0].medium == "GPU"
        assert len(set(stored[0].block_hashes)) == len(PROMPT) // BLOCK
        assert all(isinstance(name, bytes) for name in stored[0].block_hashes)

        subscriber = context.socket(zmq.SUB)
        subscriber.subscribe(b"kv@")
        subscriber.connect(publish)

        def cleared():
            """A subscription takes its time to arrive, so that some rounds may pass unheard."""
            complete(server.base, PROMPT)
            post(server.base, "/reset_prefix_cache", {})
            while subscriber.poll(100):
                topic, seq, payload = subscriber.recv_multipart()
                assert topic.decode() == f"kv@{server.base.removeprefix('http://')}@demo"
                assert len(seq) == 8
                if any(isinstance(event, AllBlocksCleared) for event in decode(payload).events):
                    return True
            return False

        until("cleared", cleared)


class Publisher:
    """What vLLM's publisher does: PUB, and ROUTER for a replay."""

    def __init__(self, context, ports, encoding):
        self.types = ENCODINGS[encoding]
        self.kept, self.next = [], 0
        self._pub, self._router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        self._pub.bind(f"tcp://127.0.0.1:{ports[0]}")
        self._router.bind(f"tcp://127.0.0.1:{ports[1]}")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._replay)
        self._thread.start()

    def send(self, *events, heard=True, kept=True):
        batch = self.types[0](ts=time.time(), events=list(events), data_parallel_rank=0)
        seq, payload = self.next.to_bytes(8, "big"), msgspec.msgpack.encode(batch)
        if kept:
            self.kept.append((self.next, payload))
        self.next += 1
        if heard:
            self.last = (b"", seq, payload)
            self.repeat()

    def repeat(self):
        """Sends the last batch again, since a subscription takes its time to arrive."""
        self._pub.send_multipart(self.last)

    def stored(self, tokens, names, parent=None):
        return self.types[1](names, parent, tokens, BLOCK, None, "GPU")

    def _replay(self):
        while not self._stop.is_set():
            if self._router.poll(50):
                reader, empty, begin = self._router.recv_multipart()
                for seq, payload in list(self.kept):
                    if seq >= int.from_bytes(begin, "big"):
                        self._router.send_multipart((reader, empty, seq.to_bytes(8, "big"), payload))
                self._router.send_multipart((reader, empty, (-1).to_bytes(8, "big", signed=True), b""))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._pub.close()
        self._router.close()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_our_router_is_fed(start, context, encoding):
    ports = free_ports(2)
    flags = ("--kv-events", "zmq", "--kv-events-zmq-port", str(ports[0]), "--kv-events-replay-port", str(ports[1]))
    with start() as replica, Publisher(context, ports, encoding) as publisher:
        _, _, BlockRemoved, AllBlocksCleared = publisher.types
        # Hashes are whatever the replica likes: here a number and bytes.
        publisher.send(publisher.stored(PROMPT[:16], [7]))
        publisher.send(publisher.stored(PROMPT[16:48], [b"\x01" * 32, 2**64 - 1], 7))
        with start("--replica", replica.base, *flags, command="route") as router:
            state = lambda: replicas(router)[0]

            def heard(batches):
                def holds():
                    publisher.repeat()
                    return state()["kv_batches"] == batches

                until(f"{batches} batches heard", holds)

            until("precise", lambda: state()["kv_events"] == "precise")
            assert "matched=48/64" in complete(router.base, PROMPT)

            # One batch is not heard, and replayed.
            other = [token + 1000 for token in range(64)]
            publisher.send(publisher.stored(other[:32], [20, 21]), heard=False)
            publisher.send(publisher.stored(other[32:48], [22], 21))
            heard(2)
            assert state()["kv_gaps"] == 1
            publisher.send(BlockRemoved([22], "GPU"))
            heard(3)
            assert "matched=32/64" in complete(router.base, other)

            # One is lost for good: nothing of before is believed any more.
            publisher.send(AllBlocksCleared(), heard=False, kept=False)
            publisher.send(publisher.stored(other[:16], [30]))
            heard(4)
            assert state()["kv_resyncs"] == 1
            assert (state()["kv_events"], state()["kv_gaps"]) == ("partial", 2)
            assert "matched=16/64" in complete(router.base, other)
