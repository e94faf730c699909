// Takes packets apart and puts them together (TNA).
#ifndef TOFINO_PARSER_P4
#define TOFINO_PARSER_P4

#include <core.p4>
#include <tna.p4>

#include "headers.p4"

const PortId_t CPU_PORT = 64;
const PortId_t AGAIN = 68;             // recirculation of pipe 0
const MulticastGroupId_t FLOOD_GROUP = 1;
const bit<32> VERSIONS = 1024;         // two a slot, all sessions together
const bit<32> CELLS = 8 * VERSIONS;    // eight blocks a version

// What is done with a block
const bit<8> STALE = 0;                // nothing: the slot has gone on
const bit<8> STORE = 1;
const bit<8> ADD = 2;
const bit<8> LOAD = 3;
const bit<8> STRIP = 4;                // a repeat's own values are not wanted

// What becomes of the packet in the end
const bit<8> FORWARD = 0;
const bit<8> NOTHING = 1;
const bit<8> SUM_TO_ALL = 2;
const bit<8> SUM_TO_ONE = 3;
const bit<8> WORD_TO_MISSING = 4;
const bit<8> FLOOD = 5;

// Where a packet is on its way through the passes, in front of it from ingress to egress and when it comes again
header work_t {
    bit<8> op;
    bit<8> ahead;       // blocks after this one
    bit<8> behind;      // blocks before it
    bit<8> end;
    bit<16> index;      // of the block: eight times the version, and which
    bit<16> group;
    bit<32> seen;
    bit<48> own_mac;
    bit<32> own_ip;
    @padding bit<7> unused;
    PortId_t port;      // where it came in
}

@controller_header("packet_out")
header packet_out_t {
    bit<16> port;
    bit<8> operation;
    bit<16> index;
}

@controller_header("packet_in")
header packet_in_t {
    bit<16> port;
    bit<8> operation;
    bit<16> index;
}

struct headers_t {
    packet_in_t packet_in;
    work_t work;
    packet_out_t packet_out;
    ethernet_t ethernet;
    arp_t arp;
    ipv4_t ipv4;
    udp_t udp;
    switchml_t switchml;
    bitmap_t bitmap;
    block_t block;
}

struct metadata_t {
    bool broken;        // the checksum of IP is wrong
    bool whole;         // the payload is as long as the header says
    bit<32> target;
    bit<32> all;
    bit<16> slots;
    bit<16> mask;
    bit<16> elements;   // 0 where they are the session's, or none
    bit<32> member;     // bit of the worker
    bit<16> low;        // half of the chunk
    bit<32> next;       // chunk + 1: 0 in a register is no chunk
    bit<32> before;     // what the version held, 0 where that is older
    bit<32> seen;
    bit<32> again;
    bit<32> lacking;
    bit<16> slot;
    bit<16> turn;
    bit<16> version;
}

