// SwitchML on Tofino (TNA): the `core` profile of the packet table, beside ordinary forwarding.
//
// The first pass looks at the slot. Each later one takes a block off the front of the payload and adds it, or reads
// one back and puts it on: the packet that finishes a chunk leaves with the last block summed, then the one before it,
// down to the first. A packet of b blocks takes 1 + b passes, the one that finishes a chunk 2 b, a repeat 1 + 2 b.
// Recirculation keeps the order, so that no block is read before all workers' have been added.
#include "slots.p4"
#include "tofino_block.p4"

control Ingress(inout headers_t hdr, inout metadata_t meta, in ingress_intrinsic_metadata_t intrinsic,
                in ingress_intrinsic_metadata_from_parser_t parsed,
                inout ingress_intrinsic_metadata_for_deparser_t deparser,
                inout ingress_intrinsic_metadata_for_tm_t manager) {
    Counter<bit<32>, bit<8>>(7, CounterType_t.PACKETS) packets;
    DirectCounter<bit<32>>(CounterType_t.PACKETS_AND_BYTES) session_packets;
    Slots() slot_state;
    Block() values;
    bit<8> fate = 4;

    action set_own(bit<48> mac) {
        hdr.work.own_mac = mac;
        hdr.work.own_ip = meta.target;
    }

    table own_address {
        key = { meta.target: exact @name("ip"); }
        actions = { set_own; @defaultonly NoAction; }
        default_action = NoAction();
        size = 16;
    }

    // `slots` is a power of two: its bit of the chunk says which version
    action set_session(bit<32> all, bit<16> base, bit<16> slots, bit<16> elements, bit<16> group) {
        session_packets.count();
        meta.all = all;
        meta.version = base;
        meta.slots = slots;
        meta.turn = meta.low & slots;
        meta.elements = hdr.switchml.elements & ~elements;
        hdr.work.group = group;
    }

    table session {
        key = { hdr.switchml.session: exact @name("session"); }
        actions = { set_session; @defaultonly NoAction; }
        default_action = NoAction();
        counters = session_packets;
        size = 64;
    }

    action set_member(bit<32> bit_) {
        meta.member = bit_;
    }

    table member {
        key = {
            hdr.switchml.session: exact @name("session");
            hdr.switchml.epoch: exact @name("epoch");
            hdr.switchml.worker: exact @name("worker");
            hdr.ipv4.src: exact @name("ip");
            hdr.udp.src: exact @name("udp");
            intrinsic.ingress_port: exact @name("port");
        }
        actions = { set_member; @defaultonly NoAction; }
        default_action = NoAction();
        size = 2048;
    }

    action forward(PortId_t port) {
        manager.ucast_egress_port = port;
    }

    action flood() {
        manager.mcast_grp_a = FLOOD_GROUP;
        hdr.work.end = FLOOD;
    }

    table l2 {
        key = { hdr.ethernet.dst: exact @name("dst"); }
        actions = { forward; flood; }
        default_action = flood();
        size = 1024;
    }

    action answer_arp() {
        hdr.ethernet.dst = hdr.ethernet.src;
        hdr.ethernet.src = hdr.work.own_mac;
        hdr.arp.operation = ARP_REPLY;
        hdr.arp.target_mac = hdr.arp.sender_mac;
        hdr.arp.target_ip = hdr.arp.sender_ip;
        hdr.arp.sender_mac = hdr.work.own_mac;
        hdr.arp.sender_ip = hdr.work.own_ip;
        manager.ucast_egress_port = intrinsic.ingress_port;
    }

    action punt() {
        hdr.packet_in.setValid();
        hdr.packet_in.port = (bit<16>) intrinsic.ingress_port;
        hdr.packet_in.operation = 0;
        hdr.packet_in.index = 0;
        hdr.work.setInvalid();
        manager.ucast_egress_port = CPU_PORT;
        manager.bypass_egress = 1;
    }

    action drop() {
        deparser.drop_ctl = 1;
    }

    action send_out() {
        manager.ucast_egress_port = (PortId_t) hdr.packet_out.port[8:0];
        manager.bypass_egress = 1;
        hdr.packet_out.setInvalid();
    }

    action begin_work() {
        hdr.work.setValid();
        hdr.work.op = STALE;
        hdr.work.ahead = 0;
        hdr.work.behind = 0;
        hdr.work.end = FORWARD;
        hdr.work.port = intrinsic.ingress_port;
        meta.next = hdr.switchml.chunk + 1;
    }

    // The version: base + turn + slot
    action place() {
        meta.mask = meta.slots - 1;
        meta.version = meta.version + meta.turn;
    }

    action place_slot() {
        meta.slot = meta.low & meta.mask;
    }

    action place_version() {
        meta.version = meta.version + meta.slot;
        meta.slot = meta.slot ^ hdr.switchml.slot;
    }

    action fitting() {}

    action malformed() {
        fate = 5;
        drop();
    }

    // Whether a packet has values for this session, and the slot of its chunk
    table fits {
        key = {
            hdr.switchml.magic: ternary;
            hdr.switchml.kind: ternary;
            hdr.switchml.wire: ternary;
            meta.whole: ternary;
            meta.elements: ternary;
            meta.turn: ternary;
            meta.slot: ternary;
        }
        actions = { fitting; malformed; }
        default_action = malformed();
        const entries = {
            (SWITCHML_MAGIC, DATA, WIRE_INT32, true, 0, 0, 0): fitting();
            (_, _, _, _, _, 0, _): malformed();
            (SWITCHML_MAGIC, DATA, WIRE_INT32, true, 0, _, 0x8000): fitting();
        }
        size = 4;
    }

    action go_again() {
        manager.ucast_egress_port = AGAIN;
        manager.bypass_egress = 1;
    }

    action stale() {
        fate = 3;
        drop();
    }

    action tell_missing() {
        fate = 2;
        hdr.work.end = WORD_TO_MISSING;
        manager.mcast_grp_a = hdr.work.group;
    }

    action repeat() {
        fate = 2;
        hdr.work.op = STRIP;
        hdr.work.end = SUM_TO_ONE;
        go_again();
    }

    action repeat_empty() {
        fate = 2;
        hdr.work.end = SUM_TO_ONE;
        manager.ucast_egress_port = hdr.work.port;
    }

    action finish() {
        fate = 1;
        hdr.work.end = SUM_TO_ALL;
        go_again();
    }

    action finish_empty() {
        fate = 1;
        hdr.work.end = SUM_TO_ALL;
        manager.mcast_grp_a = hdr.work.group;
    }

    action add() {
        fate = 0;
        hdr.work.end = NOTHING;
        go_again();
    }

    action add_empty() {
        fate = 0;
        drop();
    }

    // What the first pass comes to
    table decide {
        key = {
            hdr.work.op: ternary;
            meta.again: ternary;
            meta.lacking: ternary;
            hdr.switchml.elements: ternary;
        }
        actions = { stale; tell_missing; repeat; repeat_empty; finish; finish_empty; add; add_empty; }
        default_action = tell_missing();
        const entries = {
            (STALE, _, _, _): stale();
            (_, 0, 0, 0): finish_empty();
            (_, 0, 0, _): finish();
            (_, 0, _, 0): add_empty();
            (_, 0, _, _): add();
            (_, _, 0, 0): repeat_empty();
            (_, _, 0, _): repeat();
        }
        size = 8;
    }

    action count_blocks(bit<8> ahead) {
        hdr.work.ahead = ahead;
        hdr.work.index = meta.version << 3;
    }

    table blocks {
        key = { hdr.switchml.elements: exact; }
        actions = { count_blocks; @defaultonly NoAction; }
        default_action = NoAction();
        const entries = {
            64: count_blocks(1);
            256: count_blocks(7);
        }
        size = 2;
    }

    action block_after() {
        hdr.work.ahead = hdr.work.ahead - 1;
        hdr.work.behind = hdr.work.behind + 1;
        hdr.work.index = hdr.work.index + 1;
        hdr.block.setInvalid();
        go_again();
    }

    action block_before() {
        hdr.work.op = LOAD;
        hdr.work.behind = hdr.work.behind - 1;
        hdr.work.index = hdr.work.index - 1;
        go_again();
    }

    // After a strip the last block itself is read
    action read_last() {
        hdr.work.op = LOAD;
        hdr.block.setInvalid();
        go_again();
    }

    action to_all() {
        manager.mcast_grp_a = hdr.work.group;
    }

    action to_one() {
        manager.ucast_egress_port = hdr.work.port;
    }

    // What a later pass comes to
    table step {
        key = {
            hdr.work.op: ternary;
            hdr.work.ahead: ternary;
            hdr.work.behind: ternary;
            hdr.work.end: ternary;
        }
        actions = { block_after; block_before; read_last; to_all; to_one; drop; }
        default_action = block_after();
        const entries = {
            (LOAD, _, 0, SUM_TO_ALL): to_all();
            (LOAD, _, 0, _): to_one();
            (LOAD, _, _, _): block_before();
            (STRIP, 0, _, _): read_last();
            (_, 0, _, NOTHING): drop();
            (_, 0, _, _): block_before();
        }
        size = 8;
    }

    apply {
        if (hdr.packet_out.isValid()) {
            send_out();
        } else if (hdr.work.isValid()) {
            if (hdr.work.op == LOAD) {
                hdr.block.setValid();
            }
            values.apply(hdr.block, hdr.work.op, hdr.work.index);
            step.apply();
        } else if (meta.broken) {
            drop();
        } else {
            begin_work();
            if (!own_address.apply().hit) {
                l2.apply();
            } else if (hdr.arp.isValid()) {
                if (hdr.arp.operation == ARP_REQUEST) {
                    answer_arp();
                } else {
                    punt();
                }
            } else if (!hdr.switchml.isValid()) {
                drop();
            } else {
                if (hdr.switchml.kind == CONTROL && hdr.switchml.magic == SWITCHML_MAGIC) {
                    fate = 6;
                    punt();
                } else if (!session.apply().hit) {
                    drop();
                } else if (!member.apply().hit) {
                    drop();
                } else {
                    place();
                    place_slot();
                    place_version();
                    switch (fits.apply().action_run) {
                        fitting: {
                            slot_state.apply(hdr, meta);
                            blocks.apply();
                            decide.apply();
                        }
                    }
                }
                packets.count(fate);
            }
        }
    }
}

