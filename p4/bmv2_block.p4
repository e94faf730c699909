// Written by generate.py.
#include "parser.p4"

const bit<32> VERSIONS = 1024;  // two a slot, all sessions together

enum bit<8> op_t {
    STORE = 0,  // the first of a chunk overwrites: a version needs no clearing
    ADD = 1,
    LOAD = 2
}

// 32 integers of every version of every slot.
control Block(inout block_t block, in op_t op, in bit<32> index) {
    register<bit<32>>(VERSIONS) r0;
    register<bit<32>>(VERSIONS) r1;
    register<bit<32>>(VERSIONS) r2;
    register<bit<32>>(VERSIONS) r3;
    register<bit<32>>(VERSIONS) r4;
    register<bit<32>>(VERSIONS) r5;
    register<bit<32>>(VERSIONS) r6;
    register<bit<32>>(VERSIONS) r7;
    register<bit<32>>(VERSIONS) r8;
    register<bit<32>>(VERSIONS) r9;
    register<bit<32>>(VERSIONS) r10;
    register<bit<32>>(VERSIONS) r11;
    register<bit<32>>(VERSIONS) r12;
    register<bit<32>>(VERSIONS) r13;
    register<bit<32>>(VERSIONS) r14;
    register<bit<32>>(VERSIONS) r15;
    register<bit<32>>(VERSIONS) r16;
    register<bit<32>>(VERSIONS) r17;
    register<bit<32>>(VERSIONS) r18;
    register<bit<32>>(VERSIONS) r19;
    register<bit<32>>(VERSIONS) r20;
    register<bit<32>>(VERSIONS) r21;
    register<bit<32>>(VERSIONS) r22;
    register<bit<32>>(VERSIONS) r23;
    register<bit<32>>(VERSIONS) r24;
    register<bit<32>>(VERSIONS) r25;
    register<bit<32>>(VERSIONS) r26;
    register<bit<32>>(VERSIONS) r27;
    register<bit<32>>(VERSIONS) r28;
    register<bit<32>>(VERSIONS) r29;
    register<bit<32>>(VERSIONS) r30;
    register<bit<32>>(VERSIONS) r31;
    bit<32> held;

    action store() {
        r0.write(index, block.e0);
        r1.write(index, block.e1);
        r2.write(index, block.e2);
        r3.write(index, block.e3);
        r4.write(index, block.e4);
        r5.write(index, block.e5);
        r6.write(index, block.e6);
        r7.write(index, block.e7);
        r8.write(index, block.e8);
        r9.write(index, block.e9);
        r10.write(index, block.e10);
        r11.write(index, block.e11);
        r12.write(index, block.e12);
        r13.write(index, block.e13);
        r14.write(index, block.e14);
        r15.write(index, block.e15);
        r16.write(index, block.e16);
        r17.write(index, block.e17);
        r18.write(index, block.e18);
        r19.write(index, block.e19);
        r20.write(index, block.e20);
        r21.write(index, block.e21);
        r22.write(index, block.e22);
        r23.write(index, block.e23);
        r24.write(index, block.e24);
        r25.write(index, block.e25);
        r26.write(index, block.e26);
        r27.write(index, block.e27);
        r28.write(index, block.e28);
        r29.write(index, block.e29);
        r30.write(index, block.e30);
        r31.write(index, block.e31);
    }

    action add() {
        r0.read(held, index); block.e0 = block.e0 + held; r0.write(index, block.e0);
        r1.read(held, index); block.e1 = block.e1 + held; r1.write(index, block.e1);
        r2.read(held, index); block.e2 = block.e2 + held; r2.write(index, block.e2);
        r3.read(held, index); block.e3 = block.e3 + held; r3.write(index, block.e3);
        r4.read(held, index); block.e4 = block.e4 + held; r4.write(index, block.e4);
        r5.read(held, index); block.e5 = block.e5 + held; r5.write(index, block.e5);
        r6.read(held, index); block.e6 = block.e6 + held; r6.write(index, block.e6);
        r7.read(held, index); block.e7 = block.e7 + held; r7.write(index, block.e7);
        r8.read(held, index); block.e8 = block.e8 + held; r8.write(index, block.e8);
        r9.read(held, index); block.e9 = block.e9 + held; r9.write(index, block.e9);
        r10.read(held, index); block.e10 = block.e10 + held; r10.write(index, block.e10);
        r11.read(held, index); block.e11 = block.e11 + held; r11.write(index, block.e11);
        r12.read(held, index); block.e12 = block.e12 + held; r12.write(index, block.e12);
        r13.read(held, index); block.e13 = block.e13 + held; r13.write(index, block.e13);
        r14.read(held, index); block.e14 = block.e14 + held; r14.write(index, block.e14);
        r15.read(held, index); block.e15 = block.e15 + held; r15.write(index, block.e15);
        r16.read(held, index); block.e16 = block.e16 + held; r16.write(index, block.e16);
        r17.read(held, index); block.e17 = block.e17 + held; r17.write(index, block.e17);
        r18.read(held, index); block.e18 = block.e18 + held; r18.write(index, block.e18);
        r19.read(held, index); block.e19 = block.e19 + held; r19.write(index, block.e19);
        r20.read(held, index); block.e20 = block.e20 + held; r20.write(index, block.e20);
        r21.read(held, index); block.e21 = block.e21 + held; r21.write(index, block.e21);
        r22.read(held, index); block.e22 = block.e22 + held; r22.write(index, block.e22);
        r23.read(held, index); block.e23 = block.e23 + held; r23.write(index, block.e23);
        r24.read(held, index); block.e24 = block.e24 + held; r24.write(index, block.e24);
        r25.read(held, index); block.e25 = block.e25 + held; r25.write(index, block.e25);
        r26.read(held, index); block.e26 = block.e26 + held; r26.write(index, block.e26);
        r27.read(held, index); block.e27 = block.e27 + held; r27.write(index, block.e27);
        r28.read(held, index); block.e28 = block.e28 + held; r28.write(index, block.e28);
        r29.read(held, index); block.e29 = block.e29 + held; r29.write(index, block.e29);
        r30.read(held, index); block.e30 = block.e30 + held; r30.write(index, block.e30);
        r31.read(held, index); block.e31 = block.e31 + held; r31.write(index, block.e31);
    }

    action load() {
        r0.read(block.e0, index);
        r1.read(block.e1, index);
        r2.read(block.e2, index);
        r3.read(block.e3, index);
        r4.read(block.e4, index);
        r5.read(block.e5, index);
        r6.read(block.e6, index);
        r7.read(block.e7, index);
        r8.read(block.e8, index);
        r9.read(block.e9, index);
        r10.read(block.e10, index);
        r11.read(block.e11, index);
        r12.read(block.e12, index);
        r13.read(block.e13, index);
        r14.read(block.e14, index);
        r15.read(block.e15, index);
        r16.read(block.e16, index);
        r17.read(block.e17, index);
        r18.read(block.e18, index);
        r19.read(block.e19, index);
        r20.read(block.e20, index);
        r21.read(block.e21, index);
        r22.read(block.e22, index);
        r23.read(block.e23, index);
        r24.read(block.e24, index);
        r25.read(block.e25, index);
        r26.read(block.e26, index);
        r27.read(block.e27, index);
        r28.read(block.e28, index);
        r29.read(block.e29, index);
        r30.read(block.e30, index);
        r31.read(block.e31, index);
    }

    apply {
        if (op == op_t.STORE) {
            store();
        } else if (op == op_t.ADD) {
            add();
        } else {
            load();
        }
    }
}
