// Written by generate.py.
#define BLOCK 32

header block_t {
    bit<32> e0;
    bit<32> e1;
    bit<32> e2;
    bit<32> e3;
    bit<32> e4;
    bit<32> e5;
    bit<32> e6;
    bit<32> e7;
    bit<32> e8;
    bit<32> e9;
    bit<32> e10;
    bit<32> e11;
    bit<32> e12;
    bit<32> e13;
    bit<32> e14;
    bit<32> e15;
    bit<32> e16;
    bit<32> e17;
    bit<32> e18;
    bit<32> e19;
    bit<32> e20;
    bit<32> e21;
    bit<32> e22;
    bit<32> e23;
    bit<32> e24;
    bit<32> e25;
    bit<32> e26;
    bit<32> e27;
    bit<32> e28;
    bit<32> e29;
    bit<32> e30;
    bit<32> e31;
}
