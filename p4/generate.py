"""Writes the P4 lines that repeat once an element: `python p4/generate.py`.

A block is 32 integers, what a Tofino pass can add; a packet of 64 has two, one of 256 eight.
"""

from pathlib import Path

BLOCK = 32
HERE = Path(__file__).resolve().parent


def _lines(line: str) -> str:
    return "\n".join(line.replace("#", str(number)) for number in range(BLOCK))


def header() -> str:
    """The block of integers as a header."""
    return f"""// Written by generate.py.
#define BLOCK {BLOCK}

header block_t {{
{_lines("    bit<32> e#;")}
}}
"""


def bmv2() -> str:
    """The registers of a block and what is done with them, for v1model."""
    return f"""// Written by generate.py.
#include "parser.p4"

const bit<32> VERSIONS = 1024;  // two a slot, all sessions together

enum bit<8> op_t {{
    STORE = 0,  // the first of a chunk overwrites: a version needs no clearing
    ADD = 1,
    LOAD = 2
}}

// {BLOCK} integers of every version of every slot.
control Block(inout block_t block, in op_t op, in bit<32> index) {{
{_lines("    register<bit<32>>(VERSIONS) r#;")}
    bit<32> held;

    action store() {{
{_lines("        r#.write(index, block.e#);")}
    }}

    action add() {{
{_lines("        r#.read(held, index); block.e# = block.e# + held; r#.write(index, block.e#);")}
    }}

    action load() {{
{_lines("        r#.read(block.e#, index);")}
    }}

    apply {{
        if (op == op_t.STORE) {{
            store();
        }} else if (op == op_t.ADD) {{
            add();
        }} else {{
            load();
        }}
    }}
}}
"""


def tofino() -> str:
    """The registers of a block for TNA: one access a register a packet."""
    instances = _lines("    Element() element#;")
    calls = _lines("        element#.apply(block.e#, op, index);")
    return f"""// Written by generate.py.
#include "element.p4"

// {BLOCK} integers of every block of every version of every slot, added in one pass.
control Block(inout block_t block, in bit<8> op, in bit<16> index) {{
{instances}

    apply {{
{calls}
    }}
}}
"""


FILES = {"block.p4": header, "bmv2_block.p4": bmv2, "tofino/tofino_block.p4": tofino}

if __name__ == "__main__":
    for name, write in FILES.items():
        (HERE / name).write_text(write())
