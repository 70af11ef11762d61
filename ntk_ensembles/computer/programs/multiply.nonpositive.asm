# The product of two numbers of either sign, by repeated addition.
#
# input x: min to max
# input y: min to max
# result product: x * y, wrapped to the word

        minus y below           # minus is 0 still; is y at most 0?
        x minus                 # minus <- -x
up:     minus product           # product <- product + x
        one y -1                # y <- y - 1; at most 0: halt
        x x up                  # 0: always goes up; x has served
below:  down y more             # y <- y + 1; at most 0: y was negative
        minus minus down:-1     # halt; the -1 here is the constant down
more:   x product               # product <- product - x
        minus minus below

x:      . -9
y:      . 13
product: . 0
minus:  . 0
one:    . 1
