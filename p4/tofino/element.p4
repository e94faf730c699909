// One register of values (TNA): a packet gets at it once.
#include "tofino_parser.p4"

control Element(inout bit<32> value, in bit<8> op, in bit<16> index) {
    Register<bit<32>, bit<16>>(CELLS) held;

    RegisterAction<bit<32>, bit<16>, bit<32>>(held) store_it = {
        void apply(inout bit<32> sum, out bit<32> result) {
            sum = value;
            result = sum;
        }
    };

    RegisterAction<bit<32>, bit<16>, bit<32>>(held) add_it = {
        void apply(inout bit<32> sum, out bit<32> result) {
            sum = sum + value;
            result = sum;
        }
    };

    RegisterAction<bit<32>, bit<16>, bit<32>>(held) load_it = {
        void apply(inout bit<32> sum, out bit<32> result) {
            result = sum;
        }
    };

    action store() {
        value = store_it.execute(index);
    }

    action add() {
        value = add_it.execute(index);
    }

    action load() {
        value = load_it.execute(index);
    }

    table choose {
        key = { op: exact; }
        actions = { store; add; load; @defaultonly NoAction; }
        default_action = NoAction();
        const entries = {
            STORE: store();
            ADD: add();
            LOAD: load();
        }
        size = 4;
    }

    apply {
        choose.apply();
    }
}
