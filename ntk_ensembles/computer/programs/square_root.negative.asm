# The integer square root: 1 + 3 + 5 + ... + (2 k - 1) is k squared.
#
# input x: 0 to max
# result root: the largest integer whose square is at most x

loop:   odd x down:-1           # x <- x - odd; negative: halt; this -1 is the constant down
        down root               # root <- root + 1
        minus2 odd              # odd <- odd + 2
        zero down zero:loop     # the address of loop, 0, is the constant zero

x:      . 90
root:   . 0
odd:    . 1
minus2: . -2
