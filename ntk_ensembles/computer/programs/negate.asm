# The negative of a number.
#
# input x: min to max
# result y: -x, wrapped to the word

        y                       # y <- 0
        x y                     # y <- 0 - x
        zero end end:-1         # -1 - 0 is negative: go to -1, halt

x:      . 42
y:      . 0
zero:   . 0
