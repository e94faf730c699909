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
        meta.own = true;
        hdr.work.own_mac = mac;
        hdr.work.own_ip = meta.target;
    }

    table own_address {
        key = { meta.target: exact @name("ip"); }
        actions = { set_own; @defaultonly NoAction; }
        default_action = NoAction();
        size = 16;
    }

    action set_session(bit<32> all, bit<16> base, bit<16> slots, bit<16> elements, bit<16> group) {
        session_packets.count();
        meta.all = all;
        meta.base = base;
        meta.slots = slots;
        meta.mask = slots - 1;
        meta.elements = elements;
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
        hdr.work.receiver = (bit<16>) hdr.switchml.worker + 1;
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

    action begin_work() {
        hdr.work.setValid();
        hdr.work.end = FORWARD;
        hdr.work.port = intrinsic.ingress_port;
    }

    action place() {
        meta.slot = hdr.switchml.chunk[15:0] & meta.mask;
        meta.turn = hdr.switchml.chunk[15:0] & meta.slots;
        meta.next = hdr.switchml.chunk + 1;
    }

    action place_version() {
        meta.version = meta.slot + meta.turn;
        meta.slot = meta.slot ^ hdr.switchml.slot;
    }

    action place_index() {
        meta.version = meta.version + meta.base;
        meta.size = meta.elements ^ hdr.switchml.elements;
    }

    action go_again() {
        manager.ucast_egress_port = AGAIN;
        manager.bypass_egress = 1;
    }

    action to_all() {
        manager.mcast_grp_a = hdr.work.group;
    }

    action to_one() {
        manager.ucast_egress_port = hdr.work.port;
    }

    // How many blocks the packet has, and what is done with the first
    action count_blocks(bit<8> last) {
        hdr.work.block = 0;
        hdr.work.last = last;
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

    action next_block() {
        hdr.work.block = hdr.work.block + 1;
        hdr.work.index = hdr.work.index + 1;
        hdr.block.setInvalid();
    }

    action block_before() {
        hdr.work.op = LOAD;
        hdr.work.block = hdr.work.block - 1;
        hdr.work.index = hdr.work.index - 1;
    }

    // After a strip the last block itself is read
    action read_last() {
        hdr.work.op = LOAD;
        hdr.block.setInvalid();
    }

    apply {
        if (hdr.packet_out.isValid()) {
            manager.ucast_egress_port = (PortId_t) hdr.packet_out.port[8:0];
            manager.bypass_egress = 1;
            hdr.packet_out.setInvalid();
        } else if (!meta.first) {
            if (hdr.work.op == LOAD) {
                hdr.block.setValid();
            }
            values.apply(hdr.block, hdr.work.op, hdr.work.index);
            bool last = hdr.work.block == hdr.work.last;
            if (hdr.work.op == LOAD && hdr.work.block != 0 || hdr.work.op != LOAD && hdr.work.op != STRIP && last && hdr.work.end != NOTHING) {
                block_before();
                go_again();
            } else if (hdr.work.op == LOAD) {
                if (hdr.work.end == SUM_TO_ALL) {
                    to_all();
                } else {
                    to_one();
                }
            } else if (hdr.work.block != hdr.work.last) {
                next_block();
                go_again();
            } else if (hdr.work.op == STRIP) {
                read_last();
                go_again();
            } else {
                drop();
            }
        } else {
            begin_work();
            own_address.apply();
            if (!meta.own) {
                l2.apply();
            } else if (hdr.arp.isValid() && hdr.arp.operation == ARP_REQUEST) {
                answer_arp();
            } else if (hdr.arp.isValid() || (hdr.switchml.isValid() && hdr.switchml.kind == CONTROL)) {
                fate = 6;
                punt();
            } else if (!hdr.switchml.isValid()) {
                drop();
            } else if (session.apply().hit) {
                if (member.apply().hit) {
                    place();
                    place_version();
                    if (meta.turn != 0) {
                        meta.slot = meta.slot ^ 0x8000;
                    }
                    place_index();
                    if (meta.whole && meta.slot == 0 && (meta.size == 0 || hdr.switchml.elements == 0)) {
                        slot_state.apply(hdr, meta);
                        blocks.apply();
                        hdr.work.op = ADD;
                        hdr.work.end = NOTHING;
                        if (meta.later != 0) {
                            hdr.work.op = STORE;
                        }
                        if (meta.earlier != 0) {
                            fate = 3;
                            drop();
                        } else if (meta.again != 0 && meta.lacking != 0) {
                            fate = 2;
                            hdr.work.end = WORD_TO_MISSING;
                            to_all();
                        } else {
                            fate = 0;
                            if (meta.again != 0) {
                                fate = 2;
                                hdr.work.op = STRIP;
                                hdr.work.end = SUM_TO_ONE;
                            } else if (meta.lacking == 0) {
                                fate = 1;
                                hdr.work.end = SUM_TO_ALL;
                            }
                            if (hdr.switchml.elements != 0) {
                                go_again();
                            } else if (hdr.work.end == SUM_TO_ALL) {
                                to_all();
                            } else if (hdr.work.end == SUM_TO_ONE) {
                                to_one();
                            } else {
                                drop();
                            }
                        }
                    } else {
                        fate = 5;
                        drop();
                    }
                } else {
                    drop();
                }
            } else {
                drop();
            }
            if (hdr.switchml.isValid() && meta.own) {
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
            hdr.work.receiver: exact @name("receiver");
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
            if (hdr.work.end != SUM_TO_ONE) {
                hdr.work.receiver = intrinsic.egress_rid;
            }
            receiver.apply();
            if (hdr.work.end == WORD_TO_MISSING) {
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
