# The sum of two numbers.
#
# input x: min to max
# input y: min to max
# result sum: x + y, wrapped to the word; it replaces y

        x minus                 # minus <- -x
        minus y                 # y <- y + x
        zero end end:-1         # -1 - 0 is negative: go to -1, halt

x:      . 29
y: sum: . 58
minus:  . 0
zero:   . 0
