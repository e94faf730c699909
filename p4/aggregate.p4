// The slots (v1model). What a branch is called here, its function is called in switchml/_switch.py.
#include "bmv2_block.p4"

control Aggregate(inout headers_t hdr, inout metadata_t meta, in bit<32> index, out fate_t fate) {
    // A version of a slot: whose sum it holds. `seen` is 0 where it is nobody's.
    register<bit<32>>(VERSIONS) chunks;
    register<bit<32>>(VERSIONS) epochs;
    register<bit<32>>(VERSIONS) seens;
    register<bit<8>>(VERSIONS) exponents;
    register<bit<16>>(VERSIONS) sizes;
    Block() block0;
    Block() block1;
    Block() block2;
    Block() block3;
    Block() block4;
    Block() block5;
    Block() block6;
    Block() block7;

    bit<32> chunk;
    bit<32> epoch;
    bit<32> seen;
    bit<8> exponent;
    bit<16> size;
    op_t op = op_t.ADD;

    action look() {
        chunks.read(chunk, index);
        epochs.read(epoch, index);
        seens.read(seen, index);
        exponents.read(exponent, index);
        sizes.read(size, index);
    }

    action begin() {
        op = op_t.STORE;
        seen = 0;
        exponent = 0;
        size = hdr.switchml.elements;
        chunks.write(index, hdr.switchml.chunk);
        epochs.write(index, hdr.switchml.epoch);
        sizes.write(index, size);
    }

    action mark() {
        seen = seen | meta.bit_;
        exponent = hdr.switchml.exponent > exponent ? hdr.switchml.exponent : exponent;
        seens.write(index, seen);
        exponents.write(index, exponent);
    }

    action repeated() {
        op = op_t.LOAD;
        meta.reply = seen == meta.session.all ? reply_t.RESULT : reply_t.PROGRESS;
    }

    // A repeat may be shorter than the sum that answers it
    action show_64() {
        hdr.b0.setValid();
        hdr.b1.setValid();
    }

    action show_256() {
        show_64();
        hdr.b2.setValid();
        hdr.b3.setValid();
        hdr.b4.setValid();
        hdr.b5.setValid();
        hdr.b6.setValid();
        hdr.b7.setValid();
    }

    // READ and RESET of the control plane
    action tell() {
        hdr.packet_in =
            { 0, hdr.packet_out.operation, hdr.packet_out.index, chunk, epoch, seen, exponent, size };
        hdr.packet_out.setInvalid();
    }

    action forget() {
        seens.write(index, 0);
    }

    apply {
        fate = fate_t.CONTROL;
        look();
        if (hdr.packet_out.isValid()) {
            if (hdr.packet_out.operation == control_t.RESET) {
                forget();
            }
            tell();
            return;
        }
        bool held = seen != 0 && epoch == hdr.switchml.epoch;
        bool again = held && hdr.switchml.chunk == chunk;
        if (held && hdr.switchml.chunk < chunk) {
            fate = fate_t.STALE;
            return;
        }
        if (again && (seen & meta.bit_) != 0) {
            fate = fate_t.REPEAT;
            repeated();
            // bmv2 gives a packet room to grow by 512 bytes; one worker never sends a chunk in two sizes
            if (meta.reply == reply_t.PROGRESS || (size == 256 && hdr.switchml.elements != 256)) {
                size = 0;
            }
        } else if (again && size != hdr.switchml.elements) {
            fate = fate_t.MALFORMED;
            return;
        } else {
            if (!again) {
                begin();
            }
            mark();
            fate = fate_t.ADDED;
            if (seen == meta.session.all) {
                fate = fate_t.CHUNK;
                meta.reply = reply_t.RESULT;
            }
        }
        if (size == 64) {
            show_64();
        } else if (size == 256) {
            show_256();
        }
        if (size != 0) {
            block0.apply(hdr.b0, op, index);
            block1.apply(hdr.b1, op, index);
        }
        if (size == 256) {
            block2.apply(hdr.b2, op, index);
            block3.apply(hdr.b3, op, index);
            block4.apply(hdr.b4, op, index);
            block5.apply(hdr.b5, op, index);
            block6.apply(hdr.b6, op, index);
            block7.apply(hdr.b7, op, index);
        }
        meta.seen = seen;
        hdr.switchml.exponent = exponent;
        hdr.switchml.elements = size;
    }
}
