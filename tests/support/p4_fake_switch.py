"""A P4Runtime server that keeps what it is given, strictly, and whose hosts answer ARP. For tests of the control plane."""

import queue
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
from google.rpc import code_pb2, status_pb2
from p4.v1 import p4runtime_pb2 as proto
from p4.v1 import p4runtime_pb2_grpc as service

from trainkit.p4._frames import _ARP, _REPLY, _REQUEST


class FakeSwitch(service.P4RuntimeServicer):  # type: ignore[misc]
    """Runs on a free port from construction to `close`.

    Attributes:
        hosts: (port, IPv4 address) -> MAC of who is plugged in.
        refuse_after: updates after which every one is refused; None never.
        forgets: swallow this many of the coming inserts.
        versions: state of slot versions that READ shows, by index.
        sent: (port, frame) of every packet that left.
    """

    def __init__(self) -> None:
        self.config: Any = None
        self.tables: dict[tuple[int, bytes], Any] = {}
        self.groups: dict[int, Any] = {}
        self.pushes = 0
        self.writes: list[Any] = []
        self.hosts: dict[tuple[int, int], int] = {}
        self.refuse_after: int | None = None
        self.forgets = 0
        self.versions: dict[int, dict[str, int]] = {}
        self.sent: list[tuple[int, bytes]] = []
        self._streams: dict[int, queue.SimpleQueue[Any]] = {}
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        service.add_P4RuntimeServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        for stream in self._streams.values():
            stream.put(None)
        self._server.stop(0).wait(5)

    def inject(self, port: int, frame: bytes, **fields: int) -> None:
        """A packet for the control plane."""
        (header,) = [h for h in self.config.p4info.controller_packet_metadata if h.preamble.name == "packet_in"]
        packet = proto.PacketIn(payload=frame)
        for field in header.metadata:
            value = {"port": port, **fields}.get(field.name, 0)
            packet.metadata.add(metadata_id=field.id, value=value.to_bytes(4, "big").lstrip(b"\0") or b"\0")
        for stream in self._streams.values():
            stream.put(proto.StreamMessageResponse(packet=packet))

    def StreamChannel(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        import threading

        outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def listen() -> None:
            try:
                for request in requests:
                    if request.HasField("arbitration"):
                        self._arbitrate(request.arbitration, outgoing)
                    elif request.HasField("packet"):
                        self._packet_out(request.packet)
            except grpc.RpcError:
                pass
            outgoing.put(None)

        def gone() -> None:  # however the client went: its election id is free again
            self._streams = {election: stream for election, stream in self._streams.items() if stream is not outgoing}
            outgoing.put(None)

        if not context.add_callback(gone):
            return
        threading.Thread(target=listen, daemon=True).start()
        while (answer := outgoing.get()) is not None:
            if isinstance(answer, str):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, answer)
            yield answer

    def _arbitrate(self, asked: Any, outgoing: Any) -> None:
        election = asked.election_id.low
        if election in self._streams:
            outgoing.put("Election id already exists")
            return
        self._streams[election] = outgoing
        first = max(self._streams)
        for other, stream in self._streams.items():
            answer = proto.StreamMessageResponse()
            answer.arbitration.CopyFrom(asked)
            answer.arbitration.status.code = code_pb2.OK if other == first else code_pb2.ALREADY_EXISTS
            if other == election or first == election:
                stream.put(answer)

    def _primary(self, request: Any, context: Any) -> None:
        if not self._streams or request.election_id.low != max(self._streams):
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "Not primary")

    def SetForwardingPipelineConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._primary(request, context)
        self.config, self.tables, self.pushes = request.config, {}, self.pushes + 1  # groups stay, as on bmv2
        return proto.SetForwardingPipelineConfigResponse()

    def GetForwardingPipelineConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self.config is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "No forwarding pipeline config set for this device")
        answer = proto.GetForwardingPipelineConfigResponse()
        answer.config.p4info.CopyFrom(self.config.p4info)
        answer.config.cookie.CopyFrom(self.config.cookie)
        return answer

    def Write(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._primary(request, context)
        failed = [self._update(update) for update in request.updates]
        if any(failed):
            status = status_pb2.Status(code=code_pb2.UNKNOWN, message="Write failure")
            for code in failed:
                status.details.add().Pack(proto.Error(canonical_code=code, message="refused" if code else ""))
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(grpc.StatusCode.UNKNOWN, "Write failure")
        return proto.WriteResponse()

    def _update(self, update: Any) -> int:
        if self.refuse_after is not None:
            self.refuse_after -= 1
            if self.refuse_after < 0:
                self.refuse_after = None
                return code_pb2.RESOURCE_EXHAUSTED
        self.writes.append(update)
        held: dict[Any, Any]
        if update.entity.HasField("table_entry"):
            entry = update.entity.table_entry
            held, place = self.tables, (entry.table_id, b"".join(m.SerializeToString() for m in entry.match))
        else:
            entry = update.entity.packet_replication_engine_entry.multicast_group_entry
            held, place = self.groups, entry.multicast_group_id
        if (update.type == update.INSERT) == (place in held):
            return code_pb2.ALREADY_EXISTS if place in held else code_pb2.NOT_FOUND
        if update.type == update.DELETE:
            del held[place]
        elif self.forgets and update.type == update.INSERT:
            self.forgets -= 1
        else:
            held[place] = entry
        return code_pb2.OK

    def Read(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        answer = proto.ReadResponse()
        for entity in request.entities:
            kind = entity.WhichOneof("entity")
            if kind == "table_entry":
                for (table, _), entry in self.tables.items():
                    if table == entity.table_entry.table_id:
                        answer.entities.add().table_entry.CopyFrom(entry)
            elif kind == "packet_replication_engine_entry":
                for group in self.groups.values():
                    pre = answer.entities.add().packet_replication_engine_entry
                    pre.multicast_group_entry.CopyFrom(group)
            elif kind == "counter_entry":
                for index in range(7):
                    cell = answer.entities.add().counter_entry
                    cell.counter_id, cell.index.index = entity.counter_entry.counter_id, index
                    cell.data.packet_count = index
        yield answer

    def _packet_out(self, packet: Any) -> None:
        (header,) = [h for h in self.config.p4info.controller_packet_metadata if h.preamble.name == "packet_out"]
        names = {field.id: field.name for field in header.metadata}
        fields = {names[m.metadata_id]: int.from_bytes(m.value, "big") for m in packet.metadata}
        if fields["operation"]:
            state = self.versions.get(fields["index"], {})
            if fields["operation"] == 2:
                self.versions.pop(fields["index"], None)
            self.inject(0, b"", operation=fields["operation"], index=fields["index"], **state)
            return
        frame = packet.payload
        self.sent.append((fields["port"], frame))
        if frame[12:14] == _ARP.to_bytes(2, "big") and frame[20:22] == _REQUEST.to_bytes(2, "big"):
            wanted = int.from_bytes(frame[38:42], "big")
            mac = self.hosts.get((fields["port"], wanted))
            if mac is not None:
                own = mac.to_bytes(6, "big")
                reply = frame[6:12] + own + frame[12:20] + _REPLY.to_bytes(2, "big") + own + frame[38:42] + frame[22:32]
                self.inject(fields["port"], reply)
