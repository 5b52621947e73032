"""Which tile a program works on."""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(program, row_blocks, column_blocks, GROUP: tl.constexpr):
    """(row block, column block): programs that run together share GROUP row blocks in L2.

    Within a group the row block varies fastest, so that each column block is read once for
    GROUP row blocks.
    """
    group_size = GROUP * column_blocks
    first = (program // group_size) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = program % group_size
    return first + within % height, within // height
