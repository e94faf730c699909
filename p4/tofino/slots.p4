// The slots (TNA): one access a register a packet, so that what a version holds is found out register by register.
#include "tofino_parser.p4"

// Whose sum a version of a slot holds
struct held_t {
    bit<32> epoch;
    bit<32> chunk;      // + 1
}

control Slots(inout headers_t hdr, inout metadata_t meta) {
    Register<held_t, bit<16>>(VERSIONS) versions;
    Register<bit<32>, bit<16>>(VERSIONS) seens;
    Register<bit<8>, bit<16>>(VERSIONS) exponents;

    // Only packets of the installed epoch come here: the one held is theirs or an older one
    RegisterAction<held_t, bit<16>, bit<32>>(versions) look = {
        void apply(inout held_t held, out bit<32> before) {
            before = 0;
            if (held.epoch == hdr.switchml.epoch && held.chunk >= meta.next) {
                before = held.chunk;
            } else {
                held.epoch = hdr.switchml.epoch;
                held.chunk = meta.next;
            }
        }
    };

    RegisterAction<bit<32>, bit<16>, bit<32>>(seens) see_first = {
        void apply(inout bit<32> held, out bit<32> before) {
            before = 0;
            held = meta.member;
        }
    };

    RegisterAction<bit<32>, bit<16>, bit<32>>(seens) see = {
        void apply(inout bit<32> held, out bit<32> before) {
            before = held;
            held = held | meta.member;
        }
    };

    RegisterAction<bit<8>, bit<16>, bit<8>>(exponents) first_exponent = {
        void apply(inout bit<8> held, out bit<8> largest) {
            held = hdr.switchml.exponent;
            largest = held;
        }
    };

    RegisterAction<bit<8>, bit<16>, bit<8>>(exponents) larger_exponent = {
        void apply(inout bit<8> held, out bit<8> largest) {
            held = max(held, hdr.switchml.exponent);
            largest = held;
        }
    };

    action look_at_version() {
        meta.before = look.execute(meta.version);
    }

    action see_the_first() {
        hdr.work.op = STORE;
        meta.seen = see_first.execute(meta.version);
    }

    action see_another() {
        hdr.work.op = ADD;
        meta.seen = see.execute(meta.version);
    }

    action take_exponent() {
        hdr.switchml.exponent = first_exponent.execute(meta.version);
    }

    action take_larger_exponent() {
        hdr.switchml.exponent = larger_exponent.execute(meta.version);
    }

    action unite() {
        meta.again = meta.seen & meta.member;
        hdr.work.seen = meta.seen | meta.member;
    }

    action compare_with_all() {
        meta.lacking = hdr.work.seen ^ meta.all;
    }

    apply {
        look_at_version();
        if (meta.before == 0) {
            see_the_first();
            take_exponent();
        } else if (meta.before == meta.next) {
            see_another();
            take_larger_exponent();
        }
        unite();
        compare_with_all();
    }
}
