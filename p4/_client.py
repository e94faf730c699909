"""A P4Runtime session with one switch: p4runtime-shell's client, with errors that name the cause and an end to all waits."""

import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import google.protobuf.text_format
import grpc
from google.rpc import code_pb2, status_pb2
from p4.config.v1 import p4info_pb2
from p4.v1 import p4runtime_pb2 as proto
from p4runtime_sh.p4runtime import P4RuntimeClient

from trainkit.p4._entries import DYNAMIC, STATIC, Change, Entry, Group, Item

_OK = 0


class SwitchError(RuntimeError):
    """The switch cannot be reached, is another's, or refuses."""


@dataclass(frozen=True)
class Packet:
    """What the switch handed to the control plane: the header `packet_in` and what came behind it."""

    fields: dict[str, int]
    payload: bytes


class _Client(P4RuntimeClient):  # type: ignore[misc]
    """The library's client with a stream that neither ends the process nor outlives it."""

    def set_up_stream(self) -> None:
        self.outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.arbitrated: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.packets: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.why_ended = ""
        if self.election_id is None:
            return
        self.stream = self.stub.StreamChannel(iter(self.outgoing.get, None), wait_for_ready=True)
        threading.Thread(target=self._listen, name="p4runtime-stream", daemon=True).start()
        request = proto.StreamMessageRequest()
        request.arbitration.device_id = self.device_id
        request.arbitration.election_id.high, request.arbitration.election_id.low = self.election_id
        self.outgoing.put(request)

    def _listen(self) -> None:
        try:
            for message in self.stream:
                if message.HasField("arbitration"):
                    self.arbitrated.put(message.arbitration)
                elif message.HasField("packet"):
                    self.packets.put(message.packet)
        except grpc.RpcError as error:
            self.why_ended = str(error.details())
        self.arbitrated.put(None)
        self.packets.put(None)

    def tear_down(self) -> None:
        if self.election_id is not None:
            self.outgoing.put(None)
            self.stream.cancel()
        self.channel.close()


