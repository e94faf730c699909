// What travels, for every target. The fields of switchml_t are those of the packet table, switchml/_packet.py.
#ifndef HEADERS_P4
#define HEADERS_P4

#include "block.p4"

const bit<16> TYPE_IPV4 = 0x0800;
const bit<16> TYPE_ARP = 0x0806;
const bit<8> PROTOCOL_UDP = 17;
const bit<16> ARP_REQUEST = 1;
const bit<16> ARP_REPLY = 2;

const bit<16> SWITCHML_PORT = 0xBEE0;
const bit<8> SWITCHML_MAGIC = 0xB1;
const bit<8> FROM_SWITCH = 0xFF;
const bit<8> WIRE_INT32 = 4;

// Kinds of packets
const bit<8> DATA = 1;
const bit<8> RESULT = 2;
const bit<8> PROGRESS = 3;
const bit<8> CONTROL = 16;

// Lengths that UDP states: its own header and ours, then the payload
const bit<16> LENGTH_EMPTY = 28;
const bit<16> LENGTH_PROGRESS = 36;
const bit<16> LENGTH_64 = 284;
const bit<16> LENGTH_256 = 1052;

header ethernet_t {
    bit<48> dst;
    bit<48> src;
    bit<16> type;
}

header arp_t {
    bit<16> hardware;
    bit<16> protocol;
    bit<8> hardware_bytes;
    bit<8> protocol_bytes;
    bit<16> operation;
    bit<48> sender_mac;
    bit<32> sender_ip;
    bit<48> target_mac;
    bit<32> target_ip;
}

header ipv4_t {
    bit<4> version;
    bit<4> words;
    bit<8> service;
    bit<16> length;
    bit<16> identification;
    bit<3> flags;
    bit<13> fragment;
    bit<8> ttl;
    bit<8> protocol;
    bit<16> checksum;
    bit<32> src;
    bit<32> dst;
}

header udp_t {
    bit<16> src;
    bit<16> dst;
    bit<16> length;
    bit<16> checksum;
}

header switchml_t {
    bit<8> magic;
    bit<8> kind;
    bit<16> session;
    bit<32> epoch;
    bit<32> chunk;
    bit<16> slot;
    bit<8> worker;
    bit<8> exponent;
    bit<16> elements;
    bit<8> wire;
    bit<8> lane;
}

// Payload of PROGRESS
header bitmap_t {
    bit<64> seen;
}

#endif