parser IngressParse(packet_in packet, out headers_t hdr, out metadata_t meta,
                    out ingress_intrinsic_metadata_t intrinsic) {
    Checksum() checksum;

    state start {
        packet.extract(intrinsic);
        packet.advance(PORT_METADATA_SIZE);
        meta = { false, false, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 };
        transition select(intrinsic.ingress_port) {
            AGAIN: parse_work;
            CPU_PORT: parse_packet_out;
            default: parse_ethernet;
        }
    }

    state parse_work {
        packet.extract(hdr.work);
        packet.extract(hdr.ethernet);
        packet.extract(hdr.ipv4);
        packet.extract(hdr.udp);
        packet.extract(hdr.switchml);
        transition select(hdr.work.op) {
            LOAD: accept;
            default: parse_block;
        }
    }

    state parse_block {
        packet.extract(hdr.block);
        transition accept;
    }

    state parse_packet_out {
        packet.extract(hdr.packet_out);
        transition accept;
    }

    state parse_ethernet {
        packet.extract(hdr.ethernet);
        transition select(hdr.ethernet.type) {
            TYPE_ARP: parse_arp;
            TYPE_IPV4: parse_ipv4;
            default: accept;
        }
    }

    state parse_arp {
        packet.extract(hdr.arp);
        meta.target = hdr.arp.target_ip;
        transition accept;
    }

    state parse_ipv4 {
        packet.extract(hdr.ipv4);
        meta.target = hdr.ipv4.dst;
        checksum.add(hdr.ipv4);
        transition select(hdr.ipv4.words) {
            5: parse_ipv4_checked;
            default: accept;
        }
    }

    state parse_ipv4_checked {
        meta.broken = checksum.verify();
        transition select(hdr.ipv4.flags[0:0], hdr.ipv4.fragment, hdr.ipv4.protocol) {
            (0, 0, PROTOCOL_UDP): parse_udp;
            default: accept;
        }
    }

    state parse_udp {
        packet.extract(hdr.udp);
        transition select(hdr.udp.dst, hdr.udp.length) {
            (SWITCHML_PORT, LENGTH_EMPTY): parse_empty;
            (SWITCHML_PORT, LENGTH_64): parse_64;
            (SWITCHML_PORT, LENGTH_256): parse_256;
            (SWITCHML_PORT, LENGTH_EMPTY .. 0xFFFF): parse_switchml;
            default: accept;
        }
    }

    state parse_switchml {
        packet.extract(hdr.switchml);
        transition accept;
    }

    state parse_empty {
        packet.extract(hdr.switchml);
        meta.low = hdr.switchml.chunk[15:0];
        transition select(hdr.switchml.elements) {
            0: parse_whole;
            default: accept;
        }
    }

    state parse_64 {
        packet.extract(hdr.switchml);
        meta.low = hdr.switchml.chunk[15:0];
        transition select(hdr.switchml.elements) {
            64: parse_whole;
            default: accept;
        }
    }

    state parse_256 {
        packet.extract(hdr.switchml);
        meta.low = hdr.switchml.chunk[15:0];
        transition select(hdr.switchml.elements) {
            256: parse_whole;
            default: accept;
        }
    }

    state parse_whole {
        meta.whole = true;
        transition accept;
    }
}

control IngressDeparse(packet_out packet, inout headers_t hdr, in metadata_t meta,
                       in ingress_intrinsic_metadata_for_deparser_t deparser) {
    apply {
        packet.emit(hdr);
    }
}

struct egress_metadata_t {
    bit<32> known;
    bit<16> receiver;   // rank + 1
}

parser EgressParse(packet_in packet, out headers_t hdr, out egress_metadata_t meta,
                   out egress_intrinsic_metadata_t intrinsic) {
    state start {
        packet.extract(intrinsic);
        packet.extract(hdr.work);
        meta = { 0, 0 };
        transition select(hdr.work.end) {
            SUM_TO_ALL: parse_reply;
            SUM_TO_ONE: parse_reply;
            WORD_TO_MISSING: parse_reply;
            default: accept;
        }
    }

    state parse_reply {
        packet.extract(hdr.ethernet);
        packet.extract(hdr.ipv4);
        packet.extract(hdr.udp);
        packet.extract(hdr.switchml);
        transition accept;
    }
}

control EgressDeparse(packet_out packet, inout headers_t hdr, in egress_metadata_t meta) {
    Checksum() checksum;

    apply {
        if (hdr.ipv4.isValid()) {
            hdr.ipv4.checksum = checksum.update({
                hdr.ipv4.version, hdr.ipv4.words, hdr.ipv4.service, hdr.ipv4.length, hdr.ipv4.identification,
                hdr.ipv4.flags, hdr.ipv4.fragment, hdr.ipv4.ttl, hdr.ipv4.protocol, hdr.ipv4.src, hdr.ipv4.dst
            });
        }
        packet.emit(hdr.ethernet);
        packet.emit(hdr.ipv4);
        packet.emit(hdr.udp);
        packet.emit(hdr.switchml);
        packet.emit(hdr.bitmap);
    }
}

#endif
