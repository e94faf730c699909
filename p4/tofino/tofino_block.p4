// Written by generate.py.
#include "element.p4"

// 32 integers of every block of every version of every slot, added in one pass.
control Block(inout block_t block, in bit<8> op, in bit<16> index) {
    Element() element0;
    Element() element1;
    Element() element2;
    Element() element3;
    Element() element4;
    Element() element5;
    Element() element6;
    Element() element7;
    Element() element8;
    Element() element9;
    Element() element10;
    Element() element11;
    Element() element12;
    Element() element13;
    Element() element14;
    Element() element15;
    Element() element16;
    Element() element17;
    Element() element18;
    Element() element19;
    Element() element20;
    Element() element21;
    Element() element22;
    Element() element23;
    Element() element24;
    Element() element25;
    Element() element26;
    Element() element27;
    Element() element28;
    Element() element29;
    Element() element30;
    Element() element31;

    apply {
        element0.apply(block.e0, op, index);
        element1.apply(block.e1, op, index);
        element2.apply(block.e2, op, index);
        element3.apply(block.e3, op, index);
        element4.apply(block.e4, op, index);
        element5.apply(block.e5, op, index);
        element6.apply(block.e6, op, index);
        element7.apply(block.e7, op, index);
        element8.apply(block.e8, op, index);
        element9.apply(block.e9, op, index);
        element10.apply(block.e10, op, index);
        element11.apply(block.e11, op, index);
        element12.apply(block.e12, op, index);
        element13.apply(block.e13, op, index);
        element14.apply(block.e14, op, index);
        element15.apply(block.e15, op, index);
        element16.apply(block.e16, op, index);
        element17.apply(block.e17, op, index);
        element18.apply(block.e18, op, index);
        element19.apply(block.e19, op, index);
        element20.apply(block.e20, op, index);
        element21.apply(block.e21, op, index);
        element22.apply(block.e22, op, index);
        element23.apply(block.e23, op, index);
        element24.apply(block.e24, op, index);
        element25.apply(block.e25, op, index);
        element26.apply(block.e26, op, index);
        element27.apply(block.e27, op, index);
        element28.apply(block.e28, op, index);
        element29.apply(block.e29, op, index);
        element30.apply(block.e30, op, index);
        element31.apply(block.e31, op, index);
    }
}
