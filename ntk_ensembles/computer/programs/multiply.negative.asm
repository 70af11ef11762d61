# The product of two numbers of either sign, by repeated addition.
#
# input x: min to max
# input y: min to max
# result product: x * y, wrapped to the word

        zero y below            # is y negative?
        x minus                 # minus <- -x
up:     one y -1                # y <- y - 1; below 0: halt
        minus product           # product <- product + x
        zero down up
below:  x product               # product <- product - x
        down y below            # y <- y + 1; still negative: again
        zero down down:-1       # halt; the -1 here is the constant down

x:      . -9
y:      . 13
product: . 0
minus:  . 0
zero:   . 0
one:    . 1