control Egress(inout headers_t hdr, inout egress_metadata_t meta, in egress_intrinsic_metadata_t intrinsic,
               in egress_intrinsic_metadata_from_parser_t parsed,
               inout egress_intrinsic_metadata_for_deparser_t deparser,
               inout egress_intrinsic_metadata_for_output_port_t output_port) {
    action set_receiver(bit<48> mac, bit<32> ip, bit<16> udp, bit<32> bit_) {
        meta.known = hdr.work.seen & bit_;
        hdr.ethernet.dst = mac;
        hdr.ethernet.src = hdr.work.own_mac;
        hdr.ipv4.identification = 0;
        hdr.ipv4.service = 0;
        hdr.ipv4.flags = 2;
        hdr.ipv4.ttl = 64;
        hdr.ipv4.length = hdr.udp.length + 20;
        hdr.ipv4.src = hdr.work.own_ip;
        hdr.ipv4.dst = ip;
        hdr.udp.src = SWITCHML_PORT;
        hdr.udp.dst = udp;
        hdr.udp.checksum = 0;
        hdr.switchml.kind = RESULT;
        hdr.switchml.worker = FROM_SWITCH;
        hdr.switchml.lane = 0;
    }

    table receiver {
        key = {
            hdr.switchml.session: exact @name("session");
            meta.receiver: exact @name("receiver");
        }
        actions = { set_receiver; @defaultonly NoAction; }
        default_action = NoAction();
        size = 2048;
    }

    // What is left of the payload lies behind what IP and UDP state, as Ethernet's padding does
    action progress() {
        hdr.switchml.kind = PROGRESS;
        hdr.switchml.exponent = 0;
        hdr.switchml.elements = 0;
        hdr.udp.length = LENGTH_PROGRESS;
        hdr.ipv4.length = LENGTH_PROGRESS + 20;
        hdr.bitmap.setValid();
        hdr.bitmap.seen = (bit<64>) hdr.work.seen;
    }

    action drop() {
        deparser.drop_ctl = 1;
    }

    apply {
        if (hdr.work.end == FLOOD) {
            if (hdr.work.port == intrinsic.egress_port) {
                drop();
            }
        } else if (hdr.work.end != FORWARD) {
            if (hdr.work.end == SUM_TO_ONE) {
                meta.receiver = (bit<16>) hdr.switchml.worker;
                meta.receiver = meta.receiver + 1;
            } else {
                meta.receiver = intrinsic.egress_rid;
            }
            if (receiver.apply().miss) {
                drop();
            } else if (hdr.work.end == WORD_TO_MISSING) {
                progress();
                if (meta.known != 0) {
                    drop();
                }
            }
        }
    }
}

Pipeline(IngressParse(), Ingress(), IngressDeparse(), EgressParse(), Egress(), EgressDeparse()) pipe;

Switch(pipe) main;
