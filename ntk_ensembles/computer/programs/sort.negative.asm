# Sorts six cells in ascending order, by operands that move through them.
#
# For every i and every j: if cell i is smaller than cell j, exchange them. The cells are the last of the
# memory, and the four operands that point at them count from -6 up to 0 while addresses are taken modulo
# the number of cells; so they are the loops' counters too.
#
# cells: 64
# input data[6]: min/2 to max/2
# result data[6]: in ascending order

loop:   t
        j1:-6 t                 # t <- -cell j
        u
        i1:-6 u                 # u <- -cell i
        t u next                # u <- cell j - cell i; negative: leave them
        u j2:-6                 # cell j <- cell i
        t
        u t                     # t <- -u
        t i2:-6                 # cell i <- the old cell j
next:   down j1                 # j <- j + 1
        down j2 loop
        size j1                 # j <- -6
        size j2
        down i1                 # i <- i + 1
        down i2 loop
        zero down down:-1       # halt; the -1 here is the constant down

t:      . 0
u:      . 0
size:   . 6
zero:   . 0
        . 0 0 0 0 0 0           # up to the last six cells
data:   . 23 -7 41 0 -50 23
