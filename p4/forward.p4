// Everything that is not ours: ARP for the switch's address, and an ordinary Ethernet switch (v1model).
#include "parser.p4"

control Forward(inout headers_t hdr, inout metadata_t meta, inout standard_metadata_t standard, in bool own) {
    action forward(bit<9> port) {
        standard.egress_spec = port;
    }

    action flood() {
        standard.mcast_grp = FLOOD_GROUP;
        meta.flooded = true;
    }

    table l2 {
        key = { hdr.ethernet.dst: exact @name("dst"); }
        actions = { forward; flood; }
        default_action = flood();
        size = 1024;
    }

    action answer_arp() {
        hdr.ethernet.dst = hdr.ethernet.src;
        hdr.ethernet.src = meta.own_mac;
        hdr.arp.operation = ARP_REPLY;
        hdr.arp.target_mac = hdr.arp.sender_mac;
        hdr.arp.target_ip = hdr.arp.sender_ip;
        hdr.arp.sender_mac = meta.own_mac;
        hdr.arp.sender_ip = meta.own_ip;
        standard.egress_spec = standard.ingress_port;
    }

    apply {
        if (own && hdr.arp.isValid() && hdr.arp.operation == ARP_REQUEST) {
            answer_arp();
        } else if (own && hdr.arp.isValid()) {
            standard.egress_spec = CPU_PORT;
        } else if (own) {
            mark_to_drop(standard);
        } else {
            l2.apply();
        }
    }
}
