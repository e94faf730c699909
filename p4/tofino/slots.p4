// The slots (TNA): one access a register a packet, so that what a version holds is found out register by register.
#include "tofino_parser.p4"

control Slots(inout headers_t hdr, inout metadata_t meta) {
    Register<bit<32>, bit<16>>(VERSIONS) epochs;
    Register<bit<32>, bit<16>>(VERSIONS) chunks;
    Register<bit<32>, bit<16>>(VERSIONS) seens;
    Register<bit<8>, bit<16>>(VERSIONS) exponents;

    // Only packets of the installed epoch come here: the one held is theirs or an older one
    RegisterAction<bit<32>, bit<16>, bit<32>>(epochs) begin_epoch = {
        void apply(inout bit<32> held, out bit<32> before) {
            before = held;
            held = hdr.switchml.epoch;
        }
    };

    RegisterAction<bit<32>, bit<16>, bit<32>>(chunks) first_chunk = {
        void apply(inout bit<32> held, out bit<32> before) {
            before = 0;
            held = meta.next;
        }
    };

    RegisterAction<bit<32>, bit<16>, bit<32>>(chunks) later_chunk = {
        void apply(inout bit<32> held, out bit<32> before) {
            before = held;
            if (held < meta.next) {
                held = meta.next;
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

    action look_at_epoch() {
        meta.epoch = begin_epoch.execute(meta.version);
    }

    action compare_epochs() {
        meta.epoch = meta.epoch ^ hdr.switchml.epoch;
    }

    action look_at_first_chunk() {
        meta.before = first_chunk.execute(meta.version);
    }

    action look_at_chunk() {
        meta.before = later_chunk.execute(meta.version);
    }

    action compare_chunks() {
        meta.later = meta.next |-| meta.before;
        meta.earlier = meta.before |-| meta.next;
    }

    action see_the_first() {
        meta.seen = see_first.execute(meta.version);
    }

    action see_another() {
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
        look_at_epoch();
        compare_epochs();
        if (meta.epoch != 0) {
            look_at_first_chunk();
        } else {
            look_at_chunk();
        }
        compare_chunks();
        if (meta.later != 0) {
            see_the_first();
            take_exponent();
        } else if (meta.earlier == 0) {
            see_another();
            take_larger_exponent();
        }
        unite();
        compare_with_all();
    }
}