class Connection:
    """One switch, as its primary controller or to read only. A context manager.

    Args:
        address: "host:port" of its P4Runtime server.
        device: its device id.
        election: election id; the greatest is primary. None reads only, whoever is primary.
        seconds: how long an answer may take.

    Raises:
        SwitchError: nobody answers there, or another controller is primary.
    """

    def __init__(self, address: str, device: int = 0, election: int | None = 1, seconds: float = 5.0) -> None:
        self.address, self._seconds = address, seconds
        self._client = _Client(device, address, None if election is None else (0, election))
        try:
            try:
                grpc.channel_ready_future(self._client.channel).result(timeout=seconds)
            except grpc.FutureTimeoutError:
                raise SwitchError(
                    f"no P4Runtime server answers at {address} in {seconds:g} s: is the switch running, is the port right?"
                ) from None
            if election is not None:
                self._arbitrate(election)
            self.info = self._running()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session; the switch keeps what it was given."""
        self._client.tear_down()

    def runs(self, p4info: str, cookie: int) -> bool:
        """Whether the switch runs this program."""
        ours = google.protobuf.text_format.Parse(p4info, p4info_pb2.P4Info())
        return self.info is not None and self.info[0] == ours and self.info[1] in (0, cookie)

    @property
    def empty(self) -> bool:
        """Whether the switch has no program at all."""
        return self.info is None

    def push(self, p4info: str, config: bytes, cookie: int) -> None:
        """Make the switch run a program; it then holds nothing."""
        if self.info is not None:  # groups outlive a program, and every copy would leave twice
            self.write([Change(group, None) for group in self._groups()])
        request = proto.SetForwardingPipelineConfigRequest(
            device_id=self._client.device_id,
            action=proto.SetForwardingPipelineConfigRequest.VERIFY_AND_COMMIT,
        )
        request.election_id.high, request.election_id.low = self._client.election_id
        google.protobuf.text_format.Parse(p4info, request.config.p4info)
        request.config.p4_device_config = config
        request.config.cookie.cookie = cookie
        self._call(self._client.stub.SetForwardingPipelineConfig, request, 6)
        self.info = self._running()

    def read(self, tables: Iterable[str] = (*STATIC, *DYNAMIC)) -> list[Item]:
        """What the switch holds: the entries of `tables`, and all multicast groups."""
        names = list(tables)
        entities = [
            proto.Entity(table_entry=proto.TableEntry(table_id=self._table(name).preamble.id)) for name in names
        ]
        return [*(self._entry(entity.table_entry) for entity in self._read(entities)), *self._groups()]

    def write(self, changes: list[Change]) -> None:
        """Make changes, in order.

        Raises:
            SwitchError: one was refused; those before it, and maybe some after it, were made.
        """
        request = proto.WriteRequest(device_id=self._client.device_id)
        request.election_id.high, request.election_id.low = self._client.election_id
        for change in changes:
            update = request.updates.add()
            item = change.after or change.before
            assert item is not None
            update.type = update.INSERT if change.before is None else update.DELETE
            if change.before is not None and change.after is not None:
                update.type = update.MODIFY
            update.entity.CopyFrom(self._entity(item, named_only=change.after is None))
        if changes:
            self._call(self._client.stub.Write, request)

    def counters(self, name: str) -> list[int]:
        """Packets of each cell of an indirect counter."""
        counter = next(counter for counter in self._program().counters if counter.preamble.alias == name)
        entity = proto.Entity(counter_entry=proto.CounterEntry(counter_id=counter.preamble.id))
        cells = {e.counter_entry.index.index: e.counter_entry.data.packet_count for e in self._read([entity])}
        return [cells.get(index, 0) for index in range(counter.size)]

    def traffic(self, table: str) -> dict[tuple[int, ...], tuple[int, int]]:
        """Packets and bytes of each entry of a table with a direct counter, by key."""
        entry = proto.TableEntry(table_id=self._table(table).preamble.id)
        entity = proto.Entity(direct_counter_entry=proto.DirectCounterEntry(table_entry=entry))
        found = [e.direct_counter_entry for e in self._read([entity])]
        return {self._key(f.table_entry): (f.data.packet_count, f.data.byte_count) for f in found}

    def send(self, payload: bytes, **fields: int) -> None:
        """Hand a packet to the switch, with the fields of its header `packet_out`."""
        (header,) = [h for h in self._program().controller_packet_metadata if h.preamble.name == "packet_out"]
        packet = proto.PacketOut(payload=payload)
        for field in header.metadata:
            packet.metadata.add(metadata_id=field.id, value=_bytes(fields.get(field.name, 0)))
        self._client.outgoing.put(proto.StreamMessageRequest(packet=packet))

    def receive(self, seconds: float) -> Packet | None:
        """The next packet for the control plane; None if none comes in time.

        Raises:
            SwitchError: the session has ended, or another controller has become primary.
        """
        try:
            packet = self._client.packets.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self._still_primary()
            return None
        if packet is None:
            self._client.packets.put(None)
            raise SwitchError(f"switch {self.address} has ended the session: {self._client.why_ended or 'it stopped'}")
        (header,) = [h for h in self._program().controller_packet_metadata if h.preamble.name == "packet_in"]
        names = {field.id: field.name for field in header.metadata}
        return Packet({names[m.metadata_id]: int.from_bytes(m.value, "big") for m in packet.metadata}, packet.payload)

    def _arbitrate(self, election: int) -> None:
        try:
            answer = self._client.arbitrated.get(timeout=self._seconds)
        except queue.Empty:
            answer = None
        if answer is None or answer.status.code != _OK:
            why = f" ({self._client.why_ended})" if self._client.why_ended else ""
            raise SwitchError(
                f"another controller is primary on {self.address}{why}: stop it (`trainkit p4 serve`?), or give an "
                f"--election above its, {election} is not"
            )

    def _still_primary(self) -> None:
        while not self._client.arbitrated.empty():
            answer = self._client.arbitrated.get()
            if answer is not None and answer.status.code != _OK:
                raise SwitchError(f"mastership lost: another controller has become primary on {self.address}")

    def _running(self) -> tuple[Any, int] | None:
        request = proto.GetForwardingPipelineConfigRequest(
            device_id=self._client.device_id,
            response_type=proto.GetForwardingPipelineConfigRequest.P4INFO_AND_COOKIE,
        )
        try:
            config = self._client.stub.GetForwardingPipelineConfig(request, timeout=self._seconds).config
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND):
                return None  # no program yet
            raise self._failed(error) from None
        return (config.p4info, config.cookie.cookie) if config.p4info.tables else None

    def _program(self) -> Any:
        if self.info is None:
            raise SwitchError(f"switch {self.address} runs no program: run `trainkit p4 deploy` first")
        return self.info[0]

    def _table(self, name: str) -> Any:
        found = [table for table in self._program().tables if table.preamble.alias == name]
        if not found:
            raise SwitchError(f"the program of switch {self.address} has no table {name!r}: it is not this one")
        return found[0]

    def _groups(self) -> list[Item]:
        entity = proto.Entity()
        entity.packet_replication_engine_entry.multicast_group_entry.SetInParent()
        groups = [e.packet_replication_engine_entry.multicast_group_entry for e in self._read([entity])]
        return [Group(g.multicast_group_id, frozenset((r.egress_port, r.instance) for r in g.replicas)) for g in groups]

    def _read(self, entities: list[Any]) -> list[Any]:
        request = proto.ReadRequest(device_id=self._client.device_id, entities=entities)

        def everything(request: Any, timeout: float) -> list[Any]:
            return [entity for answer in self._client.stub.Read(request, timeout=timeout) for entity in answer.entities]

        return list(self._call(everything, request))

    def _call(self, function: Any, request: Any, patience: float = 1) -> Any:
        try:
            return function(request, timeout=self._seconds * patience)
        except grpc.RpcError as error:
            raise self._failed(error) from None

    def _failed(self, error: Any) -> SwitchError:
        code = error.code()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return SwitchError(f"switch {self.address} stopped answering: is it still running?")
        if code == grpc.StatusCode.PERMISSION_DENIED:
            return SwitchError(f"mastership lost: another controller has become primary on {self.address}")
        why = str(error.details())
        if code == grpc.StatusCode.UNKNOWN:
            why = "; ".join(_refused(error)) or why
        return SwitchError(f"switch {self.address} refuses ({code.name.lower()}): {why}")

    def _entity(self, item: Item, named_only: bool) -> Any:
        entity = proto.Entity()
        if isinstance(item, Group):
            group = entity.packet_replication_engine_entry.multicast_group_entry
            group.multicast_group_id = item.number
            for port, instance in sorted(item.copies):
                group.replicas.add(egress_port=port, instance=instance)
            return entity
        table = self._table(item.table)
        entity.table_entry.table_id = table.preamble.id
        for field, value in zip(table.match_fields, item.key, strict=True):
            entity.table_entry.match.add(field_id=field.id).exact.value = _bytes(value)
        if not named_only:
            (action,) = [a for a in self._program().actions if a.preamble.alias == item.action]
            entity.table_entry.action.action.action_id = action.preamble.id
            for parameter, value in zip(action.params, item.params, strict=True):
                entity.table_entry.action.action.params.add(param_id=parameter.id, value=_bytes(value))
        return entity

    def _entry(self, read: Any) -> Entry:
        (table,) = [table for table in self._program().tables if table.preamble.id == read.table_id]
        chosen = read.action.action
        (action,) = [action for action in self._program().actions if action.preamble.id == chosen.action_id]
        params = {parameter.param_id: int.from_bytes(parameter.value, "big") for parameter in chosen.params}
        ordered = tuple(params[parameter.id] for parameter in action.params)
        return Entry(table.preamble.alias, self._key(read), action.preamble.alias, ordered)

    def _key(self, read: Any) -> tuple[int, ...]:
        (table,) = [table for table in self._program().tables if table.preamble.id == read.table_id]
        values = {match.field_id: int.from_bytes(match.exact.value, "big") for match in read.match}
        return tuple(values[field.id] for field in table.match_fields)


def _refused(error: Any) -> list[str]:
    """Which updates of a write were refused, and why.

    Not by p4runtime-shell's own reader: it never ends where an update before the refused one was taken.
    """
    lines = []
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            for index, detail in enumerate(status_pb2.Status.FromString(value).details):
                refused = proto.Error()
                if detail.Unpack(refused) and refused.canonical_code != _OK:
                    lines.append(f"update {index}: {refused.message or code_pb2.Code.Name(refused.canonical_code)}")
    return lines


def _bytes(value: int) -> bytes:
    """P4Runtime's canonical form: no leading zero bytes."""
    return value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big")
