// SwitchML on a v1model switch (bmv2): the `core` profile of the packet table, beside ordinary forwarding.
#include "aggregate.p4"
#include "forward.p4"

control Arrive(inout headers_t hdr, inout metadata_t meta, inout standard_metadata_t standard) {
    counter(7, CounterType.packets) packets;
    Aggregate() aggregate;
    Forward() forward;

    bool own = false;
    bit<32> target = 0;
    bit<32> index = 0;
    fate_t fate = fate_t.FOREIGN;

    action set_own(bit<48> mac) {
        own = true;
        meta.own_mac = mac;
        meta.own_ip = target;
    }

    // The address of this switch
    table own_address {
        key = { target: exact @name("ip"); }
        actions = { set_own; @defaultonly NoAction; }
        default_action = NoAction();
        size = 1;
    }

    action set_session(bit<32> all, bit<16> base, bit<16> slots, bit<16> elements, bit<16> group) {
        meta.session = { all, base, slots, elements, group };
    }

    direct_counter(CounterType.packets_and_bytes) session_packets;

    table session {
        key = { hdr.switchml.session: exact @name("session"); }
        actions = { set_session; @defaultonly NoAction; }
        default_action = NoAction();
        counters = session_packets;
        size = 64;
    }

    action set_member(bit<32> bit_) {
        meta.bit_ = bit_;
        meta.receiver = (bit<16>) hdr.switchml.worker + 1;
    }

    // Who belongs to the epoch that the session is in, and the one place that he may send from
    table member {
        key = {
            hdr.switchml.session: exact @name("session");
            hdr.switchml.epoch: exact @name("epoch");
            hdr.switchml.worker: exact @name("worker");
            hdr.ipv4.src: exact @name("ip");
            hdr.udp.src: exact @name("udp");
            standard.ingress_port: exact @name("port");
        }
        actions = { set_member; @defaultonly NoAction; }
        default_action = NoAction();
        size = 2048;
    }

    action punt() {
        hdr.packet_in = { (bit<16>) standard.ingress_port, control_t.SEND, 0, 0, 0, 0, 0, 0 };
        standard.egress_spec = CPU_PORT;
    }

    action place() {
        index = (bit<32>) (meta.session.base + (hdr.switchml.chunk[15:0] & ((meta.session.slots << 1) - 1)));
    }

    apply {
        if (hdr.packet_out.isValid()) {
            if (hdr.packet_out.operation == control_t.SEND) {
                standard.egress_spec = (bit<9>) hdr.packet_out.port;
                hdr.packet_out.setInvalid();
            } else {
                index = (bit<32>) hdr.packet_out.index;
                aggregate.apply(hdr, meta, index, fate);
                standard.egress_spec = CPU_PORT;
            }
            exit;
        }
        if (standard.parser_error != error.NoError || standard.checksum_error == 1) {
            mark_to_drop(standard);
            exit;
        }
        target = hdr.arp.isValid() ? hdr.arp.target_ip : hdr.ipv4.dst;
        if (hdr.arp.isValid() || hdr.ipv4.isValid()) {
            own_address.apply();
        }
        if (!own || !hdr.switchml.isValid()) {
            forward.apply(hdr, meta, standard, own);
            if (standard.egress_spec == CPU_PORT) {
                punt();
            }
            exit;
        }
        if (hdr.switchml.kind == CONTROL && hdr.switchml.magic == SWITCHML_MAGIC) {
            fate = fate_t.CONTROL;
            punt();
        } else if (session.apply().hit && member.apply().hit) {
            bit<16> version = (hdr.switchml.chunk[15:0] & meta.session.slots) == 0 ? 16w0 : 0x8000;
            bit<16> slot = (hdr.switchml.chunk[15:0] & (meta.session.slots - 1)) | version;
            bool sized = hdr.switchml.elements == 0 || hdr.switchml.elements == meta.session.elements;
            fate = fate_t.MALFORMED;
            if (meta.whole && sized && hdr.switchml.slot == slot) {
                place();
                aggregate.apply(hdr, meta, index, fate);
            }
        }
        packets.count((bit<32>) (bit<8>) fate);
        if (fate == fate_t.CONTROL) {
            exit;
        }
        if (meta.reply == reply_t.NONE) {
            mark_to_drop(standard);
        } else if (fate == fate_t.REPEAT && meta.reply == reply_t.RESULT) {
            standard.egress_spec = standard.ingress_port;
        } else {
            meta.receiver = 0;
            standard.mcast_grp = meta.session.group;
        }
    }
}

control Depart(inout headers_t hdr, inout metadata_t meta, inout standard_metadata_t standard) {
    bool missing = false;

    action result() {
        hdr.switchml.kind = RESULT;
        hdr.udp.length = LENGTH_EMPTY + (hdr.switchml.elements << 2);
    }

    action progress() {
        hdr.switchml.kind = PROGRESS;
        hdr.switchml.exponent = 0;
        hdr.switchml.elements = 0;
        hdr.udp.length = LENGTH_PROGRESS;
        hdr.bitmap.setValid();
        hdr.bitmap.seen = (bit<64>) meta.seen;
        hdr.b0.setInvalid();
        hdr.b1.setInvalid();
        hdr.b2.setInvalid();
        hdr.b3.setInvalid();
        hdr.b4.setInvalid();
        hdr.b5.setInvalid();
        hdr.b6.setInvalid();
        hdr.b7.setInvalid();
    }

    action set_receiver(bit<48> mac, bit<32> ip, bit<16> udp, bit<32> bit_) {
        missing = (meta.seen & bit_) == 0;
        hdr.ethernet.dst = mac;
        hdr.ethernet.src = meta.own_mac;
        hdr.ipv4.identification = 0;
        hdr.ipv4.service = 0;
        hdr.ipv4.flags = 2;
        hdr.ipv4.ttl = 64;
        hdr.ipv4.src = meta.own_ip;
        hdr.ipv4.dst = ip;
        hdr.ipv4.length = hdr.udp.length + 20;
        hdr.udp.src = SWITCHML_PORT;
        hdr.udp.dst = udp;
        hdr.udp.checksum = 0;
        hdr.switchml.worker = FROM_SWITCH;
        hdr.switchml.lane = 0;
    }

    // Where the worker of a reply is; a copy's number is his rank + 1
    table receiver {
        key = {
            hdr.switchml.session: exact @name("session");
            meta.receiver: exact @name("receiver");
        }
        actions = { set_receiver; @defaultonly NoAction; }
        default_action = NoAction();
        size = 2048;
    }

    apply {
        if (meta.reply == reply_t.NONE) {
            if (meta.flooded && standard.egress_port == standard.ingress_port) {
                mark_to_drop(standard);
            }
            exit;
        }
        if (meta.receiver == 0) {
            meta.receiver = standard.egress_rid;
        }
        if (meta.reply == reply_t.RESULT) {
            result();
        } else {
            progress();
        }
        if (receiver.apply().miss || (meta.reply == reply_t.PROGRESS && !missing)) {
            mark_to_drop(standard);
        }
    }
}

V1Switch(Parse(), Verify(), Arrive(), Depart(), Update(), Deparse()) main;
