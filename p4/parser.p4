// Takes packets apart and puts them together (v1model).
#ifndef PARSER_P4
#define PARSER_P4

#include <core.p4>
#include <v1model.p4>

#include "headers.p4"

const bit<9> CPU_PORT = 510;
const bit<16> FLOOD_GROUP = 1;

// Operation of a packet from or to the control plane
enum bit<8> control_t {
    SEND = 0,  // from it: leave by `port`; to it: what came in by `port`
    READ = 1,  // the version `index` of a slot, answered with its state
    RESET = 2  // the same, and forget it
}

@controller_header("packet_out")
header packet_out_t {
    bit<16> port;
    control_t operation;
    bit<16> index;
}

@controller_header("packet_in")
header packet_in_t {
    bit<16> port;
    control_t operation;
    bit<16> index;
    bit<32> chunk;
    bit<32> epoch;
    bit<32> seen;
    bit<8> exponent;
    bit<16> elements;
}

struct headers_t {
    packet_in_t packet_in;
    packet_out_t packet_out;
    ethernet_t ethernet;
    arp_t arp;
    ipv4_t ipv4;
    udp_t udp;
    switchml_t switchml;
    bitmap_t bitmap;
    block_t b0;
    block_t b1;
    block_t b2;
    block_t b3;
    block_t b4;
    block_t b5;
    block_t b6;
    block_t b7;
}

enum bit<8> reply_t {
    NONE = 0,
    RESULT = 1,
    PROGRESS = 2
}

// What became of a packet: an index of `packets`
enum bit<8> fate_t {
    ADDED = 0,
    CHUNK = 1,      // added, and finished a chunk
    REPEAT = 2,
    STALE = 3,
    FOREIGN = 4,    // of no worker of this session and epoch at this port
    MALFORMED = 5,
    CONTROL = 6     // for the control plane
}

// What the table `session` says of one
struct session_t {
    bit<32> all;    // bitmap of its workers
    bit<16> base;   // its first version of a slot
    bit<16> slots;  // a power of two
    bit<16> elements;
    bit<16> group;  // its multicast group
}

struct metadata_t {
    bool whole;       // the payload is as long as the header says
    bool flooded;
    bit<48> own_mac;
    bit<32> own_ip;
    session_t session;
    bit<16> receiver; // rank + 1, where a reply goes to one worker
    bit<32> bit_;     // of the worker in the bitmaps
    reply_t reply;
    bit<32> seen;     // of the version, after this packet
}

parser Parse(packet_in packet, out headers_t hdr, inout metadata_t meta, inout standard_metadata_t standard) {
    state start {
        transition select(standard.ingress_port) {
            CPU_PORT: parse_packet_out;
            default: parse_ethernet;
        }
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
        transition accept;
    }

    state parse_ipv4 {
        packet.extract(hdr.ipv4);
        transition select(hdr.ipv4.words, hdr.ipv4.flags[0:0], hdr.ipv4.fragment, hdr.ipv4.protocol) {
            (5, 0, 0, PROTOCOL_UDP): parse_udp;
            default: accept;
        }
    }

    state parse_udp {
        packet.extract(hdr.udp);
        transition select(hdr.udp.dst, hdr.udp.length) {
            (SWITCHML_PORT, LENGTH_EMPTY .. 0xFFFF): parse_switchml;
            default: accept;
        }
    }

    state parse_switchml {
        packet.extract(hdr.switchml);
        transition select(hdr.switchml.magic, hdr.switchml.kind, hdr.switchml.wire, hdr.switchml.elements,
                          hdr.udp.length) {
            (SWITCHML_MAGIC, DATA, WIRE_INT32, 0, LENGTH_EMPTY): parse_whole;
            (SWITCHML_MAGIC, DATA, WIRE_INT32, 64, LENGTH_64): parse_64;
            (SWITCHML_MAGIC, DATA, WIRE_INT32, 256, LENGTH_256): parse_256;
            default: accept;
        }
    }

    state parse_256 {
        packet.extract(hdr.b0);
        packet.extract(hdr.b1);
        packet.extract(hdr.b2);
        packet.extract(hdr.b3);
        packet.extract(hdr.b4);
        packet.extract(hdr.b5);
        packet.extract(hdr.b6);
        packet.extract(hdr.b7);
        transition parse_whole;
    }

    state parse_64 {
        packet.extract(hdr.b0);
        packet.extract(hdr.b1);
        transition parse_whole;
    }

    state parse_whole {
        meta.whole = true;
        transition accept;
    }
}

control Verify(inout headers_t hdr, inout metadata_t meta) {
    apply {
        verify_checksum(
            hdr.ipv4.isValid() && hdr.ipv4.words == 5,
            {
                hdr.ipv4.version, hdr.ipv4.words, hdr.ipv4.service, hdr.ipv4.length, hdr.ipv4.identification,
                hdr.ipv4.flags, hdr.ipv4.fragment, hdr.ipv4.ttl, hdr.ipv4.protocol, hdr.ipv4.src, hdr.ipv4.dst
            },
            hdr.ipv4.checksum, HashAlgorithm.csum16);
    }
}

control Update(inout headers_t hdr, inout metadata_t meta) {
    apply {
        update_checksum(
            meta.reply != reply_t.NONE,
            {
                hdr.ipv4.version, hdr.ipv4.words, hdr.ipv4.service, hdr.ipv4.length, hdr.ipv4.identification,
                hdr.ipv4.flags, hdr.ipv4.fragment, hdr.ipv4.ttl, hdr.ipv4.protocol, hdr.ipv4.src, hdr.ipv4.dst
            },
            hdr.ipv4.checksum, HashAlgorithm.csum16);
    }
}

control Deparse(packet_out packet, in headers_t hdr) {
    apply {
        packet.emit(hdr);
    }
}

#endif
